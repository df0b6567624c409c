"""The ranking metric against sums over a list of ranks."""

import copy
import math
import pickle
import warnings
from fractions import Fraction

import pytest
import torch

from modules.ranking import RANK_BINS, FilteredRanking, ranks_by_counting

GROUPS = ("tail", "head", "1-N")


def by_list(ranks, ks=(1, 3, 10)):
    """Means over a list, in exact fractions."""
    ranks = [Fraction(rank) for rank in ranks]
    count = len(ranks)
    values = {"mrr": sum(1 / rank for rank in ranks) / count, "mean_rank": sum(ranks) / count}
    values.update({f"hits@{k}": Fraction(sum(rank <= k for rank in ranks), count) for k in ks})
    return {name: float(value) for name, value in values.items()} | {"count": count}


def close(values):
    return {name: pytest.approx(value, rel=1e-6, nan_ok=True) for name, value in values.items()}


def numbers(values):
    return {name: value.item() for name, value in values.items()}


def half_ranks(count, seed, largest=60):
    return torch.randint(2, 2 * largest, (count,), generator=torch.Generator().manual_seed(seed)) / 2


def test_values_are_means_over_all_ranks_of_all_batches():
    metric = FilteredRanking(ks=(1, 2, 5, 100))
    batches = [half_ranks(count, seed) for seed, count in enumerate((7, 1, 30))]
    for ranks in batches:
        metric.update_ranks(ranks)
    assert numbers(metric.compute()) == close(by_list(torch.cat(batches).tolist(), (1, 2, 5, 100)))
    assert metric.compute()["count"].dtype == torch.int64


def test_scores_are_ranked_by_the_metrics_rule():
    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(3, (20, 15), generator=generator).float()
    targets = torch.randint(15, (20,), generator=generator)
    known = (torch.rand(20, 15, generator=generator) < 0.2).nonzero().T
    seen = set()
    for ties in ("realistic", "optimistic", "pessimistic"):
        metric = FilteredRanking(ties=ties)
        metric.update(scores[:12], targets[:12], known[:, known[0] < 12])
        metric.update(scores[12:], targets[12:], known[:, known[0] >= 12] - torch.tensor([[12], [0]]))
        ranks = ranks_by_counting(scores, targets, known, ties)
        assert numbers(metric.compute()) == close(by_list(ranks.tolist()))
        seen.add(metric.compute()["mrr"].item())
    assert len(seen) == 3


def test_all_equal_scores_are_not_a_good_model():
    metric = FilteredRanking(ks=(1, 10))
    metric.update(torch.zeros(6, 101), torch.arange(6))
    expected = {"mrr": 1 / 51, "mean_rank": 51.0, "hits@1": 0.0, "hits@10": 0.0, "count": 6}
    assert numbers(metric.compute()) == close(expected)


def test_forward_gives_the_values_of_its_batch_and_adds_them_up():
    metric = FilteredRanking()
    scores = torch.tensor([[3.0, 2.0, 1.0]])
    assert [metric(scores, torch.tensor([target]))["mean_rank"].item() for target in (0, 1, 2)] == [1, 2, 3]
    assert metric.compute()["mean_rank"] == 2
    metric.reset()
    metric.update_ranks(torch.tensor([4.0]))
    assert metric.compute()["mean_rank"] == 4


def test_ranks_after_a_look_at_the_values_count_too():
    metric = FilteredRanking()
    metric.update_ranks(torch.tensor([1.0]))
    assert metric.compute()["mrr"] == 1
    metric.update_ranks(torch.tensor([2.0]))
    assert metric.compute()["mrr"] == 0.75
    assert metric.update_called


def test_whole_number_ranks_may_be_integers():
    metric = FilteredRanking()
    metric.update_ranks(torch.tensor([1, 2, 200], dtype=torch.uint8))
    assert metric.compute()["mean_rank"].item() == pytest.approx(203 / 3)


def test_groups_by_number():
    ranks, groups = half_ranks(40, 1), torch.arange(40) % 2
    metric = FilteredRanking(groups=GROUPS)
    metric.update_ranks(ranks[:25], groups[:25])
    metric.update_ranks(ranks[25:], groups[25:])
    values = numbers(metric.compute())
    expected = by_list(ranks.tolist())
    for number, group in enumerate(("tail", "head")):
        expected |= {f"{group}/{name}": value for name, value in by_list(ranks[groups == number].tolist()).items()}
    expected |= {f"1-N/{name}": math.nan for name in ("mrr", "mean_rank", "hits@1", "hits@3", "hits@10")}
    assert values == close(expected | {"1-N/count": 0})


