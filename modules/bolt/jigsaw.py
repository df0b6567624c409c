"""The jigsaw baseline: tell which of a fixed set of permutations was applied to a grid of image tiles."""

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from modules.bolt.feature_learner import FeatureLearner, PredictOutput
from modules.encoders import SMALL_VIT, SMALL_VIT_OPTIONS, PosEmbed, create_token_encoder
from modules.optimization import OptimizerName, ScheduleName

GRIDS = (2, 3)


def distant_permutations(num_tiles: int, count: int) -> Tensor:
    """Permutations that are far from one another: each next one is farthest (Hamming) from its nearest predecessor.

    Args:
        num_tiles: length of a permutation, at most 9.
        count: how many.

    Returns:
        (count, num_tiles) int64, the identity first; always the same.

    Source: Noroozi and Favaro, "Unsupervised learning of visual representations by solving jigsaw puzzles" (2016).
    """
    places = np.ascontiguousarray(_all_permutations(num_tiles).T)
    nearest = np.full(places.shape[1], num_tiles + 1, dtype=np.uint8)
    chosen = [0]
    while len(chosen) < count:
        latest = places[:, chosen[-1]]
        distance = sum((tiles != tile).view(np.uint8) for tiles, tile in zip(places, latest, strict=True))
        np.minimum(nearest, distance, out=nearest)
        chosen.append(int(nearest.argmax()))
    return torch.from_numpy(places[:, chosen].T.astype(np.int64))


def _all_permutations(length: int) -> np.ndarray:
    """All permutations (length!, length), the identity first, made by inserting the largest element everywhere."""
    permutations = np.zeros((1, 0), dtype=np.uint8)
    for largest in range(length):
        inserted = [np.insert(permutations, place, largest, axis=1) for place in range(largest, -1, -1)]
        permutations = np.concatenate(inserted)
    return permutations


def shuffle_tiles(images: Tensor, permutations: Tensor, grid: int) -> Tensor:
    """Rearrange the tiles of square images.

    Args:
        images: (B, C, S, S).
        permutations: (B, grid * grid): place i receives tile permutations[i], places counted row by row.
        grid: tiles per side; pixels that do not fill a tile are cut off, and the result is scaled back to S.

    Returns:
        (B, C, S, S).
    """
    size = images.shape[-1]
    tile = size // grid
    cut = images[..., : tile * grid, : tile * grid]
    tiles = functional.unfold(cut, kernel_size=tile, stride=tile)
    tiles = tiles.gather(2, permutations.unsqueeze(1).expand(-1, tiles.shape[1], -1))
    shuffled = functional.fold(tiles, output_size=tile * grid, kernel_size=tile, stride=tile)
    if tile * grid == size:
        return shuffled
    return functional.interpolate(shuffled, size=(size, size), mode="bilinear", align_corners=False)


class Jigsaw(FeatureLearner):
    """Pre-training by classifying permutations of image tiles, on the encoders of BOLT.

    Args:
        encoder: timm name of a Vision Transformer.
        encoder_options: arguments that change the named model (null or {} for none).
        image_size: side of the input in pixels.
        in_channels: channels of the input.
        pos_embed: ``sincos`` (fixed) or ``learned``.
        grid: tiles per side, 2 or 3.
        permutations: size of the set to choose from.
        optimizer: ``adamw``, ``sgd`` or ``lars``.
        lr: peak learning rate.
        lr_reference_batch: batch size that ``lr`` is meant for, scaled linearly to the global batch; null: no scaling.
        weight_decay: not applied to biases, norms, position embedding and class token.
        beta1: of AdamW.
        beta2: of AdamW.
        momentum: of SGD and LARS.
        schedule: after the warm-up, ``cosine`` to zero or ``constant``.
        warmup_epochs: linear warm-up; null for a tenth of the run, at most 40 epochs.
        predict_output: what ``predict`` yields: ``probabilities`` of the fitted linear probe or ``features``.

    Raises:
        ValueError: for a value outside its range.
    """

    def __init__(
        self,
        encoder: str = SMALL_VIT,
        encoder_options: dict[str, Any] | None = SMALL_VIT_OPTIONS,
        image_size: int = 8,
        in_channels: int = 1,
        pos_embed: PosEmbed = "sincos",
        grid: int = 3,
        permutations: int = 100,
        optimizer: OptimizerName = "adamw",
        lr: float = 1e-3,
        lr_reference_batch: int | None = None,
        weight_decay: float = 0.05,
        beta1: float = 0.9,
        beta2: float = 0.999,
        momentum: float = 0.9,
        schedule: ScheduleName = "cosine",
        warmup_epochs: float | None = None,
        predict_output: PredictOutput = "probabilities",
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.check_settings()
        self.encoder = create_token_encoder(encoder, image_size, in_channels, encoder_options, pos_embed)
        self.classifier = nn.Linear(self.encoder.num_features, permutations)
        self.register_buffer("permutations", distant_permutations(grid * grid, permutations))
        self.init_auxiliary()

    @property
    def feature_encoder(self) -> nn.Module:
        """The encoder."""
        return self.encoder

    def check_settings(self) -> None:
        """Check the hyper-parameters."""
        super().check_settings()
        grid, permutations, size = (self.hparams[key] for key in ("grid", "permutations", "image_size"))
        if grid not in GRIDS:
            raise ValueError(f"grid: {grid} tiles per side; expected 2 or 3")
        if not 2 <= permutations <= math.factorial(grid * grid):
            raise ValueError(
                f"permutations: {permutations} is outside [2, {math.factorial(grid * grid)}] for grid: {grid}"
            )
        if size < grid:
            raise ValueError(f"image_size: {size} pixels cannot be cut into {grid} tiles per side")

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        """Cross-entropy of the permutation that was applied to each image."""
        images = torch.cat(tuple(batch.views))
        answer = torch.randint(len(self.permutations), (len(images),), device=images.device)
        puzzle = shuffle_tiles(images, self.permutations[answer], self.hparams.grid)
        logits = self.classifier(self.encoder(puzzle)).float()
        loss = functional.cross_entropy(logits, answer)
        accuracy = (logits.detach().argmax(1) == answer).float().mean()
        self.log_epoch({"train/loss": loss, "train/jigsaw_acc": accuracy}, batch_size=len(images))
        self.log("loss", loss.detach(), prog_bar=True, logger=False, on_step=True, on_epoch=False)
        return {"loss": loss}
