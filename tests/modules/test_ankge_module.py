"""AnKGE as a LightningModule: losses, scores, controls, the choice of weights, and what it takes of its base."""

import math
import re
import warnings
from itertools import product

import pytest
import torch
from lightning.pytorch import Callback

from callbacks import AnalogyRetriever, FrozenParameters
from modules.ankge import LEVELS, AnalogicalEmbedding, RetrievalSettings, retrieve
from modules.knowledge_graph import EmbeddingTables, KnowledgeGraphEmbedding
from tests.modules import small_graph
from tests.modules.small_graph import BASES, ENTITIES, RELATIONS, base_model, graph, scoring, with_reverses
from tests.modules.test_ankge_analogy import length, logit, minus_log_sigmoid, weighted_mean
from tests.modules.test_ankge_retriever import by_brute_force
from tests.modules.test_kg_module import answers, linked, means, predicted
from tests.modules.toy_images import quiet_trainer, silence

SIZES = {"num_entities": ENTITIES, "num_relations": RELATIONS}
FEW = {"pairs": 3, "candidate_entities": 6, "candidate_relations": 4}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return small_graph.write_graph(tmp_path_factory.mktemp("graph"))


@pytest.fixture(scope="module")
def bases(folder, tmp_path_factory):
    """A checkpoint of each model after a few epochs."""
    paths = {}
    for name in BASES:
        data = graph(folder)
        module = base_model(name, lr=0.05, graph_hash=data.graph_hash, train_hash=data.train_hash)
        trainer = quiet_trainer(max_epochs=5, limit_val_batches=0)
        trainer.fit(module, datamodule=graph(folder, seed=0))
        paths[name] = tmp_path_factory.mktemp(name) / "checkpoints" / "best.ckpt"
        trainer.save_checkpoint(paths[name])
    return paths


def ankge(base=None, seed=1, **options):
    torch.manual_seed(seed)
    return AnalogicalEmbedding(str(base) if base else None, **(SIZES | FEW | options))


def on_base(bases, name="TransE", **options):
    """A module with its base, and analogies far enough from the triples to be told from them."""
    module = ankge(bases[name], **options)
    module.load_base(bases[name])
    with torch.no_grad():
        for parameter in module.analogies.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)), alpha=0.3)
    return module


def analogies(folder, **options):
    """The datamodule for this stage."""
    return graph(folder, objective="analogies", seed=0, **options)


def trainer_of(callbacks=(), **options):
    return quiet_trainer(callbacks=[AnalogyRetriever(cache=False, progress=False), *callbacks], **options)


# ---- loops from sections 3 and 4


def made_by_loops(module, h, r):
    """h_a and r_a."""
    entities, relations = small_graph.rows(module.tables.entities), small_graph.rows(module.tables.relations)
    functions = module.analogies
    of_entities, of_relations = small_graph.rows(functions.entities), small_graph.rows(functions.relations)
    projection = small_graph.rows(functions.projection)
    relation = [a * b for a, b in zip(relations[r], of_relations[r], strict=True)]
    added = [sum(relation[i] * row[j] for i, row in enumerate(projection)) for j in range(len(projection[0]))]
    head = [a * b + module.hparams.transfer * c for a, b, c in zip(entities[h], of_entities[h], added, strict=True)]
    return head, relation


def losses_by_loops(module, triples, neighbours):
    """Losses and shares of each triple and level."""
    function, options = module.tables.scoring, module.hparams
    entities, relations = small_graph.rows(module.tables.entities), small_graph.rows(module.tables.relations)

    def d(head, relation, tail):
        return small_graph.distance(function, head, relation, tail)

    losses, shares = [], []
    for row, (h, r, t) in enumerate(triples):
        head, relation, tail = entities[h], relations[r], entities[t]
        one = [part[row].tolist() for part in neighbours]
        best_head, best_relation = weighted_mean(entities, one[0], one[1]), weighted_mean(relations, one[2], one[3])
        pair = weighted_mean(entities, one[4], one[6]), weighted_mean(relations, one[5], one[6])
        own_head, own_relation = made_by_loops(module, h, r)
        composed = [small_graph.composition(function, *both) for both in ((own_head, own_relation), pair)]
        levels = (
            (own_head, best_head, d(own_head, relation, tail)),
            (own_relation, best_relation, d(head, own_relation, tail)),
            (*composed, d(own_head, own_relation, tail)),
        )
        losses.append([minus_log_sigmoid(logit(options.similarity, *level, options.strength)) for level in levels])
        entries = [d(best_head, relation, tail), d(head, best_relation, tail), d(*pair, tail)]
        entries += [d(head, relation, tail)] if options.share_of_base else []
        if options.shares == "one_hot":
            beta = [float(entry == min(entries)) for entry in entries]
        else:
            beta = [math.exp(-entry) / sum(math.exp(-other) for other in entries) for entry in entries]
        shares.append([beta[x] if level in options.levels else 0.0 for x, level in enumerate(LEVELS)])
    return losses, shares


