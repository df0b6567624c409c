"""Triples of a knowledge graph: training with negatives, and queries with all that is known of their answers."""

from difflib import get_close_matches
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from datamodules.batches import LinkQueryBatch, TripleBatch
from datamodules.negative_sampling import Kind, NegativeSampler
from datamodules.readers.label_tables import read_table, row_name
from datamodules.readers.mapped_graph import MappedGraph
from datamodules.readers.pyg_graph import Name, PygGraph
from datamodules.readers.triples import COLUMNS, Graph, TripleFolder
from datamodules.readers.world_graph import WorldGraph
from datamodules.repeatable_loaders import RepeatableLoaders, check_at_least
from datamodules.sampling import BatchKey, EvaluationArraySampler, TrainArraySampler
from datamodules.triple_index import Gathered, TripleIndex, WithReverses, row_keys

Layout = Literal["world", "tsv", "pyg"]
PARTS = ("train", "val", "test")
TITLES = {"train": "training", "val": "validation", "test": "test"}
SHOWN = 3  # examples in a message
REVERSE = "_reverse"


class TrainingTriples(Dataset):
    """Whole batches of training triples.

    Args:
        triples: (T, 3) int64 with reverses: an array, or :class:`WithReverses`.
        index: The same triples.
        negatives: Draws the negatives; None for batches without any.
        weighted: Weigh triples by how often their parts occur.
    """

    def __init__(
        self,
        triples: np.ndarray | WithReverses,
        index: TripleIndex,
        negatives: NegativeSampler | None = None,
        weighted: bool = False,
    ) -> None:
        self.triples, self.index, self.negatives, self.weighted = triples, index, negatives, weighted

    def __len__(self) -> int:
        return len(self.triples)

    def __getitems__(self, key: BatchKey) -> TripleBatch:
        """Make the batch of a key; the negatives are a function of the key's numbers and of the seed."""
        heads, relations, tails = np.ascontiguousarray(self.triples[key.rows].T)
        entities, excluded = np.empty(0, dtype=np.int64), np.empty(0, dtype=bool)
        if self.negatives is not None:
            entities, excluded = self.negatives.draw(
                heads, relations, epoch=key.epoch, pass_=key.pass_, batch=key.batch
            )
        weights = np.ones(len(heads), dtype=np.float32)
        if self.weighted:
            half = self.index.num_relations // 2
            weights = self.index.weights(heads, relations, tails, (relations + half) % (2 * half))
        return TripleBatch(*map(torch.from_numpy, (heads, relations, tails, entities, excluded, weights, key.rows)))


class LinkQueries(Dataset):
    """Whole batches of queries (head, relation, ?).

    Args:
        triples: (n, 3) int64 head, relation (0..2R-1) and right answer, or -1 where it is unknown.
        index: Training triples with reverses.
        known: All triples with reverses, whose tails are right answers.
        category: (R,) int64 kind of each relation.
        counts: Give ``linked`` and ``seen``; otherwise they are None.
    """

    def __init__(
        self,
        triples: np.ndarray | WithReverses,
        index: TripleIndex,
        known: TripleIndex,
        category: np.ndarray,
        counts: bool = True,
    ) -> None:
        self.triples, self.index, self.known = triples, index, known
        self.category, self.counts = category, counts

    def __len__(self) -> int:
        return len(self.triples)

    def __getitems__(self, key: BatchKey) -> LinkQueryBatch:
        """Make the batch of a key."""
        heads, relations, tails = np.ascontiguousarray(self.triples[key.rows].T)
        known = self.known.tails_of(heads, relations)
        others = known.values != tails[known.rows]
        counted = [None] * 4
        if self.counts:
            counted = [*_pairs(self.index.linked.gather(heads)), *_pairs(self.index.seen.gather(relations))]
        return LinkQueryBatch(
            *map(torch.from_numpy, (heads, relations, tails, key.rows)),
            torch.from_numpy(self.category[relations % len(self.category)]),
            torch.from_numpy(np.stack([known.rows[others], known.values[others]])),
            *counted,
            torch.from_numpy(self.index.entity_counts),
        )


