"""AnKGE as a LightningModule: analogy functions on the frozen embeddings of a finished model."""

from collections.abc import Mapping
from itertools import product
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.optim.lr_scheduler import MultiStepLR

from modules.ankge.analogy import (
    LEVELS,
    AnalogyFunctions,
    Level,
    Similarity,
    Targets,
    aggregate,
    level_losses,
    level_shares,
)
from modules.ankge.retriever import Neighbours, RetrievalSettings, retrieve
from modules.knowledge_graph import EmbeddingTables, LinkPredictor, ScoringFunction, build_scoring

LR_DECAY = 0.1
PUBLISHED_WEIGHTS = (0.01, 0.2, 0.02)  # of TransE on FB15k-237
CONTROLS = ("base", "identity", "unlinked")
TRIED = {"method": "level_weights", "identity": "identity_weights"}  # whose weights are chosen, and where they are kept
CHOICES = {
    "similarity": get_args(Similarity),
    "shares": ("softmax", "one_hot"),
    "share_mode": ("triple", "batch_mean"),
    "score_offset": ("none", "margin"),
}
HASHES = {
    "graph_hash": "a graph whose entities or relations have other names or another order",
    "train_hash": "other training triples, among which there may be some that are held out here",
}
PREFIX = "tables."
EXPLAINED_BY = 20  # entities and relations that a pair is looked for among, to explain an answer


