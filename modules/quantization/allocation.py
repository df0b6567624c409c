"""How many bits each layer gets: the exact programme, the published relaxation, and the file that holds the answer."""

import math
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import yaml
from numpy.typing import NDArray
from scipy.optimize import minimize

from modules.quantization.costs import BITS_PER_MIB, FLOAT_BITS, LayerCost, bits_of_all, bops, size_mib
from modules.quantization.multiple_choice import Choices, choose_bits
from modules.quantization.quantizers import check_bits
from modules.quantization.scores import Candidates, shared_candidates
from modules.quantization.tracing import NetworkTrace, some

Rounding = Literal["milp", "official_dfs", "round"]
GIGA = 10**9
MOST_SPLIT = 20
HEADER = """\
# Bits of each layer's weight and input. Both may be edited: 2 to 8, or 32 for an input that stays as it is.
# Sizes are in MiB, bit operations in 10^9 per picture; both are computed anew when this file is read.
"""


@dataclass(frozen=True)
class Allocation:
    """Bits of a network's layers.

    Args:
        weight_bits: by name of the layer.
        activation_bits: of each layer's input.
        costs: of the layers; their names and shapes tell which network this is for.
        objective: sum of the values of these bits, or None where that is unknown.
        provenance: how it was found; plain values only.
    """

    weight_bits: dict[str, int]
    activation_bits: dict[str, int]
    costs: dict[str, LayerCost]
    objective: float | None = None
    provenance: dict[str, Any] = field(default_factory=dict)

    @property
    def size(self) -> float:
        """Size in MiB."""
        return size_mib(self.costs, self.weight_bits)

    @property
    def bops(self) -> float:
        """Bit operations per picture, in G."""
        return bops(self.costs, self.weight_bits, self.activation_bits)

    def summary(self) -> str:
        """Size, operations and bits in a line."""
        mean = self.size / size_mib(self.costs, 1)
        least, most = min(self.weight_bits.values()), max(self.weight_bits.values())
        return f"{self.size:.4g} MiB, {self.bops:.4g} G bit operations, {least} to {most} bits, {mean:.3g} on average"

    def save(self, path: str | Path) -> None:
        """Write a YAML file, one line per layer, in one step: there is never half a file.

        Args:
            path: of the file; its folder is made.
        """
        path = Path(path)
        head = {
            "size_mib": self.size,
            "gbops": self.bops,
            "objective": self.objective,
            "provenance": self.provenance,
        }
        rows = (
            {
                "weight_bits": self.weight_bits[name],
                "activation_bits": self.activation_bits[name],
                "shape": list(cost.shape),
                "parameters": cost.parameters,
                "operations": cost.operations,
            }
            for name, cost in self.costs.items()
        )
        lines = [f"  {_in_line(name)}: {_in_line(row)}\n" for name, row in zip(self.costs, rows, strict=True)]
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            unfinished.write_text(HEADER + yaml.safe_dump(head, sort_keys=False) + "layers:\n" + "".join(lines))
            os.replace(unfinished, path)
        finally:
            unfinished.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | Path, trace: NetworkTrace) -> "Allocation":
        """Read a file, also one that was edited.

        Args:
            path: of the file.
            trace: of the network that it is to be used for.

        Raises:
            ValueError: for a file that is not an allocation, is for another network, or has bits outside 2..8.
        """
        try:
            content = yaml.safe_load(Path(path).read_text())
        except yaml.YAMLError as error:
            raise ValueError(f"{path}: not YAML: {error}") from error
        rows = content.get("layers") if isinstance(content, dict) else None
        if not isinstance(rows, dict) or not all(isinstance(row, dict) for row in rows.values()):
            raise ValueError(f"{path}: no allocation: 'layers' must have a row for each layer")
        _check_network(path, rows, trace)
        layers = {name: _Row.read(path, name, rows[name]) for name in trace.names}
        loaded = cls(
            {name: row.weight_bits for name, row in layers.items()},
            {name: row.activation_bits for name, row in layers.items()},
            {name: row.cost for name, row in layers.items()},
            content.get("objective"),
            content.get("provenance") or {},
        )
        if (loaded.size, loaded.bops) == (content.get("size_mib"), content.get("gbops")):
            return loaded
        edited = {**loaded.provenance, "edited": True}
        return cls(loaded.weight_bits, loaded.activation_bits, loaded.costs, None, edited)


