import math
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.utils.model import reparameterize_model
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lightning_apps.exporting import write_onnx
from modules.emo import ARCHITECTURES, EMO
from modules.emo.network import _warn_of_small_images
from modules.encoders import create_network, require_timm_model
from tests.modules import reference_emo as reference
from tests.modules.test_emo_blocks import shake

PARAMETERS = {"emo_1m": 1_361_168, "emo_2m": 2_377_472, "emo_5m": 5_108_848, "emo_6m": 6_168_496}
BODY_PARAMETERS = {"emo_1m": 1_191_832, "emo_2m": 2_176_072, "emo_5m": 4_819_272, "emo_6m": 5_846_856}
ENTRIES = {"emo_1m": 217, "emo_2m": 258, "emo_5m": 258, "emo_6m": 258}
MILLION_MACS = {"emo_1m": 260.84, "emo_2m": 439.36, "emo_5m": 902.58, "emo_6m": 960.75}
MILLION_FLOPS = {"emo_1m": 510.5, "emo_2m": 863.8, "emo_5m": 1784.4, "emo_6m": 1900.5}
DIMS = {"emo_1m": [24, 32, 48, 80, 168], "emo_5m": [24, 48, 72, 160, 288]}

SMALL = {
    "depths": (1, 2, 2, 2),
    "dims": (8, 12, 16, 24),
    "expansions": (2, 2, 2, 1.5),
    "head_dims": (0, 0, 8, 6),
    "stem_dim": 8,
    "num_classes": 5,
}

SHALLOW = {**SMALL, "depths": (1, 1, 2, 2)}

pytestmark = pytest.mark.filterwarnings("ignore:window_size. a .* map is padded:UserWarning")


@pytest.fixture(scope="module")
def emo_1m() -> EMO:
    """The smallest published network with every value drawn at random, in evaluation."""
    torch.manual_seed(0)
    return shake(timm.create_model("emo_1m")).eval()


def images(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def close(found: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> None:
    """Equal to a fraction of the range."""
    assert found.shape == expected.shape
    difference = (found.double() - expected.double()).abs().max() / (expected.max() - expected.min())
    assert difference.item() <= tolerance


def parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize("name", PARAMETERS)
def test_sizes_names_and_cost_are_the_published_ones(name: str) -> None:
    model = timm.create_model(name).eval()
    state = model.state_dict()
    assert parameters(model) == PARAMETERS[name]
    assert parameters(model) - parameters(model.norm) - parameters(model.head) == BODY_PARAMETERS[name]
    assert list(state) == reference.official_keys(name)
    assert len(state) == ENTRIES[name]
    macs, flops = count(model)
    assert macs / 1e6 == pytest.approx(MILLION_MACS[name], rel=0.005)
    assert flops / 1e6 == pytest.approx(MILLION_FLOPS[name], rel=0.0005)


def count(model: nn.Module) -> tuple[float, int]:
    """Multiply-accumulates at 224 px as papers count them (2 per value of a BatchNorm, 5 of a LayerNorm), and FLOPs."""
    total = 0.0

    def see(module: nn.Module, inputs: tuple[torch.Tensor, ...], out: torch.Tensor) -> None:
        nonlocal total
        if isinstance(module, nn.Conv2d):
            total += out.numel() * module.weight[0].numel()
        elif isinstance(module, nn.Linear):
            total += out.numel() * module.in_features
        elif isinstance(module, nn.BatchNorm2d):
            total += 2 * out.numel()
        elif isinstance(module, nn.LayerNorm):
            total += 5 * out.numel()
        elif hasattr(module, "num_heads"):
            total += 2 * 49 * inputs[0].numel()  # scores and values: every token meets the 49 of its window

    handles = [module.register_forward_hook(see) for module in model.modules()]
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 3, 224, 224))
    for handle in handles:
        handle.remove()
    return total, counter.get_total_flops()


@pytest.mark.parametrize(
    ("height", "width", "window"),
    [(224, 224, 7), (256, 320, 7), (200, 264, 7), (320, 320, 10), (224, 224, 0)],
)
def test_network_equals_its_equations(emo_1m: EMO, height: int, width: int, window: int) -> None:
    model = timm.create_model("emo_1m", window_size=window).eval()
    model.load_state_dict(emo_1m.state_dict())
    check_network(model, "emo_1m", images(1, 3, height, width), window)


