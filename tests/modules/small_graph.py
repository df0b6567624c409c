"""A small knowledge graph, score functions written as loops over Python numbers, and models on both."""

import cmath
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from datamodules import KnowledgeGraph
from modules.knowledge_graph import (
    HAKE,
    ComplEx,
    DistMult,
    EmbeddingTables,
    KnowledgeGraphEmbedding,
    PairRE,
    RotatE,
    ScoringFunction,
    TransE,
)

PLACES, GROUPS = 24, 4
ENTITIES, RELATIONS = PLACES + GROUPS, 5
KINDS = {"TransE": TransE, "RotatE": RotatE, "HAKE": HAKE, "PairRE": PairRE, "DistMult": DistMult, "ComplEx": ComplEx}
BASES = ("TransE", "RotatE", "HAKE", "PairRE")  # those of the paper

Numbers = list[float]


def scoring(name: str, dimension: int = 4, margin: float = 6.0) -> ScoringFunction:
    """A score function; the learned weights of HAKE are not 1."""
    if name == "HAKE":
        return HAKE(dimension, margin, phase_weight=0.7, modulus_weight=1.9)
    return KINDS[name](dimension, margin)


def tables(
    name: str,
    entities: int = 7,
    relations: int = 2,
    dimension: int = 4,
    seed: int = 0,
    dtype: torch.dtype | None = None,
) -> EmbeddingTables:
    """Frozen tables of values without pattern; of HAKE some biases are above 1 and some below -|m|."""
    generator = torch.Generator().manual_seed(seed)
    found = EmbeddingTables(scoring(name, dimension), entities, relations)
    for table in (found.entities, found.relations):
        table.data = torch.randn(table.shape, generator=generator)
    return found.requires_grad_(False).to(dtype or torch.float32)


# ---- section 1 of the specification, number by number


def _halves(values: Numbers) -> tuple[Numbers, Numbers]:
    half = len(values) // 2
    return values[:half], values[half:]


def _complex(values: Numbers) -> list[complex]:
    return [complex(*pair) for pair in zip(*_halves(values), strict=True)]


def _of_length_one(values: Numbers) -> Numbers:
    length = math.sqrt(sum(value * value for value in values))
    return [value / length for value in values]


def _hake_relation(function: HAKE, relation: Numbers) -> list[tuple[float, float, float]]:
    """Phase, |m_r| and bias of each coordinate."""
    d = function.dimension
    parts = []
    for phase, modulus, bias in zip(relation[:d], relation[d : 2 * d], relation[2 * d :], strict=True):
        size, limited = abs(modulus), min(bias, 1.0)
        parts.append((phase, size, -size if limited < -size else limited))
    return parts


def distance(function: ScoringFunction, head: Numbers, relation: Numbers, tail: Numbers) -> float:
    """d(h, r, t) in double precision."""
    d, pi = function.dimension, math.pi
    rho = (function.margin + function.epsilon) / d
    match function:
        case ComplEx():
            triples = zip(_complex(head), _complex(relation), _complex(tail), strict=True)
            return -sum((h * r * t.conjugate()).real for h, r, t in triples)
        case DistMult():
            return -sum(h * r * t for h, r, t in zip(head, relation, tail, strict=True))
        case TransE():
            return sum(abs(h + r - t) for h, r, t in zip(head, relation, tail, strict=True))
        case RotatE():
            triples = zip(_complex(head), relation, _complex(tail), strict=True)
            return sum(abs(h * cmath.exp(1j * r * pi / rho) - t) for h, r, t in triples)
        case PairRE():
            head, tail = _of_length_one(head), _of_length_one(tail)
            return sum(abs(h * a - t * b) for h, t, a, b in zip(head, tail, *_halves(relation), strict=True))
        case HAKE():
            (head_phase, head_modulus), (tail_phase, tail_modulus) = _halves(head), _halves(tail)
            sines = squares = 0.0
            for j, (phase, modulus, bias) in enumerate(_hake_relation(function, relation)):
                sines += abs(math.sin((head_phase[j] + phase - tail_phase[j]) * pi / rho / 2))
                squares += (head_modulus[j] * (modulus + bias) - tail_modulus[j] * (1 - bias)) ** 2
            return function.phase_weight.item() * sines + function.modulus_weight.item() * math.sqrt(squares)
    raise TypeError(function)


