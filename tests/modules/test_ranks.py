"""Filtered ranks against a loop over candidates, a sort, and closed forms."""

import math

import numpy as np
import pytest
import torch

from modules.ranking import TIES, blocked_ranks, ranks_by_counting
from modules.ranking.ranks import check_known

ROWS, CANDIDATES = 13, 37


def by_loop(scores, targets, known, ties):
    """One candidate after the other, in plain numbers."""
    left_out = set(zip(*known.tolist(), strict=True)) if known is not None else set()
    ranks = []
    for row, (own, target) in enumerate(zip(scores.tolist(), targets.tolist(), strict=True)):
        others = [score for column, score in enumerate(own) if column != target and (row, column) not in left_out]
        better, equal = sum(s > own[target] for s in others), sum(s == own[target] for s in others)
        ranks.append(1 + better + {"optimistic": 0, "realistic": equal / 2, "pessimistic": equal}[ties])
    return ranks


def queries(seed, distinct=4, known_share=0.2, rows=ROWS, candidates=CANDIDATES):
    """Scores with ``distinct`` values only, so with many ties; known candidates repeated, unsorted, targets among them.

    Some scores are infinite.
    """
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(distinct, (rows, candidates), generator=generator).float()
    spread = torch.rand(rows, candidates, generator=generator)
    scores[spread < 0.05] = -math.inf
    scores[spread > 0.97] = math.inf
    targets = torch.randint(candidates, (rows,), generator=generator)
    known = (torch.rand(rows, candidates, generator=generator) < known_share).nonzero().T
    known = torch.cat([known, known[:, ::3], torch.stack([torch.arange(rows), targets])], 1)
    return scores, targets, known[:, torch.randperm(known.shape[1], generator=generator)]


@pytest.mark.parametrize("ties", TIES)
@pytest.mark.parametrize("seed", range(8))
def test_ranks_equal_a_loop_over_candidates(seed, ties):
    scores, targets, known = queries(seed, distinct=1 + seed)
    before = scores.clone(), targets.clone(), known.clone()
    for given in (known, known[:, :0], None):
        assert ranks_by_counting(scores, targets, given, ties).tolist() == by_loop(scores, targets, given, ties)
    assert all(torch.equal(a, b) for a, b in zip(before, (scores, targets, known), strict=True))


def test_the_tie_rules_differ_where_there_are_ties():
    scores, targets, known = queries(0)
    best, middle, worst = (ranks_by_counting(scores, targets, known, t) for t in ("optimistic", "realistic", TIES[2]))
    assert (best < middle).any()
    assert torch.equal(middle, (best + worst) / 2)