class AnalogicalEmbedding(LinkPredictor):
    """Analogical inference on top of a trained knowledge-graph embedding (AnKGE).

    The embeddings are frozen. For each training triple the heads, relations and pairs of both that fit its tail best
    are looked up once (``callbacks.AnalogyRetriever``), and analogy functions learn to make them. The score of a
    candidate is ``g(h, r, t) + sum over levels of lambda w g(analogies, t)``, g the negative distance, or the margin
    minus it.

    Controls beside it: ``base``, the embeddings alone; ``identity``, the same sum with the triple itself in place of
    its analogies, so without anything learned; ``unlinked``, the base without the candidates that training links to
    the head. On data that was filtered of such pairs (FB15k-237) the weight of the relation level takes them away as
    well, whatever the analogies are, so read a gain beside these two.

    Args:
        base: checkpoint of a ``KnowledgeGraphEmbedding``, whose weights are taken when training starts. A checkpoint of
            this model holds them, and needs no base any more.
        scoring: its score function; None reads it from ``base``, which is then compared with the data at once, and not
            only when training starts.
        num_entities: E.
        num_relations: R, without reverses.
        graph_hash: of the names of entities and relations; must be that of the base.
        train_hash: of the training triples, likewise.
        entities: N_e, analogical heads of a triple.
        relations: N_r, analogical relations of a triple.
        pairs: N_t, analogical pairs of a triple.
        candidate_entities: m, heads that pairs are made of.
        candidate_relations: n, relations that pairs are made of.
        exclude_original: leave a triple's own head and relation out.
        transfer: lambda_trans.
        strength: alpha.
        similarity: ``norm`` or ``cos`` of analogies to their targets; ``cos_official`` has the official code's sign,
            which raises distances.
        shares: levels count by a ``softmax`` of negative distances, or the best one alone (``one_hot``).
        share_of_base: whether the triple itself takes part in the shares.
        share_mode: shares of each ``triple``, or their mean over a batch times the mean loss (``batch_mean``).
        levels: those that are trained and added to the score.
        level_weights: lambda of each level in the score: entity, relation, triple; None for those of a grid, or else
            those published for TransE on FB15k-237 (.01, .2, .02).
        level_grid: values for each level of which the best on validation are chosen, for the method and for
            ``identity`` apart, instead of ``level_weights``; None for none.
        adaptive_weights: multiply by counts of the training graph: w_E(r, t), w_R(h, t) and w_T(t).
        score_offset: ``none`` for g = -d, ``margin`` for g = margin - d.
        regularization: of the cubes of all parameters.
        lr: of Adam.
        lr_milestones: epochs after which the rate is multiplied by 0.1.
        ties: see the base class.
        top_k: tails that ``predict`` gives for a query.

    Raises:
        ValueError: If a value is out of range, or ``base`` is of another graph, score function or size.
        FileNotFoundError: If ``base`` is not there.
    """

    def __init__(
        self,
        base: str | None = None,
        scoring: ScoringFunction | dict[str, Any] | None = None,
        num_entities: int = 0,
        num_relations: int = 0,
        graph_hash: str | None = None,
        train_hash: str | None = None,
        entities: int = 1,
        relations: int = 1,
        pairs: int = 3,
        candidate_entities: int = 1000,
        candidate_relations: int = 40,
        exclude_original: bool = False,
        transfer: float = 1.0,
        strength: float = 10.0,
        similarity: Similarity = "norm",
        shares: Literal["softmax", "one_hot"] = "softmax",
        share_of_base: bool = True,
        share_mode: Literal["triple", "batch_mean"] = "triple",
        levels: list[Level] = LEVELS,
        level_weights: list[float] | None = None,
        level_grid: list[list[float]] | None = None,
        adaptive_weights: bool = True,
        score_offset: Literal["none", "margin"] = "none",
        regularization: float = 0.0,
        lr: float = 1e-3,
        lr_milestones: list[int] = (),
        ties: Literal["realistic", "optimistic", "pessimistic"] = "realistic",
        top_k: int = 10,
    ) -> None:
        super().__init__(num_entities, num_relations, CONTROLS, ties, top_k)
        read = scoring is None
        scoring = build_scoring(scoring_of(base) if read else scoring)
        self.save_hyperparameters(ignore=["scoring"])
        self.hparams["scoring"] = scoring.describe()
        self._check_options()
        self.settings = RetrievalSettings(
            entities, relations, pairs, candidate_entities, candidate_relations, exclude_original
        )
        self.tables = EmbeddingTables(scoring, num_entities, num_relations).requires_grad_(False)
        self.analogies = AnalogyFunctions(
            num_entities, 2 * num_relations, scoring.entity_width, scoring.relation_width, transfer
        )
        self.neighbours: Neighbours | None = None
        used = torch.tensor([float(level in levels) for level in LEVELS])
        self.register_buffer("used_levels", used, persistent=False)
        fixed = PUBLISHED_WEIGHTS if level_weights is None else level_weights
        tried = torch.tensor(list(product(*(level_grid or [[weight] for weight in fixed]))), dtype=torch.float32)
        self.register_buffer("grid", torch.unique(tried * used, dim=0), persistent=False)
        self.register_buffer("level_weights", self.grid[0].clone())
        self.register_buffer("identity_weights", self.grid[0].clone())
        if read:
            self._state_of(base)
        if level_grid:
            self.val_rankings = self._new_rankings(dict.fromkeys(TRIED, len(self.grid)))

    def _check_options(self) -> None:
        options = self.hparams
        for name in ("level_weights", "level_grid"):
            if options[name] is not None and len(options[name]) != len(LEVELS):
                raise ValueError(
                    f"{name} has {len(options[name])} entries, expected {len(LEVELS)}: {', '.join(LEVELS)}"
                )
        if options.level_grid and options.level_weights is not None:
            raise ValueError(
                f"level_weights is {list(options.level_weights)}, but with level_grid the weights are chosen on "
                "validation; set --model.level_grid null to keep them, or --model.level_weights null to choose"
            )
        if options.level_grid and not all(options.level_grid):
            raise ValueError(f"level_grid is {options.level_grid}, expected at least one value for each level")
        unknown = [level for level in options.levels if level not in LEVELS]
        if unknown or not options.levels:
            raise ValueError(f"levels is {list(options.levels)}, expected some of {', '.join(LEVELS)}")
        for name, choices in CHOICES.items():
            if options[name] not in choices:
                raise ValueError(f"{name} is {options[name]!r}, expected {', '.join(choices)}")
        for name in ("strength", "regularization"):
            if options[name] < 0:
                raise ValueError(f"{name} is {options[name]}, expected 0 or more")
        if options.lr <= 0:
            raise ValueError(f"lr is {options.lr}, expected above 0")

    # ---- from the base model

    def _start_from_base(self) -> None:
        """Take the weights of the base, unless a checkpoint of this model is continued."""
        if self.trainer.ckpt_path is not None:
            return
        if self.hparams.base is not None:
            self.load_base(self.hparams.base)
        else:
            rank_zero_warn("AnKGE: base is not set, so the embeddings are as this model was given them")

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """A checkpoint keeps the weights that were chosen, unless others are given.

        Levels that are left out now have none.
        """
        state, given = checkpoint["state_dict"], {kept: getattr(self, kept) for kept in TRIED.values()}
        if self.hparams.level_weights is not None:
            state |= given
            return
        state |= {kept: state[kept] * self.used_levels.to(state[kept]) for kept in given.keys() & state.keys()}
        options, now = checkpoint.get("hyper_parameters", {}), self.hparams.score_offset
        before = options.get("score_offset")
        if options.get("level_grid") and before not in (None, now):
            rank_zero_warn(
                f"AnKGE: the weights of the levels were chosen for score_offset {before}, not for {now}; choose them "
                "anew on validation by fit, or give --model.level_grid null and --model.level_weights"
            )

    def load_base(self, path: str | Path) -> None:
        """Take the embeddings of a checkpoint, after a check that it is of this graph and of these sizes."""
        self.load_state_dict(self._state_of(path), strict=False)
        rank_zero_info(f"AnKGE: took the embeddings of {path}")

    def _state_of(self, path: str | Path) -> dict[str, Tensor]:
        """The tables in a checkpoint of a base model.

        Raises:
            ValueError: If it is of another graph, score function or size.
        """
        checkpoint = read_base(path)
        options = checkpoint["hyper_parameters"]
        if options["scoring"] != self.hparams["scoring"]:
            raise ValueError(
                f"base {path}: was trained with {options['scoring']}, but scoring is {self.hparams['scoring']}"
            )
        for name in ("num_entities", "num_relations"):
            if options[name] != self.hparams[name]:
                raise ValueError(f"base {path}: {name} is {options[name]}, but the data has {self.hparams[name]}")
        for name, difference in HASHES.items():
            before, now = options.get(name), self.hparams[name]
            if None not in (before, now) and before != now:
                raise ValueError(f"base {path}: was trained on {difference}; train a base model on this data")
        return {name: value for name, value in checkpoint["state_dict"].items() if name.startswith(PREFIX)}

    # ---- training

    def set_neighbours(self, neighbours: Neighbours) -> None:
        """Take the analogical objects of all training triples, in the order of their rows."""
        self.neighbours = Neighbours(*(part.to(self.device) for part in neighbours))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Loss of the analogies of a batch of triples, which are known by their rows."""
        if self.neighbours is None:
            raise ValueError(
                "AnKGE: the analogical objects of the training triples are not known; add callbacks.AnalogyRetriever"
            )
        own = self.neighbours.rows(batch.index)
        losses, shares = self.losses(batch.heads, batch.relations, batch.tails, own)
        if self.hparams.share_mode == "batch_mean":
            loss = (losses.mean(0) * shares.mean(0)).sum()
        else:
            count = self.mean_over_ranks(losses.new_tensor(float(len(losses))))
            loss = (losses * shares).sum() / count
        if self.hparams.regularization:
            loss = loss + self.hparams.regularization * self.analogies.cubes()
        self.log("train/loss", loss, prog_bar=True, batch_size=len(batch.heads))
        for level, own, share in zip(LEVELS, losses.mean(0), shares.mean(0), strict=True):
            self.log_dict({f"train/loss_{level}": own, f"train/share_{level}": share}, batch_size=len(batch.heads))
        return loss

    def losses(self, heads: Tensor, relations: Tensor, tails: Tensor, neighbours: Neighbours) -> tuple[Tensor, Tensor]:
        """Loss and share of each triple at each level, (B, 3) both; shares of levels that are left out are 0.

        Args:
            heads: (B,) ids.
            relations: (B,) ids.
            tails: (B,) ids.
            neighbours: analogical objects of these triples.
        """
        scoring = self.tables.scoring
        head, relation, tail = self.tables.look_up(heads, relations, tails)
        targets = aggregate(self.tables, neighbours)
        own_head, own_relation = self.analogies(heads, relations, head, relation)
        distances = torch.stack(
            [
                scoring.distance(own_head, relation, tail),
                scoring.distance(head, own_relation, tail),
                scoring.distance(own_head, own_relation, tail),
            ],
            dim=1,
        )
        made = (own_head, own_relation, scoring.compose(own_head, own_relation))
        wanted = (targets.head, targets.relation, scoring.compose(targets.pair_head, targets.pair_relation))
        losses = level_losses(distances, made, wanted, self.hparams.strength, self.hparams.similarity)
        return losses, self._shares(targets, head, relation, tail) * self.used_levels

    @torch.no_grad()
    def _shares(self, targets: Targets, head: Tensor, relation: Tensor, tail: Tensor) -> Tensor:
        distance = self.tables.scoring.distance
        of_levels = torch.stack(
            [
                distance(targets.head, relation, tail),
                distance(head, targets.relation, tail),
                distance(targets.pair_head, targets.pair_relation, tail),
            ],
            dim=1,
        )
        own = distance(head, relation, tail) if self.hparams.share_of_base else None
        return level_shares(of_levels, own, self.hparams.shares == "one_hot")

    # ---- prediction

    @torch.no_grad()
    def level_scores(self, batch: Any) -> tuple[Tensor, Tensor]:
        """g of all entities as tails, (B, E), and of the analogies at each level, (3, B, E)."""
        offset = self.tables.scoring.margin if self.hparams.score_offset == "margin" else 0.0
        head, relation = self.tables.look_up(batch.heads, batch.relations)
        own_head, own_relation = self.analogies(batch.heads, batch.relations, head, relation)
        base = offset - self.tables.tail_distances(head, relation)
        levels = [(own_head, relation), (head, own_relation), (own_head, own_relation)]
        return base, torch.stack([offset - self.tables.tail_distances(*level) for level in levels])

    def count_weights(self, batch: Any) -> Tensor:
        """w_E, w_R and w_T, (3, B, E): how many of the kept analogical objects the training graph has, at most 1.

        Raises:
            ValueError: If the batch does not have the counts.
        """
        shape = (len(batch.heads), self.hparams.num_entities)
        if not self.hparams.adaptive_weights:
            return self.tables.entities.new_ones(len(LEVELS), 1, 1).expand(-1, *shape)
        if batch.seen is None or batch.linked is None:
            raise ValueError(
                "adaptive_weights: the queries have no counts of the training graph; set --data.query_counts true, or "
                "--model.adaptive_weights false"
            )
        options, weights = self.hparams, self.tables.entities.new_zeros(len(LEVELS), *shape)
        weights[0, batch.seen[0], batch.seen[1]] = (batch.seen_counts / options.entities).clamp(max=1).to(weights)
        weights[1, batch.linked[0], batch.linked[1]] = (
            (batch.linked_counts / options.relations).clamp(max=1).to(weights)
        )
        weights[2] = (batch.entity_counts / options.pairs).clamp(max=1)
        return weights

    def candidate_scores(self, batch: Any) -> Tensor:
        """See the base class."""
        base, levels = self.level_scores(batch)
        return _combined(base, levels.mul_(self.count_weights(batch)), self.level_weights)

    def rankings(self, batch: Any) -> dict[str, Tensor]:
        """See the base class; in validation, the method and ``identity`` with each of the weights that are tried."""
        base, levels = self.level_scores(batch)
        weights = self.count_weights(batch)
        levels *= weights
        parts = {"method": levels, "identity": weights * base}
        ranks = {"base": self.filtered_ranks(base, batch), **self.unlinked_ranks(base, batch)}
        for name, kept in TRIED.items():
            if self.hparams.level_grid and not self.trainer.testing:
                tried = [self.filtered_ranks(_combined(base, parts[name], lambdas), batch) for lambdas in self.grid]
                ranks[name] = torch.stack(tried)
            else:
                ranks[name] = self.filtered_ranks(_combined(base, parts[name], getattr(self, kept)), batch)
        return ranks

    def on_scores(self, stage: str, scores: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Choose the weights that are best on validation."""
        if stage != "val" or not self.hparams.level_grid:
            return
        for name, kept in TRIED.items():
            getattr(self, kept).copy_(self.grid[scores[name]["mrr"].reshape(-1).argmax()])
            prefix = "val" if name == "method" else f"val/{name}"
            for level, weight in zip(LEVELS, getattr(self, kept), strict=True):
                self.log(f"{prefix}/weight_{level}", weight, sync_dist=True)

    def pick(self, name: str, values: Tensor) -> Tensor:
        """See the base class; ranks of a batch are those of the weights that were the best before."""
        tried = name in TRIED and self.hparams.level_grid and values.ndim and len(values) == len(self.grid)
        return values[self._chosen(name)] if tried and not self.trainer.testing else values

    def _chosen(self, name: str) -> int:
        """Place in the grid of the weights that are kept; 0 for those of another grid."""
        same = (self.grid == getattr(self, TRIED[name])).all(1)
        return int(same.int().argmax())

    # ---- what is done with it

    @torch.no_grad()
    def explain(self, heads: Tensor, relations: Tensor, tails: Tensor) -> dict[str, Tensor]:
        """The other objects that fit tails best in place of those given: what the paper's case study shows.

        Args:
            heads: (B,) ids.
            relations: (B,) ids.
            tails: (B,) ids.

        Returns:
            ``entity``, ``relation``, ``pair_entity`` and ``pair_relation``, each (B,) ids.
        """
        settings = RetrievalSettings(1, 1, 1, EXPLAINED_BY, EXPLAINED_BY, exclude_original=True)
        settings = settings.clipped(self.hparams.num_entities, 2 * self.hparams.num_relations)
        found = retrieve(self.tables, torch.stack([heads, relations, tails], dim=1), settings)
        return {
            "entity": found.entities[:, 0],
            "relation": found.relations[:, 0],
            "pair_entity": found.pair_heads[:, 0],
            "pair_relation": found.pair_relations[:, 0],
        }

    def embedding_tables(self) -> dict[str, Tensor]:
        """Vectors of entities and relations, and the parameters of the analogy functions, for export."""
        analogies = {f"analogy_{name}": value.detach() for name, value in self.analogies.named_parameters()}
        return dict(self.tables.named_vectors()) | analogies

    def configure_optimizers(self) -> Any:
        """Adam on the analogy functions, and a tenth of the rate after each milestone.

        Here the base is taken as well: it is the first hook that knows whether a checkpoint is continued, and the last
        before callbacks look up the analogical objects.
        """
        self._start_from_base()
        optimizer = torch.optim.Adam(self.analogies.parameters(), lr=self.hparams.lr, fused=True)
        return [optimizer], [MultiStepLR(optimizer, list(self.hparams.lr_milestones), LR_DECAY)]


