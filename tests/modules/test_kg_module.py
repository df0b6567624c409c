"""Embeddings of a knowledge graph as a LightningModule: its loss, its ranks, its controls, its rate, its answers."""

import itertools
import math
from typing import NamedTuple

import pytest
import torch
from lightning.pytorch import Callback
from torch import Tensor

from modules.knowledge_graph import CATEGORIES, KnowledgeGraphEmbedding
from tests.modules import small_graph
from tests.modules.small_graph import BASES, ENTITIES, KINDS, RELATIONS, base_model, graph, scoring, with_reverses
from tests.modules.test_kg_losses import by_loops
from tests.modules.toy_images import quiet_trainer, silence


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return small_graph.write_graph(tmp_path_factory.mktemp("graph"))


def model(name="TransE", **options):
    """A model whose embeddings are without pattern, so that ranks are of all kinds."""
    found = base_model(name, **options)
    drawn = small_graph.tables(name, ENTITIES, RELATIONS, 6)
    found.tables.entities.data, found.tables.relations.data = drawn.entities, drawn.relations
    return found


def evaluated(module, data, stage="validate"):
    (scores,) = getattr(quiet_trainer(), stage)(module, datamodule=data, verbose=False)
    return scores


# ---- slow loops over the graph


def answers():
    """Right tails of each (head, relation) in all parts."""
    known = {}
    for part in ("train", "valid", "test"):
        for h, r, t in with_reverses(part):
            known.setdefault((h, r), set()).add(t)
    return known


def linked():
    """Entities that training links a head to, whatever the relation."""
    found = {}
    for h, _, t in with_reverses("train"):
        found.setdefault(h, set()).add(t)
    return found


def ranks_by_loops(module, part="valid", unlinked=False):
    distances, known, links = small_graph.all_distances(module.tables), answers(), linked()
    found = []
    for h, r, t in with_reverses(part):
        scores = (-distances[h, r]).tolist()
        if unlinked:
            scores = [-math.inf if entity in links.get(h, ()) else score for entity, score in enumerate(scores)]
        found.append(small_graph.rank(scores, t, known[h, r]))
    return found


def means(ranks):
    count = len(ranks)
    values = {"mrr": sum(1 / rank for rank in ranks) / count, "mean_rank": sum(ranks) / count, "count": count}
    return values | {f"hits@{k}": sum(rank <= k for rank in ranks) / count for k in (1, 3, 10)}


def categories():
    """1-1, 1-N, N-1 or N-N of each relation: 1.5 tails a head or more is N."""
    found = []
    for relation in range(RELATIONS):
        pairs = [(h, t) for h, r, t in small_graph.triples()["train"] if r == relation]
        sides = ["N" if len(pairs) / len({pair[side] for pair in pairs}) >= 1.5 else "1" for side in (1, 0)]
        found.append("-".join(sides))
    return found


@pytest.mark.parametrize("name", KINDS)
def test_metrics_are_those_of_slow_loops(folder, name):
    module = model(name)
    scores = evaluated(module, graph(folder))
    ranks, queries = ranks_by_loops(module), with_reverses("valid")
    assert scores["val/count"] == 2 * len(small_graph.triples()["valid"])
    assert len(set(ranks)) > 5
    for key, value in means(ranks).items():
        assert scores[f"val/{key}"] == pytest.approx(value, rel=1e-6), key
    assert scores["val/main"] == scores["val/mrr"]
    groups = {"tail": [r < RELATIONS for _, r, _ in queries], "head": [r >= RELATIONS for _, r, _ in queries]}
    groups |= {kind: [categories()[r % RELATIONS] == kind for _, r, _ in queries] for kind in CATEGORIES}
    for group, members in groups.items():
        own = [rank for rank, member in zip(ranks, members, strict=True) if member]
        assert scores.get(f"val/{group}/count", 0) == len(own)
        for key, value in (means(own) if own else {}).items():
            assert scores[f"val/{group}/{key}"] == pytest.approx(value, rel=1e-6), (group, key)
    assert {"1-1", "N-1"} == set(categories())
    for key, value in means(ranks_by_loops(module, unlinked=True)).items():
        if key not in ("mean_rank", "count"):
            assert scores[f"val/unlinked/{key}"] == pytest.approx(value, rel=1e-6), key
    assert scores["val/unlinked/mrr"] != scores["val/mrr"]