def test_a_query_may_be_in_several_groups_or_in_none():
    ranks = half_ranks(40, 2)
    member = torch.rand(40, 3, generator=torch.Generator().manual_seed(3)) < 0.4
    assert {0, 2} <= set(member.sum(1).tolist())
    metric = FilteredRanking(groups=GROUPS)
    metric.update_ranks(ranks[:25], member[:25])
    metric.update_ranks(ranks[25:], member[25:])
    expected = by_list(ranks.tolist())
    for number, group in enumerate(GROUPS):
        expected |= {f"{group}/{name}": value for name, value in by_list(ranks[member[:, number]].tolist()).items()}
    assert numbers(metric.compute()) == close(expected)


def test_queries_without_groups_count_among_all_only():
    metric = FilteredRanking(groups=("tail",))
    metric.update(torch.tensor([[1.0, 2.0]]), torch.tensor([0]))
    metric.update(torch.tensor([[1.0, 2.0]]), torch.tensor([1]), groups=torch.tensor([0]))
    values = metric.compute()
    assert (values["count"], values["tail/count"]) == (2, 1)
    assert (values["mrr"], values["tail/mrr"]) == (0.75, 1)


def test_no_query_gives_nan():
    metric = FilteredRanking(groups=("tail",))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torchmetrics, that nothing was counted
        values = numbers(metric.compute())
    assert values.pop("count") == values.pop("tail/count") == 0
    assert len(values) == 10
    assert all(math.isnan(value) for value in values.values())
    metric.update_ranks(torch.zeros(0))
    assert math.isnan(metric.compute()["mrr"])


def test_copies_are_so_many_metrics_of_the_same_queries():
    ranks = torch.stack([half_ranks(40, seed) for seed in range(5)])
    groups = torch.arange(40) % 3
    grid = FilteredRanking(groups=GROUPS, copies=5)
    grid.update_ranks(ranks[:, :11], groups[:11])
    grid.update_ranks(ranks[:, 11:], groups[11:])
    values, histogram = grid.compute(), grid.histogram()
    assert {tuple(value.shape) for value in values.values()} == {(5,)}
    for number in range(5):
        single = FilteredRanking(groups=GROUPS)
        single.update_ranks(ranks[number], groups)
        assert {name: value[number].item() for name, value in values.items()} == numbers(single.compute())
        assert torch.equal(histogram[number], single.histogram())


def test_copies_take_scores_of_each():
    scores = torch.randn(2, 9, 30, generator=torch.Generator().manual_seed(4))
    targets, known = torch.arange(9), torch.tensor([[0, 3], [5, 6]])
    grid = FilteredRanking(copies=2)
    grid.update(scores, targets, known)
    for number in range(2):
        single = FilteredRanking()
        single.update(scores[number], targets, known)
        assert grid.compute()["mrr"][number] == single.compute()["mrr"]


def test_sums_are_exact_in_any_order_where_doubles_are_not():
    ranks = half_ranks(5000, 5, largest=20000)
    reciprocals = 1 / ranks.double()
    orders = [torch.arange(5000), torch.arange(5000).flip(0), ranks.argsort(), ranks.argsort(descending=True)]
    assert len({sum(reciprocals[order].tolist()) for order in orders}) > 1
    totals = set()
    for order in orders:
        metric = FilteredRanking()
        for part in ranks[order].split(700):
            metric.update_ranks(part)
        totals.add((metric.reciprocals.item(), metric.doubled_ranks.item()))
    assert len(totals) == 1
    (total, doubled) = totals.pop()
    assert doubled == sum(int(2 * rank) for rank in ranks.tolist())
    exact = sum(1 / Fraction(rank) for rank in ranks.tolist())
    assert abs(Fraction(total, 2**32) - exact) <= Fraction(5000, 2**33)
    single = FilteredRanking()
    single.update_ranks(torch.tensor([1.5]))
    assert single.reciprocals.item() == round(Fraction(2, 3) * 2**32)


