"""EMO: the mobile backbone for classification, semantic segmentation and object detection."""

import sys

from lightning.pytorch import LightningDataModule, LightningModule

from callbacks import ClassificationReport, DetectionWriter, MaskWriter, SegmentationReport, WarmupWeightAveraging
from datamodules import ObjectDetection, SemanticSegmentation
from lightning_apps.app import App
from lightning_apps.cli import main

APP = App(
    name="emo",
    summary="EMO (ICCV 2023): an efficient mobile backbone, for classification, segmentation and detection",
    model=LightningModule,
    data=LightningDataModule,
    callbacks={
        "averaging": WarmupWeightAveraging,
        "report": ClassificationReport,
        "segmentation_report": SegmentationReport,
        "masks": MaskWriter,
        "detections": DetectionWriter,
    },
    writers={"masks": SemanticSegmentation, "detections": ObjectDetection},
    facts=("num_classes", "class_names", "image_size", "in_channels", "main_metric", "mean", "std", "palette"),
    subcommands=("features",),
)

if __name__ == "__main__":
    sys.exit(main(APP))