class KnowledgeGraph(RepeatableLoaders):
    """Triples (head, relation, tail) to train on, and queries (head, relation, ?) for both ends of the held-out ones.

    The reverse of each relation r is a relation r + R: training has every triple in both directions, and a question for
    the head of (h, r, t) is the query (t, r + R, ?). So all queries ask for a tail.

    Layouts:
        ``world``: countries and cities, see :class:`datamodules.readers.world_graph.WorldGraph`; needs no file.
        ``tsv``: a folder of text files, see :class:`datamodules.readers.triples.TripleFolder`.
        ``pyg``: the folder that PyTorch Geometric keeps ``FB15k_237`` or ``WordNet18RR`` in; it downloads what lacks.

    Validation or test triples with an entity or relation that no training triple has are kept, as the benchmarks do,
    and reported: what is untrained is ranked by chance. Training triples that repeat an earlier one are left out.
    Held-out triples that are training triples too, repeat an earlier one or are in both parts are reported.

    Args:
        layout: How the data lies on disk.
        root: Folder of the data; not needed for ``world``, and ``data/<name>`` by itself for ``pyg``.
        name: Data set of ``pyg``: ``FB15k-237`` or ``WN18RR``.
        world_cities: Number of the most populous cities in ``world``, beside all capitals.
        objective: ``links`` for training with negatives, ``analogies`` for batches without any.
        batch_size: Training triples per step and process.
        eval_batch_size: Queries per evaluation step and process; None for as many as in training.
        negatives: Whether negatives are drawn for the whole batch, for chunks of it or for each triple.
        num_negatives: Number K of negatives; with ``shared`` and ``chunked``, E or more takes all E entities.
        chunk_size: Most triples of a chunk.
        use_weight: Weigh triples by how often their parts occur, section 1 of the specification.
        unseen: What happens to held-out triples with an entity or relation that training lacks: ``error``, ``keep`` or
            ``drop``.
        query_counts: Say in each query which entities are linked to its head and seen with its relation, as AnKGE and
            the control ``unlinked`` need; without that, large graphs are evaluated with less memory.
        memory_map: Keep the parsed triples in a file that is read where needed, for graphs that memory would not hold.
        cache: Folder of that file; None puts it beside the data.
        num_workers: Loading processes; None for 0, as a batch is made of arrays in a few milliseconds.
        seed: Seed of order and negatives; None for that of `seed_everything`, or 0.
        split_seed: Seed of the parts of ``world``.
        drop_last: Leave out the last, smaller training batch; None does so for ``links`` unless nothing would be left.
        predict_split: Which part ``predict`` asks for both ends of.
        predict_path: CSV file of queries instead, with columns ``head``, ``relation`` and ``tail``, all names, and
            either ``head`` or ``tail`` empty.

    Raises:
        ValueError: If a value is out of range; names field, value and range.
        FileNotFoundError: If the data is not there.
    """

    main_metric = "mrr"

    def __init__(
        self,
        layout: Layout = "world",
        root: str | None = None,
        name: Name = "FB15k-237",
        world_cities: int = 2000,
        objective: Literal["links", "analogies"] = "links",
        batch_size: int = 1024,
        eval_batch_size: int | None = 256,
        negatives: Kind = "shared",
        num_negatives: int = 256,
        chunk_size: int = 128,
        use_weight: bool = False,
        unseen: Literal["error", "keep", "drop"] = "keep",
        query_counts: bool = True,
        memory_map: bool = False,
        cache: str | None = None,
        num_workers: int | None = None,
        seed: int | None = None,
        split_seed: int = 0,
        drop_last: bool | None = None,
        predict_split: Literal["train", "val", "test"] = "test",
        predict_path: str | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(logger=False)  # the model has facts of the same names
        self._check_options()
        self.reader = self.make_reader()

    def make_reader(self) -> WorldGraph | TripleFolder | PygGraph | MappedGraph:
        """Return the reader of the chosen layout."""
        options = self.hparams
        if options.layout == "world":
            return WorldGraph(options.world_cities, options.split_seed)
        reader = self._file_reader()
        return MappedGraph(reader, options.cache) if options.memory_map else reader

    def _file_reader(self) -> TripleFolder | PygGraph:
        options = self.hparams
        if options.layout == "pyg":
            return PygGraph(options.root, options.name)
        if options.root is None:
            raise ValueError(
                "layout 'tsv' needs a folder; set --data.root to that of train.txt, valid.txt and test.txt"
            )
        return TripleFolder(options.root)

    def _check_options(self) -> None:
        options = self.hparams
        check_at_least(options, {"batch_size": 1, "eval_batch_size": 1, "num_negatives": 1, "chunk_size": 1})
        check_at_least(options, {"world_cities": 0, "num_workers": 0, "seed": 0, "split_seed": 0})
        if options.layout not in get_args(Layout):
            raise ValueError(f"layout '{options.layout}' is unknown; expected one of {', '.join(get_args(Layout))}")

        if options.root is not None and options.layout == "world":
            raise ValueError(
                f"root is '{options.root}', but layout 'world' is made from a package; set --data.layout tsv to read "
                "train.txt, valid.txt and test.txt there, or pyg for a folder of PyTorch Geometric"
            )
        if options.memory_map and options.layout == "world":
            raise ValueError("memory_map is for graphs in files; set it to false, or layout to tsv or pyg")

    def prepare_data(self) -> None:
        """Download what is missing, and parse what is to be memory-mapped."""
        self.reader.prepare()

    # Facts

    @cached_property
    def graph(self) -> Graph:
        """The graph as it is read, before anything is left out of validation and test."""
        return self.reader.read()

    @property
    def num_entities(self) -> int:
        """Number E of entities."""
        return len(self.graph.entity_names)

    @property
    def num_relations(self) -> int:
        """Number R of relations, without reversed ones."""
        return len(self.graph.relation_names)

    @property
    def entity_names(self) -> list[str]:
        """Name of each entity."""
        return self.graph.entity_names

    @property
    def relation_names(self) -> list[str]:
        """Name of each of the R relations; reversed ones are called ``<name>_reverse``."""
        return self.graph.relation_names

    @property
    def all_relation_names(self) -> list[str]:
        """Name of each of the 2R relations, reversed ones last."""
        return [*self.relation_names, *(f"{name}{REVERSE}" for name in self.relation_names)]

    @cached_property
    def graph_hash(self) -> str:
        """SHA-256 over the names of entities and relations in their order: whether two models number them alike."""
        text = "\n".join([*self.entity_names, "", *self.relation_names])
        return sha256(text.encode()).hexdigest()

    @cached_property
    def train_hash(self) -> str:
        """SHA-256 over the training triples in any order: whether a model has seen what is held out here."""
        keys = row_keys(self.graph.parts["train"], self.num_entities, self.num_relations)
        return sha256(np.sort(keys).tobytes()).hexdigest()

    # What is known of the triples

    @cached_property
    def splits(self) -> dict[str, np.ndarray]:
        """(n, 3) triples of ``train``, ``val`` and ``test``, without reverses; says once what is odd about them."""
        graph = self.graph
        if graph.duplicates:
            rank_zero_warn(f"{graph.duplicates} training triples repeat an earlier one and are left out")
        parts = {"train": graph.parts["train"]}
        trained = self._trained(graph)
        for part in ("val", "test"):
            parts[part] = self._held_out(part, graph.parts[part], trained)
            twice = int(self.index.contains(parts[part]).sum())
            if twice:
                rank_zero_warn(
                    f"{twice} of {len(parts[part])} {TITLES[part]} triples are training triples too, so that results "
                    "are too good; remove them from one of the files"
                )
        self._tell_repeated(parts)
        return parts

    @cached_property
    def train_triples(self) -> np.ndarray | WithReverses:
        """(T, 3) int64 training triples, reversed ones last; worked out when asked for with ``memory_map``."""
        triples = WithReverses(self.graph.parts["train"], self.num_relations)
        return triples if self.hparams.memory_map else np.asarray(triples)

    @cached_property
    def index(self) -> TripleIndex:
        """What the training triples, reversed ones included, say of their parts."""
        return TripleIndex(self.train_triples, self.num_entities, 2 * self.num_relations)

    @cached_property
    def known(self) -> TripleIndex:
        """All triples in both directions: right answers that are not counted as mistakes."""
        triples = WithReverses(np.concatenate(list(self.graph.parts.values())), self.num_relations)
        return TripleIndex(triples, self.num_entities, 2 * self.num_relations)

    @cached_property
    def relation_category(self) -> np.ndarray:
        """(R,) int64 kind of each relation: 0 is 1-1, 1 is 1-N, 2 is N-1, 3 is N-N."""
        return self.index.relation_categories()

    def setup(self, stage: str | None = None) -> None:
        """Read the triples, and the queries to predict.

        Args:
            stage: ``fit``, ``validate``, ``test``, ``predict`` or None for all.
        """
        _ = self.splits
        if stage in ("fit", None):
            self._check_negatives()
        if stage == "predict" and self.hparams.predict_path is not None:
            _ = self._asked

    # Loaders

    def train_dataloader(self) -> DataLoader:
        """Training batches; order and negatives are functions of (seed, epoch, pass, batch)."""
        dataset = self.train_dataset()
        sampler = TrainArraySampler(
            len(dataset),
            self.hparams.batch_size,
            seed=self.seed,
            drop_last=self._drops_last(len(dataset)),
            trainer=self.trainer if self.trainer is not None and self.trainer.training else None,
            **self._ranks,
        )
        return self._loader(dataset, sampler, _as_it_is)

    def train_dataset(self) -> TrainingTriples:
        """The training triples without a loader."""
        options, negatives = self.hparams, None
        if options.objective == "links":
            self._check_negatives()
            negatives = NegativeSampler(
                self.index, options.num_negatives, options.negatives, options.chunk_size, self.seed
            )
        return TrainingTriples(self.train_triples, self.index, negatives, options.use_weight)

    def val_dataloader(self) -> DataLoader:
        """Queries for both ends of the validation triples, tails first, each once over all ranks."""
        return self._query_loader("val")

    def test_dataloader(self) -> DataLoader:
        """Queries for both ends of the test triples, tails first, each once over all ranks."""
        return self._query_loader("test")

    def predict_dataloader(self) -> DataLoader:
        """Queries of ``predict_path``, or for both ends of the triples of ``predict_split``."""
        return self._query_loader("predict")

    def queries(self, part: str) -> LinkQueries:
        """The queries of ``train``, ``val``, ``test`` or ``predict`` without a loader."""
        counts = self.hparams.query_counts
        return LinkQueries(self._queried(part), self.index, self.known, self.relation_category, counts)

    def query_names(self, index: Tensor | np.ndarray, part: str = "predict") -> list[dict[str, Any]]:
        """Say what queries ask for.

        Args:
            index: (B,) rows of the queries, as in ``LinkQueryBatch.index``.
            part: ``train``, ``val``, ``test`` or ``predict``.

        Returns:
            For each its ``head``, ``relation`` and ``tail`` by name, as the file has them, and the ``side`` that is
            asked for: ``head`` or ``tail``. Of that the name is the right answer, or empty where it is unknown. Queries
            of a file also have its ``row``, from 1: one by a reversed relation is told as that of the relation itself.
        """
        found: list[dict[str, Any]] = []
        of_file = part == "predict" and self.hparams.predict_path is not None
        names = [*self.entity_names, ""]  # -1 is the last
        index = np.asarray(index)
        for row, (given, relation, answer) in zip(index.tolist(), self._queried(part)[index].tolist(), strict=True):
            reverse, relation_row = divmod(relation, self.num_relations)
            head, tail = (answer, given) if reverse else (given, answer)
            found.append(
                {
                    "head": names[head],
                    "relation": self.relation_names[relation_row],
                    "tail": names[tail],
                    "side": "head" if reverse else "tail",
                }
                | ({"row": row + 1} if of_file else {})
            )
        return found

    def _query_loader(self, part: str) -> DataLoader:
        dataset = self.queries(part)
        batch_size = self.hparams.eval_batch_size or self.hparams.batch_size
        return self._loader(dataset, EvaluationArraySampler(len(dataset), batch_size, **self._ranks), _as_it_is)

    def _queried(self, part: str) -> np.ndarray | WithReverses:
        if part == "predict":
            if self.hparams.predict_path is not None:
                return self._asked
            part = self.hparams.predict_split
        return WithReverses(self.splits[part], self.num_relations)

    def _drops_last(self, length: int) -> bool:
        if self.hparams.drop_last is not None:
            return self.hparams.drop_last
        return self.hparams.objective == "links" and length >= self.hparams.batch_size * self._ranks["world_size"]

    def _workers(self, dataset: Dataset) -> int:
        return self.hparams.num_workers or 0

    # Checks

    def _check_negatives(self) -> None:
        """Refuse a query that every entity answers: it has no negative to draw."""
        full = self.index.full_pair() if self.hparams.objective == "links" else None
        if full is not None:
            names = self.entity_names[full[0]], self.all_relation_names[full[1]]
            raise ValueError(
                f"every one of the {self.num_entities} entities is a tail of ('{names[0]}', '{names[1]}') in training, "
                "so there is no negative for it; remove the relation, or add entities"
            )

    def _trained(self, graph: Graph) -> tuple[np.ndarray, np.ndarray]:
        """(E,) and (R,) whether a training triple has the entity, the relation."""
        entities, relations = np.zeros(self.num_entities, dtype=bool), np.zeros(self.num_relations, dtype=bool)
        heads, used, tails = graph.parts["train"].T
        entities[heads] = entities[tails] = relations[used] = True
        return entities, relations

    def _held_out(self, part: str, triples: np.ndarray, trained: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
        """Triples of a part after the policy for what training lacks."""
        entities, relations = trained
        unseen = ~(entities[triples[:, 0]] & relations[triples[:, 1]] & entities[triples[:, 2]])
        count, policy = int(unseen.sum()), self.hparams.unseen
        if not count:
            return triples
        examples = ", ".join(f"({', '.join(self._names(row))})" for row in triples[unseen][:SHOWN])
        message = (
            f"{count} of {len(triples)} {TITLES[part]} triples have an entity or relation that no training triple has: "
            f"{examples}{', ...' if count > SHOWN else ''}"
        )
        if policy == "error":
            raise ValueError(f"{message}; set --data.unseen to keep or drop, or add training triples")
        if policy == "drop" and count == len(triples):
            raise ValueError(f"{message}; with --data.unseen drop none is left")
        done = "left out" if policy == "drop" else "kept, as the benchmarks do, although their vectors are not trained"
        rank_zero_warn(f"{message}; they are {done} (--data.unseen {policy})")
        return triples[~unseen] if policy == "drop" else triples

    def _tell_repeated(self, parts: dict[str, np.ndarray]) -> None:
        """Warn of held-out triples that count twice, or by which a model is both chosen and tested."""
        keys = {part: row_keys(parts[part], self.num_entities, self.num_relations) for part in ("val", "test")}
        distinct = {part: np.unique(its) for part, its in keys.items()}
        for part, its in distinct.items():
            if repeated := len(keys[part]) - len(its):
                rank_zero_warn(
                    f"{repeated} of {len(keys[part])} {TITLES[part]} triples repeat an earlier one and count twice; "
                    "remove them from the file"
                )
        if common := len(np.intersect1d(*distinct.values(), assume_unique=True)):
            rank_zero_warn(
                f"{common} test triples are validation triples too, so that a model is tested on what it was chosen "
                "by; remove them from one of the files"
            )

    def _names(self, triple: np.ndarray) -> tuple[str, str, str]:
        head, relation, tail = triple.tolist()
        return self.entity_names[head], self.relation_names[relation], self.entity_names[tail]

    # Queries of a file

    @cached_property
    def _asked(self) -> np.ndarray:
        """(n, 3) queries of ``predict_path``: what is given, the relation, and -1."""
        path = Path(self.hparams.predict_path).expanduser()
        if not path.is_file():
            raise FileNotFoundError(
                f"--data.predict_path '{path}' does not exist; set it to a CSV file with columns {', '.join(COLUMNS)}"
            )
        table = read_table(path, COLUMNS)
        entities = {name: row for row, name in enumerate(self.entity_names)}
        relations = {name: row for row, name in reversed(list(enumerate(self.all_relation_names)))}
        queries = np.full((len(table), 3), -1, dtype=np.int64)
        for row, (head, relation, tail) in enumerate(table[list(COLUMNS)].itertuples(index=False)):
            if bool(head) == bool(tail):
                raise ValueError(
                    f"{path}, {row_name(row, path)}: head '{head}' and tail '{tail}'; exactly one of the two has to be "
                    "empty"
                )
            given, reverse = ("head", 0) if head else ("tail", self.num_relations)
            queries[row, 0] = _look_up(head or tail, given, entities, path, row)
            number = _look_up(relation, "relation", relations, path, row)
            queries[row, 1] = (number + reverse) % (2 * self.num_relations)
        return queries


def _look_up(name: str, column: str, numbers: dict[str, int], path: Path, row: int) -> int:
    """Number of a name, also where blanks around it differ, which tables of other programs add or lose."""
    if name in numbers:
        return numbers[name]
    alike = [number for other, number in numbers.items() if other.strip() == name.strip()]
    if len(alike) == 1:
        return alike[0]
    close = ", ".join(f"'{other}'" for other in get_close_matches(name, numbers, n=SHOWN, cutoff=0))
    raise ValueError(
        f"{path}, {row_name(row, path)}: {column} '{name}' is not in the graph; the nearest names are {close}"
    )


def _pairs(gathered: Gathered) -> tuple[Tensor, Tensor]:
    return torch.from_numpy(np.stack([gathered.rows, gathered.values])), torch.from_numpy(gathered.counts)


def _as_it_is(batch: Any) -> Any:
    return batch