def loss_by_loops(module, triples, neighbours):
    losses, shares = losses_by_loops(module, triples, neighbours)
    count = len(losses)
    if module.hparams.share_mode == "triple":
        loss = sum(a * b for own, beta in zip(losses, shares, strict=True) for a, b in zip(own, beta, strict=True))
        loss /= count
    else:
        loss = sum(sum(own[x] for own in losses) / count * sum(beta[x] for beta in shares) / count for x in range(3))
    cubes = sum(abs(v) ** 3 for part in module.analogies.parameters() for row in part.tolist() for v in row)
    return loss + module.hparams.regularization * cubes


def counts():
    """How many training triples, reverses too, have (r, t), (h, t) and t: dictionaries of sets."""
    of_relation, of_head, of_tail = {}, {}, {}
    for h, r, t in with_reverses("train"):
        of_relation.setdefault((r, t), set()).add(h)
        of_head.setdefault((h, t), set()).add(r)
        of_tail.setdefault(t, set()).add((h, r))
    return of_relation, of_head, of_tail


def parts_by_loops(module, h, r, identity=False):
    """g of all tails, and w g of the analogies at each level: (E,) and (3, E)."""
    function, options = module.tables.scoring, module.hparams
    entities, relations = small_graph.rows(module.tables.entities), small_graph.rows(module.tables.relations)
    head, relation = entities[h], relations[r]
    own_head, own_relation = (head, relation) if identity else made_by_loops(module, h, r)
    offset = function.margin if options.score_offset == "margin" else 0.0
    of_relation, of_head, of_tail = counts()
    base, levels = [], []
    for t, tail in enumerate(entities):
        base.append(offset - small_graph.distance(function, head, relation, tail))
        given = ((own_head, relation), (head, own_relation), (own_head, own_relation))
        g = [offset - small_graph.distance(function, *pair, tail) for pair in given]
        w = [
            min(len(of_relation.get((r, t), ())) / options.entities, 1.0),
            min(len(of_head.get((h, t), ())) / options.relations, 1.0),
            min(len(of_tail.get(t, ())) / options.pairs, 1.0),
        ]
        levels.append([b * a if options.adaptive_weights else a for a, b in zip(g, w, strict=True)])
    return base, list(zip(*levels, strict=True))


def scores_by_loops(base, levels, lambdas):
    return [g + sum(lam * level[t] for lam, level in zip(lambdas, levels, strict=True)) for t, g in enumerate(base)]


def used(module, lambdas):
    return [lam if level in module.hparams.levels else 0.0 for lam, level in zip(lambdas, LEVELS, strict=True)]


def ranks_by_loops(module, part, identity=False, lambdas=(0.0, 0.0, 0.0), without_links=False):
    known, links, found = answers(), linked(), []
    for h, r, t in with_reverses(part):
        scores = scores_by_loops(*parts_by_loops(module, h, r, identity), lambdas)
        if without_links:
            scores = [-math.inf if entity in links[h] else score for entity, score in enumerate(scores)]
        found.append(small_graph.rank(scores, t, known[h, r]))
    return found


# ---- losses


def batch_of(folder, **options):
    data = analogies(folder, **options)
    data.setup("fit")
    return data, next(iter(data.train_dataloader()))


OPTIONS = [
    {},
    {"share_mode": "batch_mean"},
    {"shares": "one_hot", "strength": 2.0, "exclude_original": True},  # a level that is the triple itself is a tie
    {"share_of_base": False, "strength": 0.0, "transfer": 0.0},
    {"similarity": "cos", "strength": 2.0},
    {"similarity": "cos_official", "strength": 2.0},
    {"entities": 3, "relations": 2, "pairs": 4, "strength": 1.0},
    {"levels": ["relation"], "strength": 1.0},
    {"levels": ["entity", "triple"], "share_mode": "batch_mean", "regularization": 1e-2},
]


def slope(parameter, place, loss, step=1e-6):
    """Of a loss, by a small step up and down of one number of a parameter."""
    found, value = [], parameter.data[place].item()
    for moved in (value + step, value - step):
        parameter.data[place] = moved
        found.append(loss())
    parameter.data[place] = value
    return (found[0] - found[1]) / (2 * step)


