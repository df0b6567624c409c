"""One LightningDataModule per kind of data, reading the real data sets' own on-disk layouts."""

from datamodules.batches import DetectionBatch, ImageBatch, SegmentationBatch
from datamodules.image_classification import ImageClassification
from datamodules.images import ImageDataModule
from datamodules.medical_images import MedicalImages
from datamodules.object_detection import ObjectDetection
from datamodules.sampling import (
    EvaluationBatchSampler,
    SampleKey,
    StreamBatchSampler,
    TrainBatchSampler,
    resume_position,
)
from datamodules.semantic_segmentation import SemanticSegmentation
from datamodules.semi_supervised_segmentation import SemiSupervisedSegmentation

__all__ = [
    "DetectionBatch",
    "EvaluationBatchSampler",
    "ImageBatch",
    "ImageClassification",
    "ImageDataModule",
    "MedicalImages",
    "ObjectDetection",
    "SampleKey",
    "SegmentationBatch",
    "SemanticSegmentation",
    "SemiSupervisedSegmentation",
    "StreamBatchSampler",
    "TrainBatchSampler",
    "resume_position",
]
