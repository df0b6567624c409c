"""Ranks as bars and tables on the disk and in W&B, against loops."""

import csv
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.loggers import WandbLogger
from torch.utils.data import DataLoader

from callbacks import RankReport
from callbacks.rank_report import rank_histogram
from modules.ankge import AnalogicalEmbedding
from modules.ranking import RANK_BINS, FilteredRanking
from tests.callbacks.byol import quiet_trainer
from tests.callbacks.clusters import Classifier, Clusters
from tests.callbacks.wandb_files import history
from tests.distributed import run_ranks
from tests.modules import small_graph
from tests.modules.small_graph import ENTITIES, RELATIONS

ENTITY_NAMES = ["Ada", "Bo", "Cy, Jr.", "Di"]
RELATION_NAMES = ["knows", "likes"]
# (head, relation, tail), rank by the method, rank by the base
QUERIES = [
    ((0, 0, 1), 1.0, 4.0),
    ((1, 0, 2), 1.5, 1.5),
    ((2, 1, 3), 3.0, 2.0),
    ((1, 2, 0), 9.0, 18.0),
    ((2, 2, 1), 20.0, 21.0),
    ((3, 3, 2), 2.0, 2.5),
    ((0, 0, 3), 12.0, 3.0),
]


class Ranked(LightningModule):
    """Gives the ranks above; in training they are those of the epoch."""

    def __init__(self, parts=("rank_method", "rank_base")):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.parts = parts

    def training_step(self, batch, batch_idx):
        return self.weight.sum()

    def evaluate(self, batch):
        rows = batch["index"].tolist()
        ranks = {
            "rank_method": torch.tensor([QUERIES[row][1] for row in rows]),
            "rank_base": torch.tensor([QUERIES[row][2] for row in rows]),
        }
        relations = torch.tensor([QUERIES[row][0][1] for row in rows])
        return {"index": batch["index"], "relations": relations} | {key: ranks[key] for key in self.parts}

    def validation_step(self, batch, batch_idx):
        return self.evaluate(batch)

    def test_step(self, batch, batch_idx):
        return self.evaluate(batch)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Explaining(Ranked):
    """Names the next entity and relation for each triple, and a pair."""

    def explain(self, heads, relations, tails):
        return {
            "entity": (heads + 1) % 4,
            "relation": (relations + 2) % 4,
            "pair_entity": (tails + 1) % 4,
            "pair_relation": (relations + 1) % 4,
        }


class Questions(LightningDataModule):
    """Batches of 3, of the rows that are a rank's; rank 1 sees one of rank 0 again."""

    entity_names, relation_names = ENTITY_NAMES, RELATION_NAMES

    def queries(self, stage):
        return SimpleNamespace(triples=np.array([triple for triple, *_ in QUERIES]))

    def loader(self):
        rows = list(range(len(QUERIES)))
        if self.trainer.world_size > 1:
            rows = rows[:4] if self.trainer.global_rank == 0 else [0, *rows[4:]]
        return DataLoader([{"index": torch.tensor(rows[i : i + 3])} for i in range(0, len(rows), 3)], batch_size=None)

    train_dataloader = val_dataloader = test_dataloader = loader


def shown(folder, stage, key, step=0):
    with open(f"{folder}/media/{stage}/{key}/step-{step:08d}.csv", newline="") as file:
        return list(csv.DictReader(file))


def name_of(relation):
    return RELATION_NAMES[relation] if relation < 2 else f"{RELATION_NAMES[relation - 2]}_reverse"


def bars_by_loop(ranks):
    counts = {}
    for rank in ranks:
        whole = math.ceil(rank)
        for label in RANK_BINS:
            first, _, last = label.partition("-")
            if int(first) <= whole <= int(last or first):
                counts[label] = counts.get(label, 0) + 1
    last = max(RANK_BINS.index(label) for label in counts)
    return {label: counts.get(label, 0) for label in RANK_BINS[: last + 1]}


def relations_by_loop(with_base=True):
    rows = []
    for relation in sorted({triple[1] for triple, *_ in QUERIES}):
        own = [(after, before) for (_, r, _), after, before in QUERIES if r == relation]
        row = {
            "relation": name_of(relation),
            "queries": len(own),
            "mrr": sum(1 / after for after, _ in own) / len(own),
            "hits@10": sum(after <= 10 for after, _ in own) / len(own),
        }
        rows.append(row | ({"mrr before": sum(1 / before for _, before in own) / len(own)} if with_base else {}))
    return sorted(rows, key=lambda row: -row["queries"])


