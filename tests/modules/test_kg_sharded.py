"""Entities spread over two gloo processes: the vectors, gradients, steps, ranks, answers and files of one process."""

import re

import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy
from torch.nn.functional import embedding

from callbacks import WarmupWeightAveraging
from modules.ankge import AnalogicalEmbedding
from modules.knowledge_graph import (
    EmbeddingTables,
    KnowledgeGraphEmbedding,
    ShardedEmbeddingTables,
    row_exchange,
    sharded_ranking,
    sharded_tables,
)
from modules.knowledge_graph.row_exchange import RowShare
from tests.distributed import run_ranks
from tests.modules import small_graph
from tests.modules.small_graph import ENTITIES, KINDS, RELATIONS, graph, scoring
from tests.modules.toy_images import quiet_trainer

E = ENTITIES + 1  # one that no triple has, so that the processes hold 14 and 15
TWO_RANKS = {"strategy": "ddp", "devices": 2, "use_distributed_sampler": False}
ONE = {"accumulate_grad_batches": 2}  # a step of one process that is one of two
# In single precision a gradient that rounding makes of nothing is divided by its own size in Adam.
PRECISE = {"precision": "64-true"}
NAMES = ("TransE", "HAKE")


def model(name, sharded=True, **options):
    torch.manual_seed(4)
    return KnowledgeGraphEmbedding(
        scoring(name, 6), E, RELATIONS, lr=0.05, lr_milestones=[1], sharded=sharded, **options
    )


def data(folder, **options):
    return graph(folder, **({"seed": 0, "batch_size": 8, "num_negatives": 9} | options))


def content(trainer, path):
    """What a checkpoint has of the model and of Adam, and what this process has of the model."""
    trainer.save_checkpoint(path)
    found = torch.load(path, weights_only=True)
    module = trainer.lightning_module
    moments = trainer.optimizers[0].state.get(module.tables.entities, {}).values()
    return {
        "state_dict": dict(found["state_dict"]),
        "optimizer": found["optimizer_states"][0],
        "own": {name: value.clone() for name, value in module.state_dict().items()},
        "rows of moments": [len(value) for value in moments if value.ndim],
    }


def trained(folder, path, name="TransE", sharded=True, data_options=None, **options):
    """Three steps, or as many as are asked for."""
    ckpt_path = options.pop("ckpt_path", None)
    module = model(name, sharded)
    limits = {"max_epochs": 1, "limit_train_batches": 3 * options.get("accumulate_grad_batches", 1)}
    trainer = quiet_trainer(**({"limit_val_batches": 0} | PRECISE | limits | options))
    trainer.fit(module, datamodule=data(folder, **(data_options or {})), ckpt_path=ckpt_path)
    return content(trainer, path)


def evaluated(folder, name, sharded=True, counts=True, **options):
    """Scores of both evaluations, and the rank of each query of this process."""
    module = model(name, sharded)
    ranks = {}
    step = module.validation_step

    def noted(batch, batch_idx):
        found = step(batch, batch_idx)
        for place, row in enumerate(found["index"].tolist()):
            ranks[row] = tuple(found[key][place].item() for key in ("rank_method", "rank_unlinked") if key in found)
        return found

    module.validation_step = noted
    trainer = quiet_trainer(**options)
    queries = data(folder, query_counts=counts)
    scores = dict(trainer.validate(module, datamodule=queries, verbose=False)[0])
    return scores | trainer.test(module, datamodule=queries, verbose=False)[0], ranks


def answers(folder, name, count, sharded=True, **options):
    outputs = quiet_trainer(**options).predict(model(name, sharded, top_k=count), datamodule=data(folder))
    return {key: torch.cat([output[key] for output in outputs]) for key in outputs[0]}


# ---- on two processes

WANTED = (torch.tensor([[3, 28], [0, 3]]), torch.tensor([[14, 13, 14]]))  # of rank 0, of rank 1


def looked_up(rank):
    """Vectors of different numbers of entities, and the gradient of a sum that tells each of them apart."""
    torch.manual_seed(4)
    tables = ShardedEmbeddingTables(scoring("TransE", 6), E, RELATIONS)
    tables.spread(RowShare(E, rank, 2))
    relations = torch.zeros(WANTED[rank].shape, dtype=torch.int64)
    head, _, more = tables.look_up(WANTED[rank], relations, WANTED[rank][:0] if rank else WANTED[rank])
    factors = torch.arange(1.0, 1 + head.numel()).view_as(head)
    ((head * factors).sum() + more.square().sum()).backward()
    return head.detach(), tables.entities.detach(), tables.entities.grad


