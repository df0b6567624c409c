"""What a person may get wrong with AnKGE on the command line: one message that names it, and exit code 1.

Also what is odd but allowed: it is told, and the run goes on.
"""

import contextlib
import warnings
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from lightning_apps.ankge import APP
from lightning_apps.config_files import SHIPPED
from tests.lightning_apps.commands import last
from tests.lightning_apps.complaints import command, complainer
from tests.modules.small_graph import ENTITIES, RELATIONS, triples, write_graph

QUIET = [
    *("--trainer.accelerator", "cpu", "--trainer.logger", "csv"),
    *("--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false"),
    *("--trainer.check_val_every_n_epoch", "1", "--trainer.max_epochs", "1"),
    *("--callbacks.ranks", "null", "--callbacks.learning_rate", "null"),
]
GRAPH = ["--data.layout", "tsv", "--data.root"]
SMALL = ["--model.scoring.dimension", "4", "--data.batch_size", "32", "--data.num_negatives", "8", *QUIET]
BASE = ["--config", "ankge/transe_world.yaml", *SMALL]
ANALOGIES = ["--data.batch_size", "32", *QUIET]
CHECKPOINT = "runs/ankge/base/checkpoints/last.ckpt"
FINISHED = "runs/ankge/ankge/checkpoints/last.ckpt"


def text_of(part: list[tuple[int, int, int]]) -> str:
    return "".join(f"e{h:02}\tr{r}\te{t:02}\n" for h, r, t in part)


def changed(folder: Path, **contents: str | None) -> Path:
    """The graph in another folder with other contents of files, by name without `.txt` or with `_dict` for `.dict`."""
    write_graph(folder)
    for name, content in contents.items():
        file = folder / (f"{name.removesuffix('_dict')}.dict" if name.endswith("_dict") else f"{name}.txt")
        if content is None:
            file.unlink()
        else:
            file.write_text(content)
    return folder


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """A working folder with a graph, a base model of it, and AnKGE on that."""
    folder = tmp_path_factory.mktemp("work")
    write_graph(folder / "graph")
    with contextlib.chdir(folder):
        assert command(APP, "fit", *BASE, *GRAPH, "graph", "--run.name", "base") == 0
        assert command(APP, "fit", *ANALOGIES, *GRAPH, "graph", "--model.base", CHECKPOINT) == 0
    return folder


@pytest.fixture
def complains(work, monkeypatch, capsys) -> Callable[..., str]:
    """Run a command that must fail as a person should see it, and return its message."""
    monkeypatch.chdir(work)
    monkeypatch.delenv("LIGHTNING_APPS_DEBUG", raising=False)
    return complainer(APP, work / "runs", capsys)


TRAIN, VALID, TEST = (triples()[part] for part in ("train", "valid", "test"))
FULL = [(0, 0, tail) for tail in range(ENTITIES)]
FILES = {
    "no test": ({"test": None}, "no test.txt or test.txt.gz; a graph has train.txt, valid.txt, test.txt with head"),
    "two fields": (
        {"valid": "e00\tr0\te01\ne00\tr1\n"},
        "valid.txt, line 2: expected 3 fields separated by tabs, found 2 fields: 'e00\tr1'",
    ),
    "four fields": (
        {"train": text_of(TRAIN[:4]) + "e00\tr0\te01\te02\n"},
        "train.txt, line 5: expected 3 fields separated by tabs, found 4 fields: 'e00\tr0\te01\te02'",
    ),
    "spaces": ({"test": "e00 r0 e01\n"}, "test.txt, line 1: expected 3 fields separated by tabs, found 1 fields"),
    "an empty part": ({"valid": ""}, "valid.txt: is empty"),
    "a name without number": (
        {"valid": "e00\tr0\te01\nNowhere\tr0\te01\n"},
        "valid.txt, line 2: head 'Nowhere' is not in ",
    ),
    "a relation without number": ({"test": "e00\tr9\te01\n"}, "test.txt, line 1: relation 'r9' is not in "),
    "a number twice": (
        {"relations_dict": "0\tr0\n1\tr1\n1\tr2\n"},
        "relations.dict, line 3: number 1 was there before",
    ),
    "a name twice": ({"relations_dict": "0\tr0\n1\tr1\n2\tr1\n"}, "relations.dict, line 3: name 'r1' was there before"),
    "a gap": ({"relations_dict": "0\tr0\n1\tr1\n5\tr2\n"}, "relations.dict, line 3: number 5, expected each of 0..2"),
    "no negative": (
        {"train": text_of(TRAIN + [one for one in FULL if one not in TRAIN])},
        "every one of the 28 entities is a tail of ('e00', 'r0') in training, so there is no negative for it",
    ),
}


