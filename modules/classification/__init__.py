"""Image classification with any timm model."""

from modules.classification.lightning_module import ImageClassifier
from modules.classification.metrics import classification_metrics

__all__ = ["ImageClassifier", "classification_metrics"]
