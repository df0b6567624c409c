"""PRCL: semi-supervised segmentation with probabilistic representations."""
