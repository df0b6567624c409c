"""A detection run that is resumed in the middle of an epoch equals the uninterrupted one to the last bit."""

from callbacks import ExactResume, StepSeed
from datamodules import ObjectDetection
from tests.data_layouts import write_coco
from tests.modules.boxes import detector
from tests.modules.toy_images import quiet_trainer
from tests.noisy_training import SaveAtStep, equal

SIDE = 64


def run(folder, resume=None):
    data = ObjectDetection("coco", str(folder / "data"), image_size=SIDE, batch_size=2, num_workers=0, seed=5)
    module = detector(num_classes=data.num_classes, warmup_steps=5, backbone_options={"drop_path_rate": 0.3})
    callbacks = [ExactResume(), StepSeed(seed=11), SaveAtStep(4, folder / "middle.ckpt")]
    trainer = quiet_trainer(max_epochs=2, callbacks=callbacks, use_distributed_sampler=False)
    trainer.fit(module, datamodule=data, ckpt_path=resume, weights_only=True)
    assert trainer.num_training_batches == 3, "the checkpoint is written inside an epoch"
    metrics = {name: value.item() for name, value in trainer.callback_metrics.items() if name.startswith("val/")}
    return module.state_dict(), trainer.optimizers[0].state_dict(), metrics


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path):
    write_coco(tmp_path / "data")
    weights, optimizer, metrics = run(tmp_path)
    again, resumed_optimizer, resumed = run(tmp_path, resume=tmp_path / "middle.ckpt")
    assert equal(dict(weights), dict(again))
    assert equal(optimizer, resumed_optimizer)
    assert metrics == resumed
    assert metrics["val/map"] >= 0
