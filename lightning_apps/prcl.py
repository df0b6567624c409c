"""PRCL: semi-supervised segmentation with probabilistic representations, and its baselines."""

import sys

from lightning.pytorch import LightningModule

from callbacks import EMATarget, MaskWriter, MetricHistory, SegmentationReport
from datamodules import SemanticSegmentation
from lightning_apps.app import App
from lightning_apps.cli import main

APP = App(
    name="prcl",
    summary="PRCL (AAAI 2023): semi-supervised segmentation with probabilistic representations, and its baselines",
    model=LightningModule,
    data=SemanticSegmentation,
    callbacks={
        "teacher": EMATarget,
        "segmentation_report": SegmentationReport,
        "masks": MaskWriter,
        "history": MetricHistory,
    },
    writers={"masks": SemanticSegmentation},
    facts=(
        "num_classes",
        "class_names",
        "image_size",
        "in_channels",
        "main_metric",
        "mean",
        "std",
        "palette",
        "flip",
    ),
)

if __name__ == "__main__":
    sys.exit(main(APP))
