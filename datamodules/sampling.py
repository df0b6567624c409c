"""Batch samplers whose order is a function of (seed, epoch, pass), so that a resumed run needs no saved state."""

import warnings
from collections.abc import Iterator
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from torch.utils.data import Sampler

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

# Lightning cannot see that this sampler returns every sample, and would warn at each prediction.
warnings.filterwarnings("ignore", message="You are using a custom batch sampler `Evaluation(Batch|Array)Sampler`")


class SampleKey(NamedTuple):
    """What a data set needs to produce one sample: the row, and where in training it is asked for.

    Args:
        epoch: Epoch of the run, counted from 0.
        pass_: Pass over the loader within the epoch; above 0 only for the shorter of two combined loaders.
        index: Row of the data set.
    """

    epoch: int
    pass_: int
    index: int


class BatchKey(NamedTuple):
    """What a data set needs to produce a whole batch at once.

    Args:
        epoch: Epoch of the run, counted from 0.
        pass_: Pass over the loader within the epoch; above 0 only for the shorter of two combined loaders.
        batch: Number of the batch within the pass, counted over all ranks, so that no two ranks share one.
        rows: (B,) int64 rows of the data set.
    """

    epoch: int
    pass_: int
    batch: int
    rows: np.ndarray


def resume_position(trainer: "Trainer | None") -> tuple[int, int]:
    """Tell which batch a training iterator created now has to start with.

    Lightning creates the first iterator of a resumed run after it restored its counters and before it repairs them,
    and it creates (and throws away) one more at an epoch's end; reading the counters each time serves all of them.

    Args:
        trainer: The trainer, or None outside of training.

    Returns:
        The epoch, and the number of batches of it that are already done (of this rank, over all passes).
    """
    if trainer is None:
        return 0, 0
    epochs = trainer.fit_loop.epoch_progress.current
    batches = trainer.fit_loop.epoch_loop.batch_progress
    if batches.is_last_batch:
        # After an epoch's last batch the epoch itself may or may not be counted already.
        return epochs.processed + int(epochs.ready > epochs.processed), 0
    return epochs.processed, batches.current.processed


