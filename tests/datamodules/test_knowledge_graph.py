import warnings
from collections import Counter
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn

from callbacks.exact_resume import ExactResume
from datamodules import BatchKey, EvaluationArraySampler, KnowledgeGraph, TrainArraySampler
from datamodules.batches import LinkQueryBatch, TripleBatch
from datamodules.sampling import EvaluationBatchSampler, TrainBatchSampler
from tests.distributed import run_ranks

ENTITIES, RELATIONS = 12, 3


def random_parts(seed=0, count=90):
    """Named triples; each entity and relation is in training."""
    random = np.random.default_rng(seed)
    columns = [random.integers(0, size, count) for size in (ENTITIES, RELATIONS, ENTITIES)]
    triples = list(dict.fromkeys(zip(*(column.tolist() for column in columns), strict=True)))
    triples = [(f"e{h:02}", f"r{r}", f"e{t:02}") for h, r, t in triples]
    return {"train": triples[:50], "valid": triples[50:57], "test": triples[57:66]}


def write(folder: Path, parts) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    for part, triples in parts.items():
        (folder / f"{part}.txt").write_text("".join("\t".join(triple) + "\n" for triple in triples))
    return str(folder)


@pytest.fixture
def root(tmp_path):
    return write(tmp_path / "graph", random_parts())


def make(root, **options) -> KnowledgeGraph:
    settings = {"layout": "tsv", "root": root, "batch_size": 16, "num_negatives": 5, "chunk_size": 4, "seed": 3}
    return KnowledgeGraph(**settings | options)


def numbered(part):
    """Triples of a part as numbers, in the order of the file."""
    return [(int(h[1:]), int(r[1:]), int(t[1:])) for h, r, t in random_parts()[part]]


def both_ways(triples):
    return [*triples, *((t, r + RELATIONS, h) for h, r, t in triples)]


def tuples(batch):
    return list(zip(batch.heads.tolist(), batch.relations.tolist(), batch.tails.tolist(), strict=True))


def equal(batch, other):
    return all(torch.equal(one, two) for one, two in zip(batch, other, strict=True))


# Facts


def test_facts_are_there_right_after_init(root):
    data = make(root)
    assert (data.num_entities, data.num_relations) == (ENTITIES, RELATIONS)
    assert data.entity_names == [f"e{entity:02}" for entity in range(ENTITIES)]
    assert data.relation_names == ["r0", "r1", "r2"]
    assert data.all_relation_names == ["r0", "r1", "r2", "r0_reverse", "r1_reverse", "r2_reverse"]
    assert data.main_metric == "mrr"
    assert data.graph is data.graph


def test_the_hash_tells_graphs_apart_by_names_and_order(root, tmp_path):
    parts = random_parts()
    renamed = {
        part: [(h.replace("e11", "x"), r, t.replace("e11", "x")) for h, r, t in its] for part, its in parts.items()
    }
    fewer = parts | {"test": parts["test"][:2]}
    swapped = {part: [(h, {"r0": "r1", "r1": "r0"}.get(r, r), t) for h, r, t in its] for part, its in parts.items()}
    graphs = (parts, renamed, fewer, swapped)
    hashes = [make(write(tmp_path / str(number), its)).graph_hash for number, its in enumerate(graphs)]
    assert len(hashes[0]) == 64
    assert hashes[0] == hashes[2] == hashes[3] == make(root).graph_hash != hashes[1]
    (tmp_path / "3" / "relations.dict").write_text("0\tr1\n1\tr0\n2\tr2\n")
    assert make(str(tmp_path / "3")).graph_hash != hashes[3]


def test_the_hash_of_training_triples_tells_splits_apart_but_not_orders(root, tmp_path):
    parts = random_parts()
    exchanged = parts | {"train": [*parts["train"][1:], parts["test"][0]], "test": [parts["train"][0]]}
    graphs = (parts | {"train": parts["train"][::-1]}, parts | {"test": parts["test"][:2]}, exchanged)
    hashes = [make(write(tmp_path / str(number), its)).train_hash for number, its in enumerate(graphs)]
    assert hashes[0] == hashes[1] == make(root).train_hash != hashes[2]
    assert make(write(tmp_path / "3", exchanged)).graph_hash == make(root).graph_hash