@pytest.mark.parametrize("name", BASES)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
def test_loss_of_a_step_and_its_gradient_are_those_of_loops(folder, bases, name, options, kind):
    module = silence(on_base(bases, name, **options)).to(kind)
    data, batch = batch_of(folder)
    close = {"rtol": 1e-5, "atol": 1e-5} if kind == torch.float32 else {"rtol": 1e-9, "atol": 1e-12}
    module.set_neighbours(retrieve(module.tables, torch.as_tensor(data.train_triples), module.settings))
    triples = list(zip(*(part.tolist() for part in (batch.heads, batch.relations, batch.tails)), strict=True))
    assert triples == [with_reverses("train")[row] for row in batch.index]
    own = module.neighbours.rows(batch.index)
    losses, shares = losses_by_loops(module, triples, own)
    found = module.losses(batch.heads, batch.relations, batch.tails, own)
    assert torch.allclose(found[0].double(), torch.tensor(losses, dtype=torch.float64), **close)
    assert torch.allclose(found[1].double(), torch.tensor(shares, dtype=torch.float64), **close)
    loss = module.training_step(batch, 0)
    assert loss.item() == pytest.approx(loss_by_loops(module, triples, own), rel=close["rtol"])
    loss.backward()
    assert all(parameter.grad is None for parameter in module.tables.parameters())
    if kind == torch.float32:  # whose differences are too coarse
        assert all(parameter.grad is not None for parameter in module.analogies.parameters())
        return
    for parameter in module.analogies.parameters():
        sizes = parameter.grad.abs()
        for number in (sizes.argmax(), sizes.flatten().argsort()[-sizes.numel() // 4]):
            place = tuple(torch.unravel_index(number, sizes.shape))
            expected = slope(parameter, place, lambda: loss_by_loops(module, triples, own))
            assert parameter.grad[place].item() == pytest.approx(expected, rel=1e-5, abs=1e-8)


def test_both_ways_to_count_the_shares_differ_and_only_one_depends_on_the_batch(folder, bases):
    data, batch = batch_of(folder)
    found = {}
    for mode in ("triple", "batch_mean"):
        module = silence(on_base(bases, share_mode=mode, strength=1.0))
        module.set_neighbours(retrieve(module.tables, torch.as_tensor(data.train_triples), module.settings))
        whole = module.training_step(batch, 0)
        halves = [
            type(batch)(*(part[rows] if len(part) else part for part in batch)) for rows in (slice(8), slice(8, 32))
        ]
        parts = [module.training_step(half, 0) for half in halves]
        found[mode] = whole.item(), ((8 * parts[0] + 24 * parts[1]) / 32).item()
    assert found["triple"][0] == pytest.approx(found["triple"][1], rel=1e-5)
    assert abs(found["batch_mean"][0] - found["batch_mean"][1]) > 1e-4
    assert abs(found["batch_mean"][0] - found["triple"][0]) > 1e-4


def test_training_without_analogical_objects_is_told(folder, bases):
    _, batch = batch_of(folder)
    with pytest.raises(ValueError, match=r"not known; add callbacks\.AnalogyRetriever"):
        on_base(bases).training_step(batch, 0)


# ---- scores

WEIGHTS = [0.3, 0.5, 0.2]
SCORES = [
    {},
    {"score_offset": "margin"},
    {"adaptive_weights": False},
    {"entities": 3, "relations": 2, "pairs": 7, "score_offset": "margin"},
    {"levels": ["entity", "triple"]},
    {"levels": ["relation"], "score_offset": "margin"},
]


@pytest.mark.parametrize("name", BASES)
@pytest.mark.parametrize("options", SCORES, ids=str)
def test_scores_and_controls_are_those_of_loops(folder, bases, name, options):
    module = on_base(bases, name, level_weights=WEIGHTS, **options)
    data = analogies(folder)
    (scores,) = quiet_trainer().test(module, datamodule=data, verbose=False)
    lambdas = used(module, WEIGHTS)
    expected = {
        "test": ranks_by_loops(module, "test", lambdas=lambdas),
        "test/identity": ranks_by_loops(module, "test", identity=True, lambdas=lambdas),
        "test/base": ranks_by_loops(module, "test"),
        "test/unlinked": ranks_by_loops(module, "test", without_links=True),
    }
    assert scores["test/count"] == 2 * len(small_graph.triples()["test"])
    for prefix, ranks in expected.items():
        for key, value in means(ranks).items():
            if f"{prefix}/{key}" in scores:
                assert scores[f"{prefix}/{key}"] == pytest.approx(value, rel=1e-6), (prefix, key)
    # Without weights of counts the identity is a multiple of the base.
    alike = not module.hparams.adaptive_weights
    assert len({tuple(ranks) for ranks in expected.values()}) == (3 if alike else 4)
    data.setup("test")
    batch = next(iter(data.test_dataloader()))
    found = module.candidate_scores(batch)
    for row, (h, r) in enumerate(zip(batch.heads.tolist(), batch.relations.tolist(), strict=True)):
        wanted = scores_by_loops(*parts_by_loops(module, h, r), lambdas)
        assert found[row].tolist() == pytest.approx(wanted, rel=1e-5, abs=1e-5)


def test_weights_of_the_counts(folder, bases):
    module, data = on_base(bases, entities=2, relations=2, pairs=8), analogies(folder)
    data.setup("test")
    of_relation, of_head, of_tail = counts()
    values = [set(), set(), set()]
    for batch in data.test_dataloader():
        found = module.count_weights(batch)
        for row, (h, r) in enumerate(zip(batch.heads.tolist(), batch.relations.tolist(), strict=True)):
            for t in range(ENTITIES):
                own = len(of_relation.get((r, t), ())), len(of_head.get((h, t), ())), len(of_tail.get(t, ()))
                wanted = [min(count / most, 1.0) for count, most in zip(own, (2, 2, 8), strict=True)]
                assert found[:, row, t].tolist() == pytest.approx(wanted)
                for seen, value in zip(values, wanted, strict=True):
                    seen.add(value)
    assert all(len(seen) > 1 for seen in values), values


def test_queries_without_counts_have_no_weights_of_them(folder, bases):
    data = analogies(folder, query_counts=False)
    for stage in ("validate", "test", "predict"):
        with pytest.raises(ValueError, match=r"no counts of the training graph; set --data\.query_counts true"):
            getattr(quiet_trainer(), stage)(on_base(bases), datamodule=data)
    module = on_base(bases, adaptive_weights=False, level_grid=GRID)
    (scores,) = quiet_trainer().validate(module, datamodule=data, verbose=False)
    (expected,) = quiet_trainer().validate(module, datamodule=analogies(folder), verbose=False)
    left_out = {key for key in expected if "unlinked" in key}
    assert left_out
    assert scores == {key: value for key, value in expected.items() if key not in left_out}


@pytest.mark.parametrize("name", BASES)
def test_without_weights_of_levels_the_base_is_left(folder, bases, name):
    module = on_base(bases, name, level_weights=[0.0, 0.0, 0.0])
    (scores,) = quiet_trainer().test(module, datamodule=analogies(folder), verbose=False)
    base = KnowledgeGraphEmbedding.load_from_checkpoint(bases[name])
    (expected,) = quiet_trainer().test(base, datamodule=graph(folder), verbose=False)
    for key in ("mrr", "hits@1", "hits@3", "hits@10"):
        assert scores[f"test/{key}"] == scores[f"test/base/{key}"] == expected[f"test/{key}"]
        assert scores[f"test/identity/{key}"] == expected[f"test/{key}"]
        assert scores[f"test/unlinked/{key}"] == expected[f"test/unlinked/{key}"]


def test_answers_are_ordered_by_the_whole_score(folder, bases):
    module = on_base(bases, "RotatE", level_weights=WEIGHTS, top_k=5)
    found = predicted(module, analogies(folder))
    queries, known = with_reverses("test"), answers()
    for row, place in enumerate(found["index"].tolist()):
        h, r, _ = queries[place]
        scores = scores_by_loops(*parts_by_loops(module, h, r), WEIGHTS)
        order = sorted(range(ENTITIES), key=lambda entity: -scores[entity])[:5]
        assert found["entities"][row].tolist() == order
        assert found["known"][row].tolist() == [entity in known[h, r] for entity in order]


def test_analogical_objects_that_explain_an_answer(bases):
    module = on_base(bases, "RotatE")
    triples = torch.tensor(with_reverses("test"))
    found = module.explain(*triples.T)
    asked = RetrievalSettings(1, 1, 1, 20, 2 * RELATIONS - 1, exclude_original=True)
    for row, (heads, kinds, pairs) in enumerate(by_brute_force(module.tables, triples, asked)):
        own = {name: values[row].item() for name, values in found.items()}
        assert (own["entity"], own["relation"]) == (heads[0][0], kinds[0][0])
        assert (own["pair_entity"], own["pair_relation"]) == pairs[0][0]


# ---- the choice of weights

GRID = [[0.5, 0.0], [0.0, 0.2, 1.0], [0.0, 0.4]]


def chosen_by_loops(module, identity):
    """The first of the best weights in ascending order, and its MRR."""
    tried = sorted({tuple(used(module, weights)) for weights in product(*GRID)})
    parts = [parts_by_loops(module, h, r, identity) for h, r, _ in with_reverses("valid")]
    known, results = answers(), []
    for lambdas in tried:
        scores = [scores_by_loops(*part, lambdas) for part in parts]
        ranks = [
            small_graph.rank(own, t, known[h, r]) for own, (h, r, t) in zip(scores, with_reverses("valid"), strict=True)
        ]
        results.append(means(ranks)["mrr"])
    best = max(results)
    return tried[results.index(best)], best


@pytest.mark.parametrize("options", [{}, {"score_offset": "margin"}, {"levels": ["relation", "triple"]}], ids=str)
@pytest.mark.parametrize("name", ["TransE", "HAKE"])
def test_the_weights_are_those_that_a_search_finds(folder, bases, name, options):
    module, data = on_base(bases, name, level_grid=GRID, **options), analogies(folder)
    (scores,) = quiet_trainer().validate(module, datamodule=data, verbose=False)
    for prefix, kept, identity in (("val", "level_weights", False), ("val/identity", "identity_weights", True)):
        lambdas, mrr = chosen_by_loops(module, identity)
        assert getattr(module, kept).tolist() == pytest.approx(lambdas)
        assert scores[f"{prefix}/mrr"] == pytest.approx(mrr, rel=1e-6)
        assert [scores[f"{prefix}/weight_{level}"] for level in LEVELS] == pytest.approx(lambdas)
    assert scores["val/main"] == scores["val/mrr"]
    (tested,) = quiet_trainer().test(module, datamodule=data, verbose=False)
    for prefix, kept, identity in (("test", "level_weights", False), ("test/identity", "identity_weights", True)):
        ranks = ranks_by_loops(module, "test", identity, getattr(module, kept).tolist())
        assert tested[f"{prefix}/mrr"] == pytest.approx(means(ranks)["mrr"], rel=1e-6)


def test_each_way_is_tried_once(bases):
    module = on_base(bases, level_grid=GRID, levels=["relation"])
    assert module.grid.tolist() == [[0.0, pytest.approx(weight), 0.0] for weight in (0.0, 0.2, 1.0)]


def test_a_grid_of_one_point_is_like_weights(folder, bases):
    module = on_base(bases, level_grid=[[weight] for weight in WEIGHTS])
    other = on_base(bases, level_weights=WEIGHTS)
    scores, expected = (
        quiet_trainer().validate(own, datamodule=analogies(folder), verbose=False)[0] for own in (module, other)
    )
    found = {key: value for key, value in scores.items() if "/weight_" not in key}
    assert found == pytest.approx(expected, rel=0, abs=0, nan_ok=True)


class Rows(Callback):
    """Ranks that the steps of evaluation return."""

    def __init__(self):
        self.ranks = {}

    def on_validation_batch_end(self, trainer, pl_module, outputs, batch, *_):
        for key in ("rank_method", "rank_identity", "rank_base", "rank_unlinked"):
            assert outputs[key].shape[:1] == batch.index.shape
            self.ranks.setdefault(key, []).append(outputs[key])

    def of(self, module, name):
        """Those that count, now that the epoch is over."""
        return module.pick(name, torch.cat(self.ranks[f"rank_{name}"]).T).tolist()


def test_chosen_weights_are_kept_in_the_checkpoint(folder, bases, tmp_path):
    """A test takes them, and the ranks that validation tells of each query are by those that it has just chosen."""
    module, data = on_base(bases, level_grid=GRID, lr=0.01), analogies(folder)
    assert not any(module.level_weights), "the first of the grid"
    first = Rows()
    quiet_trainer(callbacks=[first]).validate(module, datamodule=data, verbose=False)
    assert any(module.level_weights)
    assert first.of(module, "method") == ranks_by_loops(module, "valid", lambdas=module.level_weights.tolist())
    trainer = trainer_of(num_sanity_val_steps=0)
    trainer.fit(module, datamodule=data)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    weights = module.level_weights.tolist()
    assert weights == pytest.approx(chosen_by_loops(module, False)[0])
    assert any(weights)
    other = AnalogicalEmbedding.load_from_checkpoint(tmp_path / "last.ckpt", weights_only=True)
    rows = Rows()
    quiet_trainer(callbacks=[rows]).validate(other, datamodule=analogies(folder), verbose=False)
    assert rows.of(other, "method") == ranks_by_loops(module, "valid", lambdas=weights)
    lambdas = module.identity_weights.tolist()
    assert rows.of(other, "identity") == ranks_by_loops(module, "valid", True, lambdas)
    assert rows.of(other, "base") == ranks_by_loops(module, "valid")
    kept = AnalogicalEmbedding.load_from_checkpoint(tmp_path / "last.ckpt", level_grid=None)
    assert kept.level_weights.tolist() == pytest.approx(weights), "not the published ones"


def test_weights_that_are_given_count_more_than_those_of_a_checkpoint(folder, bases, tmp_path):
    """Of one with chosen weights as well, once nothing is to be chosen any more."""
    path, given = tmp_path / "last.ckpt", [0.5, 0.0, 0.1]
    for options in ({"level_weights": WEIGHTS}, {"level_grid": GRID}):
        trainer = trainer_of(limit_train_batches=1)
        trainer.fit(ankge(bases["TransE"], **options), datamodule=analogies(folder))
        trainer.save_checkpoint(path)
        module = AnalogicalEmbedding.load_from_checkpoint(path, level_grid=None, level_weights=given)
        assert module.level_weights.tolist() == module.identity_weights.tolist() == pytest.approx(given)
        other = AnalogicalEmbedding.load_from_checkpoint(path, level_grid=None, level_weights=given, levels=["triple"])
        assert other.level_weights.tolist() == pytest.approx([0.0, 0.0, 0.1])
        quiet_trainer().test(other, datamodule=analogies(folder), ckpt_path=path, verbose=False)
        assert other.level_weights.tolist() == pytest.approx([0.0, 0.0, 0.1])


def test_chosen_weights_of_a_checkpoint_are_of_the_levels_that_are_used_now(folder, bases, tmp_path):
    path, chosen = tmp_path / "last.ckpt", torch.tensor([0.5, 0.2, 0.4])
    trainer = trainer_of(limit_train_batches=1, limit_val_batches=0)
    module = ankge(bases["TransE"], level_grid=GRID, score_offset="margin")
    trainer.fit(module, datamodule=analogies(folder))
    module.level_weights.copy_(chosen), module.identity_weights.copy_(chosen)
    trainer.save_checkpoint(path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        other = AnalogicalEmbedding.load_from_checkpoint(path, levels=["entity", "triple"])
    assert other.level_weights.tolist() == other.identity_weights.tolist() == pytest.approx([0.5, 0.0, 0.4])
    (scores,) = quiet_trainer().test(other, datamodule=analogies(folder), ckpt_path=path, verbose=False)
    for prefix, identity in (("test", False), ("test/identity", True)):
        ranks = ranks_by_loops(other, "test", identity, [0.5, 0.0, 0.4])
        assert scores[f"{prefix}/mrr"] == pytest.approx(means(ranks)["mrr"], rel=1e-6)
    other = ankge(bases["TransE"], level_grid=GRID)
    with pytest.warns(UserWarning, match="chosen for score_offset margin, not for none; choose them anew"):
        quiet_trainer().test(other, datamodule=analogies(folder), ckpt_path=path, verbose=False)


def test_weights_that_nobody_chose_are_not_told_to_be_those_of_another_offset(folder, bases, tmp_path):
    path = tmp_path / "last.ckpt"
    trainer = trainer_of(limit_train_batches=1, limit_val_batches=0)
    trainer.fit(ankge(bases["TransE"]), datamodule=analogies(folder))
    trainer.save_checkpoint(path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        other = AnalogicalEmbedding.load_from_checkpoint(path, score_offset="margin")
    assert other.level_weights.tolist() == pytest.approx([0.01, 0.2, 0.02])


def test_weights_without_a_grid_are_the_published_ones(bases):
    assert ankge(bases["TransE"]).level_weights.tolist() == pytest.approx([0.01, 0.2, 0.02])


def test_a_look_at_validation_before_training_tries_the_weights_too(folder, bases):
    module = ankge(bases["TransE"], level_grid=GRID)
    trainer = trainer_of(num_sanity_val_steps=2)
    trainer.fit(module, datamodule=analogies(folder))
    assert trainer.callback_metrics["val/count"] == 22


# ---- the base


def test_the_base_stays_as_it_is_and_only_the_functions_are_trained(folder, bases):
    for name in BASES:
        module = ankge(bases[name], lr=0.05, regularization=1e-3)
        seen = {}

        class Look(Callback):
            def on_train_start(self, trainer, pl_module, seen=seen):
                (group,) = trainer.optimizers[0].param_groups
                names = {id(value): key for key, value in pl_module.named_parameters()}
                seen["trained"] = {names[id(value)] for value in group["params"]}
                seen["before"] = {key: value.detach().clone() for key, value in pl_module.state_dict().items()}

        trainer_of([FrozenParameters(), Look()], max_epochs=3).fit(module, datamodule=analogies(folder))
        assert seen["trained"] == {f"analogies.{key}" for key in ("entities", "relations", "projection")}
        content = torch.load(bases[name], weights_only=True)["state_dict"]
        frozen = {key for key in module.state_dict() if key.startswith("tables.")}
        assert frozen == {key for key in content if key.startswith("tables.")}
        for key in frozen:
            assert torch.equal(module.state_dict()[key], content[key]), key
            assert torch.equal(seen["before"][key], content[key]), key
        for key in seen["trained"]:
            assert not torch.equal(module.state_dict()[key], seen["before"][key]), key


@pytest.mark.parametrize("name", BASES)
def test_other_precisions_train_and_rank_both_models(folder, name, tmp_path):
    """The same steps but for rounding, and ranks of the tables as they are kept."""
    found = {}
    for precision in ("32-true", "64-true", "bf16-mixed"):
        base = base_model(name, lr=0.05)
        trainer = quiet_trainer(max_epochs=3, precision=precision)
        trainer.fit(base, datamodule=graph(folder, seed=0))
        trainer.save_checkpoint(tmp_path / "base.ckpt")
        module = ankge(tmp_path / "base.ckpt", lr=0.05, strength=1.0, level_grid=GRID)
        trainer = trainer_of(max_epochs=3, precision=precision)
        trainer.fit(module, datamodule=analogies(folder))
        (scores,) = trainer.test(module, datamodule=analogies(folder), verbose=False)
        kept = torch.float64 if precision == "64-true" else torch.float32
        assert {value.dtype for value in module.state_dict().values()} == {kept}
        assert scores["test/mrr"] == pytest.approx(
            means(ranks_by_loops(module, "test", lambdas=module.level_weights.tolist()))["mrr"], rel=1e-6
        )
        found[precision] = module
    states = {precision: module.state_dict() for precision, module in found.items()}
    for key, expected in states["32-true"].items():
        assert torch.allclose(states["64-true"][key].float(), expected, atol=2e-3), key
        if key.startswith("analogies"):
            assert (states["bf16-mixed"][key] - expected).abs().mean() < 0.05, key


@pytest.mark.parametrize("name", ["DistMult", "ComplEx"])
def test_scores_that_are_products_of_matrices_are_ranked_in_full_precision(name):
    tables = EmbeddingTables(scoring(name, 6), 2000, RELATIONS)
    torch.nn.init.normal_(tables.entities), torch.nn.init.normal_(tables.relations)
    vectors = tables.look_up(torch.arange(4), torch.arange(4))
    expected = tables.tail_distances(*vectors)
    with torch.autocast("cpu", torch.bfloat16):
        found = tables.tail_distances(*vectors)
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)


def test_weights_of_16_bits_are_refused_before_training(folder, bases):
    for module, data in ((base_model(), graph(folder)), (ankge(bases["TransE"]), analogies(folder))):
        with pytest.raises(
            ValueError, match=r"precision bf16-true: embeddings .*; set trainer\.precision to bf16-mixed"
        ):
            quiet_trainer(precision="bf16-true").fit(module, datamodule=data)


def test_training_brings_the_analogies_to_their_targets(folder, bases):
    module, data = ankge(bases["TransE"], lr=0.02, strength=1.0), analogies(folder)

    def apart():
        neighbours = module.neighbours or retrieve(module.tables, torch.as_tensor(data.train_triples), module.settings)
        found = 0.0
        for row, (h, r, _) in enumerate(with_reverses("train")):
            target = module.tables.relations[neighbours.relations[row, 0]].tolist()
            found += length([a - b for a, b in zip(made_by_loops(module, h, r)[1], target, strict=True)])
        return found

    module.load_base(bases["TransE"])
    before = apart()
    trainer_of(max_epochs=20, limit_val_batches=0).fit(module, datamodule=data)
    assert apart() < 0.8 * before


def test_the_score_function_is_read_from_the_base(bases):
    for name in BASES:
        assert ankge(bases[name]).hparams["scoring"] == scoring(name, 6).describe()


def changed(bases, path, **options):
    content = torch.load(bases["TransE"], weights_only=True)
    content["hyper_parameters"] |= options
    torch.save(content, path)
    return path


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_entities": 99}, "num_entities is 99, but the data has 28"),
        ({"num_relations": 6}, "num_relations is 6, but the data has 5"),
        ({"graph_hash": "other"}, "was trained on a graph whose entities or relations have other names"),
        ({"train_hash": "other"}, "was trained on other training triples, among which there may be some that are held"),
    ],
)
def test_a_base_of_another_graph_is_refused(folder, bases, tmp_path, options, message):
    """When the model is built, or when training starts and the file is another one than before."""
    path, data = tmp_path / "base.ckpt", graph(folder)
    hashes = {"graph_hash": data.graph_hash, "train_hash": data.train_hash}
    path.write_bytes(bases["TransE"].read_bytes())
    module = ankge(path, **hashes)
    changed(bases, path, **options)
    with pytest.raises(ValueError, match=rf"base .*base\.ckpt: {message}"):
        ankge(path, **hashes)
    with pytest.raises(ValueError, match=rf"base .*base\.ckpt: {message}"):
        trainer_of().fit(module, datamodule=analogies(folder))


def test_a_base_of_an_unknown_graph_is_taken(folder, bases, tmp_path):
    path = changed(bases, tmp_path / "base.ckpt", graph_hash=None)
    ankge(path, graph_hash=graph(folder).graph_hash).load_base(path)
    ankge(bases["TransE"]).load_base(bases["TransE"])


@pytest.mark.parametrize("other", [scoring("RotatE", 6), scoring("TransE", 5), scoring("TransE", 6, margin=9.0)])
def test_another_score_function_than_that_of_the_base_is_refused(bases, other):
    module = ankge(bases["TransE"], scoring=other)
    with pytest.raises(ValueError, match=r"was trained with \{.*\}, but scoring is \{"):
        module.load_base(bases["TransE"])


def test_what_is_no_base_is_told(tmp_path, bases):
    with pytest.raises(FileNotFoundError, match="no such file; train a base model first"):
        ankge(tmp_path / "none.ckpt")
    with pytest.raises(ValueError, match="base is not set: give the checkpoint"):
        ankge()
    (tmp_path / "text.ckpt").write_text("no checkpoint")
    with pytest.raises(ValueError, match=r"text\.ckpt: is no checkpoint that can be read"):
        ankge(tmp_path / "text.ckpt")
    for number, content in enumerate(({"state_dict": {}}, [1, 2], {"hyper_parameters": {"scoring": {}}})):
        torch.save(content, tmp_path / f"{number}.ckpt")
        with pytest.raises(ValueError, match="holds no embeddings of a knowledge graph"):
            ankge(tmp_path / f"{number}.ckpt")


def test_a_checkpoint_of_ankge_is_no_base(folder, bases, tmp_path):
    trainer = trainer_of(limit_train_batches=1, limit_val_batches=0)
    trainer.fit(ankge(bases["TransE"]), datamodule=analogies(folder))
    trainer.save_checkpoint(tmp_path / "ankge.ckpt")
    own = re.escape(str(bases["TransE"]))
    with pytest.raises(ValueError, match=rf"ankge\.ckpt: is a checkpoint of AnKGE itself; give .* its own, {own}$"):
        ankge(tmp_path / "ankge.ckpt")


def test_training_on_embeddings_of_nothing_is_told(folder):
    module = ankge(scoring=scoring("TransE"))
    with pytest.warns(UserWarning, match="base is not set, so the embeddings are"):
        trainer_of(limit_train_batches=1, limit_val_batches=0).fit(module, datamodule=analogies(folder))


# ---- going on


def test_a_resumed_training_equals_one_that_went_on(folder, bases, tmp_path):
    """Also where the base is gone: its embeddings are in the checkpoint."""
    base = tmp_path / "base.ckpt"
    base.write_bytes(bases["RotatE"].read_bytes())

    def trained(epochs, **fit_options):
        module = ankge(base, scoring=scoring("RotatE", 6), lr=0.01, lr_milestones=[1, 3], level_grid=GRID)
        trainer = trainer_of(max_epochs=epochs)
        trainer.fit(module, datamodule=analogies(folder), **fit_options)
        trainer.save_checkpoint(tmp_path / "last.ckpt")
        return module

    whole = trained(4)
    half = trained(2)
    base.unlink()
    resumed = trained(4, ckpt_path=tmp_path / "last.ckpt")
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    assert not torch.equal(whole.analogies.entities, half.analogies.entities)


class Rates(Callback):
    def __init__(self):
        self.rates = []

    def on_train_epoch_start(self, trainer, *_):
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])


