"""Medical image classification in the layouts of the data sets themselves."""

from typing import Any, Literal

from datamodules.images import ImageDataModule
from datamodules.readers.aptos2019 import Aptos2019Reader
from datamodules.readers.folder import FolderReader
from datamodules.readers.isic2019 import Isic2019Reader
from datamodules.readers.medmnist import MedMNISTReader
from datamodules.readers.samples import Reader


class MedicalImages(ImageDataModule):
    """Medical images with one label each.

    Args:
        layout: ``folder`` (``<class>/*`` or ``{train,val,test}/<class>/*``, optionally with ``split.csv``),
            ``medmnist`` (``<name>.npz``), ``isic2019`` or ``aptos2019`` (the challenges' own folders).
        root: Folder of the data set; MedMNIST archives go to ``data/medmnist`` without one.
        name: Which MedMNIST archive, such as ``bloodmnist``, or the stem of a file of your own.
        medmnist_size: Side length of the published images: 28, 64, 128 or 224.
        download: Fetch the MedMNIST archive if it is missing.
        verify_md5: Refuse a MedMNIST archive whose content is not the published one.
        mirror: Address of a folder with the MedMNIST archives, instead of Zenodo.
        class_names: Names of the class indices of a MedMNIST-like file of your own.
        subject: What the images of a folder show: ``colour`` or ``grey`` (X-rays); decides which augmentations keep the
            label. None for grey where ``channels`` is 1.
        **kwargs: See :class:`datamodules.images.ImageDataModule`.
    """

    def __init__(
        self,
        layout: Literal["folder", "medmnist", "isic2019", "aptos2019"] = "medmnist",
        root: str | None = None,
        name: str = "bloodmnist",
        medmnist_size: int = 28,
        download: bool = True,
        verify_md5: bool = True,
        mirror: str | None = None,
        class_names: list[str] | None = None,
        subject: Literal["colour", "grey"] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)

    def make_reader(self) -> Reader:
        """Return the reader of the chosen layout."""
        options = self.hparams
        if options.layout == "medmnist":
            return MedMNISTReader(
                options.root,
                options.name,
                options.medmnist_size,
                download=options.download,
                verify_md5=options.verify_md5,
                mirror=options.mirror,
                class_names=options.class_names,
            )
        if options.layout == "folder":
            return FolderReader(options.root, options.subject or ("grey" if options.channels == 1 else "colour"))
        if options.layout == "isic2019":
            return Isic2019Reader(options.root, with_lesions=options.split != "random")
        if options.layout == "aptos2019":
            return Aptos2019Reader(options.root)
        raise ValueError(f"layout '{options.layout}' is unknown; expected folder, medmnist, isic2019 or aptos2019")
