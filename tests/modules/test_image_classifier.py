import errno
from argparse import Namespace
from pickle import UnpicklingError

import numpy as np
import pytest
import timm
import torch
from sklearn import metrics as reference
from timm.scheduler import CosineLRScheduler
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset

import modules.emo  # noqa: F401  registers the networks in timm
from modules import pretrained_weights
from modules.bolt import BOLT
from modules.classification import ImageClassifier
from modules.classification.mixing import BatchMixing
from tests.modules.toy_images import TINY, Batch, batch, batches, loader, quiet_trainer, silence


def classifier(**kwargs):
    torch.manual_seed(0)
    settings = {
        "encoder_options": TINY,
        "num_classes": 3,
        "drop_path": 0.0,
        "lr_reference_batch": None,
        "warmup_epochs": 0,
    }
    return ImageClassifier(**{**settings, **kwargs})


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    torch.manual_seed(1)
    module = BOLT(encoder_options=TINY, projector_hidden=8, projector_dim=4)
    trainer = quiet_trainer()
    trainer.fit(module, loader(batches(2)))
    path = tmp_path_factory.mktemp("bolt") / "last.ckpt"
    trainer.save_checkpoint(path)
    return path, module


class Pictures(Dataset):
    def __init__(self, labels):
        self.labels = torch.tensor(labels)

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return torch.full((1, 8, 8), float(self.labels[index])), self.labels[index], index


def collate(samples):
    images, labels, index = zip(*samples, strict=True)
    return Batch((torch.stack(images),), torch.stack(labels), torch.tensor(index))


def test_training_loss_by_its_formula():
    module, data = silence(classifier(label_smoothing=0.2)), batch(size=9)
    module.class_weights.copy_(torch.tensor([0.5, 1.0, 1.5]))
    loss = module.training_step(data, 0)["loss"].item()
    log_p = module(data.images).log_softmax(1)
    expected, total = 0.0, 0.0
    for row, label in zip(log_p, data.labels.tolist(), strict=True):
        smooth = [0.2 / 3 + (0.8 if c == label else 0) for c in range(3)]
        expected -= sum(q * w * lp for q, w, lp in zip(smooth, (0.5, 1, 1.5), row.tolist(), strict=True))
        total += (0.5, 1, 1.5)[label]
    assert loss == pytest.approx(expected / total, abs=1e-5)


def test_one_step_in_double_precision_by_hand():
    """Loss, and its gradient's norm from the derivative of the softmax, in NumPy."""
    module = silence(classifier(encoder="resnet18", encoder_options={}, image_size=32, drop_path=0.0).double())
    data = batch(size=7, side=32)
    data = data._replace(views=(data.images.double(),))
    module.requires_grad_(False)
    module.network.fc.requires_grad_(True)
    loss = module.training_step(data, 0)["loss"]
    loss.backward()
    gradients = [parameter.grad for parameter in module.network.fc.parameters()]
    features = module.extract_features(data.images).numpy()
    weight, bias = (parameter.detach().numpy() for parameter in module.network.fc.parameters())
    logits = features @ weight.T + bias
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    targets = np.full((7, 3), 0.1 / 3)
    for row, label in enumerate(data.labels.tolist()):
        targets[row, label] += 0.9
    assert loss.item() == pytest.approx(-(targets * np.log(probabilities)).sum() / 7, rel=1e-9)
    slope = (probabilities - targets) / 7
    squares = ((slope.T @ features) ** 2).sum() + (slope.sum(0) ** 2).sum()
    norm = torch.nn.utils.get_total_norm(gradients).item()
    assert norm == pytest.approx(np.sqrt(squares), rel=1e-9)


