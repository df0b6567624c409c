"""BOLT: self-supervised pre-training of vision transformers for medical images, and what is trained from it."""

import sys

from lightning.pytorch import LightningModule

from callbacks import ClassificationReport, CollapseMonitor, DifficultyRanking, EMATarget, FeatureProbes
from datamodules import ImageDataModule
from lightning_apps.app import App
from lightning_apps.cli import main

APP = App(
    name="bolt",
    summary="BOLT (2301.00989): self-supervised ViT pre-training for medical images, fine-tuning and linear evaluation",
    model=LightningModule,
    data=ImageDataModule,
    callbacks={
        "ranking": DifficultyRanking,
        "probes": FeatureProbes,
        "ema": EMATarget,
        "collapse": CollapseMonitor,
        "report": ClassificationReport,
    },
    facts=("num_classes", "class_names", "image_size", "in_channels", "main_metric"),
    subcommands=("features",),
)

if __name__ == "__main__":
    sys.exit(main(APP))
