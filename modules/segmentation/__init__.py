"""Semantic segmentation: heads, scores, and a LightningModule for any timm backbone."""

from modules.segmentation.heads import ASPP, DeepLabV3Head, FCNHead, PSPHead, PyramidPooling, resize_logits
from modules.segmentation.lightning_module import DenseSegmenter
from modules.segmentation.metrics import SegmentationScores, pixel_cross_entropy
from modules.segmentation.network import SegmentationNetwork, build_network, sliding_logits

__all__ = [
    "ASPP",
    "DeepLabV3Head",
    "DenseSegmenter",
    "FCNHead",
    "PSPHead",
    "PyramidPooling",
    "SegmentationNetwork",
    "SegmentationScores",
    "build_network",
    "pixel_cross_entropy",
    "resize_logits",
    "sliding_logits",
]
