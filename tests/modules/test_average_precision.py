import contextlib
import io

import pytest
import torch

from modules.detection import AveragePrecision
from modules.detection import average_precision as module
from tests.distributed import run_ranks

NAMES = ["car", "person"]


def detections(boxes, scores=None, labels=None):
    return {
        "boxes": torch.tensor(boxes, dtype=torch.float32).view(-1, 4),
        "scores": torch.tensor([0.9] * len(boxes) if scores is None else scores),
        "labels": torch.tensor([1] * len(boxes) if labels is None else labels, dtype=torch.int64),
    }


def objects(boxes, labels=None, iscrowd=None, area=None):
    corners = torch.tensor(boxes, dtype=torch.float32).view(-1, 4)
    return {
        "boxes": corners,
        "labels": torch.tensor([1] * len(boxes) if labels is None else labels, dtype=torch.int64),
        "iscrowd": torch.tensor([0] * len(boxes) if iscrowd is None else iscrowd, dtype=torch.int64),
        "area": (corners[:, 2:] - corners[:, :2]).prod(1) if area is None else torch.tensor(area),
    }


def random_scene(image):
    """Objects of an image and detections near some of them; image 3 has no detection and image 4 no object."""
    generator = torch.Generator().manual_seed(image)
    count = 0 if image == 4 else 1 + image % 3
    corner = torch.rand(count, 2, generator=generator) * 200
    boxes = torch.cat([corner, corner + 20 + 120 * torch.rand(count, 2, generator=generator)], dim=1)
    labels = torch.randint(1, 3, (count,), generator=generator)
    target = objects(boxes.tolist(), labels.tolist(), [int(image == 5 and place == 0) for place in range(count)])
    around = torch.cat(
        [boxes, boxes + 8 * torch.randn(count, 4, generator=generator), torch.tensor([[5.0, 5, 60, 70]])]
    )
    around[:, 2:] = torch.maximum(around[:, 2:], around[:, :2] + 1)
    wrong = torch.cat([labels, labels, torch.tensor([1])])
    found = detections(around.tolist(), torch.rand(len(around), generator=generator).tolist(), wrong.tolist())
    return (detections([]) if image == 3 else found), target


def fill(metric, images):
    for image in images:
        found, target = random_scene(image)
        metric.update([found], [target], torch.tensor([image]))
    return metric


def reference(images):
    """The same scenes through pycocotools itself."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    annotations, results = [], []
    for image in images:
        found, target = random_scene(image)
        for place, (x1, y1, x2, y2) in enumerate(target["boxes"].tolist()):
            annotations.append({
                "id": len(annotations) + 1, "image_id": image, "bbox": [x1, y1, x2 - x1, y2 - y1],
                "category_id": target["labels"][place].item(), "area": target["area"][place].item(),
                "iscrowd": target["iscrowd"][place].item(),
            })  # fmt: skip
        for place, (x1, y1, x2, y2) in enumerate(found["boxes"].tolist()):
            results.append({
                "image_id": image, "bbox": [x1, y1, x2 - x1, y2 - y1], "score": found["scores"][place].item(),
                "category_id": found["labels"][place].item(),
            })  # fmt: skip
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = {"images": [{"id": image} for image in images], "annotations": annotations,
                         "categories": [{"id": 1}, {"id": 2}]}  # fmt: skip
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes(results), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return dict(zip(module.SCORES, evaluation.stats[:6].tolist(), strict=True))


@pytest.mark.parametrize("backend", ["faster_coco_eval", "pycocotools"])
def test_equals_cocos_own_evaluation(backend):
    metric = AveragePrecision()
    metric.backend = backend
    values = fill(metric, range(10)).compute()
    expected = reference(list(range(10)))
    assert 0.1 < expected["map"] < 0.9
    assert expected["map_small"] != expected["map_large"]
    assert {name: value.item() for name, value in values.items()} == pytest.approx(expected, abs=1e-6)


def test_a_half_of_two_objects_found():
    """One of two objects is found exactly: precision 1 up to recall 0.5, which are 51 of COCO's 101 points."""
    metric = AveragePrecision()
    metric.update([detections([[0, 0, 40, 40]])], [objects([[0, 0, 40, 40], [50, 50, 90, 90]])], torch.tensor([0]))
    assert metric.compute()["map"].item() == pytest.approx(51 / 101)


def test_a_crowd_region_takes_detections_out_of_the_count():
    scene = [[0, 0, 40, 40], [50, 50, 90, 90]]
    values = {}
    for crowd in (0, 1):
        metric = AveragePrecision()
        target = objects([[0, 0, 40, 40], [45, 45, 200, 200]], iscrowd=[0, crowd])
        metric.update([detections(scene, [0.5, 0.9])], [target], torch.tensor([0]))
        values[crowd] = metric.compute()["map"].item()
    assert values[1] == pytest.approx(1.0)
    assert values[0] < 0.6


def test_the_given_area_decides_the_size_of_an_object():
    metric = AveragePrecision()
    box = [[0, 0, 40, 40]]  # 1600 pixels, medium; its segment is small
    metric.update([detections(box)], [objects(box, area=[900.0])], torch.tensor([0]))
    values = metric.compute()
    assert values["map_small"] == 1.0
    assert values["map_medium"] == -1.0


def test_an_image_seen_twice_counts_once_and_the_order_is_of_no_effect():
    images = list(range(10))
    once = fill(AveragePrecision(), images).compute()
    other = fill(AveragePrecision(), [*reversed(images), 2, 7]).compute()
    assert once == other


def test_names_of_classes():
    metric = AveragePrecision(NAMES)
    box = [[0, 0, 40, 40]]
    metric.update([detections(box, labels=[2])], [objects(box, labels=[2])], torch.tensor([0]))
    values = metric.compute()
    assert values["map/person"] == 1.0
    assert "map/car" not in values


def test_no_object_at_all_is_told(caplog):
    metric = AveragePrecision(NAMES)
    metric.update([detections([])], [objects([])], torch.tensor([0]))
    with pytest.warns(UserWarning, match="no image had an object"):
        assert metric.compute()["map"] == -1.0


def rank_scores(rank, shares, quiet_rank):
    metric = AveragePrecision(NAMES)
    for image in shares[rank]:
        found, target = random_scene(image)
        metric.update([detections([]) if rank == quiet_rank else found], [target], torch.tensor([image]))
    return {name: value.item() for name, value in metric.compute().items()}


@pytest.mark.parametrize(
    "shares", [([0, 1, 2, 3, 4, 5], [6, 7]), ([0, 2, 4, 6], [1, 3, 5, 7])], ids=["unequal", "interleaved"]
)
def test_two_ranks_equal_one(shares):
    first, second = run_ranks(rank_scores, 2, shares, None)
    expected = {name: value.item() for name, value in fill(AveragePrecision(NAMES), range(8)).compute().items()}
    assert first == second == expected


def test_a_rank_without_detections():
    shares = ([0, 1, 2], [3])
    first, second = run_ranks(rank_scores, 2, shares, 1)
    metric = AveragePrecision(NAMES)
    fill(metric, [0, 1, 2, 3])  # image 3 has none by itself
    assert first == second == {name: value.item() for name, value in metric.compute().items()}
    assert first["map"] > 0


def test_without_a_package_that_computes_it(monkeypatch):
    monkeypatch.setattr(module, "find_spec", lambda package: None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'lightning-apps\[dense\]'"):
        AveragePrecision()
    monkeypatch.setattr(module, "find_spec", lambda package: package == "pycocotools" or None)
    assert AveragePrecision().backend == "pycocotools"
