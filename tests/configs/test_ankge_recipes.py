"""Every shipped configuration of AnKGE: its published numbers, and one step on a small graph."""

import math
import re

import pytest
import torch

from lightning_apps.ankge import APP
from lightning_apps.cli import AppCLI
from lightning_apps.config_files import SHIPPED
from modules.ankge import AnalogyFunctions
from modules.knowledge_graph import EmbeddingTables, build_scoring
from tests.configs.recipes import arguments, read, recipes
from tests.modules.small_graph import ENTITIES, RELATIONS, write_graph

DATA = {"fb15k237": "FB15k-237", "wn18rr": "WN18RR"}
SIZES = {"FB15k-237": (14_541, 237), "WN18RR": (40_943, 11)}
BASE_MODEL, ANALOGIES = "modules.knowledge_graph.KnowledgeGraphEmbedding", "modules.ankge.AnalogicalEmbedding"

# Section 1 of the specification; a patience that is not given is 5. The last column is section 8.
BASE_COLUMNS = ["d", "B", "K", "margin", "temperature", "lr", "weight", "max_epochs", "check", "patience"]
BASE_COLUMNS += ["phase_modulus", "best", "parameters"]
BASE = {
    "transe_fb15k237": (500, 1024, 256, 9, 1.0, 5e-4, False, 500, 10, 5, None, (20, ".321"), 7_507_500),
    "rotate_fb15k237": (500, 1024, 256, 9, 1.0, 1e-4, False, 1000, 20, 5, None, (40, ".342"), 14_778_000),
    "hake_fb15k237": (1000, 1024, 512, 9, 1.0, 5e-5, True, 1000, 30, 20, (1.0, 3.5), (150, ".357"), 30_504_002),
    "pairre_fb15k237": (1500, 1024, 256, 6, 1.0, 5e-5, True, 4000, 50, 5, None, (150, ".356"), 23_233_500),
    "transe_wn18rr": (500, 2048, 256, 6, 1.0, 5e-4, False, 500, 10, 5, None, (110, ".224"), 20_482_500),
    "rotate_wn18rr": (500, 512, 1024, 6, 0.5, 5e-5, False, 1000, 50, 5, None, (100, ".475"), 40_954_000),
    "hake_wn18rr": (500, 512, 1024, 6, 0.5, 5e-5, True, 1000, 10, 10, (0.5, 0.5), (100, ".495"), 40_976_002),
    "pairre_wn18rr": (500, 512, 1024, 6, 0.5, 5e-5, True, 1000, 50, 5, None, (50, ".458"), 20_493_500),
}

# Section 4; the margin and d are those of the base. The last column is section 8.
ANALOGY_COLUMNS = ["B", "pairs", "m", "n", "transfer", "weights", "lr", "milestones", "reg", "similarity", "check"]
ANALOGY_COLUMNS += ["parameters"]
ANALOGY = {
    "transe_fb15k237": (4096, 3, 1000, 40, 1, (0.01, 0.2, 0.02), 1e-4, [200], 1e-7, "norm", 50, 7_757_500),
    "rotate_fb15k237": (4096, 5, 1000, 40, 1, (0.01, 0.2, 0.05), 1e-3, [50, 200], 1e-7, "norm", 50, 15_278_000),
    "hake_fb15k237": (4096, 5, 1000, 40, 1, (0.05, 0.3, 0.1), 1e-3, [50, 200], 1e-7, "norm", 50, 36_504_000),
    "pairre_fb15k237": (4096, 3, 1000, 40, 1, (0.01, 0.3, 0.05), 1e-3, [50, 300], 1e-7, "norm", 50, 27_733_500),
    "transe_wn18rr": (2048, 20, 1000, 5, 0, (0.01, 0.3, 0.3), 1e-3, [200], 0, "cos", 10, 20_732_500),
    "rotate_wn18rr": (4096, 3, 1000, 5, 0, (0.1, 0.05, 0.1), 1e-3, [50, 200], 0, "norm", 50, 41_454_000),
    "hake_wn18rr": (4096, 3, 1000, 5, 0, (0.1, 0.05, 0.1), 1e-3, [50, 200], 0, "norm", 50, 42_476_000),
    "pairre_wn18rr": (4096, 3, 1000, 5, 0, (0.1, 0.05, 0.2), 3e-5, [50, 200], 0, "norm", 50, 20_993_500),
}
KINDS = {"transe": "TransE", "rotate": "RotatE", "hake": "HAKE", "pairre": "PairRE"}


