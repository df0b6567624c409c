import math

import pytest
import timm
import torch
from torch import nn
from torch.utils.data import DataLoader

from lightning_apps.exporting import write_onnx
from modules.optimization import epoch_cosine, groups_by_name
from tests.distributed import run_ranks
from tests.modules.boxes import BACKBONE, SIDE, box_loader, detection_batch, detector
from tests.modules.toy_images import quiet_trainer, silence


def test_training_finds_rectangles(tmp_path):
    module = detector(lr=4e-3, warmup_steps=5, weight_decay=0.0, class_metrics=True, class_names=["red", "blue"])
    trainer = quiet_trainer(max_epochs=25, check_val_every_n_epoch=25, default_root_dir=tmp_path)
    trainer.fit(module, box_loader(2, 8), box_loader(1, 8))
    values = {name: value.item() for name, value in trainer.callback_metrics.items()}
    assert values["val/map_50"] > 0.3
    assert values["val/main"] == values["val/map"]
    assert values["train/loss"] == pytest.approx(values["train/classification"] + values["train/regression"], rel=1e-4)
    assert values["train/loss"] < 4
    assert {"val/map_75", "val/map_small", "val/map_medium", "val/map_large"} < values.keys()
    mean = (values["val/map/red"] + values["val/map/blue"]) / 2
    assert mean == pytest.approx(values["val/map"], abs=1e-6)


def test_the_main_metric_is_chosen_and_testing_has_its_own_names():
    module = detector(main_metric="map_50")
    trainer = quiet_trainer()
    trainer.validate(module, box_loader(1), verbose=False)
    assert trainer.callback_metrics["val/main"] == trainer.callback_metrics["val/map_50"]
    trainer.test(module, box_loader(1), verbose=False)
    assert trainer.callback_metrics["test/main"] == trainer.callback_metrics["test/map_50"]


def test_retinanet_trains_and_takes_images_of_different_sizes():
    module = silence(detector("retinanet"))
    batch = detection_batch(range(2))
    batch.images[1] = torch.rand(3, 40, 90)
    batch.targets[1]["boxes"] = torch.tensor([[5.0, 5.0, 30.0, 30.0], [40.0, 3.0, 85.0, 35.0]])
    loss = module.train().training_step(batch, 0)["loss"]
    loss.backward()
    assert math.isfinite(loss.item())
    assert module.features.body.conv_stem.weight.grad.abs().sum() > 0


def test_predictions_are_in_pixels_of_the_picture_on_disk():
    module = detector().eval()
    batch = detection_batch(range(2))
    batch.targets[1]["size"] = torch.tensor([3 * SIDE, SIDE])  # height, width
    with torch.no_grad():
        inside, outputs = module(batch.images), module.predict_step(batch, 0)
    assert outputs["index"].tolist() == [0, 1]
    for found, scaled, factors in zip(inside, outputs["detections"], ([2, 2], [1, 3]), strict=True):
        assert len(found["boxes"]) > 0
        assert torch.allclose(scaled["boxes"], found["boxes"] * torch.tensor(factors * 2))
        assert torch.equal(scaled["labels"], found["labels"])
        assert set(found["labels"].tolist()) <= {1, 2}


class Exact(nn.Module):
    """A network that finds what it was shown beforehand."""

    def __init__(self, targets):
        super().__init__()
        self.targets = targets

    def forward(self, images):
        return [{**target, "scores": torch.ones(len(target["labels"]))} for target in self.targets]


def test_exact_detections_have_an_average_precision_of_one():
    module = silence(detector())
    batch = detection_batch(range(4))
    module.network = Exact([{key: target[key] for key in ("boxes", "labels")} for target in batch.targets])
    module.validation_step(batch, 0)
    assert module.evaluation_scores("val")["val/map"].item() == pytest.approx(1.0)
    assert not module.val_metric.update_called  # ready for the next epoch


