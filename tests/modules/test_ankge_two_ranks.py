"""Embeddings and AnKGE on two gloo ranks: the steps, metrics and analogical objects of one process."""

from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader

from callbacks import AnalogyRetriever, FrozenParameters, analogy_retriever
from modules.ankge import AnalogicalEmbedding, retriever
from modules.knowledge_graph import KnowledgeGraphEmbedding
from tests.distributed import run_ranks
from tests.modules import small_graph
from tests.modules.small_graph import ENTITIES, RELATIONS, graph, scoring, with_reverses
from tests.modules.test_kg_module import Batch
from tests.modules.toy_images import quiet_trainer

TWO_RANKS = {"strategy": "ddp", "devices": 2, "use_distributed_sampler": False}
NAMES = ("TransE", "HAKE")
FEW = {"pairs": 3, "candidate_entities": 6, "candidate_relations": 4}
GRID = [[0.5, 0.0], [0.0, 0.2, 1.0], [0.0, 0.4]]


class PlainBase(KnowledgeGraphEmbedding):
    """Adam divides by the size of a gradient, so that a difference of rounding may become one of the whole rate."""

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.5)


class PlainAnalogies(AnalogicalEmbedding):
    def configure_optimizers(self):
        super().configure_optimizers()
        return torch.optim.SGD(self.analogies.parameters(), lr=0.5)


def patterned(module, name):
    drawn = small_graph.tables(name, ENTITIES, RELATIONS, 6)
    module.tables.entities.data, module.tables.relations.data = drawn.entities, drawn.relations
    return module


def base(name):
    return patterned(PlainBase(scoring(name, 6), ENTITIES, RELATIONS), name)


def analogies(name, **options):
    torch.manual_seed(3)
    return patterned(PlainAnalogies(None, scoring(name, 6), ENTITIES, RELATIONS, **(FEW | options)), name)


def state(module):
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def trained_base(folder, name, **options):
    module = base(name)
    data = graph(folder, seed=0, batch_size=16, num_negatives=9)
    quiet_trainer(limit_val_batches=0, **options).fit(module, datamodule=data)
    return state(module)


def trained_analogies(folder, name, **options):
    module = analogies(name, strength=1.0, level_grid=GRID, regularization=1e-3)
    data = graph(folder, objective="analogies", seed=0, batch_size=16, drop_last=True)
    callbacks = [AnalogyRetriever(cache=False, progress=False), FrozenParameters()]
    trainer = quiet_trainer(callbacks=callbacks, **options)
    trainer.fit(module, datamodule=data)
    scores = {key: value.item() for key, value in trainer.callback_metrics.items() if key.startswith("val/")}
    return state(module), tuple(module.neighbours), scores


def halves():
    """Two batches of triples of very different weights, each triple with its own negatives."""
    generator = torch.Generator().manual_seed(5)

    def ids(below, *shape):
        return torch.randint(below, shape, generator=generator)

    for weight in (1.0, 9.0):
        heads, relations, tails = ids(ENTITIES, 8), ids(2 * RELATIONS, 8), ids(ENTITIES, 8)
        weights = weight * torch.rand(8, generator=generator)
        excluded = torch.rand(8, 5, generator=generator) < 0.2
        yield Batch(heads, relations, tails, ids(ENTITIES, 8, 5), excluded, weights)


def one_step(batches, **options):
    module = base("TransE")
    quiet_trainer(limit_val_batches=0, **options).fit(module, DataLoader(batches, batch_size=None))
    return state(module)


class Triples(NamedTuple):
    heads: Tensor
    relations: Tensor
    tails: Tensor
    index: Tensor


def unequal_parts():
    """Batches of 11 and of 3 triples, as the last ones of an epoch may be."""
    triples = torch.tensor(with_reverses("train"))
    for rows in (torch.arange(11), torch.arange(20, 23)):
        yield Triples(*triples[rows].T, rows)


def one_step_of_analogies(folder, batches, **options):
    module = analogies("TransE", strength=1.0)
    data = graph(folder, objective="analogies")
    module.set_neighbours(
        retriever.retrieve(module.tables, torch.as_tensor(data.train_triples), module.settings.clipped(ENTITIES, 10))
    )
    quiet_trainer(limit_val_batches=0, **options).fit(module, DataLoader(batches, batch_size=None))
    return state(module)


