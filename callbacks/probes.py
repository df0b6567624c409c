"""How good frozen features are: nearest neighbours and logistic regression on labelled samples."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn

from callbacks.classification_report import class_names_of, class_scores, confusion_matrix, is_due, show_confusion
from callbacks.media import Media
from callbacks.step_outputs import StepOutputs, batch_images, batch_rows

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MainMetric = Literal["acc", "balanced_acc", "kappa"]
SMALL_BANK = 5000  # images below which 10 neighbours vote instead of 20
ROWS_AT_ONCE = 1024
POINTS_OF_MAP = 2000


def knn_probabilities(
    bank: Tensor, labels: Tensor, queries: Tensor, num_classes: int, k: int, temperature: float = 0.07
) -> Tensor:
    """Votes of the k nearest neighbours by cosine similarity, each with weight exp(similarity / temperature).

    Args:
        bank: (N, D) features of labelled samples.
        labels: (N,) their classes.
        queries: (Q, D) features to classify.
        num_classes: number of classes C.
        k: number of neighbours; at most N are used.
        temperature: the smaller, the more the nearest ones decide.

    Returns:
        (Q, C) float32, rows sum to one.

    Source: Wu et al., "Unsupervised feature learning via non-parametric instance discrimination" (2018), section 3.4.
    """
    bank = nn.functional.normalize(bank.float(), dim=1)
    queries = nn.functional.normalize(queries.float(), dim=1)
    votes = []
    for rows in queries.split(ROWS_AT_ONCE):
        similarity, neighbours = (rows @ bank.T).topk(min(k, len(bank)), dim=1)
        # relative to the nearest one, so that no temperature overflows
        weights = ((similarity - similarity[:, :1]) / temperature).exp()
        per_class = weights.new_zeros(len(rows), num_classes)
        votes.append(per_class.scatter_add_(1, labels[neighbours], weights))
    probabilities = torch.cat(votes)
    return probabilities / probabilities.sum(1, keepdim=True)


class LinearProbe(nn.Module):
    """A fitted logistic regression on standardised features, kept as buffers so that it travels in checkpoints.

    Args:
        dim: width D of the features.
        num_classes: number of classes C.
    """

    def __init__(self, dim: int, num_classes: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("std", torch.ones(dim))
        self.register_buffer("weight", torch.zeros(num_classes, dim))
        self.register_buffer("bias", torch.zeros(num_classes))
        self.register_buffer("fitted", torch.tensor(False))

    def forward(self, features: Tensor) -> Tensor:
        """Logits (B, C) of features (B, D)."""
        return nn.functional.linear((features.float() - self.mean) / self.std, self.weight, self.bias)

    def predict_proba(self, features: Tensor) -> Tensor:
        """Class probabilities (B, C) of features (B, D)."""
        return self(features).softmax(dim=1)

    @torch.no_grad()
    def load(self, values: dict[str, Tensor]) -> None:
        """Take over ``mean``, ``std``, ``weight`` and ``bias`` of :func:`fit_linear_probe`."""
        for name, value in values.items():
            self.get_buffer(name).copy_(value)
        self.fitted.fill_(True)


def fit_linear_probe(features: Tensor, labels: Tensor, num_classes: int, C: float = 0.1) -> dict[str, Tensor]:
    """Fit scikit-learn's logistic regression on standardised features.

    Args:
        features: (N, D).
        labels: (N,) in 0..num_classes-1; classes without a sample are never predicted.
        num_classes: number of classes.
        C: inverse strength of the L2 penalty.

    Returns:
        ``mean`` (D,), ``std`` (D,), ``weight`` (num_classes, D) and ``bias`` (num_classes,), float32.

    Raises:
        ValueError: if all samples are of one class.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    present = labels.unique()
    if len(present) < 2:
        raise ValueError(
            f"linear probe: the {len(labels)} labelled samples are all of class {present.tolist()}, expected at least "
            f"two classes; raise the label fraction, or use linear=False"
        )
    scaler = StandardScaler()
    x = scaler.fit_transform(features.double().numpy())
    model = LogisticRegression(C=C, max_iter=1000).fit(x, labels.numpy())
    # two classes have one row: the evidence for the second
    rows = np.vstack([np.zeros_like(model.coef_), model.coef_]) if len(present) == 2 else model.coef_
    biases = np.concatenate([[0.0], model.intercept_]) if len(present) == 2 else model.intercept_
    weight, bias = torch.zeros(num_classes, x.shape[1]), torch.full((num_classes,), float("-inf"))
    weight[present] = torch.from_numpy(rows).float()
    bias[present] = torch.from_numpy(biases).float()
    mean, std = torch.from_numpy(scaler.mean_).float(), torch.from_numpy(scaler.scale_).float()
    return {"mean": mean, "std": std, "weight": weight, "bias": bias}


