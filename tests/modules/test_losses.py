import math

import pytest
import torch

from modules.bolt.losses import cosine_consistency, info_nce, normalised_std


def cosine(a, b):
    dot = sum(x * y for x, y in zip(a, b, strict=True))
    return dot / math.sqrt(sum(x * x for x in a)) / math.sqrt(sum(x * x for x in b))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
def test_consistency_equals_a_plain_loop(dtype, tolerance):
    torch.manual_seed(0)
    u, z = torch.randn(7, 5, dtype=dtype), torch.randn(7, 5, dtype=dtype)
    expected = sum(2 - 2 * cosine(a, b) for a, b in zip(u.tolist(), z.tolist(), strict=True)) / 7
    assert cosine_consistency(u, z).item() == pytest.approx(expected, abs=tolerance)


def test_ends_of_the_range():
    u = torch.randn(4, 3)
    assert cosine_consistency(u, 2 * u).item() == pytest.approx(0, abs=1e-6)
    assert cosine_consistency(u, -u).item() == pytest.approx(4, abs=1e-6)
    assert cosine_consistency(torch.tensor([[1.0, 0]]), torch.tensor([[0, 5.0]])).item() == pytest.approx(2)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
def test_info_nce_equals_a_plain_loop(dtype, tolerance):
    torch.manual_seed(0)
    queries, keys, temperature = torch.randn(3, 4, dtype=dtype), torch.randn(6, 4, dtype=dtype), 0.2
    expected = 0.0
    for i, query in enumerate(queries.tolist()):
        scores = [cosine(query, key) / temperature for key in keys.tolist()]
        expected += math.log(sum(math.exp(score) for score in scores)) - scores[i + 3]
    expected *= 2 * temperature / 3
    assert info_nce(queries, keys, temperature, offset=3).item() == pytest.approx(expected, abs=tolerance)


def test_half_precision_is_computed_in_float32():
    u, z = torch.randn(5, 8), torch.randn(5, 8)
    half_u, half_z = u.bfloat16(), z.bfloat16()
    for loss in (cosine_consistency, info_nce):
        assert loss(half_u, half_z).dtype == torch.float32
        assert loss(half_u, half_z).item() == pytest.approx(loss(half_u.float(), half_z.float()).item(), abs=1e-6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert info_nce(u, z).item() == pytest.approx(info_nce(u, z).item(), abs=1e-6)
        assert info_nce(u, z).dtype == torch.float32


def test_spread_of_projections():
    torch.manual_seed(0)
    assert normalised_std(torch.randn(4000, 16)).item() == pytest.approx(1 / 4, abs=0.01)
    assert normalised_std(torch.ones(8, 16)).item() == pytest.approx(0, abs=1e-7)
    z = torch.tensor([[3.0, 4.0], [0.0, 2.0]])
    assert normalised_std(z).item() == pytest.approx((0.6 / math.sqrt(2) + 0.2 / math.sqrt(2)) / 2, abs=1e-6)
