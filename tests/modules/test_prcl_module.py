"""PRCL as a LightningModule: its loss term by term, its schedules, its teacher, its evaluation."""

import copy
import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader
from torchmetrics import Metric

from callbacks import EMATarget, ExactResume, StepSeed
from datamodules import SemiSupervisedSegmentation
from modules.prcl import ProbabilisticSegmenter
from modules.prcl.monitoring import ClassMeans, PseudoLabelQuality, StepMeans
from modules.prcl.network import PixelOutputs
from modules.prcl.similarity import Gaussians
from modules.prcl.strong_views import PseudoLabelled
from tests.modules.street_scenes import CLASSES, TINY_BACKBONE, VOID, Scene, scene, scene_loader
from tests.modules.toy_images import quiet_trainer, silence
from tests.noisy_training import MemoryLogger, SaveAtStep, equal

SMALL = {"backbone": TINY_BACKBONE, "num_classes": CLASSES, "anchors": 8, "negatives": 16, "dimensions": 32}
PLAIN_VIEWS = {"mix": "none", "strong_scale": [1.0, 1.0], "photometric": False, "flip": False}


def segmenter(**settings):
    torch.manual_seed(0)
    return ProbabilisticSegmenter(**{**SMALL, **settings})


def both(size=2, seed=0, **kwargs):
    return {"labeled": scene(size, seed=seed, **kwargs), "unlabeled": scene(size, seed=seed + 100, **kwargs)}


def teacher_callback():
    return EMATarget("student", "teacher", momentum=0.99, schedule="warmup", log_as=None)


def batches(count=3, **kwargs):
    return DataLoader([both(seed=seed, **kwargs) for seed in range(count)], batch_size=None)


def step_loss(module, batch, epoch=0, epochs=10):
    """Loss of one training step without a trainer."""
    silence(module).train()
    module._trainer = SimpleNamespace(current_epoch=epoch, max_epochs=epochs, max_steps=-1)
    type(module).current_epoch = property(lambda self: epoch)
    try:
        torch.manual_seed(3)
        return module.training_step(batch, 0)["loss"]
    finally:
        del type(module).current_epoch
        module._trainer = None


def by_hand(network, batch, threshold):
    """Supervised and unsupervised loss of a student and a teacher that are both ``network``, pixel by pixel."""
    student, teacher = copy.deepcopy(network).train(), copy.deepcopy(network).train()
    with torch.no_grad():
        probabilities = teacher(batch["unlabeled"].images).softmax(1)
        confidence, pseudo = probabilities.max(1)
        labelled = student(batch["labeled"].images).log_softmax(1).numpy()
        unlabelled = student(batch["unlabeled"].images).log_softmax(1).numpy()
    masks, pseudo, confidence = batch["labeled"].masks.numpy(), pseudo.numpy(), confidence.numpy()
    supervised = [-labelled[b, masks[b, i, j], i, j] for b, i, j in np.argwhere(masks != VOID)]
    unsupervised = []
    for image in range(len(pseudo)):
        share = np.mean([value >= threshold for value in confidence[image].flatten()])
        unsupervised += [
            share * -unlabelled[image, pseudo[image, i, j], i, j] for i, j in np.ndindex(pseudo[image].shape)
        ]
    return np.mean(supervised), np.mean(unsupervised)


def test_loss_is_the_sum_of_its_terms_pixel_by_pixel():
    module = segmenter(method="mean_teacher", unsupervised_threshold=0.3, unsupervised_weight=0.7, **PLAIN_VIEWS)
    batch = both(side=32)
    supervised, unsupervised = by_hand(module.student, batch, threshold=0.3)
    loss = step_loss(module, batch)
    assert unsupervised > 0.01
    assert module.loss_terms["supervised_loss"].item() == pytest.approx(supervised, rel=1e-4)
    assert module.loss_terms["unsupervised_loss"].item() == pytest.approx(unsupervised, rel=1e-4)
    assert loss.item() == pytest.approx(supervised + 0.7 * unsupervised, rel=1e-4)


@pytest.mark.parametrize("method", ["prcl", "point_contrast"])
def test_contrast_joins_the_loss_with_the_weight_of_the_epoch(method):
    settings = {"method": method, "weak_threshold": 0.0, "strong_threshold": 1.0, "contrast_weight": 2.0}
    for epoch, share in ((0, 1.0), (5, math.exp(-1.25)), (10, 0.0)):
        module = segmenter(**settings, **PLAIN_VIEWS)
        loss = step_loss(module, both(), epoch=epoch)
        terms = module.loss_terms
        assert terms["contrast_loss"] > 0
        rest = terms["supervised_loss"] + terms["unsupervised_loss"]
        assert loss.item() == pytest.approx((rest + 2.0 * share * terms["contrast_loss"]).item(), rel=1e-5)
        loss.backward()
        trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
        assert all(parameter.grad is not None for parameter in trained), "DDP would wait for these"


def test_every_method_trains_only_what_it_has():
    supervised, teacher = segmenter(method="supervised"), segmenter(method="mean_teacher")
    assert supervised.teacher is None
    assert supervised.heads is None
    assert teacher.heads is None
    assert segmenter(method="point_contrast").heads.probability is None
    step_loss(supervised, {"labeled": scene()}).backward()
    assert supervised.loss_terms.keys() == {"supervised_loss"}


