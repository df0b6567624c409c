"""BOLT as a LightningModule; BYOL, SimSiam and MoCo v3 on the same encoder are settings of it."""

import copy
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Generator, Tensor, nn

from modules.auxiliary import BranchPair
from modules.bolt.feature_learner import FeatureLearner, PredictOutput
from modules.bolt.heads import MLPHead
from modules.bolt.losses import cosine_consistency, info_nce, normalised_std
from modules.bolt.perturbation import Projection, TokenPerturbation, take_patches
from modules.encoders import (
    SMALL_VIT,
    SMALL_VIT_OPTIONS,
    PosEmbed,
    create_token_encoder,
    embed_tokens,
    encode_tokens,
)
from modules.optimization import OptimizerName, ScheduleName
from modules.pictures import displayable

COPIES = 2
SHOWN_IMAGES = 8


class BranchOutput(NamedTuple):
    """Features (2B, D) and projections (2B, d): first the B images of view 1, then those of view 2."""

    features: Tensor
    projections: Tensor


class Branch(nn.Module):
    """One network of the pair: encoder, token perturbation between its patch embedding and its blocks, projector.

    Args:
        encoder: timm Vision Transformer without classifier.
        perturbation: None for plain views.
        projector: features -> projections.
    """

    def __init__(self, encoder: nn.Module, perturbation: TokenPerturbation | None, projector: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self.perturbation = perturbation
        self.projector = projector

    def forward(self, images: Tensor, permutation: Tensor | None, bn_per_view: bool = False) -> BranchOutput:
        """Both views in one pass.

        Args:
            images: (B, C, H, W) if the views are perturbed copies of the same images, else (2B, C, H, W).
            permutation: (2B, N), or None without perturbation.
            bn_per_view: batch statistics of the projector over each view alone instead of over both.
        """
        tokens = embed_tokens(self.encoder, images)
        if self.perturbation is not None:
            tokens, _ = self.perturbation(tokens, permutation)
        features = self._encode(tokens)
        return BranchOutput(features, apply_head(self.projector, features, bn_per_view))

    def _encode(self, tokens: Tensor) -> Tensor:
        """Features of both views: one pass on a GPU; on a CPU view by view, whose activations stay in its cache."""
        views = tokens.chunk(COPIES) if tokens.device.type == "cpu" else (tokens,)
        return torch.cat([encode_tokens(self.encoder, view) for view in views])


def apply_head(head: nn.Module, x: Tensor, bn_per_view: bool) -> Tensor:
    """A head on both views (2B, D), jointly or view by view, which differs in the statistics of its BatchNorm."""
    return torch.cat([head(view) for view in x.chunk(COPIES)]) if bn_per_view else head(x)


class BOLT(FeatureLearner):
    """Bootstrap Own Latent of Transformer, a reconstruction (Li et al., arXiv 2301.00989).

    Two networks receive the same patch tokens under different perturbations, and the online one predicts the projection
    of the target, which follows it as a moving average (callback ``EMATarget(online="online", target="target")``). The
    difficulty ranking is an auxiliary objective (callback ``DifficultyRanking``). Baselines on the same encoder: BYOL
    is ``perturb: false`` with two views; SimSiam the same with EMA momentum 0; MoCo v3 the same with ``loss: infonce``.

    The defaults are those of 8x8 digits on a laptop.

    Args:
        encoder: timm name of a Vision Transformer.
        encoder_options: arguments that change the named model (null or {} for none).
        image_size: side of the input in pixels.
        in_channels: channels of the input.
        pos_embed: ``sincos`` (fixed) or ``learned``.
        freeze_patch_embed: keep the patch embedding at its random start (MoCo v3's stabiliser).
        perturb: perturb tokens; false gives plain views.
        r_min: smallest strength of the perturbation, as a share of displaced tokens.
        r_max: largest strength.
        mix: g, share of a token's channels that comes from the displaced token; 1 is a plain jigsaw.
        projection: linear map of displaced tokens: ``learned``, ``orthogonal`` (fixed rotation) or ``none``.
        projector_hidden: hidden width of projector and predictor (BYOL: 4096).
        projector_dim: width d of projections (BYOL: 256).
        bn_per_view: batch statistics of the heads per view, as in BYOL, instead of over both views.
        loss: ``cosine`` (BYOL) or ``infonce`` (MoCo v3).
        temperature: of ``infonce``.
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
        compile_blocks: compile the Transformer blocks of both networks (torch.compile).

    Raises:
        ValueError: for a value outside its range, an encoder without tokens or an image size that patches do not tile.
    """

    def __init__(
        self,
        encoder: str = SMALL_VIT,
        encoder_options: dict[str, Any] | None = SMALL_VIT_OPTIONS,
        image_size: int = 8,
        in_channels: int = 1,
        pos_embed: PosEmbed = "sincos",
        freeze_patch_embed: bool = False,
        perturb: bool = True,
        r_min: float = 0.0,
        r_max: float = 1.0,
        mix: float = 0.5,
        projection: Projection = "learned",
        projector_hidden: int = 1024,
        projector_dim: int = 128,
        bn_per_view: bool = False,
        loss: Literal["cosine", "infonce"] = "cosine",
        temperature: float = 0.2,
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
        compile_blocks: bool = False,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.check_settings()
        network = create_token_encoder(encoder, image_size, in_channels, encoder_options, pos_embed)
        network.patch_embed.requires_grad_(not freeze_patch_embed)
        dim = network.num_features
        perturbation = TokenPerturbation(dim, r_min, r_max, mix, projection) if perturb else None
        self.online = Branch(network, perturbation, MLPHead(dim, projector_hidden, projector_dim))
        self.target = copy.deepcopy(self.online).requires_grad_(False)
        self.predictor = MLPHead(projector_dim, projector_hidden, projector_dim)
        self.init_auxiliary()

    @property
    def feature_encoder(self) -> nn.Module:
        """The online encoder."""
        return self.online.encoder

    @property
    def perturbation_strength(self) -> tuple[float, float]:
        """Smallest and largest strength; equal values leave nothing to rank."""
        return (self.hparams.r_min, self.hparams.r_max) if self.hparams.perturb else (0.0, 0.0)

    def check_settings(self) -> None:
        """Check the hyper-parameters that no part checks itself."""
        super().check_settings()
        if not self.hparams.temperature > 0:
            raise ValueError(f"temperature: {self.hparams.temperature} is not positive")
        for field in ("projector_hidden", "projector_dim"):
            if self.hparams[field] < 1:
                raise ValueError(f"{field}: {self.hparams[field]} is below 1")

    def setup(self, stage: str) -> None:
        """Compile the blocks for training if asked to; this renames no parameter."""
        if stage == "fit" and self.hparams.compile_blocks:
            for branch in (self.online, self.target):
                branch.encoder.blocks.compile()

    def sample_permutations(self, images: Tensor, generator: Generator | None = None) -> Tensor | None:
        """Permutations (2B, N) of the two perturbed copies of B images, or None without perturbation."""
        if self.online.perturbation is None:
            return None
        tokens = self.online.encoder.patch_embed.num_patches
        return self.online.perturbation.sample(COPIES * images.shape[0], tokens, generator, images.device)

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        """Consistency of both directions plus auxiliary objectives; everything the callbacks may want, detached."""
        views = tuple(batch.views)
        self._check_views(views)
        permutation = self.sample_permutations(views[0])
        images = _join(views, permutation is None)
        online = self.online(images, permutation, self.hparams.bn_per_view)
        prediction = apply_head(self.predictor, online.projections, self.hparams.bn_per_view)
        with torch.no_grad():
            target = self.target(images, permutation, self.hparams.bn_per_view)
        consistency = self.consistency(prediction, target.projections)
        loss = consistency + self.auxiliary_loss(self._pairs(online.features, target.features, permutation))
        spread = normalised_std(online.projections)
        self.log_epoch(
            {"train/loss": loss, "train/loss_consistency": consistency, "train/z_std": spread},
            batch_size=views[0].shape[0],
        )
        self.log("loss", loss.detach(), prog_bar=True, logger=False, on_step=True, on_epoch=False)
        return {"loss": loss, "loss_consistency": consistency.detach(), "z_std": spread}

    @torch.no_grad()
    def pictures(self, batch: Any) -> dict[str, list[tuple[Tensor, str]]]:
        """Patch layouts as the two branches would receive them: each patch shows g parts of the displaced one.

        Args:
            batch: its first images are shown.

        Returns:
            Under ``perturbed/online`` and ``perturbed/target``: pictures (3, H, W) in [0, 1] with their difficulty.
        """
        perturbation = self.online.perturbation
        if perturbation is None:
            return {}
        images = batch.images[:SHOWN_IMAGES]
        generator = Generator(images.device).manual_seed(0)
        permutation = self.sample_permutations(images, generator)
        patch_size = self.online.encoder.patch_embed.patch_size
        shown = displayable(images, getattr(self._trainer, "datamodule", None)).repeat(COPIES, 1, 1, 1)
        layouts = torch.lerp(shown, take_patches(shown, permutation, patch_size), perturbation.mix)
        captions = [f"difficulty {value:.2f}" for value in perturbation.difficulty(permutation).tolist()]
        pairs = list(zip(layouts, captions, strict=True))
        return {"perturbed/online": pairs[: len(images)], "perturbed/target": pairs[len(images) :]}

    def consistency(self, prediction: Tensor, projection: Tensor) -> Tensor:
        """Sum over both directions of the loss between predictions u and projections z' of the *other* view.

        Args:
            prediction: (2B, d), view 1 then view 2.
            projection: (2B, d), view 1 then view 2.
        """
        first, second = prediction.chunk(COPIES)
        other_first, other_second = projection.chunk(COPIES)
        return self._loss(first, other_second) + self._loss(second, other_first)

    def _loss(self, prediction: Tensor, projection: Tensor) -> Tensor:
        if self.hparams.loss == "cosine":
            return cosine_consistency(prediction, projection)
        keys = self.all_gather(projection).flatten(0, -2)
        return info_nce(prediction, keys, self.hparams.temperature, offset=self.global_rank * prediction.shape[0])

    def _pairs(self, online: Tensor, target: Tensor, permutation: Tensor | None) -> list[BranchPair]:
        if permutation is None:
            difficulty = online.new_zeros(online.shape[0])
        else:
            difficulty = self.online.perturbation.difficulty(permutation)
        y1, y2 = online.chunk(COPIES)
        t1, t2 = target.chunk(COPIES)
        d1, d2 = difficulty.chunk(COPIES)
        return [BranchPair(y1, t2, d1, d2), BranchPair(y2, t1, d2, d1)]

    def _check_views(self, views: Sequence[Tensor]) -> None:
        if views[0].shape[0] < 2:
            raise ValueError(
                "a training batch holds 1 image, but BatchNorm in the heads needs at least 2 per device: raise "
                "data.batch_size above 1, and keep drop_last true so that no rest of 1 remains at the end of an epoch"
            )
        if len(views) > COPIES:
            raise ValueError(f"views: {len(views)} views per image; expected 1 or 2")
        if len(views) == 1 and self.perturbation_strength[1] == 0 and self.global_step == 0:
            rank_zero_warn(
                "One view per image and no token perturbation: both networks see the same input and there is nothing "
                "to learn. Set data.views: 2, or perturb: true with r_max above 0."
            )


def _join(views: Sequence[Tensor], repeat: bool) -> Tensor:
    if len(views) == 1:
        return views[0].repeat(COPIES, 1, 1, 1) if repeat else views[0]
    return torch.cat(views)
