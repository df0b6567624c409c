"""What cuts across papers: Lightning callbacks that work in any project."""

from callbacks.analogy_retriever import AnalogyRetriever
from callbacks.atomic_files import atomic_bytes, atomic_text, atomic_write
from callbacks.best_and_last import BestAndLastCheckpoint
from callbacks.bit_allocation import BitAllocation
from callbacks.block_reconstruction import BlockReconstruction
from callbacks.checkpoint_io import AtomicCheckpointIO, CheckpointError, load_checkpoint
from callbacks.classification_report import ClassificationReport
from callbacks.collapse_monitor import CollapseMonitor
from callbacks.completion_writer import CompletionWriter
from callbacks.detection_writer import DetectionWriter
from callbacks.difficulty_ranking import DifficultyRanking
from callbacks.ema_target import EMATarget
from callbacks.exact_resume import ExactResume
from callbacks.frozen_parameters import FrozenParameters
from callbacks.graceful_stop import GracefulStop
from callbacks.mask_writer import MaskWriter
from callbacks.media import Media
from callbacks.metric_history import MetricHistory
from callbacks.non_finite import NonFiniteGuard, NonFiniteLossError
from callbacks.orphaned_ranks import stop_when_orphaned
from callbacks.pictures import PictureLogger
from callbacks.prediction_writer import PredictionWriter
from callbacks.probes import FeatureProbes
from callbacks.rank_report import RankReport
from callbacks.segmentation_report import SegmentationReport
from callbacks.step_seed import StepSeed
from callbacks.weight_averaging import WarmupWeightAveraging

__all__ = [
    "AnalogyRetriever",
    "AtomicCheckpointIO",
    "BestAndLastCheckpoint",
    "BitAllocation",
    "BlockReconstruction",
    "CheckpointError",
    "ClassificationReport",
    "CollapseMonitor",
    "CompletionWriter",
    "DetectionWriter",
    "DifficultyRanking",
    "EMATarget",
    "ExactResume",
    "FeatureProbes",
    "FrozenParameters",
    "GracefulStop",
    "MaskWriter",
    "Media",
    "MetricHistory",
    "NonFiniteGuard",
    "NonFiniteLossError",
    "PictureLogger",
    "PredictionWriter",
    "RankReport",
    "SegmentationReport",
    "StepSeed",
    "WarmupWeightAveraging",
    "atomic_bytes",
    "atomic_text",
    "atomic_write",
    "load_checkpoint",
    "stop_when_orphaned",
]