def test_representation_receives_gradients_of_the_contrast_alone():
    module = segmenter(method="prcl", weak_threshold=0.0, strong_threshold=1.0)
    step_loss(module, both()).backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in module.heads.parameters())
    without = segmenter(method="prcl", weak_threshold=0.0, strong_threshold=1.0, contrast_weight=0.0)
    step_loss(without, both()).backward()
    assert all(parameter.grad.abs().sum() == 0 for parameter in without.heads.parameters())


def test_hidden_labels_are_watched_and_never_learned_from():
    batch = both()
    hidden = batch["unlabeled"]
    others = {**batch, "unlabeled": Scene(hidden.images, (hidden.masks + 1) % CLASSES, hidden.index)}
    losses = [step_loss(segmenter(), batches).item() for batches in (batch, others)]
    assert losses[0] == losses[1]


def test_void_everywhere_is_no_reason_to_fail():
    batch = both()
    void = {key: Scene(part.images, torch.full_like(part.masks, VOID), part.index) for key, part in batch.items()}
    loss = step_loss(segmenter(weak_threshold=1.0), void)
    loss.backward()
    assert torch.isfinite(loss)


@pytest.mark.parametrize("labelled", [True, False], ids=["labelled", "nothing labelled either"])
@pytest.mark.parametrize("method", ["prcl", "point_contrast", "mean_teacher"])
def test_strong_views_without_a_label_leave_a_finite_loss(method, labelled):
    """As where all of a view is padding, or cut out: no label, no confidence."""
    settings = {"variance_weight": 0.1} if method == "prcl" else {}
    module, batch = segmenter(method=method, strong_threshold=1.0, **settings), both()
    module.strong_views = lambda views: PseudoLabelled(
        views.images, torch.full_like(views.labels, VOID), torch.zeros_like(views.confidence)
    )
    if not labelled:
        batch["labeled"].masks.fill_(VOID)
    loss = step_loss(module, batch)
    terms = module.loss_terms
    assert terms["unsupervised_loss"] == 0
    assert all(torch.isfinite(value) for value in terms.values())
    if labelled:
        assert terms["supervised_loss"] > 0
        assert terms.get("contrast_loss", 1.0) > 0, "of the labelled pixels alone"
    else:
        assert loss == 0
    loss.backward()
    gradients = [parameter.grad for parameter in module.parameters() if parameter.requires_grad]
    assert all(gradient is not None and torch.isfinite(gradient).all() for gradient in gradients)


def test_two_classes_have_a_contrast():
    module = segmenter(num_classes=2, weak_threshold=0.0, strong_threshold=1.0)
    batch = both()
    two = {
        key: Scene(part.images, part.masks.where(part.masks == VOID, part.masks % 2), part.index)
        for key, part in batch.items()
    }
    two["labeled"].masks[0, :, 1:20], two["labeled"].masks[1, :, 1:20] = 0, 1
    step_loss(module, two)
    assert module.loss_terms["contrast_loss"] > 0


def test_variance_can_be_penalised():
    plain, penalised = (segmenter(variance_weight=weight) for weight in (0.0, 0.5))
    losses = [step_loss(module, both()) for module in (plain, penalised)]
    variance = penalised.loss_terms["variance"]
    assert 0.3 < variance < 0.7
    assert (losses[1] - losses[0]).item() == pytest.approx(0.5 * variance.item(), rel=1e-4)


def test_joint_forward_shares_the_batch_statistics():
    torch.manual_seed(1)
    batch = both()
    apart, joint = (segmenter(joint_forward=value, **PLAIN_VIEWS) for value in (False, True))
    assert step_loss(apart, batch).item() != step_loss(joint, batch).item()
    images = torch.cat([batch["labeled"].images, batch["unlabeled"].images])
    network = segmenter(**PLAIN_VIEWS).student.train()
    logits = network(images)[:2]
    expected = functional.cross_entropy(logits, batch["labeled"].masks, ignore_index=VOID)
    assert joint.loss_terms["supervised_loss"].item() == pytest.approx(expected.item(), rel=1e-4)


def test_learning_rates_fall_from_epoch_to_epoch_as_published():
    module = segmenter()
    module._trainer = SimpleNamespace(max_epochs=200, max_steps=-1, train_dataloader=None)
    found = module.configure_optimizers()
    optimizer, scheduler = found["optimizer"], found["lr_scheduler"]["scheduler"]
    assert found["lr_scheduler"]["interval"] == "epoch"
    rates = []
    for _ in range(200):
        rates.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        scheduler.step()
    for epoch, (backbone, heads, probability) in enumerate(rates):
        expected = max(3.2e-3 * (1 - epoch / 200) ** 0.9, 1e-6)
        assert backbone == pytest.approx(expected, rel=1e-6)
        assert heads == pytest.approx(expected, rel=1e-6)
        assert probability == pytest.approx(max(5e-5 * (1 - epoch / 200) ** 0.9, 1e-6), rel=1e-6)
    assert rates[100][0] == pytest.approx(1.7148e-3, rel=1e-4)
    assert rates[199][2] == pytest.approx(1e-6), "held by min_lr"
    group = optimizer.param_groups[0]
    assert (group["momentum"], group["nesterov"], group["weight_decay"]) == (0.9, True, 5e-4)
    held = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
    wanted = [id(parameter) for parameter in module.parameters() if parameter.requires_grad]
    assert sorted(held) == sorted(wanted)


