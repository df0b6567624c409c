import pytest
import timm
import torch
from torch import nn

from modules.feature_backbones import FeatureBackbone
from modules.segmentation.lightning_module import synchronise_statistics

SMALL = "mobilenetv3_small_050"


def images(side=64):
    return torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(0))


def random_network(name, **options):
    torch.manual_seed(1)
    network = timm.create_model(name, **options)
    network.train()(images())  # statistics that are not the initial ones
    return network.eval()


@pytest.mark.parametrize("name", [SMALL, "resnet18"])
@pytest.mark.parametrize("ending", ["pth", "safetensors"])
def test_weights_of_a_file_give_the_maps_of_the_whole_model(name, ending, tmp_path):
    network = random_network(name)
    if ending == "pth":
        torch.save(network.state_dict(), tmp_path / "weights.pth")
    else:
        from safetensors.torch import save_file

        save_file(network.state_dict(), tmp_path / "weights.safetensors")
    backbone = FeatureBackbone(name, (2, 3, 4)).eval()
    backbone.load_pretrained(tmp_path / f"weights.{ending}")
    expected = network.forward_intermediates(images(), indices=[2, 3, 4], intermediates_only=True)
    for own, reference in zip(backbone(images()), expected, strict=True):
        assert torch.allclose(own, reference, atol=1e-5)


def test_weights_of_a_checkpoint_of_dense_prediction(tmp_path):
    torch.manual_seed(2)
    trained = FeatureBackbone("convnext_atto", (1, 2, 3))
    state = {f"network.backbone.{key}": value for key, value in trained.state_dict().items()}
    torch.save({"state_dict": {**state, "network.head.weight": torch.zeros(3)}}, tmp_path / "last.ckpt")
    backbone = FeatureBackbone("convnext_atto", (2, 3))
    backbone.load_pretrained(tmp_path / "last.ckpt")
    for own, reference in zip(backbone.eval()(images()), trained.eval()(images())[1:], strict=True):
        assert torch.equal(own, reference)


def test_channels_and_reductions_are_those_of_the_maps():
    backbone = FeatureBackbone("resnet18", (1, 4))
    assert backbone.channels == [64, 512]
    assert backbone.reductions == [4, 32]
    assert [tuple(level.shape) for level in backbone(images())] == [(2, 64, 16, 16), (2, 512, 2, 2)]


def test_an_output_stride_keeps_the_last_maps_larger():
    backbone = FeatureBackbone("resnet18", (3, 4), output_stride=16)
    assert backbone.reductions == [16, 16]
    assert [level.shape[-1] for level in backbone(images())] == [4, 4]


def test_an_output_stride_that_a_model_cannot_have():
    with pytest.raises(ValueError, match=r"convnext_atto has no stages \(0, 1\) with output_stride 7"):
        FeatureBackbone("convnext_atto", (0, 1), output_stride=7)
    with pytest.raises(ValueError, match=r"visformer_tiny cannot be built with output_stride 8"):
        FeatureBackbone("visformer_tiny", (0, 1), output_stride=8)


@pytest.mark.parametrize(
    ("name", "frozen", "last", "free"),
    [
        ("resnet18", 1, "bn1", "layer1"),
        ("resnet18", 2, "layer1", "layer2"),
        (SMALL, 2, "blocks.0", "blocks.1"),
        ("convnext_atto", 1, "stages_0", "stages_1"),
    ],
)
def test_frozen_stages_keep_weights_and_statistics(name, frozen, last, free):
    torch.manual_seed(0)
    backbone = FeatureBackbone(name, (-2, -1), frozen_stages=frozen)
    before = {key: value.clone() for key, value in backbone.body.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in backbone.parameters() if p.requires_grad], lr=1.0)
    sum(level.square().mean() for level in backbone(images())).backward()
    optimizer.step()
    after = backbone.body.state_dict()
    names = list(before)
    position = max(place for place, key in enumerate(names) if key.startswith(f"{last}."))
    assert all(torch.equal(before[key], after[key]) for key in names[: position + 1])
    moved = [key for key in names if key.startswith(f"{free}.") and not torch.equal(before[key], after[key])]
    assert any(key.endswith("weight") for key in moved)
    if name != "convnext_atto":
        assert any(key.endswith("running_mean") for key in moved)


@pytest.mark.parametrize(("name", "last"), [("resnet18", "layer1"), (SMALL, "blocks.0"), ("emo_1m", "stage1")])
def test_frozen_stages_stay_so_with_statistics_over_all_processes(name, last):
    """The conversion puts other norms in the place of those that were frozen; a CPU can make it, though not run it."""
    frozen, partly = (FeatureBackbone(name, (-2, -1), frozen_stages=2, norm_eval=flag) for flag in (False, True))
    for backbone in (frozen, partly):
        synchronise_statistics(backbone).eval().train()
    norms = {key: part for key, part in frozen.body.named_modules() if isinstance(part, nn.SyncBatchNorm)}
    order = list(dict(frozen.body.named_modules()))
    end = max(place for place, key in enumerate(order) if f"{key}.".startswith(f"{last}."))
    first = [part for key, part in norms.items() if order.index(key) <= end]
    assert first
    assert not any(part.training or part.weight.requires_grad for part in first)
    rest = [part for part in norms.values() if part not in first]
    assert rest
    assert all(part.training and part.weight.requires_grad for part in rest)
    assert not any(part.training for part in partly.modules() if isinstance(part, nn.SyncBatchNorm))


def test_norm_eval_keeps_all_statistics_and_trains_all_weights():
    backbone = FeatureBackbone("resnet18", (3, 4), norm_eval=True)  # in training mode without a call of train()
    assert backbone.training
    before = {key: value.clone() for key, value in backbone.named_buffers()}
    sum(level.sum() for level in backbone(images())).backward()
    assert all(torch.equal(before[key], value) for key, value in backbone.named_buffers())
    assert all(parameter.grad is not None for parameter in backbone.parameters())
    assert backbone.body.layer4.training


def test_statistics_move_without_norm_eval():
    backbone = FeatureBackbone("resnet18", (3, 4)).train()
    before = backbone.body.bn1.running_mean.clone()
    backbone(images())
    assert not torch.equal(before, backbone.body.bn1.running_mean)


def test_unknown_names_indices_and_numbers_of_stages():
    with pytest.raises(ValueError, match=r"backbone: 'resnet81' is not a timm model; nearest: "):
        FeatureBackbone("resnet81", (3, 4))
    with pytest.raises(ValueError, match=r"resnet18 has no stages \(3, 9\)"):
        FeatureBackbone("resnet18", (3, 9))
    with pytest.raises(ValueError, match=r"frozen_stages: 6, but resnet18 has 5 stages"):
        FeatureBackbone("resnet18", (3, 4), frozen_stages=6)
    with pytest.raises(ValueError, match=r"cannot be built with output_stride 32 and \{'windows': 3\}"):
        FeatureBackbone("resnet18", (3, 4), options={"windows": 3})


def test_a_missing_file_and_one_of_another_model(tmp_path):
    backbone = FeatureBackbone("resnet18", (3, 4))
    with pytest.raises(FileNotFoundError, match="init_from: there is no file"):
        backbone.load_pretrained(tmp_path / "nothing.pth")
    torch.save(timm.create_model("resnet34").state_dict(), tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"init_from: .*other.pth does not fit ResNet: .* not in the network"):
        backbone.load_pretrained(tmp_path / "other.pth")
