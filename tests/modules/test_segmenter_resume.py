"""A segmentation run that is resumed in the middle of an epoch equals the uninterrupted one to the last bit."""

import torch

from callbacks import ExactResume, StepSeed
from datamodules import SemanticSegmentation
from modules.segmentation import DenseSegmenter
from tests.data_layouts import write_camvid
from tests.modules.street_scenes import TINY_BACKBONE
from tests.modules.toy_images import quiet_trainer
from tests.noisy_training import SaveAtStep, equal


def run(folder, resume=None):
    torch.manual_seed(3)
    data = SemanticSegmentation("camvid", str(folder / "data"), image_size=64, batch_size=2, num_workers=0, seed=5)
    module = DenseSegmenter(TINY_BACKBONE, num_classes=data.num_classes, dropout=0.5, lr=1e-3)
    callbacks = [ExactResume(), StepSeed(seed=11), SaveAtStep(4, folder / "middle.ckpt")]
    trainer = quiet_trainer(max_epochs=2, callbacks=callbacks, use_distributed_sampler=False)
    trainer.fit(module, datamodule=data, ckpt_path=resume, weights_only=True)
    return (
        module.state_dict(),
        trainer.optimizers[0].state_dict(),
        {k: v.item() for k, v in trainer.callback_metrics.items()},
    )


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path):
    write_camvid(tmp_path / "data")
    weights, optimizer, metrics = run(tmp_path)
    again, resumed_optimizer, resumed = run(tmp_path, resume=tmp_path / "middle.ckpt")
    assert equal(dict(weights), dict(again))
    assert equal(optimizer, resumed_optimizer)
    same = [key for key in metrics if key.startswith("val/")]
    assert len(same) == 5
    assert {key: metrics[key] for key in same} == {key: resumed[key] for key in same}
