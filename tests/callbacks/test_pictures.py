import pytest
import torch
from lightning.pytorch import seed_everything
from PIL import Image

from callbacks import PictureLogger
from tests.callbacks.byol import quiet_trainer
from tests.callbacks.clusters import Clusters, Encoder


class Painter(Encoder):
    def __init__(self):
        super().__init__()
        self.asked = []

    def pictures(self, batch):
        self.asked.append((self.trainer.current_epoch, len(batch.labels)))
        return {"val/vectors": [(row.view(1, 2, 3) + torch.randn(1), "a row") for row in batch[0]]}


def fit(folder, callbacks, model=None):
    seed_everything(0)
    model = model or Painter()
    quiet_trainer(folder, max_epochs=4, callbacks=callbacks).fit(model, datamodule=Clusters())
    return model


def test_first_batch_of_every_nth_epoch_and_the_last(tmp_path):
    model = fit(tmp_path, [PictureLogger(every_n_epochs=2, max_images=3)])
    assert model.asked == [(0, 8), (2, 8), (3, 8)]
    written = sorted((tmp_path / "media/val/vectors").iterdir())
    assert [path.name for path in written] == [f"step-{step:08d}.png" for step in (8, 24, 32)]
    with Image.open(written[0]) as sheet, Image.open(written[1]) as other:
        assert sheet.size == other.size
        assert sheet.width == 6 + 3 * 166


def test_training_is_not_disturbed(tmp_path):
    weights = [fit(tmp_path, callbacks).layer.weight for callbacks in ([], [PictureLogger()])]
    assert torch.equal(*weights)


def test_modules_without_pictures_are_left_alone(tmp_path):
    fit(tmp_path, [PictureLogger()], Encoder())
    assert not (tmp_path / "media").exists()


@pytest.mark.parametrize("field", ["every_n_epochs", "max_images"])
def test_arguments_are_checked(field):
    with pytest.raises(ValueError, match=f"PictureLogger: {field} is 0, expected >= 1"):
        PictureLogger(**{field: 0})
