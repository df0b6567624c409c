"""CSMPQ: mixed-precision quantization of a trained classifier, with bits from an integer programme."""

from modules.csmpq.lightning_module import QuantizedClassifier

__all__ = ["QuantizedClassifier"]
