import math

import pytest
import torch

from modules.bolt.perturbation import (
    TokenPerturbation,
    cyclic_permutations,
    displaced_counts,
    take_patches,
    take_tokens,
)
from modules.encoders import create_token_encoder, embed_tokens, encode_tokens


def test_counts_are_rounded_and_one_becomes_two():
    strength = torch.tensor([0.0, 0.04, 0.05, 0.0625, 0.15, 0.5, 1.0])
    assert displaced_counts(strength, 16).tolist() == [0, 2, 2, 2, 2, 8, 16]


@pytest.mark.parametrize("num_tokens", [16, 196])
@pytest.mark.parametrize("r", [0.0, 0.013, 0.1, 0.37, 0.5, 0.73, 0.99, 1.0])
def test_exactly_the_asked_share_is_displaced(num_tokens, r):
    expected = round(r * num_tokens)
    expected = 2 if expected == 1 else expected
    perturbation = TokenPerturbation(8, r_min=r, r_max=r, mix=1.0)
    permutation = perturbation.sample(1000, num_tokens, torch.Generator().manual_seed(1))
    assert torch.equal(permutation.sort(1).values, torch.arange(num_tokens).expand(1000, -1))
    displaced = (permutation != torch.arange(num_tokens)).sum(1)
    assert displaced.unique().tolist() == [expected]
    assert torch.allclose(perturbation.difficulty(permutation), torch.tensor(expected / num_tokens))


def test_displaced_tokens_form_one_cycle():
    counts = torch.tensor([0, 2, 3, 7, 12])
    for count, row in zip(counts.tolist(), cyclic_permutations(counts, 12).tolist(), strict=True):
        moved = [i for i in range(12) if row[i] != i]
        if moved:
            position, length = row[moved[0]], 1
            while position != moved[0]:
                position, length = row[position], length + 1
            assert length == count == len(moved)


def test_positions_and_order_are_uniform():
    permutations = cyclic_permutations(torch.full((20000,), 3), 5, torch.Generator().manual_seed(0))
    moved = (permutations != torch.arange(5)).float().mean(0)
    assert torch.allclose(moved, torch.full((5,), 0.6), atol=0.02)
    cycles = {tuple(row) for row in permutations.tolist()}
    assert len(cycles) == math.comb(5, 3) * 2


def test_strengths_cover_their_range():
    perturbation = TokenPerturbation(8, r_min=0.25, r_max=0.75, mix=0.5)
    difficulty = perturbation.difficulty(perturbation.sample(4000, 40, torch.Generator().manual_seed(0)))
    assert difficulty.min().item() == pytest.approx(0.5 * 10 / 40)
    assert difficulty.max().item() == pytest.approx(0.5 * 30 / 40)
    assert difficulty.mean().item() == pytest.approx(0.25, abs=0.005)


@pytest.mark.parametrize("mix", [0.25, 0.5, 1.0])
@pytest.mark.parametrize("projection", ["learned", "orthogonal", "none"])
@pytest.mark.parametrize("copies", [1, 2])
def test_fused_tokens_equal_a_plain_loop(mix, projection, copies):
    torch.manual_seed(0)
    dim, tokens = 8, torch.randn(3, 5, 8, dtype=torch.float64)
    perturbation = TokenPerturbation(dim, mix=mix, projection=projection).double()
    weight, bias = torch.eye(dim, dtype=torch.float64), torch.zeros(dim, dtype=torch.float64)
    if projection == "learned":
        weight, bias = torch.randn(dim, dim).double(), torch.randn(dim).double()
        perturbation.projection.weight.data, perturbation.projection.bias.data = weight, bias
    if projection == "orthogonal":
        weight = perturbation.projection.weight
        assert torch.allclose(weight @ weight.T, torch.eye(dim).double(), atol=1e-6)
        assert not weight.requires_grad
    permutation = perturbation.sample(3 * copies, 5)
    result, difficulty = perturbation(tokens, permutation)
    kept = dim - round(mix * dim)
    for row in range(3 * copies):
        displaced = 0
        for i in range(5):
            source = int(permutation[row, i])
            displaced += source != i
            projected = [
                sum(weight[o, k] * tokens[row % 3, source, k] for k in range(dim)) + bias[o] for o in range(dim)
            ]
            expected = [tokens[row % 3, i, o] if o < kept else projected[o] for o in range(dim)]
            assert torch.allclose(result[row, i], torch.stack(expected), atol=1e-12)
        assert difficulty[row].item() == pytest.approx(mix * displaced / 5, abs=1e-6)