def test_without_counts_the_control_is_left_out(folder):
    module = model()
    scores = evaluated(module, graph(folder, query_counts=False))
    expected = evaluated(module, graph(folder))
    left_out = {key for key in expected if "unlinked" in key}
    assert left_out
    assert scores == {key: value for key, value in expected.items() if key not in left_out}


def test_the_test_has_its_own_metrics(folder):
    module = model("RotatE")
    scores = evaluated(module, graph(folder), "test")
    for key, value in means(ranks_by_loops(module, "test")).items():
        assert scores[f"test/{key}"] == pytest.approx(value, rel=1e-6), key
    assert not any(key.startswith("val") for key in scores)
    ranks, queries = ranks_by_loops(module, "test"), with_reverses("test")
    for side, kind in itertools.product(("tail", "head"), CATEGORIES):
        own = [
            rank
            for rank, (_, r, _) in zip(ranks, queries, strict=True)
            if categories()[r % RELATIONS] == kind and (r >= RELATIONS) == (side == "head")
        ]
        assert scores.get(f"test/{side}/{kind}/count", 0) == len(own)
        for key, value in (means(own) if own else {}).items():
            assert scores[f"test/{side}/{kind}/{key}"] == pytest.approx(value, rel=1e-6), (side, kind, key)
    assert f"test/head/{categories()[0]}/mrr" in scores


def test_ranks_of_each_query_are_returned(folder):
    module, data = model(), graph(folder)
    data.setup("validate")
    expected, unlinked = ranks_by_loops(module), ranks_by_loops(module, unlinked=True)
    seen = []
    for batch in data.val_dataloader():
        rows = silence(module).validation_step(batch, 0)
        seen += rows["index"].tolist()
        assert rows["rank_method"].tolist() == [expected[row] for row in rows["index"]]
        assert rows["rank_unlinked"].tolist() == [unlinked[row] for row in rows["index"]]
        assert rows["relations"].tolist() == [with_reverses("valid")[row][1] for row in rows["index"]]
    assert seen == list(range(22))


def test_a_linked_target_comes_last_in_the_control(folder):
    """A validation triple whose head and tail training links by relation 4 or 0 as well."""
    module, queries, links = model(), with_reverses("valid"), linked()
    ranks = ranks_by_loops(module, unlinked=True)
    places = [place for place, (h, _, t) in enumerate(queries) if t in links[h]]
    assert places
    for place in places:
        h, r, _ = queries[place]
        others = set(range(ENTITIES)) - answers()[h, r]
        unlinked_others = others - links[h]
        assert ranks[place] == 1 + len(unlinked_others) + (len(others) - len(unlinked_others)) / 2


@pytest.mark.parametrize(("ties", "place"), [("realistic", 0.5), ("optimistic", 0.0), ("pessimistic", 1.0)])
def test_a_model_that_knows_nothing_ranks_by_the_rule_for_ties(folder, ties, place):
    module = model(ties=ties)
    module.tables.entities.data.zero_()
    known = answers()
    expected = [1 + place * (ENTITIES - len(known[h, r])) for h, r, _ in with_reverses("valid")]
    assert evaluated(module, graph(folder))["val/mean_rank"] == pytest.approx(sum(expected) / len(expected))


# ---- training


class Batch(NamedTuple):
    heads: Tensor
    relations: Tensor
    tails: Tensor
    negatives: Tensor
    excluded: Tensor
    weights: Tensor


