import math

import numpy as np
import pytest
import torch
from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, balanced_accuracy_score, cohen_kappa_score, f1_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from callbacks import FeatureProbes
from callbacks.classification_report import confusion_matrix
from callbacks.probes import LinearProbe, confusion_scores, feature_map, fit_linear_probe, knn_probabilities
from tests.callbacks.byol import quiet_trainer
from tests.callbacks.clusters import Batch, Clusters, Encoder
from tests.distributed import run_ranks


def random_split(bank=50, queries=20, dim=5, classes=4):
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(0, classes, (bank,), generator=generator)
    centres = torch.randn(classes, dim, generator=generator)
    features = centres[labels] + torch.randn(bank, dim, generator=generator)
    return features, labels, torch.randn(queries, dim, generator=generator)


@pytest.mark.parametrize(("k", "temperature"), [(1, 0.07), (7, 0.07), (500, 1.0), (10, 1e-3)])
def test_knn_equals_a_loop(k, temperature):
    features, labels, queries = random_split()
    for query, row in zip(queries, knn_probabilities(features, labels, queries, 4, k, temperature), strict=True):
        cosines = [float(query.double() @ f.double() / (query.double().norm() * f.double().norm())) for f in features]
        order = sorted(range(len(cosines)), key=lambda i: -cosines[i])[:k]
        votes = [0.0] * 4
        for i in order:
            votes[int(labels[i])] += math.exp((cosines[i] - cosines[order[0]]) / temperature)
        expected = [vote / sum(votes) for vote in votes]
        assert row.tolist() == pytest.approx(expected, abs=1e-3 if temperature < 0.01 else 1e-5)


@pytest.mark.parametrize("classes", [2, 4])
def test_linear_probe_equals_scikit_learn(classes):
    features, labels, queries = random_split(classes=classes)
    model = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=1000))
    expected = model.fit(features.double().numpy(), labels.numpy()).predict_proba(queries.double().numpy())
    probe = LinearProbe(5, classes)
    assert not probe.fitted
    probe.load(fit_linear_probe(features, labels, classes))
    assert probe.fitted
    assert np.abs(probe.predict_proba(queries).numpy() - expected).max() < 1e-5


def test_classes_without_a_sample_are_never_predicted():
    features, labels, queries = random_split(classes=2)
    probe = LinearProbe(5, 4)
    probe.load(fit_linear_probe(features, 2 * labels + 1, 4))  # classes 1 and 3 only
    probabilities = probe.predict_proba(queries)
    assert not probabilities[:, [0, 2]].any()
    assert torch.allclose(probabilities.sum(1), torch.ones(20))
    with pytest.raises(ValueError, match=r"50 labelled samples are all of class \[1\], expected at least two classes"):
        fit_linear_probe(features, torch.ones(50, dtype=torch.long), 4)


def test_scores_equal_scikit_learn():
    generator = np.random.default_rng(0)
    labels, predictions = generator.integers(0, 4, 200), generator.integers(0, 5, 200)
    scores = confusion_scores(confusion_matrix(labels, predictions, 6))
    assert scores["acc"] == pytest.approx(accuracy_score(labels, predictions))
    per_class = [(predictions[labels == c] == c).mean() for c in range(4)]
    assert scores["balanced_acc"] == pytest.approx(np.mean(per_class))
    assert scores["balanced_acc"] == pytest.approx(balanced_accuracy_score(labels, predictions), abs=1e-9)
    assert scores["kappa"] == pytest.approx(cohen_kappa_score(labels, predictions, weights="quadratic"))
    assert scores["macro_f1"] == pytest.approx(f1_score(labels, predictions, average="macro"))
    assert confusion_scores(confusion_matrix(np.zeros(3, int), np.zeros(3, int), 2))["kappa"] == 0.0


