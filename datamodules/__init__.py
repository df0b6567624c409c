"""One LightningDataModule per kind of data, reading the real data sets' own on-disk layouts."""

from datamodules.sampling import EvaluationBatchSampler, SampleKey, TrainBatchSampler, resume_position

__all__ = ["EvaluationBatchSampler", "SampleKey", "TrainBatchSampler", "resume_position"]