def test_the_default_is_the_world():
    data = KnowledgeGraph()
    data.prepare_data()
    data.setup()
    assert "Belgium" in data.entity_names
    assert 2000 < data.num_entities < 5000
    assert len(data.val_dataloader().dataset) == 2 * len(data.splits["val"])
    (batch, *_) = data.train_dataloader()
    assert isinstance(batch, TripleBatch)
    assert batch.heads.shape == (1024,)


# Training batches


def test_training_triples_are_followed_by_their_reverses(root):
    data = make(root)
    assert [tuple(row) for row in data.train_triples.tolist()] == both_ways(numbered("train"))
    assert data.train_triples.dtype == np.int64
    assert {part: len(triples) for part, triples in data.splits.items()} == {"train": 50, "val": 7, "test": 9}


@pytest.mark.parametrize("kind", ["shared", "chunked", "per_triple"])
def test_an_epoch_has_each_triple_once_and_no_known_tail_that_is_not_excluded(root, kind):
    data = make(root, negatives=kind, drop_last=False)
    triples = both_ways(numbered("train"))
    seen = []
    for batch in data.train_dataloader():
        rows = batch.index.tolist()
        seen += rows
        assert tuples(batch) == [triples[row] for row in rows]
        size = len(rows)
        chunks = -(-size // 4)
        shape = {"shared": (5,), "chunked": (chunks, 5), "per_triple": (size, 5)}[kind]
        assert batch.negatives.shape == shape
        assert batch.excluded.shape == (size, 5)
        for row, (head, relation, _) in enumerate(tuples(batch)):
            known = {t for h, r, t in triples if (h, r) == (head, relation)}
            chunk = row // -(-size // chunks)
            place = {"shared": ..., "chunked": chunk, "per_triple": row}[kind]
            assert batch.excluded[row].tolist() == [entity in known for entity in batch.negatives[place].tolist()]
        assert [tensor.dtype for tensor in batch] == [torch.int64] * 4 + [torch.bool, torch.float32, torch.int64]
        assert batch.weights.tolist() == [1] * size
    assert sorted(seen) == list(range(100))


def test_weights_of_triples(root):
    triples = both_ways(numbered("train"))
    by_head, by_tail = Counter((h, r) for h, r, _ in triples), Counter((t, r) for _, r, t in triples)
    for batch in make(root, use_weight=True).train_dataloader():
        expected = [(3 + by_head[h, r] + 3 + by_tail[t, r]) ** -0.5 for h, r, t in tuples(batch)]
        assert batch.weights.tolist() == pytest.approx(expected, rel=1e-6)


def test_analogies_are_trained_without_negatives(root):
    batches = list(make(root, objective="analogies").train_dataloader())
    assert sum(len(batch.index) for batch in batches) == 100
    for batch in batches:
        assert batch.negatives.shape == batch.excluded.shape == (0,)
        assert (batch.negatives.dtype, batch.excluded.dtype) == (torch.int64, torch.bool)


@pytest.mark.parametrize(
    ("options", "sizes"),
    [
        ({}, [16] * 6),
        ({"drop_last": False}, [16] * 6 + [4]),
        ({"objective": "analogies"}, [16] * 6 + [4]),
        ({"objective": "analogies", "drop_last": True}, [16] * 6),
        ({"batch_size": 100}, [100]),
        ({"batch_size": 1000}, [100]),
    ],
)
def test_the_last_batch(root, options, sizes):
    assert [len(batch.index) for batch in make(root, **options).train_dataloader()] == sizes


def test_a_batch_that_is_never_full(root):
    with pytest.raises(ValueError, match="100 training samples make no batch of batch_size 1000"):
        make(root, batch_size=1000, drop_last=True).train_dataloader()


def test_the_seed_decides_on_order_and_negatives(root):
    first, again, other = (list(make(root, seed=seed).train_dataloader()) for seed in (3, 3, 4))
    assert all(equal(*pair) for pair in zip(first, again, strict=True))
    assert not any(torch.equal(one.index, two.index) for one, two in zip(first, other, strict=True))
    assert not all(torch.equal(one.negatives, two.negatives) for one, two in zip(first, other, strict=True))
    loader = make(root).train_dataloader()
    epochs = [list(loader), list(loader)]
    loader.batch_sampler.sampler.set_epoch(1)
    epochs.append(list(loader))
    for one, two in ((0, 1), (1, 2), (0, 2)):
        assert not any(torch.equal(a.index, b.index) for a, b in zip(epochs[one], epochs[two], strict=True))
        assert len({tuple(batch.negatives.tolist()) for which in (one, two) for batch in epochs[which]}) > 10


@pytest.mark.parametrize("negatives", ["shared", "per_triple"])
def test_triples_on_disk_make_the_same_batches(root, tmp_path, negatives):
    options = {"negatives": negatives, "use_weight": True, "drop_last": False}
    in_memory = make(root, **options)
    for _ in range(2):  # written, then read again
        on_disk = make(root, memory_map=True, cache=str(tmp_path / "cache"), **options)
        on_disk.prepare_data()
        assert isinstance(on_disk.train_triples.triples, np.memmap)
        for one, two in zip(in_memory.train_dataloader(), on_disk.train_dataloader(), strict=True):
            assert equal(one, two)
        for one, two in zip(in_memory.test_dataloader(), on_disk.test_dataloader(), strict=True):
            assert equal(one, two)
        assert np.array_equal(in_memory.train_triples, np.asarray(on_disk.train_triples))


def test_names_with_odd_characters_are_the_same_in_memory_and_on_disk(tmp_path):
    odd = {"e03": "a\rb", "e04": " c", "e05": "d\u2028e", "e06": "f\x0cg"}
    parts = {
        part: [(odd.get(h, h), r, odd.get(t, t)) for h, r, t in triples] for part, triples in random_parts().items()
    }
    folder = write(tmp_path / "graph", parts)
    plain = make(folder)
    assert set(odd.values()) < set(plain.entity_names)
    for _ in range(2):  # written, then read again
        mapped = make(folder, memory_map=True, cache=str(tmp_path / "cache"))
        mapped.prepare_data()
        assert mapped.entity_names == plain.entity_names
        assert mapped.relation_names == plain.relation_names
        assert mapped.train_hash == plain.train_hash


# Queries


@pytest.mark.parametrize("part", ["val", "test"])
def test_queries_ask_for_both_ends_and_know_the_right_answers(root, part):
    data = make(root, eval_batch_size=4)
    asked = numbered({"val": "valid"}.get(part, part))
    queries = both_ways(asked)
    train = both_ways(numbered("train"))
    everything = set(train) | set(both_ways(numbered("valid"))) | set(both_ways(numbered("test")))
    tails_of = Counter(t for _, _, t in train)
    rows = []
    for batch in getattr(data, f"{part}_dataloader")():
        assert isinstance(batch, LinkQueryBatch)
        rows += batch.index.tolist()
        assert tuples(batch) == [queries[row] for row in batch.index.tolist()]
        assert batch.category.tolist() == [data.relation_category[r % RELATIONS] for _, r, _ in tuples(batch)]
        known, linked, seen = set(), Counter(), Counter()
        for row, (head, relation, tail) in enumerate(tuples(batch)):
            known |= {(row, t) for h, r, t in everything if (h, r) == (head, relation) and t != tail}
            linked.update((row, t) for h, _, t in train if h == head)
            seen.update((row, t) for _, r, t in train if r == relation)
        assert len(batch.known.T) == len(known)
        assert {tuple(pair) for pair in batch.known.T.tolist()} == known
        for pairs, counts, expected in (
            (batch.linked, batch.linked_counts, linked),
            (batch.seen, batch.seen_counts, seen),
        ):
            assert len(counts) == len(expected)
            assert dict(zip(map(tuple, pairs.T.tolist()), counts.tolist(), strict=True)) == expected
        assert batch.entity_counts.tolist() == [tails_of[entity] for entity in range(ENTITIES)]
        assert {tensor.dtype for tensor in batch} == {torch.int64}
    assert rows == list(range(2 * len(asked)))


def test_queries_without_counts(root):
    with_counts, without = (next(iter(make(root, query_counts=counts).val_dataloader())) for counts in (True, False))
    assert without.linked is without.seen is without.linked_counts is without.seen_counts is None
    assert torch.equal(without.known, with_counts.known)


def test_the_whole_file_may_be_one_batch(root):
    (batch,) = make(root, eval_batch_size=None, batch_size=99).val_dataloader()
    assert batch.heads.shape == (14,)


def test_names_of_queries(root):
    data = make(root)
    names = data.query_names(torch.tensor([0, 9 + 2]), "test")
    asked = random_parts()["test"]
    assert names == [
        dict(zip(("head", "relation", "tail"), asked[row], strict=True)) | {"side": side}
        for row, side in ((0, "tail"), (2, "head"))
    ]
    assert data.query_names(np.array([0])) == names[:1]  # the test part is what is predicted
    assert make(root, predict_split="val").query_names(np.array([7]))[0]["side"] == "head"


def test_no_description_stands_for_a_graph(root):
    assert not make(root)._described
    assert not make(root, predict_path="queries.csv")._described


def test_queries_of_a_file(root, tmp_path):
    path = tmp_path / "queries.csv"
    path.write_text("tail,note,head,relation\n,a,e03,r1\ne05,b,,r2\n,c,e05,r2_reverse\ne03,d,,r1_reverse\n")
    data = make(root, predict_path=str(path))
    data.setup("predict")
    (batch,) = data.predict_dataloader()
    assert tuples(batch) == [(3, 1, -1), (5, 2 + RELATIONS, -1), (5, 2 + RELATIONS, -1), (3, 1, -1)]
    everything = both_ways([triple for part in ("train", "valid", "test") for triple in numbered(part)])
    for row, (head, relation, _) in enumerate(tuples(batch)):
        known = {t for h, r, t in everything if (h, r) == (head, relation)}
        assert {entity for at, entity in batch.known.T.tolist() if at == row} == known
    assert data.query_names(batch.index) == [
        {"head": "e03", "relation": "r1", "tail": "", "side": "tail", "row": 1},
        {"head": "", "relation": "r2", "tail": "e05", "side": "head", "row": 2},
        {"head": "", "relation": "r2", "tail": "e05", "side": "head", "row": 3},
        {"head": "e03", "relation": "r1", "tail": "", "side": "tail", "row": 4},
    ]


@pytest.mark.parametrize(
    ("rows", "error", "message"),
    [
        ("e01,r0,\ne1,r0,\n", ValueError, r"q\.csv, row 2, line 3: head 'e1' is not .* names are 'e\d\d', .*, .*"),
        ("\ne01,r0,\n\n  \n\ne1,r0,\n", ValueError, r"q\.csv, row 2, line 7: head 'e1' is not"),
        ('"e1\n",r0,\n', ValueError, r"q\.csv, row 1, line 2: head 'e1\n' is not"),
        (",r0,e010\n", ValueError, r"q\.csv, row 1, line 2: tail 'e010' .* are ('e\d\d', )*'e10'"),
        ("e01,rr,\n", ValueError, r"q\.csv, row 1, line 2: relation 'rr' is not in the graph; .* 'r\d', 'r\d', 'r\d'"),
        ("e01,r0,e02\n", ValueError, r"row 1, line 2: head 'e01' and tail 'e02'; exactly one of the two"),
        (",r0,\n", ValueError, r"row 1, line 2: head '' and tail ''; exactly one"),
        ("", ValueError, "has a header but no row"),
        (None, FileNotFoundError, r"--data\.predict_path '.*q\.csv' does not exist; .* head, relation, tail"),
    ],
)  # fmt: skip
def test_queries_that_cannot_be_asked(root, tmp_path, rows, error, message):
    path = tmp_path / "q.csv"
    if rows is not None:
        path.write_text("head,relation,tail\n" + rows)
    with pytest.raises(error, match=message):
        make(root, predict_path=str(path)).setup("predict")


def test_blanks_around_names_of_queries(tmp_path):
    """A name as it is counts most; where the file or its reader has lost blanks, the only one that is alike."""
    odd = {"e03": " c", "e04": "c", "e05": " d ", "e06": " e", "e07": "e "}
    parts = {
        part: [(odd.get(h, h), r, odd.get(t, t)) for h, r, t in triples] for part, triples in random_parts().items()
    }
    folder, path = write(tmp_path / "graph", parts), tmp_path / "q.csv"
    path.write_text('head,relation,tail\n" c",r0,\nc,r0,\n d,r0,\n"e ", r0 ,\n')
    data = make(folder, predict_path=str(path))
    data.setup("predict")
    assert [row["head"] for row in data.query_names(np.arange(4))] == [" c", "c", " d ", "e "]
    path.write_text("head,relation,tail\ne,r0,\n")
    with pytest.raises(
        ValueError, match=r"row 1, line 2: head 'e' is not in the graph; the nearest names are (' e', 'e '|'e ', ' e')"
    ):
        make(folder, predict_path=str(path)).setup("predict")


def test_queries_of_a_file_without_a_column(root, tmp_path):
    (tmp_path / "q.csv").write_text("head,relation\ne01,r0\n")
    with pytest.raises(ValueError, match=r"column\(s\) tail missing; found head, relation"):
        make(root, predict_path=str(tmp_path / "q.csv")).setup("predict")


# What is odd about the data


def unseen_parts():
    parts = random_parts()
    odd = [("e00", "r0", f"new{number}") for number in range(4)] + [("e00", "other", "e01")]
    return parts | {"test": parts["test"] + odd}


def test_unseen_entities_and_relations_are_kept_and_told_once(tmp_path):
    data = make(write(tmp_path / "graph", unseen_parts()))
    with pytest.warns(UserWarning, match="that no training triple has") as told:
        data.setup()
    (message,) = [str(warning.message) for warning in told if "no training triple" in str(warning.message)]
    assert message.startswith("5 of 14 test triples have an entity or relation that no training triple has: ")
    assert "(e00, r0, new0), (e00, r0, new1), (e00, r0, new2), ...; they are kept" in message
    assert "--data.unseen keep" in message
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data.setup()
        assert len(data.splits["test"]) == 14
    assert data.num_entities == ENTITIES + 4
    assert data.relation_names == ["r0", "r1", "r2", "other"]
    assert data.relation_category[3] == 0
    assert sum(len(batch.index) for batch in data.test_dataloader()) == 28


def test_unseen_entities_and_relations_are_left_out_or_refused(tmp_path):
    folder = write(tmp_path / "graph", unseen_parts())
    data = make(folder, unseen="drop")
    with pytest.warns(UserWarning, match="5 of 14 test triples .* left out"):
        data.setup()
    names = data.entity_names
    assert [(names[h], f"r{r}", names[t]) for h, r, t in data.splits["test"].tolist()] == random_parts()["test"]
    with pytest.raises(ValueError, match=r"5 of 14 test triples .* set --data\.unseen to keep or drop"):
        make(folder, unseen="error").setup()
    only_odd = write(tmp_path / "odd", random_parts() | {"valid": [("x", "r0", "y")]})
    with pytest.raises(ValueError, match=r"1 of 1 validation triples .* none is left"):
        make(only_odd, unseen="drop").setup()


def test_repeated_triples_are_told(tmp_path):
    parts = random_parts()
    folder = write(tmp_path / "graph", parts | {"train": parts["train"] + parts["train"][:3]})
    data = make(folder)
    with pytest.warns(UserWarning, match="3 training triples repeat an earlier one and are left out"):
        data.setup()
    assert len(data.splits["train"]) == 50
    assert data.train_triples.shape == (100, 3)


def test_held_out_triples_that_are_trained_on_are_told(tmp_path):
    parts = random_parts()
    changed = parts | {"valid": parts["valid"] + parts["train"][:2], "test": parts["test"] + parts["train"][3:4]}
    data = make(write(tmp_path / "graph", changed))
    with pytest.warns(UserWarning, match="training triples too") as told:
        data.setup()
    messages = [str(warning.message) for warning in told]
    assert sum("2 of 9 validation triples are training triples too" in message for message in messages) == 1
    assert sum("1 of 10 test triples are training triples too" in message for message in messages) == 1
    assert len(data.splits["val"]) == 9


def test_held_out_triples_that_count_twice_are_told(tmp_path):
    parts = random_parts()
    valid, test = parts["valid"] + parts["valid"][:2] + parts["test"][:3], parts["test"] + parts["test"][-1:] * 2
    data = make(write(tmp_path / "graph", parts | {"valid": valid, "test": test}))
    with pytest.warns(UserWarning, match="remove them from") as told:
        data.setup()
    assert sorted(str(warning.message).partition(";")[0] for warning in told) == [
        "2 of 11 test triples repeat an earlier one and count twice",
        "2 of 12 validation triples repeat an earlier one and count twice",
        "3 test triples are validation triples too, so that a model is tested on what it was chosen by",
    ]
    assert (len(data.splits["val"]), len(data.splits["test"])) == (12, 11)


def test_an_ordinary_graph_is_read_without_a_word(root):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make(root).setup()


def test_a_pair_that_every_entity_answers_is_named(tmp_path):
    parts = random_parts()
    full = [("e03", "all", f"e{entity:02}") for entity in range(ENTITIES)]
    folder = write(tmp_path / "graph", parts | {"train": parts["train"] + full})
    message = r"every one of the 12 entities is a tail of \('e03', 'all'\) in training, so there is no negative"
    with pytest.raises(ValueError, match=message):
        make(folder).setup("fit")
    backwards = [(tail, relation, head) for head, relation, tail in full]
    other = make(write(tmp_path / "other", parts | {"train": parts["train"] + backwards}))
    with pytest.raises(ValueError, match=r"\('e03', 'all_reverse'\)"):
        other.setup("fit")
    make(folder).setup("test")
    make(folder, objective="analogies").setup("fit")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_negatives": 0}, "num_negatives is 0, expected 1 or more"),
        ({"chunk_size": 0}, "chunk_size is 0, expected 1 or more"),
        ({"batch_size": 0}, "batch_size is 0, expected 1 or more"),
        ({"eval_batch_size": 0}, "eval_batch_size is 0, expected 1 or more"),
        ({"seed": -1}, "seed is -1, expected 0 or more"),
        ({"world_cities": -1}, "world_cities is -1, expected 0 or more"),
        ({"layout": "csv"}, "layout 'csv' is unknown; expected one of world, tsv, pyg"),
        ({"layout": "tsv", "root": None}, r"layout 'tsv' needs a folder; set --data\.root"),
        ({"layout": "world"}, r"root is '.*', but layout 'world' is made from a package; set --data\.layout tsv"),
        (
            {"layout": "world", "root": None, "memory_map": True},
            "memory_map is for graphs in files; set it to false, or layout to tsv or pyg",
        ),
    ],
)
def test_options_out_of_range(root, options, message):
    with pytest.raises(ValueError, match=message):
        make(**{"root": root} | options)