@pytest.mark.parametrize(("contents", "expected"), FILES.values(), ids=FILES)
def test_a_file_that_is_not_as_it_should_be(complains, tmp_path, contents, expected):
    folder = changed(tmp_path / "broken", **contents)
    message = complains("fit", *BASE, *GRAPH, str(folder), "--run.name", tmp_path.name)
    assert expected in message
    assert str(folder) in message or "no negative" in message


OPTIONS = {
    "no folder": (["--data.root", "nowhere"], "--data.root 'nowhere' is no folder"),
    "no negatives": (["--data.num_negatives", "0"], "num_negatives is 0, expected 1 or more"),
    "no negatives as for AnKGE": (
        ["--data.objective", "analogies"],
        "the training batches have no negatives to learn from; set --data.objective links",
    ),
    "no dimension": (["--model.scoring.dimension", "0"], "dimension is 0, expected 1 or more"),
    "weights of 16 bits": (
        ["--trainer.precision", "bf16-true"],
        "precision bf16-true: embeddings of 16 bits give many candidates the same score; set trainer.precision to ",
    ),
    "a margin below 0": (["--model.scoring.margin", "-1"], "margin is -1.0, expected 0 or more"),
    "a rate of 0": (["--model.lr", "0"], "lr is 0.0, expected above 0"),
    "no answers": (["--model.top_k", "0"], "top_k is 0, expected 1 or more"),
    "a loss that is no number": (
        ["--model.scoring.margin", "1e38"],
        "training stopped before the weights were updated",
    ),
    "another policy": (["--data.unseen", "ignore"], "unseen: expected"),
    "another rule for ties": (["--model.ties", "random"], "ties"),
}


@pytest.mark.parametrize(("options", "expected"), OPTIONS.values(), ids=OPTIONS)
def test_a_base_model_with_a_wrong_value(complains, options, expected):
    assert expected in complains("fit", *BASE, *GRAPH, "graph", *options, "--run.name", "wrong")