def evaluated(module, folder, **options):
    trainer = quiet_trainer(**options)
    data = graph(folder)
    found = {}
    for run in (trainer.validate, trainer.test):
        found |= run(module, datamodule=data, verbose=False)[0]
    return found


def looked_up_in_parts(folder, cached):
    """What a look-up does where an earlier one was cut off, how long its ranks wait for each other, and its result."""
    original, done, patience = retriever.retrieve, [], []
    gather = dist.all_gather_object

    def spy(tables, triples, *args):
        done.append(len(triples))
        return original(tables, triples, *args)

    def timed(values, value, group=None):
        patience.append((group or dist.group.WORLD)._get_backend(torch.device("cpu")).options._timeout)
        gather(values, value, group)

    analogy_retriever.SMALLEST, retriever.retrieve, dist.all_gather_object = 16, spy, timed
    try:
        module = analogies("HAKE")
        callback = AnalogyRetriever(cache=cached, progress=False)
        trainer = quiet_trainer(callbacks=[callback], limit_val_batches=0, limit_train_batches=1, **TWO_RANKS)
        trainer.fit(module, datamodule=graph(folder, objective="analogies"))
    finally:
        analogy_retriever.SMALLEST, retriever.retrieve, dist.all_gather_object = 256, original, gather
    return done, patience, tuple(module.neighbours)


def on_a_rank(rank, folder, cached, cut_off):
    found = {
        "base": {name: trained_base(folder, name, **TWO_RANKS) for name in NAMES},
        "analogies": {name: trained_analogies(folder, name, **TWO_RANKS) for name in NAMES},
        "weighted": one_step([list(halves())[rank]], **TWO_RANKS),
        "unequal": one_step_of_analogies(folder, [list(unequal_parts())[rank]], **TWO_RANKS),
        "scores": evaluated(base("TransE"), folder, **TWO_RANKS),
        "scores of a grid": evaluated(analogies("HAKE", level_grid=GRID), folder, **TWO_RANKS),
    }
    files = []
    for _ in range(2):
        module = analogies("TransE")
        callback = AnalogyRetriever(cache=cached, progress=False)
        trainer = quiet_trainer(callbacks=[callback], limit_val_batches=0, limit_train_batches=1, **TWO_RANKS)
        trainer.fit(module, datamodule=graph(folder, objective="analogies"))
        files.append(tuple(module.neighbours))
    return found | {"cached": files, "parts": looked_up_in_parts(folder, cut_off)}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    work = tmp_path_factory.mktemp("two ranks")
    return str(small_graph.write_graph(work / "graph")), str(work / "kept"), str(work / "cut off")


@pytest.fixture(scope="module")
def ranks(folders):
    with pytest.MonkeyPatch.context() as patched:
        cut_off_in_the_third_block(patched, folders[0], folders[2])
    return run_ranks(on_a_rank, 2, *folders, timeout=180)


def cut_off_in_the_third_block(patched, folder, cached):
    original, calls = retriever.retrieve, []

    def two(*args):
        calls.append(args)
        if len(calls) > 2:
            raise KeyboardInterrupt
        return original(*args)

    patched.setattr(retriever, "retrieve", two)
    patched.setattr(analogy_retriever, "SMALLEST", 16)
    trainer = SimpleNamespace(
        datamodule=graph(folder, objective="analogies"),
        world_size=1,
        global_rank=0,
        is_global_zero=True,
        default_root_dir=cached,
    )
    with pytest.raises(KeyboardInterrupt):
        AnalogyRetriever(cache=cached, progress=False).on_fit_start(trainer, analogies("HAKE"))


