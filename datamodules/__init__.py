"""One LightningDataModule per kind of data, reading the real data sets' own on-disk layouts."""

from datamodules.batches import ImageBatch
from datamodules.image_classification import ImageClassification
from datamodules.images import ImageDataModule
from datamodules.medical_images import MedicalImages
from datamodules.sampling import EvaluationBatchSampler, SampleKey, TrainBatchSampler, resume_position

__all__ = [
    "EvaluationBatchSampler",
    "ImageBatch",
    "ImageClassification",
    "ImageDataModule",
    "MedicalImages",
    "SampleKey",
    "TrainBatchSampler",
    "resume_position",
]
