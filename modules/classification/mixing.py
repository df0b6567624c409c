"""Mixup and CutMix: training on mixtures of two images and of their labels."""

import numpy as np
from torch import Tensor


class BatchMixing:
    """timm's Mixup and CutMix of a batch with itself in reverse order, drawn from where training is.

    One share is drawn per batch (Zhang et al., "mixup", 2018; Yun et al., "CutMix", 2019). The draw is a function of
    the position alone, so that a resumed run mixes as the uninterrupted one does and the ranks mix differently. The
    last image of an odd batch has no partner and stays as it is.

    Args:
        num_classes: C.
        mixup_alpha: of Mixup's Beta distribution; 0 for CutMix only.
        cutmix_alpha: of CutMix' Beta distribution; 0 for Mixup only.
        prob: how often a batch is mixed.
        switch_prob: with both, how often it is CutMix.
        label_smoothing: of the targets.
    """

    def __init__(
        self,
        num_classes: int,
        mixup_alpha: float,
        cutmix_alpha: float,
        prob: float = 1.0,
        switch_prob: float = 0.5,
        label_smoothing: float = 0.0,
    ) -> None:
        from timm.data.mixup import Mixup

        self.num_classes, self.label_smoothing = num_classes, label_smoothing
        self.mixup = Mixup(
            mixup_alpha=mixup_alpha,
            cutmix_alpha=cutmix_alpha,
            prob=prob,
            switch_prob=switch_prob,
            label_smoothing=label_smoothing,
            num_classes=num_classes,
        )

    def __call__(self, images: Tensor, labels: Tensor, position: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """Mix a batch, which itself stays as it is.

        Args:
            images: (B, channels, H, W).
            labels: (B,) class indices.
            position: numbers that determine the draw, such as seed, rank and step.

        Returns:
            Images of the same shape, and targets (B, C) whose rows sum to 1.

        Raises:
            ValueError: for an image without a label.
        """
        from timm.data.mixup import mixup_target

        if (labels < 0).any():
            raise ValueError(
                "mixup_alpha, cutmix_alpha: a batch holds images without a label, which cannot be mixed; "
                "train with data.augment finetune, or set both to 0"
            )
        images, targets = images.clone(), mixup_target(labels, self.num_classes, 1.0, self.label_smoothing)
        paired = len(images) // 2 * 2
        before = np.random.get_state()  # timm draws from the global generator
        np.random.seed(np.random.SeedSequence(position).generate_state(4))
        try:
            if paired:
                _, targets[:paired] = self.mixup(images[:paired], labels[:paired])
        finally:
            np.random.set_state(before)
        return images, targets


def check_mixing(
    mixup_alpha: float, cutmix_alpha: float, mixup_prob: float, switch_prob: float, class_weight: str
) -> None:
    """Raise a ValueError that names the field, its value and its range."""
    for field, alpha in (("mixup_alpha", mixup_alpha), ("cutmix_alpha", cutmix_alpha)):
        if alpha < 0:
            raise ValueError(f"{field}: {alpha} is negative; expected >= 0, 0 for none")
    for field, share in (("mixup_prob", mixup_prob), ("switch_prob", switch_prob)):
        if not 0 <= share <= 1:
            raise ValueError(f"{field}: {share} is outside [0, 1]")
    if (mixup_alpha or cutmix_alpha) and class_weight != "none":
        raise ValueError(
            f"class_weight: {class_weight!r} weighs images by their class, but with mixup_alpha {mixup_alpha} and "
            f"cutmix_alpha {cutmix_alpha} an image has two; set class_weight: none, or both to 0"
        )