def improved_by_loop(rows=20):
    found = [(1 / after - 1 / before, triple, before, after) for triple, after, before in QUERIES if after < before]
    found.sort(key=lambda entry: -entry[0])
    return [
        {
            "head": ENTITY_NAMES[h],
            "relation": name_of(r),
            "tail": ENTITY_NAMES[t],
            "rank before": before,
            "rank after": after,
        }
        for _, (h, r, t), before, after in found[:rows]
    ]


def check(folder, stage="val", step=0):
    bars = {row["label"]: int(row["value"]) for row in shown(folder, stage, "ranks", step)}
    assert bars == bars_by_loop([after for _, after, _ in QUERIES])
    table = shown(folder, stage, "relations", step)
    for row, wanted in zip(table, relations_by_loop(), strict=True):
        assert row.pop("relation") == wanted.pop("relation")
        assert {key: float(value) for key, value in row.items()} == pytest.approx(wanted, abs=1e-4)
    improved = shown(folder, stage, "improved", step)
    for row, wanted in zip(improved, improved_by_loop(), strict=True):
        assert {key: row[key] for key in ("head", "relation", "tail")} == {key: wanted[key] for key in list(wanted)[:3]}
        assert [float(row[f"rank {when}"]) for when in ("before", "after")] == list(wanted.values())[3:]


@pytest.mark.parametrize("stage", ["val", "test"])
def test_report_of_a_split(tmp_path, stage):
    trainer = quiet_trainer(tmp_path, callbacks=[RankReport()])
    (trainer.validate if stage == "val" else trainer.test)(Ranked(), datamodule=Questions(), verbose=False)
    check(tmp_path, stage)
    assert {path.parent.name for path in (tmp_path / "media" / stage).rglob("*.png")} == {"ranks"}
    assert [path.name for path in (tmp_path / "media").iterdir()] == [stage]


def test_a_report_forgets_the_one_before(tmp_path):
    trainer = quiet_trainer(tmp_path, callbacks=[RankReport()])
    module = Ranked()
    for _ in range(2):
        trainer.validate(module, datamodule=Questions(), verbose=False)
        check(tmp_path)


def test_the_analogical_objects_of_improved_triples_are_named(tmp_path):
    quiet_trainer(tmp_path, callbacks=[RankReport(rows=2)]).test(Explaining(), datamodule=Questions(), verbose=False)
    rows = shown(tmp_path, "test", "improved")
    assert [row["head"] for row in rows] == [row["head"] for row in improved_by_loop(2)]
    h, r, t = QUERIES[0][0]
    assert rows[0]["analogous_entity"] == ENTITY_NAMES[(h + 1) % 4]
    assert rows[0]["analogous_relation"] == name_of((r + 2) % 4)
    assert rows[0]["analogous_pair"] == f"{ENTITY_NAMES[(t + 1) % 4]} + {name_of((r + 1) % 4)}"


def test_without_ranks_of_a_base_there_is_nothing_to_compare(tmp_path):
    module = Ranked(("rank_method",))
    quiet_trainer(tmp_path, callbacks=[RankReport()]).test(module, datamodule=Questions(), verbose=False)
    assert {path.name for path in (tmp_path / "media/test").iterdir()} == {"ranks", "relations"}
    rows = shown(tmp_path, "test", "relations")
    assert list(rows[0]) == ["relation", "queries", "mrr", "hits@10"]
    assert [float(row["mrr"]) for row in rows] == pytest.approx(
        [row["mrr"] for row in relations_by_loop(False)], abs=1e-4
    )


def test_where_nothing_gained_there_is_no_table(tmp_path, monkeypatch):
    monkeypatch.setattr(f"{__name__}.QUERIES", [(triple, before, before) for triple, _, before in QUERIES])
    quiet_trainer(tmp_path, callbacks=[RankReport()]).test(Ranked(), datamodule=Questions(), verbose=False)
    assert {path.name for path in (tmp_path / "media/test").iterdir()} == {"ranks", "relations"}


def test_an_offline_wandb_run_holds_bars_and_tables(tmp_path):
    logger = WandbLogger(save_dir=str(tmp_path), offline=True)
    trainer = quiet_trainer(tmp_path, callbacks=[RankReport()], logger=logger)
    trainer.test(Explaining(), datamodule=Questions(), verbose=False)
    logger.experiment.finish()
    by_key = {key: value for row in history(tmp_path) for key, value in row.items()}
    assert (by_key["test/relations/_type"], by_key["test/relations/nrows"]) == ("table-file", 4)
    assert (by_key["test/relations/ncols"], by_key["test/improved/ncols"]) == (5, 8)
    assert (by_key["test/improved/_type"], by_key["test/improved/nrows"]) == ("table-file", len(improved_by_loop()))
    assert any(key.startswith("test/ranks") and value == "table-file" for key, value in by_key.items())


