"""Training, evaluation and prediction of DenseSegmenter."""

import math

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional

from callbacks import WarmupWeightAveraging
from modules.segmentation import DenseSegmenter, SegmentationScores
from modules.segmentation.lightning_module import synchronise_statistics
from modules.segmentation.pictures import colour_masks, hue_palette
from tests.modules.street_scenes import CLASSES, TINY_BACKBONE, VOID, Scene, scene, scene_loader
from tests.modules.toy_images import quiet_trainer, silence


def segmenter(**kwargs):
    torch.manual_seed(0)
    return DenseSegmenter(**{"backbone": TINY_BACKBONE, "num_classes": CLASSES, "head": "pspnet", **kwargs})


def fit(module, epochs=1, count=8, **options):
    trainer = quiet_trainer(max_epochs=epochs, **options)
    trainer.fit(module, scene_loader(count), scene_loader(3, size=1, mask_side=96))
    return trainer


def test_the_loss_adds_the_auxiliary_head():
    module, batch = silence(segmenter(auxiliary_weight=0.3, dropout=0.0)), scene()
    loss = module.training_step(batch, 0)["loss"]
    logits, auxiliary = module.network.forward_both(batch.images)
    expected = sum(
        weight * functional.cross_entropy(scores, batch.masks, ignore_index=VOID)
        for weight, scores in ((1.0, logits), (0.3, auxiliary))
    )
    assert loss.item() == pytest.approx(expected.item(), abs=1e-5)


def test_without_auxiliary_head_and_with_class_weights():
    weights = [0.5, 1.0, 2.0, 4.0]
    module, batch = silence(segmenter(auxiliary_weight=0.0, dropout=0.0, class_weights=weights)), scene()
    loss = module.training_step(batch, 0)["loss"]
    logits, auxiliary = module.network.forward_both(batch.images)
    assert auxiliary is None
    expected = functional.cross_entropy(logits, batch.masks, torch.tensor(weights), ignore_index=VOID)
    assert loss.item() == pytest.approx(expected.item(), abs=1e-5)


def test_it_learns():
    module = segmenter(lr=2e-3)
    batch = scene(8)
    optimizer = torch.optim.Adam(module.parameters(), 2e-3)
    losses = []
    silence(module).train()
    for _ in range(15):
        optimizer.zero_grad()
        loss = module.training_step(batch, 0)["loss"]
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.4 * losses[0]


def test_what_is_logged():
    trainer = fit(segmenter())
    logged = trainer.callback_metrics
    assert {"train/loss", "train/auxiliary_loss", "train/acc", "loss"} <= logged.keys()
    assert {"val/miou", "val/aacc", "val/macc", "val/loss", "val/main"} <= logged.keys()
    assert logged["val/main"] == logged["val/miou"]
    assert all(math.isfinite(value) for value in logged.values())


def test_the_main_metric_can_be_chosen():
    logged = fit(segmenter(main_metric="aacc")).callback_metrics
    assert logged["val/main"] == logged["val/aacc"]


def test_evaluation_compares_at_the_size_of_the_masks():
    module = segmenter().eval()
    batches = [scene(2, mask_side=96), scene(1, mask_side=96, seed=1)]
    for number, batch in enumerate(batches):
        module.validation_step(batch, number)
    values = module.evaluation_scores("val")
    reference, losses = SegmentationScores(CLASSES), []
    with torch.no_grad():
        for batch in batches:
            logits = functional.interpolate(module(batch.images), size=(96, 96), mode="bilinear", align_corners=False)
            reference.update(logits.argmax(1), batch.masks)
            losses += [
                functional.cross_entropy(one[None], mask[None], ignore_index=VOID).item()
                for one, mask in zip(logits, batch.masks, strict=True)
            ]
    for name in ("miou", "aacc", "macc"):
        assert values[f"val/{name}"].item() == pytest.approx(reference.compute()[name].item(), abs=1e-6)
    assert values["val/loss"].item() == pytest.approx(sum(losses) / 3, abs=1e-5)
    assert not module.scores["val"].counts.confmat.any()


def test_pictures_of_different_sizes_are_evaluated_one_by_one():
    module = segmenter().eval()
    small, large = scene(1), scene(1, side=96, mask_side=80, seed=1)
    mixed = Scene([small.images[0], large.images[0]], [small.masks[0], large.masks[0]], torch.tensor([4, 7]))
    together = module.validation_step(mixed, 0)
    counts = module.confusion("val")
    module.evaluation_scores("val")
    apart = [module.validation_step(batch, 0)["masks"][0] for batch in (small, large)]
    assert torch.equal(module.confusion("val"), counts)
    assert all(torch.equal(a, b) for a, b in zip(together["masks"], apart, strict=True))
    predicted = module.predict_step(mixed, 0)
    assert [(mask.dtype, tuple(mask.shape)) for mask in predicted["masks"]] == [
        (torch.uint8, (64, 64)),
        (torch.uint8, (80, 80)),
    ]
    assert predicted["index"].tolist() == [4, 7]
    assert len(module.pictures(mixed)["val/segmentation"]) == 2