def test_the_rate_drops_at_milestones(folder, bases):
    rates = Rates()
    module = ankge(bases["TransE"], lr=0.01, lr_milestones=[1, 3])
    trainer_of([rates], max_epochs=4, limit_val_batches=0).fit(module, datamodule=analogies(folder))
    assert rates.rates == pytest.approx([0.01, 0.001, 0.001, 0.0001])


def test_tables_for_export(bases):
    module = on_base(bases, "HAKE")
    found = module.embedding_tables()
    names = {"entities", "relations", "analogy_entities", "analogy_relations", "analogy_projection"}
    assert found.keys() == names
    assert not any(value.requires_grad for value in found.values())
    assert torch.equal(found["analogy_projection"], module.analogies.projection)


# ---- what a person may get wrong


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"level_weights": [0.1, 0.2]}, "level_weights has 2 entries, expected 3: entity, relation, triple"),
        (
            {"level_grid": [[0.1]] * 3, "level_weights": [0.1] * 3},
            r"level_weights is \[0.1, 0.1, 0.1\], but with level_grid the weights are chosen on validation; set --mod",
        ),
        ({"level_grid": [[0.1]] * 4}, "level_grid has 4 entries, expected 3"),
        ({"level_grid": [[0.1], [], [0.2]]}, "level_grid is .*, expected at least one value for each level"),
        ({"levels": []}, r"levels is \[\], expected some of entity, relation, triple"),
        ({"levels": ["entity", "pair"]}, "levels is .*, expected some of entity, relation, triple"),
        ({"similarity": "dot"}, "similarity is 'dot', expected norm, cos, cos_official"),
        ({"shares": "hard"}, "shares is 'hard', expected softmax, one_hot"),
        ({"share_mode": "batch"}, "share_mode is 'batch', expected triple, batch_mean"),
        ({"score_offset": "gamma"}, "score_offset is 'gamma', expected none, margin"),
        ({"strength": -1.0}, "strength is -1.0, expected 0 or more"),
        ({"regularization": -1.0}, "regularization is -1.0, expected 0 or more"),
        ({"lr": 0.0}, "lr is 0.0, expected above 0"),
        ({"entities": 0}, "entities is 0, expected 1 or more"),
        ({"pairs": 30}, "pairs is 30, but 6 candidate_entities and 4 candidate_relations make only 24"),
        ({"num_entities": 0}, "num_entities is 0"),
        ({"ties": "best"}, "ties: 'best', expected one of"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        ankge(scoring=scoring("TransE"), **options)