# Keys of whole batches


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("drop_last", [True, False])
def test_array_samplers_have_the_rows_of_the_others(world_size, drop_last):
    for rank in range(world_size):
        ranks = {"rank": rank, "world_size": world_size}
        options = {"seed": 3, "drop_last": drop_last, "start_epoch": 2, "start_batch": 1, **ranks}
        keys, lists = (list(kind(50, 4, **options)) for kind in (TrainArraySampler, TrainBatchSampler))
        assert [key.rows.tolist() for key in keys] == [[sample.index for sample in batch] for batch in lists]
        assert [(key.epoch, key.pass_) for key in keys] == [(batch[0].epoch, batch[0].pass_) for batch in lists]
        assert [key.batch for key in keys] == [world_size * batch + rank for batch in range(1, 1 + len(keys))]
        keys, lists = (list(kind(50, 4, **ranks)) for kind in (EvaluationArraySampler, EvaluationBatchSampler))
        assert [key.rows.tolist() for key in keys] == [[sample.index for sample in batch] for batch in lists]
        assert [key.batch for key in keys] == [world_size * batch + rank for batch in range(len(keys))]
        assert all(isinstance(key, BatchKey) for key in keys)


# Under a trainer


class Scorer(LightningModule):
    """Notes down its batches."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.batches = {"train": [], "val": [], "test": [], "predict": []}

    def training_step(self, batch, batch_idx):
        self.batches["train"].append((self.current_epoch, batch_idx, batch))
        return self.weight * batch.weights.sum()

    def validation_step(self, batch, batch_idx):
        self.batches["val"].append(batch)

    def test_step(self, batch, batch_idx):
        self.batches["test"].append(batch)

    def predict_step(self, batch, batch_idx):
        self.batches["predict"].append(batch)
        return batch.index

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class SaveAt(Callback):
    """Writes a checkpoint right after some steps."""

    def __init__(self, folder, steps) -> None:
        self.folder, self.steps = folder, steps

    def on_train_batch_end(self, trainer, *args) -> None:
        if trainer.global_step in self.steps:
            trainer.save_checkpoint(self.folder / f"{trainer.global_step}.ckpt", weights_only=False)


def trainer(folder, saving=(), **options) -> Trainer:
    settings = {"accelerator": "cpu", "devices": 1, "logger": False, "enable_progress_bar": False}
    settings |= {"enable_model_summary": False, "enable_checkpointing": False, "use_distributed_sampler": False}
    return Trainer(default_root_dir=folder, callbacks=[ExactResume(), SaveAt(folder, saving)], **settings | options)


def test_a_run_goes_on_with_the_very_next_batch(root, tmp_path):
    full = Scorer()
    trainer(tmp_path, max_epochs=3, saving=(2, 6, 8)).fit(full, make(root))
    batches = full.batches["train"]
    assert len(batches) == 18
    assert len({tuple(batch.index.tolist()) for _, _, batch in batches}) == 18
    for done in (2, 6, 8):
        rest = Scorer()
        trainer(tmp_path, max_epochs=3).fit(rest, make(root), ckpt_path=tmp_path / f"{done}.ckpt", weights_only=True)
        found = rest.batches["train"]
        assert [place[:2] for place in found] == [place[:2] for place in batches[done:]]
        assert all(equal(one[2], two[2]) for one, two in zip(found, batches[done:], strict=True))


def test_loading_processes_make_the_same_batches(root, tmp_path):
    alone, helped = Scorer(), Scorer()
    for module, workers in ((alone, 0), (helped, 1)):
        trainer(tmp_path, max_epochs=2).fit(module, make(root, num_workers=workers))
    for one, two in zip(alone.batches["train"], helped.batches["train"], strict=True):
        assert equal(one[2], two[2])
    assert all(equal(one, two) for one, two in zip(alone.batches["val"], helped.batches["val"], strict=True))


def test_evaluation_and_prediction_under_a_trainer(root, tmp_path):
    module, data = Scorer(), make(root, eval_batch_size=4)
    runner = trainer(tmp_path)
    runner.validate(module, data)
    runner.test(module, data)
    rows = runner.predict(module, data)
    for part, count in (("val", 14), ("test", 18), ("predict", 18)):
        assert torch.cat([batch.index for batch in module.batches[part]]).tolist() == list(range(count))
    assert torch.cat(rows).tolist() == list(range(18))


def _train_as_rank(rank, root, folder):
    module, data = Scorer(), make(root, eval_batch_size=4)
    trainer(folder, devices=2, strategy="ddp", max_epochs=1).fit(module, data)
    return {
        "train": [[field.tolist() for field in batch] for _, _, batch in module.batches["train"]],
        "val": [batch.index.tolist() for batch in module.batches["val"]],
    }


def test_two_ranks_see_what_one_process_sees_in_turn(root, tmp_path):
    ranks = run_ranks(_train_as_rank, 2, root, str(tmp_path))
    single = [[field.tolist() for field in batch] for batch in make(root).train_dataloader()]
    together = [batch for turn in zip(*(rank["train"] for rank in ranks), strict=True) for batch in turn]
    assert together == single
    negatives = [[batch[3] for batch in rank["train"]] for rank in ranks]
    assert not any(one == two for one, two in zip(*negatives, strict=True))
    # the sanity check sees some of them once more
    rows = [set(chain(*rank["val"])) for rank in ranks]
    assert not rows[0] & rows[1]
    assert rows[0] | rows[1] == set(range(14))


# Real data

FACTS = {
    # entities, relations, train, val, test; entities in train; unseen val, test; self-loops
    "FB15k-237": (14541, 237, 272115, 17535, 20466, 14505, 9, 28, 1625),
    "WN18RR": (40943, 11, 86835, 3034, 3134, 40559, 210, 210, 7),
    "umls": (135, 46, 5216, 652, 661, 135, 0, 0, 0),
    "kinship": (104, 25, 8544, 1068, 1074, 104, 0, 0, 0),
    "nations": (14, 55, 1592, 199, 201, 14, 0, 0, 0),
}
# test pairs (h, t) linked in train in the same direction, in either; test (r, t) seen in train, (h, r) seen in train
SHARES = {
    "FB15k-237": (0, 0, 0.902, 0.762),
    "WN18RR": (0.0026, 0.350, 0.698, 0.400),
    "umls": (0.522, 0.637, 0.967, 0.985),
    "kinship": (0, 0.815, 0.970, 0.975),
    "nations": (1, 1, 0.915, 0.925),
}


@pytest.mark.realdata
@pytest.mark.filterwarnings("ignore:.*no training triple has")
@pytest.mark.parametrize("name", FACTS)
def test_counts_of_real_graphs(shared_data, name):
    data = KnowledgeGraph(layout="tsv", root=str(shared_data / "kg" / name))
    entities, relations, *sizes, trained, unseen_val, unseen_test, loops = FACTS[name]
    assert (data.num_entities, data.num_relations) == (entities, relations)
    assert [len(data.splits[part]) for part in ("train", "val", "test")] == sizes
    assert data.graph.duplicates == 0
    assert data.train_triples.shape == (2 * sizes[0], 3)
    train = data.splits["train"]
    assert len(np.unique(train[:, [0, 2]])) == trained
    for part, count in (("val", unseen_val), ("test", unseen_test)):
        assert (~np.isin(data.splits[part][:, [0, 2]], train[:, [0, 2]]).all(axis=1)).sum() == count
        assert not data.index.contains(data.splits[part]).any()
    assert (train[:, 0] == train[:, 2]).sum() == loops


@pytest.mark.realdata
@pytest.mark.filterwarnings("ignore:.*no training triple has")
@pytest.mark.parametrize("name", FACTS)
def test_shares_of_real_graphs_from_the_query_batches(shared_data, name):
    """What is linked and seen in the batches adds up to the published table."""
    data = KnowledgeGraph(layout="tsv", root=str(shared_data / "kg" / name))
    count = len(data.splits["test"])
    linked, seen = np.zeros(2 * count, dtype=bool), np.zeros(2 * count, dtype=bool)
    for batch in data.test_dataloader():
        for found, (row, entity) in ((linked, batch.linked), (seen, batch.seen)):
            hits = entity == batch.tails[row]
            found[batch.index[row[hits]].numpy()] = True
    train = {(h, t) for h, _, t in data.splits["train"].tolist()}
    same = np.mean([(h, t) in train for h, _, t in data.splits["test"].tolist()])
    # the reversed query asks for a head that is seen with the relation
    found = (same, linked[:count].mean(), seen[:count].mean(), seen[count:].mean())
    assert found == pytest.approx(SHARES[name], abs=0.0006)
    assert (linked[:count] == linked[count:]).all()


@pytest.mark.realdata
@pytest.mark.filterwarnings("ignore:.*no training triple has")
@pytest.mark.parametrize(("name", "queries", "steps", "batch_size"), [
    ("FB15k-237", 40_932, 531, 1024), ("WN18RR", 6_268, 84, 2048), ("WN18RR", 6_268, 339, 512),
])  # fmt: skip
def test_steps_and_queries_of_the_benchmarks(shared_data, name, queries, steps, batch_size):
    data = KnowledgeGraph(layout="tsv", root=str(shared_data / "kg" / name), batch_size=batch_size)
    assert len(data.queries("test")) == queries
    assert len(data.train_dataloader()) == steps
    assert len(data.train_triples) == {"FB15k-237": 544_230, "WN18RR": 173_670}[name]


@pytest.mark.realdata
@pytest.mark.filterwarnings("ignore:.*no training triple has")
def test_dictionaries_of_a_real_graph(shared_data):
    folder = shared_data / "kg" / "WN18RR"
    data = KnowledgeGraph(layout="tsv", root=str(folder))
    lines = (folder / "entities.dict").read_text().splitlines()
    assert data.entity_names == [line.split("\t")[1] for line in lines]
    first = (folder / "train.txt").read_text().split("\n", 1)[0].split("\t")
    head, relation, tail = data.train_triples[0].tolist()
    assert [data.entity_names[head], data.relation_names[relation], data.entity_names[tail]] == first