def test_largest_network_equals_its_equations() -> None:
    torch.manual_seed(0)
    check_network(shake(timm.create_model("emo_6m")).eval(), "emo_6m", images(1, 3, 96, 136), 7)


def check_network(model: EMO, name: str, x: torch.Tensor, window: int) -> None:
    state = {key: value.double() for key, value in model.state_dict().items()}
    with torch.no_grad():
        logits, maps = reference.network(x.double(), state, name, window)
        last, found = model.forward_intermediates(x)
        close(model(x), logits)
        close(model.forward_head(last), logits)
    for ours, expected in zip(found, maps, strict=True):
        close(ours, expected)
    assert found[-1].abs().max() > 0.1


def test_training_step_equals_its_equations_in_double_precision() -> None:
    torch.manual_seed(0)
    model = shake(timm.create_model("emo_1m", num_classes=7, drop_path_rate=0.0)).double().train()
    x, labels = images(2, 3, 72, 40).double(), torch.tensor([0, 6])
    results = []
    for run in (model, lambda x: reference.network(x, live(model), "emo_1m", training=True)[0]):
        model.zero_grad()
        loss = nn.functional.cross_entropy(run(x), labels, label_smoothing=0.1)
        loss.backward()
        norm = torch.stack([parameter.grad.norm() for parameter in model.parameters()])
        results.append((loss.item(), norm.norm().item(), norm))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-9)
    assert results[0][1] == pytest.approx(results[1][1], rel=1e-9)
    torch.testing.assert_close(results[0][2], results[1][2], rtol=1e-7, atol=1e-9 * results[1][1])


def live(model: nn.Module) -> dict[str, torch.Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def test_drop_path_grows_linearly_over_all_blocks_and_spares_the_first_of_a_stage() -> None:
    model = timm.create_model("emo_1m", drop_path_rate=0.3)
    rates = torch.linspace(0, 0.3, 15).tolist()
    blocks = [block for index in range(1, 5) for block in getattr(model, f"stage{index}")]
    first = {0, 2, 4, 12}
    for number, (block, rate) in enumerate(zip(blocks, rates, strict=True)):
        found = getattr(block.drop_path, "drop_prob", 0.0)
        assert found == pytest.approx(0.0 if number in first else rate)
    default = timm.create_model("emo_1m").stage4[-1].drop_path.drop_prob
    assert default == pytest.approx(0.04036)


def test_initial_values() -> None:
    torch.manual_seed(0)
    model = timm.create_model("emo_1m")
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            bound = 1 / math.sqrt(module.weight[0].numel())
            assert module.weight.abs().max() <= bound, name
            if module.weight.numel() > 2000:
                assert module.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05), name
            if module.bias is not None:
                assert 0 < module.bias.abs().max() <= bound, name
        elif isinstance(module, nn.BatchNorm2d | nn.LayerNorm):
            assert torch.equal(module.weight, torch.ones_like(module.weight))
            assert not module.bias.any()
            assert module.eps == 1e-6
    assert model.head.weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert not model.head.bias.any()


@pytest.mark.parametrize(("name", "wrapper"), [("emo_1m", "getter"), ("emo_5m", "list")])
def test_feature_pyramid(name: str, wrapper: str) -> None:
    torch.manual_seed(0)
    full = shake(timm.create_model(name)).eval()
    pyramid = timm.create_model(name, features_only=True, feature_cls=wrapper, out_indices=(1, 2, 3)).eval()
    assert pyramid.feature_info.channels() == DIMS[name][1:4]
    assert pyramid.feature_info.reduction() == [4, 8, 16]
    state = full.state_dict()
    prefix = "model." if wrapper == "getter" else ""
    own = pyramid.state_dict()
    pyramid.load_state_dict({key: state[key.removeprefix(prefix)] for key in own})
    assert not any(key.removeprefix(prefix).startswith(("norm", "head", "stage4")) for key in own)
    x = images(2, 3, 74, 50)
    with torch.no_grad():
        found, expected = pyramid(x), full.forward_intermediates(x, intermediates_only=True)[1:4]
    assert [tuple(ours.shape[-2:]) for ours in found] == [(19, 13), (10, 7), (5, 4)]
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)
        assert ours.is_contiguous(memory_format=torch.channels_last)