def test_weight_of_the_contrast_is_the_published_table():
    module = segmenter(contrast_end=200)
    for epoch, value in ((0, 1.0), (100, 0.2865), (199, 0.00708), (200, 0.0)):
        module._trainer = SimpleNamespace(current_epoch=epoch, max_epochs=300, max_steps=-1)
        assert module.contrast_weight() == pytest.approx(value, abs=5e-5)


def test_teacher_follows_the_parameters_and_keeps_its_own_batch_statistics():
    module, trainer = segmenter(), quiet_trainer(max_steps=1, callbacks=[teacher_callback()])
    trainer.fit(module, batches(1))
    student, teacher = dict(module.student.named_parameters()), dict(module.teacher.named_parameters())
    assert all(torch.equal(student[name], value) for name, value in teacher.items()), "the first update copies"
    statistics = [network.project.bn.running_mean for network in (module.student, module.teacher)]
    assert not torch.equal(*statistics)
    assert module.teacher.project.bn.num_batches_tracked == 1, "its own pass over weak views"
    assert module.student.project.bn.num_batches_tracked == 2


class Students(Callback):
    """The parameters of the student after each step."""

    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, pl_module, *args):
        self.seen.append({name: value.detach().clone() for name, value in pl_module.student.named_parameters()})


@pytest.mark.parametrize(("momentum", "shares"), [(0.99, [1 / 4] * 4), (0.6, [0.18, 0.18, 0.24, 0.4])])
def test_the_teacher_is_the_published_average_of_the_students(momentum, shares):
    """With 1 - 1 / (s + 1) of the old in update s their plain mean, until that exceeds the momentum."""
    module, students = segmenter(lr=0.02), Students()
    callbacks = [EMATarget("student", "teacher", momentum=momentum, schedule="warmup", log_as=None), students]
    quiet_trainer(max_epochs=1, callbacks=callbacks).fit(module, batches(4))
    moved = 0.0
    for name, value in module.teacher.named_parameters():
        each = [student[name].double() for student in students.seen]
        expected = sum(share * one for share, one in zip(shares, each, strict=True))
        torch.testing.assert_close(value.double(), expected, atol=1e-6, rtol=1e-5)
        moved = max(moved, (expected - each[-1]).abs().max().item())
    assert moved > 1e-3, "otherwise it would not matter how they are averaged"


def test_evaluation_scores_teacher_and_student_at_the_size_of_the_masks():
    module = segmenter()
    with torch.no_grad():
        module.teacher.classifier[1].bias += torch.tensor([0.3, -0.2, 0.1, 0.0])
    loader = scene_loader(4, mask_side=80)
    (metrics,) = quiet_trainer().validate(module, loader, verbose=False)
    for name, network in (("teacher", module.teacher), ("student", module.student)):
        hits, union = np.zeros(CLASSES), np.zeros(CLASSES)
        for batch in loader:
            with torch.no_grad():
                logits = functional.interpolate(network.eval()(batch.images), size=80, mode="bilinear")
            found, true = logits.argmax(1).numpy(), batch.masks.numpy()
            for label in range(CLASSES):
                seen = true != VOID
                hits[label] += ((found == label) & (true == label)).sum()
                union[label] += (((found == label) | (true == label)) & seen).sum()
        assert metrics[f"val/miou_{name}"] == pytest.approx(np.mean(hits[union > 0] / union[union > 0]), abs=1e-6)
    assert metrics["val/main"] == metrics["val/miou_teacher"] != metrics["val/miou_student"]
    (again,) = quiet_trainer().validate(module, loader, verbose=False)
    assert again == metrics


def test_predictions_bring_their_uncertainty():
    module, batch = segmenter().eval(), scene(mask_side=80)
    with torch.no_grad():
        found = module.predict_step(batch, 0)
        variance = module.heads(module.student.features(batch.images)).variance.mean(1, keepdim=True)
        small = functional.interpolate(variance, size=64, mode="bilinear", align_corners=True)
        expected = functional.interpolate(small, size=80, mode="bilinear")[:, 0]
    assert [mask.shape for mask in found["masks"]] == [(80, 80)] * 2
    assert found["masks"][0].dtype == torch.uint8
    assert torch.allclose(torch.stack(found["uncertainty"]), expected, atol=1e-5)
    plain = segmenter(method="supervised").eval()
    with torch.no_grad():
        doubt = plain.uncertainty(batch.images)
        assert torch.allclose(doubt, 1 - plain.student(batch.images).softmax(1).amax(1, keepdim=True))


