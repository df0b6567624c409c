"""A detector as one plain function, for export: images of a fixed size to decoded boxes and scores."""

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from torchvision.models.detection.retinanet import RetinaNet
    from torchvision.models.detection.ssd import SSD

LARGEST_GROWTH = math.log(1000 / 16)


class RawDetections(nn.Module):
    """Boxes and class scores of every anchor, before the score threshold and the suppression.

    Args:
        network: SSDLite or RetinaNet of this package; not changed, but its parts are used.
        image_size: side of the images, a multiple of 32 for RetinaNet.
        in_channels: channels of the images.
        softmax: the scores are a softmax with the background first (SSDLite), not sigmoids.
    """

    input_description = "images (batch, channels, height, width), float32 in [0, 1], not normalised"

    def __init__(self, network: "SSD | RetinaNet", image_size: int, in_channels: int, softmax: bool) -> None:
        super().__init__()
        from torchvision.models.detection.image_list import ImageList

        self.features, self.head, self.softmax = network.backbone, network.head, softmax
        coder = network.box_coder if softmax else network.head.regression_head.box_coder
        self.weights = tuple(float(weight) for weight in coder.weights)
        for name, values in (("mean", network.transform.image_mean), ("std", network.transform.image_std)):
            self.register_buffer(name, torch.tensor(values).view(1, -1, 1, 1))
        images = self.mean.new_zeros(1, in_channels, image_size, image_size)
        with torch.no_grad():
            maps = list(self.features.eval()(images).values())
        anchors = network.anchor_generator(ImageList(images, [(image_size, image_size)]), maps)[0]
        corner, far = anchors[:, :2], anchors[:, 2:]
        self.register_buffer("centres", (corner + far) / 2)
        self.register_buffer("sides", far - corner)

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, channels, S, S) in [0, 1] to boxes xyxy in pixels and scores of each anchor, (B, A, 4 + C)."""
        outputs = self.head(list(self.features((images - self.mean) / self.std).values()))
        logits = outputs["cls_logits"]
        scores = logits.softmax(-1)[..., 1:] if self.softmax else logits.sigmoid()
        return torch.cat([self.decode(outputs["bbox_regression"]), scores], dim=-1)

    def decode(self, regression: Tensor) -> Tensor:
        """Boxes (B, A, 4) xyxy of what the head says of each anchor (B, A, 4)."""
        x, y, width, height = self.weights
        moved = regression[..., :2] / regression.new_tensor([x, y]) * self.sides + self.centres
        growth = (regression[..., 2:] / regression.new_tensor([width, height])).clamp(max=LARGEST_GROWTH)
        half = growth.exp() * self.sides / 2
        return torch.cat([moved - half, moved + half], dim=-1)
