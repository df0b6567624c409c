"""A trained classifier that is quantized: by further training, or after training with a few pictures."""

from typing import Any, Literal, get_args

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor
from torch.nn import functional

from modules.classification import ImageClassifier
from modules.pretrained_weights import load_weights, network_weights

Quantization = Literal["qat", "ptq"]


class QuantizedClassifier(ImageClassifier):
    """A timm or torchvision classifier with its trained classification layer, to be quantized by callbacks.

    ``callbacks.BitAllocation`` chooses the bits and attaches the quantizers, ``callbacks.BlockReconstruction`` rounds
    weights in post-training quantization. Neither is needed to train or evaluate the network as it is.

    Args:
        quantization: ``qat``: the quantized network is trained on; ``ptq``: it is not, and an epoch is one look at the
            calibration pictures, from which input ranges are taken.
        **kwargs: see :class:`modules.classification.ImageClassifier`. ``init_from`` gives all weights, those of the
            classification layer too.

    Raises:
        ValueError: for a value outside its range.

    Source: Wang et al., CSMPQ (2022); Yao et al., HAWQ-v3 (2021), for training; Li et
    al., BRECQ (2021), for ``ptq``.
    """

    def __init__(
        self,
        quantization: Quantization = "qat",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.save_hyperparameters("quantization")
        if quantization not in get_args(Quantization):
            raise ValueError(f"quantization: {quantization!r} is unknown; expected {', '.join(get_args(Quantization))}")
        self.automatic_optimization = quantization == "qat"

    def load_pretrained(self) -> None:
        """Copy all weights of ``init_from`` into the network.

        Raises:
            FileNotFoundError: if the file is not there.
            ValueError: if it does not fit, naming the tensors.
        """
        weights = network_weights(self.hparams.init_from, self.network, self.hparams.which)
        load_weights(self.network, weights, with_classifier=True)
        rank_zero_info(f"Weights of the network taken from {self.hparams.init_from}, with its classifier.")

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor] | None:
        """Train on one batch, or with ``ptq`` only look at it."""
        if self.automatic_optimization:
            return super().training_step(batch, batch_idx)
        with torch.no_grad():
            loss = functional.cross_entropy(self(batch.images).float(), batch.labels, ignore_index=-1)
        self.log_epoch({"train/loss": loss}, batch_size=len(batch.labels))
        self.optimizers().step()  # moves nothing, and counts the step
        return None

    def configure_optimizers(self) -> Any:
        """As :class:`ImageClassifier`; with ``ptq`` an optimizer that never gets a gradient."""
        if self.automatic_optimization:
            return super().configure_optimizers()
        return torch.optim.SGD(self.parameters(), lr=0.0)