@pytest.mark.parametrize("method", ["point_contrast", "mean_teacher", "supervised"])
def test_one_pass_predicts_masks_and_uncertainty_where_no_head_gives_the_latter(method):
    module, batch, passes = segmenter(method=method).eval(), scene(mask_side=80), []
    for network in module.networks.values():
        network.register_forward_hook(lambda *_: passes.append(1))
    with torch.no_grad():
        found = module.predict_step(batch, 0)
        assert len(passes) == 1
        logits = module(batch.images)
    doubt = 1 - logits.softmax(1).amax(1, keepdim=True)
    expected = functional.interpolate(doubt, size=80, mode="bilinear")[:, 0]
    assert torch.allclose(torch.stack(found["uncertainty"]), expected, atol=1e-6)


def test_scales_flips_and_windows_change_what_is_evaluated():
    images = scene().images
    outputs = {}
    for name, settings in (
        ("plain", {}),
        ("scales", {"scales": [0.75, 1.0], "test_flip": True}),
        ("windows", {"window": 48, "window_stride": 16}),
    ):
        module = segmenter(**settings).eval()
        with torch.no_grad():
            outputs[name] = module(images)
    assert {tuple(value.shape) for value in outputs.values()} == {(2, CLASSES, 64, 64)}
    assert not torch.allclose(outputs["plain"].softmax(1), outputs["scales"].softmax(1), atol=1e-4)
    assert not torch.allclose(outputs["plain"], outputs["windows"], atol=1e-4)


def test_windows_are_two_thirds_apart_and_uncertainty_goes_by_them_too():
    images = scene(side=60).images
    module = segmenter(window=36).eval()
    head, network = module.heads.probability, module.student
    with torch.no_grad():
        logits, doubt = torch.zeros(2, CLASSES, 60, 60), torch.zeros(2, 1, 60, 60)
        counts = torch.zeros(60, 60)
        for y, x in itertools.product((0, 24), repeat=2):
            rows, columns = slice(y, y + 36), slice(x, x + 36)
            part = images[:, :, rows, columns]
            logits[:, :, rows, columns] += module.teacher(part)
            variance = head(network.features(part)).mean(1, keepdim=True)
            doubt[:, :, rows, columns] += functional.interpolate(
                variance, size=(36, 36), mode="bilinear", align_corners=True
            )
            counts[rows, columns] += 1
        assert torch.allclose(module(images), logits / counts, atol=1e-5)
        assert torch.allclose(module.uncertainty(images), doubt / counts, atol=1e-6)


def test_pictures_have_four_parts_and_training_ones_appear_after_a_step():
    module = segmenter().eval()
    assert [picture.shape for picture, _ in module.pictures(scene())["val/segmentation"]] == [(3, 64, 4 * 64)] * 2
    step_loss(module, both())
    shown = module.eval().pictures(scene())
    assert shown.keys() == {"val/segmentation", "train/strong_views"}
    for pictures in shown.values():
        assert all(picture.min() >= 0 and picture.max() <= 1 for picture, _ in pictures)


class SaveAfterValidation(Callback):
    """Write a checkpoint between the validation and the end of each epoch."""

    def __init__(self, folder):
        self.folder = folder

    def on_validation_end(self, trainer, pl_module):
        trainer.save_checkpoint(self.folder / f"validated-{trainer.current_epoch}.ckpt")


def run_on_shapes(folder, resume=None, images=6, **options):
    data = SemiSupervisedSegmentation("shapes", batch_size=2, images_per_epoch=images, seed=5)
    module = segmenter(
        num_classes=data.num_classes, global_prototypes=True, weak_threshold=0.0, unsupervised_threshold=0.1
    )
    logger = MemoryLogger()
    saves = [SaveAtStep(step, folder / f"step-{step}.ckpt") for step in (2, 3, 4)]
    callbacks = [teacher_callback(), ExactResume(), StepSeed(seed=1), SaveAfterValidation(folder), *saves]
    arguments = {"max_epochs": 2, "use_distributed_sampler": False, "limit_val_batches": 1, **options}
    trainer = quiet_trainer(callbacks=callbacks, logger=logger, **arguments)
    trainer.fit(module, datamodule=data, ckpt_path=resume, weights_only=True)
    assert trainer.num_training_batches == 3, "steps 2 and 4 are inside of an epoch"
    return module.state_dict(), trainer.optimizers[0].state_dict(), logger.values


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return folder, *run_on_shapes(folder)


def of_epoch_ends(values, since=0):
    """All that is logged at the ends of epochs but for the scores of validations, by name and step."""
    return {
        (name, step): value
        for (name, step), value in values.items()
        if "/" in name and not name.startswith("val/") and step >= since
    }


@pytest.mark.parametrize(("place", "first_end"), [("step-2", 2), ("step-3", 2), ("validated-0", 2), ("step-4", 5)])
def test_a_resumed_run_equals_the_uninterrupted_one(whole_run, tmp_path, place, first_end):
    """Also what it logs of the epoch that it was interrupted in, which is about all steps of that epoch."""
    folder, weights, optimizer, logged = whole_run
    again, resumed_optimizer, relogged = run_on_shapes(tmp_path, folder / f"{place}.ckpt")
    assert {name.split(".")[0] for name in weights} >= {"student", "teacher", "heads", "contrast"}
    assert equal(dict(weights), dict(again))
    assert equal(optimizer, resumed_optimizer)
    expected = of_epoch_ends(logged, first_end)
    prefixes = {name.partition("/")[0] for name, _ in expected}
    assert prefixes >= {"train", "variance", "precision", "anchors"}
    terms = ("loss", "supervised_loss", "unsupervised_loss", "contrast_loss", "pseudo_coverage", "trusted_share")
    assert {f"train/{term}" for term in terms} <= {name for name, _ in expected}
    assert of_epoch_ends(relogged) == expected