def loss_by_loops(module, batch, temperature):
    function, tables = module.tables.scoring, module.tables
    entities, relations = small_graph.rows(tables.entities), small_graph.rows(tables.relations)
    size = -(-len(batch.heads) // len(batch.negatives)) if batch.negatives.ndim == 2 else None
    positive, negative = [], []
    for row, (h, r, t) in enumerate(zip(*(part.tolist() for part in batch[:3]), strict=True)):
        own = batch.negatives if size is None else batch.negatives[row // size]
        positive.append(function.margin - small_graph.distance(function, entities[h], relations[r], entities[t]))
        negative.append(
            [function.margin - small_graph.distance(function, entities[h], relations[r], entities[e]) for e in own]
        )
    return by_loops(torch.tensor(positive), torch.tensor(negative), temperature, batch.excluded, batch.weights)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("negatives", ["shared", "chunked", "per_triple"])
@pytest.mark.parametrize("use_weight", [False, True])
def test_loss_of_a_step_is_that_of_loops(folder, name, negatives, use_weight):
    options = {"negatives": negatives, "num_negatives": 9, "chunk_size": 12, "use_weight": use_weight}
    data = graph(folder, **options)
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    assert (len(set(batch.weights.tolist())) > 1) == use_weight
    assert {"shared": 1, "chunked": 3, "per_triple": 32}[negatives] == (
        1 if batch.negatives.ndim == 1 else len(batch.negatives)
    )
    module = silence(model(name, adversarial_temperature=0.5))
    expected = loss_by_loops(module, batch, 0.5)
    assert module.training_step(batch, 0).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("name", "gain"), [("RotatE", 0.2), ("TransE", 0.05)])  # steps on a ring are turns
def test_a_short_training_improves_the_ranks(folder, name, gain):
    data = graph(folder, seed=0)
    module = base_model(name, 16, lr=0.05)
    before = evaluated(module, data)["val/mrr"]
    quiet_trainer(max_epochs=20, limit_val_batches=0).fit(module, datamodule=data)
    after = evaluated(module, data)["val/mrr"]
    assert after > before + gain


class Rates(Callback):
    def __init__(self):
        self.rates = []

    def on_train_batch_start(self, trainer, *_):
        self.rates.append((trainer.current_epoch, trainer.optimizers[0].param_groups[0]["lr"]))


@pytest.mark.parametrize(
    ("milestones", "epochs", "expected"),
    [
        (None, 4, [1, 1, 0.1, 0.1]),
        (None, 5, [1, 1, 0.1, 0.1, 0.1]),
        (None, 1, [1]),
        ([1, 3], 4, [1, 0.1, 0.1, 0.01]),
        ([], 3, [1, 1, 1]),
    ],
)
def test_the_rate_drops_at_half_the_epochs_or_at_milestones(folder, milestones, epochs, expected):
    rates = Rates()
    trainer = quiet_trainer(max_epochs=epochs, limit_val_batches=0, limit_train_batches=2, callbacks=[rates])
    trainer.fit(base_model(lr=0.01, lr_milestones=milestones), datamodule=graph(folder))
    assert dict(rates.rates) == pytest.approx({epoch: 0.01 * value for epoch, value in enumerate(expected)})


def test_batches_without_negatives_are_refused(folder):
    with pytest.raises(ValueError, match=r"have no negatives to learn from; set --data\.objective links"):
        quiet_trainer().fit(model(), datamodule=graph(folder, objective="analogies"))


def test_all_parameters_are_trained(folder):
    module = base_model("HAKE")
    before = {name: value.detach().clone() for name, value in module.named_parameters()}
    quiet_trainer(limit_val_batches=0).fit(module, datamodule=graph(folder))
    assert set(before) == {
        f"tables.{k}" for k in ("entities", "relations", "scoring.phase_weight", "scoring.modulus_weight")
    }
    for name, value in module.named_parameters():
        assert not torch.equal(value, before[name]), name


def test_a_resumed_training_equals_one_that_went_on(folder, tmp_path):
    """The negatives, the order and the rate are functions of the epoch."""

    def trained(epochs, **fit_options):
        module = base_model("RotatE", lr=0.01, lr_milestones=[1])
        trainer = quiet_trainer(max_epochs=epochs, limit_val_batches=0)
        trainer.fit(module, datamodule=graph(folder, seed=3), **fit_options)
        trainer.save_checkpoint(tmp_path / "last.ckpt")
        return module

    whole = trained(4)
    half = trained(2)
    resumed = trained(4, ckpt_path=tmp_path / "last.ckpt")
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    assert not torch.equal(whole.tables.entities, half.tables.entities)


def test_checkpoints_hold_plain_values_and_say_how_to_build_the_model(folder, tmp_path):
    module = base_model("HAKE", graph_hash="abc", lr=0.01)
    trainer = quiet_trainer(limit_val_batches=0)
    trainer.fit(module, datamodule=graph(folder))
    trainer.save_checkpoint(tmp_path / "base.ckpt")
    content = torch.load(tmp_path / "base.ckpt", weights_only=True)
    options = content["hyper_parameters"]
    assert options["scoring"] == module.tables.scoring.describe()
    assert (options["num_entities"], options["num_relations"], options["graph_hash"]) == (ENTITIES, RELATIONS, "abc")
    other = KnowledgeGraphEmbedding.load_from_checkpoint(tmp_path / "base.ckpt", weights_only=True)
    assert other.state_dict().keys() == module.state_dict().keys()
    for name, value in module.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name


@pytest.mark.parametrize("name", BASES)
def test_tables_for_export(name):
    module = model(name)
    found = module.embedding_tables()
    assert {key: tuple(value.shape) for key, value in found.items()} == {
        "entities": (ENTITIES, module.tables.scoring.entity_width),
        "relations": (2 * RELATIONS, module.tables.scoring.relation_width),
    }
    assert not any(value.requires_grad for value in found.values())
    assert torch.equal(found["entities"], module.tables.entities)


# ---- answers


def predicted(module, data):
    outputs = quiet_trainer().predict(module, datamodule=data)
    return {key: torch.cat([output[key] for output in outputs]) for key in outputs[0]}


def check_answers(module, found, queries, top_k):
    distances, known = small_graph.all_distances(module.tables), answers()
    for row, place in enumerate(found["index"].tolist()):
        h, r, _ = queries[place]
        order = sorted(range(ENTITIES), key=lambda entity: distances[h, r, entity])[:top_k]
        assert found["entities"][row].tolist() == order
        assert found["scores"][row].tolist() == pytest.approx([-distances[h, r, e] for e in order], rel=1e-5, abs=1e-5)
        assert found["known"][row].tolist() == [e in known.get((h, r), ()) for e in order]


def test_the_best_tails_of_the_queries_of_a_part(folder):
    """What is known includes the right answer of the query itself."""
    module = model(top_k=6)
    found = predicted(module, graph(folder, predict_split="test"))
    queries = with_reverses("test")
    assert found["index"].tolist() == list(range(len(queries)))
    check_answers(module, found, queries, 6)
    own = [t in row for (_, _, t), row in zip(queries, found["entities"].tolist(), strict=True)]
    assert any(own)


def test_the_best_tails_of_queries_of_a_file(folder, tmp_path):
    path = tmp_path / "queries.csv"
    path.write_text("head,relation,tail\ne03,r1,\n,r3,e25\n")
    module = model("PairRE", top_k=100)
    found = predicted(module, graph(folder, predict_path=str(path)))
    assert found["entities"].shape == (2, ENTITIES)
    check_answers(module, found, [(3, 1, -1), (25, 3 + RELATIONS, -1)], ENTITIES)


# ---- what a person may get wrong


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_entities": 0}, "num_entities is 0 and num_relations 5, expected 1 or more of each"),
        ({"num_relations": 0}, "num_entities is 28 and num_relations 0"),
        ({"adversarial_temperature": -1.0}, "adversarial_temperature is -1.0, expected 0 or more"),
        ({"lr": 0.0}, "lr is 0.0, expected above 0"),
        ({"top_k": 0}, "top_k is 0, expected 1 or more"),
        ({"ties": "best"}, "ties: 'best', expected one of"),
        ({"scoring": {"class_path": "modules.knowledge_graph.TransF"}}, "makes no score function"),
    ],
)
def test_options_out_of_range(options, message):
    defaults = {"scoring": scoring("TransE"), "num_entities": ENTITIES, "num_relations": RELATIONS}
    with pytest.raises(ValueError, match=message):
        KnowledgeGraphEmbedding(**(defaults | options))