class TrainBatchSampler(Sampler[list[SampleKey]]):
    """Shuffled training batches that two ranks share the way one process accumulates two batches.

    Batch ``j`` of an epoch goes to rank ``j % world_size``, so ``world_size`` ranks see in one step what a single
    process with ``accumulate_grad_batches=world_size`` sees. Every rank gets the same number of batches.

    Give it ``trainer`` inside a datamodule: a run resumed from any step then continues with the very next batch.
    Use it as ``DataLoader(dataset, batch_sampler=TrainBatchSampler(...))`` with ``use_distributed_sampler=False``.

    Args:
        length: Number of samples in the data set.
        batch_size: Samples per batch and rank.
        seed: Seed of the order, at least 0.
        rank: This process.
        world_size: Number of processes.
        drop_last: Leave out samples that do not fill a batch, and batches that do not fill a round of all ranks.
            Otherwise the last batch is smaller, and a round is filled with batches from the epoch's start.
        shuffle: Draw a new order for each epoch and pass; otherwise the order of the rows.
        trainer: Where to read the position from each time an iterator is made. Excludes the next two.
        start_epoch: Epoch of the first iterator, when there is no trainer.
        start_batch: Batches of that epoch to leave out because they are done, when there is no trainer.

    Raises:
        ValueError: If a number is out of range or a rank would get no batch.
    """

    def __init__(
        self,
        length: int,
        batch_size: int,
        *,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        drop_last: bool = True,
        shuffle: bool = True,
        trainer: "Trainer | None" = None,
        start_epoch: int = 0,
        start_batch: int = 0,
    ) -> None:
        _check_sizes(length, batch_size, rank, world_size)
        _check_start(trainer, seed=seed, start_epoch=start_epoch, start_batch=start_batch)
        self.length, self.batch_size = length, batch_size
        self.seed, self.rank, self.world_size = seed, rank, world_size
        self.drop_last, self.shuffle = drop_last, shuffle
        self.trainer = trainer
        total = length // batch_size if drop_last else -(-length // batch_size)
        self._batches = total // world_size if drop_last else -(-total // world_size)
        if self._batches == 0:
            raise ValueError(
                f"{length} training samples make no batch of batch_size {batch_size} for each of {world_size} rank(s); "
                f"lower batch_size to at most {length // world_size} or set drop_last to False"
            )
        self._epoch = start_epoch
        self._pass, self._offset = divmod(start_batch, self._batches)

    @property
    def sampler(self) -> "TrainBatchSampler":
        """This object: Lightning looks for ``set_epoch`` at ``dataloader.batch_sampler.sampler``."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Move to the start of ``epoch``, unless it is the current one or a trainer gives the position."""
        if epoch != self._epoch:
            self._epoch, self._pass, self._offset = epoch, 0, 0

    def __len__(self) -> int:
        """Return the number of batches of one pass on this rank, whatever part of it is already done."""
        return self._batches

    def __iter__(self) -> Iterator[list[SampleKey]]:
        """Fix the position now, as loading workers may ask for batches long before or after Lightning does."""
        if self.trainer is not None:
            self._epoch, done = resume_position(self.trainer)
            self._pass, self._offset = divmod(done, self._batches)
        epoch, pass_, offset = self._epoch, self._pass, self._offset
        self._pass, self._offset = pass_ + 1, 0
        return self._iterate(epoch, pass_, offset)

    def _iterate(self, epoch: int, pass_: int, offset: int) -> Iterator[list[SampleKey]]:
        order = self._order(epoch, pass_)
        total = -(-self.length // self.batch_size)
        for batch in range(offset, self._batches):
            number = batch * self.world_size + self.rank
            start = number % total * self.batch_size
            yield self._keys(epoch, pass_, number, order[start : start + self.batch_size])

    def _keys(self, epoch: int, pass_: int, batch: int, rows: np.ndarray) -> list[SampleKey]:
        return [SampleKey(epoch, pass_, index) for index in rows.tolist()]

    def _order(self, epoch: int, pass_: int) -> np.ndarray:
        if not self.shuffle:
            return np.arange(self.length)
        return np.random.default_rng((self.seed, epoch, pass_)).permutation(self.length)


class StreamBatchSampler(Sampler[list[SampleKey]]):
    """Batches of one fixed size out of an endless shuffled stream that goes on from epoch to epoch.

    Sample ``s`` of the stream is row ``permutation(seed, stream, s // length)[s % length]``. Batch ``j`` of an epoch
    holds on rank ``r`` the samples from ``((epoch * steps + j) * world_size + r) * batch_size`` on. So a short data set
    is passed over several times in an epoch, a long one is spread over several, and no row is ahead of another by more
    than one pass. Two ranks see in a step what one process with ``accumulate_grad_batches=2`` and twice the steps sees.

    Give it ``trainer`` inside a datamodule: a run resumed from any step then continues with the very next batch.
    Use it as ``DataLoader(dataset, batch_sampler=StreamBatchSampler(...))`` with ``use_distributed_sampler=False``.

    Args:
        length: Number of samples in the data set; where it is less than a batch, rows repeat in the batch.
        batch_size: Samples per batch and rank.
        steps: Batches per epoch and rank.
        seed: Seed of the order, at least 0.
        stream: Number of this stream among those that are combined; each has its own order.
        rank: This process.
        world_size: Number of processes.
        trainer: Where to read the position from each time an iterator is made. Excludes the next two.
        start_epoch: Epoch of the first iterator, when there is no trainer; the next one is of the next epoch.
        start_batch: Batches of that epoch to leave out because they are done, when there is no trainer.

    Raises:
        ValueError: If a number is out of range.
    """

    def __init__(
        self,
        length: int,
        batch_size: int,
        steps: int,
        *,
        seed: int,
        stream: int = 0,
        rank: int = 0,
        world_size: int = 1,
        trainer: "Trainer | None" = None,
        start_epoch: int = 0,
        start_batch: int = 0,
    ) -> None:
        _check_sizes(length, batch_size, rank, world_size, steps)
        _check_start(trainer, seed=seed, stream=stream, start_epoch=start_epoch, start_batch=start_batch)
        self.length, self.batch_size, self.steps = length, batch_size, steps
        self.seed, self.stream, self.rank, self.world_size = seed, stream, rank, world_size
        self.trainer = trainer
        self._epoch, self._done = start_epoch, start_batch

    @property
    def sampler(self) -> "StreamBatchSampler":
        """This object: Lightning looks for ``set_epoch`` at ``dataloader.batch_sampler.sampler``."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Move to the start of ``epoch``, unless it is the current one or a trainer gives the position."""
        if epoch != self._epoch:
            self._epoch, self._done = epoch, 0

    def __len__(self) -> int:
        """Return the number of batches of an epoch on this rank, whatever part of it is already done."""
        return self.steps

    def __iter__(self) -> Iterator[list[SampleKey]]:
        """Fix the position now, as loading workers may ask for batches long before or after Lightning does."""
        if self.trainer is not None:
            self._epoch, self._done = resume_position(self.trainer)
        epoch, done = self._epoch, self._done
        self._epoch, self._done = epoch + 1, 0
        return self._iterate(epoch, done)

    def _iterate(self, epoch: int, done: int) -> Iterator[list[SampleKey]]:
        drawn, order = -1, np.empty(0, dtype=np.int64)
        for batch in range(done, self.steps):
            first = ((epoch * self.steps + batch) * self.world_size + self.rank) * self.batch_size
            keys = []
            for sample in range(first, first + self.batch_size):
                pass_, place = divmod(sample, self.length)
                if pass_ != drawn:
                    drawn = pass_
                    order = np.random.default_rng((self.seed, self.stream, pass_)).permutation(self.length)
                keys.append(SampleKey(epoch, pass_, int(order[place])))
            yield keys


class EvaluationBatchSampler(Sampler[list[SampleKey]]):
    """Each sample exactly once over all ranks, in order, with the same number of batches on every rank.

    The ranks step together (DistributedDataParallel broadcasts buffers in each forward pass, in validation as well, and
    would wait forever for a rank that has no batch left), so what is left after the full rounds is spread evenly: the
    last batches are smaller. Only with a batch size of 1 can a last batch hold two samples instead.

    Args:
        length: Number of samples in the data set, at least ``world_size``.
        batch_size: Samples per batch and rank.
        rank: This process.
        world_size: Number of processes.

    Raises:
        ValueError: If a number is out of range or there are fewer samples than ranks.
    """

    def __init__(self, length: int, batch_size: int, *, rank: int = 0, world_size: int = 1) -> None:
        _check_sizes(length, batch_size, rank, world_size)
        if length < world_size:
            raise ValueError(
                f"{length} evaluation sample(s) cannot be shared by {world_size} ranks; "
                f"set trainer.devices to at most {length} or add samples to the split"
            )
        self.length, self.rank, self.world_size = length, rank, world_size
        bounds = list(pairwise(accumulate(_batch_sizes(length, batch_size, world_size), initial=0)))
        self._bounds = bounds[rank::world_size]

    def __len__(self) -> int:
        """Return the number of batches on this rank, which is that of every rank."""
        return len(self._bounds)

    def __iter__(self) -> Iterator[list[SampleKey]]:
        """Yield the batches of this rank."""
        for batch, (start, end) in enumerate(self._bounds):
            yield self._keys(batch * self.world_size + self.rank, np.arange(start, end))

    def _keys(self, batch: int, rows: np.ndarray) -> list[SampleKey]:
        return [SampleKey(0, 0, index) for index in rows.tolist()]


class TrainArraySampler(TrainBatchSampler):
    """The batches of ``TrainBatchSampler``, each as one key for a data set that makes whole batches.

    Use it as ``batch_sampler`` as well: the data set's ``__getitems__`` is called with the :class:`BatchKey`.
    """

    def _keys(self, epoch: int, pass_: int, batch: int, rows: np.ndarray) -> BatchKey:
        return BatchKey(epoch, pass_, batch, rows)


class EvaluationArraySampler(EvaluationBatchSampler):
    """The batches of ``EvaluationBatchSampler``, each as one key for a data set that makes whole batches."""

    def _keys(self, batch: int, rows: np.ndarray) -> BatchKey:
        return BatchKey(0, 0, batch, rows)


def _batch_sizes(length: int, batch_size: int, world_size: int) -> list[int]:
    """Size of each batch over all ranks, in the order in which the ranks take turns."""
    full, rest = divmod(length, batch_size * world_size)
    if 0 < rest < world_size:
        full, rest = full - 1, rest + batch_size * world_size
    rounds = min(-(-rest // (batch_size * world_size)), rest // world_size)
    sizes = [batch_size] * (full * world_size)
    if rounds:
        small, larger = divmod(rest, rounds * world_size)
        sizes += [small + 1] * larger + [small] * (rounds * world_size - larger)
    return sizes


def _check_sizes(length: int, batch_size: int, rank: int, world_size: int, steps: int = 1) -> None:
    sizes = {"length": length, "batch_size": batch_size, "world_size": world_size, "steps": steps}
    for name, value in sizes.items():
        if value < 1:
            raise ValueError(f"{name} is {value}, expected 1 or more")
    if not 0 <= rank < world_size:
        raise ValueError(f"rank is {rank}, expected 0..{world_size - 1} (world_size {world_size})")


def _check_start(trainer: "Trainer | None", **numbers: int) -> None:
    for name, value in numbers.items():
        if value < 0:
            raise ValueError(f"{name} is {value}, expected 0 or more")
    if trainer is not None and (numbers["start_epoch"] or numbers["start_batch"]):
        raise ValueError("pass either trainer or start_epoch/start_batch to a training sampler, not both")
