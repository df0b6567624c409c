"""CSMPQ: mixed-precision quantization of a trained network."""

import sys

from lightning.pytorch import LightningDataModule, LightningModule

from callbacks import BitAllocation, BlockReconstruction, ClassificationReport, MaskWriter, SegmentationReport
from datamodules import SemanticSegmentation
from lightning_apps.app import App
from lightning_apps.cli import main

APP = App(
    name="csmpq",
    summary="CSMPQ (2022): mixed-precision quantization, in training or after it",
    model=LightningModule,
    data=LightningDataModule,
    callbacks={
        "allocation": BitAllocation,
        "reconstruction": BlockReconstruction,
        "report": ClassificationReport,
        "segmentation_report": SegmentationReport,
        "masks": MaskWriter,
    },
    writers={"masks": SemanticSegmentation},
    facts=("num_classes", "class_names", "image_size", "in_channels", "main_metric", "mean", "std", "palette"),
    subcommands=("allocate", "sweep", "features"),
)

if __name__ == "__main__":
    sys.exit(main(APP))