SCORING = ["--model.scoring"]
ANALOGY_OPTIONS = {
    "too many pairs": (
        ["--model.pairs", "7", "--model.candidate_entities", "2", "--model.candidate_relations", "3"],
        "pairs is 7, but 2 candidate_entities and 3 candidate_relations make only 6",
    ),
    "no counts": (
        ["--data.query_counts", "false"],
        "--data.query_counts false: AnKGE weighs its scores by these counts; set --data.query_counts true",
    ),
    "two weights": (
        ["--model.level_grid", "null", "--model.level_weights", "[0.1, 0.2]"],
        "level_weights has 2 entries, expected 3: entity, relation, triple",
    ),
    "weights beside a grid": (
        ["--model.level_weights", "[0.1, 0.2, 0.3]"],
        "level_weights is [0.1, 0.2, 0.3], but with level_grid the weights are chosen on validation; set --model.level",
    ),
    "a grid for two levels": (
        ["--model.level_grid", "[[0.1], [0.2]]"],
        "level_grid has 2 entries, expected 3: entity, relation, triple",
    ),
    "no analogical entity": (["--model.entities", "0"], "entities is 0, expected 1 or more"),
    "no levels": (["--model.levels", "[]"], "levels is [], expected some of entity, relation, triple"),
    "another likeness": (["--model.similarity", "dot"], "similarity: expected"),
    "a strength below 0": (["--model.strength", "-1"], "strength is -1.0, expected 0 or more"),
    "a loss that is no number": (["--model.strength", "1e39"], "training stopped before the weights were updated"),
    "the base by accident": (["--model.base", "null"], "--model.base: is not set; give the configuration of a base"),
    "a base that is not there": (["--model.base", "no.ckpt"], "base no.ckpt: no such file"),
    "a configuration that is not there": (["--model.base", "no.yaml"], "--model.base no.yaml: no such file in "),
    "AnKGE as its own base": (["--model.base", "ankge.yaml"], "--model.base: names a configuration of AnKGE itself"),
    "a base that is no checkpoint": (["--model.base", "graph/train.txt"], "graph/train.txt: is no checkpoint"),
    "AnKGE on AnKGE": (
        ["--model.base", "runs/ankge/ankge"],
        f"best.ckpt: is a checkpoint of AnKGE itself; give that of a base model, such as its own, {CHECKPOINT}",
    ),
    "a folder without a run": (["--model.base", "graph"], "base graph/checkpoints/best.ckpt: no such file"),
    "a dry run without a base": (
        ["--model.base", "ankge/transe_world.yaml", "--trainer.fast_dev_run", "true"],
        "--trainer.fast_dev_run leaves no base model; set --model.base to a checkpoint of one",
    ),
    "a base without validation": (
        ["--model.base", "ankge/transe_world.yaml", "--trainer.limit_val_batches", "0"],
        "--trainer.limit_val_batches 0: the best checkpoint of the base model is chosen by validation",
    ),
    "negatives of the base": (
        ["--model.base", "ankge/transe_world.yaml", "--data.num_negatives", "8"],
        "--data.num_negatives 8: is for the base model, which is trained as ankge/transe_world.yaml says; put it into",
    ),
    "weights of the base": (
        ["--model.base", "ankge/transe_world.yaml", "--data.use_weight", "true"],
        "--data.use_weight True: is for the base model",
    ),
    "another dimension": (
        [*SCORING, "modules.knowledge_graph.TransE", "--model.scoring.margin", "9", "--model.scoring.dimension", "5"],
        "'dimension': 4, 'margin': 9.0, 'epsilon': 2.0}}, but --model.scoring is {'class_path': 'modules.knowl",
    ),
    "another margin": (
        [*SCORING, "modules.knowledge_graph.TransE", "--model.scoring.margin", "6", "--model.scoring.dimension", "4"],
        f"base {CHECKPOINT}: was trained with {{'class_path': 'modules.knowledge_graph.scoring.TransE', 'init_args': ",
    ),
    "another score function": (
        [*SCORING, "modules.knowledge_graph.RotatE", "--model.scoring.margin", "9", "--model.scoring.dimension", "4"],
        "but --model.scoring is {'class_path': 'modules.knowledge_graph.RotatE'",
    ),
}


@pytest.mark.parametrize(("options", "expected"), ANALOGY_OPTIONS.values(), ids=ANALOGY_OPTIONS)
def test_analogies_with_a_wrong_value(complains, tmp_path, options, expected):
    given = ["--model.base", CHECKPOINT, *options] if "--model.base" not in options else options
    message = complains("fit", *ANALOGIES, *GRAPH, "graph", *given, "--run.name", tmp_path.name)
    assert expected in message
    begun = "training stopped" in expected
    assert Path("runs/ankge", tmp_path.name).exists() == begun, "what could not begin leaves nothing behind"


def test_the_base_of_another_app(complains, work):
    content = torch.load(work / CHECKPOINT, weights_only=True)
    other = work / "classifier.ckpt"
    torch.save({"state_dict": {"network.weight": torch.zeros(1)}, "hyper_parameters": {"lr": 1.0}}, other)
    message = complains("fit", *ANALOGIES, *GRAPH, "graph", "--model.base", "classifier.ckpt")
    assert message.startswith("base classifier.ckpt: holds no embeddings of a knowledge graph")
    assert "tables.entities" in content["state_dict"]


@pytest.fixture
def renamed(tmp_path) -> Path:
    """The graph with two names exchanged: as large, but not the same."""
    names = [f"e{row:02}" for row in range(ENTITIES)]
    names[0], names[1] = names[1], names[0]
    return changed(tmp_path / "renamed", entities_dict="".join(f"{row}\t{name}\n" for row, name in enumerate(names)))


@pytest.fixture
def larger(tmp_path) -> Path:
    """The graph with one more entity."""
    more = "".join(f"{row}\te{row:02}\n" for row in range(ENTITIES + 1))
    return changed(tmp_path / "larger", entities_dict=more)


