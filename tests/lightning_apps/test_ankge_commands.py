"""Commands of the AnKGE app, each in a fresh process outside the checkout, on what a short `fit` wrote."""

import json
import shutil
import signal
import subprocess
import sys
import time
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from safetensors import safe_open

from datamodules import KnowledgeGraph
from modules.ankge import AnalogicalEmbedding
from modules.knowledge_graph import HAKE, KnowledgeGraphEmbedding
from tests.callbacks.wandb_files import history
from tests.lightning_apps.commands import clean_environment, last, restored, rows, run, run_python

pytestmark = pytest.mark.slow

CITIES, EPOCHS = 40, 10
QUIET = ["--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false"]
QUIET += ["--trainer.accelerator", "cpu"]
SMALL = ["--data.world_cities", str(CITIES), *QUIET]
SHORT = [*SMALL, "--trainer.max_epochs", str(EPOCHS)]
CSV = ["--trainer.logger", "csv"]
BASE_ONLY = ["--config", "ankge/transe_world.yaml", *SMALL, *CSV, "--trainer.max_epochs", "2"]
BASE_ONLY += ["--trainer.check_val_every_n_epoch", "1"]
QUERIES = [
    ("Belgium", "continent", ""),
    ("", "country", "France"),
    ("Germany", "neighbour", ""),
    ("", "capital", "Paris, France"),
    ("Euro (EUR)", "currency_reverse", ""),
]
COLUMNS = ("head", "relation", "tail")
TOP = 10


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """A folder in which one command has trained a base model, and AnKGE on it."""
    folder = tmp_path_factory.mktemp("outside")
    run_python(folder, "fit", *SHORT, app="ankge")
    pd.DataFrame(QUERIES, columns=COLUMNS).to_csv(folder / "queries.csv", index=False)
    return folder


@pytest.fixture(scope="module")
def finished(work) -> Path:
    return work / "runs/ankge/ankge"


@pytest.fixture(scope="module")
def base(finished) -> Path:
    return finished / "base/checkpoints/best.ckpt"


@pytest.fixture(scope="module")
def plain(finished) -> "PlainAnKGE":
    return PlainAnKGE(finished / "checkpoints/last.ckpt")


