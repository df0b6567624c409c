"""The best number of bits for each layer within budgets: an exact multiple-choice knapsack in integers."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, linprog, milp
from scipy.sparse import csr_array

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
WIDTHS = (512, 8192, 65536)
HOPELESS = 24
"""Power of ten of the choices that two budgets leave, beyond which a wider pass was never seen to finish."""
ROOM_SCALE = 1e3
HALVINGS = 60
NODES = 500
"""Of HiGHS' search tree; a number, not a time, so that the same programme always has the same answer."""
RELATIVE = 1e-12


@dataclass(frozen=True)
class Choices:
    """The bits that one layer, or several layers with one cost, may have together.

    Args:
        bits: (K,) ascending.
        values: (K,) what each is worth.
        cost: (m,) of one bit, in each of m budgets.
    """

    bits: Integers
    values: Floats
    cost: Integers

    @property
    def is_linear(self) -> bool:
        """Whether bits are contiguous and each is worth the same."""
        steps = np.diff(self.values)
        return bool((np.diff(self.bits) == 1).all()) and np.allclose(steps, steps[:1], rtol=1e-9, atol=0)


@dataclass(frozen=True)
class Found:
    """A choice for every layer.

    Args:
        bits: (L,).
        proof: what showed that nothing is better, or how much better something could be at most.
    """

    bits: Integers
    proof: str


def choose_bits(layers: Sequence[Choices], budgets: Integers) -> Found:
    """Bits whose values have the largest sum while no budget is exceeded.

    Layers with the same cost are interchangeable and are merged to one choice of their sum of bits. A dynamic programme
    over the merged layers then keeps states whose Lagrangian bound can still beat the best solution; if it has to drop
    states, HiGHS looks through the choices that can, to within its tolerances (1e-6 of what could still be gained).
    With one budget that has always been enough; with two and many layers its tree may grow without end and is cut, and
    then ``proof`` tells by how much of the objective the answer is below the bound at most.

    Args:
        layers: each with at least one number of bits.
        budgets: (m,), 1 or 2 of them, in units of cost.

    Raises:
        ValueError: if the fewest bits exceed a budget.

    Source: Kellerer, Pferschy and Pisinger, "Knapsack Problems" (2004), chapter 11.
    """
    if (sum(layer.bits[0] * layer.cost for layer in layers) > budgets).any():
        raise ValueError("the fewest bits of all layers exceed a budget")
    members: dict[tuple[int, ...], list[int]] = {}
    for index, layer in enumerate(layers):
        members.setdefault(tuple(layer.cost.tolist()), []).append(index)
    merged = [_Merged([layers[index] for index in own]) for own in members.values()]
    programme = _Programme([one.choices for one in merged], budgets)
    picked, proof = programme.search(), "dynamic programme"
    if not programme.proven:
        picked = programme.search_by_highs() or picked
        proof = "HiGHS" if programme.proven else f"within {programme.gap:.1e} of the bound"
    if picked is None:
        raise RuntimeError("HiGHS found no solution of an integer programme that has one")
    bits = np.zeros(len(layers), dtype=np.int64)
    for own, one, pick in zip(members.values(), merged, picked, strict=True):
        bits[own] = one.split(pick)
    return Found(bits, proof)


class _Merged:
    """Layers with one cost: for each sum of bits the largest sum of values, and which bits give it."""

    def __init__(self, layers: Sequence[Choices]) -> None:
        self.layers = layers
        best = np.zeros(1)
        self.tables = []
        for layer in layers:
            offsets = layer.bits - layer.bits[0]
            sums = np.full((len(offsets), len(best) + offsets[-1]), -np.inf)
            for row, offset, value in zip(sums, offsets, layer.values, strict=True):
                row[offset : offset + len(best)] = best + value
            self.tables.append(sums.argmax(0))
            best = sums.max(0)
        least = sum(int(layer.bits[0]) for layer in layers)
        reachable = np.flatnonzero(np.isfinite(best))
        self.choices = Choices(reachable + least, best[reachable], layers[0].cost)

    def split(self, pick: int) -> list[int]:
        """Bits of each layer for one of the choices."""
        left = int(self.choices.bits[pick] - self.choices.bits[0])
        bits = []
        for layer, table in zip(reversed(self.layers), reversed(self.tables), strict=True):
            own = int(layer.bits[table[left]])
            bits.append(own)
            left -= own - int(layer.bits[0])
        return bits[::-1]


