"""Two gloo ranks against one process: the ranking metric, also where a rank has no queries."""

import pytest
import torch

from modules.ranking import FilteredRanking
from tests.distributed import run_ranks

QUERIES, CANDIDATES, COPIES, GROUPS = 90, 57, 3, ("tail", "head", "none")


def queries():
    generator = torch.Generator().manual_seed(0)
    scores = (4 * torch.randn(QUERIES, CANDIDATES, generator=generator)).round()
    targets = torch.randint(CANDIDATES, (QUERIES,), generator=generator)
    known = torch.rand(QUERIES, CANDIDATES, generator=generator) < 0.1
    grid = torch.randint(2, 2 * CANDIDATES, (COPIES, QUERIES), generator=generator) / 2
    return scores, targets, known, grid


def tally(*parts):
    """Metrics of the queries in some slices, each a batch, with everything that they say."""
    scores, targets, known, ranks = queries()
    single, grid = FilteredRanking(groups=GROUPS), FilteredRanking(groups=GROUPS, copies=COPIES)
    for part in parts:
        groups = torch.arange(QUERIES)[part] % 2
        single.update(scores[part], targets[part], known[part].nonzero().T, groups)
        grid.update_ranks(ranks[:, part], groups)
    return single, grid


def said(metric):
    values = {name: value.tolist() for name, value in metric.compute().items()}
    return values | {"histogram": metric.histogram().tolist()}


def on_a_rank(rank, shares):
    results = []
    for metric in tally(*shares[rank]):
        before = said(metric)
        counted_alone = metric.count.tolist()
        results.append((before, said(metric), counted_alone))
    return results


@pytest.mark.parametrize(
    "shares",
    [
        ((slice(0, 20), slice(20, 50)), (slice(50, 90),)),
        ((slice(0, 31), slice(31, 90)), ()),
        ((), (slice(0, 90),)),
    ],
    ids=["both", "first only", "second only"],
)
def test_two_ranks_say_what_one_process_says(shares):
    # Text, as NaN is no equal of itself.
    expected = [str(said(metric)) for metric in tally(slice(None))]
    ranks = run_ranks(on_a_rank, 2, shares)
    for results in ranks:
        for (first, again, _), whole in zip(results, expected, strict=True):
            assert str(first) == str(again) == whole
    # The states stay those of the rank, so that updates may follow.
    for results, share in zip(ranks, shares, strict=True):
        own = sum(len(range(*part.indices(QUERIES))) for part in share)
        assert [counted[0][0] for _, _, counted in results] == [own, own]


def test_the_expected_values_are_not_trivial():
    values = said(tally(slice(None))[0])
    assert (values["count"], values["tail/count"], values["none/count"]) == (90, 45, 0)
    assert 0 < values["hits@1"] < values["hits@10"] < 1
    assert values["tail/mrr"] != values["head/mrr"]