def test_default_pyramid_has_five_maps() -> None:
    pyramid = timm.create_model("emo_1m", features_only=True)
    assert pyramid.feature_info.channels() == DIMS["emo_1m"]
    assert pyramid.feature_info.reduction() == [2, 4, 8, 16, 32]


def test_intermediates(emo_1m: EMO) -> None:
    x = images(1, 3, 64, 64)
    with torch.no_grad():
        features = emo_1m.forward_features(x)
        last, maps = emo_1m.forward_intermediates(x, indices=2)
        assert len(maps) == 2
        torch.testing.assert_close(last, features)
        torch.testing.assert_close(emo_1m.norm(maps[-1]), features)
        (normed,) = emo_1m.forward_intermediates(x, indices=[4], norm=True, intermediates_only=True)
        torch.testing.assert_close(normed, features)
        early, (one,) = emo_1m.forward_intermediates(x, indices=[-4], stop_early=True)
        assert early is one
        assert one.shape == (1, 32, 16, 16)
        torch.testing.assert_close(emo_1m.forward_head(features, pre_logits=True), features.mean((2, 3)))
    with pytest.raises(ValueError, match="output_fmt: 'NLC'"):
        emo_1m.forward_intermediates(x, output_fmt="NLC")


def test_classifier_can_be_replaced_and_removed() -> None:
    model = EMO(**SMALL).eval()
    x = images(2, 3, 64, 64)
    assert model.get_classifier().out_features == model.num_classes == 5
    assert model.num_features == model.head_hidden_size == 24
    model.reset_classifier(3)
    assert model(x).shape == (2, 3)
    assert model.num_classes == 3
    model.reset_classifier(4, "max")
    torch.testing.assert_close(model(x), model.head(model.forward_features(x).amax((2, 3))))
    model.reset_classifier(0)
    assert model(x).shape == (2, 24)
    model.reset_classifier(0, "")
    assert model(x).shape == (2, 24, 2, 2)
    with pytest.raises(ValueError, match="global_pool: '' leaves a map"):
        model.reset_classifier(2)
    with pytest.raises(ValueError, match="global_pool: 'sum' is not known"):
        model.reset_classifier(2, "sum")


def test_pruned_network_ends_after_the_stage_asked_for() -> None:
    model = EMO(**SMALL).eval()
    x = images(1, 3, 64, 64)
    expected = model.forward_intermediates(x, intermediates_only=True)[2]
    assert model.prune_intermediate_layers([2], prune_norm=True) == [2]
    assert parameters(model.stage3) == parameters(model.stage4) == parameters(model.norm) == 0
    torch.testing.assert_close(model(x), expected)


def test_layers_are_grouped_from_input_to_output() -> None:
    from timm.models import group_parameters

    model = EMO(**SMALL)
    for coarse, groups in ((True, 6), (False, 9)):
        matched = group_parameters(model, model.group_matcher(coarse))
        assert len(matched) == groups
        order = [name for names in matched.values() for name in names]
        assert sorted(order) == sorted(name for name, _ in model.named_parameters())
        assert len(matched[0]) == 12
        assert all(name.startswith("stage0") for name in matched[0])
    assert model.no_weight_decay() == set()


def test_checkpointed_training_has_the_same_gradients() -> None:
    torch.manual_seed(0)
    x = images(2, 3, 64, 64)
    model = EMO(**SMALL).train()
    gradients = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        model(x).square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, checkpointed)


@pytest.mark.parametrize("stride", [8, 16])
def test_dilated_network_holds_the_maps_of_the_strided_one(stride: int) -> None:
    torch.manual_seed(0)
    options = {**SMALL, "head_dims": (0, 0, 0, 0)}  # windows of another map are other windows
    plain = shake(EMO(**options)).eval()
    dilated = EMO(**options, output_stride=stride).eval()
    dilated.load_state_dict(plain.state_dict())
    x = images(1, 3, 100, 64)
    with torch.no_grad():
        expected, found = (model.forward_intermediates(x, intermediates_only=True) for model in (plain, dilated))
    reductions = [info["reduction"] for info in dilated.feature_info]
    assert reductions == [min(full, stride) for full in (2, 4, 8, 16, 32)]
    for index, reduction in enumerate(reductions):
        step = 2 ** (index + 1) // reduction
        assert found[index].shape[-2:] == (math.ceil(100 / reduction), math.ceil(64 / reduction))
        torch.testing.assert_close(found[index][:, :, ::step, ::step], expected[index])


