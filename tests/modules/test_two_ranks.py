import pytest
import torch
from torch.utils.data import DataLoader

from callbacks import DifficultyRanking, EMATarget, StepSeed
from modules.bolt import BOLT
from modules.bolt.losses import info_nce
from modules.classification import ImageClassifier
from tests.distributed import run_ranks
from tests.modules.toy_images import TINY, batches, quiet_trainer


class Recorder(BOLT):
    def training_step(self, batch, batch_idx):
        self.seen.append({"images": batch.images})
        return super().training_step(batch, batch_idx)

    def sample_permutations(self, images, generator=None):
        permutation = super().sample_permutations(images, generator)
        self.seen[-1]["permutation"] = permutation
        return permutation

    def consistency(self, prediction, projection):
        loss = super().consistency(prediction, projection)
        self.seen[-1].update(prediction=prediction.detach(), projection=projection, loss=loss.detach())
        return loss


def two_rank_trainer(**kwargs):
    return quiet_trainer(strategy="ddp", devices=2, use_distributed_sampler=False, **kwargs)


def train_bolt(rank):
    torch.manual_seed(0)
    module = Recorder(encoder_options=TINY, projector_hidden=8, projector_dim=4, loss="infonce")
    module.seen = []
    callbacks = [StepSeed(0), DifficultyRanking(), EMATarget("online", "target", momentum=0.9)]
    two_rank_trainer(callbacks=callbacks).fit(module, DataLoader(batches(10)[rank::2], batch_size=None))
    return (
        [p.detach() for p in module.target.parameters()],
        [p.detach() for p in module.online.parameters()],
        module.seen,
    )


def test_targets_agree_perturbations_differ_and_keys_are_shared():
    (target0, online0, seen0), (target1, online1, seen1) = run_ranks(train_bolt, 2)
    assert all(torch.equal(a, b) for a, b in zip(target0 + online0, target1 + online1, strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(target0, online0, strict=True))
    assert len(seen0) == len(seen1) == 5
    assert not any(torch.equal(a["permutation"], b["permutation"]) for a, b in zip(seen0, seen1, strict=True))
    for step in zip(seen0, seen1, strict=True):
        keys = [torch.cat([rank["projection"].chunk(2)[view] for rank in step]) for view in (0, 1)]
        for place, rank in enumerate(step):
            first, second = rank["prediction"].chunk(2)
            expected = info_nce(first, keys[1], 0.2, 6 * place) + info_nce(second, keys[0], 0.2, 6 * place)
            assert rank["loss"].item() == pytest.approx(expected.item(), abs=1e-6)


SETTINGS = {
    "encoder_options": TINY,
    "num_classes": 3,
    "drop_path": 0.0,
    "optimizer": "sgd",
    "lr": 0.05,
    "lr_reference_batch": None,
    "warmup_epochs": 1,
}


def train_classifier(rank):
    torch.manual_seed(0)
    module = ImageClassifier(**SETTINGS)
    trainer = two_rank_trainer(max_epochs=2)
    data = batches(8)[rank::2]
    trainer.fit(module, DataLoader(data, batch_size=None), DataLoader(batches(6)[rank::2], batch_size=None))
    return [p.detach() for p in module.parameters()], {k: v.item() for k, v in trainer.callback_metrics.items()}


def test_two_ranks_equal_one_process_with_two_accumulated_batches():
    torch.manual_seed(0)
    module = ImageClassifier(**SETTINGS)
    trainer = quiet_trainer(max_epochs=2, accumulate_grad_batches=2)
    trainer.fit(module, DataLoader(batches(8), batch_size=None), DataLoader(batches(6), batch_size=None))
    results = run_ranks(train_classifier, 2)
    for parameters, logged in results:
        for own, other in zip(module.parameters(), parameters, strict=True):
            assert torch.allclose(own, other, atol=1e-5)
        for key, value in trainer.callback_metrics.items():
            if key.startswith("val/"):
                assert logged[key] == pytest.approx(value.item(), abs=1e-5), key
    assert results[0][1]["train/loss"] == pytest.approx(trainer.callback_metrics["train/loss"].item(), abs=1e-5)


def evaluate_with_labels_on_one_rank(rank):
    torch.manual_seed(0)
    items = batches(3)
    if rank == 1:
        items = [item._replace(labels=torch.full_like(item.labels, -1)) for item in items]
    (metrics,) = two_rank_trainer().validate(
        ImageClassifier(**SETTINGS), DataLoader(items, batch_size=None), verbose=False
    )
    return metrics


def test_a_rank_without_a_labelled_image_keeps_no_other_waiting():
    torch.manual_seed(0)
    module = ImageClassifier(**SETTINGS)
    (expected,) = quiet_trainer().validate(module, DataLoader(batches(3), batch_size=None), verbose=False)
    for metrics in run_ranks(evaluate_with_labels_on_one_rank, 2):
        assert metrics == pytest.approx(expected, abs=1e-6)
    labels = torch.cat([item.labels for item in batches(3)])
    with torch.no_grad():
        logits = torch.cat([module(item.images) for item in batches(3)])
    assert expected["val/loss"] == pytest.approx(torch.nn.functional.cross_entropy(logits, labels).item(), abs=1e-6)