def test_all_equal_scores_rank_the_target_in_the_middle_of_what_is_not_known():
    _, targets, known = queries(3)
    left_out = {pair for pair in zip(*known.tolist(), strict=True) if pair[1] != targets[pair[0]]}
    remaining = torch.tensor([CANDIDATES - sum(row == own for row, _ in left_out) for own in range(ROWS)])
    assert remaining.unique().numel() > 1
    scores = torch.full((ROWS, CANDIDATES), 0.25)
    assert torch.equal(ranks_by_counting(scores, targets, known), (remaining + 1) / 2)
    assert torch.equal(ranks_by_counting(scores, targets), torch.full((ROWS,), (CANDIDATES + 1) / 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ranks_without_ties_are_positions_in_a_sort(dtype):
    generator = torch.Generator().manual_seed(1)
    scores = torch.stack([torch.randperm(500, generator=generator) for _ in range(40)]).to(dtype) / 7
    targets = torch.randint(500, (40,), generator=generator)
    known = (torch.rand(40, 500, generator=generator) < 0.3).nonzero().T
    masked = scores.numpy().copy()
    masked[tuple(known.numpy())] = -1e7
    masked[np.arange(40), targets.numpy()] = scores.numpy()[np.arange(40), targets.numpy()]
    order = np.argsort(-masked, axis=1)
    expected = [1 + order[row].tolist().index(target) for row, target in enumerate(targets.tolist())]
    for ties in TIES:
        assert ranks_by_counting(scores, targets, known, ties).tolist() == expected


def test_half_precision_scores_tie_as_they_are():
    scores = torch.tensor([[1.0, 1.001, 1.1, 0.5]]).bfloat16()
    assert scores[0, 0] == scores[0, 1]
    assert ranks_by_counting(scores, torch.tensor([0])).tolist() == [2.5]


def test_a_target_at_minus_infinity_ties_with_the_others_there():
    scores = torch.tensor([[0.0, -math.inf, -math.inf, -math.inf, -math.inf]])
    target, known = torch.tensor([1]), torch.tensor([[0], [4]])
    assert [ranks_by_counting(scores, target, known, ties).item() for ties in TIES] == [3.0, 2.0, 4.0]


def test_scores_of_removed_candidates_do_not_matter():
    scores, targets, known = queries(5)
    expected = ranks_by_counting(scores, targets, known)
    rows, columns = known[:, known[1] != targets[known[0]]]
    for value in (-math.inf, math.inf, 1.0):
        changed = scores.clone()
        changed[rows, columns] = value
        assert torch.equal(ranks_by_counting(changed, targets, known), expected)


def test_scores_with_a_gradient_and_in_pieces_of_a_larger_matrix():
    scores, targets, known = queries(6)
    expected = ranks_by_counting(scores, targets, known)
    larger = torch.full((CANDIDATES, 2 * ROWS), 9.0)
    larger[:, ::2] = scores.T
    strided = larger.T[::2].requires_grad_()
    assert not strided.is_contiguous()
    ranks = ranks_by_counting(strided, targets, known)
    assert torch.equal(ranks, expected)
    assert not ranks.requires_grad


@pytest.mark.parametrize("ties", TIES)
@pytest.mark.parametrize("block_size", [1, 5, CANDIDATES - 1, CANDIDATES, 1000])
def test_blocks_give_the_ranks_of_the_whole_matrix(block_size, ties):
    scores, targets, known = queries(7)
    calls = []

    def score_block(start, end):
        calls.append((start, end))
        return scores[:, start:end]

    own = scores[torch.arange(ROWS), targets]
    for given in (known, None):
        calls.clear()
        ranks = blocked_ranks(score_block, targets, own, CANDIDATES, given, block_size, ties)
        assert ranks.tolist() == by_loop(scores, targets, given, ties)
        assert [column for start, end in calls for column in range(start, end)] == list(range(CANDIDATES))
        assert max(end - start for start, end in calls) <= block_size


def test_the_column_of_the_target_is_not_counted_whatever_a_block_says():
    scores = torch.tensor([[0.0, 1.0, 2.0, 3.0]])
    for noise in (-1e-3, 0.0, 1e-3):
        own = torch.tensor([2.0 + noise])
        assert blocked_ranks(lambda start, end: scores[:, start:end], torch.tensor([2]), own, 4).item() == 2


def test_many_candidates_keep_their_halves():
    size = 2**24 + 3
    ranks = ranks_by_counting(torch.zeros(1, 1).expand(1, size), torch.tensor([5]))
    assert ranks.item() == (size + 1) / 2
    assert ranks.dtype == torch.float64


def test_no_queries_have_no_ranks():
    nothing = torch.zeros(0, dtype=torch.int64)
    assert ranks_by_counting(torch.zeros(0, 5), nothing, torch.zeros(2, 0, dtype=torch.int64)).shape == (0,)
    assert ranks_by_counting(torch.zeros(0, 0), nothing).shape == (0,)


@pytest.mark.parametrize("place", ["target", "candidate", "known"])
def test_nan_is_an_error_that_names_the_row(place):
    scores, targets, known = queries(8)
    row = 4
    other = next(c for c in range(CANDIDATES) if c != targets[row] and [row, c] not in known.T.tolist())
    removed = next(c for r, c in known.T.tolist() if r == row and c != targets[row])
    scores[row, {"target": targets[row].item(), "candidate": other, "known": removed}[place]] = math.nan
    for ties in TIES:
        with pytest.raises(ValueError, match="row 4 holds NaN"):
            ranks_by_counting(scores, targets, known, ties)
    clean = torch.zeros(ROWS)
    if place == "candidate":
        with pytest.raises(ValueError, match="row 4 holds NaN"):
            blocked_ranks(lambda start, end: scores[:, start:end], targets, clean, CANDIDATES, known, 6)


def test_a_nan_among_the_target_scores_alone_is_an_error():
    own = torch.tensor([0.0, math.nan])
    with pytest.raises(ValueError, match="row 1 holds NaN"):
        blocked_ranks(lambda start, end: torch.zeros(2, end - start), torch.tensor([0, 1]), own, 5)


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        ((0, 9), r"column 9 at place 2 is outside 0\.\.8"),
        ((0, -1), "column -1 at place 2"),
        ((3, 0), r"row 3 at place 2 is outside 0\.\.2"),
        ((-2, 0), "row -2 at place 2"),
    ],
)
def test_known_candidates_that_do_not_exist_are_named(pair, message):
    known = torch.tensor([(0, 0), (2, 8), pair]).T
    with pytest.raises(ValueError, match=message):
        check_known(known, 3, 9)
    with pytest.raises(ValueError, match=message):
        ranks_by_counting(torch.zeros(3, 9), torch.tensor([0, 1, 2]), known)