def confusion_scores(confusion: np.ndarray) -> dict[str, float]:
    """Scores of a classifier from its counts (C, C), row = true class.

    Returns:
        ``acc``; ``balanced_acc`` (mean recall of the classes that occur); ``kappa`` (Cohen's, quadratic weights; 0 if
        chance agreement is perfect); ``macro_f1`` (mean over classes that occur or are predicted).
    """
    total = confusion.sum()
    classes = np.arange(len(confusion))
    distance = (classes[:, None] - classes[None]) ** 2
    chance = np.outer(confusion.sum(1), confusion.sum(0)) / total
    disagreement = (distance * chance).sum()
    per_class = class_scores(confusion)
    return {
        "acc": float(np.trace(confusion) / total),
        "balanced_acc": float(np.nanmean(per_class["recall"])),
        "kappa": float(1 - (distance * confusion).sum() / disagreement) if disagreement else 0.0,
        "macro_f1": float(np.nanmean(per_class["f1"])),
    }


class FeatureProbes(Callback):
    """Judges features after each validation by a kNN vote and a logistic regression, on frozen features.

    The labelled samples come from ``probe_dataloader()`` of the datamodule (or of the module): training samples with
    evaluation transforms, in fixed order, each once over all ranks. Validation and test features are what the steps
    return under ``features`` (B, D) with ``labels`` and ``index`` there or in the batch; if they return none,
    ``pl_module.extract_features(images)`` is called. Samples without label (-1) are left out, samples that a
    distributed sampler repeats count once. Training is not disturbed: random states are as before.

    It logs ``val/knn_acc``, ``val/linear_acc``, ``val/linear_balanced_acc``, ``val/linear_kappa``,
    ``val/linear_macro_f1`` and ``val/main``, the main metric of the data by the linear probe (or by kNN without it);
    the same under ``test/``. The fitted probe is kept in ``pl_module.auxiliary["linear_probe"]`` if the module has
    an ``nn.ModuleDict`` of that name and a ``feature_dim``, so that a checkpoint can predict classes.

    Args:
        knn: whether to run the kNN vote.
        linear: whether to run the logistic regression.
        k: number of neighbours; None for 20, or 10 with fewer than 5000 labelled samples.
        temperature: of the kNN weights exp(cos / temperature).
        C: inverse strength of the regression's L2 penalty.
        every_n_epochs: probe in every n-th epoch and in the last one. A checkpoint monitor of ``val/main`` sees the
            latest value in the others.
        main: ``acc``, ``balanced_acc`` or ``kappa``; None for ``main_metric`` of the datamodule, else ``acc``.
        pictures_every_n_epochs: show confusion matrix, recall chart and a map of the features by their two principal
            axes in every n-th epoch (a multiple of ``every_n_epochs``) and in the last one; 0 for never.

    Raises:
        ValueError: for an argument out of its range, and in ``setup`` if labelled samples cannot be had.

    Example::

        class Data(LightningDataModule):
            num_classes = 10

            def probe_dataloader(self):
                return DataLoader(self.train_set_without_augmentation, batch_size=256)
            ...

        Trainer(callbacks=[FeatureProbes()]).fit(encoder, datamodule=Data())
    """

    adds_parameters = True
    name = "linear_probe"

    def __init__(
        self,
        knn: bool = True,
        linear: bool = True,
        k: int | None = None,
        temperature: float = 0.07,
        C: float = 0.1,
        every_n_epochs: int = 1,
        main: MainMetric | None = None,
        pictures_every_n_epochs: int = 5,
    ) -> None:
        if not knn and not linear:
            raise ValueError("FeatureProbes: knn and linear are both False, so there is nothing to do")
        positive = (("k", 1 if k is None else k), ("temperature", temperature), ("C", C))
        for field, value in (*positive, ("every_n_epochs", every_n_epochs)):
            if not value > 0:
                raise ValueError(f"FeatureProbes: {field} is {value}, expected a number > 0")
        if pictures_every_n_epochs < 0:
            raise ValueError(f"FeatureProbes: pictures_every_n_epochs is {pictures_every_n_epochs}, expected >= 0")
        if main is not None and main not in get_args(MainMetric):
            raise ValueError(f"FeatureProbes: main is {main!r}, expected one of {', '.join(get_args(MainMetric))}")
        self.knn = knn
        self.linear = linear
        self.k = k
        self.temperature = temperature
        self.C = C
        self.every_n_epochs = every_n_epochs
        self.main = main
        self.pictures_every_n_epochs = pictures_every_n_epochs
        self._queries = StepOutputs()
        self._bank_loader: Iterable[Any] | None = None
        self._enabled = self._due = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Register the probe in every stage; check that there are labelled samples to learn from."""
        self._bank_loader = None
        classes = self._fact(trainer, pl_module, "num_classes")
        if classes is None:
            classes = len(self._fact(trainer, pl_module, "class_names") or ()) or None
        self._enabled = classes != 0 and stage != "predict"
        if classes == 0:
            rank_zero_info("FeatureProbes: the data has no classes, so features are not probed.")
            return
        if self._enabled and not callable(self._fact(trainer, pl_module, "probe_dataloader")):
            raise ValueError(
                "FeatureProbes: neither the datamodule nor the module has probe_dataloader(), which gives labelled "
                "training samples in fixed order and without augmentation; write one, or leave the callback out"
            )
        auxiliary, dim = getattr(pl_module, "auxiliary", None), getattr(pl_module, "feature_dim", None)
        if self.linear and classes and dim and isinstance(auxiliary, nn.ModuleDict) and self.name not in auxiliary:
            auxiliary[self.name] = LinearProbe(dim, classes).to(pl_module.device)

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to collect features."""
        self._queries.clear()
        self._due = self._enabled and is_due(trainer, self.every_n_epochs)

    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to collect features."""
        self.on_validation_epoch_start(trainer, pl_module)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Take features, labels and index of the batch."""
        if self._due and dataloader_idx == 0:
            self._queries.add(self._rows(trainer, pl_module, batch, outputs if isinstance(outputs, dict) else {}))

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Take features, labels and index of the batch."""
        self.on_validation_batch_end(trainer, pl_module, outputs, batch, batch_idx, dataloader_idx)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Probe the validation features."""
        self._probe(trainer, pl_module, "val")

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Probe the test features."""
        self._probe(trainer, pl_module, "test")

    def _probe(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if not self._due:
            return
        with isolate_rng():
            bank = self._bank(trainer, pl_module)
            queries = self._queries.gather()
            self._queries.clear()
            # one rank computes, so that all get the same numbers; an error must not leave the others waiting
            result: dict[str, Any] = {}
            if bank is not None and queries is not None:
                try:
                    result = self._evaluate(trainer, pl_module, stage, _labelled(bank), _labelled(queries))
                except (ValueError, OSError, RuntimeError) as error:
                    result = {"error": f"FeatureProbes: {error}"}
            result = trainer.strategy.broadcast(result)
        if "error" in result:
            raise ValueError(result["error"])
        probe = self._stored(pl_module)
        if probe is not None and "probe" in result:
            probe.load(result["probe"])
        pl_module.log_dict(result.get("scores", {}), sync_dist=True, prog_bar=False)

    def _evaluate(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        stage: str,
        bank: dict[str, Tensor],
        queries: dict[str, Tensor],
    ) -> dict[str, Any]:
        """Scores to log and the fitted probe, from labelled features; draws the pictures."""
        if not bank:
            raise ValueError("probe_dataloader() gives no labelled sample; lower the share of unlabelled ones")
        classes = self._classes(trainer, pl_module, bank, queries)
        result: dict[str, Any] = {"scores": {}}
        if self.linear:
            result["probe"] = fit_linear_probe(bank["features"], bank["labels"], classes, self.C)
        if not queries:
            rank_zero_warn(f"FeatureProbes: no sample of the {stage} split has a label, so features are not judged")
            return result
        confusions = {}
        labels = queries["labels"].numpy()
        for kind, probabilities in self._predictions(pl_module, bank, queries["features"], classes, result).items():
            confusions[kind] = confusion_matrix(labels, probabilities.argmax(1).cpu().numpy(), classes)
        result["scores"] = self._scores(trainer, pl_module, stage, confusions)
        media = Media(trainer)
        if media.active and self.pictures_every_n_epochs and is_due(trainer, self.pictures_every_n_epochs):
            names = class_names_of(trainer, pl_module, classes)
            show_confusion(media, f"{stage}/probe", next(iter(confusions.values())), names)
            media.figure(f"{stage}/features", feature_map(queries["features"], labels, names))
        return result

    def _predictions(
        self, pl_module: LightningModule, bank: dict[str, Tensor], queries: Tensor, classes: int, result: dict[str, Any]
    ) -> dict[str, Tensor]:
        """Class probabilities of the queries by each probe, the linear one first."""
        predictions = {}
        if self.linear:
            probe = LinearProbe(queries.shape[1], classes)
            probe.load(result["probe"])
            predictions["linear"] = probe.predict_proba(queries)
        if self.knn:
            k = self.k or (20 if len(bank["labels"]) >= SMALL_BANK else 10)
            tensors = (tensor.to(pl_module.device) for tensor in (bank["features"], bank["labels"], queries))
            predictions["knn"] = knn_probabilities(*tensors, classes, k, self.temperature)
        return predictions

    def _scores(
        self, trainer: Trainer, pl_module: LightningModule, stage: str, confusions: dict[str, np.ndarray]
    ) -> dict[str, float]:
        scores = {kind: confusion_scores(confusion) for kind, confusion in confusions.items()}
        logged = {f"{stage}/linear_{name}": value for name, value in scores.get("linear", {}).items()}
        if "knn" in scores:
            logged[f"{stage}/knn_acc"] = scores["knn"]["acc"]
        main = self.main or self._fact(trainer, pl_module, "main_metric") or "acc"
        logged[f"{stage}/main"] = next(iter(scores.values()))[main]
        return logged

    def _bank(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Tensor] | None:
        if self._bank_loader is None:
            self._bank_loader = self._fact(trainer, pl_module, "probe_dataloader")()
        rows = StepOutputs()
        for loaded in self._bank_loader:
            batch = trainer.strategy.batch_to_device(trainer.precision_plugin.convert_input(loaded), dataloader_idx=0)
            rows.add(self._rows(trainer, pl_module, batch, {}))
        return rows.gather()

    def _rows(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, outputs: dict[str, Any]
    ) -> dict[str, Tensor]:
        rows = batch_rows(batch) | {key: outputs[key] for key in ("features", "labels", "index") if key in outputs}
        if "features" not in rows:
            with trainer.precision_plugin.val_step_context():
                rows["features"] = pl_module.extract_features(batch_images(batch))
        if "labels" not in rows:
            raise ValueError(
                f"FeatureProbes: neither the step's output nor the batch ({type(batch).__name__}) has labels; "
                f"return {{'features', 'labels', 'index'}} from the step, or use batches (images, labels)"
            )
        return rows | {"features": rows["features"].float()}

    def _classes(
        self, trainer: Trainer, pl_module: LightningModule, bank: dict[str, Tensor], queries: dict[str, Tensor]
    ) -> int:
        probe = self._stored(pl_module)
        highest = int(max(rows["labels"].max() for rows in (bank, queries) if rows)) + 1
        known = len(probe.bias) if probe is not None else self._fact(trainer, pl_module, "num_classes") or highest
        if highest > known:
            raise ValueError(f"a label is {highest - 1}, expected 0..{known - 1}; check num_classes of the datamodule")
        return known

    def _stored(self, pl_module: LightningModule) -> LinearProbe | None:
        auxiliary = getattr(pl_module, "auxiliary", None)
        return auxiliary[self.name] if isinstance(auxiliary, nn.ModuleDict) and self.name in auxiliary else None

    def _fact(self, trainer: Trainer, pl_module: LightningModule, name: str) -> Any:
        for owner in (getattr(trainer, "datamodule", None), pl_module):
            value = getattr(owner, name, None)
            if value is not None:
                return value
        return None


def feature_map(features: Tensor, labels: np.ndarray, class_names: list[str]) -> "Figure":
    """Draw features (N, D) by their two principal axes, coloured by class (N,); at most 2000, evenly picked."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    step = -(-len(features) // POINTS_OF_MAP)
    points, labels = features[::step].double(), labels[::step]
    centred = points - points.mean(0)
    _, _, axes = torch.linalg.svd(centred, full_matrices=False)
    places = (centred @ axes[:2].T).numpy()
    places = np.pad(places, ((0, 0), (0, 2 - places.shape[1])))
    figure = Figure(figsize=(6, 5), layout="constrained")
    axis = figure.subplots()
    colours = colormaps["tab10" if len(class_names) <= 10 else "turbo"]
    for number, name in enumerate(class_names):
        chosen = labels == number
        if chosen.any():
            colour = colours(number) if len(class_names) <= 10 else colours(number / (len(class_names) - 1))
            axis.scatter(*places[chosen].T, s=8, color=colour, label=name)
    axis.set_xlabel("first principal axis")
    axis.set_ylabel("second principal axis")
    if len(class_names) <= 20:
        axis.legend(fontsize=7)
    return figure


def _labelled(rows: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rows with a label; none at all gives an empty dictionary."""
    if not rows or not bool((rows["labels"] >= 0).any()):
        return {}
    known = rows["labels"] >= 0
    return {key: value[known] for key, value in rows.items()}
