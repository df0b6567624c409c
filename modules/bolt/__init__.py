"""BOLT: self-supervised pre-training of Vision Transformers by token perturbation and difficulty ranking."""

from modules.bolt.jigsaw import Jigsaw
from modules.bolt.lightning_module import BOLT, Branch
from modules.bolt.perturbation import TokenPerturbation

__all__ = ["BOLT", "Branch", "Jigsaw", "TokenPerturbation"]