def test_bad_input_is_named():
    scores, targets = torch.zeros(3, 9), torch.tensor([0, 1, 2])
    with pytest.raises(ValueError, match=r"targets: -1 in row 1 is outside 0\.\.8"):
        ranks_by_counting(scores, torch.tensor([0, -1, 2]))
    with pytest.raises(ValueError, match="targets: 9 in row 2"):
        ranks_by_counting(scores, torch.tensor([0, 1, 9]))
    with pytest.raises(ValueError, match=r"targets: torch.int64 of shape \(2,\), expected int64 of shape \(3,\)"):
        ranks_by_counting(scores, targets[:2])
    with pytest.raises(ValueError, match=r"targets: torch.float32"):
        ranks_by_counting(scores, targets.float())
    with pytest.raises(ValueError, match=r"scores: shape \(9,\)"):
        ranks_by_counting(scores[0], targets)
    with pytest.raises(ValueError, match="ties: 'random', expected one of realistic"):
        ranks_by_counting(scores, targets, ties="random")
    for known in (torch.zeros(3, 2, dtype=torch.int64), torch.zeros(2, 3), torch.zeros(4, dtype=torch.int64)):
        with pytest.raises(ValueError, match=r"known: torch.* expected int64 of shape \(2, M\)"):
            ranks_by_counting(scores, targets, known)
    with pytest.raises(ValueError, match="block_size: 0"):
        blocked_ranks(lambda start, end: scores[:, start:end], targets, scores[:, 0], 9, block_size=0)
    with pytest.raises(ValueError, match=r"score_block\(4, 8\): shape \(3, 9\), expected \(3, 4\)"):
        blocked_ranks(lambda start, end: scores if start else scores[:, :4], targets, scores[:, 0], 9, block_size=4)
    with pytest.raises(ValueError, match=r"target_scores: shape \(3, 1\), expected \(3,\)"):
        blocked_ranks(lambda start, end: scores[:, start:end], targets, scores[:, :1], 9)


def graph(folder):
    """Numbered triples of the train, valid and test files of a folder, and how many entities they name."""
    entities, relations, parts = {}, {}, []
    number = entities.setdefault
    for name in ("train", "valid", "test"):
        lines = [line.split("\t") for line in (folder / f"{name}.txt").read_text().splitlines()]
        parts.append(
            [
                (number(h, len(entities)), relations.setdefault(r, len(relations)), number(t, len(entities)))
                for h, r, t in lines
            ]
        )
    return parts, len(entities)


@pytest.mark.realdata
def test_filtered_ranks_of_a_real_graph_equal_the_loop(shared_data):
    (train, valid, test), entities = graph(shared_data / "kg" / "umls")
    assert entities == 135
    tails = {}
    for head, relation, tail in train + valid + test:
        tails.setdefault((head, relation), set()).add(tail)
    # A model that has seen how often an entity is a tail; counts are full of ties.
    popularity = torch.bincount(torch.tensor([t for _, _, t in train]), minlength=entities).float()
    scores = popularity.expand(len(test), entities) + (torch.arange(len(test)) % 5)[:, None]
    targets = torch.tensor([t for _, _, t in test])
    pairs = [(row, tail) for row, (h, r, t) in enumerate(test) for tail in sorted(tails[h, r]) if tail != t]
    known = torch.tensor(pairs).T
    for ties in TIES:
        ranks = ranks_by_counting(scores, targets, known, ties)
        assert ranks.tolist() == by_loop(scores, targets, known, ties)
    assert (ranks_by_counting(scores, targets, ties=ties) > ranks).any()
