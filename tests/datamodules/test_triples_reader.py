import gzip
import os
import shutil
from collections import Counter
from itertools import chain
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
from torch_geometric.datasets import FB15k_237

from datamodules.downloads import DownloadError
from datamodules.readers import triples as triples_module
from datamodules.readers.mapped_graph import MappedGraph
from datamodules.readers.pyg_graph import PygGraph
from datamodules.readers.triples import TripleFolder
from datamodules.readers.world_graph import LANGUAGES, RELATIONS, WorldGraph, split_groups

ODD = {
    "train": [
        ("the Netherlands", 'is "next" to', "NA"),
        ("NA", 'is "next" to', "null"),
        ("'s-Hertogenbosch", "née", "Zürich, “Switzerland”"),
        ("null", "née", " leading and trailing "),
        ("1", "#", "1"),
    ],
    "valid": [("Ångström", "née", "NA"), ("#", "zzz", "the Netherlands")],
    "test": [("NA", "#", "Aachen")],
}


def text_of(triples, end="\n"):
    return "".join("\t".join(triple) + end for triple in triples)


def write(folder: Path, parts=ODD, end="\n", begin=b"", packed=(), **files: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for part, triples in parts.items():
        content = begin + (triples if isinstance(triples, str) else text_of(triples, end)).encode()
        if part in packed:
            (folder / f"{part}.txt.gz").write_bytes(gzip.compress(content))
        else:
            (folder / f"{part}.txt").write_bytes(content)
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_bytes(content.encode())
    return folder


def named(graph):
    """The triples of each part by name, under the names of the files."""
    entities, relations = graph.entity_names, graph.relation_names
    return {
        triples_module.PARTS[part]: [(entities[h], relations[r], entities[t]) for h, r, t in triples.tolist()]
        for part, triples in graph.parts.items()
    }


@pytest.mark.parametrize("block", [1 << 26, 40, 7])
@pytest.mark.parametrize(
    "written",
    [
        {},
        {"end": "\r\n"},
        {"begin": b"\xef\xbb\xbf"},
        {"begin": b"\xef\xbb\xbf", "end": "\r\n"},
        {"packed": ("train", "test")},
        {"parts": {part: text_of(its).rstrip("\n") for part, its in ODD.items()}},
        {"parts": {part: text_of(its) + "\n" * 50 for part, its in ODD.items()}},
        {"parts": {part: text_of(its, "\r\n") + "\r\n" * 50 for part, its in ODD.items()}},
    ],
    ids=["LF", "CR LF", "BOM", "BOM, CR LF", "gzip", "no last line end", "empty lines last", "CR LF, empty lines last"],
)
def test_names_are_as_they_stand_in_the_file(tmp_path, monkeypatch, written, block):
    monkeypatch.setattr(triples_module, "BLOCK", block)  # bytes that are looked at together
    graph = TripleFolder(write(tmp_path / "graph", **written)).read()
    assert named(graph) == ODD
    assert all(triples.dtype == np.int64 for triples in graph.parts.values())


def test_without_dictionaries_names_are_sorted_and_those_of_training_come_first(tmp_path):
    graph = TripleFolder(write(tmp_path / "graph")).read()
    trained = {name for h, _, t in ODD["train"] for name in (h, t)}
    assert graph.entity_names == sorted(trained) + sorted({"Ångström", "#", "Aachen"})
    assert graph.relation_names == [*sorted({'is "next" to', "née", "#"}), "zzz"]


def test_dictionaries_number_the_names(tmp_path):
    names = {name for its in ODD.values() for h, _, t in its for name in (h, t)}
    entities, relations = [*sorted(names, reverse=True), "of no triple"], ["zzz", "née", 'is "next" to', "#"]
    lines = [f"{number}\t{name}\n" for number, name in enumerate(entities)]
    folder = write(
        tmp_path / "graph",
        entities__dict="".join(lines[::-1]),
        relations__dict="\r\n".join(f"{number}\t{name}" for number, name in enumerate(relations)),
    )
    graph = TripleFolder(folder).read()
    assert graph.entity_names == entities
    assert graph.relation_names == relations
    assert named(graph) == ODD


NUMBERED = {
    "train2id": "4\n0 1 0\n1 2 0\n2 3 1\n3 0 1\n",
    "valid2id": "1\n0 2 1\n",
    "test2id": "2\n4 0 0\n3 1 1\n",
}
NUMBERED_TRIPLES = {
    "train": [[0, 0, 1], [1, 0, 2], [2, 1, 3], [3, 1, 0]],
    "val": [[0, 1, 2]],
    "test": [[4, 0, 0], [3, 1, 1]],
}


@pytest.mark.parametrize("separator", [" ", "\t"])
def test_numbers_have_the_tail_before_the_relation(tmp_path, separator):
    parts = {name: text.replace(" ", separator) for name, text in NUMBERED.items()}
    graph = TripleFolder(write(tmp_path / "graph", parts)).read()
    assert {part: triples.tolist() for part, triples in graph.parts.items()} == NUMBERED_TRIPLES
    assert (graph.entity_names, graph.relation_names) == (["0", "1", "2", "3", "4"], ["0", "1"])


def test_numbers_with_dictionaries(tmp_path):
    entities = "6\nNA\t3\nthe end\t5\nb\t1\na\t0\nc d\t2\ne\t4\n"
    graph = TripleFolder(
        write(tmp_path / "graph", NUMBERED, entity2id__txt=entities, relation2id__txt="2\nlikes\t1\nknows\t0\n")
    ).read()
    assert graph.entity_names == ["a", "b", "c d", "NA", "e", "the end"]
    assert graph.relation_names == ["knows", "likes"]
    assert {part: triples.tolist() for part, triples in graph.parts.items()} == NUMBERED_TRIPLES


def test_repeated_training_triples_are_left_out_and_counted(tmp_path):
    a, b, c = ("x", "r", "y"), ("y", "r", "x"), ("y", "r", "z")
    graph = TripleFolder(write(tmp_path / "graph", {"train": [b, a, b, c, a, b], "valid": [a, a], "test": [c]})).read()
    assert named(graph) == {"train": [b, a, c], "valid": [a, a], "test": [c]}
    assert graph.duplicates == 3


LINE = "a\tr\tb\n"
FINE = {"train": LINE * 2, "valid": LINE, "test": LINE}


@pytest.mark.parametrize("block", [1 << 26, 5])
@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"train": LINE + "a\tb\n" + LINE}, r"train\.txt, line 2: expected 3 fields .* found 2 fields: 'a\tb'"),
        ({"valid": LINE * 3 + "a\tr\tb\tc\n"}, r"valid\.txt, line 4: .* found 4 fields: 'a\tr\tb\tc'"),
        # three fields a line on average
        ({"train": "a\tb\na\tr\tb\tc\n"}, r"train\.txt, line 1: .* found 2 fields"),
        ({"test": LINE + "\n" + LINE}, r"test\.txt, line 2: .* found 1 fields: ''"),
        ({"test": "\n" + LINE}, r"test\.txt, line 1: .* found 1 fields: ''"),
        ({"test": LINE + "a\t\tb\n"}, r"test\.txt, line 2: .* found an empty field"),
        ({"test": LINE + "\tr\tb\n"}, r"test\.txt, line 2: .* found an empty field"),
        ({"test": LINE + "a\tr\t"}, r"test\.txt, line 2: .* found an empty field"),
        ({"train": "a r b\n"}, r"train\.txt, line 1: .* found 1 fields: 'a r b'"),
        ({"valid": ""}, r"valid\.txt: is empty"),
        ({"valid": "\n\r\n"}, r"valid\.txt: is empty"),
        ({"entities__dict": "0\ta\n2\tb\n"}, r"entities\.dict, line 2: number 2, expected each of 0\.\.1 for 2 names"),
        ({"entities__dict": "1\ta\n2\tb\n"}, r"entities\.dict, line 2: number 2, expected each of 0\.\.1"),
        ({"entities__dict": "0\ta\n1\tb\n1\tc\n"}, r"entities\.dict, line 3: number 1 was there before"),
        ({"entities__dict": "0\ta\n1\tb\n2\ta\n"}, r"entities\.dict, line 3: name 'a' was there before"),
        ({"entities__dict": "a\t0\nb\t1\n"}, r"entities\.dict, line 1: 'a', expected a whole number"),
        ({"entities__dict": "-1\ta\n0\tb\n"}, r"entities\.dict, line 1: '-1', expected a whole number"),
        ({"entities__dict": "0 a\n"}, r"entities\.dict, line 1: expected 2 fields"),
        ({"entities__dict": "0\ta\n1\tc\n"}, r"train\.txt, line 1: tail 'b' is not in .*entities\.dict"),
        ({"entities__dict": "0\ta\n1\tb\n", "test": LINE + "c\tr\tb\n"}, r"test\.txt, line 2: head 'c' is not in"),
        ({"relations__dict": "0\tr\n", "valid": LINE + "a\ts\tb\n"},
         r"valid\.txt, line 2: relation 's' is not in .*relations\.dict"),
    ],
)  # fmt: skip
def test_files_that_are_not_as_they_should_be(tmp_path, monkeypatch, files, message, block):
    monkeypatch.setattr(triples_module, "BLOCK", block)
    parts = FINE | {name: text for name, text in files.items() if "__" not in name}
    folder = write(tmp_path / "graph", parts, **{name: text for name, text in files.items() if "__" in name})
    with pytest.raises(ValueError, match=message):
        TripleFolder(folder).read()


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"train2id": "5\n0 1 0\n"}, r"train2id\.txt: the first line says 5 lines follow, but there are 1"),
        ({"train2id": "0 1 0\n"}, r"train2id\.txt, line 1: '0 1 0' is no count"),
        ({"test2id": "2\n0 1 0\n0 x 0\n"}, r"test2id\.txt, line 3: 'x', expected a whole number"),
        ({"valid2id": "1\n0 1\n"}, r"valid2id\.txt, line 2: expected 3 fields"),
        ({"entity2id__txt": "3\na\t0\nb\t1\nc\t2\n"},
         r"train2id\.txt, line 4: 3 is not in entity2id\.txt, which has 0\.\.2"),
        ({"relation2id__txt": "1\nr\t0\n"}, r"train2id\.txt, line 4: 1 is not in relation2id\.txt"),
    ],
)  # fmt: skip
def test_numbers_that_are_not_as_they_should_be(tmp_path, files, message):
    parts = NUMBERED | {name: text for name, text in files.items() if "__" not in name}
    folder = write(tmp_path / "graph", parts, **{name: text for name, text in files.items() if "__" in name})
    with pytest.raises(ValueError, match=message):
        TripleFolder(folder).read()