def test_gradients_of_reordering():
    tokens = torch.randn(2, 4, 3, dtype=torch.float64, requires_grad=True)
    permutation = cyclic_permutations(torch.tensor([3, 4]), 4)
    assert torch.autograd.gradcheck(lambda x: take_tokens(x, permutation), tokens)
    assert torch.autograd.gradgradcheck(lambda x: take_tokens(x, permutation), tokens)


def test_a_generator_makes_it_repeatable():
    perturbation, tokens = TokenPerturbation(8), torch.randn(4, 9, 8)
    first = perturbation(tokens, generator=torch.Generator().manual_seed(3))[0]
    second = perturbation(tokens, generator=torch.Generator().manual_seed(3))[0]
    other = perturbation(tokens, generator=torch.Generator().manual_seed(4))[0]
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


def test_order_matters_before_the_positions_and_not_after():
    torch.manual_seed(0)
    encoder = create_token_encoder("vit_tiny_patch16_224", 64, 3, {"patch_size": 8, "depth": 4}).eval()
    images = torch.randn(2, 3, 64, 64)
    permutation = cyclic_permutations(torch.full((2,), 64), 64)
    with torch.no_grad():
        tokens = embed_tokens(encoder, images)
        plain = encode_tokens(encoder, tokens)
        before = encode_tokens(encoder, take_tokens(tokens, permutation))
        sequence = encoder._pos_embed(tokens)
        sequence = torch.cat([sequence[:, :1], take_tokens(sequence[:, 1:], permutation)], 1)
        after = encoder.norm(encoder.blocks(sequence))[:, 0]
    assert (before - plain).abs().mean() / plain.abs().mean() > 1e-3
    assert (after - plain).abs().mean() / plain.abs().mean() < 1e-4


@pytest.mark.parametrize(("projection", "tolerance"), [("none", 0.0), ("learned", 1e-6)])
def test_without_displacement_the_output_is_the_plain_forward(projection, tolerance):
    encoder = create_token_encoder("vit_tiny_patch16_224", 28, 3, {"patch_size": 4, "depth": 3}).eval()
    perturbation = TokenPerturbation(192, r_max=0.0, projection=projection)
    images = torch.randn(4, 3, 28, 28)
    with torch.no_grad():
        tokens, difficulty = perturbation(embed_tokens(encoder, images))
        difference = (encode_tokens(encoder, tokens) - encoder(images)).abs().max()
    assert difference <= tolerance
    assert difficulty.tolist() == [0.0] * 4


def test_patches_of_a_picture_move_as_tokens_do():
    images = torch.arange(16.0).view(1, 1, 4, 4)
    moved = take_patches(images, torch.tensor([[3, 1, 2, 0]]), (2, 2))
    assert moved[0, 0].tolist() == [[10, 11, 2, 3], [14, 15, 6, 7], [8, 9, 0, 1], [12, 13, 4, 5]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"r_min": -0.1}, r"r_min: -0.1 is outside \[0, 1\]"),
        ({"r_max": 1.5}, r"r_max: 1.5 is outside \[0, 1\]"),
        ({"r_max": math.nan}, r"r_max: nan is outside \[0, 1\]"),
        ({"r_min": 0.8, "r_max": 0.2}, r"r_min: 0.8 is above r_max: 0.2"),
        ({"mix": 0.0}, r"mix: 0.0 is outside \(0, 1\]"),
        ({"mix": 1.1}, r"mix: 1.1 is outside \(0, 1\]"),
        ({"projection": "random"}, "projection: 'random' is unknown; expected learned, orthogonal or none"),
    ],
)
def test_values_out_of_range_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        TokenPerturbation(8, **arguments)


def test_one_token_cannot_be_permuted():
    with pytest.raises(ValueError, match="1 token per image cannot be permuted; use a smaller patch size"):
        TokenPerturbation(8)(torch.randn(2, 1, 8))
