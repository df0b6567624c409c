"""Score functions of knowledge-graph embeddings: how far a tail is from where its head and relation lead."""

import math
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from modules.knowledge_graph.row_chunks import chunked, rows_per_chunk, sum_of_differences, sum_of_moduli

BATCH_ROWS_PER_BLOCK = 4


class ScoringFunction(nn.Module, ABC):
    """Distance of a triple from the embeddings of its three parts; the score in training is ``margin - distance``.

    A subclass says how wide its embeddings are and gives ``distance`` and ``compose``, which broadcast over all leading
    dimensions; the three methods that meet a whole table have a general form, for functions without parameters of their
    own, and faster ones where the model has one.

    Args:
        dimension: d, real numbers (TransE, PairRE, DistMult) or complex ones (RotatE, ComplEx) of an embedding.
        margin: gamma.
        epsilon: makes the range of initial values, (margin + epsilon) / dimension.

    Raises:
        ValueError: If the dimension is below 1, or the margin negative.
    """

    def __init__(self, dimension: int, margin: float, epsilon: float = 2.0) -> None:
        super().__init__()
        if dimension < 1:
            raise ValueError(f"dimension is {dimension}, expected 1 or more")
        if margin < 0:
            raise ValueError(f"margin is {margin}, expected 0 or more")
        self.dimension, self.margin, self.epsilon = dimension, margin, epsilon

    @property
    def entity_width(self) -> int:
        """Numbers in the embedding of an entity."""
        return self.dimension

    @property
    def relation_width(self) -> int:
        """Numbers in the embedding of a relation."""
        return self.dimension

    @property
    def initial_range(self) -> float:
        """Largest size of initial values, rho."""
        return (self.margin + self.epsilon) / self.dimension

    def initialize(self, entities: Tensor, relations: Tensor) -> None:
        """Draw first values of the tables (E, entity_width) and (2R, relation_width), uniform in [-rho, rho]."""
        nn.init.uniform_(entities, -self.initial_range, self.initial_range)
        nn.init.uniform_(relations, -self.initial_range, self.initial_range)

    def describe(self) -> dict[str, Any]:
        """Class and arguments, as plain values that :func:`build_scoring` takes."""
        kind = type(self)
        return {"class_path": f"{kind.__module__}.{kind.__qualname__}", "init_args": self._arguments()}

    def _arguments(self) -> dict[str, Any]:
        return {"dimension": self.dimension, "margin": self.margin, "epsilon": self.epsilon}

    @abstractmethod
    def distance(self, heads: Tensor, relations: Tensor, tails: Tensor) -> Tensor:
        """Distance d(h, r, t) (...) of embeddings (..., width) that broadcast against each other."""

    @abstractmethod
    def compose(self, heads: Tensor, relations: Tensor) -> Tensor:
        """What head and relation make together, (..., Q): compared by AnKGE at the level of triples (section 3)."""

    def distances_to_tails(self, heads: Tensor, relations: Tensor, tails: Tensor) -> Tensor:
        """Distance of each (head, relation) from every tail.

        Args:
            heads: (B, entity_width).
            relations: (B, relation_width).
            tails: (N, entity_width).

        Returns:
            (B, N).
        """
        return self._in_chunks(_to_tails, [heads, relations], tails)

    def distances_from_heads(self, heads: Tensor, relations: Tensor, tails: Tensor) -> Tensor:
        """Distance of every head (N, entity_width) by each relation (B, ...) from its tail (B, ...): (B, N)."""
        return self._in_chunks(_from_heads, [relations, tails], heads)

    def distances_by_relations(self, heads: Tensor, relations: Tensor, tails: Tensor) -> Tensor:
        """Distance of each head (B, ...) from its tail (B, ...) by every relation (N, relation_width): (B, N)."""
        return self._in_chunks(_by_relations, [heads, tails], relations)

    def distances_of_pairs(self, heads: Tensor, relations: Tensor, tails: Tensor) -> Tensor:
        """Distance of all pairs of some heads (B, m, ...) and relations (B, n, ...) from a tail (B, ...): (B, n, m)."""
        return self.distance(heads.unsqueeze(1), relations.unsqueeze(2), tails[:, None, None])

    def table_block(self, device: torch.device) -> int:
        """How many rows of a table are best met at a time, where no gradient is needed: a block that stays in cache."""
        return max(64, rows_per_chunk(BATCH_ROWS_PER_BLOCK * self.entity_width, device))

    def _in_chunks(self, place: Any, rows: list[Tensor], table: Tensor) -> Tensor:
        def distances(first: Tensor, second: Tensor, whole: Tensor) -> Tensor:
            return self.distance(*place([first, second], whole))

        return chunked(distances, rows, [table], len(table) * self.entity_width)


