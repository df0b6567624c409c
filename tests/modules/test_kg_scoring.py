"""Score functions against loops over numbers, and their fast forms against the plain one, in value and gradient."""

import math

import pytest
import torch

from modules.ankge import AnalogyFunctions
from modules.knowledge_graph import EmbeddingTables, ScoringFunction, TransE, build_scoring, row_chunks
from tests.modules import small_graph
from tests.modules.small_graph import BASES, KINDS, scoring, tables

MODELS = tuple(KINDS)
HEADS, TAILS = 6, 5  # candidates
BATCH = 5


@pytest.fixture
def chunks(monkeypatch):
    """Room for few rows of a batch at a time; returns how many rows each kernel was given."""
    monkeypatch.setattr(row_chunks, "CACHE", 36)
    given, original = [], row_chunks.rows_per_chunk

    def spy(numbers_per_row, device):
        given.append(original(numbers_per_row, device))
        return given[-1]

    monkeypatch.setattr(row_chunks, "rows_per_chunk", spy)
    return given


def vectors(function, *kinds, seed=0, dtype=torch.float64):
    """A leaf (count, width) for each ("entity" or "relation", count)."""
    generator = torch.Generator().manual_seed(seed)
    widths = {"entity": function.entity_width, "relation": function.relation_width}
    return [
        torch.randn(count, widths[kind], generator=generator, dtype=dtype).requires_grad_() for kind, count in kinds
    ]


def double(name, dimension=6):
    return scoring(name, dimension).double()


def by_loops(function, heads, relations, tails):
    """Distance of row i of each."""
    triples = zip(*(small_graph.rows(part) for part in (heads, relations, tails)), strict=True)
    return [small_graph.distance(function, *triple) for triple in triples]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dimension", [1, 4])
def test_distance_and_composition_are_those_of_the_specification(name, dimension):
    function = double(name, dimension)
    heads, relations, tails = vectors(function, ("entity", 20), ("relation", 20), ("entity", 20))
    expected = by_loops(function, heads, relations, tails)
    assert function.distance(heads, relations, tails).tolist() == pytest.approx(expected, rel=1e-10)
    composed = function.compose(heads, relations).tolist()
    for row, (head, relation) in enumerate(zip(small_graph.rows(heads), small_graph.rows(relations), strict=True)):
        assert composed[row] == pytest.approx(small_graph.composition(function, head, relation), rel=1e-10, abs=1e-12)


@pytest.mark.parametrize("name", MODELS)
def test_distance_broadcasts_over_leading_dimensions(name):
    function = double(name, 3)
    heads, relations, tails = vectors(function, ("entity", 2), ("relation", 3), ("entity", 4))
    found = function.distance(heads[:, None, None], relations[:, None], tails)
    assert found.shape == (2, 3, 4)
    for place in ((0, 0, 0), (1, 2, 3), (0, 1, 2)):
        h, r, t = (part[[i]] for part, i in zip((heads, relations, tails), place, strict=True))
        assert found[place].item() == pytest.approx(by_loops(function, h, r, t)[0], rel=1e-10)


def test_hake_limits_its_biases():
    function = double("HAKE", 1)
    head, tail = torch.tensor([[0.0, 2.0]]).double(), torch.tensor([[0.0, 3.0]]).double()
    w_m = function.modulus_weight.item()
    # bias 5 counts as 1, so the tail's modulus is out; bias -5 as -|m|, so the head's is
    for modulus, bias, length in ((-0.5, 5.0, 2 * 1.5), (-0.5, -5.0, 3 * 1.5), (0.5, 0.25, abs(2 * 0.75 - 3 * 0.75))):
        relation = torch.tensor([[0.0, modulus, bias]]).double()
        assert function.distance(head, relation, tail).item() == pytest.approx(w_m * length)


def test_symmetries_of_the_models():
    pair, turn = double("PairRE", 5), double("RotatE", 5)
    heads, relations, tails = vectors(pair, ("entity", 4), ("relation", 4), ("entity", 4))
    assert torch.allclose(pair.distance(3 * heads, relations, 0.1 * tails), pair.distance(heads, relations, tails))
    heads, relations, tails = vectors(turn, ("entity", 4), ("relation", 4), ("entity", 4))
    whole_turn = 2 * turn.initial_range
    assert torch.allclose(turn.distance(heads, relations + whole_turn, tails), turn.distance(heads, relations, tails))
    # of -h, half a turn on
    assert torch.allclose(
        turn.distance(-heads, relations + whole_turn / 2, tails), turn.distance(heads, relations, tails)
    )


