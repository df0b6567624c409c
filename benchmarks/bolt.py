"""Cost of a BOLT step beside BYOL's, of our BYOL beside lightly's parts, and of the EMA update.

    python -m benchmarks.bolt [--threads 1] [--rounds 30]

needs `pip install '.[benchmark]'`. The references are written the way their documentation writes them.
"""

import argparse
import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import timm
import torch
from lightly.loss import NegativeCosineSimilarity
from lightly.models.modules import BYOLPredictionHead, BYOLProjectionHead
from lightly.models.utils import deactivate_requires_grad, update_momentum
from torch import Tensor, nn

from benchmarks.timing import interleaved, report
from callbacks.difficulty_ranking import DifficultyObjective
from callbacks.ema_target import MovingAverage
from modules.bolt import BOLT

TAU = 0.99
SMALL = {"patch_size": 7, "embed_dim": 64, "depth": 3, "num_heads": 4}


def our_step(images: tuple[Tensor, ...], size: int, options: dict[str, Any], perturb: bool) -> Callable[[], None]:
    """A whole training step of our module: forward, backward, optimiser, target."""
    torch.manual_seed(0)
    model = BOLT(encoder_options=options, image_size=size, in_channels=3, perturb=perturb)
    model.log = model.log_epoch = lambda *args, **kwargs: None  # no trainer here
    if perturb:
        model.auxiliary["rank"] = DifficultyObjective(model.feature_dim, weight=1.0)
    batch = SimpleNamespace(views=images, labels=None, index=None)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, weight_decay=0.05)
    average = MovingAverage(model.online, model.target)

    def step() -> None:
        optimizer.zero_grad()
        model.training_step(batch, 0)["loss"].backward()
        optimizer.step()
        average.update(TAU)

    return step


class LightlyBYOL(nn.Module):
    """BYOL around a timm encoder, as lightly's documentation builds it."""

    def __init__(self, backbone: nn.Module, hidden: int = 1024, dim: int = 128) -> None:
        super().__init__()
        self.backbone = backbone
        self.projection_head = BYOLProjectionHead(backbone.num_features, hidden, dim)
        self.prediction_head = BYOLPredictionHead(dim, hidden, dim)
        self.backbone_momentum = copy.deepcopy(self.backbone)
        self.projection_head_momentum = copy.deepcopy(self.projection_head)
        deactivate_requires_grad(self.backbone_momentum)
        deactivate_requires_grad(self.projection_head_momentum)

    def forward(self, x: Tensor) -> Tensor:
        """Prediction of the online network."""
        return self.prediction_head(self.projection_head(self.backbone(x).flatten(start_dim=1)))

    def forward_momentum(self, x: Tensor) -> Tensor:
        """Projection of the momentum network."""
        return self.projection_head_momentum(self.backbone_momentum(x).flatten(start_dim=1)).detach()


def lightly_step(images: tuple[Tensor, ...], size: int, options: dict[str, Any]) -> Callable[[], None]:
    """A whole training step of lightly's BYOL parts."""
    torch.manual_seed(0)
    backbone = timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=size, in_chans=3, **options)
    model = LightlyBYOL(backbone)
    criterion = NegativeCosineSimilarity()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, weight_decay=0.05)

    def step() -> None:
        update_momentum(model.backbone, model.backbone_momentum, m=TAU)
        update_momentum(model.projection_head, model.projection_head_momentum, m=TAU)
        first, second = images
        p0, z0 = model(first), model.forward_momentum(first)
        p1, z1 = model(second), model.forward_momentum(second)
        loss = 0.5 * (criterion(p0, z1) + criterion(p1, z0))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def ema_alternatives() -> dict[str, Callable[[], None]]:
    """One EMA update of a ViT-B."""
    torch.manual_seed(0)
    online = timm.create_model("vit_base_patch16_224", num_classes=0)
    targets = [copy.deepcopy(online).requires_grad_(False) for _ in range(3)]
    average = MovingAverage(online, targets[0])

    @torch.no_grad()
    def multiply_add() -> None:
        for ours, theirs in zip(targets[1].parameters(), online.parameters(), strict=True):
            ours.mul_(TAU).add_(theirs, alpha=1 - TAU)

    @torch.no_grad()
    def lerp() -> None:
        for ours, theirs in zip(targets[2].parameters(), online.parameters(), strict=True):
            ours.lerp_(theirs, 1 - TAU)

    return {"EMATarget": lambda: average.update(TAU), "loop of mul_.add_": multiply_add, "loop of lerp_": lerp}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--batch-size", type=int, default=128)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    cases = {"64 wide, 3 blocks, 28 px": (28, SMALL), "ViT-Ti/4, 28 px": (28, {"patch_size": 4})}
    for title, (size, encoder) in cases.items():
        rounds = options.rounds if size == 28 and encoder is SMALL else max(5, options.rounds // 5)
        images = torch.randn(2, options.batch_size, 3, size, size, generator=torch.Generator().manual_seed(0)).unbind()
        alternatives = {
            "our BYOL step": our_step(images, size, encoder, perturb=False),
            "BOLT step": our_step(images, size, encoder, perturb=True),
            "lightly BYOL step": lightly_step(images, size, encoder),
        }
        print(report(f"{title}, batch {options.batch_size}", interleaved(alternatives, rounds), "our BYOL step"))
    print(report("EMA of ViT-B", interleaved(ema_alternatives(), options.rounds), "EMATarget"))


if __name__ == "__main__":
    main()