def test_nothing_labelled_gives_no_metrics():
    module, batch = segmenter().eval(), scene()
    batch = batch._replace(masks=torch.full_like(batch.masks, VOID))
    module.validation_step(batch, 0)
    with pytest.warns(UserWarning, match="val: no labelled pixel"):
        assert module.evaluation_scores("val") == {}


def test_windows_are_those_of_the_settings():
    module, batch = segmenter(window=48, window_stride=16).eval(), scene()
    whole = segmenter().eval()
    with torch.no_grad():
        total, times = torch.zeros(2, CLASSES, 64, 64), torch.zeros(64, 64)
        for top in (0, 16):
            for left in (0, 16):
                place = (..., slice(top, top + 48), slice(left, left + 48))
                total[place] += whole(batch.images[place])
                times[place] += 1
        torch.testing.assert_close(module(batch.images), total / times)


def test_pictures_show_image_label_and_prediction():
    palette = [[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255]]
    module, batch = segmenter(mean=[0.5] * 3, std=[0.25] * 3, palette=palette).eval(), scene(6)
    shown = module.pictures(batch)["val/segmentation"]
    assert len(shown) == 4
    image, caption = shown[1]
    assert image.shape == (3, 64, 192)
    torch.testing.assert_close(image[..., :64], (batch.images[1] * 0.25 + 0.5).clamp(0, 1))
    label = batch.masks[1]
    assert (image[:, 0, 64] == 0).all(), "void is black"
    assert image[:, 5, 64 + 40].tolist() == [value / 255 for value in palette[label[5, 40]]]
    prediction = module(batch.images)[1].argmax(0)
    assert image[:, 5, 128 + 40].tolist() == [value / 255 for value in palette[prediction[5, 40]]]
    accuracy = (prediction == label)[label != VOID].float().mean().item()
    assert caption == f"row 1: {accuracy:.0%} of pixels"


def test_colours():
    masks = torch.tensor([[0, 1], [VOID, 1]])
    painted = colour_masks(masks, [[255, 0, 0], [0, 0, 255]])
    assert painted[:, 0, 0].tolist() == [1, 0, 0]
    assert painted[:, 1, 1].tolist() == [0, 0, 1]
    assert painted[:, 1, 0].tolist() == [0, 0, 0]
    assert len({tuple(colour) for colour in hue_palette(150)}) == 150


def test_the_deployable_network_has_no_auxiliary_head_and_the_same_logits():
    module = segmenter()
    network = module.deployable_network()
    images = scene().images
    assert not network.training
    assert not any("auxiliary" in name for name in network.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(network(images), module.eval()(images))


# Optimisation


def rates(trainer):
    optimizer = trainer.optimizers[0]
    return {id(p): (g["initial_lr"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}


def test_nothing_with_one_axis_decays():
    module = segmenter(lr=1e-3, head_lr_multiplier=10.0, weight_decay=0.02)
    found = rates(fit(module, limit_train_batches=1))
    assert len(found) == len(list(module.parameters()))
    for name, parameter in module.named_parameters():
        lr, decay = found[id(parameter)]
        assert lr == pytest.approx(1e-3 if name.startswith("network.backbone.") else 1e-2), name
        assert decay == (0.02 if parameter.ndim > 1 else 0.0), name


def test_official_decay_spares_names_with_norm_only():
    module = segmenter(backbone="emo_1m", official_decay=True, weight_decay=0.02)
    found = rates(fit(module, limit_train_batches=1))
    spared = [name for name, parameter in module.named_parameters() if found[id(parameter)][1] == 0]
    assert spared == [name for name, _ in module.named_parameters() if "norm" in name]
    decayed = {name for name, parameter in module.named_parameters() if found[id(parameter)][1] == 0.02}
    stem_norm = [name for name in decayed if "stage0" in name and name.endswith(".convs.0.1.weight")]
    assert stem_norm, "the BatchNorm of the stem"
    assert "network.head.1.bn.weight" in decayed
    assert "network.head.2.conv.bias" in decayed


def test_the_rate_falls_as_a_polynomial_of_the_steps():
    module = segmenter(lr=1e-3)
    seen = []
    module.on_train_batch_start = lambda *args: seen.append(module.trainer.optimizers[0].param_groups[0]["lr"])
    fit(module, epochs=2)
    assert seen == pytest.approx([1e-3 * (1 - step / 8) ** 0.9 for step in range(8)])


def test_a_warm_up_comes_before_the_polynomial():
    module = segmenter(lr=1.0, warmup_epochs=1)
    seen = []
    module.on_train_batch_start = lambda *args: seen.append(module.trainer.optimizers[0].param_groups[0]["lr"])
    fit(module, epochs=2)
    assert seen == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0, 0.75**0.9, 0.5**0.9, 0.25**0.9])


def test_the_rate_is_scaled_to_the_batch():
    module = segmenter(lr=1e-3, lr_reference_batch=32)
    trainer = fit(module, limit_train_batches=1)
    assert {lr for lr, _ in rates(trainer).values()} == {1e-3 * 2 / 32}


# Weights from files, checkpoints


def test_backbone_weights_from_a_file(tmp_path):
    torch.manual_seed(5)
    network = timm.create_model(TINY_BACKBONE, num_classes=10)
    torch.save(network.state_dict(), tmp_path / "weights.pth")
    module = segmenter(init_from=str(tmp_path / "weights.pth"), lr=1e-12)
    fit(module, limit_train_batches=1)
    found = module.network.backbone.body.conv_stem.weight
    torch.testing.assert_close(found, network.conv_stem.weight, atol=1e-6, rtol=0)


def test_a_resumed_run_keeps_its_own_weights(tmp_path):
    network = timm.create_model(TINY_BACKBONE, num_classes=10)
    torch.save(network.state_dict(), tmp_path / "weights.pth")
    settings = {"init_from": str(tmp_path / "weights.pth"), "lr": 1e-2}
    trainer = fit(segmenter(**settings))
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    (tmp_path / "weights.pth").unlink()
    module = segmenter(**settings)
    further = quiet_trainer(max_epochs=1)
    further.fit(module, scene_loader(8), ckpt_path=tmp_path / "last.ckpt", weights_only=True)
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(value, saved[name]) for name, value in module.state_dict().items())