def test_mixed_images_are_compared_with_mixed_targets():
    module = silence(classifier(label_smoothing=0.1, mixup_alpha=0.8))
    data = batch(size=7)
    seen = {}
    module.mixing = lambda images, labels, position: seen.setdefault(
        "mixed", BatchMixing(3, 0.8, 0.0)(images, labels, (9,))
    )
    loss = module.training_step(data, 0)["loss"].item()
    images, targets = seen["mixed"]
    log_p = module(images).log_softmax(1)
    expected = 0.0
    for row, target in zip(log_p.tolist(), targets.tolist(), strict=True):
        expected -= sum(q * lp for q, lp in zip(target, row, strict=True)) / 7
    assert loss == pytest.approx(expected, abs=1e-6)
    assert not torch.equal(images, data.images)


def test_a_resumed_run_mixes_like_the_uninterrupted_one(tmp_path):
    settings = {"mixup_alpha": 0.8, "cutmix_alpha": 1.0, "label_smoothing": 0.0, "lr": 1e-2, "schedule": "constant"}
    whole, half = classifier(**settings), classifier(**settings)
    quiet_trainer(max_epochs=2, limit_val_batches=0).fit(whole, loader(batches(3)))
    trainer = quiet_trainer(max_epochs=1)
    trainer.fit(half, loader(batches(3)))
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    again = classifier(**settings)
    np.random.seed(123)
    quiet_trainer(max_epochs=2).fit(again, loader(batches(3)), ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    for ours, theirs in zip(again.parameters(), whole.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_mixing_and_class_weights_exclude_each_other():
    with pytest.raises(ValueError, match="class_weight: 'inverse' weighs images by their class"):
        classifier(class_weight="inverse", cutmix_alpha=1.0)


def test_top5_by_a_loop():
    module = classifier(num_classes=8, main_metric="top5").eval()
    data = batches(3, size=7, classes=8)
    logged = quiet_trainer().validate(module, loader(data), verbose=False)[0]
    hits = top1 = 0
    for item in data:
        for row, label in zip(module(item.images).tolist(), item.labels.tolist(), strict=True):
            ranking = sorted(range(8), key=lambda c: -row[c])
            hits, top1 = hits + (label in ranking[:5]), top1 + (label == ranking[0])
    assert 0 < hits < 21
    assert logged["val/top5"] == logged["val/main"] == pytest.approx(hits / 21)
    assert logged["val/acc"] == pytest.approx(top1 / 21)


def test_top5_needs_more_than_five_classes():
    assert "val/top5" not in classifier(num_classes=5).val_metrics.compute()
    with pytest.raises(ValueError, match="main_metric: 'top5' is unknown; expected acc"):
        classifier(num_classes=5, main_metric="top5")


def test_it_learns_and_reports_its_main_metric():
    module = classifier(main_metric="kappa", lr=1e-2)
    data = DataLoader(Pictures([0, 1, 2] * 16), batch_size=12, collate_fn=collate)
    trainer = quiet_trainer(max_epochs=12)
    trainer.fit(module, data, data)
    logged = trainer.callback_metrics
    assert logged["val/acc"] > 0.9
    assert logged["val/main"] == logged["val/kappa"]
    names = ("acc", "balanced_acc", "kappa", "macro_f1", "macro_precision", "auroc", "loss", "main")
    assert {f"val/{name}" for name in names} | {"train/loss", "train/acc"} <= set(logged)
    assert {f"test/{name}" for name in names} <= set(trainer.test(module, data, verbose=False)[0])


def test_metrics_of_an_epoch_are_those_of_all_its_images_and_unlabelled_ones_do_not_count():
    module = classifier().eval()
    data = batches(3, size=7)
    data[1] = data[1]._replace(labels=torch.tensor([0, -1, 1, 2, -1, 0, 1]))
    logged = quiet_trainer().validate(module, loader(data), verbose=False)[0]
    labels = torch.cat([item.labels for item in data])
    with torch.no_grad():
        probabilities = torch.cat([module(item.images).softmax(1) for item in data])
    kept = labels >= 0
    labels, guess = labels[kept], probabilities[kept].argmax(1)
    assert logged["val/acc"] == pytest.approx(reference.accuracy_score(labels, guess))
    assert logged["val/macro_f1"] == pytest.approx(reference.f1_score(labels, guess, average="macro"), abs=1e-6)
    expected = functional.nll_loss(probabilities[kept].log(), labels).item()
    assert logged["val/loss"] == pytest.approx(expected, abs=1e-5)


def test_without_any_label_there_are_no_metrics():
    data = [batch()._replace(labels=torch.full((6,), -1))]
    with pytest.warns(UserWarning, match="val: no labelled image, so there are no metrics"):
        logged = quiet_trainer().validate(classifier(), loader(data), verbose=False)
    assert logged == [{}]


def test_outputs_of_evaluation_and_prediction():
    module, data = classifier().eval(), batch()
    probabilities = module(data.images).softmax(1)
    output = silence(module).validation_step(data, 0)
    assert torch.equal(output["probabilities"], probabilities)
    assert torch.equal(output["labels"], data.labels)
    prediction = module.predict_step(data, 0)
    assert set(prediction) == {"index", "probabilities"}
    assert torch.equal(prediction["probabilities"], probabilities)


def test_pictures_tell_the_most_probable_class_and_the_label():
    module, data = classifier(class_names=["cat", "dog", "bird"]).eval(), batch()
    data = data._replace(labels=torch.tensor([0, 1, 2, -1, 1, 2]))
    shown = module.pictures(data)["val/predictions"]
    for row, (picture, caption) in enumerate(shown):
        probabilities = module(data.images).softmax(1)[row].tolist()
        found = max(range(3), key=lambda c: probabilities[c])
        label = ["label cat", "label dog", "label bird", "no label", "label dog", "label bird"][row]
        assert caption == f"{['cat', 'dog', 'bird'][found]} {probabilities[found]:.2f}, {label}"
        assert picture.shape == (3, 8, 8)
        assert (picture.min(), picture.max()) == (0, 1)
    assert len(shown) == 6


@pytest.mark.parametrize("which", ["online", "target"])
def test_fine_tuning_starts_from_the_chosen_branch(pretrained, which):
    path, source = pretrained
    module = classifier(init_from=str(path), which=which)
    head = module.network.head.weight.clone()
    module.load_pretrained()
    encoder = getattr(source, which).encoder
    images = batch().images
    assert torch.equal(module.eval().extract_features(images), encoder.eval()(images))
    assert torch.equal(module.network.head.weight, head)


def test_online_and_target_differ(pretrained):
    _, source = pretrained
    assert not torch.equal(source.online.encoder.cls_token, source.target.encoder.cls_token)


def released(kind, weights):
    """What a training code of other people puts around its weights; averaged ones come before raw ones."""
    other = {key: torch.zeros_like(value) for key, value in weights.items()}
    return {
        "pth": weights,
        "wrapped": {"state_dict": weights, "epoch": 3},
        "net": {"net": weights, "optimizer": {"state": {}}},
        "net_E": {"net": other, "net_E": weights, "iter": 7},
        "parallel": {"net": {f"module.{key}": value for key, value in weights.items()}, "net_E": None},
    }[kind]


@pytest.mark.parametrize("kind", ["pth", "wrapped", "net", "net_E", "parallel", "safetensors", "classifier"])
def test_other_files_with_weights(tmp_path, kind):
    torch.manual_seed(3)
    source = timm.create_model("vit_tiny_patch16_224", img_size=8, in_chans=1, num_classes=7, **TINY)
    path = tmp_path / f"weights.{'safetensors' if kind == 'safetensors' else 'pth'}"
    if kind == "safetensors":
        from safetensors.torch import save_file

        save_file(source.state_dict(), path)
    elif kind == "classifier":
        trainer, module = quiet_trainer(), classifier(num_classes=7)
        module.network.load_state_dict(source.state_dict())
        trainer.strategy.connect(module)
        trainer.save_checkpoint(path, weights_only=True)
    else:
        torch.save(released(kind, source.state_dict()), path)
    module = classifier(init_from=str(path))
    module.load_pretrained()
    assert torch.equal(module.network.patch_embed.proj.weight, source.patch_embed.proj.weight)
    assert torch.equal(module.network.blocks[1].mlp.fc2.bias, source.blocks[1].mlp.fc2.bias)


EMO_1M = {"encoder": "emo_1m", "encoder_options": {"window_size": 0}, "image_size": 32, "num_classes": 10}


@pytest.mark.parametrize("kind", ["pth", "net_E", "parallel"])
def test_released_files_of_emo_for_another_number_of_classes(tmp_path, kind):
    source = timm.create_model("emo_1m", **EMO_1M["encoder_options"]).eval()
    torch.save(released(kind, source.state_dict()), tmp_path / "net.pth")
    module = classifier(**EMO_1M, in_channels=3, init_from=str(tmp_path / "net.pth")).eval()
    head = module.network.head.weight.clone()
    module.load_pretrained()
    images = torch.randn(2, 3, 32, 32)
    expected = source.forward_head(source.forward_features(images), pre_logits=True)
    assert torch.equal(module.extract_features(images), expected)
    assert torch.equal(module.network.head.weight, head)


def test_a_released_file_for_grey_images_sees_equal_channels(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr("modules.pretrained_weights.rank_zero_info", said.append)
    source = timm.create_model("emo_1m", **EMO_1M["encoder_options"]).eval()
    torch.save(source.state_dict(), tmp_path / "net.pth")
    module = classifier(**EMO_1M, in_channels=1, init_from=str(tmp_path / "net.pth")).eval()
    module.load_pretrained()
    assert said == [f"init_from: stage0.0.convs.0.0.weight of {tmp_path / 'net.pth'} fitted from 3 channels to 1."]
    images = torch.randn(2, 1, 32, 32)
    expected = source.forward_features(images.expand(-1, 3, -1, -1))
    assert torch.allclose(module.network.forward_features(images), expected, atol=1e-4)


def test_a_released_file_of_another_size_names_the_first_differing_tensors(tmp_path):
    torch.save({"net": timm.create_model("emo_2m").state_dict()}, tmp_path / "net.pth")
    module = classifier(**EMO_1M, in_channels=3, init_from=str(tmp_path / "net.pth"))
    with pytest.raises(
        ValueError,
        match=r"net.pth does not fit EMO: \d+ of another shape \(stage3.0.proj.conv.weight: \(120, 288, 1, 1\) in "
        r"the file, \(80, 288, 1, 1\) in the network, .* not in the network \(stage1.2.conv_local.conv.weight, ",
    ):
        module.load_pretrained()


def test_a_file_of_emo_v2_is_called_so(tmp_path):
    weights = timm.create_model("emo_1m").state_dict()
    torch.save({**weights, "stage3.1.eops.0.qkv.weight": torch.ones(2)}, tmp_path / "net.pth")
    module = classifier(**EMO_1M, in_channels=3, init_from=str(tmp_path / "net.pth"))
    with pytest.raises(ValueError, match=r"not in the network .*\. It is a file of EMOv2, another network than EMO\."):
        module.load_pretrained()


def test_any_timm_backbone(tmp_path):
    source = timm.create_model("resnet18", in_chans=1, num_classes=5)
    torch.save(source.state_dict(), tmp_path / "resnet.pth")
    settings = {
        "encoder": "resnet18",
        "encoder_options": {},
        "image_size": 32,
        "init_from": str(tmp_path / "resnet.pth"),
    }
    module = classifier(**settings)
    module.load_pretrained()
    images = torch.randn(2, 1, 32, 32)
    features = source.eval().forward_head(source.forward_features(images), pre_logits=True)
    assert torch.equal(module.eval().extract_features(images), features)
    assert module.feature_dim == 512


def test_another_image_size_interpolates_the_positions_and_says_so(pretrained, monkeypatch):
    said = []
    monkeypatch.setattr("modules.pretrained_weights.rank_zero_info", said.append)
    path, source = pretrained
    module = classifier(init_from=str(path), image_size=12)
    module.load_pretrained()
    assert said == [f"init_from: position embedding of {path} interpolated from 4x4 to 6x6 patches."]
    own, given = module.network.pos_embed, source.online.encoder.pos_embed
    assert torch.equal(own[:, 0], given[:, 0])
    grid = given[0, 1:].T.reshape(1, 16, 4, 4)
    expected = functional.interpolate(grid, size=(6, 6), mode="bicubic", antialias=True)
    assert torch.allclose(own[0, 1:].T.reshape(1, 16, 6, 6), expected, atol=1e-6)


def test_another_patch_size_names_the_tensors_and_the_settings_of_the_file(pretrained):
    path, _ = pretrained
    module = classifier(init_from=str(path), encoder_options={**TINY, "patch_size": 4})
    with pytest.raises(
        ValueError,
        match=r"does not fit VisionTransformer: 1 of another shape \(patch_embed.proj.weight: \(16, 1, 2, 2\) in the "
        r"file, \(16, 1, 4, 4\) in the network\). The file was written with encoder: vit_tiny_patch16_224, ",
    ):
        module.load_pretrained()


def test_another_depth_names_the_tensors(pretrained):
    path, _ = pretrained
    module = classifier(init_from=str(path), encoder_options={**TINY, "depth": 3})
    with pytest.raises(ValueError, match=r"12 missing in the file \(blocks.2.attn.proj.bias, .* and 7 more\)"):
        module.load_pretrained()
    module = classifier(init_from=str(path), encoder_options={**TINY, "depth": 1})
    with pytest.raises(ValueError, match=r"12 not in the network \(blocks.1.attn.proj.bias, .* and 7 more\)"):
        module.load_pretrained()


def test_files_that_cannot_be_used(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no file .*nowhere.ckpt; pre-train first, or .* --model.init_from"):
        classifier(init_from=str(tmp_path / "nowhere.ckpt")).load_pretrained()
    (tmp_path / "broken.ckpt").write_bytes(b"PK\x03\x04 not a checkpoint")
    with pytest.raises(
        ValueError, match=r"init_from: .*broken.ckpt cannot be read as a weights file; expected a state dictionary"
    ):
        classifier(init_from=str(tmp_path / "broken.ckpt")).load_pretrained()
    torch.save({"state_dict": {}, "args": Namespace()}, tmp_path / "more.ckpt")
    with pytest.raises(
        ValueError,
        match=r"it holds a argparse.Namespace beside its tensors; .* save its state dictionary alone: torch.save\(.*\) "
        r"\(UnpicklingError: Weights only load failed\)$",
    ):
        classifier(init_from=str(tmp_path / "more.ckpt")).load_pretrained()
    torch.save({"epoch": 3}, tmp_path / "empty.ckpt")
    with pytest.raises(ValueError, match=r"init_from: .*empty.ckpt holds no dictionary of tensors"):
        classifier(init_from=str(tmp_path / "empty.ckpt")).load_pretrained()
    torch.save({"entity.weight": torch.ones(2)}, tmp_path / "other.ckpt")
    with pytest.raises(
        ValueError, match=r"nothing in .*other.ckpt fits VisionTransformer; it holds entity, expected names"
    ):
        classifier(init_from=str(tmp_path / "other.ckpt")).load_pretrained()


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (PermissionError(errno.EACCES, "Permission denied"), r"\(PermissionError: \[Errno 13\] Permission denied\)$"),
        (RuntimeError("no zip archive. It may be corrupted.\nmore"), r"\(RuntimeError: no zip archive\)$"),
        (EOFError(), r"wrote, not cut off \(EOFError\)$"),
        (
            UnpicklingError("Weights only load failed. Unsupported operand 35"),
            r"cut off \(UnpicklingError: Weights",
        ),
    ],
    ids=["not allowed", "cut off", "empty", "text"],
)
def test_why_a_file_cannot_be_read_is_told(tmp_path, monkeypatch, error, told):
    def refuse(path):
        raise error

    monkeypatch.setattr(pretrained_weights, "_read", refuse)
    (tmp_path / "some.ckpt").touch()
    with pytest.raises(ValueError, match=told):
        classifier(init_from=str(tmp_path / "some.ckpt")).load_pretrained()


def test_weights_are_taken_at_the_start_of_a_run_and_not_on_resume(pretrained, tmp_path):
    path, source = pretrained
    module = classifier(init_from=str(path), lr=1e-9, weight_decay=0.0)
    trainer = quiet_trainer()
    trainer.fit(module, loader(batches(2)))
    assert torch.allclose(module.network.cls_token, source.online.encoder.cls_token, atol=1e-6)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    again = classifier(init_from=str(tmp_path / "gone.ckpt"), lr=1e-9, weight_decay=0.0)
    quiet_trainer(max_epochs=2).fit(again, loader(batches(2)), ckpt_path=tmp_path / "a.ckpt")
    read = ImageClassifier.load_from_checkpoint(tmp_path / "a.ckpt", weights_only=True)
    assert torch.equal(read.network.head.weight, module.network.head.weight)


def test_linear_evaluation_trains_only_the_classifier(pretrained):
    path, source = pretrained
    module = classifier(init_from=str(path), freeze=True, lr=0.1, optimizer="sgd", weight_decay=0.0)
    before = module.network.head.weight.clone()
    quiet_trainer().fit(module, loader(batches(4)))
    module.eval()
    images = batch().images
    features = source.online.encoder.eval()(images)
    assert torch.equal(module.extract_features(images), features)
    assert not torch.equal(module.network.head.weight, before)
    trained = [name for name, parameter in module.named_parameters() if parameter.requires_grad]
    assert trained == ["network.head.weight", "network.head.bias"]
    mean, variance = module.standardise.running_mean, module.standardise.running_var
    expected = module.network.head((features - mean) / (variance + 1e-5).sqrt())
    assert torch.allclose(module(images), expected, atol=1e-6)
    assert torch.allclose(module.deployable_network()(images), expected, atol=1e-6)


def test_a_frozen_network_stays_in_evaluation_mode():
    module = classifier(freeze=True, drop_path=0.5).train()
    assert not module.network.training
    assert module.standardise.training


def test_features_are_standardised_by_all_batches_alike(pretrained):
    """After two batches the statistics are theirs, without a remainder of the initial mean 0 and variance 1."""
    path, source = pretrained
    module = classifier(init_from=str(path), freeze=True)
    data = batches(2)
    quiet_trainer().fit(module, loader(data))
    features = [source.online.encoder.eval()(item.images) for item in data]
    mean = torch.stack([item.mean(0) for item in features]).mean(0)
    variance = torch.stack([item.var(0) for item in features]).mean(0)
    assert torch.allclose(module.standardise.running_mean, mean, atol=1e-5)
    assert torch.allclose(module.standardise.running_var, variance, atol=1e-5)


def test_linear_evaluation_of_random_features_says_so():
    with pytest.warns(UserWarning, match="freeze without init_from: .* randomly initialised encoder"):
        quiet_trainer().fit(classifier(freeze=True), loader(batches(2)))


def test_linear_evaluation_needs_more_than_one_image():
    with pytest.raises(ValueError, match=r"holds 1 image, .* raise data.batch_size above 1, or set data.drop_last: tr"):
        silence(classifier(freeze=True)).training_step(batch(size=1), 0)


def test_linear_evaluation_needs_one_linear_layer():
    with pytest.raises(
        ValueError, match="freeze: deit_tiny_distilled_patch16_224 has a tuple as classifier; linear eval"
    ):
        classifier(encoder="deit_tiny_distilled_patch16_224", encoder_options={"depth": 1}, freeze=True, image_size=32)


def test_fixed_sincos_positions():
    module = classifier(pos_embed="sincos")
    assert not module.network.pos_embed.requires_grad
    assert module.network.pos_embed[0, 0].abs().sum() == 0


@pytest.mark.parametrize("rule", ["inverse", "effective"])
def test_class_weights_come_from_the_training_labels(rule):
    data = DataLoader(Pictures([0] * 8 + [1] * 4), batch_size=4, collate_fn=collate)
    module = classifier(class_weight=rule)
    quiet_trainer().fit(module, data)
    weights = module.class_weights
    assert weights[2] == 0
    assert weights[0] < 1 < weights[1]
    assert weights[:2].mean().item() == pytest.approx(1)


def test_learning_rates_fall_with_depth_and_scale_with_the_batch():
    module = classifier(layer_decay=0.5, lr=1e-3, lr_reference_batch=8, schedule="constant")
    trainer = quiet_trainer()
    trainer.fit(module, DataLoader(Pictures([0, 1, 2] * 4), batch_size=4, collate_fn=collate))
    rates = sorted({group["lr"] for group in trainer.optimizers[0].param_groups})
    assert rates == pytest.approx([0.5e-3 * 0.5**k for k in (3, 2, 1, 0)])


def test_rates_of_timm_cosine_scale_with_the_batch_in_every_group():
    module = classifier(
        layer_decay=0.5, lr=1e-3, lr_min=1e-5, warmup_lr=2e-5, lr_reference_batch=8, schedule="timm_cosine",
        warmup_epochs=1, lr_noise=[0.5, 1.0],
    )  # fmt: skip
    trainer = quiet_trainer(max_epochs=4)
    trainer.fit(module, DataLoader(Pictures([0, 1, 2] * 4), batch_size=4, collate_fn=collate))
    scheduler = trainer.lr_scheduler_configs[0].scheduler
    peaks = [0.5e-3 * 0.5**k for k in (3, 2, 1, 0)]
    assert sorted(set(scheduler.base_lrs)) == pytest.approx(peaks)
    optimizer = torch.optim.SGD([{"params": [torch.zeros(1)], "lr": peak} for peak in scheduler.base_lrs])
    reference = CosineLRScheduler(
        optimizer, 12, 0.5e-5, warmup_t=3, warmup_lr_init=1e-5, cycle_limit=1, t_in_epochs=False,
        noise_range_t=[6, 12], noise_pct=0.67, noise_std=1.0, noise_seed=42,
    )  # fmt: skip
    for step in (0, 2, 3, 7, 11, 12):
        reference.step_update(step)
        rates = [base * factor(step) for base, factor in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)]
        assert rates == pytest.approx([group["lr"] for group in optimizer.param_groups], rel=1e-9)


def test_drop_path_and_dropout_reach_the_network():
    module = classifier(drop_path=0.4, dropout=0.3)
    assert module.network.blocks[1].drop_path1.drop_prob == pytest.approx(0.4)
    assert module.network.head_drop.p == pytest.approx(0.3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dropout": 1.0}, r"dropout: 1.0 is outside \[0, 1\)"),
        ({"drop_path": -0.1}, r"drop_path: -0.1 is outside \[0, 1\)"),
        ({"label_smoothing": 1.5}, r"label_smoothing: 1.5 is outside \[0, 1\)"),
        ({"layer_decay": 0.0}, r"layer_decay: 0.0 is outside \(0, 1\]"),
        ({"num_classes": 1}, "num_classes: 1 is below 2"),
        ({"main_metric": "f2"}, "main_metric: 'f2' is unknown; expected acc, balanced_acc, kappa"),
        ({"class_names": ["a"]}, "class_names: 1 names for 3 classes"),
        ({"lr": 0.0}, "lr: 0.0 is not positive"),
    ],
)
def test_settings_out_of_range_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        classifier(**settings)


def test_it_trains_in_bfloat16():
    module = classifier(lr=1e-2, mixup_alpha=0.1)
    data = DataLoader(Pictures([0, 1, 2] * 16), batch_size=12, collate_fn=collate)
    trainer = quiet_trainer(max_epochs=10, precision="bf16-mixed", gradient_clip_val=5.0)
    trainer.fit(module, data, data)
    assert trainer.callback_metrics["val/acc"] > 0.9
    assert module.network.head.weight.dtype == torch.float32


def test_probabilities_sum_to_one_in_half_precision():
    trainer = quiet_trainer(precision="bf16-mixed")
    output = trainer.predict(classifier(), loader(batches(2)))
    assert np.allclose(output[0]["probabilities"].sum(1), 1, atol=1e-6)