def of_base(name: str) -> dict:
    return dict(zip(BASE_COLUMNS, BASE[name], strict=True))


def of_analogies(name: str) -> dict:
    return dict(zip(ANALOGY_COLUMNS, ANALOGY[name], strict=True))


def kind_and_data(name: str) -> tuple[str, str]:
    kind, _, data = name.partition("_")
    return KINDS[kind], DATA[data]


def early_stopping(name: str) -> dict:
    return read(f"ankge/{name}")["callbacks"]["early_stopping"]["init_args"]


def test_all_published_configurations_are_there():
    expected = {"ankge", "ankge/transe_world", *(f"ankge/{name}" for name in BASE)}
    expected |= {f"ankge/ankge_{name}" for name in ANALOGY}
    assert len(expected) == 18
    assert expected <= set(recipes("ankge"))
    models = [read(name)["model"]["class_path"] for name in recipes("ankge")]
    assert set(models) == {BASE_MODEL, ANALOGIES}
    bases = {arguments(name)["base"] for name in recipes("ankge", ANALOGIES)}
    assert bases <= {f"{name}.yaml" for name in recipes("ankge", BASE_MODEL)}


@pytest.mark.parametrize("name", BASE)
def test_a_base_configuration_has_the_published_values(name):
    published, (kind, data) = of_base(name), kind_and_data(name)
    recipe = f"ankge/{name}"
    model, own, trainer = arguments(recipe), arguments(recipe, "data"), read(recipe)["trainer"]
    scoring, weights = model["scoring"], published["phase_modulus"]
    assert scoring["class_path"] == f"modules.knowledge_graph.{kind}"
    expected = {"dimension": published["d"], "margin": published["margin"]}
    if weights:
        expected |= {"phase_weight": weights[0], "modulus_weight": weights[1]}
    assert scoring["init_args"] == expected, "and epsilon is 2"
    assert build_scoring(scoring).epsilon == 2
    assert model.keys() == {"scoring", "adversarial_temperature", "lr", "lr_milestones"}
    assert (model["adversarial_temperature"], model["lr"]) == (published["temperature"], published["lr"])
    assert model["lr_milestones"] is None, "half of the epochs"
    assert (own["name"], own["batch_size"], own["num_negatives"]) == (data, published["B"], published["K"])
    assert (own["use_weight"], own["negatives"]) == (published["weight"], "shared")
    assert (trainer["max_epochs"], trainer["check_val_every_n_epoch"]) == (published["max_epochs"], published["check"])
    assert early_stopping(name) == {"monitor": "val/mrr", "mode": "max", "patience": published["patience"]}
    epoch, mrr = published["best"]
    assert (
        f"the best epoch was {epoch}, with a validation MRR of {mrr}." in (SHIPPED / f"ankge/{name}.yaml").read_text()
    )


@pytest.mark.parametrize("name", ANALOGY)
def test_a_configuration_of_ankge_has_the_published_values(name):
    published, (kind, data) = of_analogies(name), kind_and_data(name)
    recipe = f"ankge/ankge_{name}"
    model, own, trainer = arguments(recipe), arguments(recipe, "data"), read(recipe)["trainer"]
    assert model == {
        "base": f"ankge/{name}.yaml",
        "entities": 1,
        "relations": 1,
        "pairs": published["pairs"],
        "candidate_entities": published["m"],
        "candidate_relations": published["n"],
        "transfer": published["transfer"],
        "strength": 10,
        "similarity": published["similarity"],
        "level_weights": list(published["weights"]),
        "adaptive_weights": name != "transe_wn18rr",
        "score_offset": "none",
        "regularization": published["reg"],
        "lr": published["lr"],
        "lr_milestones": published["milestones"],
    }
    assert (own["batch_size"], own["objective"]) == (published["B"], "analogies")
    assert (trainer["max_epochs"], trainer["check_val_every_n_epoch"]) == (1000, published["check"])
    assert early_stopping(f"ankge_{name}") == {"monitor": "val/mrr", "mode": "max", "patience": 10}
    base = read(model["base"].removesuffix(".yaml"))
    assert base["model"]["class_path"] == BASE_MODEL
    assert base["model"]["init_args"]["scoring"]["class_path"].endswith(f".{kind}")
    facts = [part["data"]["init_args"] for part in (base, read(recipe))]
    assert [{key: part[key] for key in ("layout", "name")} for part in facts] == 2 * [{"layout": "pyg", "name": data}]
    assert {"retriever", "frozen", "ranks", "checkpoint"} <= read(recipe)["callbacks"].keys()