def reference_scores(model, data):
    """Scores by scikit-learn on all labelled samples of one process."""
    with torch.no_grad():
        (x, y), (v, w) = (
            (model.extract_features(rows.x[rows.labels >= 0]).double().numpy(), rows.labels[rows.labels >= 0].numpy())
            for rows in (data.splits["train"], data.splits["val"])
        )
    linear = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=1000)).fit(x, y).predict(v)
    votes = knn_probabilities(*(torch.from_numpy(a) for a in (x, y, v)), 3, 10)
    return {
        "linear_acc": accuracy_score(w, linear),
        "main": balanced_accuracy_score(w, linear),
        "linear_kappa": cohen_kappa_score(w, linear, weights="quadratic"),
        "linear_macro_f1": f1_score(w, linear, average="macro"),
        "knn_acc": accuracy_score(w, votes.argmax(1).numpy()),
    }


@pytest.mark.parametrize("stage", ["val", "test"])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_logged_scores_equal_scikit_learn(tmp_path, stage, precision):
    seed_everything(0)
    model, data = Encoder(), Clusters()
    trainer = quiet_trainer(tmp_path, callbacks=[FeatureProbes()], precision=precision)
    (trainer.validate if stage == "val" else trainer.test)(model, data, verbose=False)
    expected = reference_scores(model, data)
    assert 0.4 < expected["linear_acc"] < 1
    for name, value in expected.items():
        tolerance = 1e-6 if precision == "32-true" else 0.1
        assert float(trainer.callback_metrics[f"{stage}/{name}"]) == pytest.approx(value, abs=tolerance), name
    shown = {path.parent.name for path in (tmp_path / "media" / stage).rglob("*.png")}
    assert shown == {"confusion", "recall", "features"}


def test_steps_that_return_nothing(tmp_path):
    class Silent(Encoder):
        def validation_step(self, batch, batch_idx):
            return None

    results = []
    for model_class in (Encoder, Silent):
        seed_everything(0)
        trainer = quiet_trainer(tmp_path, callbacks=[FeatureProbes(pictures_every_n_epochs=0)])
        trainer.validate(model_class(), Clusters(), verbose=False)
        results.append({key: float(value) for key, value in trainer.callback_metrics.items()})
    assert results[0] == results[1]
    assert not (tmp_path / "media").exists()


def test_training_is_not_disturbed(tmp_path):
    weights = []
    for callbacks in ([], [FeatureProbes()]):
        seed_everything(0)
        model = Encoder()
        quiet_trainer(tmp_path, max_epochs=2, callbacks=callbacks).fit(model, datamodule=Clusters())
        weights.append(model.layer.weight.detach())
    assert torch.equal(*weights)


def test_probe_travels_in_the_checkpoint_and_predicts(tmp_path):
    seed_everything(0)
    checkpoint = ModelCheckpoint(tmp_path, filename="best", monitor="val/main", mode="max")
    model, data = Encoder(), Clusters()
    trainer = quiet_trainer(tmp_path, max_epochs=1, callbacks=[FeatureProbes(), checkpoint])
    trainer.fit(model, datamodule=data)
    assert model.auxiliary["linear_probe"].fitted

    class Predictor(Encoder):
        def predict_step(self, batch, batch_idx):
            return self.auxiliary["linear_probe"].predict_proba(self.extract_features(batch[0]))

    loaded = Predictor()
    predictor = quiet_trainer(tmp_path, callbacks=[FeatureProbes()])
    probabilities = torch.cat(
        predictor.predict(loaded, datamodule=data, ckpt_path=f"{tmp_path}/best.ckpt", weights_only=True)
    )
    rows = data.splits["val"]
    known = rows.labels >= 0
    accuracy = (probabilities.argmax(1)[known] == rows.labels[known]).float().mean()
    assert float(accuracy) == pytest.approx(float(trainer.callback_metrics["val/linear_acc"]), abs=1e-6)