class PlainAnKGE:
    """TransE and its analogies from a checkpoint's arrays, with dictionaries and one query at a time."""

    def __init__(self, checkpoint: Path) -> None:
        content = torch.load(checkpoint, weights_only=True)
        state = {name: value.numpy().astype(np.float64) for name, value in content["state_dict"].items()}
        self.options = content["hyper_parameters"]
        assert self.options["scoring"]["class_path"].endswith("TransE")
        self.margin = self.options["scoring"]["init_args"]["margin"]
        self.entities, self.relations = state["tables.entities"], state["tables.relations"]
        self.analogies = state["analogies.entities"], state["analogies.relations"], state["analogies.projection"]
        self.lambdas = state["level_weights"]
        self.data = KnowledgeGraph(layout="world", world_cities=CITIES)

    @property
    def names(self) -> list[str]:
        return self.data.entity_names

    @cached_property
    def kinds(self) -> list[str]:
        return [*self.data.relation_names, *(f"{name}_reverse" for name in self.data.relation_names)]

    @cached_property
    def parts(self) -> dict[str, set[tuple[int, int, int]]]:
        """Triples of each part, with reverses."""
        count = self.data.num_relations
        triples = {part: {tuple(row) for row in values.tolist()} for part, values in self.data.splits.items()}
        return {part: some | {(t, r + count, h) for h, r, t in some} for part, some in triples.items()}

    @cached_property
    def every(self) -> set[tuple[int, int, int]]:
        return set.union(*self.parts.values())

    @cached_property
    def counts(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Training triples of each (relation, tail), (head, tail) and tail."""
        entities = len(self.names)
        by_relation, by_head = np.zeros((len(self.kinds), entities)), np.zeros((entities, entities))
        for h, r, t in self.parts["train"]:
            by_relation[r, t] += 1
            by_head[h, t] += 1
        return by_relation, by_head, by_head.sum(0)

    def distances(self, head: np.ndarray, relation: np.ndarray) -> np.ndarray:
        return np.abs(head + relation - self.entities).sum(1)

    def scores(self, head: int, relation: int) -> np.ndarray:
        """Of all tails."""
        own_entities, own_relations, projection = self.analogies
        h, r = self.entities[head], self.relations[relation]
        r_a = r * own_relations[relation]
        h_a = h * own_entities[head] + self.options["transfer"] * r_a @ projection
        total = self.margin - self.distances(h, r)
        levels = [(h_a, r), (h, r_a), (h_a, r_a)]
        kept = [self.options[name] for name in ("entities", "relations", "pairs")]
        by_relation, by_head, by_tail = self.counts
        for level, counts in enumerate((by_relation[relation], by_head[head], by_tail)):
            weights = np.minimum(counts / kept[level], 1)
            total = total + self.lambdas[level] * weights * (self.margin - self.distances(*levels[level]))
        return total

    def query(self, head: str, relation: str, tail: str) -> tuple[int, int]:
        """What is given and the relation, of a query by name, so that the answer is a tail."""
        kind = self.kinds.index(relation)
        if head:
            return self.names.index(head), kind
        return self.names.index(tail), (kind + self.data.num_relations) % len(self.kinds)

    def analogous(self, head: int, relation: int, tail: int) -> tuple[str, str, str]:
        """The other entity, relation and pair of both that fit best."""
        t = self.entities[tail]
        by_entity = np.abs(self.entities + self.relations[relation] - t).sum(1)
        by_relation = np.abs(self.entities[head] + self.relations - t).sum(1)
        heads = [row for row in np.argsort(by_entity) if row not in (head, tail)][:20]
        kinds = [row for row in np.argsort(by_relation) if row != relation][:20]
        _, h, r = min((np.abs(self.entities[h] + self.relations[r] - t).sum(), h, r) for h in heads for r in kinds)
        return self.names[heads[0]], self.kinds[kinds[0]], self.names[h], self.kinds[r]


def test_one_command_leaves_two_complete_runs(work, finished, base):
    folders = [path.name for path in (work / "runs/ankge").iterdir() if not path.name.startswith(".")]
    assert folders[:1] == ["ankge"], "the base model's run is inside"
    for folder, model in ((finished, "AnalogicalEmbedding"), (finished / "base", "KnowledgeGraphEmbedding")):
        config = yaml.safe_load((folder / "config.yaml").read_text())
        assert config["model"]["class_path"].endswith(model)
        assert config["data"]["init_args"]["world_cities"] == CITIES
        assert config["data"]["init_args"]["objective"] == {"base": "links"}.get(folder.name, "analogies")
        for name in ("best", "last"):
            content = torch.load(folder / f"checkpoints/{name}.ckpt", weights_only=True)
            assert content["lightning_apps"]["app"] == "ankge"
        assert content["epoch"] + 1 == config["trainer"]["max_epochs"] == (30 if folder.name == "base" else EPOCHS)
        assert 0.2 < last(folder / "metrics.csv", "val/main") < 1
    assert json.loads((finished / "base/run.json").read_text())["name"] == "ankge-base"
    assert content["hyper_parameters"]["num_entities"] == len(KnowledgeGraph(world_cities=CITIES).entity_names)


def test_only_the_analogies_are_trained(finished, base):
    before = torch.load(base, weights_only=True)["state_dict"]
    content = torch.load(finished / "checkpoints/last.ckpt", weights_only=True)
    for name in ("tables.entities", "tables.relations"):
        assert torch.equal(content["state_dict"][name], before[name]), "the best base model, bit for bit"
    (optimizer,) = content["optimizer_states"]
    (group,) = optimizer["param_groups"]
    moved = [tuple(state["exp_avg"].shape) for state in optimizer["state"].values()]
    assert len(group["params"]) == 3
    assert sorted(moved) == sorted(
        tuple(value.shape) for name, value in content["state_dict"].items() if name.startswith("analogies.")
    )


def test_scores_are_those_of_a_plain_loop(work, finished, plain):
    run(work, "test", "--ckpt_path", "last", *CSV, *QUIET, app="ankge")
    assert plain.lambdas.any(), "otherwise the analogies would not count"
    known = {}
    for h, r, t in plain.every:
        known.setdefault((h, r), []).append(t)
    ranks, base_ranks = {"tail": [], "head": []}, []
    for h, r, t in plain.parts["test"]:
        others = np.zeros(len(plain.names), dtype=bool)
        others[known[h, r]] = True
        others[t] = False
        scores, own = plain.scores(h, r), -plain.distances(plain.entities[h], plain.relations[r])
        ranks["tail" if r < plain.data.num_relations else "head"].append(1 + (scores > scores[t])[~others].sum())
        base_ranks.append(1 + (own > own[t])[~others].sum())
    every = np.array(ranks["tail"] + ranks["head"])
    metrics = finished / "test/metrics.csv"
    assert last(metrics, "test/count") == len(every) == 2 * len(plain.data.splits["test"])
    expected = {"test": every, "test/base": base_ranks} | {f"test/{side}": own for side, own in ranks.items()}
    for name, values in expected.items():
        assert last(metrics, f"{name}/mrr") == pytest.approx(np.mean(1 / np.array(values)), abs=1e-4)
        assert last(metrics, f"{name}/hits@3") == pytest.approx(np.mean(np.array(values) <= 3), abs=3e-3)
    assert last(metrics, "test/mrr") != last(metrics, "test/base/mrr")
    assert last(metrics, "test/identity/mrr") > 0
    assert last(metrics, "test/unlinked/mrr") > 0


def test_validation_again_says_what_fit_said(work, finished):
    run(work, "validate", "--ckpt_path", str(finished / "checkpoints/last.ckpt"), *CSV, *QUIET, app="ankge")
    for name in ("val/main", "val/identity/mrr", "val/unlinked/mrr", "val/weight_relation"):
        assert last(finished / "validate/metrics.csv", name) == pytest.approx(last(finished / "metrics.csv", name))


def test_completions_are_the_best_answers_by_name_and_explained(work, finished, plain):
    run(work, "predict", "--ckpt_path", "last", "--data.predict_path", "queries.csv", *CSV, *QUIET, app="ankge")
    table = pd.read_csv(finished / "predict/predictions.csv", keep_default_na=False)
    assert len(table) == TOP * len(QUERIES)
    flags = set()
    # The last asks by a reversed relation, whose answers are triples of the relation itself.
    shown = [*QUERIES[:-1], ("", "currency", "Euro (EUR)")]
    for number, (asked, query) in enumerate(zip(QUERIES, shown, strict=True)):
        given, kind = plain.query(*asked)
        scores = plain.scores(given, kind)
        answers = table[table["query"] == number]
        side = "tail" if query[0] else "head"
        assert answers["rank"].tolist() == list(range(1, TOP + 1))
        assert set(answers["answer"]) == {side}
        assert set(answers["row"]) == {number + 1}
        assert all(answers[key].eq(value).all() for key, value in zip(COLUMNS, query, strict=True) if key != side)
        found = [plain.names.index(name) for name in answers[side]]
        np.testing.assert_allclose(answers["score"], scores[found], atol=1e-4)
        np.testing.assert_allclose(answers["score"], np.sort(scores)[::-1][:TOP], atol=1e-4)
        assert answers["known"].tolist() == [(given, kind, tail) in plain.every for tail in found]
        flags |= set(answers["known"])
        for tail, row in zip(found, answers.itertuples(), strict=True):
            entity, relation, *pair = plain.analogous(given, kind, tail)
            assert (row.analogous_entity, row.analogous_relation) == (entity, relation)
            assert row.analogous_pair == " + ".join(pair)
    assert flags == {True, False}
    assert table["tail"][0] == "Europe", "of Belgium's continent"


def test_completions_of_the_test_triples_have_their_answer_as_known(work, finished, plain):
    options = ["--run.name", "elsewhere", "--callbacks.completions", "callbacks.CompletionWriter"]
    options += ["--callbacks.completions.explanations", "false", "--callbacks.completions.format", "parquet"]
    run(work, "predict", "--ckpt_path", str(finished / "checkpoints/last.ckpt"), *options, *CSV, *QUIET, app="ankge")
    table = pd.read_parquet(work / "runs/ankge/elsewhere/predict/predictions.parquet")
    assert not {"analogous_entity", "row"} & set(table)
    triples = plain.data.splits["test"]
    assert table["query"].nunique() == 2 * len(triples)
    every = {(plain.names[h], plain.kinds[r], plain.names[t]) for h, r, t in plain.every}
    told = [(row.head, row.relation, row.tail) in every for row in table.itertuples()]
    assert table["known"].tolist() == told


def test_what_is_exported_has_the_vectors_with_their_names(work, finished, plain):
    formats = ["--formats", "[npz,parquet,safetensors]"]
    run(work, "export", "--ckpt_path", "last", "--run.name", "ankge", *formats, *QUIET, app="ankge")
    folder = finished / "export"
    state = torch.load(finished / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
    expected = {
        "entities": state["tables.entities"], "relations": state["tables.relations"],
        **{f"analogy_{name}": state[f"analogies.{name}"] for name in ("entities", "relations", "projection")},
    }  # fmt: skip
    description = json.loads((folder / "export.json").read_text())
    with np.load(folder / "embeddings.npz", allow_pickle=False) as file:
        arrays = dict(file)
    with safe_open(folder / "embeddings.safetensors", "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # no mapping
        metadata = {name: json.loads(text) for name, text in file.metadata().items() if name != "format"}
    assert arrays.keys() == {*expected, "entity_names", "relation_names"}
    assert tensors.keys() == expected.keys()
    assert arrays["entity_names"].tolist() == plain.names
    assert arrays["relation_names"].tolist() == plain.kinds
    for name, tensor in expected.items():
        assert np.array_equal(arrays[name], tensor.numpy())
        assert torch.equal(tensors[name], tensor)
        table = pd.read_parquet(folder / f"{name}.parquet")
        assert np.array_equal(np.stack(table["vector"]), tensor.numpy())
        if name != "analogy_projection":
            assert table["name"].tolist() == (plain.names if name.endswith("entities") else plain.kinds)
    assert description["shapes"] == {name: list(tensor.shape) for name, tensor in expected.items()}
    for told in (description, metadata):
        assert told["facts"]["graph_hash"] == plain.data.graph_hash
        assert told["scoring"] == plain.options["scoring"]
        assert told["settings"]["level_weights"] == pytest.approx(plain.lambdas)
    assert not list(folder.glob(".*")), "nothing temporary is left"


def test_a_checkpoint_of_ankge_needs_no_base_any_more(work, finished, base):
    options = ["--data.predict_path", "queries.csv", *CSV, *QUIET]
    command = ["predict", "--ckpt_path", str(finished / "checkpoints/best.ckpt"), *options]
    run(work, *command, "--run.name", "with", app="ankge")
    hidden = shutil.move(base.parents[1], work / "hidden")
    try:
        run(work, *command, "--run.name", "without", app="ankge")
    finally:
        shutil.move(hidden, base.parents[1])
    texts = [(work / f"runs/ankge/{name}/predict/predictions.csv").read_text() for name in ("with", "without")]
    assert texts[0] == texts[1]


def test_the_dashboard_has_histogram_relations_and_improved_triples(finished):
    for folder in (finished, finished / "base"):
        last_of = {key: row[key] for row in history(folder) for key in row}
        keys = {"val/relations", "val/improved"} if folder == finished else {"val/relations"}
        for key in keys:
            assert last_of[f"{key}/_type"] == "table-file"
            (file,) = folder.glob(f"wandb/offline-run-*/files/{last_of[f'{key}/path']}")
            content = json.loads(file.read_text())
            written = rows(sorted((folder / "media" / key).glob("*.csv"))[-1])
            assert len(content["data"]) == len(written) > 3
            assert content["columns"] == list(written[0])
        assert any(key.startswith("val/ranks") for key in last_of)
        assert list((folder / "media/val/ranks").glob("*.png"))
        assert last_of["val/mrr"] == pytest.approx(last(folder / "metrics.csv", "val/mrr"), abs=1e-6)
    improved = rows(sorted((finished / "media/val/improved").glob("*.csv"))[-1])
    assert {*COLUMNS, "rank before", "rank after", "analogous_entity", "analogous_pair"} == improved[0].keys() - {
        "analogous_relation"
    }
    assert all(float(row["rank after"]) < float(row["rank before"]) for row in improved)
    assert {"val/unlinked/mrr", "val/head/mrr", "val/N-1/mrr"} <= last_of.keys()


def test_a_resumed_run_ends_as_the_uninterrupted_one(work, finished, base):
    given = ["--model.base", str(base), "--run.name", "half", *CSV]
    run(work, "fit", *SMALL, "--trainer.max_epochs", "5", *given, app="ankge")
    half = work / "runs/ankge/half"
    assert torch.load(half / "checkpoints/last.ckpt", weights_only=True)["epoch"] == 4
    resumed = ["--ckpt_path", "last", "--run.name", "half", "--trainer.max_epochs", str(EPOCHS)]
    run(work, "fit", *resumed, app="ankge")
    equal_checkpoints(half / "checkpoints/last.ckpt", finished / "checkpoints/last.ckpt")
    assert not (half / "base").exists()
    steps = [row["step"] for row in rows(finished / "metrics.csv")]
    assert [row["step"] for row in rows(half / "metrics.csv")] == steps


def equal_checkpoints(ours: Path, whole: Path) -> None:
    ours, whole = (torch.load(path, weights_only=True) for path in (ours, whole))
    assert (ours["epoch"], ours["global_step"]) == (whole["epoch"], whole["global_step"])
    assert ours["state_dict"].keys() == whole["state_dict"].keys()
    for name, tensor in whole["state_dict"].items():
        torch.testing.assert_close(ours["state_dict"][name], tensor, rtol=0, atol=0, msg=name)


def test_a_run_stopped_in_its_base_goes_on_by_the_folder_of_that(work, finished):
    command = [sys.executable, "-m", "lightning_apps.ankge", "fit", *SHORT, *CSV, "--run.name", "stopped"]
    process = subprocess.Popen(
        command, cwd=work, env=clean_environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    stopped, started = work / "runs/ankge/stopped", time.monotonic()
    while not (stopped / "base/checkpoints/best.ckpt").exists() and process.poll() is None:
        assert time.monotonic() - started < 200
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=120)[0].decode()
    assert process.returncode == 128 + signal.SIGTERM, output
    assert not (stopped / "checkpoints").exists(), "AnKGE has not begun"
    content = torch.load(stopped / "base/checkpoints/last.ckpt", weights_only=True)
    whole = torch.load(finished / "base/checkpoints/last.ckpt", weights_only=True)
    assert content["global_step"] < whole["global_step"], output

    runs = sorted((work / "runs/ankge").iterdir())
    run(work, "fit", "--ckpt_path", "runs/ankge/stopped/base", app="ankge")
    assert sorted((work / "runs/ankge").iterdir()) == runs, "it went on in its folder"
    equal_checkpoints(stopped / "base/checkpoints/last.ckpt", finished / "base/checkpoints/last.ckpt")
    run(work, "fit", *SHORT, *CSV, "--model.base", "runs/ankge/stopped/base", "--run.name", "second", app="ankge")
    equal_checkpoints(work / "runs/ankge/second/checkpoints/last.ckpt", finished / "checkpoints/last.ckpt")


@pytest.fixture(scope="module")
def hake(work) -> Path:
    """A base model alone, with another score function."""
    options = ["--model.scoring", "modules.knowledge_graph.HAKE", "--model.scoring.dimension", "8"]
    options += ["--run.name", "hake"]
    run(work, "fit", *BASE_ONLY, *options, app="ankge")
    return work / "runs/ankge/hake"


def test_a_base_model_alone_is_tested_completed_and_exported(work, hake):
    module = restored(KnowledgeGraphEmbedding, hake / "checkpoints/last.ckpt")
    content = ["--ckpt_path", str(hake / "checkpoints/last.ckpt"), *CSV, *QUIET]
    run(work, "test", *content, app="ankge")
    assert last(hake / "test/metrics.csv", "test/unlinked/mrr") > 0
    run(work, "predict", *content, "--data.predict_path", "queries.csv", "--model.top_k", "3", app="ankge")
    table = pd.read_csv(hake / "predict/predictions.csv")
    assert len(table) == 3 * len(QUERIES)
    assert "analogous_entity" not in table, "there are no analogies"
    data = KnowledgeGraph(world_cities=CITIES)
    row = table.iloc[0]
    head, tail = (torch.tensor(data.entity_names.index(row[name])) for name in ("head", "tail"))
    relation = torch.tensor(data.relation_names.index(row["relation"]))
    tables = module.tables
    distance = tables.scoring.distance(tables.entities[head], tables.relations[relation], tables.entities[tail])
    assert row["score"] == pytest.approx(-distance.item(), abs=1e-4)
    run(work, "export", *content[:2], *QUIET, app="ankge")
    with np.load(hake / "export/embeddings.npz", allow_pickle=False) as file:
        assert file["scoring_phase_weight"] == module.tables.scoring.phase_weight.item()
        assert file["scoring_modulus_weight"] == module.tables.scoring.modulus_weight.item() != 1
        assert np.array_equal(file["relations"], module.tables.relations.detach().numpy())
    assert {path.name for path in (hake / "export").iterdir()} >= {"embeddings.safetensors", "export.json"}
    assert not list((hake / "export").glob("*.parquet")), "only where it is asked for"


def test_the_base_says_which_score_function_it_has_and_another_base_gets_its_own_neighbours(work, base, hake):
    options = [*SMALL, *CSV, "--trainer.max_epochs", "1", "--trainer.check_val_every_n_epoch", "1"]
    options += ["--callbacks.retriever.cache", "neighbours"]
    other = hake / "checkpoints/best.ckpt"
    bases = {"on_transe": base, "on_hake": other, "on_hake_again": other}
    for name, path in bases.items():
        done = run(work, "fit", *options, "--model.base", str(path), "--run.name", name, app="ankge")
        assert ("were looked up before" in done.stderr) == (name == "on_hake_again")
        assert ("looked up the analogical objects of" in done.stderr) == (name != "on_hake_again")
    assert len(list((work / "neighbours").glob("*.pt"))) == 2
    module = restored(AnalogicalEmbedding, work / "runs/ankge/on_hake/checkpoints/last.ckpt")
    assert isinstance(module.tables.scoring, HAKE)
    assert module.hparams.scoring["init_args"]["dimension"] == 8
    assert (module.analogies.entities.shape[1], module.analogies.relations.shape[1]) == (16, 24)


def test_two_processes_train_both_models_and_score_as_one(work):
    options = [*SMALL, *CSV, "--trainer.max_epochs", "2", "--trainer.check_val_every_n_epoch", "1", "--run.name", "two"]
    run_python(work, "fit", *options, "--trainer.devices", "2", "--trainer.strategy", "ddp", app="ankge")
    for folder in (work / "runs/ankge/two", work / "runs/ankge/two/base"):
        checkpoint = str(folder / "checkpoints/last.ckpt")
        run(work, "validate", "--ckpt_path", checkpoint, *CSV, *QUIET, "--trainer.devices", "1", app="ankge")
        for name in ("val/main", "val/count", "val/head/mrr"):
            found = last(folder / "validate/metrics.csv", name)
            assert found == pytest.approx(last(folder / "metrics.csv", name), abs=1e-6)
