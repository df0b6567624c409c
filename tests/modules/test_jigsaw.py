import pytest
import torch

from modules.bolt import Jigsaw
from modules.bolt.jigsaw import distant_permutations, shuffle_tiles
from tests.modules.toy_images import TINY, batch, batches, loader, quiet_trainer


def tiny_jigsaw(**kwargs):
    torch.manual_seed(0)
    return Jigsaw(**{"encoder_options": TINY, "grid": 2, "permutations": 6, **kwargs})


def test_hundred_permutations_of_nine_are_far_apart():
    chosen = distant_permutations(9, 100)
    assert chosen[0].tolist() == list(range(9))
    assert torch.equal(chosen.sort(1).values, torch.arange(9).expand(100, -1))
    distance = (chosen.unsqueeze(0) != chosen.unsqueeze(1)).sum(-1) + 9 * torch.eye(100, dtype=torch.int64)
    assert distance.min() >= 6
    assert torch.equal(chosen, distant_permutations(9, 100))


def test_all_permutations_of_four():
    assert len({tuple(row) for row in distant_permutations(4, 24).tolist()}) == 24


@pytest.mark.parametrize(("grid", "size"), [(2, 8), (3, 9)])
def test_tiles_move_as_a_plain_loop_says(grid, size):
    images = torch.randn(2, 3, size, size)
    permutations = torch.stack([torch.randperm(grid * grid) for _ in range(2)])
    expected, tile = torch.empty_like(images), size // grid
    for row in range(2):
        for place in range(grid * grid):
            top, left = divmod(place, grid)
            from_top, from_left = divmod(int(permutations[row, place]), grid)
            expected[row, :, top * tile : (top + 1) * tile, left * tile : (left + 1) * tile] = images[
                row, :, from_top * tile : (from_top + 1) * tile, from_left * tile : (from_left + 1) * tile
            ]
    assert torch.equal(shuffle_tiles(images, permutations, grid), expected)


def test_a_side_that_is_no_multiple_is_scaled_back():
    images = torch.ones(2, 1, 8, 8)
    shuffled = shuffle_tiles(images, torch.arange(9).expand(2, -1), 3)
    assert torch.allclose(shuffled, images)


def test_it_learns_to_solve_a_puzzle():
    module = tiny_jigsaw(lr=5e-3)
    picture = torch.arange(64.0).view(1, 1, 8, 8).repeat(32, 1, 1, 1) / 32 - 1
    data = [batch(size=32)._replace(views=(picture,)) for _ in range(20)]
    trainer = quiet_trainer(max_epochs=4)
    trainer.fit(module, loader(data))
    assert trainer.callback_metrics["train/jigsaw_acc"] > 2 / 6  # twice the level of chance


def test_it_gives_features_and_uses_all_views():
    module = tiny_jigsaw()
    quiet_trainer().fit(module, loader(batches(2, views=2)))
    module.eval()
    images = batch().images
    assert torch.equal(module.extract_features(images), module.encoder(images))
    assert module.feature_dim == 16
    assert set(module.validation_step(batch(), 0)) == {"features", "labels", "index"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"grid": 4}, "grid: 4 tiles per side; expected 2 or 3"),
        ({"grid": 2, "permutations": 25}, r"permutations: 25 is outside \[2, 24\] for grid: 2"),
        ({"permutations": 1}, r"permutations: 1 is outside \[2, 24\]"),
        ({"grid": 3, "image_size": 2}, "image_size: 2 pixels cannot be cut into 3 tiles per side"),
    ],
)
def test_settings_out_of_range_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        tiny_jigsaw(**settings)