def composition(function: ScoringFunction, head: Numbers, relation: Numbers) -> Numbers:
    """q(h, r) of section 3."""
    d, pi = function.dimension, math.pi
    rho = (function.margin + function.epsilon) / d
    match function:
        case ComplEx():
            product = [h * r for h, r in zip(_complex(head), _complex(relation), strict=True)]
            return [value.real for value in product] + [value.imag for value in product]
        case DistMult():
            return [h * r for h, r in zip(head, relation, strict=True)]
        case TransE():
            return [h + r for h, r in zip(head, relation, strict=True)]
        case RotatE():
            turned = [h * cmath.exp(1j * r * pi / rho) for h, r in zip(_complex(head), relation, strict=True)]
            return [value.real for value in turned] + [value.imag for value in turned]
        case PairRE():
            return [h * r for h, r in zip(_of_length_one(head), relation[:d], strict=True)]
        case HAKE():
            w_p, w_m = function.phase_weight.item(), function.modulus_weight.item()
            parts = _hake_relation(function, relation)
            phases = [w_p * abs(math.sin((h + p) * pi / rho / 2)) for h, (p, _, _) in zip(head[:d], parts, strict=True)]
            return phases + [w_m * h * (m + b) for h, (_, m, b) in zip(head[d:], parts, strict=True)]
    raise TypeError(function)


def rows(table: Tensor) -> list[Numbers]:
    """A table as Python numbers."""
    return table.detach().double().tolist()


def all_distances(found: EmbeddingTables) -> np.ndarray:
    """d of every head, relation and tail, (E, 2R, E)."""
    entities, relations = rows(found.entities), rows(found.relations)
    return np.array(
        [[[distance(found.scoring, h, r, t) for t in entities] for r in relations] for h in entities], dtype=np.float64
    )


def rank(scores: Numbers, target: int, left_out: set[int]) -> float:
    """Mean rank of the target among candidates of equal score, filtered."""
    others = [score for entity, score in enumerate(scores) if entity not in left_out and entity != target]
    better, equal = (
        sum(compare(score) for score in others) for compare in (scores[target].__lt__, scores[target].__eq__)
    )
    return 1 + better + equal / 2


# ---- a graph on disk


def triples() -> dict[str, list[tuple[int, int, int]]]:
    """Places in a ring, 1, 2 and 5 steps on, each in one of 4 groups; relation 4 links some that relation 0 links."""
    found = [(i, kind, (i + step) % PLACES) for kind, step in enumerate((1, 2, 5)) for i in range(PLACES)]
    found += [(i, 3, PLACES + i % GROUPS) for i in range(PLACES)]
    found += [(i, 4, (i + 1) % PLACES) for i in range(0, PLACES, 2)]
    order = np.random.default_rng(1).permutation(len(found)).tolist()
    shuffled = [found[place] for place in order]
    return {"train": shuffled[24:], "valid": shuffled[:11], "test": shuffled[11:24]}


def write_graph(folder: Path) -> Path:
    """Text files of the graph, and names in the order of the numbers."""
    folder.mkdir(parents=True, exist_ok=True)
    for part, lines in triples().items():
        text = "".join(f"e{h:02}\tr{r}\te{t:02}\n" for h, r, t in lines)
        (folder / f"{part}.txt").write_text(text)
    (folder / "entities.dict").write_text("".join(f"{e}\te{e:02}\n" for e in range(ENTITIES)))
    (folder / "relations.dict").write_text("".join(f"{r}\tr{r}\n" for r in range(RELATIONS)))
    return folder


def graph(folder: Path, **options: Any) -> KnowledgeGraph:
    """The datamodule of a folder that was written."""
    defaults = {"layout": "tsv", "root": str(folder), "batch_size": 32, "eval_batch_size": 7, "num_negatives": ENTITIES}
    return KnowledgeGraph(**(defaults | options))


def with_reverses(part: str) -> list[tuple[int, int, int]]:
    """Triples of a part, then their reverses, as the datamodule numbers them."""
    own = triples()[part]
    return own + [(t, r + RELATIONS, h) for h, r, t in own]


def base_model(name: str = "TransE", dimension: int = 6, seed: int = 0, **options: Any) -> KnowledgeGraphEmbedding:
    """An untrained model of the graph."""
    torch.manual_seed(seed)
    return KnowledgeGraphEmbedding(scoring(name, dimension), ENTITIES, RELATIONS, **options)
