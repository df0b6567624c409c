"""One LightningDataModule per kind of data, reading the real data sets' own on-disk layouts."""

from datamodules.batches import DetectionBatch, ImageBatch, LinkQueryBatch, SegmentationBatch, TripleBatch
from datamodules.image_classification import ImageClassification
from datamodules.images import ImageDataModule
from datamodules.knowledge_graph import KnowledgeGraph
from datamodules.medical_images import MedicalImages
from datamodules.object_detection import ObjectDetection
from datamodules.sampling import (
    BatchKey,
    EvaluationArraySampler,
    EvaluationBatchSampler,
    SampleKey,
    StreamBatchSampler,
    TrainArraySampler,
    TrainBatchSampler,
    resume_position,
)
from datamodules.semantic_segmentation import SemanticSegmentation
from datamodules.semi_supervised_segmentation import SemiSupervisedSegmentation

__all__ = [
    "BatchKey",
    "DetectionBatch",
    "EvaluationArraySampler",
    "EvaluationBatchSampler",
    "ImageBatch",
    "ImageClassification",
    "ImageDataModule",
    "KnowledgeGraph",
    "LinkQueryBatch",
    "MedicalImages",
    "ObjectDetection",
    "SampleKey",
    "SegmentationBatch",
    "SemanticSegmentation",
    "SemiSupervisedSegmentation",
    "StreamBatchSampler",
    "TrainArraySampler",
    "TrainBatchSampler",
    "TripleBatch",
    "resume_position",
]