def test_text_that_is_not_utf8_and_archives_that_are_cut_off(tmp_path):
    folder = write(tmp_path / "graph", FINE)
    (folder / "valid.txt").write_bytes(LINE.encode() + b"caf\xe9\tr\tb\n")
    with pytest.raises(ValueError, match=r"valid\.txt, line 2: is no UTF-8 text"):
        TripleFolder(folder).read()
    (folder / "valid.txt").unlink()
    packed = gzip.compress((LINE * 1000).encode())
    for content in (packed[: len(packed) // 2], b"no archive"):
        (folder / "valid.txt.gz").write_bytes(content)
        with pytest.raises(ValueError, match=r"valid\.txt\.gz: is no complete gzip file"):
            TripleFolder(folder).read()


def test_missing_files_and_folders(tmp_path):
    folder = write(tmp_path / "graph", FINE)
    (folder / "valid.txt").unlink()
    with pytest.raises(FileNotFoundError, match=rf"{folder}: no valid\.txt or valid\.txt\.gz; .*train2id\.txt"):
        TripleFolder(folder)
    with pytest.raises(FileNotFoundError, match=r"--data\.root '.*nowhere' is no folder"):
        TripleFolder(tmp_path / "nowhere")


# Triples on disk


def same(graph, other):
    assert (graph.entity_names, graph.relation_names) == (other.entity_names, other.relation_names)
    assert graph.duplicates == other.duplicates
    for part, triples in graph.parts.items():
        assert np.array_equal(triples, other.parts[part])


@pytest.mark.parametrize("elsewhere", [False, True])
def test_mapped_triples_equal_those_in_memory(tmp_path, elsewhere):
    parts = ODD | {"train": [*ODD["train"], ODD["train"][0]]}
    folder = write(tmp_path / "graph", parts)
    cache = str(tmp_path / "cache" / "folder") if elsewhere else None
    graph = MappedGraph(TripleFolder(folder), cache).read()
    same(graph, TripleFolder(folder).read())
    assert graph.duplicates == 1
    assert isinstance(graph.parts["train"], np.memmap)
    assert not isinstance(graph.parts["val"], np.memmap)
    (made,) = Path(cache or folder).glob("triples-*")
    assert not made.name.endswith(".part")


def test_mapped_triples_are_parsed_once_and_again_after_a_change(tmp_path, monkeypatch):
    folder = write(tmp_path / "graph")
    first = MappedGraph(TripleFolder(folder)).read()
    calls, read = [], TripleFolder.read
    monkeypatch.setattr(TripleFolder, "read", lambda self: calls.append(self) or read(self))
    same(MappedGraph(TripleFolder(folder)).read(), first)
    assert not calls
    write(folder, ODD | {"test": [("NA", "#", "Berlin")]})  # as many bytes as before
    os.utime(folder / "test.txt", ns=(10**18, 10**18))
    changed = MappedGraph(TripleFolder(folder)).read()
    assert len(calls) == 1
    assert named(changed)["test"] == [("NA", "#", "Berlin")]


def test_mapped_triples_of_two_folders_share_a_cache(tmp_path):
    graphs = []
    for name, relation in (("one", "r"), ("two", "s")):
        folder = write(tmp_path / name, {part: text.replace("r", relation) for part, text in FINE.items()})
        for part in FINE:
            os.utime(folder / f"{part}.txt", ns=(10**18, 10**18))
        graphs.append(MappedGraph(TripleFolder(folder), str(tmp_path / "cache")).read())
    assert [graph.relation_names for graph in graphs] == [["r"], ["s"]]


def test_a_process_that_was_slower_takes_the_triples_of_the_faster_one(tmp_path, monkeypatch):
    folder = write(tmp_path / "graph")
    read = TripleFolder.read

    def read_while_another_finishes(self):
        monkeypatch.setattr(TripleFolder, "read", read)
        MappedGraph(TripleFolder(folder)).prepare()
        return read(self)

    monkeypatch.setattr(TripleFolder, "read", read_while_another_finishes)
    same(MappedGraph(TripleFolder(folder)).read(), TripleFolder(folder).read())
    assert len(list(folder.glob("triples-*"))) == 1


def test_triples_that_cannot_be_written(tmp_path):
    folder = write(tmp_path / "graph")
    with pytest.raises(PermissionError, match=r"cannot be written .*; set --data\.cache to a folder"):
        MappedGraph(TripleFolder(folder), str(folder / "train.txt" / "below a file")).read()


# The folders of PyTorch Geometric


@pytest.mark.parametrize("root", ["", "raw"])
def test_the_raw_folder_of_pytorch_geometric(tmp_path, root):
    write(tmp_path / "FB" / "raw")
    reader = PygGraph(str(tmp_path / "FB" / root), "FB15k-237")
    assert named(reader.read()) == ODD
    assert sorted(path.name for path in (tmp_path / "FB").rglob("*")) == ["raw", "test.txt", "train.txt", "valid.txt"]


def test_missing_files_are_downloaded_by_pytorch_geometric(tmp_path, monkeypatch):
    folder = tmp_path / "FB"
    write(folder / "raw", {"train": ODD["train"]})
    monkeypatch.setattr(FB15k_237, "download", lambda self: write(Path(self.raw_dir)))
    (folder / "download.part" / "raw").mkdir(parents=True)  # of an attempt that was cut off
    (folder / "download.part" / "raw" / "test.txt").write_text("half a li")
    reader = PygGraph(str(folder), "FB15k-237")
    reader.prepare()
    assert named(reader.read()) == ODD
    assert not (folder / "download.part").exists()


@pytest.mark.parametrize("root", ["", "raw"])
def test_packed_files_are_not_downloaded_again(tmp_path, monkeypatch, root):
    monkeypatch.setattr(FB15k_237, "download", lambda self: pytest.fail("downloaded"))
    write(tmp_path / "FB" / root, packed=("train", "valid", "test"))
    assert named(PygGraph(str(tmp_path / "FB"), "FB15k-237").read()) == ODD
    assert {path.suffix for path in (tmp_path / "FB").rglob("*.*")} == {".gz"}


def test_a_download_that_fails_says_what_to_do(tmp_path, monkeypatch):
    def refuse(self):
        write(Path(self.raw_dir), {"train": "half a li"})
        raise URLError("no route")

    monkeypatch.setattr(FB15k_237, "download", refuse)
    with pytest.raises(
        DownloadError, match=r"could not fetch FB15k-237 .*no route.*train\.txt.*put them into .*raw.*tsv"
    ):
        PygGraph(str(tmp_path), "FB15k-237").read()
    assert not (tmp_path / "raw").exists()
    assert not (tmp_path / "download.part").exists()


def test_a_data_set_that_pytorch_geometric_does_not_have(tmp_path):
    with pytest.raises(ValueError, match="name 'FB15k' is unknown; expected one of FB15k-237, WN18RR"):
        PygGraph(str(tmp_path), "FB15k")


# The world


@pytest.fixture(scope="module")
def world():
    return WorldGraph(cities=500).read()


def everything(graph):
    return [triple for triples in named(graph).values() for triple in triples]


def test_the_world_can_be_read(world):
    triples = set(everything(world))
    assert world.relation_names == list(RELATIONS)
    assert {
        ("Belgium", "capital", "Brussels, Belgium"),
        ("Belgium", "continent", "Europe"),
        ("Belgium", "currency", "Euro (EUR)"),
        ("Belgium", "language", "Dutch language"),
        ("Belgium", "neighbour", "France"),
        ("France", "neighbour", "Belgium"),
        ("Tokyo, Japan", "country", "Japan"),
        ("Tokyo, Japan", "time_zone", "Asia/Tokyo"),
        # the tables spell these capitals in another way than the cities
        ("Brazil", "capital", "Brasília, Brazil"),
        ("Kazakhstan", "capital", "Astana, Kazakhstan"),
    } <= triples
    assert len(triples) == len(everything(world))
    assert len(world.entity_names) == len(set(world.entity_names))
    assert all(name == name.strip() and "\t" not in name for name in world.entity_names)


def test_each_relation_of_the_world_leads_to_its_own_kind_of_entity(world):
    tails = {relation: {t for _, r, t in everything(world) if r == relation} for relation in RELATIONS}
    countries = {h for h, r, _ in everything(world) if r == "continent"}
    assert tails["country"] | tails["neighbour"] <= countries
    kinds = [
        countries,
        *(tails[relation] for relation in ("capital", "continent", "currency", "language", "time_zone")),
    ]
    assert sum(map(len, kinds)) == len(set().union(*kinds))
    assert len(tails["continent"]) in (6, 7)
    speakers = Counter(t for _, r, t in everything(world) if r == "language")
    assert min(speakers.values()) > 1
    assert set(speakers) <= {f"{language} language" for language in LANGUAGES.values()}


def test_training_has_every_entity_and_relation_and_neighbours_stay_together(world):
    train = world.parts["train"]
    for part in ("val", "test"):
        held_out = world.parts[part]
        assert np.isin(held_out[:, [0, 2]], train[:, [0, 2]]).all()
        assert np.isin(held_out[:, 1], train[:, 1]).all()
        share = len(held_out) / sum(len(triples) for triples in world.parts.values())
        assert share == pytest.approx(0.1, abs=0.005)
    for part, triples in named(world).items():
        neighbours = {(h, t) for h, r, t in triples if r == "neighbour"}
        assert neighbours == {(t, h) for h, t in neighbours}, part
        assert neighbours


def test_the_number_of_cities_and_the_seed(world):
    countries = [t for _, r, t in everything(world) if r == "country"]
    few = [t for _, r, t in everything(WorldGraph(cities=0).read()) if r == "country"]
    assert len(few) < len(countries) < len(few) + 500
    capitals = [t for _, r, t in everything(world) if r == "capital"]
    assert len(few) == len(capitals) > 200
    again, other = WorldGraph(cities=500).read(), WorldGraph(cities=500, seed=1).read()
    same(again, world)
    assert other.entity_names == world.entity_names
    assert sorted(everything(other)) == sorted(everything(world))
    assert named(other)["test"] != named(world)["test"]


def test_groups_are_split_as_a_whole_and_what_is_rare_stays_in_training():
    random = np.random.default_rng(0)
    groups = [[(a, 0, b), (b, 0, a)] for a, b in random.integers(0, 12, (60, 2)).tolist() if a != b]
    groups += [[(12, 1, 0)], [(1, 2, 13)]]  # the only ones of entities 12 and 13 and of relations 1 and 2
    for seed in range(10):
        parts = split_groups(groups, 0.1, seed)
        found = {part: [tuple(row) for row in triples.tolist()] for part, triples in parts.items()}
        assert sorted(chain(*found.values())) == sorted(chain(*groups))
        assert {(12, 1, 0), (1, 2, 13)} <= set(found["train"])
        total = sum(map(len, groups))
        assert [len(found[part]) for part in ("val", "test")] == pytest.approx([0.1 * total] * 2, abs=2)
        for part, triples in found.items():
            counts, others = Counter(triples), Counter((t, r, h) for h, r, t in triples)
            assert all(counts[triple] == others[triple] for triple in triples if triple[1] == 0), part


def test_a_chain_keeps_all_it_needs():
    parts = split_groups([[(0, 0, 1)], [(1, 0, 2)], [(2, 0, 3)]], 0.33, seed=0)
    assert [len(parts[part]) for part in ("train", "val", "test")] == [2, 1, 0]


@pytest.mark.realdata
def test_line_ends_of_a_real_file(shared_data, tmp_path):
    source = shared_data / "kg" / "umls"
    for path in source.glob("*.txt"):
        (tmp_path / path.name).write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    same(TripleFolder(tmp_path).read(), TripleFolder(source).read())
    shutil.rmtree(tmp_path)
