"""PRCL: semi-supervised segmentation with probabilistic representations."""

from modules.prcl.contrast import PixelContrast
from modules.prcl.lightning_module import ProbabilisticSegmenter
from modules.prcl.losses import confidence_weighted_cross_entropy, ramp
from modules.prcl.probability_head import ProbabilityHead
from modules.prcl.prototypes import ClassStatistics, GlobalPrototypes, class_statistics
from modules.prcl.similarity import Gaussians, gaussian_contrast, mutual_likelihood_score
from modules.prcl.strong_views import PseudoLabelled, StrongViews

__all__ = [
    "ClassStatistics",
    "Gaussians",
    "GlobalPrototypes",
    "PixelContrast",
    "ProbabilisticSegmenter",
    "ProbabilityHead",
    "PseudoLabelled",
    "StrongViews",
    "class_statistics",
    "confidence_weighted_cross_entropy",
    "gaussian_contrast",
    "mutual_likelihood_score",
    "ramp",
]