@pytest.mark.parametrize("name", BASE)
def test_a_model_has_the_published_number_of_parameters(name):
    entities, relations = SIZES[kind_and_data(name)[1]]
    with torch.device("meta"):
        tables = EmbeddingTables(build_scoring(arguments(f"ankge/{name}")["scoring"]), entities, relations)
        widths = tables.scoring.entity_width, tables.scoring.relation_width
        analogies = AnalogyFunctions(entities, 2 * relations, *widths)
    assert sum(parameter.numel() for parameter in tables.parameters()) == of_base(name)["parameters"]
    assert sum(parameter.numel() for parameter in analogies.parameters()) == of_analogies(name)["parameters"]


@pytest.mark.parametrize("name", recipes("ankge"))
def test_a_recipe_is_a_complete_configuration(name):
    recipe = read(name)
    assert list(recipe) == ["app", "seed_everything", "model", "data", "callbacks", "trainer"]
    assert recipe["app"] == "ankge"
    published = name.removeprefix("ankge/").removeprefix("ankge_") in BASE
    assert recipe["seed_everything"] == (321 if published else 0)
    assert recipe["callbacks"]["checkpoint"] == {
        "class_path": "callbacks.BestAndLastCheckpoint",
        "init_args": {"monitor": "val/main", "mode": "max"},
    }
    text = (SHIPPED / f"{name}.yaml").read_text()
    assert text.startswith("# "), "the first line says what it is"
    if published:
        assert set(re.findall(r"ankge fit --config (\S+)", text)) == {f"{name}.yaml"}


@pytest.fixture(scope="module")
def graph(tmp_path_factory):
    return write_graph(tmp_path_factory.mktemp("graph"))


def one_step(root, graph, name: str, *options: str) -> AppCLI:
    """`fit` of one batch, which the whole graph fits into, and one validation."""
    quiet = [
        *("--data.layout", "tsv", "--data.root", str(graph), "--run.root", str(root)),
        *("--trainer.max_epochs", "1", "--trainer.check_val_every_n_epoch", "1"),
        *("--trainer.limit_train_batches", "1", "--trainer.accelerator", "cpu", "--trainer.logger", "csv"),
        *("--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false"),
    ]
    return AppCLI(APP, ["fit", "--config", f"{name}.yaml", *quiet, *options])


@pytest.mark.filterwarnings("ignore:AnKGE. .* but the graph has only")
@pytest.mark.parametrize("name", recipes("ankge", BASE_MODEL))
def test_a_recipe_and_the_ankge_on_it_take_a_step(name, tmp_path, graph):
    base = one_step(tmp_path, graph, name, "--model.scoring.init_args.dimension", "4")
    scoring = arguments(name)["scoring"]
    assert (type(base.model.tables.scoring).__name__, base.trainer.global_step) == (
        scoring["class_path"].split(".")[-1],
        1,
    )
    assert 0 < base.trainer.callback_metrics["val/main"] <= 1
    assert base.trainer.callback_metrics["val/count"] == 2 * 11
    checkpoint = tmp_path / name / "checkpoints/last.ckpt"
    trained = [other for other in recipes("ankge") if arguments(other).get("base") == f"{name}.yaml"]
    assert trained or name.removeprefix("ankge/") not in BASE
    for other in trained:
        cli = one_step(tmp_path, graph, other, "--model.base", str(checkpoint))
        model = cli.model
        assert (cli.trainer.global_step, model.hparams.num_entities) == (1, ENTITIES)
        assert model.hparams.scoring == base.model.hparams.scoring, "that of the base"
        assert torch.equal(model.tables.entities, base.model.tables.entities)
        assert model.neighbours.pair_heads.shape[1] == arguments(other)["pairs"]
        assert 0 < cli.trainer.callback_metrics["val/main"] <= 1
        assert cli.trainer.callback_metrics["train/loss"] > 0
        assert model.grid.shape[0] == math.prod(map(len, arguments(other).get("level_grid") or []))
        assert all(value.isfinite().all() for value in model.state_dict().values())
        assert model.analogies.relations.shape == (2 * RELATIONS, model.tables.scoring.relation_width)
