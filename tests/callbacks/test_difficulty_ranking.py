import math

import pytest
import torch
from lightning.pytorch import Callback, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from callbacks import DifficultyRanking, EMATarget
from callbacks.difficulty_ranking import DifficultyObjective, ranking_loss
from tests.callbacks.byol import Byol, Pair, loader, quiet_trainer
from tests.distributed import run_ranks


class Recorder(Callback):
    """Notes the logged metrics and the weight of each batch."""

    def __init__(self):
        self.accuracy, self.weights = [], []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.accuracy.append(float(trainer.callback_metrics["train/rank_acc"]))
        self.weights.append((trainer.global_step, pl_module.auxiliary["rank"].weight))


class Evaluated(Byol):
    def test_step(self, batch, batch_idx):
        return None

    def on_train_batch_start(self, batch, batch_idx):
        torch.manual_seed(1000 * self.trainer.current_epoch + batch_idx)


def pairs_of(count: int, dim: int = 6, directions: int = 2, dtype: torch.dtype = torch.float32) -> list[Pair]:
    generator = torch.Generator().manual_seed(3)
    return [
        Pair(
            torch.randn(count, dim, generator=generator, dtype=dtype).requires_grad_(),
            torch.randn(count, dim, generator=generator, dtype=dtype).requires_grad_(),
            torch.randint(0, 4, (count,), generator=generator) / 4,
            torch.randint(0, 4, (count,), generator=generator) / 4,
        )
        for _ in range(directions)
    ]


def test_loss_and_metrics_equal_a_loop_over_pairs():
    objective = DifficultyObjective(6, weight=0.7)
    pairs = pairs_of(40)
    losses, correct, gaps = [], [], []
    with torch.no_grad():
        for pair in pairs:
            for y, y_target, d, d_target in zip(*pair, strict=True):
                gaps.append(abs(float(d) - float(d_target)))
                if d == d_target:
                    continue
                logit = float(objective.head(y) - objective.head(y_target))
                sign = 1 if d > d_target else -1
                losses.append(math.log1p(math.exp(-sign * logit)))
                correct.append(float(sign * logit > 0))
    output = objective(pairs)
    assert 0 < len(losses) < 80
    assert output.loss.item() == pytest.approx(sum(losses) / len(losses), abs=1e-6)
    assert output.weight == 0.7
    assert output.metrics["rank_acc"].item() == pytest.approx(sum(correct) / len(correct), abs=1e-6)
    assert output.metrics["difficulty_gap"].item() == pytest.approx(sum(gaps) / len(gaps), abs=1e-6)


def test_closed_forms():
    zero, one = torch.zeros(1), torch.ones(1)
    assert ranking_loss(zero, one, zero)[0].item() == pytest.approx(math.log(2))
    assert ranking_loss(zero, one, zero)[1].item() == 0.5
    assert ranking_loss(2 * one, one, zero)[0].item() == pytest.approx(math.log1p(math.exp(-2)))
    assert ranking_loss(2 * one, zero, one)[0].item() == pytest.approx(math.log1p(math.exp(2)))
    assert ranking_loss(2 * one, zero, one)[1].item() == 0.0


def test_pairwise_loss_is_antisymmetric():
    pairs = pairs_of(10)
    objective = DifficultyObjective(6)
    mirrored = [Pair(p.target, p.online, p.target_difficulty, p.online_difficulty) for p in pairs]
    assert objective(pairs).loss.item() == pytest.approx(objective(mirrored).loss.item(), abs=1e-7)


@pytest.mark.parametrize("head", ["pairwise", "concat"])
def test_all_ties_give_zero_with_a_graph(head):
    objective = DifficultyObjective(6, head=head)
    pairs = [pair._replace(target_difficulty=pair.online_difficulty) for pair in pairs_of(5)]
    output = objective(pairs)
    output.loss.backward()
    assert output.loss.item() == 0.0
    assert output.metrics["rank_acc"].item() == 0.5
    assert all(p.grad is not None and not p.grad.any() for p in objective.parameters())
    assert pairs[0].online.grad is not None


@pytest.mark.parametrize("head", ["pairwise", "concat"])
def test_gradient_reaches_head_and_online_features_only(head):
    objective = DifficultyObjective(6, head=head)
    pairs = pairs_of(5)
    objective(pairs).loss.backward()
    assert all(pair.online.grad.abs().sum() > 0 for pair in pairs)
    assert all(pair.target.grad is None for pair in pairs)
    # the last bias cancels in a difference of scores
    last_bias = [objective.head[2].bias] if head == "pairwise" else []
    assert all(p.grad.abs().sum() > 0 for p in objective.parameters() if not any(p is b for b in last_bias))