def test_resumed_run_equals_uninterrupted(tmp_path):
    def fit(seed, **options):
        seed_everything(seed)
        model = Seeded()
        checkpoint = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
        trainer = quiet_trainer(
            tmp_path, max_epochs=2, callbacks=[FeatureProbes(pictures_every_n_epochs=0), checkpoint]
        )
        trainer.fit(model, datamodule=Clusters(), weights_only=True, **options)
        return model.state_dict(), {key: float(value) for key, value in trainer.callback_metrics.items()}

    class Seeded(Encoder):
        def on_train_batch_start(self, batch, batch_idx):
            torch.manual_seed(1000 * self.trainer.current_epoch + batch_idx)

    state, metrics = fit(1)
    resumed_state, resumed_metrics = fit(2, ckpt_path=f"{tmp_path}/epoch=0.ckpt")
    assert metrics == resumed_metrics
    assert all(torch.equal(value, resumed_state[name]) for name, value in state.items())


def test_every_n_epochs_and_the_last(tmp_path):
    class Counting(Encoder):
        def __init__(self):
            super().__init__()
            self.calls = [0] * 4

        def extract_features(self, images):
            if not self.trainer.sanity_checking:
                self.calls[self.trainer.current_epoch] += 1
            return super().extract_features(images)

    model = Counting()
    callbacks = [FeatureProbes(every_n_epochs=2, pictures_every_n_epochs=0)]
    quiet_trainer(tmp_path, max_epochs=4, callbacks=callbacks).fit(model, datamodule=Clusters())
    bank, val = 8, 4  # batches
    assert model.calls == [bank + val, val, bank + val, bank + val]


def test_pictures_have_their_own_rhythm(tmp_path):
    callbacks = [FeatureProbes(pictures_every_n_epochs=3)]
    quiet_trainer(tmp_path, max_epochs=5, callbacks=callbacks).fit(Encoder(), datamodule=Clusters())
    shown = sorted(path.name for path in (tmp_path / "media/val/features").iterdir())
    assert shown == [f"step-{step:08d}.png" for step in (8, 32, 40)]


def validate_rank(rank, folder):
    seed_everything(0)
    model, data = Encoder(), Clusters()
    trainer = quiet_trainer(folder, devices=2, strategy="ddp", max_epochs=1, callbacks=[FeatureProbes()])
    trainer.fit(model, datamodule=data)
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    return metrics, reference_scores(model, data), model.auxiliary.state_dict()


def test_two_ranks_count_each_sample_once(tmp_path):
    (first, expected, probe_0), (second, _, probe_1) = run_ranks(validate_rank, 2, str(tmp_path))
    assert first == second
    for name, value in expected.items():
        assert first[f"val/{name}"] == pytest.approx(value, abs=1e-6), name
    assert probe_0["linear_probe.fitted"]
    assert all(torch.equal(value, probe_1[name]) for name, value in probe_0.items())


class OneClass(Clusters):
    def __init__(self):
        super().__init__()
        self.splits["train"].labels[:] = 1


def fail_rank(rank, folder):
    trainer = quiet_trainer(folder, devices=2, strategy="ddp", callbacks=[FeatureProbes()])
    try:
        trainer.validate(Encoder(), OneClass(), verbose=False)
    except ValueError as error:
        return str(error)
    return None


def test_an_error_is_raised_on_all_ranks(tmp_path):
    messages = run_ranks(fail_rank, 2, str(tmp_path))
    assert all("labelled samples are all of class [1]" in message for message in messages)


def test_a_stranger_without_auxiliary(tmp_path):
    class Plain(Encoder):
        def __init__(self):
            super().__init__()
            del self.auxiliary

    class Pairs(Clusters):
        class_names = num_classes = main_metric = None

        def _loader(self, split):
            rows = self.splits[split]
            return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(rows.x, rows.labels), batch_size=8)

        val_dataloader = lambda self: self._loader("val")  # noqa: E731
        probe_dataloader = lambda self: self._loader("train")  # noqa: E731

    class Silent(Plain):
        def validation_step(self, batch, batch_idx):
            return None

    seed_everything(0)
    model = Silent()
    trainer = quiet_trainer(tmp_path, callbacks=[FeatureProbes()])
    trainer.validate(model, Pairs(), verbose=False)
    expected = reference_scores(model, Clusters())
    assert float(trainer.callback_metrics["val/linear_acc"]) == pytest.approx(expected["linear_acc"], abs=1e-6)
    assert float(trainer.callback_metrics["val/main"]) == pytest.approx(expected["linear_acc"], abs=1e-6)