def test_fused_network_is_a_copy_with_equal_outputs(emo_1m: EMO) -> None:
    before = {key: value.clone() for key, value in emo_1m.state_dict().items()}
    fused = emo_1m.fuse()
    assert not any(isinstance(module, nn.BatchNorm2d) for module in fused.modules())
    assert all(torch.equal(before[key], value) for key, value in emo_1m.state_dict().items())
    assert not fused.training
    for size in ((96, 72), (224, 224)):
        x = images(2, 3, *size)
        with torch.no_grad():
            close(fused(x), emo_1m(x))


def test_fused_pyramid_has_equal_maps() -> None:
    torch.manual_seed(0)
    pyramid = shake(timm.create_model("emo_1m", features_only=True)).eval()
    x = images(1, 3, 64, 64)
    with torch.no_grad():
        expected = pyramid(x)
        fused = reparameterize_model(pyramid)
        assert not any(isinstance(module, nn.BatchNorm2d) for module in fused.modules())
        for ours, theirs in zip(fused(x), expected, strict=True):
            close(ours, theirs)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_network_runs_in_channels_last_whatever_comes_in(channels: int) -> None:
    model = EMO(**SMALL, in_chans=channels).eval()
    seen = []
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.BatchNorm2d):
            module.register_forward_hook(
                lambda module, inputs, out: seen.append(out.is_contiguous(memory_format=torch.channels_last))
            )
    model(images(2, channels, 64, 64))
    first = 1 if channels == 1 else 0  # what the stem's convolution returns for an ambiguous input
    assert all(seen[first:])


def test_half_precision_training_stays_close_to_single() -> None:
    torch.manual_seed(0)
    model = EMO(**SMALL).train()
    x, labels = images(8, 3, 64, 64), torch.arange(8) % 5
    results = []
    for enabled in (False, True):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = nn.functional.cross_entropy(model(x), labels)
        loss.backward()
        results.append((loss.item(), torch.cat([p.grad.flatten() for p in model.parameters()])))
    assert results[1][0] == pytest.approx(results[0][0], rel=0.02)
    assert torch.cosine_similarity(results[0][1], results[1][1], dim=0) > 0.98


def test_compiles_without_graph_breaks() -> None:
    model = EMO(**SHALLOW).eval()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    x = images(2, 3, 72, 64)
    torch.testing.assert_close(compiled(x), model(x))
    trained = torch.compile(EMO(**SHALLOW, drop_path_rate=0.1).train(), backend="aot_eager", fullgraph=True)
    trained(x).sum().backward()
    assert all(parameter.grad is not None for parameter in trained.parameters())


def test_exported_program_takes_any_batch() -> None:
    model = EMO(**SHALLOW).eval()
    batch = torch.export.Dim("batch", min=1)
    program = torch.export.export(model, (images(2, 3, 64, 64),), dynamic_shapes=({0: batch},)).module()
    for number in (1, 8):
        x = images(number, 3, 64, 64)
        with torch.no_grad():
            close(program(x), model(x))


def test_onnx_equals_torch_for_any_batch(emo_1m: EMO, tmp_path: Path) -> None:
    import onnxruntime

    model = timm.create_model("emo_1m", window_size=0).eval()
    model.load_state_dict(emo_1m.state_dict())
    write_onnx(model, tmp_path / "emo.onnx", channels=3, size=64, opset=18, tolerance=1e-5)
    session = onnxruntime.InferenceSession(str(tmp_path / "emo.onnx"), providers=["CPUExecutionProvider"])
    for number in (1, 8):
        x = images(number, 3, 64, 64)
        with torch.no_grad():
            close(torch.from_numpy(session.run(None, {"images": x.numpy()})[0]), model(x))


@pytest.mark.parametrize("decoder", ["Unet", "FPN", "PSPNet", "Segformer", "UPerNet", "DeepLabV3", "DeepLabV3Plus"])
def test_decoders_take_it_as_encoder(decoder: str) -> None:
    import segmentation_models_pytorch as smp

    model = getattr(smp, decoder)("tu-emo_1m", encoder_weights=None, classes=4).eval()
    with torch.no_grad():
        assert model(images(1, 3, 64, 96)).shape == (1, 4, 64, 96)


