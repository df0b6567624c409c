"""Shows what a module sees and does, on the first validation batch."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.seed import isolate_rng

from callbacks.classification_report import is_due
from callbacks.media import Media


class PictureLogger(Callback):
    """Shows the pictures that a module makes of its first validation batch.

    The module has a method ``pictures(batch) -> dict[str, list[tuple[Tensor, str]]]``: for each key a list of
    pictures (3, H, W) or (1, H, W) in [0, 1] with captions. A module without it is left alone. Random states are
    as before, so training is not disturbed.

    Args:
        every_n_epochs: show pictures in every n-th epoch and in the last one.
        max_images: pictures per key; further ones are left out.

    Raises:
        ValueError: for an argument below 1.

    Example::

        class Autoencoder(LightningModule):
            def pictures(self, batch):
                return {"val/reconstruction": [(image, "input") for image in batch[0][:4]]}
            ...

        Trainer(callbacks=[PictureLogger(every_n_epochs=10)]).fit(Autoencoder(), datamodule=data)
    """

    def __init__(self, every_n_epochs: int = 1, max_images: int = 8) -> None:
        for field, value in (("every_n_epochs", every_n_epochs), ("max_images", max_images)):
            if value < 1:
                raise ValueError(f"PictureLogger: {field} is {value}, expected >= 1")
        self.every_n_epochs = every_n_epochs
        self.max_images = max_images

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Show the pictures of the first batch."""
        media = Media(trainer)
        if batch_idx > 0 or dataloader_idx > 0 or not media.active or not hasattr(pl_module, "pictures"):
            return
        if is_due(trainer, self.every_n_epochs):
            with isolate_rng():
                pictures = pl_module.pictures(batch)
            for key, images in pictures.items():
                media.images(key, images[: self.max_images])