class _Programme:
    """A dynamic programme over choices, bounded by their Lagrangian relaxation.

    With multipliers p of the budgets, a choice loses ``max(v - p w) - (v - p w)`` against the relaxation, and unused
    budget loses p for each unit; the best solution is that with the least sum of losses.
    """

    def __init__(self, choices: Sequence[Choices], budgets: Integers) -> None:
        unit = np.gcd.reduce([np.gcd.reduce(np.diff(one.bits, prepend=one.bits[0])) * one.cost for one in choices])
        unit = np.maximum(unit, 1)
        self.weights = [(one.bits - one.bits[0])[:, None] * one.cost // unit for one in choices]
        self.room = (budgets - sum(one.bits[0] * one.cost for one in choices)) // unit
        self.prices = _prices([one.values for one in choices], self.weights, self.room)
        reduced = [one.values - weights @ self.prices for one, weights in zip(choices, self.weights, strict=True)]
        self.losses = [own.max() - own for own in reduced]
        scale = abs(sum(own.max() for own in reduced) + self.prices @ self.room)
        self.bound = scale
        self.tolerance = RELATIVE * max(scale, *(np.abs(one.values).max() for one in choices))
        shares = [(weights.max(0) / np.maximum(self.room, 1)).max() for weights in self.weights]
        self.order = np.argsort(-np.array(shares), kind="stable")
        self.least_loss = np.inf
        self.proven = False

    @property
    def gap(self) -> float:
        """By what part of the bound the best solution that is known is below it at most."""
        return float(self.least_loss / self.bound)

    def search(self) -> list[int] | None:
        """Index of what to choose of each; ``proven`` tells whether it is certain that nothing is better."""
        best = None
        for width in WIDTHS:
            best = self._pass(width) or best
            kept = [max(int((own <= self.least_loss).sum()), 1) for own in self.losses]
            if self.proven or (len(self.room) > 1 and np.log10(kept).sum() > HOPELESS):
                break
        return best

    def search_by_highs(self) -> list[int] | None:
        """The same by HiGHS, among what can beat the best that is known; None if nothing does."""
        kept = [np.flatnonzero(own < self.least_loss) for own in self.losses]
        if not all(len(own) for own in kept):
            self.proven = True
            return None
        losses = np.concatenate([own[some] for own, some in zip(self.losses, kept, strict=True)])
        used = np.concatenate([own[some] for own, some in zip(self.weights, kept, strict=True)])
        unit = self.least_loss if np.isfinite(self.least_loss) else losses.max() or 1.0
        scale = np.maximum(self.room, 1) / ROOM_SCALE
        result = milp(
            (losses - used @ self.prices) / unit,
            constraints=[
                LinearConstraint(_one_each([len(own) for own in kept]), 1, 1),
                LinearConstraint((used / scale).T, -np.inf, self.room / scale),
            ],
            integrality=np.ones(len(losses)),
            bounds=Bounds(0, 1),
            options={"mip_rel_gap": 0, "node_limit": NODES},
        )
        self.proven = result.status != 1  # 1: the tree was cut
        if result.x is None:
            return None
        parts = np.split(result.x, np.cumsum([len(own) for own in kept])[:-1])
        picked = [int(own[part.argmax()]) for own, part in zip(kept, parts, strict=True)]
        left = self.room - sum(own[pick] for own, pick in zip(self.weights, picked, strict=True))
        loss = sum(own[pick] for own, pick in zip(self.losses, picked, strict=True)) + left @ self.prices
        if (left < 0).any() or loss >= self.least_loss:
            return None
        self.least_loss = loss
        return picked

    def _pass(self, width: int) -> list[int] | None:
        """One pass that keeps at most so many states; None if it finds nothing better than is known."""
        kept = [np.flatnonzero(own <= self.least_loss) for own in self.losses]
        rest = np.zeros((len(kept) + 1, len(self.room)), dtype=np.int64)
        for place in range(len(kept) - 1, -1, -1):
            index = self.order[place]
            rest[place] = rest[place + 1] + self.weights[index][kept[index]].max(0)
        losses, used = np.zeros(1), np.zeros((1, len(self.room)), dtype=np.int64)
        steps = []
        complete = True
        for place, index in enumerate(self.order):
            options = kept[index]
            losses = (losses[:, None] + self.losses[index][options]).ravel()
            used = (used[:, None] + self.weights[index][options]).reshape(-1, len(self.room))
            bounds = losses + np.maximum(self.room - used - rest[place + 1], 0) @ self.prices
            states = np.flatnonzero((used <= self.room).all(1) & (bounds < self.least_loss - self.tolerance))
            states = self._undominated(states, losses, used)
            if len(states) > width:
                complete = False
                states = states[np.argpartition(bounds[states], width)[:width]]
            if not len(states):
                self.proven = complete
                return None
            steps.append((states // len(options), options[states % len(options)]))
            losses, used = losses[states], used[states]
        totals = losses + (self.room - used) @ self.prices
        last = int(totals.argmin())
        self.least_loss = totals[last]
        self.proven = complete or self.least_loss <= self.tolerance
        return self._trace_back(steps, last)

    def _undominated(self, states: Integers, losses: Floats, used: Integers) -> Integers:
        """States that no other beats with less: all such with one budget, and those of equal use with two."""
        if len(states) < 2:
            return states
        states = states[np.lexsort((losses[states], *used[states].T[::-1]))]
        if len(self.room) == 1:
            values = used[states, 0] * self.prices[0] - losses[states]
            better = values[1:] > np.maximum.accumulate(values)[:-1]
        else:
            better = (used[states[1:]] != used[states[:-1]]).any(1)
        return states[np.concatenate([[True], better])]

    def _trace_back(self, steps: list[tuple[Integers, Integers]], state: int) -> list[int]:
        picked = [0] * len(steps)
        for index, (before, choice) in zip(self.order[::-1], steps[::-1], strict=True):
            picked[index] = int(choice[state])
            state = before[state]
        return picked


def _prices(values: Sequence[Floats], weights: Sequence[Integers], room: Integers) -> Floats:
    """Multipliers of the linear relaxation; any that are not negative give a bound, these give the tightest."""
    if len(room) == 1:
        return np.array([_price(values, [own[:, 0] for own in weights], int(room[0]))])
    scale = np.maximum(room, 1).astype(np.float64)
    worth = max(np.abs(own - own.max()).max() for own in values) or 1.0
    result = linprog(
        np.concatenate([own.max() - own for own in values]) / worth,
        A_ub=(np.concatenate(weights) / scale).T,
        b_ub=room / scale,
        A_eq=_one_each([len(own) for own in values]),
        b_eq=np.ones(len(values)),
        method="highs-ds",
    )
    return np.maximum(-result.ineqlin.marginals, 0) * worth / scale if result.success else np.zeros(len(room))


def _price(values: Sequence[Floats], weights: Sequence[Integers], room: int) -> float:
    """The least multiplier of one budget at which the best choices are within it, by halving."""
    shape = (len(values), max(len(own) for own in values))
    worth, used = np.full(shape, -np.inf), np.zeros(shape, dtype=np.int64)
    for row, own in enumerate(values):
        worth[row, : len(own)], used[row, : len(own)] = own, weights[row]

    def needed(price: float) -> int:
        return int(np.take_along_axis(used, (worth - price * used).argmax(1)[:, None], 1).sum())

    with np.errstate(invalid="ignore", divide="ignore"):
        slopes = (worth - worth[:, :1]) / used
    low, high = 0.0, max(slopes[used > 0].max(initial=0.0), 0.0)
    if needed(low) <= room:
        return low
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if needed(middle) > room else (low, middle)
    return high


def _one_each(sizes: Sequence[int]) -> csr_array:
    """(G, sum of sizes): row g has ones at the choices of g."""
    rows = np.repeat(np.arange(len(sizes)), sizes)
    return csr_array((np.ones(len(rows)), (rows, np.arange(len(rows)))))
