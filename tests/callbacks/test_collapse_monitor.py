import pytest
import torch
from lightning.pytorch import Callback, seed_everything
from torch import nn

from callbacks import CollapseMonitor, EMATarget
from callbacks.collapse_monitor import relative_spread
from tests.callbacks.byol import Byol, loader, quiet_trainer
from tests.distributed import run_ranks


class Constant(nn.Module):
    """Adds so much of one vector that all directions are nearly the same."""

    def __init__(self, size: float) -> None:
        super().__init__()
        self.size = size

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.size


def collapsing(size: float = 1e4) -> Byol:
    model = Byol(lr=1e-6)
    for branch in (model.online, model.target):
        branch[3] = nn.Sequential(branch[3], Constant(size))
    return model


def monitor(**options) -> CollapseMonitor:
    return CollapseMonitor(**({"watch": "online", "patience": 5} | options))


def fit(folder, model, callback, epochs=2, **options):
    trainer = quiet_trainer(folder, max_epochs=epochs, callbacks=[EMATarget("online", "target"), callback], **options)
    trainer.fit(model, loader(32))
    return trainer


def test_spread_equals_a_loop_and_closed_forms():
    torch.manual_seed(0)
    z = torch.randn(20, 7)
    rows = [[float(v) / float(row.norm()) for v in row] for row in z]
    deviations = []
    for column in zip(*rows, strict=True):
        mean = sum(column) / 20
        deviations.append((sum((v - mean) ** 2 for v in column) / 19) ** 0.5)
    assert relative_spread(z).item() == pytest.approx(sum(deviations) / 7 * 7**0.5, abs=1e-6)
    assert relative_spread(torch.ones(8, 4)).item() == pytest.approx(0.0, abs=1e-6)
    assert relative_spread(torch.randn(4000, 64)).item() == pytest.approx(1.0, abs=0.02)


def test_warns_once(tmp_path):
    callback = monitor()
    with pytest.warns(UserWarning, match=r"step 5: the output of 'online' has collapsed.*0\.1/sqrt\(dim\)") as caught:
        trainer = fit(tmp_path, collapsing(), callback, epochs=8)
    assert sum("has collapsed" in str(warning.message) for warning in caught) == 1
    assert trainer.global_step == 32
    assert callback.state_dict()["acted"] is True


def test_stops(tmp_path):
    with pytest.warns(UserWarning, match="has collapsed.*stopping"):
        trainer = fit(tmp_path, collapsing(), monitor(action="stop", patience=3), epochs=8)
    assert trainer.global_step == 3


@pytest.mark.filterwarnings("error:CollapseMonitor")
def test_healthy_features_are_left_alone(tmp_path):
    callback = monitor(action="stop")
    assert fit(tmp_path, Byol(), callback, epochs=4).global_step == 16
    assert callback.state_dict() == {"below": 0, "acted": False}


@pytest.mark.filterwarnings("error:CollapseMonitor")
def test_only_batches_on_end_count(tmp_path):
    class Relapse(Callback):
        """Lets the features recover in every third batch."""

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            pl_module.online[3][1].size = 0.0 if trainer.global_step % 3 == 2 else 1e4

    callback = monitor(action="stop", patience=3)
    trainer = quiet_trainer(tmp_path, max_epochs=4, callbacks=[EMATarget("online", "target"), Relapse(), callback])
    trainer.fit(collapsing(), loader(32))
    assert trainer.global_step == 16
    assert callback.state_dict()["below"] == 1


def test_the_count_survives_a_checkpoint(tmp_path):
    callback = monitor(patience=6)
    trainer = fit(tmp_path, collapsing(), callback, epochs=1)
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    assert callback.state_dict() == {"below": 4, "acted": False}
    resumed = monitor(patience=6, action="stop")
    trainer = quiet_trainer(tmp_path, max_epochs=8, callbacks=[EMATarget("online", "target"), resumed])
    with pytest.warns(UserWarning, match=r"step 6: .* has collapsed"):
        trainer.fit(collapsing(), loader(64), ckpt_path=f"{tmp_path}/end.ckpt", weights_only=True)


def test_logs_and_lets_go(tmp_path):
    seed_everything(0)
    model = Byol()
    trainer = fit(tmp_path, model, monitor(log_as="train/spread"))
    assert 0.3 < float(trainer.callback_metrics["train/spread"]) < 1.1
    assert not model.online._forward_hooks


def fit_rank(rank, folder):
    # one rank alone collapses, and both must stop
    model = collapsing(1e4 if rank else 0.0)
    trainer = fit(folder, model, monitor(action="stop", patience=3), epochs=8, devices=2, strategy="ddp")
    return trainer.global_step


def test_ranks_stop_together(tmp_path):
    assert run_ranks(fit_rank, 2, str(tmp_path)) == [3, 3]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"threshold": 1.0}, r"threshold is 1\.0, expected a number in \(0, 1\)"),
        ({"patience": 0}, "patience is 0, expected >= 1"),
        ({"action": "raise"}, "action is 'raise', expected one of warn, stop"),
    ],
)
def test_arguments_are_checked(arguments, message):
    with pytest.raises(ValueError, match=message):
        monitor(**arguments)


def test_modules_that_do_not_fit_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"watch='projector' is no module of Byol.*children are: online, target"):
        fit(tmp_path, Byol(), monitor(watch="projector"))

    class Images(Byol):
        def training_step(self, batch, batch_idx):
            return self.online(batch[0])[None].square().mean()

    model = Images()
    model.online.append(nn.Unflatten(1, (4, 4)))
    model.target.append(nn.Unflatten(1, (4, 4)))
    with pytest.raises(ValueError, match=r"'online' returns a tensor of shape \(8, 4, 4\), expected a tensor \(B, D\)"):
        fit(tmp_path, model, monitor())