def test_concat_head_shuffles_the_order_of_branches():
    objective = DifficultyObjective(4, head="concat")
    count = 4000
    seen = []
    objective.head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
    online, target = torch.ones(count, 4), -torch.ones(count, 4)
    torch.manual_seed(0)
    objective([Pair(online, target, torch.ones(count), torch.zeros(count))])
    online_first = (seen[0][:, 0] > 0).float()
    assert torch.equal(seen[0][:, :4], -seen[0][:, 4:])
    assert abs(online_first.mean().item() - 0.5) < 4 * 0.5 / math.sqrt(count)


def test_concat_labels_follow_the_shuffle():
    objective = DifficultyObjective(1, head="concat")
    with torch.no_grad():  # logit = 20 (first - second), read off two inputs side by side
        objective.head[0] = nn.Linear(2, 1, bias=False)
        objective.head[0].weight.copy_(torch.tensor([[20.0, -20.0]]))
        objective.head[1] = nn.Identity()
        objective.head[2] = nn.Identity()
    difficulty = torch.rand(2, 200)
    output = objective([Pair(difficulty[0, :, None], difficulty[1, :, None], difficulty[0], difficulty[1])])
    assert output.metrics["rank_acc"].item() == 1.0
    with pytest.raises(ValueError, match="'concat' head compares two inputs and scores none alone"):
        objective.score(torch.zeros(1, 1))


def test_half_precision_features_give_a_float32_loss():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = DifficultyObjective(6)(pairs_of(8))
    assert output.loss.dtype == output.metrics["rank_acc"].dtype == torch.float32


def test_learns_on_a_stranger_s_byol(tmp_path):
    seed_everything(0)
    recorder = Recorder()
    callbacks = [DifficultyRanking(), EMATarget("online", "target", 0.99), recorder]
    model = Byol(inputs=16, width=32)
    quiet_trainer(tmp_path, max_epochs=20, callbacks=callbacks).fit(model, loader(512, 64, inputs=16))
    assert model.auxiliary["rank"].head[0].weight.shape == (32, 32)
    assert sum(recorder.accuracy[:8]) / 8 < 0.7
    assert sum(recorder.accuracy[-8:]) / 8 > 0.8
    with torch.no_grad():
        model.eval()
        x = next(iter(loader(512, 512, inputs=16)))[0]
        easy, hard = (model.auxiliary["rank"].score(model.online(x + s * torch.randn_like(x))) for s in (0.1, 3.0))
    assert (hard > easy).float().mean() > 0.9


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [("constant", [2, 2, 2, 2, 2]), ("linear", [0, 0.5, 1, 1.5, 2]), ("cosine", [0, 2 - 2**0.5, 2, 2 + 2**0.5, 4])],
)
def test_weight_schedules(schedule, expected):
    weight = 4 if schedule == "cosine" else 2
    callback = DifficultyRanking(weight=weight, weight_schedule=schedule, ramp_steps=4)
    assert [callback.weight_at(step) for step in range(5)] == pytest.approx(expected)
    assert callback.weight_at(1000) == expected[-1]


def test_weight_follows_optimizer_steps_under_accumulation(tmp_path):
    recorder = Recorder()
    ranking = DifficultyRanking(weight=1.0, weight_schedule="linear", ramp_steps=2)
    trainer = quiet_trainer(tmp_path, max_epochs=1, accumulate_grad_batches=2, callbacks=[ranking, recorder])
    trainer.fit(Byol(), loader(48))
    assert [weight for _, weight in recorder.weights] == [0, 0, 0.5, 0.5, 1, 1]


def test_weight_enters_the_loss(tmp_path):
    def first_loss(weight):
        seed_everything(5)
        model = Evaluated()
        quiet_trainer(tmp_path, max_steps=1, callbacks=[DifficultyRanking(weight=weight)]).fit(model, loader())
        return model.losses[0]

    none, one, three = first_loss(0.0), first_loss(1.0), first_loss(3.0)
    assert one - none > 0.1
    assert three - none == pytest.approx(3 * (one - none), abs=1e-5)


def test_weight_zero_builds_nothing(tmp_path):
    model = Byol()
    quiet_trainer(tmp_path, max_steps=1, callbacks=[DifficultyRanking(weight=0)]).fit(model, loader())
    assert len(model.auxiliary) == 0


def fit_seeded(folder, seed, callbacks, **options):
    seed_everything(seed)
    model = Evaluated()
    trainer = quiet_trainer(folder, max_epochs=2, callbacks=callbacks)
    trainer.fit(model, loader(8, repeat=4), weights_only=True, **options)
    return model


