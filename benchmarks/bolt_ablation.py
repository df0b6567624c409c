"""What each part of BOLT is worth: every row pre-trained alike, scored by kNN, linear probe and fine-tuning.

    python -m benchmarks.bolt_ablation --layout medmnist --root <folder> --name pbc28 --out results/pbc28
    python -m benchmarks.bolt_ablation --layout folder --root <PBC folder> --image-size 64 --out results/pbc64

Every finished (row, seed) is a line of `<out>/results.csv`; the same command goes on where it was stopped. With
`--finetune` the encoders that are there are fine-tuned, with 10 labels per class and with all, into `finetune.csv`.
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from benchmarks.result_tables import append, read
from callbacks import DifficultyRanking, EMATarget, StepSeed
from datamodules import MedicalImages
from modules.bolt import BOLT
from modules.classification import ImageClassifier

LABEL_SUBSETS = 5
FINETUNE_EPOCHS = {10: 100, None: 20}


def row(views: int = 1, weight: float = 1.0, head: str = "pairwise", **model: Any) -> dict[str, Any]:
    """One method of the table."""
    return {"views": views, "weight": weight, "head": head, "model": model}


ROWS: dict[str, dict[str, Any] | None] = {
    "random features": None,
    "BYOL": row(views=2, weight=0.0, perturb=False),
    "BOLT, 1 view, lambda 0": row(weight=0.0),
    "BOLT, 1 view": row(),
    "BOLT, 1 view, lambda 0.1": row(weight=0.1),
    "BOLT, 2 views, lambda 0": row(views=2, weight=0.0),
    "BOLT, 2 views": row(views=2),
    "BOLT, 2 views, lambda 0.1": row(views=2, weight=0.1),
    "BOLT, 2 views, lambda 0.1, r_max 0.5": row(views=2, weight=0.1, r_max=0.5),
    "BOLT, 2 views, lambda 0.1, r_max 0.25": row(views=2, weight=0.1, r_max=0.25),
    "BOLT, 1 view, g 1": row(mix=1.0),
    "BOLT, 1 view, concat ranker": row(head="concat"),
    "BOLT, 1 view, learned positions": row(pos_embed="learned"),
}


class LastValues(Callback):
    """Keep the epoch means that the module logs."""

    def __init__(self) -> None:
        self.history: list[dict[str, float]] = []

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Note this epoch."""
        self.history.append({k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("train/")})


def make_data(options: argparse.Namespace, views: int, seed: int, **overrides: Any) -> MedicalImages:
    """The data, by default as pre-training sees it."""
    settings: dict[str, Any] = {
        "layout": options.layout,
        "root": options.root,
        "name": options.name,
        "image_size": options.image_size,
        "batch_size": options.batch_size,
        "views": views,
        "augment": "pretrain",
        "seed": seed,
        "num_workers": 0,
        "verify_md5": False,
        "download": False,
    }
    return MedicalImages(**{**settings, **overrides})


def encoder_options(options: argparse.Namespace) -> dict[str, int]:
    """The small Vision Transformer of the table."""
    return {"patch_size": options.patch, "embed_dim": options.width, "depth": options.depth, "num_heads": 4}


def quiet_trainer(epochs: int, callbacks: list[Callback], **settings: Any) -> Trainer:
    """A trainer that writes nothing."""
    return Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        limit_val_batches=0,
        **settings,
    )


def make_model(options: argparse.Namespace, data: MedicalImages, settings: dict[str, Any]) -> BOLT:
    """The small encoder of the chosen image size."""
    return BOLT(
        encoder_options=encoder_options(options),
        image_size=data.image_size,
        in_channels=data.in_channels,
        lr=options.lr,
        weight_decay=0.05,
        **settings,
    )


def pretrain(options: argparse.Namespace, name: str, seed: int) -> tuple[BOLT, MedicalImages, list[dict[str, float]]]:
    """Pre-train one row with one seed."""
    settings = ROWS[name] or row()
    seed_everything(seed, verbose=False)
    data = make_data(options, settings["views"], seed)
    model = make_model(options, data, settings["model"])
    values = LastValues()
    if ROWS[name] is not None:
        callbacks: list[Callback] = [StepSeed(seed), EMATarget("online", "target", momentum=0.99), values]
        if settings["weight"] > 0:
            callbacks.append(DifficultyRanking(weight=settings["weight"], head=settings["head"]))
        quiet_trainer(options.epochs, callbacks, gradient_clip_val=3.0).fit(model, datamodule=data)
    else:
        data.setup("fit")
    return model, data, values.history


@torch.inference_mode()
def features(model: BOLT, loader: Any) -> tuple[np.ndarray, np.ndarray]:
    """CLS features (N, D) and labels (N,) of a loader."""
    model.eval()
    found = [(model.extract_features(batch.images), batch.labels) for batch in loader]
    return torch.cat([f for f, _ in found]).numpy(), torch.cat([y for _, y in found]).numpy()


def linear_accuracy(train: tuple[np.ndarray, np.ndarray], test: tuple[np.ndarray, np.ndarray]) -> float:
    """Test accuracy of a logistic regression (C=0.1) on standardised features."""
    probe = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=5000))
    return float(probe.fit(*train).score(*test))


