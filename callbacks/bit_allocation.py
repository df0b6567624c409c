"""Mixed precision for any network in training: how many bits each layer gets, and the quantizers that apply them."""

import copy
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_only
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import DataLoader

from callbacks.media import Media
from modules.quantization.allocation import Allocation, Rounding, allocate
from modules.quantization.attachment import (
    attach_quantizers,
    float_weight,
    input_quantizers,
    set_bits,
    weight_quantizers,
)
from modules.quantization.costs import FLOAT_BITS, LayerCost, Rule, count_costs, size_mib
from modules.quantization.features import images_of
from modules.quantization.quantizers import InputScheme, WeightScale, check_bits
from modules.quantization.scale_search import search_channel_grid
from modules.quantization.scores import Equal, Random, Score, TfIdf, ValueTable, candidates_of, shared_candidates
from modules.quantization.tracing import NetworkTrace, layer_names, some, trace_network

FILE = "bits.yaml"


class Measured(NamedTuple):
    """What an allocation starts from: structure and cost of a network, and calibration batches.

    Args:
        network: the network.
        trace: its layers.
        costs: by layer.
        batches: those of this process, on its device.
    """

    network: nn.Module
    trace: NetworkTrace
    costs: dict[str, LayerCost]
    batches: list[Any]


class BitAllocation(Callback):
    """Turns a network into one of mixed precision while it trains.

    In ``setup`` every convolution and linear layer gets quantizers that let all pass. At the start of an epoch, the
    first one by default, calibration pictures go through the network, the layers are scored, an integer programme
    chooses their bits within a budget, and from then on the network is trained as it will be used. A checkpoint holds
    bits and ranges, so that a resumed run does not choose again. The choice is written to ``bits.yaml`` in the run's
    folder and can be edited and given back. The best checkpoint of a run is the best of those with bits.

    Calibration pictures come from the datamodule's ``calibration_dataloader(count)``, otherwise from its training
    batches, which may be a tensor, have ``images``, or hold one of these first or as ``labeled``.

    Args:
        network: attribute path of the network in the module; of several, the first is measured and all get its bits
            (a student and the teacher that is its average).
        score: what a layer's bits are worth, one of :mod:`modules.quantization.scores`; null for the paper's, TfIdf.
        bits: numbers of bits that a layer's weight may get.
        layer_bits: pattern of layer names -> numbers of bits for these.
        first_last_bits: of the first and the last layer; null to choose them like the others.
        activation_bits: of the inputs of layers, and at least ``first_last_bits`` for those of the first and the last;
            null to leave inputs as they are.
        size_budget: in MiB, for weights, biases and norms.
        mean_bits: the size budget as a mean over all parameters.
        bops_budget: in 10^9 bit operations per picture.
        counting: which operations are counted: see :func:`modules.quantization.costs.count_costs`.
        allocation: file with an allocation to apply instead of choosing one.
        rounding: ``milp``, the exact programme; ``official_dfs`` or ``round`` of its relaxation.
        pictures: how many calibration pictures.
        begin_epoch: the epoch at whose start bits are chosen.
        exclude: names or patterns of layers to leave alone.
        weight_scale: ``max`` (HAWQ-v3), ``learned`` (LSQ), or ``fixed`` by a search at the time of allocation.
        input_scheme: ``affine`` or ``symmetric``.
        range_momentum: share of the old range of inputs at each step.
        freeze_norms: running statistics of BatchNorms stay from then on, as if the norms were folded.
        seed: of random scores.

    Raises:
        ValueError: for an argument out of its range; in ``setup`` for layers that do not exist; before the first step,
            for a budget out of reach, layers that pictures do not reach, and a file of another network.

    Source: Wang et al., "CSMPQ: Class Separability Based Mixed-Precision Quantization" (2022).

    Example::

        Trainer(callbacks=[BitAllocation(network="model", mean_bits=5)]).fit(module, datamodule)
    """

    adds_parameters = True

    def __init__(
        self,
        network: str | list[str] = "network",
        score: Score | None = None,
        bits: list[int] = (4, 5, 6, 7, 8),
        layer_bits: dict[str, list[int]] | None = None,
        first_last_bits: int | None = 8,
        activation_bits: int | None = 8,
        size_budget: float | None = None,
        mean_bits: float | None = None,
        bops_budget: float | None = None,
        counting: Rule = "macs",
        allocation: str | None = None,
        rounding: Rounding = "milp",
        pictures: int = 128,
        begin_epoch: int = 0,
        exclude: list[str] = (),
        weight_scale: WeightScale = "max",
        input_scheme: InputScheme = "affine",
        range_momentum: float = 0.99,
        freeze_norms: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.networks = [network] if isinstance(network, str) else list(network)
        self.score = score or TfIdf()
        self.bits, self.layer_bits = list(bits), {name: list(own) for name, own in (layer_bits or {}).items()}
        self.first_last_bits, self.activation_bits = first_last_bits, activation_bits
        self.size_budget, self.mean_bits, self.bops_budget = size_budget, mean_bits, bops_budget
        self.counting, self.rounding, self.file = counting, rounding, allocation
        self.pictures, self.begin_epoch, self.exclude = pictures, begin_epoch, list(exclude)
        self.weight_scale, self.input_scheme, self.range_momentum = weight_scale, input_scheme, range_momentum
        self.freeze_norms, self.seed = freeze_norms, seed
        self.chosen: dict[str, Any] | None = None
        self._check_arguments()

    def _check_arguments(self) -> None:
        budgets = {name: getattr(self, name) for name in ("size_budget", "mean_bits", "bops_budget")}
        given = [name for name, value in budgets.items() if value is not None]
        if not given and self.file is None:
            raise ValueError(f"give a budget ({', '.join(budgets)}) or a file with an allocation")
        if self.size_budget is not None and self.mean_bits is not None:
            raise ValueError("size_budget and mean_bits are two ways to give one budget: leave one out")
        for name in given:
            if not budgets[name] > 0:
                raise ValueError(f"{name}: {budgets[name]} is not positive")
        for field in ("first_last_bits", "activation_bits"):
            if getattr(self, field) is not None:
                check_bits(getattr(self, field), field)
        for field, least in (("pictures", 2), ("begin_epoch", 0)):
            if getattr(self, field) < least:
                raise ValueError(f"{field}: {getattr(self, field)} is below {least}")
        if not self.networks:
            raise ValueError("network: no name is given")
        candidates_of(self.bits, ["bits"])
        candidates_of(self.layer_bits, self.layer_bits)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Attach quantizers, before weights are restored and optimizers are built."""
        for path in self.networks:
            network = network_of(pl_module, path)
            names = layer_names(network, self.exclude)
            self._bits_by_pattern(names)
            scheme = None if self.activation_bits is None else self.input_scheme
            attach_quantizers(network, names, self.weight_scale, scheme, self.range_momentum)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep norms frozen in a run that goes on in the middle of an epoch; find now what would go wrong later."""
        self._freeze(pl_module)
        if self.chosen is None and trainer.current_epoch < self.begin_epoch:
            self._rehearse(trainer, pl_module)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Choose bits, once, when it is time."""
        if self.chosen is None and trainer.current_epoch >= self.begin_epoch:
            self.run(trainer, pl_module)
        self._freeze(pl_module)

    def run(self, trainer: Trainer, pl_module: LightningModule) -> Allocation:
        """Choose bits or read them from the file, apply them, and report them; on all processes.

        Args:
            trainer: with a datamodule or training batches to take pictures from.
            pl_module: the module, on its device.

        Returns:
            The allocation.
        """
        measured = self.measure(trainer, pl_module)
        if self.file is not None:
            allocation, values = Allocation.load(self.file, measured.trace), {}
        else:
            values = self.score_values(measured, self.score)
            allocation = agreed(self.choose(measured, values))
        self.apply(pl_module, allocation)
        self.chosen = {"weight_bits": dict(allocation.weight_bits), "activation_bits": dict(allocation.activation_bits)}
        _forget_best(trainer)
        self._report(trainer, pl_module, measured, allocation, values)
        return allocation

    def measure(self, trainer: Trainer, pl_module: LightningModule, pictures: int | None = None) -> Measured:
        """Trace and cost of the first network, and calibration pictures on its device.

        Args:
            trainer: see :meth:`run`.
            pl_module: see :meth:`run`.
            pictures: how many, instead of those of this callback.

        Raises:
            ValueError: without pictures, or for layers that they do not reach.
        """
        network = network_of(pl_module, self.networks[0])
        batches = list(calibration_batches(trainer, pl_module, pictures or self.pictures))
        if not batches:
            raise ValueError("there are no calibration pictures: the loader gives no batch to this process")
        trace = trace_network(network, images_of(batches[0])[:2], self.exclude)
        return Measured(network, trace, count_costs(trace, self.counting), batches)

    def score_values(self, measured: Measured, score: Score) -> ValueTable:
        """What each number of bits is worth to each layer."""
        candidates = self.candidates(measured.trace)
        return score.values(measured.network, measured.trace, measured.batches, candidates)

    def candidates(self, trace: NetworkTrace) -> dict[str, list[int]]:
        """Numbers of bits that each layer may get."""
        found = self._bits_by_pattern(trace.names)
        if self.first_last_bits is not None:
            found |= {name: [self.first_last_bits] for name in first_and_last(trace)}
        return found

    def choose(self, measured: Measured, values: ValueTable, mean_bits: float | None = None) -> Allocation:
        """The best allocation within the budget.

        Args:
            measured: see :meth:`measure`.
            values: see :meth:`score_values`.
            mean_bits: the size budget, instead of the one of this callback.

        Raises:
            ValueError: for a budget out of reach, with the range that is within.
        """
        size, mean_bits = self.size_budget, mean_bits or self.mean_bits
        if mean_bits is not None:
            self._check_mean(measured, mean_bits)
            size = mean_bits * size_mib(measured.costs, 1)
        return allocate(
            values,
            measured.trace,
            measured.costs,
            self.candidates(measured.trace),
            size_budget=size,
            bops_budget=self.bops_budget,
            activation_bits=self.input_bits(measured.trace),
            rounding=self.rounding,
            provenance={"score": type(self.score).__name__, "pictures": self.pictures},
        )

    def uniform(self, measured: Measured, bits: int) -> Allocation:
        """The same number of bits for all layers, the first and the last too: a control.

        Args:
            measured: see :meth:`measure`.
            bits: 2 to 8.
        """
        names = measured.trace.names
        inputs = dict.fromkeys(names, self.activation_bits or FLOAT_BITS)
        return Allocation(dict.fromkeys(names, check_bits(bits)), inputs, dict(measured.costs))

    def input_bits(self, trace: NetworkTrace) -> dict[str, int]:
        """Bits of each layer's input; those of the first and the last layer are not below their weights'."""
        found = dict.fromkeys(trace.names, self.activation_bits or FLOAT_BITS)
        if self.activation_bits is not None and self.first_last_bits is not None:
            found |= dict.fromkeys(first_and_last(trace), max(self.activation_bits, self.first_last_bits))
        return found

    def apply(self, pl_module: LightningModule, allocation: Allocation) -> None:
        """Let the quantizers of all networks use an allocation.

        Args:
            pl_module: the module.
            allocation: of the network that was measured.

        Raises:
            ValueError: for bits of inputs that have no quantizers.
        """
        for path in self.networks:
            network = network_of(pl_module, path)
            inputs = {name: bits for name, bits in allocation.activation_bits.items() if bits != FLOAT_BITS}
            quantizers = input_quantizers(network)
            if inputs and not quantizers:
                raise ValueError(
                    f"the allocation has bits for the inputs of {len(inputs)} layers, but activation_bits is null"
                )
            set_bits(network, allocation.weight_bits, dict.fromkeys(quantizers, 0) | inputs)
            if self.weight_scale != "max":
                for name, quantizer in weight_quantizers(network).items():
                    weight = float_weight(network.get_submodule(name))
                    quantizer.set_scale(search_channel_grid(weight, quantizer.width, symmetric=True).scale)

    def state_dict(self) -> dict[str, Any]:
        """The bits, which the quantizers' own state has too."""
        return {"chosen": self.chosen}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Do not choose again."""
        self.chosen = state_dict["chosen"]

    def _bits_by_pattern(self, names: Sequence[str]) -> dict[str, list[int]]:
        found = {name: list(self.bits) for name in names}
        for pattern, own in self.layer_bits.items():
            matching = [name for name in names if fnmatchcase(name, pattern)]
            if not matching:
                raise ValueError(f"layer_bits: {pattern!r} matches none of the {len(names)} layers ({some(names)})")
            found |= {name: list(own) for name in matching}
        return found

    def _rehearse(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Raise before the first step what would be raised in ``begin_epoch``, and leave everything as it is."""
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            measured = self.measure(trainer, pl_module, pictures=2)
            if self.file is not None:
                Allocation.load(self.file, measured.trace)
            else:
                self.choose(measured, self.score_values(measured, Equal()))

    def _check_mean(self, measured: Measured, mean_bits: float) -> None:
        bits = shared_candidates(self.candidates(measured.trace), measured.trace)
        least, most = (
            size_mib(measured.costs, {name: pick(own) for name, own in bits.items()}) / size_mib(measured.costs, 1)
            for pick in (min, max)
        )
        if mean_bits < least - 1e-9:
            raise ValueError(
                f"mean_bits: {mean_bits:g} is out of reach: from the fewest to the most bits of all layers it is "
                f"{least:.3f} to {most:.3f}; raise it or allow fewer bits (bits, layer_bits, first_last_bits)"
            )

    def _freeze(self, pl_module: LightningModule) -> None:
        if self.chosen is None or not self.freeze_norms:
            return
        for path in self.networks:
            for module in network_of(pl_module, path).modules():
                if isinstance(module, _BatchNorm):
                    module.eval()

    @rank_zero_only
    def _report(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        measured: Measured,
        allocation: Allocation,
        values: ValueTable,
    ) -> None:
        path, written = Path(trainer.default_root_dir) / FILE, ""
        if not trainer.fast_dev_run:
            allocation.save(path)
            written = f"; written to {path}"
        rank_zero_info(f"bits of {len(allocation.weight_bits)} layers: {allocation.summary()}{written}")
        media = Media(trainer)
        controls = {} if self.file is not None else self._controls(measured)
        table = layer_table(measured, allocation, values, controls)
        media.table("quantization/layers", *table)
        media.bar("quantization/bits", measured.trace.names, list(map(float, allocation.weight_bits.values())), "Bits")
        if values:
            media.bar(
                "quantization/score",
                *sensitivities(values),
                title=f"Worth of one more bit ({type(self.score).__name__})",
            )
        for logger in trainer.loggers:
            logger.log_metrics(figures(allocation), step=trainer.global_step)

    def _controls(self, measured: Measured) -> dict[str, Allocation]:
        controls = {"equal": Equal(), "random": Random(self.seed)}
        return {name: self.choose(measured, self.score_values(measured, score)) for name, score in controls.items()}


def network_of(pl_module: LightningModule, path: str) -> nn.Module:
    """The module at an attribute path.

    Raises:
        ValueError: if there is none, with the names at the last place that exists.
    """
    found: nn.Module = pl_module
    for part in path.split(".") if path else []:
        inner = getattr(found, part, None)
        if not isinstance(inner, nn.Module):
            names = ", ".join(name for name, _ in found.named_children())
            raise ValueError(f"network: {type(pl_module).__name__} has no module {path!r}; {part!r} is none of {names}")
        found = inner
    return found


def calibration_batches(trainer: Trainer, pl_module: LightningModule, count: int) -> Iterator[Any]:
    """Batches on the module's device, this process' share of so many images in all, or somewhat more.

    Args:
        trainer: whose datamodule has ``calibration_dataloader(count)``, or which has training batches.
        pl_module: the module that the batches are for.
        count: images in all.
    """
    own = getattr(getattr(trainer, "datamodule", None), "calibration_dataloader", None)
    left = count if own is not None else -(-count // trainer.world_size)
    for batch in own(count) if own is not None else _training_loader(trainer):
        yield trainer.strategy.batch_to_device(batch, pl_module.device)
        left -= len(images_of(batch))
        if left <= 0:
            return


def _training_loader(trainer: Trainer) -> Iterable[Any]:
    """The loader of training pictures; of several the labelled one, or the first. Training's own iterator goes on."""
    loader = trainer.train_dataloader
    if loader is None:  # outside of fit
        loader = trainer.datamodule.train_dataloader()
    if isinstance(loader, CombinedLoader):
        loader = loader.iterables
    if isinstance(loader, Mapping):
        loader = loader.get("labeled", next(iter(loader.values())))
    elif isinstance(loader, (list, tuple)):
        loader = loader[0]
    if isinstance(loader, DataLoader) and loader.persistent_workers:
        loader = copy.copy(loader)  # which would otherwise have one iterator for all, and start it anew
        loader._iterator = None
    return loader


def first_and_last(trace: NetworkTrace) -> tuple[str, str]:
    """The layers that see the picture and give the answer."""
    main = [layer.name for layer in trace.layers if layer.partner is None]
    return main[0], main[-1]


def agreed(allocation: Allocation) -> Allocation:
    """The allocation of rank zero, on all processes."""
    if not torch.distributed.is_initialized():
        return allocation
    box = [allocation]
    torch.distributed.broadcast_object_list(box)
    return box[0]


def _forget_best(trainer: Trainer) -> None:
    """Let any checkpoint to come be better than those of the network before, whose metric is that in float."""
    for saver in trainer.checkpoint_callbacks:
        if isinstance(saver, ModelCheckpoint) and saver.best_k_models:
            worst = torch.tensor(float("inf" if saver.mode == "min" else "-inf"))
            saver.best_k_models = dict.fromkeys(saver.best_k_models, worst)
            saver.kth_value = saver.best_model_score = worst


def figures(allocation: Allocation) -> dict[str, float]:
    """What loggers show of an allocation: MiB, 10^9 bit operations per picture, and mean bits of parameters."""
    return {
        "quantization/size_mib": allocation.size,
        "quantization/gbops": allocation.bops,
        "quantization/mean_bits": allocation.size / size_mib(allocation.costs, 1),
    }


def sensitivities(values: ValueTable) -> tuple[list[str], list[float]]:
    """Layers, and what one more bit is worth to each on average."""
    names = [name for name, own in values.items() if len(own) > 1]
    slopes = [(own[max(own)] - own[min(own)]) / (max(own) - min(own)) for own in map(values.get, names)]
    return names, slopes


def layer_table(
    measured: Measured,
    allocation: Allocation,
    values: ValueTable,
    controls: dict[str, Allocation],
) -> tuple[list[str], list[Sequence[Any]]]:
    """Columns and rows of a table of layers: bits of the method and of controls, worth, and cost."""
    slopes = dict(zip(*sensitivities(values), strict=True))
    columns = ["layer", "bits", *(f"bits ({name})" for name in controls), "input bits", "worth of a bit"]
    rows = [
        [
            name,
            allocation.weight_bits[name],
            *(control.weight_bits[name] for control in controls.values()),
            allocation.activation_bits[name],
            slopes.get(name),
            cost.parameters,
            cost.operations,
        ]
        for name, cost in measured.costs.items()
    ]
    return [*columns, "parameters", "operations"], rows