# ---- fast forms

FORMS = {
    "to_tails": (("entity", BATCH), ("relation", BATCH), ("entity", TAILS)),
    "from_heads": (("entity", HEADS), ("relation", BATCH), ("entity", BATCH)),
    "by_relations": (("entity", BATCH), ("relation", HEADS), ("entity", BATCH)),
}
PLACES = {
    "to_tails": lambda h, r, t: (h[:, None], r[:, None], t),
    "from_heads": lambda h, r, t: (h, r[:, None], t[:, None]),
    "by_relations": lambda h, r, t: (h[:, None], r, t[:, None]),
}


def with_parameters(function, tensors, cotangent, call):
    """Value, and gradients of tensors and of the function's own parameters."""
    leaves = [*tensors, *function.parameters()]
    value = call(*tensors)
    return value, torch.autograd.grad(value, leaves, cotangent)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("form", FORMS)
def test_fast_forms_equal_the_plain_one_in_value_and_gradient(name, form, chunks):
    function = double(name)
    tensors = vectors(function, *FORMS[form])
    method = getattr(function, f"distances_{form}")
    shape = (BATCH, TAILS if form == "to_tails" else HEADS)
    cotangent = torch.randn(shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    value, gradients = with_parameters(function, tensors, cotangent, method)
    expected, wanted = with_parameters(
        function, tensors, cotangent, lambda *parts: function.distance(*PLACES[form](*parts))
    )
    assert value.shape == shape
    assert torch.allclose(value, expected, rtol=1e-10, atol=1e-12)
    for own, other in zip(gradients, wanted, strict=True):
        assert torch.allclose(own, other, rtol=1e-8, atol=1e-10)
    if name not in ("TransE", "DistMult", "ComplEx"):  # the others are operators of the library
        assert max(chunks) < BATCH, "one chunk holds all rows: nothing was tested"


@pytest.mark.parametrize("name", BASES)
@pytest.mark.parametrize("form", FORMS)
def test_gradients_written_by_hand_are_those_of_differences(name, form, chunks):
    function = double(name, 3)
    tensors = vectors(function, *FORMS[form], seed=2)
    method = getattr(function, f"distances_{form}")
    # Differences are taken by changing the inputs in place, so the function sees those of its own parameters too.
    inputs = (*tensors, *function.parameters())
    assert torch.autograd.gradcheck(lambda *parts: method(*parts[:3]), inputs, atol=1e-6)
    if name != "TransE":  # which makes its blocks itself
        assert max(chunks) < BATCH


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("form", FORMS)
def test_only_gradients_that_are_asked_for(name, form, chunks):
    """A frozen table, and rows that need none."""
    function = double(name, 3)
    tensors = vectors(function, *FORMS[form])
    method = getattr(function, f"distances_{form}")
    wanted = torch.autograd.grad(method(*tensors).square().sum(), tensors)
    for place in range(3):
        only = [part.detach().requires_grad_(number == place) for number, part in enumerate(tensors)]
        (found,) = torch.autograd.grad(method(*only).square().sum(), [only[place]])
        assert torch.allclose(found, wanted[place])


@pytest.mark.parametrize("name", MODELS)
def test_distances_of_pairs(name):
    function = double(name, 3)
    heads, relations, tails = vectors(function, ("entity", 2 * 4), ("relation", 2 * 3), ("entity", 2))
    heads, relations = heads.view(2, 4, -1), relations.view(2, 3, -1)
    found = function.distances_of_pairs(heads, relations, tails)
    assert found.shape == (2, 3, 4)
    expected = [
        [[by_loops(function, heads[b, [m]], relations[b, [n]], tails[[b]])[0] for m in range(4)] for n in range(3)]
        for b in range(2)
    ]
    assert torch.allclose(found, torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("cache", [1, 20, 36, 90, 10**6])
def test_l1_distances_in_blocks_of_any_size(cache, monkeypatch):
    """Blocks of queries and of the table, whole ones and the rest."""
    monkeypatch.setattr(row_chunks, "CACHE", cache)
    queries, table = (torch.randn(rows, 3, requires_grad=True) for rows in (7, 11))
    cotangent = torch.randn(7, 11)
    found = row_chunks.sum_of_differences(queries, table.T.contiguous().T)
    expected = (queries[:, None] - table).abs().sum(-1)
    assert torch.allclose(found, expected)
    for own, other in zip(
        torch.autograd.grad(found, [queries, table], cotangent),
        torch.autograd.grad(expected, [queries, table], cotangent),
        strict=True,
    ):
        assert torch.allclose(own, other, atol=1e-6)


def test_l1_distances_on_other_devices_need_no_operator_of_theirs(monkeypatch):
    """Tensors without memory stand for such a device; the form is compared on this one."""
    monkeypatch.setattr(torch, "cdist", None)
    queries, table = (torch.randn(rows, 3, dtype=torch.float64, requires_grad=True) for rows in (7, 11))
    found = row_chunks.sum_of_differences(*(part.detach().to("meta").requires_grad_() for part in (queries, table)))
    assert found.shape == (7, 11)
    found.sum().backward()
    parts = (torch.zeros(2, *sizes, 3, device="meta") for sizes in ((4,), (5,), ()))
    assert scoring("TransE", 3).distances_of_pairs(*parts).shape == (2, 5, 4)
    expected = torch.stack([(row - table).abs().sum(-1) for row in queries])
    assert torch.allclose(row_chunks.plain_sums(queries, table), expected)
    own = row_chunks.chunked(row_chunks.plain_sums, [queries], [table], row_chunks.CACHE // 2)
    cotangent = torch.randn(7, 11, dtype=torch.float64)
    other = row_chunks.sum_of_differences(queries, table)
    for first, second in zip(
        torch.autograd.grad(own, [queries, table], cotangent),
        torch.autograd.grad(other, [queries, table], cotangent),
        strict=True,
    ):
        assert torch.allclose(first, second)


@pytest.mark.parametrize("name", MODELS)
def test_tail_distances_join_blocks_of_the_table(name, monkeypatch):
    found = tables(name, entities=9, dtype=torch.float64)
    monkeypatch.setattr(type(found.scoring), "table_block", lambda self, device: 4)
    heads, relations = found.look_up(torch.tensor([0, 8]), torch.tensor([3, 1]))
    expected = small_graph.all_distances(found)[[0, 8], [3, 1]]
    assert found.tail_distances(heads, relations).numpy() == pytest.approx(expected, rel=1e-10)


def test_vectors_are_looked_up_for_ids_of_any_shape():
    found = tables("HAKE").requires_grad_()
    heads, relations, negatives = torch.tensor([1, 1]), torch.tensor([0, 3]), torch.tensor([[4, 1], [6, 0], [1, 1]])
    head, relation, other = found.look_up(heads, relations, negatives)
    assert torch.equal(head, found.entities[heads])
    assert torch.equal(relation, found.relations[relations])
    assert torch.equal(other, found.entities[negatives])
    (head.sum() + other.sum()).backward()
    assert found.entities.grad[:, 0].tolist() == [1, 5, 0, 0, 1, 0, 1]


# ---- where a root or a sign has no gradient


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("form", ["plain", *FORMS])
def test_gradients_are_finite_where_tails_are_reached_exactly(name, form, chunks):
    function = scoring(name)
    heads, relations = vectors(function, ("entity", BATCH), ("relation", BATCH), dtype=torch.float32)
    relations.data.zero_()
    if name in ("PairRE", "DistMult", "ComplEx"):
        relations.data.fill_(1.0)
    if name == "HAKE":
        relations.data[:, function.dimension : 2 * function.dimension] = 1.0
    tails = heads.detach().clone().requires_grad_()
    if form == "plain":
        distances = function.distance(heads, relations, tails)
    else:
        distances = getattr(function, f"distances_{form}")(heads, relations, tails).diagonal()
    if name in BASES:
        assert distances.tolist() == pytest.approx([0.0] * BATCH, abs=1e-5)
    for gradient in torch.autograd.grad(distances.sum(), [heads, relations, tails, *function.parameters()]):
        assert gradient.isfinite().all()


@pytest.mark.parametrize("gap", [1e-18, 1e-21, 1e-23, 1e-30, 1e-44])
def test_gradients_of_moduli_stay_below_one_where_squares_are_too_small(gap):
    queries = torch.zeros(1, 4)
    table = torch.tensor([[gap, 0.5, -gap, 0.0]])
    for call in (row_chunks.sum_of_moduli, lambda q, t: scoring("RotatE", 2).distance(q, torch.zeros(1, 2), t)):
        leaves = [queries.clone().requires_grad_(), table.clone().requires_grad_()]
        for gradient in torch.autograd.grad(call(*leaves).sum(), leaves):
            assert gradient.abs().max() <= 1


# ---- first values, sizes, descriptions


@pytest.mark.parametrize("name", MODELS)
def test_first_values(name):
    torch.manual_seed(0)
    function = scoring(name, 8, margin=4.0)
    found = EmbeddingTables(function, 3000, 1500)
    rho = 1 / math.sqrt(8) if name in ("DistMult", "ComplEx") else (4 + 2) / 8
    uniform = [found.entities, found.relations]
    if name == "HAKE":
        uniform[1], moduli, biases = found.relations.split(8, dim=1)
        assert (moduli == 1).all()
        assert (biases == 0).all()
        assert function.phase_weight.item() == pytest.approx(0.7 * rho)
        assert function.modulus_weight.item() == pytest.approx(1.9)
    for table in uniform:
        assert rho * 0.999 < table.abs().max() <= rho
        assert table.std().item() == pytest.approx(rho / math.sqrt(3), rel=0.02)
        assert table.mean().item() == pytest.approx(0, abs=0.02 * rho)


SIZES = {"FB": (14541, 237), "WN": (40943, 11)}
# data, dimension, parameters of the base and of the analogy functions that train on it: section 8
PARAMETERS = {
    ("TransE", "FB"): (500, 7_507_500, 7_757_500),
    ("RotatE", "FB"): (500, 14_778_000, 15_278_000),
    ("HAKE", "FB"): (1000, 30_504_002, 36_504_000),
    ("PairRE", "FB"): (1500, 23_233_500, 27_733_500),
    ("TransE", "WN"): (500, 20_482_500, 20_732_500),
    ("RotatE", "WN"): (500, 40_954_000, 41_454_000),
    ("HAKE", "WN"): (500, 40_976_002, 42_476_000),
    ("PairRE", "WN"): (500, 20_493_500, 20_993_500),
}


@pytest.mark.parametrize(("name", "data"), PARAMETERS)
def test_numbers_of_parameters(name, data):
    dimension, of_base, of_analogies = PARAMETERS[name, data]
    entities, relations = SIZES[data]
    with torch.device("meta"):
        found = EmbeddingTables(scoring(name, dimension), entities, relations)
        widths = found.scoring.entity_width, found.scoring.relation_width
        functions = AnalogyFunctions(entities, 2 * relations, *widths)
    assert sum(part.numel() for part in found.parameters()) == of_base
    assert sum(part.numel() for part in functions.parameters()) == of_analogies


@pytest.mark.parametrize("name", MODELS)
def test_a_description_builds_the_same_function(name):
    function = scoring(name, 3)
    other = build_scoring(function.describe())
    assert type(other) is type(function)
    assert other.describe() == function.describe()
    assert other.initial_range == function.initial_range
    assert [part.item() for part in other.parameters()] == [part.item() for part in function.parameters()]
    assert build_scoring(function) is function


@pytest.mark.parametrize(
    "description",
    [
        {},
        {"class_path": "modules.knowledge_graph.NoSuchModel"},
        {"class_path": "no_such_module.TransE"},
        {"class_path": "torch.nn.Linear", "init_args": {"in_features": 2, "out_features": 2}},
        {"class_path": "modules.knowledge_graph.ScoringFunction", "init_args": {"dimension": 2, "margin": 1}},
        {"class_path": "modules.knowledge_graph.TransE", "init_args": {"width": 2}},
        {"class_path": "modules.knowledge_graph.TransE", "init_args": {"dimension": 0, "margin": 1.0}},
    ],
)
def test_what_is_no_score_function_is_told(description):
    with pytest.raises(ValueError, match=r"scoring: .* makes no score function"):
        build_scoring(description)


def test_sizes_out_of_range_are_told():
    with pytest.raises(ValueError, match="dimension is 0, expected 1 or more"):
        TransE(0, 1.0)
    with pytest.raises(ValueError, match="margin is -1, expected 0 or more"):
        TransE(2, -1)


def test_a_new_function_needs_only_distance_and_composition(chunks):
    """What the base class makes of these two."""

    class Squares(ScoringFunction):
        def distance(self, heads, relations, tails):
            return (heads + relations - tails).square().sum(-1)

        def compose(self, heads, relations):
            return heads + relations

    function = Squares(3, 1.0)
    for form, kinds in FORMS.items():
        tensors = vectors(function, *kinds)
        found = getattr(function, f"distances_{form}")(*tensors)
        expected = function.distance(*PLACES[form](*tensors))
        assert torch.allclose(found, expected)
        for own, other in zip(
            torch.autograd.grad(found.square().sum(), tensors),
            torch.autograd.grad(expected.square().sum(), tensors),
            strict=True,
        ):
            assert torch.allclose(own, other)