def allocate(
    values: Mapping[str, Mapping[int, float]],
    trace: NetworkTrace,
    costs: Mapping[str, LayerCost],
    candidates: Candidates,
    *,
    size_budget: float | None = None,
    bops_budget: float | None = None,
    activation_bits: int | Mapping[str, int] = 8,
    rounding: Rounding = "milp",
    provenance: Mapping[str, Any] | None = None,
) -> Allocation:
    """Bits of the largest value within a budget.

    A shortcut has the bits of the layer that it is added to; its cost is counted with that layer's.

    Args:
        values: layer -> bits -> what they are worth; see :mod:`modules.quantization.scores`. Layers with one candidate
            need none and add nothing; a shortcut's are added to those of its layer, if there are any.
        trace: of the network; tells which layers share their bits.
        costs: of all layers, see :func:`modules.quantization.costs.count_costs`.
        candidates: numbers of bits in ascending order, for all layers or by layer; one number fixes a layer, which is
            counted all the same. Those of a shortcut are not looked at.
        size_budget: MiB.
        bops_budget: 10^9 bit operations per picture.
        activation_bits: of the inputs, one number for all or one per layer; 32 for inputs that stay as they are.
        rounding: ``milp``, the best there is and never over a budget; ``official_dfs`` or ``round``: the published
            relaxation, which knows a size budget only, and how it is made whole.
        provenance: what else to note about where values come from; plain values.

    Returns:
        The allocation.

    Raises:
        ValueError: for a budget that the fewest bits exceed, with the range that can be reached, and for values or
            candidates that are missing or wrong.

    Warns:
        UserWarning: if no budget is small enough to matter, or rounding exceeds it.

    Source: CSMPQ and OMPQ, integer programmes over bits.
    """
    if rounding not in get_args(Rounding):
        raise ValueError(f"rounding: {rounding!r} is unknown; expected {', '.join(get_args(Rounding))}")
    budgets = _Budgets(size_budget, bops_budget)
    inputs = dict(bits_of_all(costs, activation_bits))
    for name, own in inputs.items():
        if own != FLOAT_BITS:
            check_bits(own, f"activation_bits of {name}")
    groups = trace.groups
    rows = shared_candidates(candidates, trace)
    choices = [
        Choices(
            np.array(rows[group[0]]),
            _values_of(values, group, rows[group[0]]),
            sum(budgets.cost_of(costs[name], inputs[name]) for name in group),
        )
        for group in groups
    ]
    budgets.check(choices)
    if rounding == "milp":
        found = choose_bits(choices, budgets.capacities)
        bits, solver = found.bits, found.proof
    else:
        if size_budget is None or bops_budget is not None:
            raise ValueError(
                f"rounding: {rounding} is of a programme with a size budget only; use milp for bops_budget"
            )
        real = relaxed(choices, size_budget)
        parameters = np.array([int(choice.cost[0]) for choice in choices])
        bits = round_like_official(real, parameters) if rounding == "official_dfs" else np.rint(real).astype(np.int64)
        solver = f"SLSQP, {rounding}"
    allocation = Allocation(
        {name: int(own) for name, own in _spread(groups, bits, trace).items()},
        {name: int(inputs[name]) for name in trace.names},
        {name: costs[name] for name in trace.names},
        float(sum(choice.values[list(choice.bits).index(own)] for choice, own in zip(choices, bits, strict=True))),
        {**(provenance or {}), "size_budget": size_budget, "bops_budget": bops_budget, "solver": solver},
    )
    if size_budget is not None and allocation.size > size_budget:
        warnings.warn(f"rounding gives {allocation.size:.4f} MiB, over the budget of {size_budget:.4f}", stacklevel=2)
    return allocation