def _combined(base: Tensor, levels: Tensor, weights: Tensor) -> Tensor:
    """``base + sum of weights times levels``, without the levels whose weight is 0."""
    total = base
    for level, weight in zip(levels, weights.tolist(), strict=True):
        if weight:
            total = torch.add(total, level, alpha=weight)
    return total


def read_base(path: str | Path | None) -> dict[str, Any]:
    """A checkpoint of a ``KnowledgeGraphEmbedding``, tensors and plain values only.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If it is something else.
    """
    if path is None:
        raise ValueError("base is not set: give the checkpoint of a trained KnowledgeGraphEmbedding")
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"base {path}: no such file; train a base model first, or give its checkpoint")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        raise ValueError(f"base {path}: is no checkpoint that can be read: {error}") from error
    options = checkpoint.get("hyper_parameters", {}) if isinstance(checkpoint, dict) else {}
    if "scoring" not in options or f"{PREFIX}entities" not in checkpoint.get("state_dict", {}):
        raise ValueError(f"base {path}: holds no embeddings of a knowledge graph")
    if any(name.startswith("analogies.") for name in checkpoint["state_dict"]):
        raise ValueError(
            f"base {path}: is a checkpoint of AnKGE itself; give that of a base model, such as its own, "
            f"{options.get('base')}"
        )
    return checkpoint


def scoring_of(base: str | Path | None) -> dict[str, Any]:
    """The score function that a checkpoint was trained with."""
    return read_base(base)["hyper_parameters"]["scoring"]