@pytest.mark.parametrize("head", ["pairwise", "concat"])
@pytest.mark.parametrize("stop_at", [1, 4, 6])
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(tmp_path, head, stop_at):
    def callbacks():
        ranking = DifficultyRanking(weight_schedule="linear", ramp_steps=6, head=head)
        return [ranking, EMATarget("online", "target", 0.9)]

    checkpoint = ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1, filename="{step}")
    whole = fit_seeded(tmp_path, 1, [*callbacks(), checkpoint])
    resumed = fit_seeded(tmp_path, 2, callbacks(), ckpt_path=f"{tmp_path}/step={stop_at}.ckpt")
    assert whole.losses[stop_at:] == resumed.losses
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    assert any(name.startswith("auxiliary.rank.head") for name in whole.state_dict())


def test_the_checkpoint_loads_in_the_other_stages(tmp_path):
    callbacks = [DifficultyRanking(), ModelCheckpoint(tmp_path, filename="end")]
    trained = fit_seeded(tmp_path, 1, callbacks)
    model = Evaluated()
    trainer = quiet_trainer(tmp_path, callbacks=[DifficultyRanking()])
    trainer.test(model, loader(), ckpt_path=f"{tmp_path}/end.ckpt", verbose=False)
    weights = (m.auxiliary["rank"].head[0].weight for m in (trained, model))
    assert torch.equal(*weights)


def fit_rank(rank, folder):
    seed_everything(rank)
    model = Byol()
    callbacks = [DifficultyRanking(), EMATarget("online", "target", 0.9)]
    options = {"devices": 2, "strategy": "ddp", "max_steps": 4, "callbacks": callbacks}
    quiet_trainer(folder, **options).fit(model, loader(64))
    return model.state_dict(), model.losses


def test_two_ranks_train_the_same_head(tmp_path):
    (first, losses_0), (second, losses_1) = run_ranks(fit_rank, 2, str(tmp_path))
    names = [name for name in first if "running" not in name]
    assert "auxiliary.rank.head.0.weight" in names
    assert all(torch.equal(first[name], second[name]) for name in names)
    assert losses_0 != losses_1


def test_two_objectives_live_side_by_side(tmp_path):
    callbacks = [DifficultyRanking("rank"), DifficultyRanking("again", head="concat", dim="predictor.in_features")]
    model = Byol()
    quiet_trainer(tmp_path, max_steps=1, callbacks=callbacks).fit(model, loader())
    assert list(model.auxiliary) == ["rank", "again"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"weight": -0.5}, r"weight is -0\.5, expected a number >= 0"),
        ({"head": "triplet"}, "head is 'triplet', expected one of pairwise, concat"),
        ({"weight_schedule": "step"}, "weight_schedule is 'step', expected one of constant, linear, cosine"),
        ({"weight_schedule": "linear"}, "ramp_steps is 0, expected >= 1 for weight_schedule='linear'"),
        ({"name": "a.b"}, "name is 'a.b', expected a non-empty name without dots"),
    ],
)
def test_arguments_are_checked(arguments, message):
    with pytest.raises(ValueError, match=message):
        DifficultyRanking(**arguments)


def test_modules_that_do_not_fit_are_told_why(tmp_path):
    def fit(change=lambda m: None, model_class=Byol, **arguments):
        model = model_class()
        change(model)
        quiet_trainer(tmp_path, max_steps=1, callbacks=[DifficultyRanking(**arguments)]).fit(model, loader())

    with pytest.raises(ValueError, match=r"Byol has no nn.ModuleDict 'auxiliary'.*self.auxiliary = nn.ModuleDict"):
        fit(lambda m: delattr(m, "auxiliary"))
    with pytest.raises(ValueError, match=r"dim='feature_dim' gives None on Byol.*set self.feature_dim"):
        fit(lambda m: delattr(m, "feature_dim"))
    with pytest.raises(ValueError, match=r"dim='online.width' gives None"):
        fit(dim="online.width")
    with pytest.raises(ValueError, match=r"auxiliary\['rank'\] is already a Linear; choose another name"):
        fit(lambda m: m.auxiliary.update({"rank": nn.Linear(1, 1)}))
    with pytest.raises(ValueError, match=r"r_min = r_max = 0.5\): every pair ties.*Set r_min < r_max, or weight=0"):
        fit(lambda m: setattr(m, "perturbation_strength", (0.5, 0.5)))

    class Forgetful(Byol):
        def configure_optimizers(self):
            return torch.optim.SGD(self.online.parameters(), lr=0.1)

    with pytest.raises(
        ValueError, match=r"4 parameters of auxiliary\['rank'\] are in no optimizer, first head.0.weight"
    ):
        fit(model_class=Forgetful)

    class Deaf(Byol):
        def training_step(self, batch, batch_idx):
            return self.online(batch[0]).square().mean()

    with pytest.raises(RuntimeError, match=r"Deaf.training_step did not call auxiliary\['rank'\]"):
        fit(model_class=Deaf)