def relaxed(choices: Sequence[Choices], size_budget: float) -> NDArray[np.float64]:
    """Real numbers of bits of the published relaxation, by SLSQP from all layers at 8 bits.

    Args:
        choices: of each layer, with values that are linear in bits and contiguous bits; cost is that in size.
        size_budget: MiB, for all of them.

    Returns:
        (L,) bits, between the fewest and the most of each layer.

    Raises:
        ValueError: for values that are not linear, or bits that are not contiguous.

    Source: the allocation script of OMPQ and CSMPQ.
    """
    if wrong := [index for index, choice in enumerate(choices) if not choice.is_linear]:
        raise ValueError(
            f"the relaxation needs values that are linear in contiguous bits, which those of {len(wrong)} layers are "
            "not; use rounding milp"
        )
    bits = np.array([choice.bits[0] for choice in choices], dtype=np.float64)
    free = np.array([len(choice.bits) > 1 for choice in choices])
    variable = [choice for choice in choices if len(choice.bits) > 1]
    if not variable:
        return bits
    sizes = np.array([choice.cost[0] for choice in choices]) / BITS_PER_MIB
    left = size_budget - sizes[~free] @ bits[~free]
    theta = np.array([choice.values[1] - choice.values[0] for choice in variable])
    bounds = np.array([(choice.bits[0] / 8, choice.bits[-1] / 8) for choice in variable])
    result = minimize(
        lambda x: -theta @ x,
        np.ones(len(variable)),
        jac=lambda x: -theta,
        method="SLSQP",
        bounds=bounds,
        constraints={"type": "ineq", "fun": lambda x: np.array([left - 8 * sizes[free] @ x])},
    )
    bits[free] = np.clip(result.x, *bounds.T) * 8
    return bits


def round_like_official(bits: NDArray[np.float64], parameters: NDArray[np.int64]) -> NDArray[np.int64]:
    """Round each number up or down so that the size comes closest below that of the real numbers.

    Of equal sizes, the first in a depth-first search counts that begins with the last layer and rounds down first.

    Args:
        bits: (L,).
        parameters: (L,) of the layers.

    Returns:
        (L,) integers.

    Raises:
        ValueError: if more than 20 numbers are not whole.

    Source: the allocation script of OMPQ and CSMPQ, for ResNet-18.
    """
    low = np.floor(bits).astype(np.int64)
    split = np.flatnonzero(low < bits)[::-1]
    if len(split) > MOST_SPLIT:
        raise ValueError(
            f"rounding: official_dfs tries all ways to round {len(split)} numbers, at most {MOST_SPLIT} are feasible; "
            "use round or milp"
        )
    sizes = np.zeros(1, dtype=np.int64)
    for index in split:
        sizes = (sizes[:, None] + np.array([0, parameters[index]])).ravel()
    sizes[sizes > (bits - low) @ parameters] = -1
    best = int(sizes.argmax())
    for place, index in enumerate(split):
        low[index] += best >> (len(split) - 1 - place) & 1
    return low


class _Budgets:
    """Budgets as whole numbers: of bits, and of bit operations."""

    def __init__(self, size: float | None, operations: float | None) -> None:
        if size is None and operations is None:
            raise ValueError("give a size_budget or a bops_budget")
        self.given = [
            (name, unit, value, per)
            for name, unit, value, per in (
                ("size_budget", "MiB", size, BITS_PER_MIB),
                ("bops_budget", "G bit operations", operations, GIGA),
            )
            if value is not None
        ]
        for name, _, value, _ in self.given:
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name}: {value} is not a positive number")
        self.capacities = np.array([_whole(value, per) for _, _, value, per in self.given])

    def cost_of(self, cost: LayerCost, activation_bits: int) -> NDArray[np.int64]:
        """Of each bit of the layer's weight, in each budget."""
        of = {"size_budget": cost.parameters, "bops_budget": cost.operations * activation_bits}
        return np.array([of[name] for name, *_ in self.given])

    def check(self, choices: Sequence[Choices]) -> None:
        """Raise if a budget is out of reach, and warn if none matters."""
        least = sum(choice.bits[0] * choice.cost for choice in choices)
        most = sum(choice.bits[-1] * choice.cost for choice in choices)
        for (name, unit, value, per), low, high, capacity in zip(self.given, least, most, self.capacities, strict=True):
            if low > capacity:
                raise ValueError(
                    f"{name}: {value:g} {unit} is out of reach: from the fewest to the most bits of all layers it is "
                    f"{low / per:.4f} to {high / per:.4f}; raise the budget or allow fewer bits"
                )
        if (self.capacities >= most).all():
            reached = " and ".join(
                f"{name} {value:g} {unit} (all layers at their most bits: {high / per:.4f})"
                for (name, unit, value, per), high in zip(self.given, most, strict=True)
            )
            warnings.warn(f"no constraint is active: {reached}", stacklevel=3)