def knn_accuracy(train: tuple[np.ndarray, np.ndarray], test: tuple[np.ndarray, np.ndarray], k: int = 10) -> float:
    """Test accuracy of cosine kNN, votes weighted by exp(cos / 0.07)."""
    bank, query = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (train[0], test[0]))
    cosine = query @ bank.T
    nearest = np.argsort(-cosine, axis=1)[:, :k]
    votes = np.zeros((len(query), train[1].max() + 1))
    weights = np.exp(np.take_along_axis(cosine, nearest, axis=1) / 0.07)
    for column in range(k):
        np.add.at(votes, (np.arange(len(query)), train[1][nearest[:, column]]), weights[:, column])
    return float((votes.argmax(1) == test[1]).mean())


def few_labels(labels: np.ndarray, per_class: int, seed: int) -> np.ndarray:
    """Rows of a class-balanced subset."""
    order = np.random.default_rng(seed).permutation(len(labels))
    return np.concatenate([order[labels[order] == c][:per_class] for c in np.unique(labels)])


def score(model: BOLT, data: MedicalImages) -> dict[str, float]:
    """All probes of one encoder on the test part."""
    data.setup("test")
    train, test = features(model, data.probe_dataloader()), features(model, data.test_dataloader())
    few = []
    for subset in range(LABEL_SUBSETS):
        rows = few_labels(train[1], 10, subset)
        few.append(linear_accuracy((train[0][rows], train[1][rows]), test))
    return {
        "knn": knn_accuracy(train, test),
        "linear": linear_accuracy(train, test),
        "linear 10/class": float(np.mean(few)),
    }


def run(options: argparse.Namespace, name: str, seed: int) -> dict[str, Any]:
    """Pre-train and score one row with one seed."""
    start = time.perf_counter()
    model, data, history = pretrain(options, name, seed)
    seconds = time.perf_counter() - start
    torch.save(model.online.encoder.state_dict(), weights_file(options, name, seed))
    weights_file(options, name, seed).with_suffix(".json").write_text(json.dumps(history))
    last = history[-1] if history else {}
    trained = {key: last.get(f"train/{key}", float("nan")) for key in ("loss_consistency", "rank_acc", "z_std")}
    return {"row": name, "seed": seed, **score(model, data), **trained, "seconds": round(seconds, 1)}


def weights_file(options: argparse.Namespace, name: str, seed: int) -> Path:
    """Where the encoder of a row is kept."""
    return options.out / f"{name.replace(',', '').replace(' ', '_')}-{seed}.pt"


def finetune(options: argparse.Namespace, name: str, seed: int) -> dict[str, Any]:
    """Test accuracy after fine-tuning with few and with all labels; the random encoder is trained from scratch."""
    start, found = time.perf_counter(), {}
    for labels, epochs in FINETUNE_EPOCHS.items():
        seed_everything(seed, verbose=False)
        data = make_data(options, 1, seed, augment="finetune", labels_per_class=labels, label_seed=seed)
        model = ImageClassifier(
            encoder_options=encoder_options(options),
            num_classes=data.num_classes,
            image_size=data.image_size,
            in_channels=data.in_channels,
            init_from=str(weights_file(options, name, seed)) if ROWS[name] else None,
            lr=2e-3,
            layer_decay=0.75 if ROWS[name] else 1.0,
        )
        trainer = quiet_trainer(epochs, [StepSeed(seed)])
        trainer.fit(model, datamodule=data)
        (metrics,) = trainer.test(model, datamodule=data, verbose=False)
        found[f"fine-tune {labels or 'all'}"] = metrics["test/acc"]
    return {"row": name, "seed": seed, **found, "seconds": round(time.perf_counter() - start, 1)}


def summarise(results: list[dict[str, Any]]) -> str:
    """Markdown table: mean and standard deviation over seeds."""
    columns = [key for key in results[0] if key not in ("row", "seed", "seconds", "z_std")] if results else []
    lines = ["| row | seeds | " + " | ".join(columns) + " | s |", "| --- " * (len(columns) + 3) + "|"]
    for name in dict.fromkeys(result["row"] for result in results):
        mine = [result for result in results if result["row"] == name]
        cells = []
        for column in columns:
            values = [float(result[column]) for result in mine]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            cells.append(f"{statistics.mean(values):.4f} ± {spread:.4f}")
        seconds = statistics.mean(float(result["seconds"]) for result in mine)
        lines.append(f"| {name} | {len(mine)} | {' | '.join(cells)} | {seconds:.0f} |")
    return "\n".join(lines)


def main() -> None:
    """Fill the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layout", default="medmnist")
    parser.add_argument("--root", required=True)
    parser.add_argument("--name", default="pbc28")
    parser.add_argument("--image-size", type=int, default=28)
    parser.add_argument("--patch", type=int, default=7)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--depth", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rows", nargs="+", default=list(ROWS))
    parser.add_argument("--finetune", action="store_true")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    table = options.out / ("finetune.csv" if options.finetune else "results.csv")
    for seed in options.seeds:
        for name in options.rows:
            if any(done["row"] == name and int(done["seed"]) == seed for done in read(table)):
                continue
            if options.finetune and not weights_file(options, name, seed).exists():
                continue
            result = finetune(options, name, seed) if options.finetune else run(options, name, seed)
            append(table, result)
    print(summarise(read(table)))


if __name__ == "__main__":
    main()
