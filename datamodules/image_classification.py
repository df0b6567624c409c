"""Everyday image classification: digits, folders of pictures, CIFAR."""

from typing import Any, Literal

from datamodules.images import ImageDataModule
from datamodules.readers.cifar import CIFAR10, CIFAR100, CifarReader
from datamodules.readers.digits import DigitsReader
from datamodules.readers.folder import FolderReader
from datamodules.readers.samples import Reader


class ImageClassification(ImageDataModule):
    """Images with one label each.

    Args:
        layout: ``digits`` (8x8, part of scikit-learn, nothing to download), ``folder`` (``<class>/*`` or
            ``{train,val,test}/<class>/*``, optionally with ``split.csv``), ``cifar10`` or ``cifar100`` (the python
            archives).
        root: Folder of the data set; not needed for ``digits``, and CIFAR goes to ``data/cifar`` without one.
        download: Fetch the CIFAR archive if it is missing.
        verify_md5: Refuse a CIFAR archive whose content is not the published one.
        mirror: Address of a folder with the CIFAR archive, instead of the author's page.
        **kwargs: See :class:`datamodules.images.ImageDataModule`.
    """

    def __init__(
        self,
        layout: Literal["digits", "folder", "cifar10", "cifar100"] = "digits",
        root: str | None = None,
        download: bool = True,
        verify_md5: bool = True,
        mirror: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)

    def make_reader(self) -> Reader:
        """Return the reader of the chosen layout."""
        options = self.hparams
        if options.layout == "digits":
            return DigitsReader()
        if options.layout == "folder":
            return FolderReader(options.root, "photographs")
        if options.layout in ("cifar10", "cifar100"):
            archive = CIFAR10 if options.layout == "cifar10" else CIFAR100
            return CifarReader(options.root, archive, options.download, options.verify_md5, options.mirror)
        raise ValueError(f"layout '{options.layout}' is unknown; expected digits, folder, cifar10 or cifar100")
