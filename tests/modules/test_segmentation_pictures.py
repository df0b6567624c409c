"""Class indices and uncertainties as colours, pixel by pixel."""

import torch

from modules.segmentation.pictures import colour_masks, heat_map, panel

PALETTE = [[255, 0, 0], [0, 102, 0], [51, 51, 255]]


def test_numbers_go_from_black_over_red_to_yellow():
    values = torch.tensor([[0.2, 0.3, 0.4], [0.5, 0.6, 0.25]])
    found = heat_map(values)
    for (row, column), value in zip(
        torch.cartesian_prod(torch.arange(2), torch.arange(3)), values.flatten(), strict=True
    ):
        share = (value.item() - 0.2) / 0.4
        red, green = min(1.0, 2 * share), max(0.0, 2 * share - 1)
        assert torch.allclose(found[:, row, column], torch.tensor([red, green, 0.0]), atol=1e-6)


def test_one_number_throughout_is_black():
    assert torch.equal(heat_map(torch.full((2, 3), 0.7)), torch.zeros(3, 2, 3))


def test_void_is_black_and_classes_have_their_colours():
    found = colour_masks(torch.tensor([[0, 1], [2, 255]]), PALETTE)
    expected = [[PALETTE[0], PALETTE[1]], [PALETTE[2], [0, 0, 0]]]
    assert torch.allclose(found.permute(1, 2, 0), torch.tensor(expected) / 255)


def test_a_panel_is_image_label_prediction_and_uncertainty():
    image = torch.rand(3, 4, 6) * 1.5 - 0.2
    label, prediction = torch.randint(0, 3, (2, 4, 6))
    doubt = torch.rand(4, 6)
    found = panel(image, label, prediction, PALETTE, doubt)
    assert found.shape == (3, 4, 4 * 6)
    parts = [image.clamp(0, 1), colour_masks(label, PALETTE), colour_masks(prediction, PALETTE), heat_map(doubt)]
    for number, part in enumerate(parts):
        assert torch.allclose(found[..., 6 * number : 6 * number + 6], part, atol=1e-6)
    assert torch.equal(panel(image, label, prediction, PALETTE), found[..., :18]), "three parts without uncertainty"


def test_an_image_takes_the_size_of_its_label():
    found = panel(torch.full((3, 2, 3), 0.5), torch.zeros(4, 6).long(), torch.zeros(4, 6).long(), PALETTE)
    assert found.shape == (3, 4, 18)
    assert torch.equal(found[..., :6], torch.full((3, 4, 6), 0.5))