def whole_table_errors(rank):
    tables = ShardedEmbeddingTables(scoring("TransE", 6), E, RELATIONS)
    tables.spread(RowShare(E, rank, 2))
    found = []
    for call in (
        lambda: tables.tail_distances(torch.zeros(1, 6), torch.zeros(1, 6)),
        lambda: dict(tables.named_vectors()),
        lambda: tables.spread(RowShare(E)),
    ):
        with pytest.raises(RuntimeError) as error:
            call()
        found.append(str(error.value))
    return found


def on_a_rank(rank, folder, files):
    found = {"vectors": looked_up(rank), "whole": whole_table_errors(rank)}
    for name in NAMES:
        found[name] = {
            "sharded": trained(folder, f"{files}/{name}.ckpt", name, **PRECISE, **TWO_RANKS),
            "replicated": trained(folder, f"{files}/{name}-whole.ckpt", name, False, **PRECISE, **TWO_RANKS),
        }
    for kind in ("chunked", "per_triple"):
        options = {"data_options": {"negatives": kind, "chunk_size": 3}}
        found[kind] = trained(folder, f"{files}/{kind}.ckpt", **options, **TWO_RANKS)
    for kind in (True, False):
        options = {"sharded": kind, "data_options": {"use_weight": True}}
        found[f"weighted, {kind}"] = trained(folder, f"{files}/weighted-{kind}.ckpt", **options, **TWO_RANKS)
    found["clipped"] = trained(folder, f"{files}/clipped.ckpt", gradient_clip_val=0.05, **TWO_RANKS)
    found["scores"] = {name: evaluated(folder, name, **TWO_RANKS) for name in KINDS}
    found["scores without counts"] = evaluated(folder, "TransE", counts=False, **TWO_RANKS)
    sharded_ranking.SCORES = 40  # two queries at a time
    row_exchange.BLOCK = sharded_tables.BLOCK = 30  # five rows
    found["scores in blocks"] = evaluated(folder, "RotatE", **TWO_RANKS)
    found["answers"] = {count: answers(folder, "RotatE", count, **TWO_RANKS) for count in (5, 100)}
    found["first in blocks"] = trained(folder, f"{files}/blocks.ckpt", "HAKE", limit_train_batches=0, **TWO_RANKS)
    resumed = {"max_epochs": 2, **TWO_RANKS}
    for start in ("one", "two"):
        ckpt_path = f"{files}/first-{start}.ckpt"
        if start == "two":
            trained(folder, ckpt_path, **TWO_RANKS)
        found[f"from {start} to two"] = trained(folder, f"{files}/{start}.ckpt", ckpt_path=ckpt_path, **resumed)
    return found


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    work = tmp_path_factory.mktemp("sharded")
    folder = small_graph.write_graph(work / "graph")
    with (folder / "entities.dict").open("a") as file:
        file.write(f"{ENTITIES}\te{ENTITIES}\n")
    (work / "files").mkdir()
    trained(str(folder), f"{work}/files/first-one.ckpt", sharded=False, **ONE)
    return str(folder), f"{work}/files"


@pytest.fixture(scope="module")
def ranks(folders):
    return run_ranks(on_a_rank, 2, *folders, timeout=120.0)


def tensors(found):
    """All tensors of a checkpoint by place."""
    moments = {(row, key): value for row, own in found["optimizer"]["state"].items() for key, value in own.items()}
    return found["state_dict"] | moments


def same(found, expected, **tolerance):
    found, expected = tensors(found), tensors(expected)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert found[key].shape == value.shape, key
        assert torch.allclose(found[key], value, **({"rtol": 0, "atol": 1e-6} | tolerance)), key


