"""AnKGE: analogical inference enhanced knowledge-graph embedding (AAAI 2023)."""

from modules.ankge.analogy import LEVELS, AnalogyFunctions, aggregate, level_losses, level_shares
from modules.ankge.lightning_module import AnalogicalEmbedding, read_base, scoring_of
from modules.ankge.retriever import Neighbours, RetrievalSettings, fingerprint, retrieve

__all__ = [
    "LEVELS",
    "AnalogicalEmbedding",
    "AnalogyFunctions",
    "Neighbours",
    "RetrievalSettings",
    "aggregate",
    "fingerprint",
    "level_losses",
    "level_shares",
    "read_base",
    "retrieve",
    "scoring_of",
]
