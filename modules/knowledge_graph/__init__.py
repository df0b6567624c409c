"""Embeddings of knowledge graphs: score functions, their loss, ranking of completions, and the LightningModule."""

from modules.knowledge_graph.embedding_tables import EmbeddingTables
from modules.knowledge_graph.lightning_module import KnowledgeGraphEmbedding, corrupted_distances
from modules.knowledge_graph.link_predictor import CATEGORIES, SIDES, LinkPredictor, check_precision
from modules.knowledge_graph.losses import self_adversarial_loss
from modules.knowledge_graph.scoring import (
    HAKE,
    ComplEx,
    DistMult,
    PairRE,
    RotatE,
    ScoringFunction,
    TransE,
    build_scoring,
)
from modules.knowledge_graph.sharded_tables import ShardedEmbeddingTables

__all__ = [
    "CATEGORIES",
    "HAKE",
    "SIDES",
    "ComplEx",
    "DistMult",
    "EmbeddingTables",
    "KnowledgeGraphEmbedding",
    "LinkPredictor",
    "PairRE",
    "RotatE",
    "ScoringFunction",
    "ShardedEmbeddingTables",
    "TransE",
    "build_scoring",
    "check_precision",
    "corrupted_distances",
    "self_adversarial_loss",
]
