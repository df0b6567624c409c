"""Analogical objects against brute force, and the callback that looks them up once."""

import errno
from contextlib import nullcontext
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from callbacks import AnalogyRetriever, analogy_retriever
from datamodules.triple_index import WithReverses
from modules.ankge import AnalogicalEmbedding, Neighbours, RetrievalSettings, fingerprint, retrieve, retriever
from modules.knowledge_graph import row_chunks
from tests.modules import small_graph
from tests.modules.small_graph import BASES, KINDS, tables

ENTITIES, RELATIONS = 9, 2
# all kinds: repeated (relation, tail), repeated (head, tail), a loop, and a triple beside its reverse
TRIPLES = torch.tensor(
    [[0, 0, 1], [2, 0, 1], [0, 3, 1], [5, 1, 5], [1, 2, 0], [8, 0, 3], [3, 2, 8], [7, 3, 6], [0, 1, 1], [4, 0, 1]]
)


def settings(**options):
    defaults = {"entities": 2, "relations": 2, "pairs": 4, "candidate_entities": 5, "candidate_relations": 3}
    return RetrievalSettings(**(defaults | options))


def by_brute_force(found, triples, asked):
    """Lists of (id, distance), and of ((head, relation), distance), best first, for each triple."""
    distances = small_graph.all_distances(found)
    entities, _, _ = distances.shape
    expected = []
    for h, r, t in triples.tolist():
        heads = [e for e in range(entities) if e != t and not (asked.exclude_original and e == h)]
        kinds = [k for k in range(distances.shape[1]) if not (asked.exclude_original and k == r)]
        heads.sort(key=lambda e: distances[e, r, t])
        kinds.sort(key=lambda k: distances[h, k, t])
        pairs = list(product(heads[: asked.candidate_entities], kinds[: asked.candidate_relations]))
        pairs.sort(key=lambda pair: distances[*pair, t])
        expected.append(
            (
                [(e, distances[e, r, t]) for e in heads[: asked.entities]],
                [(k, distances[h, k, t]) for k in kinds[: asked.relations]],
                [(pair, distances[*pair, t]) for pair in pairs[: asked.pairs]],
            )
        )
    return expected


def told(neighbours):
    """The same lists of what was found."""
    columns = [part.tolist() for part in neighbours]
    rows = []
    for heads, of_heads, kinds, of_kinds, pair_heads, pair_kinds, of_pairs in zip(*columns, strict=True):
        pairs = zip(pair_heads, pair_kinds, strict=True)
        rows.append(
            (
                list(zip(heads, of_heads, strict=True)),
                list(zip(kinds, of_kinds, strict=True)),
                list(zip(pairs, of_pairs, strict=True)),
            )
        )
    return rows


def check(neighbours, expected):
    for found, wanted in zip(told(neighbours), expected, strict=True):
        for own, other in zip(found, wanted, strict=True):
            assert [name for name, _ in own] == [name for name, _ in other]
            assert [d for _, d in own] == pytest.approx([d for _, d in other], rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("exclude", [False, True])
@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"entities": 1, "relations": 1, "pairs": 1},
        {"entities": 8, "relations": 4, "pairs": 6, "candidate_entities": 3, "candidate_relations": 2},
        {"entities": 1, "relations": 1, "pairs": 32, "candidate_entities": 8, "candidate_relations": 4},
    ],
    ids=["some", "one", "more kept than candidates", "all"],
)
def test_neighbours_are_those_of_brute_force(name, exclude, sizes):
    found = tables(name, ENTITIES, RELATIONS)
    asked = settings(exclude_original=exclude, **sizes).clipped(ENTITIES, 2 * RELATIONS)
    check(retrieve(found, TRIPLES, asked), by_brute_force(found, TRIPLES, asked))


@pytest.mark.parametrize("name", BASES)
def test_blocks_and_chunks_change_nothing(name, monkeypatch):
    found, asked = tables(name, ENTITIES, RELATIONS), settings()
    whole = retrieve(found, TRIPLES, asked)
    monkeypatch.setattr(retriever, "PAIRS_AT_ONCE", 2)
    monkeypatch.setattr(retriever, "TRIPLES_AT_ONCE", 3)
    monkeypatch.setattr(row_chunks, "CACHE", 40)
    monkeypatch.setattr(type(found.scoring), "table_block", lambda self, device: 4)
    done = []
    in_blocks = retrieve(found, TRIPLES, asked, done.append)
    assert sum(done) == len(TRIPLES)
    assert max(done) <= 3
    for own, other in zip(in_blocks, whole, strict=True):
        assert torch.equal(own, other) if own.dtype == torch.int64 else torch.allclose(own, other)