def _whole(value: float, per: int) -> int:
    """The most units that are not more than the budget, as sizes and operations are compared with it."""
    units = round(value * per)
    return units if units / per <= value else units - 1


def _values_of(
    values: Mapping[str, Mapping[int, float]], group: Sequence[str], bits: Sequence[int]
) -> NDArray[np.float64]:
    """Value of each number of bits to layers that share them; only the first of them must have one."""
    first, *shortcuts = group
    if len(bits) == 1:
        return np.zeros(1)
    return sum(_row(values.get(name, {}), name, bits) for name in (first, *(one for one in shortcuts if one in values)))


def _row(own: Mapping[int, float], name: str, bits: Sequence[int]) -> NDArray[np.float64]:
    if missing := [number for number in bits if number not in own]:
        raise ValueError(f"{name}: no value is given for {missing} bits; there are values for {sorted(own)}")
    row = np.array([own[number] for number in bits], dtype=np.float64)
    if not np.isfinite(row).all():
        raise ValueError(f"{name}: its values are not finite: {dict(zip(bits, row.tolist(), strict=True))}")
    return row


def _spread(groups: Sequence[Sequence[str]], bits: NDArray[np.int64], trace: NetworkTrace) -> dict[str, int]:
    """Bits of all layers, in the order they run."""
    of = {name: int(own) for group, own in zip(groups, bits, strict=True) for name in group}
    return {name: of[name] for name in trace.names}


@dataclass(frozen=True)
class _Row:
    weight_bits: int
    activation_bits: int
    cost: LayerCost

    @classmethod
    def read(cls, path: str | Path, name: str, row: dict[str, Any]) -> "_Row":
        wanted = ("weight_bits", "activation_bits", "parameters", "operations")
        for key in wanted:
            if isinstance(row.get(key), bool) or not isinstance(row.get(key), int):
                raise ValueError(f"{path}: {name}: {key} must be a whole number, got {row.get(key)!r}")
        check_bits(row["weight_bits"], f"{path}: {name}: weight_bits")
        if row["activation_bits"] != FLOAT_BITS:
            check_bits(row["activation_bits"], f"{path}: {name}: activation_bits")
        cost = LayerCost(tuple(row["shape"]), row["parameters"], row["operations"])
        return cls(row["weight_bits"], row["activation_bits"], cost)


def _check_network(path: str | Path, rows: dict[str, dict[str, Any]], trace: NetworkTrace) -> None:
    missing = [name for name in trace.names if name not in rows]
    extra = [name for name in rows if name not in trace.names]
    if missing or extra:
        parts = [f"without bits are {some(missing)}"] * bool(missing) + [f"unknown are {some(extra)}"] * bool(extra)
        raise ValueError(
            f"{path}: of another network: it has {len(rows)} layers, the network {len(trace.names)}; {'; '.join(parts)}"
        )
    shapes = {name: tuple(rows[name].get("shape") or ()) for name in trace.names}
    different = [
        f"{name} {shapes[name]}, not {trace[name].weight_shape}"
        for name in trace.names
        if shapes[name] != trace[name].weight_shape
    ]
    if different:
        raise ValueError(f"{path}: of another network: {len(different)} shapes differ: {some(different)}")


def _in_line(value: Any) -> str:
    """A value in YAML on one line."""
    text = yaml.safe_dump(value, default_flow_style=True, width=math.inf, sort_keys=False)
    return text.removesuffix("...\n").strip()