def same(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.allclose(found[name], value, atol=1e-5), name


@pytest.mark.parametrize("name", NAMES)
def test_the_base_takes_the_steps_of_two_accumulated_batches(ranks, folders, name):
    expected, start = trained_base(folders[0], name, accumulate_grad_batches=2), state(base(name))
    assert max((value - start[key]).abs().max() for key, value in expected.items()) > 1e-2
    for found in ranks:
        same(found["base"][name], expected)


def test_weights_of_triples_count_over_both_ranks(ranks):
    """A step is that of one batch of all triples, which is not the mean of the losses of its halves."""
    whole = Batch(*(torch.cat(parts) for parts in zip(*halves(), strict=True)))
    expected = one_step([whole])
    accumulated = one_step(list(halves()), accumulate_grad_batches=2)
    assert (expected["tables.entities"] - accumulated["tables.entities"]).abs().max() > 1e-3
    for found in ranks:
        same(found["weighted"], expected)


def test_analogies_of_unequal_batches_count_by_their_triples(ranks, folders):
    whole = Triples(*(torch.cat(parts) for parts in zip(*unequal_parts(), strict=True)))
    expected = one_step_of_analogies(folders[0], [whole])
    accumulated = one_step_of_analogies(folders[0], list(unequal_parts()), accumulate_grad_batches=2)
    assert (expected["analogies.entities"] - accumulated["analogies.entities"]).abs().max() > 1e-3
    for found in ranks:
        same(found["unequal"], expected)


@pytest.mark.parametrize("name", NAMES)
def test_analogies_take_the_steps_of_two_accumulated_batches(ranks, folders, name):
    expected, neighbours, scores = trained_analogies(folders[0], name, accumulate_grad_batches=2)
    start = state(analogies(name, level_grid=GRID))
    assert max((value - start[key]).abs().max() for key, value in expected.items()) > 1e-2
    for found in ranks:
        weights, own_neighbours, own_scores = found["analogies"][name]
        same(weights, expected)
        for own, other in zip(own_neighbours, neighbours, strict=True):
            assert torch.equal(own, other) if own.dtype == torch.int64 else torch.allclose(own, other, atol=1e-5)
        assert own_scores == pytest.approx(scores, abs=1e-6, nan_ok=True)
    first, second = (found["analogies"][name] for found in ranks)
    for key, value in first[0].items():
        assert torch.equal(value, second[0][key]), key


@pytest.mark.parametrize("kind", ["scores", "scores of a grid"])
def test_metrics_of_the_same_weights_are_those_of_one_process(ranks, folders, kind):
    module = base("TransE") if kind == "scores" else analogies("HAKE", level_grid=GRID)
    expected = evaluated(module, folders[0])
    assert expected["val/count"] == 2 * len(small_graph.triples()["valid"])
    assert expected["test/count"] == 2 * len(small_graph.triples()["test"])
    for found in ranks:
        assert found[kind] == pytest.approx(expected, abs=1e-7, nan_ok=True)


def test_two_ranks_go_on_with_what_one_had_looked_up_and_wait_for_each_other(ranks, folders):
    """Of 168 triples in blocks of 16 the first two are there; the other nine are shared."""
    assert len(with_reverses("train")) == 168
    assert [found["parts"][0] for found in ranks] == [[16] * 5, [16, 16, 16, 8]]
    module = analogies("HAKE")
    module_data = graph(folders[0], objective="analogies")
    expected = retriever.retrieve(module.tables, torch.as_tensor(module_data.train_triples), module.settings)
    for _, patience, neighbours in (found["parts"] for found in ranks):
        assert [wait.days for wait in patience] == [0, 30, 30], "the first asks whether there is a file"
        for own, other in zip(neighbours, expected, strict=True):
            assert torch.equal(own, other) if own.dtype == torch.int64 else torch.allclose(own, other)
    (file,) = Path(folders[2]).iterdir()
    assert file.suffix == ".pt"


def test_one_file_keeps_the_analogical_objects_of_both_ranks(ranks, folders, tmp_path):
    module = analogies("TransE")
    trainer = quiet_trainer(
        callbacks=[AnalogyRetriever(cache=folders[1], progress=False)], limit_val_batches=0, limit_train_batches=1
    )
    before = [path.name for path in sorted((tmp_path / folders[1]).iterdir())]
    assert len(before) == 1
    trainer.fit(module, datamodule=graph(folders[0], objective="analogies"))
    assert [path.name for path in sorted((tmp_path / folders[1]).iterdir())] == before
    for found in ranks:
        for neighbours in found["cached"]:
            assert all(map(torch.equal, neighbours, module.neighbours))