@pytest.fixture
def resplit(tmp_path) -> Path:
    """The same triples, of which one of training and one of the test are exchanged."""
    parts = triples()
    train, test = parts["train"], parts["test"]
    parts = {"train": [test[0], *train[1:]], "test": [train[0], *test[1:]]}
    lines = {part: "".join(f"e{h:02}\tr{r}\te{t:02}\n" for h, r, t in own) for part, own in parts.items()}
    return changed(tmp_path / "resplit", **lines)


def test_the_base_of_another_split(complains, resplit):
    message = complains("fit", *ANALOGIES, *GRAPH, str(resplit), "--model.base", CHECKPOINT, "--run.name", "resplit")
    assert message.startswith(
        f"base {CHECKPOINT}: was trained on other training triples, among which there may be some"
    )
    assert not Path("runs/ankge/resplit").exists()


@pytest.mark.parametrize("checkpoint", [CHECKPOINT, FINISHED], ids=["base", "analogies"])
def test_a_checkpoint_of_another_split(complains, resplit, checkpoint):
    message = complains("test", "--ckpt_path", checkpoint, *GRAPH, str(resplit), *QUIET)
    assert message.startswith(f"--ckpt_path {checkpoint}: was trained on other data (train_hash: ")
    assert "or have seen what is held out here; give the data that it was trained on" in message


def test_the_base_of_another_graph(complains, renamed, larger):
    given = ["--model.base", CHECKPOINT, "--run.name", "of_another_graph"]
    message = complains("fit", *ANALOGIES, *GRAPH, str(renamed), *given)
    assert message.startswith(f"base {CHECKPOINT}: was trained on a graph whose entities or relations have other names")
    message = complains("fit", *ANALOGIES, *GRAPH, str(larger), *given)
    assert f"base {CHECKPOINT}: num_entities is {ENTITIES}, but the data has {ENTITIES + 1}" in message
    assert not Path("runs/ankge/of_another_graph").exists(), "what could not begin leaves nothing behind"


@pytest.mark.parametrize("subcommand", ["validate", "test", "predict", "export", "fit"])
@pytest.mark.parametrize("checkpoint", [CHECKPOINT, FINISHED], ids=["base", "analogies"])
def test_a_checkpoint_of_another_graph(complains, renamed, subcommand, checkpoint):
    quiet = [] if subcommand == "fit" else ["--trainer.logger", "csv", "--trainer.accelerator", "cpu"]
    message = complains(subcommand, "--ckpt_path", checkpoint, *GRAPH, str(renamed), *quiet)
    assert message.startswith(f"--ckpt_path {checkpoint}: was trained on other data (graph_hash: ")
    assert "give the data that it was trained on" in message


def test_a_checkpoint_of_a_smaller_graph(complains, larger):
    message = complains("test", "--ckpt_path", CHECKPOINT, *GRAPH, str(larger), *QUIET)
    assert f"num_entities: {ENTITIES} in the checkpoint, {ENTITIES + 1} in the data" in message


QUERIES = {
    "an unknown entity": (
        "e00,r0,\ne0Z,r0,\n",
        "line 3: head 'e0Z' is not in the graph; the nearest names are 'e",
    ),
    "an unknown relation": ("e00,R0,\n", "relation 'R0' is not in the graph; the nearest names are 'r0'"),
    "both ends": ("e00,r0,e01\n", "exactly one of the two has to be empty"),
    "no end": (",r0,\n", "exactly one of the two has to be empty"),
    "a comma in a name": ("Paris, France,r0,\n", "line 2: 4 fields, more than the 3 of the header; put names with com"),
    "no line": ("", "queries.csv: has a header but no row"),
}


@pytest.mark.parametrize(("lines", "expected"), QUERIES.values(), ids=QUERIES)
def test_a_query_that_cannot_be(complains, tmp_path, lines, expected):
    path = tmp_path / "queries.csv"
    path.write_text(f"head,relation,tail\n{lines}")
    options = ["--data.predict_path", str(path), "--trainer.logger", "csv", "--trainer.accelerator", "cpu"]
    message = complains("predict", "--ckpt_path", FINISHED, *options)
    assert str(path) in message
    assert expected in message