def test_a_checkpoint_holds_plain_values(tmp_path):
    module = segmenter(palette=hue_palette(CLASSES), class_names=list("abcd"), backbone_options={})
    fit(module, limit_train_batches=1).save_checkpoint(tmp_path / "x.ckpt")
    again = DenseSegmenter.load_from_checkpoint(tmp_path / "x.ckpt", weights_only=True)
    assert again.class_names == list("abcd")
    images = scene().images
    with torch.no_grad():
        assert torch.equal(again.eval()(images), module.eval()(images))


def test_averaged_and_raw_weights_are_both_scored():
    module = segmenter(lr=1e-2)
    logged = fit(module, epochs=2, callbacks=[WarmupWeightAveraging(decay=0.9)]).callback_metrics
    assert {"raw/val/miou", "val/miou", "raw/val/main"} <= logged.keys()
    assert logged["raw/val/loss"] != logged["val/loss"]


# Statistics over processes


def test_statistics_of_all_processes_keep_the_activation_of_timm_s_norms():
    network = segmenter().network
    before = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    images = scene().images
    with torch.no_grad():
        expected = network.eval()(images)
    converted = synchronise_statistics(network)
    after = [module for module in converted.modules() if isinstance(module, nn.SyncBatchNorm)]
    assert len(after) == len(before) > 30
    assert {id(p) for p in converted.parameters()} == {id(p) for m in [network] for p in m.parameters()}
    torch.testing.assert_close(_plain(converted, images), expected)


@torch.no_grad()
def _plain(network, images):
    """SyncBatchNorm refuses to run on a CPU, in evaluation as well; its arithmetic there is that of BatchNorm."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.SyncBatchNorm, "forward", nn.BatchNorm2d.forward)
        return network.eval()(images)


def test_nothing_is_shared_on_a_cpu():
    module = segmenter()
    fit(module, limit_train_batches=1)
    assert not any(isinstance(part, nn.SyncBatchNorm) for part in module.modules())


# Values outside their range

WRONG = {
    "num_classes: 1 is outside 2..255": {"num_classes": 1},
    "main_metric: 'kappa' is unknown; expected miou, aacc, macc": {"main_metric": "kappa"},
    r"dropout: 1.0 is outside \[0, 1\)": {"dropout": 1.0},
    "auxiliary_weight: -1 is negative": {"auxiliary_weight": -1},
    "head_lr_multiplier: 0 is not positive": {"head_lr_multiplier": 0},
    "lr: 0 is not positive": {"lr": 0},
    "class_weights: 2 values for 4 classes": {"class_weights": [1.0, 2.0]},
    "class_names: 1 values for 4 classes": {"class_names": ["road"]},
    "palette: 1 values for 4 classes": {"palette": [[0, 0, 0]]},
    "window: 0 is below 1": {"window": 0},
    "window_stride: 9 is outside 1..window": {"window": 8, "window_stride": 9},
    "window_stride: 4 is outside 1..window": {"window_stride": 4},
    "backbone: 'emu_1m' is not a timm model; nearest": {"backbone": "emu_1m"},
}


@pytest.mark.parametrize("message", WRONG)
def test_a_wrong_value_is_told(message):
    with pytest.raises(ValueError, match=message):
        segmenter(**WRONG[message])


@pytest.mark.parametrize("head", ["deeplabv3", "pspnet"])
def test_a_batch_of_one_picture_is_told(head):
    module = silence(segmenter(head=head))
    with pytest.raises(ValueError, match=rf"holds 1 image, but the head {head} .*data.batch_size above 1"):
        module.training_step(scene(1), 0)