def _to_tails(rows: list[Tensor], table: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return rows[0].unsqueeze(1), rows[1].unsqueeze(1), table


def _from_heads(rows: list[Tensor], table: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return table, rows[0].unsqueeze(1), rows[1].unsqueeze(1)


def _by_relations(rows: list[Tensor], table: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return rows[0].unsqueeze(1), table, rows[1].unsqueeze(1)


class WholeTables(ScoringFunction):
    """Score functions whose operators meet a whole table at once: they block it themselves, or need not."""

    def table_block(self, device: torch.device) -> int:
        """All of it."""
        return 1 << 30


class TransE(WholeTables):
    """``|h + r - t|_1`` (Bordes et al., 2013)."""

    def distance(self, heads: Tensor, relations: Tensor, tails: Tensor) -> Tensor:
        """See the base class."""
        return (heads + relations - tails).abs().sum(-1)

    def compose(self, heads: Tensor, relations: Tensor) -> Tensor:
        """``h + r``."""
        return heads + relations

    def distances_to_tails(self, heads: Tensor, relations: Tensor, tails: Tensor) -> Tensor:
        """See the base class."""
        return sum_of_differences(heads + relations, tails)

    def distances_from_heads(self, heads: Tensor, relations: Tensor, tails: Tensor) -> Tensor:
        """See the base class."""
        return sum_of_differences(tails - relations, heads)

    def distances_by_relations(self, heads: Tensor, relations: Tensor, tails: Tensor) -> Tensor:
        """See the base class."""
        return sum_of_differences(tails - heads, relations)

    def distances_of_pairs(self, heads: Tensor, relations: Tensor, tails: Tensor) -> Tensor:
        """See the base class."""
        wanted = tails.unsqueeze(1) - relations
        if wanted.device.type == "cuda":  # one launch instead of one for each row
            return torch.cdist(wanted, heads, p=1)
        rows = zip(wanted, heads, strict=True)
        return torch.stack([sum_of_differences(*row) for row in rows])


class RotatE(ScoringFunction):
    """Sum over complex coordinates of ``|h exp(i theta) - t|``, theta = r pi / rho (Sun et al., 2019).

    Entities hold d real parts, then d imaginary ones; relations d phases.
    """

    @property
    def entity_width(self) -> int:
        """Numbers in the embedding of an entity."""
        return 2 * self.dimension

    def distance(self, heads: Tensor, relations: Tensor, tails: Tensor) -> Tensor:
        """See the base class."""
        real, imaginary = (self.compose(heads, relations) - tails).chunk(2, dim=-1)
        return _modulus(real, imaginary).sum(-1)

    def compose(self, heads: Tensor, relations: Tensor) -> Tensor:
        """``h exp(i theta)``, real parts before imaginary ones."""
        return self._turn(heads, relations * (math.pi / self.initial_range))

    def distances_to_tails(self, heads: Tensor, relations: Tensor, tails: Tensor) -> Tensor:
        """See the base class."""
        return sum_of_moduli(self.compose(heads, relations), tails)

    def distances_from_heads(self, heads: Tensor, relations: Tensor, tails: Tensor) -> Tensor:
        """See the base class; a tail is turned back, which keeps lengths."""
        return sum_of_moduli(self.compose(tails, -relations), heads)

    def distances_by_relations(self, heads: Tensor, relations: Tensor, tails: Tensor) -> Tensor:
        """See the base class; sines are taken once instead of in each chunk."""
        phases = relations * (math.pi / self.initial_range)
        return chunked(_turned_apart, [heads, tails], [phases.cos(), phases.sin()], 2 * relations.numel())

    @staticmethod
    def _turn(values: Tensor, phases: Tensor) -> Tensor:
        real, imaginary = values.chunk(2, dim=-1)
        cosine, sine = phases.cos(), phases.sin()
        return torch.cat([real * cosine - imaginary * sine, real * sine + imaginary * cosine], dim=-1)


def _turned_apart(heads: Tensor, tails: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    head_real, head_imaginary = heads.unsqueeze(1).chunk(2, dim=-1)
    tail_real, tail_imaginary = tails.unsqueeze(1).chunk(2, dim=-1)
    real = head_real * cosine - head_imaginary * sine - tail_real
    imaginary = head_real * sine + head_imaginary * cosine - tail_imaginary
    return _modulus(real, imaginary).sum(-1)


def _modulus(real: Tensor, imaginary: Tensor) -> Tensor:
    square = (real * real).addcmul(imaginary, imaginary)
    return square.clamp_min(torch.finfo(square.dtype).tiny).sqrt()  # a root of 0 has no gradient


class HAKE(ScoringFunction):
    """Phases and moduli (Zhang et al., 2020): angles apart within a level, moduli between levels of a hierarchy.

    ``w_p sum |sin((phi_h + phi_r - phi_t) / 2)| + w_m |m_h (|m_r| + b) - m_t (1 - b)|_2``, phi = phase pi / rho, b the
    bias of the relation, at most 1 and at least -|m_r|. Entities hold d phases, then d moduli; relations d phases, d
    moduli and d biases. Both weights are learned.

    Args:
        dimension: d.
        margin: gamma.
        epsilon: see the base class.
        phase_weight: first w_p, times rho.
        modulus_weight: first w_m.
    """

    def __init__(
        self,
        dimension: int,
        margin: float,
        epsilon: float = 2.0,
        phase_weight: float = 0.5,
        modulus_weight: float = 1.0,
    ) -> None:
        super().__init__(dimension, margin, epsilon)
        self.initial_weights = {"phase_weight": phase_weight, "modulus_weight": modulus_weight}
        self.phase_weight = nn.Parameter(torch.tensor(phase_weight * self.initial_range))
        self.modulus_weight = nn.Parameter(torch.tensor(float(modulus_weight)))

    @property
    def entity_width(self) -> int:
        """Numbers in the embedding of an entity."""
        return 2 * self.dimension

    @property
    def relation_width(self) -> int:
        """Numbers in the embedding of a relation."""
        return 3 * self.dimension

    def initialize(self, entities: Tensor, relations: Tensor) -> None:
        """As in the base class, but moduli of relations are 1 and biases 0."""
        super().initialize(entities, relations)
        with torch.no_grad():
            relations[:, self.dimension : 2 * self.dimension] = 1
            relations[:, 2 * self.dimension :] = 0

    def _arguments(self) -> dict[str, Any]:
        return {**super()._arguments(), **self.initial_weights}

    def distance(self, heads: Tensor, relations: Tensor, tails: Tensor) -> Tensor:
        """See the base class."""
        head_phase, head_modulus = heads.chunk(2, dim=-1)
        tail_phase, tail_modulus = tails.chunk(2, dim=-1)
        phase, grown, shrunk = self._relation_parts(relations)
        sines = ((head_phase + phase - tail_phase) * self._half_angle).sin().abs().sum(-1)
        lengths = torch.linalg.vector_norm(head_modulus * grown - tail_modulus * shrunk, dim=-1)
        return self.phase_weight * sines + self.modulus_weight * lengths

    @property
    def _half_angle(self) -> float:
        """Half the angle in radians of a phase of 1."""
        return math.pi / self.initial_range / 2

    def _relation_parts(self, relations: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Phases, and what moduli of heads and of tails are multiplied by: |m_r| + b and 1 - b."""
        phase, modulus, bias = relations.chunk(3, dim=-1)
        modulus = modulus.abs()
        bias = bias.clamp(max=1)
        bias = torch.where(bias < -modulus, -modulus, bias)
        return phase, modulus + bias, 1 - bias

    def compose(self, heads: Tensor, relations: Tensor) -> Tensor:
        """``w_p |sin((phi_h + phi_r) / 2)|``, then ``w_m m_h (|m_r| + b)``."""
        phase, modulus = heads.chunk(2, dim=-1)
        relation_phase, grown, _ = self._relation_parts(relations)
        first = self.phase_weight * ((phase + relation_phase) * self._half_angle).sin().abs()
        return torch.cat([first, self.modulus_weight * modulus * grown], dim=-1)

    def distances_to_tails(self, heads: Tensor, relations: Tensor, tails: Tensor) -> Tensor:
        """See the base class."""
        phase, grown, shrunk = self._relation_parts(relations)
        head_phase, head_modulus = heads.chunk(2, dim=-1)
        return self._apart(head_phase + phase, head_modulus * grown, shrunk, tails)

    def distances_from_heads(self, heads: Tensor, relations: Tensor, tails: Tensor) -> Tensor:
        """See the base class."""
        phase, grown, shrunk = self._relation_parts(relations)
        tail_phase, tail_modulus = tails.chunk(2, dim=-1)
        return self._apart(tail_phase - phase, tail_modulus * shrunk, grown, heads)

    def distances_by_relations(self, heads: Tensor, relations: Tensor, tails: Tensor) -> Tensor:
        """See the base class."""
        phase, grown, shrunk = self._relation_parts(relations)
        head_phase, head_modulus = heads.chunk(2, dim=-1)
        tail_phase, tail_modulus = tails.chunk(2, dim=-1)
        between = (tail_phase - head_phase) * self._half_angle
        turned = phase * self._half_angle
        return chunked(
            _related_apart,
            [between.sin(), between.cos(), head_modulus, tail_modulus],
            [turned.sin(), turned.cos(), grown, shrunk, self.phase_weight, self.modulus_weight],
            2 * phase.numel(),
        )

    def _apart(self, phases: Tensor, moduli: Tensor, scales: Tensor, table: Tensor) -> Tensor:
        """Distances of rows from a table of entities whose moduli are scaled by the row; sines are taken only once."""
        phase, modulus = table.chunk(2, dim=-1)
        own, other = phases * self._half_angle, phase * self._half_angle
        return chunked(
            _phases_and_moduli_apart,
            [own.sin(), own.cos(), moduli, scales],
            [other.sin(), other.cos(), modulus.contiguous(), self.phase_weight, self.modulus_weight],
            table.numel(),
        )


def _phases_and_moduli_apart(
    sine: Tensor,
    cosine: Tensor,
    moduli: Tensor,
    scales: Tensor,
    table_sine: Tensor,
    table_cosine: Tensor,
    table_moduli: Tensor,
    phase_weight: Tensor,
    modulus_weight: Tensor,
) -> Tensor:
    sine, cosine, moduli, scales = (part.unsqueeze(1) for part in (sine, cosine, moduli, scales))
    sines = (sine * table_cosine - cosine * table_sine).abs().sum(-1)
    lengths = torch.linalg.vector_norm(moduli - table_moduli * scales, dim=-1)
    return phase_weight * sines + modulus_weight * lengths


def _related_apart(
    sine: Tensor,
    cosine: Tensor,
    heads: Tensor,
    tails: Tensor,
    table_sine: Tensor,
    table_cosine: Tensor,
    grown: Tensor,
    shrunk: Tensor,
    phase_weight: Tensor,
    modulus_weight: Tensor,
) -> Tensor:
    sine, cosine, heads, tails = (part.unsqueeze(1) for part in (sine, cosine, heads, tails))
    sines = (sine * table_cosine - cosine * table_sine).abs().sum(-1)
    return phase_weight * sines + modulus_weight * torch.linalg.vector_norm(heads * grown - tails * shrunk, dim=-1)


class PairRE(ScoringFunction):
    """``|h r_H - t r_T|_1`` of heads and tails of length 1, each relation a pair of vectors (Chao et al., 2021)."""

    @property
    def relation_width(self) -> int:
        """Numbers in the embedding of a relation."""
        return 2 * self.dimension

    def distance(self, heads: Tensor, relations: Tensor, tails: Tensor) -> Tensor:
        """See the base class."""
        return self._apart(normalize(heads, dim=-1), relations, normalize(tails, dim=-1))

    @staticmethod
    def _apart(heads: Tensor, relations: Tensor, tails: Tensor) -> Tensor:
        of_head, of_tail = relations.chunk(2, dim=-1)
        return (heads * of_head - tails * of_tail).abs().sum(-1)

    def compose(self, heads: Tensor, relations: Tensor) -> Tensor:
        """``h r_H`` of a head of length 1."""
        return normalize(heads, dim=-1) * relations.chunk(2, dim=-1)[0]

    def distances_to_tails(self, heads: Tensor, relations: Tensor, tails: Tensor) -> Tensor:
        """See the base class; lengths are made 1 once instead of in each chunk."""
        of_head, of_tail = relations.chunk(2, dim=-1)
        reached = normalize(heads, dim=-1) * of_head
        return chunked(_scaled_apart, [reached, of_tail], [normalize(tails, dim=-1)], tails.numel())

    def distances_from_heads(self, heads: Tensor, relations: Tensor, tails: Tensor) -> Tensor:
        """See the base class."""
        of_head, of_tail = relations.chunk(2, dim=-1)
        reached = normalize(tails, dim=-1) * of_tail
        return chunked(_scaled_apart, [reached, of_head], [normalize(heads, dim=-1)], heads.numel())


def _scaled_apart(reached: Tensor, scales: Tensor, table: Tensor) -> Tensor:
    return (reached.unsqueeze(1) - table * scales.unsqueeze(1)).abs().sum(-1)


class DistMult(WholeTables):
    """``- sum h r t``, a likeness instead of a distance (Yang et al., 2015).

    Args:
        dimension: d.
        margin: added to the likeness; 0 for none.
        epsilon: range of initial values times the root of d.
    """

    def __init__(self, dimension: int, margin: float = 0.0, epsilon: float = 1.0) -> None:
        super().__init__(dimension, margin, epsilon)

    @property
    def initial_range(self) -> float:
        """Largest size of initial values."""
        return self.epsilon / math.sqrt(self.dimension)

    def distance(self, heads: Tensor, relations: Tensor, tails: Tensor) -> Tensor:
        """See the base class."""
        return -(self.compose(heads, relations) * tails).sum(-1)

    def compose(self, heads: Tensor, relations: Tensor) -> Tensor:
        """``h r``."""
        return heads * relations

    def distances_to_tails(self, heads: Tensor, relations: Tensor, tails: Tensor) -> Tensor:
        """See the base class."""
        return -self.compose(heads, relations) @ tails.T

    def distances_from_heads(self, heads: Tensor, relations: Tensor, tails: Tensor) -> Tensor:
        """See the base class."""
        return -self.compose(tails, relations) @ heads.T

    def distances_by_relations(self, heads: Tensor, relations: Tensor, tails: Tensor) -> Tensor:
        """See the base class."""
        return -(heads * tails) @ relations.T


class ComplEx(DistMult):
    """``- Re sum h r conj(t)`` of complex coordinates (Trouillon et al., 2016); real parts before imaginary ones."""

    @property
    def entity_width(self) -> int:
        """Numbers in the embedding of an entity."""
        return 2 * self.dimension

    @property
    def relation_width(self) -> int:
        """Numbers in the embedding of a relation."""
        return 2 * self.dimension

    def compose(self, heads: Tensor, relations: Tensor) -> Tensor:
        """``h r``, a complex product."""
        return _product(heads, relations)

    def distances_from_heads(self, heads: Tensor, relations: Tensor, tails: Tensor) -> Tensor:
        """See the base class."""
        return -_product(tails, _conjugate(relations)) @ heads.T

    def distances_by_relations(self, heads: Tensor, relations: Tensor, tails: Tensor) -> Tensor:
        """See the base class."""
        return -_product(tails, _conjugate(heads)) @ relations.T


def _conjugate(values: Tensor) -> Tensor:
    real, imaginary = values.chunk(2, dim=-1)
    return torch.cat([real, -imaginary], dim=-1)


def _product(first: Tensor, second: Tensor) -> Tensor:
    first_real, first_imaginary = first.chunk(2, dim=-1)
    real, imaginary = second.chunk(2, dim=-1)
    return torch.cat(
        [first_real * real - first_imaginary * imaginary, first_real * imaginary + first_imaginary * real], dim=-1
    )


def build_scoring(description: ScoringFunction | dict[str, Any]) -> ScoringFunction:
    """A score function from what :meth:`ScoringFunction.describe` returned; one that is built already is returned.

    Raises:
        ValueError: If it names no score function, or arguments that it does not take.
    """
    if isinstance(description, ScoringFunction):
        return description
    module, _, name = str(description.get("class_path", "")).rpartition(".")
    try:
        kind = getattr(__import__(module, fromlist=[name]), name)
        if not issubclass(kind, ScoringFunction):
            raise TypeError("not a score function")
        return kind(**description.get("init_args", {}))
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"scoring: {description} makes no score function: {error}") from error