def test_queries_that_are_not_there_or_have_other_columns(complains, tmp_path):
    options = ["--trainer.logger", "csv", "--trainer.accelerator", "cpu", "--data.predict_path"]
    message = complains("predict", "--ckpt_path", FINISHED, *options, "no.csv")
    assert message.startswith(
        "--data.predict_path 'no.csv' does not exist; set it to a CSV file with columns head, rela"
    )
    (tmp_path / "odd.csv").write_text("subject,relation,tail\ne00,r0,\n")
    assert "column(s) head missing" in complains(
        "predict", "--ckpt_path", FINISHED, *options, str(tmp_path / "odd.csv")
    )


def test_formats_of_networks(complains):
    message = complains(
        "export", "--ckpt_path", FINISHED, "--formats", "[npz,onnx,int8]", "--trainer.accelerator", "cpu"
    )
    assert message.startswith("--formats onnx, int8: AnalogicalEmbedding is no network but tables of embeddings")
    assert "written as npz, parquet, safetensors" in message


def test_resuming_the_base_as_analogies(complains):
    message = complains("fit", "--config", "ankge.yaml", "--ckpt_path", CHECKPOINT)
    assert "holds a modules.knowledge_graph.KnowledgeGraphEmbedding, but" in message


# ---- what is odd, but allowed


@pytest.fixture
def works(work, monkeypatch, tmp_path) -> Callable[..., Path]:
    """Run a command that must succeed; returns the folder of its run."""
    monkeypatch.chdir(work)

    def run(*arguments: str, name: str = "odd") -> Path:
        assert command(APP, *arguments, "--run.root", str(tmp_path / "runs"), "--run.name", name) == 0
        return tmp_path / "runs/ankge" / name

    return run


def unseen_graph(folder: Path) -> Path:
    """Three of the test triples, and one of validation, have an entity that training lacks."""
    path = changed(
        folder,
        valid=text_of(VALID) + "New\tr0\te01\n",
        test=text_of(TEST) + "e00\tr0\tNew\ne01\tr0\tNew\nNew\tr1\te02\n",
    )
    for name in ("entities.dict", "relations.dict"):
        (path / name).unlink()
    return path


def test_triples_with_what_training_lacks_as_an_error(complains, tmp_path):
    message = complains("fit", *BASE, *GRAPH, str(unseen_graph(tmp_path / "unseen")), "--data.unseen", "error")
    expected = (
        f"1 of {len(VALID) + 1} validation triples have an entity or relation that no training triple has: (New, r0,"
    )
    assert message.startswith(expected)
    assert "set --data.unseen to keep or drop" in message


@pytest.mark.parametrize(("policy", "kept"), [("keep", 1), ("drop", 0)])
def test_triples_with_what_training_lacks_are_told_and_kept_or_dropped(works, tmp_path, policy, kept):
    graph = unseen_graph(tmp_path / "unseen")
    with pytest.warns(
        UserWarning, match=f"3 of {len(TEST) + 3} test triples have an entity or relation that no .*{policy}"
    ):
        folder = works("fit", *BASE, *GRAPH, str(graph), "--data.unseen", policy)
    assert last(folder / "metrics.csv", "val/count") == 2 * (len(VALID) + kept)
    works("test", "--ckpt_path", str(folder / "checkpoints/last.ckpt"), *QUIET)
    assert last(folder / "test/metrics.csv", "test/count") == 2 * (len(TEST) + 3 * kept)


def test_training_triples_twice_and_test_triples_in_training(works, tmp_path):
    graph = changed(tmp_path / "leaky", train=text_of([*TRAIN, *TRAIN[:5], *TEST[:2]]))
    with warnings.catch_warnings(record=True) as warned:
        works("fit", *BASE, *GRAPH, str(graph))
    told = [str(warning.message) for warning in warned]
    assert any(text.startswith("5 training triples repeat an earlier one and are left out") for text in told)
    assert any(text.startswith(f"2 of {len(TEST)} test triples are training triples too") for text in told)