def test_validation_is_reported_in_every_nth_epoch_and_in_the_last(tmp_path):
    callback = RankReport(every_n_epochs=2)
    quiet_trainer(tmp_path, callbacks=[callback], max_epochs=4, num_sanity_val_steps=1).fit(
        Ranked(), datamodule=Questions()
    )
    steps = sorted(int(path.stem.removeprefix("step-")) for path in (tmp_path / "media/val/relations").glob("*.csv"))
    assert steps == [3, 9, 12]  # 3 batches an epoch; none of the sanity check
    for step in steps:
        check(tmp_path, step=step)


def test_a_module_without_ranks_is_left_alone(tmp_path):
    quiet_trainer(tmp_path, callbacks=[RankReport()]).validate(Classifier(), Clusters(), verbose=False)
    assert not (tmp_path / "media").exists()


def test_a_trial_run_writes_nothing(tmp_path):
    trainer = quiet_trainer(tmp_path, callbacks=[RankReport()], fast_dev_run=True)
    trainer.test(Ranked(), datamodule=Questions(), verbose=False)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("options", [{"every_n_epochs": 0}, {"rows": 0}])
def test_a_wrong_number_is_told(options):
    with pytest.raises(ValueError, match=r"RankReport: .* expected 1 or more"):
        RankReport(**options)


def test_bars_of_ranks_are_those_of_the_metric():
    edges = [rank for power in range(25) for rank in (2**power, 2**power + 0.5, 2**power + 1)]
    ranks = torch.tensor([*edges, 2.0**30], dtype=torch.float64)
    metric = FilteredRanking()
    metric.update_ranks(ranks)
    assert rank_histogram(ranks.numpy()) == metric.histogram().tolist()
    single = torch.arange(1, 5000).float() * 211 + 1
    metric.reset()
    metric.update_ranks(single)
    found = rank_histogram(single.numpy())
    assert found == metric.histogram().tolist()[: len(found)]


def report_on_a_rank(rank, folder):
    options = {"strategy": "ddp", "devices": 2, "use_distributed_sampler": False}
    trainer = quiet_trainer(folder, callbacks=[RankReport()], **options)
    trainer.validate(Ranked(), datamodule=Questions(), verbose=False)


def test_two_ranks_report_all_queries_once(tmp_path):
    run_ranks(report_on_a_rank, 2, str(tmp_path))
    check(tmp_path)


def test_the_report_of_ankge(tmp_path):
    """The real module: before and after are its base and itself, and it names its analogical objects."""
    torch.manual_seed(0)
    module = AnalogicalEmbedding(
        None, small_graph.scoring("TransE"), ENTITIES, RELATIONS, level_weights=[0.3, 0.5, 0.2]
    )
    data = small_graph.graph(small_graph.write_graph(tmp_path / "graph"), objective="analogies")
    trainer = quiet_trainer(tmp_path, callbacks=[RankReport()])
    (scores,) = trainer.test(module, datamodule=data, verbose=False)
    table = shown(tmp_path, "test", "relations")
    queries = sum(int(row["queries"]) for row in table)
    assert queries == scores["test/count"]
    for column, key in (("mrr", "test/mrr"), ("mrr before", "test/base/mrr"), ("hits@10", "test/hits@10")):
        mean = sum(int(row["queries"]) * float(row[column]) for row in table) / queries
        assert mean == pytest.approx(scores[key], abs=1e-4)
    improved = shown(tmp_path, "test", "improved")
    data.setup("test")
    asked = {(h, r, t) for h, r, t in small_graph.with_reverses("test")}
    for row in improved:
        relation = data.all_relation_names.index(row["relation"])
        triple = (data.entity_names.index(row["head"]), relation, data.entity_names.index(row["tail"]))
        assert triple in asked
        assert float(row["rank after"]) < float(row["rank before"])
        found = module.explain(*torch.tensor([triple]).T)
        assert row["analogous_entity"] == data.entity_names[found["entity"].item()]
        assert row["analogous_relation"] == data.all_relation_names[found["relation"].item()]
    assert improved
