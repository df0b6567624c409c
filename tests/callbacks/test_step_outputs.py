import torch

from callbacks.step_outputs import StepOutputs, batch_images, batch_rows
from tests.callbacks.clusters import Batch
from tests.distributed import run_ranks


def test_rows_come_sorted_and_once():
    outputs = StepOutputs()
    outputs.add({"index": torch.tensor([4, 1]), "features": torch.tensor([[4.0], [1.0]])})
    outputs.add({"index": torch.tensor([1, 0]), "features": torch.tensor([[1.0], [0.0]])})
    assert len(outputs) == 4
    rows = outputs.gather()
    assert rows["index"].tolist() == [0, 1, 4]
    assert rows["features"].tolist() == [[0.0], [1.0], [4.0]]
    outputs.clear()
    assert outputs.gather() == {}


def test_rows_without_index_keep_their_order():
    outputs = StepOutputs()
    outputs.add({"labels": torch.tensor([2, 2])})
    outputs.add({"labels": torch.tensor([1])})
    assert outputs.gather()["labels"].tolist() == [2, 2, 1]


def gather_rank(rank, counts):
    outputs = StepOutputs()
    for i in range(counts[rank]):
        outputs.add({"index": torch.tensor([10 * rank + i])})
    rows = outputs.gather()
    return rows and rows["index"].tolist()


def test_ranks_with_different_numbers_of_batches():
    assert run_ranks(gather_rank, 2, (1, 3)) == [[0, 10, 11, 12], None]
    assert run_ranks(gather_rank, 2, (0, 2)) == [[10, 11], None]


def test_batches_of_many_kinds():
    x, y, i = torch.zeros(2, 3), torch.tensor([0, 1]), torch.tensor([5, 6])
    assert batch_rows(Batch(x, y, i)) == {"labels": y, "index": i}
    assert batch_rows({"images": x, "labels": y}) == {"labels": y}
    assert batch_rows([x, y]) == {"labels": y}
    assert batch_rows(x) == {}
    assert all(batch_images(batch) is x for batch in (Batch(x, y, i), {"images": x}, (x, y)))