def test_a_sum_does_not_stop_growing():
    metric = FilteredRanking()
    metric.update_ranks(torch.tensor([2.0**40], dtype=torch.float64))
    metric.update_ranks(torch.tensor([1.5]))
    assert metric.doubled_ranks.item() == 2**41 + 3
    metric.reciprocals.fill_(2**62)  # a billion queries of rank 1
    metric.update_ranks(torch.tensor([4.0]))
    assert metric.reciprocals.item() == 2**62 + 2**30


def test_half_precision_modules_leave_the_sums_alone():
    module = torch.nn.ModuleDict({"ranking": FilteredRanking()}).half().to(torch.bfloat16)
    module["ranking"].update_ranks(torch.tensor([4097.0, 1.5]))
    assert module["ranking"].compute()["mean_rank"].item() == 4098.5 / 2


def test_histogram_has_bins_of_doubling_width():
    ranks = [1, 1, 1.5, 2, 2.5, 3, 4, 5, 8, 8.5, 9, 2**23, 2**23 + 1, 2**24, 2**30]
    metric = FilteredRanking()
    metric.update_ranks(torch.tensor(ranks, dtype=torch.float64))
    expected = [0] * len(RANK_BINS)
    for rank in ranks:
        place, last = 0, 1
        while rank > last and place < len(RANK_BINS) - 1:
            place, last = place + 1, 2 * last
        expected[place] += 1
    assert metric.histogram().tolist() == expected
    assert dict(zip(RANK_BINS[:5], expected, strict=False)) == {"1": 2, "2": 2, "3-4": 3, "5-8": 2, "9-16": 2}
    assert RANK_BINS[-1] == f"{2**23 + 1}-{2**24}"


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda metric: pickle.loads(pickle.dumps(metric))])
def test_a_copy_counts_on_its_own(duplicate):
    metric = FilteredRanking()
    metric.update_ranks(torch.tensor([2.0]))
    other = duplicate(metric)
    other.update_ranks(torch.tensor([1.0]))
    assert (metric.compute()["mrr"], other.compute()["mrr"]) == (0.5, 0.75)


@pytest.mark.parametrize("rank", [0.5, 0.0, -1.0, 1.25, math.nan, math.inf])
def test_what_is_no_rank_is_an_error_and_not_counted(rank):
    metric = FilteredRanking()
    metric.update_ranks(torch.tensor([2.0]))
    with pytest.raises(ValueError, match=f"ranks: {rank} is no rank"):
        metric.update_ranks(torch.tensor([1.0, rank]))
    assert numbers(metric.compute()) == close(by_list([2]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ks": (0, 1)}, "ks"),
        ({"ks": (1, 1)}, "ks"),
        ({"ks": (1.5,)}, "ks"),
        ({"ties": "best"}, "ties: 'best'"),
        ({"groups": ("a", "a")}, "groups"),
        ({"groups": ("",)}, "groups"),
        ({"groups": "tail"}, "groups: 'tail'"),
        ({"copies": 0}, "copies: 0"),
    ],
)
def test_bad_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        FilteredRanking(**options)


def test_bad_batches_are_named():
    metric, grid = FilteredRanking(groups=("tail", "head")), FilteredRanking(copies=3)
    ranks = torch.tensor([1.0, 2.0])
    for number in (2, -1):
        with pytest.raises(ValueError, match=rf"groups: {number} is none of the 2 groups \['tail', 'head'\]"):
            metric.update_ranks(ranks, torch.tensor([0, number]))
    for groups in (torch.zeros(3, dtype=torch.int64), torch.zeros(2, 3, dtype=torch.bool), torch.zeros(2)):
        with pytest.raises(ValueError, match=r"groups: torch.*, expected int64 of shape \(2,\) or bool"):
            metric.update_ranks(ranks, groups)
    with pytest.raises(ValueError, match=r"ranks: shape \(1, 2\), expected \(queries,\)"):
        metric.update_ranks(ranks[None])
    for wrong in (ranks, ranks.expand(2, 2)):
        with pytest.raises(ValueError, match=r"ranks: shape .*, expected \(3, queries\)"):
            grid.update_ranks(wrong)
    with pytest.raises(ValueError, match=r"scores: shape \(2, 5\), expected \(3, rows, candidates\)"):
        grid.update(torch.zeros(2, 5), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="known: column 7"):
        metric.update(torch.zeros(2, 5), torch.tensor([0, 1]), torch.tensor([[0], [7]]))
    assert metric.count.sum() == 0