def test_vectors_and_gradients_are_those_of_one_table(ranks):
    torch.manual_seed(4)
    table = EmbeddingTables(scoring("TransE", 6), E, RELATIONS).entities.detach().requires_grad_()
    loss = 0
    for rank, ids in enumerate(WANTED):
        head = embedding(ids, table)
        assert torch.equal(ranks[rank]["vectors"][0], head)
        loss = loss + (head * torch.arange(1.0, 1 + head.numel()).view_as(head)).sum() / 2
    (loss + embedding(WANTED[0], table).square().sum() / 2).backward()
    (_, first, first_gradient), (_, second, second_gradient) = (found["vectors"] for found in ranks)
    assert (len(first), len(second)) == (14, 15)
    assert torch.equal(torch.cat([first, second]), table)
    assert torch.allclose(torch.cat([first_gradient, second_gradient]), table.grad, rtol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_three_steps_and_their_file_are_those_of_one_process(ranks, folders, name, tmp_path):
    expected = trained(folders[0], tmp_path / "one.ckpt", name, sharded=False, **ONE)
    start = model(name, sharded=False).state_dict()
    assert (expected["state_dict"]["tables.entities"] - start["tables.entities"]).abs().max() > 0.1
    assert expected["optimizer"]["state"][0]["step"] == 3
    same(ranks[0][name]["sharded"], expected)
    same(ranks[0][name]["replicated"], expected)
    assert ranks[0][name]["sharded"]["optimizer"]["param_groups"] == expected["optimizer"]["param_groups"]


def test_moments_stay_spread_after_a_file_was_written(ranks):
    for found, rows in zip(ranks, (14, 15), strict=True):
        assert found["TransE"]["sharded"]["rows of moments"] == [rows, rows]


@pytest.mark.parametrize("kind", ["chunked", "per_triple"])
def test_steps_with_other_negatives(ranks, folders, kind, tmp_path):
    options = {"data_options": {"negatives": kind, "chunk_size": 3}}
    same(ranks[0][kind], trained(folders[0], tmp_path / "one.ckpt", sharded=False, **options, **ONE))


def test_weights_of_triples_count_over_both_ranks(ranks):
    same(ranks[0]["weighted, True"], ranks[0]["weighted, False"])


def test_gradients_are_clipped_by_the_norm_of_all_rows(ranks, folders, tmp_path):
    """Adam forgets a common factor, so its moments are looked at."""
    expected = trained(folders[0], tmp_path / "one.ckpt", sharded=False, gradient_clip_val=0.05, **ONE)
    free = trained(folders[0], tmp_path / "free.ckpt", sharded=False, **ONE)
    assert free["optimizer"]["state"][0]["exp_avg"].norm() > 1.2 * expected["optimizer"]["state"][0]["exp_avg"].norm()
    same(ranks[0]["clipped"], expected)


def test_relations_stay_the_same_on_both_ranks(ranks):
    for name in NAMES:
        first, second = (found[name]["sharded"]["own"] for found in ranks)
        assert first.keys() == second.keys()
        assert (len(first["tables.entities"]), len(second["tables.entities"])) == (14, 15)
        for key in first.keys() - {"tables.entities"}:
            assert torch.equal(first[key], second[key]), key


@pytest.mark.parametrize("name", KINDS)
def test_every_query_has_its_rank_once(ranks, folders, name):
    expected, by_row = evaluated(folders[0], name, sharded=False)
    assert expected["val/count"] == 2 * len(small_graph.triples()["valid"])
    assert len(set(by_row.values())) > 5
    together = {}
    for found in ranks:
        scores, own = found["scores"][name]
        assert scores == pytest.approx(expected, abs=1e-7, nan_ok=True)
        assert own
        assert not own.keys() & together.keys()
        together |= own
    assert together == by_row


def test_without_counts_the_control_is_left_out(ranks, folders):
    expected, by_row = evaluated(folders[0], "TransE", sharded=False)
    for scores, own in (found["scores without counts"] for found in ranks):
        assert scores == pytest.approx({key: value for key, value in expected.items() if "unlinked" not in key})
        assert own == {row: by_row[row][:1] for row in own}


def test_ranks_of_few_queries_at_a_time(ranks, folders):
    expected, by_row = evaluated(folders[0], "RotatE", sharded=False)
    for found in ranks:
        scores, own = found["scores in blocks"]
        assert scores == pytest.approx(expected, abs=1e-7, nan_ok=True)
        assert own.items() <= by_row.items()


@pytest.mark.parametrize("count", [5, 100])
def test_the_best_tails_are_those_of_one_table(ranks, folders, count):
    expected = answers(folders[0], "RotatE", count, sharded=False)
    assert expected["entities"].shape == (2 * len(small_graph.triples()["test"]), min(count, E))
    found = {key: torch.cat([own["answers"][count][key] for own in ranks]) for key in expected}
    order = found["index"].argsort()
    for key, value in expected.items():
        assert torch.equal(found[key][order], value) or torch.allclose(found[key][order], value, atol=1e-6), key


@pytest.mark.parametrize("start", ["one", "two"])
def test_a_resumed_run_on_two_processes_equals_one_that_went_on(ranks, folders, start, tmp_path):
    expected = trained(folders[0], tmp_path / "whole.ckpt", sharded=False, max_epochs=2, **ONE)
    assert expected["optimizer"]["state"][0]["step"] == 6
    same(ranks[0][f"from {start} to two"], expected)


@pytest.mark.parametrize("sharded", [True, False])
def test_a_run_of_two_processes_goes_on_with_one(ranks, folders, sharded, tmp_path):
    path = f"{folders[1]}/first-two.ckpt"
    found = trained(folders[0], tmp_path / "last.ckpt", sharded=sharded, ckpt_path=path, max_epochs=2, **ONE)
    same(found, trained(folders[0], tmp_path / "whole.ckpt", sharded=False, max_epochs=2, **ONE))


def test_ankge_takes_the_embeddings_of_such_a_file(ranks, folders):
    module = AnalogicalEmbedding(f"{folders[1]}/TransE.ckpt", None, E, RELATIONS)
    module.load_base(f"{folders[1]}/TransE.ckpt")
    expected = ranks[0]["TransE"]["sharded"]["state_dict"]["tables.entities"]
    assert torch.equal(module.tables.entities, expected.float())


# ---- in one process


@pytest.mark.parametrize("name", KINDS)
def test_first_values_are_those_of_a_replicated_table(name, monkeypatch):
    monkeypatch.setattr(sharded_tables, "BLOCK", 30)
    torch.manual_seed(8)
    expected = EmbeddingTables(scoring(name, 6), E, RELATIONS)
    parts = []
    for rank in range(3):
        torch.manual_seed(8)
        tables = ShardedEmbeddingTables(scoring(name, 6), E, RELATIONS)
        torch.rand(5)  # what is drawn before the trainer is there
        tables.spread(RowShare(E, rank, 3))
        assert torch.equal(tables.relations, expected.relations)
        parts.append(tables.entities)
    assert [len(part) for part in parts] == [9, 10, 10]
    assert torch.equal(torch.cat(parts), expected.entities)


def test_values_drawn_in_blocks_reach_two_processes(ranks):
    expected = model("HAKE", sharded=False).state_dict()
    found = ranks[0]["first in blocks"]["state_dict"]
    for key, value in expected.items():
        assert torch.equal(found[key], value.double()), key


def test_one_process_holds_the_whole_table_and_says_so(folders, tmp_path, capfd, caplog):
    with caplog.at_level("INFO"):
        found = trained(folders[0], tmp_path / "sharded.ckpt", **ONE)
    same(found, trained(folders[0], tmp_path / "whole.ckpt", sharded=False, **ONE), atol=0)
    assert "sharded: there is one process, which holds the whole entity table" in capfd.readouterr().err + caplog.text


def test_a_file_is_read_without_a_trainer(folders, tmp_path):
    expected = trained(folders[0], tmp_path / "last.ckpt")["state_dict"]["tables.entities"]
    found = KnowledgeGraphEmbedding.load_from_checkpoint(tmp_path / "last.ckpt", weights_only=True)
    assert isinstance(found.tables, ShardedEmbeddingTables)
    assert torch.equal(found.embedding_tables()["entities"], expected.float())
    other = model("TransE")
    other.load_state_dict(torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"])
    assert torch.equal(other.tables.entities, expected.float())


# ---- what a person may get wrong


class Processes:
    """What a module asks its trainer before training."""

    global_rank, world_size, precision, callbacks = 0, 2, "32-true", ()

    def __init__(self, strategy, **options):
        self.strategy = strategy
        for name, value in options.items():
            setattr(self, name, value)


@pytest.mark.parametrize(
    ("trainer", "message"),
    [
        (Processes(FSDPStrategy()), "the strategy is FSDPStrategy, which cannot spread"),
        (Processes(DDPStrategy(start_method="spawn")), "the strategy is DDPStrategy started by spawn, which cannot"),
        (Processes(DDPStrategy(), precision="16-mixed"), "set trainer.precision to bf16-mixed or 32"),
        (
            Processes(DDPStrategy(), callbacks=[WarmupWeightAveraging()]),
            "sharded: WarmupWeightAveraging would average the rows of one process alone",
        ),
        (Processes(DDPStrategy(), world_size=E + 1), f"{E} rows, which cannot be spread over {E + 1} processes"),
    ],
)
def test_trainers_that_cannot_spread_a_table(trainer, message):
    module = model("TransE")
    module._trainer = trainer
    with pytest.raises(ValueError, match=re.escape(message)):
        module.configure_model()


def test_whole_tables_that_no_process_holds(ranks):
    for found in ranks:
        distances, vectors, again = found["whole"]
        assert distances.startswith("distances from all entities: no process holds that")
        assert vectors.startswith("the whole table: no process holds that")
        assert again.startswith("the entities are spread over 2 processes already")


def test_entities_before_they_are_spread():
    with pytest.raises(RuntimeError, match="call spread"):
        model("TransE").tables.entity_vectors(torch.tensor([0]))


def test_a_file_of_other_entities(ranks):
    module = model("TransE")
    module.tables.spread(RowShare(E, 0, 2))
    with pytest.raises(ValueError, match=f"the checkpoint has 28 entities, but the model {E}"):
        module.on_load_checkpoint({"state_dict": {"tables.entities": torch.zeros(28, 6)}})


def test_a_query_without_an_answer_has_no_rank():
    tables = ShardedEmbeddingTables(scoring("TransE", 6), E, RELATIONS)
    batch = type("Batch", (), {"tails": torch.tensor([3, -1])})
    with pytest.raises(ValueError, match="-1 is no entity"):
        sharded_ranking.sharded_ranks(tables, batch, "realistic")
