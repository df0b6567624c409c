import math

import pytest
import torch

from modules.encoders import create_network, create_token_encoder, embed_tokens, encode_tokens


def parameters_of(network):
    return sum(parameter.numel() for parameter in network.parameters())


@pytest.mark.parametrize(
    ("name", "size", "options", "parameters", "tokens"),
    [
        ("vit_base_patch16_224", 224, {}, 85_798_656, 196),
        ("vit_small_patch16_224", 224, {}, 21_665_664, 196),
        ("vit_tiny_patch16_224", 224, {}, 5_524_416, 196),
        ("vit_tiny_patch16_224", 28, {"patch_size": 4}, 5_357_952, 49),
        ("vit_tiny_patch16_224", 64, {"patch_size": 8}, 5_388_480, 64),
    ],
)
def test_numbers_of_parameters_and_tokens(name, size, options, parameters, tokens):
    with torch.device("meta"):
        network = create_token_encoder(name, size, 3, options, pos_embed="learned")
    assert parameters_of(network) == parameters
    assert network.patch_embed.num_patches == tokens


@pytest.mark.parametrize("pos_embed", ["sincos", "learned"])
@pytest.mark.parametrize("pool", ["token", "avg"])
def test_parts_compose_to_the_plain_forward(pos_embed, pool):
    options = {"patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2, "global_pool": pool}
    encoder = create_token_encoder("vit_tiny_patch16_224", 16, 3, options, pos_embed).eval()
    images = torch.randn(3, 3, 16, 16)
    tokens = embed_tokens(encoder, images)
    assert tokens.shape == (3, 16, 32)
    assert torch.equal(encode_tokens(encoder, tokens), encoder(images))


def test_sincos_positions_equal_their_formula():
    options = {"patch_size": 4, "embed_dim": 8, "depth": 1, "num_heads": 1}
    encoder = create_token_encoder("vit_tiny_patch16_224", 12, 1, options)
    positions = encoder.pos_embed[0]
    assert not encoder.pos_embed.requires_grad
    assert positions[0].tolist() == [0.0] * 8
    for row in range(3):
        for column in range(3):
            angles = [coordinate / 10000 ** (k / 2) for coordinate in (row, column) for k in range(2)]
            expected = sorted([math.sin(a) for a in angles] + [math.cos(a) for a in angles])
            assert sorted(positions[1 + row * 3 + column].tolist()) == pytest.approx(expected, abs=1e-6)


def test_registers_and_distillation_tokens_get_no_position():
    options = {"patch_size": 4, "embed_dim": 8, "depth": 1, "num_heads": 1, "reg_tokens": 2}
    encoder = create_token_encoder("vit_tiny_patch16_224", 8, 1, options)
    assert encoder.pos_embed[0, :3].abs().sum() == 0
    assert (encoder.pos_embed[0, 3:].abs().sum(1) > 0).all()


@pytest.mark.parametrize(
    ("size", "patch", "message"),
    [
        (30, 4, "image_size: 30 is not divisible by the patch size 4; nearest valid sizes: 28 and 32"),
        (3, 4, "image_size: 3 is not divisible by the patch size 4; nearest valid sizes: 4$"),
    ],
)
def test_an_image_that_patches_do_not_tile(size, patch, message):
    with pytest.raises(ValueError, match=message):
        create_token_encoder("vit_tiny_patch16_224", size, 3, {"patch_size": patch, "depth": 1})


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("resnet18", {}),
        ("swin_tiny_patch4_window7_224", {"depths": (1, 1, 1, 1)}),
        ("vit_tiny_patch16_224", {"depth": 1, "dynamic_img_size": True}),
    ],
)
def test_a_model_without_tokens(name, options):
    with pytest.raises(
        ValueError, match=f"{name} .* has no sequence of patch tokens to perturb. Supported: timm's Vision"
    ):
        create_token_encoder(name, 224, 3, options)


def test_an_unknown_name_gets_the_nearest_ones():
    with pytest.raises(ValueError, match="'vit_tinny_patch16_224' is not a timm model; nearest: vit_tiny_patch16_224"):
        create_network("vit_tinny_patch16_224", 224, 3, 0)


def test_an_unknown_option_is_named():
    with pytest.raises(
        ValueError, match=r"encoder_options or drop_path: vit_tiny_patch16_224 does not take .*'width': 3"
    ):
        create_network("vit_tiny_patch16_224", 224, 3, 0, {"width": 3})


def test_sincos_needs_a_width_divisible_by_four():
    with pytest.raises(ValueError, match="needs an embed_dim divisible by 4, got 18"):
        create_token_encoder("vit_tiny_patch16_224", 32, 3, {"embed_dim": 18, "num_heads": 3, "depth": 1})


def test_sincos_needs_a_position_embedding():
    with pytest.raises(ValueError, match="sincos needs a position embedding"):
        create_token_encoder("vit_tiny_patch16_224", 32, 3, {"pos_embed": "none", "depth": 1})


def test_options_of_the_small_encoder_on_another_model_are_pointed_out():
    options = {"patch_size": 2, "embed_dim": 64, "depth": 3, "num_heads": 4}
    with pytest.warns(UserWarning, match="those of the small digits encoder and now change vit_small_patch16_224"):
        create_network("vit_small_patch16_224", 8, 1, 0, options)


def test_models_without_an_image_size_are_built_too():
    network = create_network("resnet18", 33, 1, 5)
    assert network(torch.randn(2, 1, 33, 33)).shape == (2, 5)