def plain_file(tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    return tensors


def training_file(tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    """With the raw weights beside the averaged ones."""
    raw = {key: torch.zeros_like(value) for key, value in tensors.items()}
    return {"net": raw, "net_E": tensors, "optimizer": {}, "epoch": 300}


def parallel_file(tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    return {"net": {f"module.{key}": value for key, value in tensors.items()}}


FILES = {"plain": plain_file, "training": training_file, "parallel": parallel_file}


@pytest.mark.parametrize("form", FILES)
def test_released_files_load_through_timm(emo_1m: EMO, tmp_path: Path, form: str) -> None:
    state = emo_1m.state_dict()
    file = str(tmp_path / "net.pth")
    torch.save(FILES[form](state), file)

    def load(**options: Any) -> nn.Module:
        return timm.create_model("emo_1m", pretrained=True, pretrained_cfg_overlay={"file": file}, **options)

    same = load().state_dict()
    assert all(torch.equal(same[key], value) for key, value in state.items())
    ten = load(num_classes=10)
    assert ten.head.weight.shape == (10, 168)
    assert torch.equal(ten.norm.norm.weight, emo_1m.norm.norm.weight)
    grey = load(in_chans=1).state_dict()["stage0.0.convs.0.0.weight"]
    torch.testing.assert_close(grey, state["stage0.0.convs.0.0.weight"].sum(1, keepdim=True))
    pyramid = load(features_only=True).state_dict()
    assert len(pyramid) == 217 - 4
    assert all(torch.equal(value, state[key]) for key, value in pyramid.items())


def test_backbone_of_a_detector_loads_without_final_layers(emo_1m: EMO, tmp_path: Path) -> None:
    state = {key: value for key, value in emo_1m.state_dict().items() if not key.startswith(("norm.", "head."))}
    content = {f"backbone.{key}": value for key, value in state.items()} | {"neck.conv.weight": torch.zeros(1)}
    file = str(tmp_path / "detector.pth")
    torch.save({"state_dict": content, "meta": {}}, file)
    with pytest.warns(UserWarning, match="no final norm and classifier"):
        model = timm.create_model("emo_1m", pretrained=True, pretrained_cfg_overlay={"file": file})
    loaded = model.state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in state.items())


def another_size(state: dict[str, torch.Tensor]) -> dict[str, Any]:
    return timm.create_model("emo_2m").state_dict()


def second_version(state: dict[str, torch.Tensor]) -> dict[str, Any]:
    return {**state, "stage3.1.eops.0.qk.conv.weight": torch.zeros(1)}


def scaled_second_version(state: dict[str, torch.Tensor]) -> dict[str, Any]:
    return {**state, "stage3.1.ls.gamma": torch.zeros(1)}


def truncated(state: dict[str, torch.Tensor]) -> dict[str, Any]:
    return {key: value for key, value in state.items() if not key.startswith("stage4.2.")}


def another_network(state: dict[str, torch.Tensor]) -> dict[str, Any]:
    return {"layer1.weight": torch.zeros(2)}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (another_size, r"stage3\.0\.proj\.conv\.weight \(120, 288, 1, 1\), the network has \(80, 288.*fits emo_2m"),
        (second_version, "file of EMOv2"),
        (scaled_second_version, "file of EMOv2"),
        (truncated, r"13 missing: stage4\.2\.conv_local.*fits no size of EMO"),
        (another_network, r"missing: .*; 1 unexpected: layer1\.weight; the file fits no size"),
        (lambda state: {"epoch": 3}, r"holds no tensors, only epoch"),
    ],
)
def test_files_that_do_not_fit_say_why(
    emo_1m: EMO, tmp_path: Path, make: Callable[[dict[str, torch.Tensor]], dict[str, Any]], message: str
) -> None:
    file = str(tmp_path / "net.pth")
    torch.save(make(dict(emo_1m.state_dict())), file)
    with pytest.raises(ValueError, match=message):
        timm.create_model("emo_1m", pretrained=True, pretrained_cfg_overlay={"file": file})