def test_a_checkpoint_of_before_the_metrics_were_in_it_is_resumed(whole_run, tmp_path):
    folder, _, _, logged = whole_run
    content = torch.load(folder / "validated-0.ckpt", weights_only=True)
    metrics = ("quality.", "class_", "prototype_precision.", "terms.")
    older = {key: value for key, value in content["state_dict"].items() if not key.startswith(metrics)}
    assert len(older) < len(content["state_dict"])
    torch.save(content | {"state_dict": older}, tmp_path / "older.ckpt")
    _, _, relogged = run_on_shapes(tmp_path, tmp_path / "older.ckpt")
    assert of_epoch_ends(relogged, 5) == of_epoch_ends(logged, 5)
    assert {key for key in of_epoch_ends(relogged) if key[1] < 5} == set(), "no steps, no metrics"


def test_metrics_of_other_shapes_and_names_are_left_out_of_a_checkpoint():
    """As after a change of the settings, or from a later version."""
    module = segmenter()
    step_loss(module, both())
    states = module.state_dict() | {"terms.temperature": torch.ones(2), "class_variance.count": torch.ones(7)}
    fresh = segmenter()
    fresh.load_state_dict(states)
    assert fresh.class_variance.count.tolist() == [0] * CLASSES
    assert torch.equal(fresh.quality.pixels, module.quality.pixels)
    assert fresh.quality.pixels > 0


def test_an_epoch_starts_without_the_values_of_another(whole_run, tmp_path):
    """Weights that were loaded from within an epoch begin a new run."""
    folder, *_ = whole_run
    module = segmenter(num_classes=11, global_prototypes=True)
    module.load_state_dict(torch.load(folder / "step-2.ckpt", weights_only=True)["state_dict"])
    assert module.quality.pixels > 0
    seen = module.quality.pixels.item()
    quiet_trainer(max_epochs=1, limit_train_batches=1, callbacks=[CountPixels(seen), teacher_callback()]).fit(
        module, batches(1)
    )


class CountPixels(Callback):
    def __init__(self, seen):
        self.seen = seen

    def on_train_batch_end(self, trainer, pl_module, *args):
        assert pl_module.quality.pixels == 2 * 64 * 64 != self.seen


@pytest.mark.parametrize("stream", ["labeled", "unlabeled"])
def test_a_batch_of_one_image_is_refused(stream):
    with pytest.raises(ValueError, match=r"holds 1 image.*data.batch_size and data.unlabeled_batch_size"):
        step_loss(segmenter(**PLAIN_VIEWS), {**both(), stream: scene(1)})


def test_a_rest_of_one_image_is_refused_with_the_remedy_of_an_ordinary_datamodule():
    with pytest.raises(ValueError, match=r"holds 1 image.*raise data.batch_size above 1, or set data.drop_last: true"):
        step_loss(segmenter(method="supervised"), scene(1))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "reco"}, "method: 'reco' is unknown; expected prcl, point_contrast, mean_teacher, supervised"),
        ({"weak_threshold": 1.2}, r"weak_threshold: 1.2 is outside \[0, 1\]"),
        ({"temperature": 0.0}, "temperature: 0.0 is not positive"),
        ({"anchors": 0}, "anchors: 0 is below 1"),
        ({"negatives": 0}, "negatives: 0 is below 1"),
        ({"mix": "mixup"}, "mix: 'mixup' is unknown"),
        ({"num_classes": 1}, "num_classes: 1 is outside"),
        ({"virtual_negatives": 2}, "set global_prototypes: true"),
        ({"forget": 0.0, "global_prototypes": True}, "forget: 0.0 is outside"),
        ({"scales": []}, "scales"),
        ({"momentum": 0.0}, "momentum: 0.0 is outside"),
        ({"class_names": ["a"]}, "class_names: 1 values for 4 classes"),
        ({"window_stride": 4}, "window_stride"),
        ({"contrast_weight": -1.0}, "contrast_weight: -1.0 is negative"),
        ({"strong_scale": [1.5, 0.5]}, "strong_scale"),
        ({"backbone": "vit_tiny_patch16_224"}, "backbone"),
        ({"decoder_channels": 0}, "decoder_channels: 0 is below 1"),
        ({"dimensions": 0}, "dimensions: 0 is below 1"),
        ({"method": "mean_teacher", "dimensions": -3}, "dimensions: -3 is below 1"),
        ({"min_lr": -1.0}, "min_lr: -1.0 is negative"),
        ({"output_stride": 7}, "output_stride: 7 is none of 8, 16 and 32"),
        (
            {"method": "point_contrast", "global_prototypes": True},
            "global_prototypes: True needs distributions; set model.method to prcl, or model.global_prototypes to fals",
        ),
        (
            {"method": "point_contrast", "variance_weight": 0.1},
            "variance_weight: 0.1 needs distributions; set model.method to prcl, or model.variance_weight to 0",
        ),
        ({"contrast_end": 0}, "contrast_end: 0 is not after contrast_begin 0.0, so that there would be no contrast"),
        ({"contrast_begin": 5, "contrast_end": 5}, "contrast_end: 5 is not after contrast_begin 5"),
    ],
)
def test_settings_out_of_range_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        segmenter(**settings)