def test_knn_alone_gives_the_main_metric(tmp_path):
    trainer = quiet_trainer(tmp_path, callbacks=[FeatureProbes(linear=False, main="acc", k=3)])
    trainer.validate(Encoder(), Clusters(), verbose=False)
    assert set(trainer.callback_metrics) == {"val/knn_acc", "val/main"}
    assert trainer.callback_metrics["val/main"] == trainer.callback_metrics["val/knn_acc"]


def test_without_labelled_validation_samples(tmp_path):
    data = Clusters()
    data.splits["val"].labels[:] = -1
    model = Encoder()
    trainer = quiet_trainer(tmp_path, callbacks=[FeatureProbes()])
    with pytest.warns(UserWarning, match="no sample of the val split has a label"):
        trainer.validate(model, data, verbose=False)
    assert model.auxiliary["linear_probe"].fitted
    assert not trainer.callback_metrics


def test_data_without_classes_is_left_alone(tmp_path):
    data, model = Clusters(), Encoder()
    data.num_classes = 0
    trainer = quiet_trainer(tmp_path, callbacks=[FeatureProbes()])
    trainer.validate(model, data, verbose=False)
    assert not trainer.callback_metrics
    assert len(model.auxiliary) == 0


@pytest.mark.parametrize("classes", [2, 15, 30])
def test_feature_map_has_a_point_per_sample(classes):
    labels = np.arange(2500) % classes
    figure = feature_map(torch.randn(2500, 7), labels, [str(i) for i in range(classes)])
    assert sum(len(points.get_offsets()) for points in figure.axes[0].collections) == 1250
    assert feature_map(torch.randn(3, 1), np.zeros(3, int), ["a"]).axes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"knn": False, "linear": False}, "knn and linear are both False"),
        ({"k": 0}, "k is 0, expected a number > 0"),
        ({"temperature": 0.0}, r"temperature is 0\.0"),
        ({"C": -1.0}, r"C is -1\.0"),
        ({"every_n_epochs": 0}, "every_n_epochs is 0"),
        ({"pictures_every_n_epochs": -1}, "pictures_every_n_epochs is -1, expected >= 0"),
        ({"main": "auc"}, "main is 'auc', expected one of acc, balanced_acc, kappa"),
    ],
)
def test_arguments_are_checked(arguments, message):
    with pytest.raises(ValueError, match=message):
        FeatureProbes(**arguments)


def test_data_that_does_not_fit_is_named(tmp_path):
    def validate(data, model=None):
        quiet_trainer(tmp_path, callbacks=[FeatureProbes()]).validate(model or Encoder(), data, verbose=False)

    class NoBank(Clusters):
        probe_dataloader = None

    with pytest.raises(ValueError, match=r"neither the datamodule nor the module has probe_dataloader\(\)"):
        validate(NoBank())

    unlabelled = Clusters()
    unlabelled.splits["train"].labels[:] = -1
    with pytest.raises(ValueError, match=r"FeatureProbes: probe_dataloader\(\) gives no labelled sample"):
        validate(unlabelled)

    odd = Clusters()
    odd.splits["train"].labels[-1] = 7
    with pytest.raises(ValueError, match=r"a label is 7, expected 0\.\.2; check num_classes"):
        validate(odd)

    class Unlabelled(Encoder):
        def validation_step(self, batch, batch_idx):
            return {"features": self.extract_features(batch)}

        def transfer_batch_to_device(self, batch, device, dataloader_idx):
            return batch.images if isinstance(batch, Batch) else batch

    with pytest.raises(ValueError, match=r"neither the step's output nor the batch \(Tensor\) has labels"):
        validate(Clusters(), Unlabelled())