@pytest.mark.parametrize(
    ("classes", "options", "kept"),
    [
        (10, {}, False),
        (10, {"num_classes": 10}, False),
        (10, {"num_classes": 10, "declared": 10}, True),
        (10, {"num_classes": 7, "declared": 7}, False),
        (1000, {"num_classes": 10}, None),
        (1000, {}, True),
    ],
)
def test_a_classifier_is_kept_or_its_loss_is_told(
    emo_1m: EMO, tmp_path: Path, classes: int, options: dict[str, int], kept: bool | None
) -> None:
    """None: another number of classes was asked for, so the new classifier is no surprise."""
    options, file = dict(options), str(tmp_path / "net.pth")
    head = images(classes, 168)
    torch.save({**emo_1m.state_dict(), "head.weight": head, "head.bias": torch.zeros(classes)}, file)
    overlay = {"file": file, "num_classes": options.pop("declared", 1000)}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = timm.create_model("emo_1m", pretrained=True, pretrained_cfg_overlay=overlay, **options)
    told = [warning for warning in caught if f"give num_classes={classes}" in str(warning.message)]
    assert len(told) == (kept is False)
    assert torch.equal(model.norm.norm.weight, emo_1m.norm.norm.weight)
    if kept:
        assert torch.equal(model.head.weight, head)
    else:
        assert model.head.weight.std().item() == pytest.approx(0.02, rel=0.2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attn_pre": False}, r"stage 4: attn_pre: False .*int\(168 \* 3.5\) = 588 do not divide into 8; EMO-1M"),
        ({"v_group": True}, r"stage 4: v_group: True"),
        ({"window_size": -3}, "window_size: -3 is negative"),
        ({"window_layout": "swin"}, "window_layout: 'swin'"),
        ({"output_stride": 4}, "output_stride: 4, but EMO supports 8, 16 and 32"),
        ({"head_dims": (0, 0, 20, 20)}, "stage 4: head_dim: 168 channels do not divide into heads of 20; give 21"),
        ({"kernel_sizes": (3, 4, 5, 5)}, "stage 2: kernel_size: 4 is not odd"),
        ({"depths": (2, 2, 8)}, r"depths: \(2, 2, 8\) has 3 values, expected 4"),
        ({"dims": (2, 2, 8, 4, 5)}, r"dims: .* has 5 values, expected 4"),
        ({"depths": (2, 0, 8, 3)}, "a stage without blocks"),
    ],
)
def test_impossible_networks_say_why(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        timm.create_model("emo_1m", **options)


def test_unknown_options_are_refused() -> None:
    with pytest.raises(TypeError, match="img_size"):
        timm.create_model("emo_1m", img_size=64)
    with pytest.raises(TypeError, match="windows"):
        timm.create_model("emo_1m", windows=7)


@pytest.mark.parametrize("name", ["emo_2m", "emo_5m", "emo_6m"])
def test_larger_networks_can_expand_before_attending(name: str) -> None:
    model = timm.create_model(name, attn_pre=False, num_classes=3).eval()
    assert list(model.state_dict()) == reference.official_keys(name)
    assert model(images(1, 3, 32, 32)).shape == (1, 3)


@pytest.mark.parametrize("size", [1, 8, 28, 33])
def test_any_image_size_works_and_tiny_ones_are_told(size: int) -> None:
    model = EMO(**SMALL, window_size=0).eval()
    _warn_of_small_images.cache_clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert model(images(2, 3, size, size)).isfinite().all()
        model(images(2, 3, size, size))
    told = [warning for warning in caught if f"image of {size}x{size} is smaller than 32" in str(warning.message)]
    assert len(told) == (size < 32)


@pytest.mark.parametrize("shape", [(2, 4, 32, 32), (2, 1, 32, 32), (3, 32, 32)])
def test_images_of_other_channels_are_told(emo_1m: EMO, shape: tuple[int, ...]) -> None:
    with pytest.raises(
        ValueError, match=rf"images of shape {re.escape(str(shape))}, but the network takes \(batch, 3,"
    ):
        emo_1m(torch.zeros(shape))


def test_networks_of_the_suite_are_found_by_name() -> None:
    require_timm_model("emo_1m", "encoder")
    network = create_network("emo_1m", image_size=64, in_channels=1, num_classes=4, options={"window_size": 0})
    assert network(images(2, 1, 64, 64)).shape == (2, 4)
    with pytest.raises(ValueError, match=r"nearest: .*emo_"):
        require_timm_model("emo_3m", "encoder")
    assert set(timm.list_models("emo_*")) == set(ARCHITECTURES)