def test_a_relation_with_one_triple_is_trained_and_evaluated(works, tmp_path):
    names = "".join(f"{row}\tr{row}\n" for row in range(RELATIONS + 2))
    lines = "e00\tr5\te07\n", "e03\tr6\te09\n"  # one in training alone, one in validation alone
    graph = changed(
        tmp_path / "rare",
        relations_dict=names,
        train=text_of(TRAIN) + lines[0],
        valid=text_of(VALID) + lines[1],
        test=text_of(TEST),
    )
    base = works("fit", *BASE, *GRAPH, str(graph), name="base")
    given = ["--model.base", str(base / "checkpoints/last.ckpt")]
    analogies = works("fit", *ANALOGIES, *GRAPH, str(graph), *given, name="analogies")
    for folder in (base, analogies):
        works("test", "--ckpt_path", str(folder / "checkpoints/last.ckpt"), *QUIET, name=folder.name)
        for stage, file in (("val", folder / "metrics.csv"), ("test", folder / "test/metrics.csv")):
            for name in ("mrr", "hits@10", "mean_rank", "head/mrr", "tail/mrr", "unlinked/mrr"):
                assert np.isfinite(last(file, f"{stage}/{name}")), (folder.name, stage, name)
        content = torch.load(folder / "checkpoints/last.ckpt", weights_only=True)
        assert all(value.isfinite().all() for value in content["state_dict"].values() if value.is_floating_point())
    assert (analogies / "checkpoints/best.ckpt").exists()


def test_more_candidates_than_there_are_become_fewer(works):
    given = ["--model.base", CHECKPOINT, "--model.candidate_entities", "1000", "--model.candidate_relations", "40"]
    with warnings.catch_warnings(record=True) as warned:
        works("fit", *ANALOGIES, *GRAPH, "graph", *given)
    told = [str(warning.message) for warning in warned]
    assert f"AnKGE: candidate_entities is 1000, but the graph has only {ENTITIES - 1}" in told
    assert f"AnKGE: candidate_relations is 40, but the graph has only {2 * RELATIONS}" in told


@pytest.fixture
def own_algorithms() -> Iterator[None]:
    """What `--trainer.deterministic` says of this process must not reach the next test."""
    before = torch.get_deterministic_debug_mode()
    yield
    torch.set_deterministic_debug_mode(before)


@pytest.mark.usefixtures("own_algorithms")
def test_a_base_configuration_of_ones_own_has_its_negatives_and_the_machine_of_the_run(works, tmp_path):
    content = yaml.safe_load((SHIPPED / "ankge/transe_world.yaml").read_text())
    content["data"]["init_args"] = {"num_negatives": 8, "batch_size": 32}
    content["trainer"]["max_epochs"] = content["trainer"]["check_val_every_n_epoch"] = 1
    content["callbacks"] = {"checkpoint": content["callbacks"]["checkpoint"]}
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(content))
    machine = ["--trainer.deterministic", "true", "--trainer.precision", "64-true"]
    folder = works("fit", *ANALOGIES, *GRAPH, "graph", "--model.base", str(tmp_path / "own.yaml"), *machine)
    config = yaml.safe_load((folder / "base/config.yaml").read_text())
    assert config["data"]["init_args"]["num_negatives"] == 8
    assert (config["trainer"]["deterministic"], config["trainer"]["precision"]) == (True, "64-true")
    for path in (folder, folder / "base"):
        state = torch.load(path / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
        assert state["tables.entities"].dtype == torch.float64


def test_a_checkpoint_that_holds_more_is_read_where_it_is_trusted(complains, works, work, tmp_path):
    content = torch.load(work / FINISHED, weights_only=True)
    torch.save({**content, "made_by": Namespace(name="someone")}, tmp_path / "more.ckpt")
    test = ["test", "--ckpt_path", str(tmp_path / "more.ckpt"), *QUIET]
    assert "load it with --weights_only false" in complains(*test)
    folder = works(*test, "--weights_only", "false")
    assert np.isfinite(last(folder / "test/metrics.csv", "test/mrr"))


@pytest.mark.parametrize("similarity", ["cos", "cos_official"])
def test_vectors_of_zeros_have_no_angle_and_do_no_harm(works, work, tmp_path, similarity):
    content = torch.load(work / CHECKPOINT, weights_only=True)
    for name in ("tables.entities", "tables.relations"):
        content["state_dict"][name][::2] = 0
    torch.save(content, tmp_path / "zeros.ckpt")
    given = ["--model.base", str(tmp_path / "zeros.ckpt"), "--model.similarity", similarity]
    folder = works("fit", *ANALOGIES, *GRAPH, "graph", *given, "--trainer.log_every_n_steps", "1")
    assert np.isfinite(last(folder / "metrics.csv", "train/loss"))
    state = torch.load(folder / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
    assert all(value.isfinite().all() for name, value in state.items() if name.startswith("analogies"))