@pytest.mark.parametrize("name", BASES)
def test_shares_of_the_triples_make_the_whole(name):
    found, asked = tables(name, ENTITIES, RELATIONS), settings(exclude_original=True)
    whole = retrieve(found, TRIPLES, asked)
    parts = [retrieve(found, share, asked) for share in TRIPLES.tensor_split(3)]
    for own, other in zip(map(torch.cat, zip(*parts, strict=True)), whole, strict=True):
        assert torch.equal(own, other) if own.dtype == torch.int64 else torch.allclose(own, other)


@pytest.mark.parametrize("name", BASES)
def test_of_equal_objects_any_may_be_kept_but_none_twice(name):
    """Twins: entities 0-3 are one vector, 4-7 another, and all relations are the same."""
    found, asked = tables(name, ENTITIES, RELATIONS), settings(entities=6, relations=4, pairs=9)
    found.entities[1:4], found.entities[5:8] = found.entities[0].clone(), found.entities[4].clone()
    found.relations[:] = found.relations[0].clone()
    distances = small_graph.all_distances(found)
    neighbours = retrieve(found, TRIPLES, asked)
    expected = by_brute_force(found, TRIPLES, asked)
    for (h, r, t), row, wanted in zip(TRIPLES.tolist(), told(neighbours), expected, strict=True):
        for own, other in zip(row, wanted, strict=True):
            assert len({key for key, _ in own}) == len(own)
            assert [d for _, d in own] == pytest.approx([d for _, d in other], rel=1e-5, abs=1e-5)
        heads, kinds, pairs = row
        assert t not in {head for head, _ in heads} | {head for (head, _), _ in pairs}
        for head, kind, d in (
            *((head, r, d) for head, d in heads),
            *((h, kind, d) for kind, d in kinds),
            *((*pair, d) for pair, d in pairs),
        ):
            assert d == pytest.approx(distances[head, kind, t], rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("exclude", [False, True])
def test_settings_are_clipped_to_the_graph(exclude):
    asked = RetrievalSettings(50, 50, 500, 1000, 40, exclude)
    heads, relations = 8 - exclude, 4 - exclude
    expected = RetrievalSettings(heads, relations, heads * relations, heads, relations, exclude)
    assert asked.clipped(9, 4) == expected
    assert settings().clipped(1000, 1000) == settings()


def test_a_single_pair_is_not_clipped_away():
    asked = RetrievalSettings(1, 1, 1, 1, 1, exclude_original=True).clipped(ENTITIES, 2 * RELATIONS)
    assert asked.pairs == 1
    found = tables("TransE", ENTITIES, RELATIONS)
    check(retrieve(found, TRIPLES, asked), by_brute_force(found, TRIPLES, asked))
    # the smallest graph: three entities, one relation and its reverse
    smallest = RetrievalSettings(exclude_original=True).clipped(3, 2)
    found, triples = tables("TransE", 3, 1), torch.tensor([[0, 0, 1], [1, 1, 0]])
    check(retrieve(found, triples, smallest), by_brute_force(found, triples, smallest))


@pytest.mark.parametrize("name", ["entities", "relations", "pairs", "candidate_entities", "candidate_relations"])
def test_settings_below_one_are_told(name):
    with pytest.raises(ValueError, match=f"^{name} is 0, expected 1 or more"):
        settings(**{name: 0})


def test_more_pairs_than_there_are_is_told():
    with pytest.raises(
        ValueError, match="pairs is 16, but 5 candidate_entities and 3 candidate_relations make only 15"
    ):
        settings(pairs=16)
    with pytest.raises(ValueError, match="a graph of 1 entities has no analogical heads"):
        settings().clipped(1, 4)


def test_the_fingerprint_is_of_all_that_neighbours_depend_on():
    found = tables("HAKE", ENTITIES, RELATIONS)
    first = fingerprint(found, TRIPLES, settings())
    assert first == fingerprint(tables("HAKE", ENTITIES, RELATIONS), TRIPLES.clone(), settings())
    others = [
        fingerprint(tables("HAKE", ENTITIES, RELATIONS, seed=1), TRIPLES, settings()),
        fingerprint(found, TRIPLES.flip(0), settings()),
        fingerprint(found, TRIPLES, settings(pairs=3)),
        fingerprint(found, TRIPLES, settings(exclude_original=True)),
    ]
    for place in ("entities", "relations"):
        changed = tables("HAKE", ENTITIES, RELATIONS)
        getattr(changed, place)[-1, -1] += 1e-6
        others.append(fingerprint(changed, TRIPLES, settings()))
    changed = tables("HAKE", ENTITIES, RELATIONS)
    changed.scoring.phase_weight += 0.1
    others.append(fingerprint(changed, TRIPLES, settings()))
    changed = tables("HAKE", ENTITIES, RELATIONS)
    changed.scoring.margin += 1
    others.append(fingerprint(changed, TRIPLES, settings()))
    assert len({first, *others}) == 1 + len(others)


# ---- the callback


def module(seed=0, name="TransE", **options):
    defaults = {"pairs": 4, "candidate_entities": 5, "candidate_relations": 3}
    found = AnalogicalEmbedding(None, small_graph.scoring(name), ENTITIES, RELATIONS, **(defaults | options))
    found.tables = tables(name, ENTITIES, RELATIONS, seed=seed)
    return found


def look_up(own, folder, triples=None, first=True, **options):
    """What the callback does when a fit starts, on the first node or on the first rank of another one."""
    triples = TRIPLES.numpy() if triples is None else triples
    trainer = SimpleNamespace(
        datamodule=SimpleNamespace(train_triples=triples),
        world_size=1,
        global_rank=0,
        local_rank=0,
        is_global_zero=first,
        default_root_dir=str(folder),
    )
    AnalogyRetriever(progress=False, **options).on_fit_start(trainer, own)
    return own.neighbours


@pytest.fixture
def work(monkeypatch):
    """How many triples were looked up, each time."""
    done, original = [], retriever.retrieve

    def spy(found, triples, *args):
        done.append(len(triples))
        return original(found, triples, *args)

    monkeypatch.setattr(retriever, "retrieve", spy)
    return done


def same(first, second):
    return all(torch.equal(own, other) for own, other in zip(first, second, strict=True))


def test_neighbours_come_in_the_order_of_the_rows(tmp_path):
    own = module(name="RotatE")
    found = look_up(own, tmp_path)
    check(found, by_brute_force(own.tables, TRIPLES, own.settings))


def test_they_are_looked_up_once(tmp_path, work):
    first, second = look_up(module(), tmp_path), look_up(module(), tmp_path)
    assert work == [len(TRIPLES)]
    assert same(first, second)
    assert isinstance(second, Neighbours)
    (file,) = (tmp_path / "analogies").iterdir()
    torch.load(file, weights_only=True)


@pytest.mark.parametrize("change", [{"seed": 1}, {"pairs": 3}, {"exclude_original": True}, {"name": "PairRE"}])
def test_another_base_or_other_settings_have_another_file(tmp_path, work, change):
    look_up(module(), tmp_path)
    own = module(**change)
    found = look_up(own, tmp_path)
    assert len(work) == 2
    check(found, by_brute_force(own.tables, TRIPLES, own.settings))
    assert len(list((tmp_path / "analogies").iterdir())) == 2


def test_other_triples_have_another_file(tmp_path, work):
    look_up(module(), tmp_path)
    own = module()
    check(look_up(own, tmp_path, TRIPLES[3:].numpy()), by_brute_force(own.tables, TRIPLES[3:], own.settings))
    assert work == [10, 7]


@pytest.mark.parametrize(
    "content",
    [b"", b"no file of tensors", "cut", {"entities": torch.zeros(3)}, [1, 2], "rows"],
    ids=["empty", "text", "cut", "fields", "list", "rows"],
)
def test_a_damaged_file_is_made_anew(tmp_path, work, content):
    expected = look_up(module(), tmp_path)
    (file,) = (tmp_path / "analogies").iterdir()
    good = file.read_bytes()
    if content == "cut":
        file.write_bytes(good[: len(good) // 2])
    elif content == "rows":
        torch.save({name: part[:4] for name, part in expected._asdict().items()}, file)
    elif isinstance(content, bytes):
        file.write_bytes(content)
    else:
        torch.save(content, file)
    with pytest.warns(UserWarning, match="cannot be read and is made anew") if content != "rows" else nullcontext():
        assert same(look_up(module(), tmp_path), expected)
    assert len(work) == 2
    assert same(look_up(module(), tmp_path), expected)
    assert len(work) == 2, "the good file was not kept"


def test_no_file_is_kept_where_none_is_wanted(tmp_path, work):
    first, second = (look_up(module(), tmp_path, cache=False) for _ in range(2))
    assert same(first, second)
    assert len(work) == 2
    assert not list(tmp_path.iterdir())


@pytest.fixture
def cut_off(monkeypatch):
    """Blocks of three triples, and a look-up that ends in the third of them; returns how to let it go on."""
    monkeypatch.setattr(analogy_retriever, "SMALLEST", 3)
    calls = []

    def retrieve_two(found, triples, *args):
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(len(triples))
        return retrieve(found, triples, *args)

    def begin(folder, **options):
        calls.clear()
        with monkeypatch.context() as patched:
            patched.setattr(retriever, "retrieve", retrieve_two)
            with pytest.raises(KeyboardInterrupt):
                look_up(module(), folder, **options)

    return begin


@pytest.mark.parametrize("seconds", [0.0, 1e9], ids=["files on the way", "a file at the end"])
def test_a_look_up_that_was_cut_off_goes_on(tmp_path, monkeypatch, work, cut_off, seconds):
    expected = look_up(module(), tmp_path / "other")
    del work[:]
    monkeypatch.setattr(analogy_retriever, "SECONDS_BETWEEN_FILES", seconds)
    cut_off(tmp_path)
    files = sorted(path.name for path in (tmp_path / "analogies").iterdir())
    assert [name.partition("-")[2] for name in files] == (["3-0.part", "3-1.part"] if seconds == 0 else ["3-0.part"])
    found = look_up(module(), tmp_path)
    assert work == [3, 1], "of ten triples the first six were there"
    assert all(map(torch.allclose, found, expected))
    assert [path.suffix for path in (tmp_path / "analogies").iterdir()] == [".pt"]
    work.clear()
    assert same(look_up(module(), tmp_path), found)
    assert not work


def test_a_part_is_written_before_the_next_block_begins(tmp_path, monkeypatch, cut_off):
    """So that it is there even if the process is killed."""
    monkeypatch.setattr(analogy_retriever, "SECONDS_BETWEEN_FILES", 0.0)
    monkeypatch.setattr(analogy_retriever._Parts, "kept_at_the_latest_when_interrupted", lambda self: nullcontext())
    cut_off(tmp_path)
    assert len(list((tmp_path / "analogies").glob("*.part"))) == 2


def test_parts_of_another_base_or_of_no_use_are_left_alone(tmp_path, work, cut_off):
    cut_off(tmp_path)
    (part,) = (tmp_path / "analogies").iterdir()
    own = module(seed=1)
    check(look_up(own, tmp_path), by_brute_force(own.tables, TRIPLES, own.settings))
    assert work == [3, 3, 3, 1]
    assert part.exists()
    part.write_bytes(part.read_bytes()[:100])
    own = module()
    with pytest.warns(UserWarning, match=r"-0\.part cannot be read and is made anew"):
        check(look_up(own, tmp_path), by_brute_force(own.tables, TRIPLES, own.settings))
    assert work == [3, 3, 3, 1] * 2
    assert not part.exists()


@pytest.mark.parametrize(
    ("before", "now", "expected"), [(3, 4, [4, 4, 2]), (4, 6, [6, 4])], ids=["other sizes", "one of the same size"]
)
def test_parts_of_other_blocks_are_not_used(tmp_path, monkeypatch, work, cut_off, before, now, expected):
    monkeypatch.setattr(analogy_retriever, "SMALLEST", before)
    cut_off(tmp_path)
    monkeypatch.setattr(analogy_retriever, "SMALLEST", now)
    own = module()
    check(look_up(own, tmp_path), by_brute_force(own.tables, TRIPLES, own.settings))
    assert work == expected
    assert not list((tmp_path / "analogies").glob("*.part"))


def test_parts_stay_where_the_whole_cannot_be_written(tmp_path, monkeypatch, work, cut_off):
    cut_off(tmp_path)
    (part,) = (tmp_path / "analogies").iterdir()

    def full(path):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    with monkeypatch.context() as patched:
        patched.setattr(analogy_retriever, "atomic_write", full)
        with pytest.warns(UserWarning, match="cannot be kept for other runs"):
            look_up(module(), tmp_path)
    assert list((tmp_path / "analogies").iterdir()) == [part]
    work.clear()
    look_up(module(), tmp_path)
    assert work == [3, 1]


def test_each_node_keeps_the_file_and_no_parts(tmp_path, work, cut_off):
    """On a disk of its own, where the first node's files are not."""
    cut_off(tmp_path)
    found = look_up(module(), tmp_path, first=False)
    assert [path.suffix for path in (tmp_path / "analogies").iterdir()] == [".pt"]
    work.clear()
    assert same(look_up(module(), tmp_path, first=False), found)
    assert not work


def test_without_files_nothing_is_kept_of_a_look_up_that_is_cut_off(tmp_path, cut_off):
    cut_off(tmp_path, cache=False)
    assert not list(tmp_path.iterdir())


def test_where_files_are_kept(tmp_path, work):
    """In the folder that is given; else beside the base's checkpoints, in the folder of its run."""
    look_up(module(), tmp_path / "run", cache=str(tmp_path / "given"))
    own = module()
    own.hparams.base = str(tmp_path / "base" / "checkpoints" / "best.ckpt")
    look_up(own, tmp_path / "run")
    own.hparams.base = str(tmp_path / "models" / "transe.ckpt")
    look_up(own, tmp_path / "run")
    assert {str(path.parent.relative_to(tmp_path)) for path in tmp_path.rglob("*.pt")} == {
        "given",
        "base/analogies",
        "models/analogies",
    }
    with pytest.raises(ValueError, match="cache is a folder"):
        AnalogyRetriever(cache=True)


def test_a_folder_that_cannot_be_written_does_not_end_the_run(tmp_path):
    (tmp_path / "taken").write_text("a file")
    own = module()
    with pytest.warns(UserWarning, match="cannot be kept"):
        found = look_up(own, tmp_path, cache=str(tmp_path / "taken" / "below"))
    check(found, by_brute_force(own.tables, TRIPLES, own.settings))


def test_triples_whose_reverses_are_worked_out_when_asked_for(tmp_path):
    raw = TRIPLES[TRIPLES[:, 1] < RELATIONS]
    whole = torch.cat([raw, raw.flip(1) + torch.tensor([0, RELATIONS, 0])])
    expected = look_up(module(), tmp_path, whole.numpy(), cache=False)
    found = look_up(module(), tmp_path, WithReverses(raw.numpy().astype("int32"), RELATIONS), cache=False)
    assert same(found, expected)


def test_what_is_clipped_is_told(tmp_path):
    own = module(pairs=40, candidate_entities=100, candidate_relations=40)
    with pytest.warns(UserWarning, match="but the graph has only") as warned:
        found = look_up(own, tmp_path)
    assert {str(warning.message) for warning in warned} == {
        "AnKGE: candidate_entities is 100, but the graph has only 8",
        "AnKGE: candidate_relations is 40, but the graph has only 4",
        "AnKGE: pairs is 40, but the graph has only 32",
    }
    assert found.pair_heads.shape == (len(TRIPLES), 8 * 4)
    asked = settings(entities=1, relations=1, pairs=32, candidate_entities=8, candidate_relations=4)
    check(found, by_brute_force(own.tables, TRIPLES, asked))


def test_a_relative_base_keeps_its_files_near(tmp_path, monkeypatch, work):
    monkeypatch.chdir(tmp_path)
    own = module()
    own.hparams.base = "best.ckpt"
    look_up(own, tmp_path / "run")
    assert [path.parent for path in Path().rglob("*.pt")] == [Path("analogies")]
