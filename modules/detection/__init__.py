"""Object detection with any timm model: SSDLite and RetinaNet."""

from modules.detection.average_precision import AveragePrecision
from modules.detection.lightning_module import Detector
from modules.detection.raw_detections import RawDetections

__all__ = ["AveragePrecision", "Detector", "RawDetections"]
