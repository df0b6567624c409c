import numpy as np
import pandas as pd
import pytest
import torch
from lightning.pytorch import seed_everything
from torch.utils.data import DataLoader, IterableDataset

from callbacks import PredictionWriter
from tests.callbacks.byol import quiet_trainer
from tests.callbacks.clusters import Classifier, Clusters, Encoder
from tests.distributed import run_ranks


class Challenge(Clusters):
    """Knows the format of its own evaluation."""

    def prediction_table(self, index, probabilities):
        names = [f"cell_{row}" for row in index]
        return pd.DataFrame({"image": names, "answer": probabilities.argmax(1)})

    def sample_ids(self, split=None):
        assert split is None
        return [f"cell_{row}" for row in range(31)]


def predict(folder, writer, model_class=Classifier, data_class=Challenge, **options):
    seed_everything(0)
    model, data = model_class(), data_class()
    trainer = quiet_trainer(folder, callbacks=[writer], **options)
    trainer.predict(model, datamodule=data, return_predictions=False)
    with torch.no_grad():
        features = model.layer(data.splits["val"].x).numpy()
        return features, torch.from_numpy(features)[:, :3].softmax(1).numpy(), data.splits["val"].labels.numpy()


def test_the_data_set_s_own_format(tmp_path):
    _, probabilities, _ = predict(tmp_path, PredictionWriter())
    table = pd.read_csv(tmp_path / "predictions.csv")
    assert table["image"].tolist() == [f"cell_{row}" for row in range(31)]
    assert table["answer"].tolist() == probabilities.argmax(1).tolist()


def test_a_data_set_without_a_format(tmp_path):
    _, probabilities, _ = predict(tmp_path, PredictionWriter(f"{tmp_path}/a/b.csv"), data_class=Clusters)
    table = pd.read_csv(tmp_path / "a/b.csv")
    assert list(table) == ["index", "round", "long", "odd"]
    assert table["index"].tolist() == list(range(31))
    assert table[["round", "long", "odd"]].to_numpy() == pytest.approx(probabilities, abs=1e-6)


def test_probabilities_as_arrays(tmp_path):
    _, probabilities, _ = predict(tmp_path, PredictionWriter(format="npz"))
    arrays = np.load(tmp_path / "predictions.npz")
    assert set(arrays) == {"id", "index", "probabilities"}
    assert arrays["id"].tolist()[:2] == ["cell_0", "cell_1"]
    assert np.allclose(arrays["probabilities"], probabilities, atol=1e-6)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_features_as_arrays(tmp_path, precision):
    features, _, labels = predict(tmp_path, PredictionWriter(format="npz"), Encoder, precision=precision)
    arrays = np.load(tmp_path / "features.npz")
    assert arrays["features"].dtype == np.float32
    assert np.allclose(arrays["features"], features, atol=1e-6 if precision == "32-true" else 0.1)
    assert np.array_equal(arrays["label"], labels)
    assert arrays["id"].tolist() == [f"cell_{row}" for row in range(31)]


def test_features_as_columns(tmp_path):
    features, _, labels = predict(tmp_path, PredictionWriter(f"{tmp_path}/f.parquet", "parquet"), Encoder, Clusters)
    table = pd.read_parquet(tmp_path / "f.parquet")
    assert list(table) == ["id", "label", "feature_0", "feature_1", "feature_2", "feature_3"]
    assert table["id"].tolist() == [str(row) for row in range(31)]
    assert table["label"].tolist() == labels.tolist()
    assert np.allclose(table.filter(like="feature_").to_numpy(), features, atol=1e-6)


def predict_rank(rank, folder):
    predict(folder, PredictionWriter(), devices=2, strategy="ddp")


def test_two_ranks_write_each_sample_once(tmp_path):
    run_ranks(predict_rank, 2, str(tmp_path / "two"))
    predict(tmp_path / "one", PredictionWriter())
    assert (tmp_path / "two/predictions.csv").read_text() == (tmp_path / "one/predictions.csv").read_text()
    assert [path.name for path in (tmp_path / "two").iterdir()] == ["predictions.csv"]


def test_nothing_to_predict(tmp_path):
    class Empty(IterableDataset):
        def __iter__(self):
            return iter(())

    class NoData(Clusters):
        def predict_dataloader(self):
            return DataLoader(Empty())

    with pytest.warns(UserWarning, match="there was nothing to predict, so no file is written"):
        predict(tmp_path, PredictionWriter(), data_class=NoData)
    assert not list(tmp_path.iterdir())


def test_a_failed_table_leaves_the_old_file(tmp_path):
    class Broken(Challenge):
        def prediction_table(self, index, probabilities):
            raise KeyError("no such class")

    (tmp_path / "predictions.csv").write_text("old")
    with pytest.raises(KeyError, match="no such class"):
        predict(tmp_path, PredictionWriter(), data_class=Broken)
    assert (tmp_path / "predictions.csv").read_text() == "old"


def test_wrong_use_is_named(tmp_path):
    with pytest.raises(ValueError, match="format is 'xlsx', expected one of csv, npz, parquet"):
        PredictionWriter(format="xlsx")
    with pytest.raises(ValueError, match=r"output 'a\.csv' does not end in \.npz"):
        PredictionWriter("a.csv", format="npz")
    with pytest.raises(ValueError, match="features are not written as csv; use format='npz' or format='parquet'"):
        predict(tmp_path, PredictionWriter(), Encoder)

    class Bare(Encoder):
        def predict_step(self, batch, batch_idx):
            return {"features": self.layer(batch[0])}

    with pytest.raises(ValueError, match=r"returned \['features'\], expected a dict with 'index' and 'probabilities'"):
        predict(tmp_path, PredictionWriter(format="npz"), Bare)

    class Raw(Encoder):
        def predict_step(self, batch, batch_idx):
            return self.layer(batch[0])

    with pytest.raises(ValueError, match="returned Tensor, expected a dict"):
        predict(tmp_path, PredictionWriter(format="npz"), Raw)

    class Two(Clusters):
        def predict_dataloader(self):
            return [self.val_dataloader(), self.val_dataloader()]

    class ManyLoaders(Classifier):
        def predict_step(self, batch, batch_idx, dataloader_idx):
            return super().predict_step(batch, batch_idx)

    with pytest.raises(ValueError, match="several predict dataloaders; predict one split at a time"):
        predict(tmp_path, PredictionWriter(), ManyLoaders, Two)