def test_schedules_end_with_the_steps_where_these_end_the_run():
    """Two steps an epoch: a limit of 3 leaves 2 of 10 epochs, of 30 all 10."""
    for limit, epochs in ((3, 2), (30, 10), (-1, 10)):
        module = segmenter(method="mean_teacher", lr=0.01, min_lr=0.0)
        rates = []

        class Look(Callback):
            def on_train_batch_start(self, trainer, *_, rates=rates):
                rates.append(trainer.optimizers[0].param_groups[0]["lr"])

        trainer = quiet_trainer(
            max_epochs=10, max_steps=limit, limit_val_batches=0, callbacks=[teacher_callback(), Look()]
        )
        trainer.fit(module, batches(2))
        expected = [0.01 * (1 - step // 2 / epochs) ** 0.9 for step in range(3 if limit == 3 else 20)]
        assert rates == pytest.approx(expected)
        assert module._epochs() == epochs


def test_a_weak_threshold_above_the_strong_one_is_warned_of():
    with pytest.warns(UserWarning, match="few pixels"):
        segmenter(weak_threshold=0.9, strong_threshold=0.8)


@pytest.mark.parametrize(
    ("begin", "weight", "warned"), [(9, 1.0, 0), (10, 1.0, 1), (12, 1.0, 1), (12, 0.0, 0)], ids=str
)
def test_a_contrast_that_never_begins_is_warned_of(begin, weight, warned, recwarn):
    module = segmenter(contrast_begin=begin, contrast_weight=weight)
    module._trainer = SimpleNamespace(max_epochs=10, max_steps=-1, train_dataloader=None)
    module.configure_optimizers()
    told = [str(warning.message) for warning in recwarn if "contrast_begin" in str(warning.message)]
    assert len(told) == warned
    for message in told:
        assert message.startswith(f"contrast_begin: epoch {begin} is never reached, as the run has 10 epochs")


def test_a_run_without_end_is_told_of_the_schedule_that_needs_one():
    module = segmenter()
    module._trainer = SimpleNamespace(
        max_epochs=-1, max_steps=-1, estimated_stepping_batches=math.inf, train_dataloader=None
    )
    with pytest.raises(ValueError, match=r"^schedule: poly needs an end of training"):
        module.configure_optimizers()


def test_labelled_batches_alone_are_enough_for_the_supervised_method():
    """Those of an ordinary datamodule are what `labeled` holds otherwise; other methods are told what they miss."""
    batch = scene()
    losses = [step_loss(segmenter(method="supervised"), given).item() for given in (batch, {"labeled": batch})]
    assert losses[0] == losses[1]
    with pytest.raises(ValueError, match=r"without labeled and unlabeled: take datamodules.SemiSupervisedSegmentation"):
        step_loss(segmenter(method="mean_teacher"), batch)
    with pytest.raises(ValueError, match=r"gives unlabeled without labeled: .* with data.use_unlabeled false$"):
        step_loss(segmenter(method="supervised"), {"unlabeled": batch})


def test_quality_of_pseudo_labels_is_counted_over_batches():
    quality = PseudoLabelQuality(threshold=0.9)
    assert quality.compute() == {}
    generator = torch.Generator().manual_seed(0)
    counts = dict.fromkeys(("pixels", "sure", "known", "right", "known_sure", "right_sure"), 0)
    for size in (1, 3):
        labels, truth = (torch.randint(3, (size, 4, 4), generator=generator) for _ in range(2))
        truth[:, 0] = VOID
        confidence = torch.rand(size, 4, 4, generator=generator) * 0.2 + 0.8
        quality.update(labels, confidence, truth)
        for found, true, sure in zip(labels.flatten(), truth.flatten(), confidence.flatten() >= 0.9, strict=True):
            known = bool(true != VOID)
            counts["pixels"] += 1
            counts["sure"] += bool(sure)
            counts["known"] += known
            counts["right"] += bool(found == true)
            counts["known_sure"] += known and bool(sure)
            counts["right_sure"] += bool(found == true) and bool(sure)
    expected = {
        "pseudo_coverage": counts["sure"] / counts["pixels"],
        "pseudo_accuracy": counts["right"] / counts["known"],
        "pseudo_confident_accuracy": counts["right_sure"] / counts["known_sure"],
    }
    assert {name: value.item() for name, value in quality.compute().items()} == pytest.approx(expected)
    unknown = PseudoLabelQuality(threshold=0.9)
    unknown.update(torch.zeros(1, 2, 2).long(), torch.ones(1, 2, 2), torch.full((1, 2, 2), VOID))
    assert unknown.compute() == {"pseudo_coverage": 1.0}


def test_class_means_leave_classes_without_pixels_open():
    means = ClassMeans(3)
    means.update(torch.tensor([1.0, 2.0, 6.0]), torch.tensor([0, 2, 2]))
    means.update(torch.tensor([3.0]), torch.tensor([0]))
    found = means.compute().tolist()
    assert found[0] == 2.0
    assert math.isnan(found[1])
    assert found[2] == 4.0


class NoDoubles(TorchDispatchMode):
    """Refuse every tensor of 64-bit floating-point numbers, as Apple's GPUs do."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else (result,):
            assert not (isinstance(value, torch.Tensor) and value.dtype == torch.float64), function
        return result


def test_nothing_is_computed_or_kept_in_a_precision_that_a_device_may_not_have():
    with NoDoubles():
        module = segmenter(weak_threshold=0.0, variance_weight=0.1)
        step_loss(module, both()).backward()
        module.on_train_epoch_end()
        step_loss(module, both())
        module.eval().evaluate_batch(scene(mask_side=80), "val")
        assert module.evaluation_scores("val")["val/main"] >= 0
    metrics = [part for part in module.modules() if isinstance(part, Metric)]
    states = {type(metric).__name__: metric.metric_state.values() for metric in metrics}
    assert {"ClassMeans", "PseudoLabelQuality", "SegmentationScores", "MeanMetric"} <= states.keys()
    kept = [value.dtype for values in states.values() for value in values]
    kept += [value.dtype for value in module.state_dict().values()]
    assert torch.float64 not in kept


def test_totals_of_long_epochs_keep_their_digits():
    """More pixels than float32 can count one by one."""
    means, quality = ClassMeans(2), PseudoLabelQuality(0.5)
    means.count += 1 << 24
    means.total += 1 << 23
    quality.pixels += 1 << 24
    for _ in range(3):
        means.update(torch.ones(1), torch.tensor([1]))
        quality.update(torch.zeros(1, 1, 1).long(), torch.ones(1, 1, 1), torch.zeros(1, 1, 1).long())
    assert means.count.tolist() == [1 << 24, (1 << 24) + 3]
    assert quality.pixels == (1 << 24) + 3
    means.reset()
    generator = torch.Generator().manual_seed(0)
    values, labels = torch.rand(200_000, generator=generator), torch.randint(2, (200_000,), generator=generator)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        means.update(values, labels)
    expected = [values[labels == label].double().mean().item() for label in range(2)]
    assert means.compute().tolist() == pytest.approx(expected, rel=1e-6)


def test_sums_of_an_epoch_stay_fine_where_the_network_becomes_coarse():
    parts = torch.nn.ModuleDict({"means": ClassMeans(1), "steps": StepMeans(["loss"]), "layer": torch.nn.Linear(1, 1)})
    parts.to(torch.bfloat16)
    for fresh in (True, False):
        for step in range(1000):
            value = torch.tensor(float(step), dtype=torch.bfloat16)
            parts["means"].update(value[None], torch.zeros(1).long())
            parts["steps"].update({"loss": value}, 1.0)
        exact = sum(float(torch.tensor(float(step)).bfloat16()) for step in range(1000)) / 1000
        assert parts["means"].compute().item() == pytest.approx(exact, rel=1e-5), fresh
        assert parts["steps"].compute()["loss"].item() == pytest.approx(exact, rel=1e-5), fresh
        for metric in (parts["means"], parts["steps"]):
            metric.reset()


def test_class_means_are_those_of_a_loop():
    generator = torch.Generator().manual_seed(0)
    means, seen = ClassMeans(7), [[] for _ in range(7)]
    for count in (5000, 1, 0, 1024):
        values, labels = torch.rand(count, generator=generator), torch.randint(6, (count,), generator=generator)
        means.update(values, labels)
        for value, label in zip(values.tolist(), labels.tolist(), strict=True):
            seen[label].append(value)
    assert means.count.tolist() == [len(values) for values in seen]
    expected = [np.mean(values) if values else math.nan for values in seen]
    assert means.compute().tolist() == pytest.approx(expected, rel=1e-5, nan_ok=True)


def test_an_epoch_logs_quality_variance_and_precision():
    module = segmenter(class_names=["sky", "road", "tree", "car"], weak_threshold=0.0)
    trainer = quiet_trainer(max_epochs=1, callbacks=[teacher_callback()])
    trainer.fit(module, batches(2))
    logged = trainer.callback_metrics
    assert 0 <= logged["train/pseudo_coverage"] <= 1
    assert 0 <= logged["train/pseudo_accuracy"] <= 1
    variances = [name for name in logged if name.startswith("variance/")]
    assert variances
    assert all(0 < logged[name] < 1 for name in variances)
    assert {name.replace("variance", "precision") for name in variances} <= logged.keys()


def watched(**settings):
    """What an epoch of one step logs, and what the contrast of that step was given and gave."""
    module = segmenter(**{"weak_threshold": 0.0, "method": "prcl", **settings})
    calls, contrast = [], module.contrast.forward
    module.contrast.forward = lambda *args: calls.append((args, contrast(*args))) or calls[-1][1]
    trainer = quiet_trainer(max_epochs=1, callbacks=[teacher_callback()])
    trainer.fit(module, batches(1))
    return trainer.callback_metrics, *calls[0]


@pytest.mark.parametrize("settings", [{}, {"global_prototypes": True}], ids=["batch", "global"])
def test_precision_is_that_of_a_pixel_and_so_compares_classes_of_any_size(settings):
    """The precision of the fused pixels over their number, of each dimension; its logarithm averaged over these."""
    logged, (pixels, labels, valid, _), _ = watched(**settings)
    sizes = []
    for label in range(CLASSES):
        own = pixels.variance.detach().double()[valid & (labels == label)]
        assert (f"precision/{label}" in logged) == bool(len(own))
        if len(own):
            expected = ((1 / own).sum(0) / len(own)).log().mean().item()
            assert logged[f"precision/{label}"].item() == pytest.approx(expected, rel=1e-4)
            sizes.append(len(own))
    assert len(set(sizes)) > 1, "otherwise it would not matter that it is divided by them"


def test_pixels_of_the_contrast_are_those_of_the_thresholds():
    """Classes, trusted pixels and possible anchors, pixel by pixel from the student's logits and the pseudo-labels."""
    module, calls = segmenter(weak_threshold=0.6, strong_threshold=0.7, **PLAIN_VIEWS), []
    module.contrast.forward = lambda *args: calls.append(args)
    module._watch = lambda result: {}
    generator = torch.Generator().manual_seed(1)
    masks = torch.randint(CLASSES, (2, 16, 16), generator=generator)
    masks[:, ::3] = VOID
    strong = PseudoLabelled(
        torch.zeros(2, 3, 16, 16),
        torch.randint(CLASSES, (2, 16, 16), generator=generator),
        torch.rand(2, 16, 16, generator=generator),
    )
    strong.labels[:, 5] = VOID
    outputs = []
    for _ in range(2):
        mean, variance = torch.randn(2, 8, 4, 4, generator=generator), torch.rand(2, 8, 4, 4, generator=generator)
        logits = 3 * torch.randn(2, CLASSES, 4, 4, generator=generator)
        outputs.append(PixelOutputs(logits, Gaussians(mean, variance)))
    module._contrast(outputs, masks, strong)
    ((pixels, labels, trusted, hard),) = calls
    expected = []
    for part, (full, confidence) in enumerate(((masks, None), (strong.labels, strong.confidence))):
        for b, y, x in np.ndindex(2, 4, 4):
            label = full[b, 4 * y, 4 * x].item()  # nearest
            scores = [math.exp(value) for value in outputs[part].logits[b, :, y, x].tolist()]
            known = label != VOID and (confidence is None or confidence[b, 4 * y, 4 * x] >= 0.6)
            own = scores[label] / sum(scores) if known else None
            mean, variance = (field[b, :, y, x].tolist() for field in outputs[part].representation)
            expected.append((label if known else None, known, known and own < 0.7, mean, variance))
    assert 0 < sum(known for _, known, *_ in expected) < len(expected)
    assert 0 < sum(unsure for _, _, unsure, *_ in expected) < sum(known for _, known, *_ in expected)
    for row, (label, known, unsure, mean, variance) in enumerate(expected):
        assert trusted[row].item() == known
        assert (trusted & hard)[row].item() == unsure
        assert label is None or labels[row].item() == label
        assert pixels.mean[row].tolist() == pytest.approx(mean)
        assert pixels.variance[row].tolist() == pytest.approx(variance)


@pytest.mark.parametrize("method", ["prcl", "point_contrast"])
def test_anchors_of_each_class_and_the_share_of_trusted_pixels_are_logged(method):
    """Means over two steps, of the pixels that could be anchors and of the strong views that the teacher trusts."""
    settings = {"method": method, "weak_threshold": 0.3, "strong_threshold": 0.3, "lr": 1e-9, "probability_lr": 1e-9}
    module, calls = segmenter(**settings, **PLAIN_VIEWS), []
    contrast = module.contrast.forward
    module.contrast.forward = lambda *args: calls.append(args) or contrast(*args)
    trainer = quiet_trainer(max_epochs=1, callbacks=[teacher_callback()])
    trainer.fit(module, batches(2))
    logged = {name: value.item() for name, value in trainer.callback_metrics.items()}
    anchors, trusted, unlabelled = np.zeros(CLASSES), 0, 0
    for _, labels, valid, hard in calls:
        anchors += [(valid & hard & (labels == label)).sum().item() for label in range(CLASSES)]
        trusted += valid[len(valid) // 2 :].sum().item()
        unlabelled += len(valid) // 2
    assert [logged[f"anchors/{label}"] for label in range(CLASSES)] == pytest.approx(list(anchors / 2))
    assert sum(anchors) > 0
    assert logged["train/anchor_pixels"] == pytest.approx(anchors.sum() / 2)
    assert logged["train/trusted_share"] == pytest.approx(trusted / unlabelled)
    assert 0 < trusted < unlabelled
