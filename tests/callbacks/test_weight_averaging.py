"""The average against a plain loop; what evaluation, checkpoints, resumed runs and ranks see of it."""

import copy

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MeanMetric

from callbacks import AtomicCheckpointIO, WarmupWeightAveraging
from callbacks.weight_averaging import warmup_decay
from tests.distributed import run_ranks


class Toy(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.network = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
        self.error = MeanMetric()

    def training_step(self, batch, batch_idx):
        return functional.mse_loss(self.network(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.error.update(functional.mse_loss(self.network(batch[0]), batch[1]))

    def evaluation_scores(self, stage):
        score = self.error.compute()
        self.error.reset()
        return {f"{stage}/error": score}

    def on_validation_epoch_end(self):
        self.log_dict(self.evaluation_scores("val"))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.2)


class Recorder(Callback):
    """The weights after every batch, before the average moves on."""

    def __init__(self) -> None:
        self.states = []

    def on_train_start(self, trainer, pl_module):
        self.states.append(copy.deepcopy(pl_module.network.state_dict()))

    def on_train_batch_end(self, trainer, pl_module, *args):
        self.states.append(copy.deepcopy(pl_module.network.state_dict()))


def loader(batches: int = 6) -> DataLoader:
    generator = torch.Generator().manual_seed(1)
    data = TensorDataset(
        torch.randn(8 * batches, 3, generator=generator), torch.randn(8 * batches, 2, generator=generator)
    )
    return DataLoader(data, batch_size=8)


def trainer_of(*callbacks: Callback, **options) -> Trainer:
    defaults = {"max_epochs": 2, "logger": False, "accelerator": "cpu", "enable_progress_bar": False}
    defaults |= {"enable_model_summary": False, "enable_checkpointing": False, "num_sanity_val_steps": 0}
    return Trainer(callbacks=list(callbacks), **{**defaults, **options})


def fit(*callbacks: Callback, **options) -> tuple[Trainer, Toy]:
    trainer, module = trainer_of(*callbacks, **options), Toy()
    trainer.fit(module, loader(), loader(2))
    return trainer, module


@pytest.mark.parametrize("warmup", [True, False])
def test_average_is_that_of_a_plain_loop(warmup: bool) -> None:
    recorder = Recorder()
    _, module = fit(recorder, WarmupWeightAveraging(0.6, warmup=warmup), accumulate_grad_batches=2)
    # Steps end with every second batch; the statistics of batch norm move with every batch and are read at the steps.
    states = [recorder.states[0], *recorder.states[2::2]]
    expected = {name: value.clone() for name, value in states[0].items()}
    for step, state in enumerate(states[1:]):
        decay = min(0.6, (1 + step) / (10 + step)) if warmup else 0.6
        for name, value in state.items():
            expected[name] = decay * expected[name] + (1 - decay) * value if value.is_floating_point() else value
    assert len(states) == 7
    for name, value in module.network.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6)
    assert not torch.allclose(module.network[0].weight, states[-1]["0.weight"])


def test_warm_up_reaches_the_final_decay() -> None:
    assert warmup_decay(0, 0.99) == pytest.approx(0.1)
    assert warmup_decay(90, 0.99) == pytest.approx(91 / 100)
    assert warmup_decay(10_000, 0.99) == 0.99


def test_both_sets_of_weights_are_scored() -> None:
    recorder = Recorder()
    trainer, module = fit(recorder, WarmupWeightAveraging(0.9))
    averaged, raw = trainer.callback_metrics["val/error"], trainer.callback_metrics["raw/val/error"]
    for score, state in ((averaged, module.network.state_dict()), (raw, recorder.states[-1])):
        network = copy.deepcopy(module.network).eval()
        network.load_state_dict(state)
        with torch.no_grad():
            errors = [functional.mse_loss(network(inputs), targets) for inputs, targets in loader(2)]
        torch.testing.assert_close(score, torch.stack(errors).mean())
    assert averaged != raw


def test_average_starts_from_weights_that_were_loaded_at_fit_start() -> None:
    class Loaded(Toy):
        def on_fit_start(self):
            with torch.no_grad():
                self.network[0].weight.fill_(5.0)

    module = Loaded()
    callback = WarmupWeightAveraging(0.999, warmup=False)
    with pytest.warns(UserWarning, match="only 1"):
        trainer_of(callback, max_steps=1, limit_val_batches=0).fit(module, loader())
    assert (module.network[0].weight > 4.9).all()


def test_resumed_run_equals_the_uninterrupted_one_and_the_checkpoint_holds_the_average(tmp_path) -> None:
    path = tmp_path / "stopped.ckpt"
    _, whole = fit(WarmupWeightAveraging(0.9))
    _, half = fit(WarmupWeightAveraging(0.9), max_epochs=1)
    trainer = trainer_of(WarmupWeightAveraging(0.9), max_epochs=1, plugins=[AtomicCheckpointIO()])
    module = Toy()

    class Save(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            trainer.save_checkpoint(path)

    trainer.callbacks.append(Save())
    trainer.fit(module, loader(), loader(2))
    content = torch.load(path, weights_only=True)
    for name, value in half.state_dict().items():
        torch.testing.assert_close(content["state_dict"][name], value)
    assert not torch.equal(content["current_model_state"]["network.0.weight"], half.network[0].weight)
    resumed = Toy()
    trainer_of(WarmupWeightAveraging(0.9)).fit(resumed, loader(), loader(2), ckpt_path=path)
    for name, value in resumed.state_dict().items():
        assert torch.equal(value, whole.state_dict()[name]), name


def test_checkpoint_written_during_validation_has_the_average_in_its_place(tmp_path) -> None:
    path = tmp_path / "validation.ckpt"

    class Save(Callback):
        def on_validation_batch_end(self, trainer, pl_module, *args):
            trainer.save_checkpoint(path)

    _, module = fit(WarmupWeightAveraging(0.9), Save(), max_epochs=1)
    content = torch.load(path, weights_only=True)
    assert torch.equal(content["state_dict"]["network.0.weight"], module.network[0].weight)
    assert not torch.equal(content["current_model_state"]["network.0.weight"], module.network[0].weight)


def test_decay_out_of_range_is_refused() -> None:
    with pytest.raises(ValueError, match=r"decay is 1.0, expected a value in \[0, 1\)"):
        WarmupWeightAveraging(1.0)


class Sharded(Toy):
    """Batches of its own for each rank."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.own = rank

    def training_step(self, batch, batch_idx):
        return functional.mse_loss(self.network(batch[0] + self.own), batch[1])


def averages_on_rank(rank: int) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    trainer = trainer_of(
        WarmupWeightAveraging(0.9), max_epochs=1, devices=2, strategy="ddp", use_distributed_sampler=False
    )
    module = Sharded(rank)
    trainer.fit(module, loader(), loader(2))
    return module.network.state_dict(), {name: float(value) for name, value in trainer.callback_metrics.items()}


def test_ranks_have_the_same_average_and_scores() -> None:
    (first, first_scores), (second, second_scores) = run_ranks(averages_on_rank, 2)
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
    assert first_scores["val/error"] == second_scores["val/error"]
    assert first_scores["raw/val/error"] == second_scores["raw/val/error"]