def test_no_decay_on_one_axis_and_the_official_grouping():
    module = detector(weight_decay=0.1, lr=1e-3, warmup_steps=0)
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    trainer = quiet_trainer()
    trainer.fit(module, box_loader(1))
    groups = {group["weight_decay"]: group["params"] for group in trainer.optimizers[0].param_groups}
    assert set(groups) == {0.0, 0.1}
    assert all(parameter.ndim == 1 for parameter in groups[0.0])
    assert all(parameter.ndim > 1 for parameter in groups[0.1])
    assert len(groups[0.0]) + len(groups[0.1]) == len(names)

    class Parts(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm2d(3)
            self.bn = nn.BatchNorm2d(3)
            self.frozen = nn.Linear(1, 1).requires_grad_(False)

    parts = Parts()
    decayed, plain = groups_by_name(parts.named_parameters(), 0.1)
    assert decayed == {"params": list(parts.bn.parameters()), "weight_decay": 0.1}
    assert plain == {"params": list(parts.norm.parameters()), "weight_decay": 0.0}


def test_epoch_cosine_is_the_closed_form():
    values = [epoch_cosine(step, 100, 12, 50) for step in range(1200)]
    assert values[0] == pytest.approx(0.001)
    assert values[25] == pytest.approx(0.001 + 0.999 / 2)
    assert values[50:100] == [1.0] * 50
    assert values[600:700] == pytest.approx([0.5] * 100)
    assert values[1199] == pytest.approx(0.5 * (1 + math.cos(math.pi * 11 / 12)))
    assert epoch_cosine(1200, 100, 12, 50) == pytest.approx(0.0)
    # A warm-up that is longer than an epoch follows the epoch's factor.
    assert epoch_cosine(150, 100, 12, 500) == pytest.approx((0.001 + 0.999 * 0.3) * 0.5 * (1 + math.cos(math.pi / 12)))


def test_the_learning_rate_of_a_run():
    class Recorder(type(detector())):
        def training_step(self, batch, batch_idx):
            self.rates.append(self.optimizers().param_groups[0]["lr"])
            return super().training_step(batch, batch_idx)

    module = Recorder(backbone=BACKBONE, num_classes=2, image_size=SIDE, lr=0.02, lr_reference_batch=8, warmup_steps=3)
    module.rates = []
    trainer = quiet_trainer(max_epochs=3)
    trainer.fit(module, DataLoader(range(8), batch_size=2, collate_fn=detection_batch))
    factors = [0.001, 0.001 + 0.999 / 3, 0.001 + 0.999 * 2 / 3, 1.0, *[0.75] * 4, *[0.25] * 4]
    assert module.rates == pytest.approx([0.02 * 2 / 8 * factor for factor in factors])


def test_weights_of_the_backbone_are_taken_in_a_new_run_only(tmp_path):
    torch.manual_seed(5)
    network = timm.create_model(BACKBONE)
    torch.save(network.state_dict(), tmp_path / "weights.pth")
    settings = {"init_from": str(tmp_path / "weights.pth"), "frozen_stages": 2, "norm_eval": True, "warmup_steps": 0}
    module = detector(**settings)
    trainer = quiet_trainer(default_root_dir=tmp_path)
    trainer.fit(module, box_loader(1))
    assert torch.equal(module.features.body.conv_stem.weight, network.conv_stem.weight)
    assert torch.equal(module.features.body.bn1.running_mean, network.bn1.running_mean)
    assert not torch.equal(module.features.body.blocks[4][0].conv_pw.weight, network.blocks[4][0].conv_pw.weight)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    (tmp_path / "weights.pth").unlink()
    resumed = detector(**settings)
    trainer = quiet_trainer(max_epochs=2, default_root_dir=tmp_path)
    trainer.fit(resumed, box_loader(1), ckpt_path=str(tmp_path / "last.ckpt"), weights_only=True)
    assert trainer.global_step == 2
    loaded = type(module).load_from_checkpoint(tmp_path / "last.ckpt", weights_only=True)
    assert loaded.hparams.frozen_stages == 2
    # A checkpoint of a detector starts the backbone of another one.
    other = detector(num_classes=5, init_from=str(tmp_path / "last.ckpt"))
    other.features.load_pretrained(other.hparams.init_from)
    assert torch.equal(other.features.body.conv_stem.weight, network.conv_stem.weight)


def test_frozen_parts_without_weights_are_told():
    with pytest.warns(UserWarning, match="norm_eval: True without init_from keep random weights"):
        quiet_trainer().fit(detector(norm_eval=True), box_loader(1))


def test_pictures_show_boxes_of_the_data_and_of_the_network():
    module = detector(class_names=["red", "blue"]).train()
    batch = detection_batch(range(3))
    module.network = Exact([{"boxes": torch.tensor([[4.0, 4, 20, 20]]), "labels": torch.tensor([2])}] * 3)
    shown = module.pictures(batch)["val/boxes"]
    assert [caption for _, caption in shown] == ["2 objects, 1 detections"] * 3
    image = shown[0][0]
    assert image.shape == (3, SIDE, SIDE)
    assert ((image == torch.tensor([0.0, 1.0, 0.0])[:, None, None]).all(0)).any()  # lime
    assert torch.equal(image[:, 20, 18], torch.tensor([1.0, 0.0, 0.0]))  # the lower edge of the detection
    assert module.training


@pytest.mark.parametrize("name", ["ssdlite", "retinanet"])
def test_the_exported_network_has_the_boxes_and_scores_of_the_detections(name):
    """What is left after the threshold and the suppression is among the raw rows, with label and score."""
    module = detector(name, score_threshold=0.0).eval()
    network = module.deployable_network()
    images = torch.rand(2, 3, SIDE, SIDE)
    with torch.no_grad():
        raw, found = network(images), module(list(images))
    assert raw.shape[2] == 4 + 2
    for rows, detections in zip(raw, found, strict=True):
        assert len(detections["boxes"]) > 0
        clipped = rows[:, :4].clamp(0, SIDE)
        for box, label, score in zip(*(detections[key][:20] for key in ("boxes", "labels", "scores")), strict=True):
            near = (clipped - box).abs().amax(1) < 1e-3
            assert near.any()
            assert (rows[near, 3 + label] - score).abs().min() < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ssdlite", "retinanet"])
def test_export_to_onnx_with_any_batch(name, tmp_path):
    network = detector(name, image_size=32).deployable_network()
    difference = write_onnx(network, tmp_path / "model.onnx", channels=3, size=32, opset=18, tolerance=1e-3)
    assert difference < 1e-2
    assert "not normalised" in network.input_description


def test_a_training_batch_of_one_image():
    module = silence(detector()).train()
    with pytest.raises(ValueError, match=r"a training batch holds 1 image.*data.batch_size above 1"):
        module.training_step(detection_batch(range(1)), 0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": 0.0}, "lr: 0.0 is not positive"),
        ({"num_classes": 0}, "num_classes: 0 is below 1; it counts classes without background"),
        ({"image_size": 16}, "image_size: 16 is below 32"),
        ({"main_metric": "acc"}, "main_metric: 'acc' is unknown; expected map, map_50"),
        ({"score_threshold": 1.5}, r"score_threshold: 1.5 is outside \[0, 1\)"),
        ({"class_names": ["red"]}, "class_names: 1 names for 2 classes"),
        ({"mean": [0.5]}, "mean: expected 3 values"),
        ({"warmup_steps": -1}, "warmup_steps: -1 is negative"),
        ({"name": "yolo"}, "detector: 'yolo' is unknown; expected ssdlite or retinanet"),
        ({"backbone": "resnet81"}, "backbone: 'resnet81' is not a timm model"),
        ({"frozen_stages": 9}, "frozen_stages: 9, but mobilenetv3_small_050 has 5 stages"),
    ],
)
def test_settings_out_of_range(settings, message):
    with pytest.raises(ValueError, match=message):
        detector(**settings)


def validate_on(rank, shares):
    module = detector(num_classes=2)
    items = [detection_batch(range(*share)) for share in shares[rank]]
    trainer = quiet_trainer(strategy="ddp", devices=2, use_distributed_sampler=False)
    trainer.validate(module, DataLoader(items, batch_size=None), verbose=False)
    return {name: value.item() for name, value in trainer.callback_metrics.items()}


def test_validation_on_two_ranks_equals_one():
    """The same number of batches but not of images, as the evaluation sampler shares them."""
    first, second = run_ranks(validate_on, 2, [[(0, 2), (4, 6)], [(2, 4), (6, 7)]])
    trainer = quiet_trainer()
    module = detector(num_classes=2)
    batches = [detection_batch(range(start, min(start + 2, 7))) for start in (0, 2, 4, 6)]
    trainer.validate(module, DataLoader(batches, batch_size=None), verbose=False)
    expected = {name: value.item() for name, value in trainer.callback_metrics.items()}
    assert first == second
    assert first == pytest.approx(expected, abs=1e-6)
