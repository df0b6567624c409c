"""Anchors, box codec, losses and sizes of the detectors, against plain loops and published numbers."""

import math

import pytest
import torch
from torch.nn import functional
from torchvision.ops import box_iou

from modules.detection import Detector
from modules.detection.retinanet import CoarseLevels, PyramidAnchors, build_retinanet
from modules.detection.ssdlite import build_ssdlite, ssdlite_anchors
from modules.feature_backbones import FeatureBackbone
from tests.modules.boxes import BACKBONE, detector

MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.25, 0.3]


class Maps:
    """What an anchor generator looks at: the size of the padded batch and of its images."""

    def __init__(self, height, width, images=1):
        self.tensors = torch.zeros(images, 3, height, width)
        self.image_sizes = [(height, width)] * images


@pytest.mark.parametrize(
    ("size", "window", "ssdlite", "retinanet"),
    [("1m", None, 2_311_980, 10_479_244), ("2m", None, 3_342_716, None), ("5m", 10, 6_076_540, 14_440_508)],
)
def test_parameters_are_the_published_ones(size, window, ssdlite, retinanet):
    options = {"window_size": window} if window else None
    with torch.device("meta"):
        backbone = FeatureBackbone(f"emo_{size}", (-2, -1), options=options)
        network = build_ssdlite(backbone, 80, 320, MEAN, STD)
        assert sum(parameter.numel() for parameter in network.parameters()) == ssdlite
        if retinanet is not None:
            network = build_retinanet(FeatureBackbone(f"emo_{size}", (-3, -2, -1)), 80, MEAN, STD)
            assert sum(parameter.numel() for parameter in network.parameters()) == retinanet


def test_ssdlite_anchors_are_those_of_the_table():
    smallest, largest = (48, 100, 150, 202, 253, 304), (100, 150, 202, 253, 304, 320)
    expected = []
    for level, stride in enumerate((16, 32, 64, 107, 160, 320)):
        low, high = smallest[level], largest[level]
        side = math.ceil(320 / 2 ** (level + 4))
        for row in range(side):
            for column in range(side):
                x, y = (column + 0.5) * stride, (row + 0.5) * stride
                middle = math.sqrt(low * high)
                shapes = [(low, low), (middle, middle)]
                for ratio in (2, 1 / 2, 3, 1 / 3):
                    shapes.append((low * math.sqrt(ratio), low / math.sqrt(ratio)))
                expected += [(x - w / 2, y - h / 2, x + w / 2, y + h / 2) for w, h in shapes]
    levels = [torch.zeros(1, 1, side, side) for side in (20, 10, 5, 3, 2, 1)]
    anchors = ssdlite_anchors(320)(Maps(320, 320), levels)[0]
    assert anchors.shape == (6 * (400 + 100 + 25 + 9 + 4 + 1), 4)
    assert torch.allclose(anchors, torch.tensor(expected), atol=1e-3)


def test_retinanet_anchors_are_those_of_the_table():
    sides = ((9, 13), (5, 7), (3, 4), (2, 2), (1, 1))  # of 65 x 100 pixels: no multiples of the strides
    expected = []
    for stride, (height, width) in zip((8, 16, 32, 64, 128), sides, strict=True):
        for row in range(height):
            for column in range(width):
                for ratio in (0.5, 1.0, 2.0):  # height by width
                    for octave in range(3):
                        area = (4 * stride * 2 ** (octave / 3)) ** 2
                        w = math.sqrt(area / ratio)
                        x, y = column * stride, row * stride
                        expected.append((x - w / 2, y - w * ratio / 2, x + w / 2, y + w * ratio / 2))
    anchors = PyramidAnchors()(Maps(65, 100, images=2), [torch.zeros(2, 1, *side) for side in sides])
    assert len(anchors) == 2
    assert torch.allclose(anchors[1], torch.tensor(expected), atol=1e-3)


def test_levels_of_ssdlite_halve_and_start_as_published():
    network = detector(image_size=96, num_classes=9).network
    maps = list(network.backbone.eval()(torch.rand(1, 3, 96, 96)).values())
    assert [tuple(level.shape[1:]) for level in maps] == [
        (24, 6, 6), (288, 3, 3), (512, 2, 2), (256, 1, 1), (256, 1, 1), (128, 1, 1),
    ]  # fmt: skip
    norms = [module for module in network.head.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    norms += [module for module in network.backbone.extra.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    assert {(norm.eps, norm.momentum) for norm in norms} == {(1e-3, 0.03)}
    extra = torch.cat([p.flatten() for p in network.backbone.extra.parameters() if p.ndim == 4])
    head = torch.cat([p.flatten() for p in network.head.parameters() if p.ndim == 4])
    assert extra.std().item() == pytest.approx(0.03, rel=0.02)
    assert head.std().item() == pytest.approx(0.001, rel=0.02)
    assert network.transform.image_mean == [0.485, 0.456, 0.406]


def test_no_relu_between_the_coarse_levels():
    torch.manual_seed(0)
    levels = CoarseLevels(4, 8)
    last = torch.randn(1, 4, 8, 8)
    maps, names = levels([torch.zeros(1)], [torch.zeros(1), last], ["2"])
    p6 = functional.conv2d(last, levels.p6.weight, levels.p6.bias, stride=2, padding=1)
    assert names == ["2", "p6", "p7"]
    assert (p6 < 0).any()
    assert torch.equal(maps[1], p6)
    assert torch.equal(maps[2], functional.conv2d(p6, levels.p7.weight, levels.p7.bias, stride=2, padding=1))


def test_pyramid_strides_and_padding_to_a_multiple_of_32():
    network = detector("retinanet").network
    images, _ = network.transform([torch.rand(3, 70, 65), torch.rand(3, 33, 90)])
    assert images.tensors.shape == (2, 3, 96, 96)
    assert images.image_sizes == [(70, 65), (33, 90)]  # not resized
    maps = list(network.backbone.eval()(images.tensors).values())
    assert [tuple(level.shape[1:]) for level in maps] == [(256, side, side) for side in (12, 6, 3, 2, 1)]


def scenes():
    """Anchors, objects and random answers of a head, for two images of 64 pixels."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.rand(60, 2, generator=generator) * 64
    sides = 8 + torch.rand(60, 2, generator=generator) * 24
    anchors = torch.cat([centres - sides / 2, centres + sides / 2], dim=1)
    targets = [
        {"boxes": anchors[[3, 10, 50]] + torch.tensor([1.0, -1.0, 2.0, 1.0]), "labels": torch.tensor([1, 3, 2])},
        {"boxes": torch.tensor([[0.0, 0.0, 5.0, 60.0]]), "labels": torch.tensor([2])},
    ]
    return anchors, targets, torch.randn(2, 60, 4, generator=generator), generator


def overlap(first, second):
    width = min(first[2], second[2]) - max(first[0], second[0])
    height = min(first[3], second[3]) - max(first[1], second[1])
    shared = max(width, 0) * max(height, 0)
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (first, second)]
    return shared / (sum(areas) - shared)


def encode(box, anchor, deviations):
    sizes = [(values[2] - values[0], values[3] - values[1]) for values in (box, anchor)]
    (w, h), (wa, ha) = sizes
    dx = ((box[0] + box[2]) / 2 - (anchor[0] + anchor[2]) / 2) / wa
    dy = ((box[1] + box[3]) / 2 - (anchor[1] + anchor[3]) / 2) / ha
    raw = (dx, dy, math.log(w / wa), math.log(h / ha))
    return [value / deviation for value, deviation in zip(raw, deviations, strict=True)]


def matches(anchors, boxes, above, below, several):
    """Object of each anchor, -1 for background, -2 between; the best anchor of each object is matched in any case."""
    table = [[overlap(box, anchor) for box in boxes] for anchor in anchors]
    found = []
    for row in table:
        best = max(row)
        found.append(row.index(best) if best >= above else -1 if best < below else -2)
    for number in range(len(boxes)):
        best = max(row[number] for row in table)
        for place, row in enumerate(table):
            if row[number] == best:
                # With ties of its own an anchor keeps the object it overlaps with most (RetinaNet), not the last one.
                found[place] = row.index(max(row)) if several else number
    return found


def test_ssd_loss_with_hard_negatives_equals_a_plain_loop():
    network = detector(num_classes=3).network
    anchors, targets, regression, generator = scenes()
    logits = torch.randn(2, 60, 4, generator=generator)
    indices = []
    for target in targets:
        indices.append(network.proposal_matcher(box_iou(target["boxes"], anchors)))
    losses = network.compute_loss(
        targets, {"bbox_regression": regression, "cls_logits": logits}, [anchors, anchors], indices
    )
    box_sum, class_sum, positives = 0.0, 0.0, 0
    for image, target in enumerate(targets):
        found = matches(anchors.tolist(), target["boxes"].tolist(), 0.5, 0.5, several=False)
        negatives, count = [], 0
        for place, number in enumerate(found):
            values = logits[image, place].tolist()
            label = target["labels"][number].item() if number >= 0 else 0
            cross_entropy = math.log(sum(math.exp(value) for value in values)) - values[label]
            if number < 0:
                negatives.append(cross_entropy)
                continue
            count += 1
            class_sum += cross_entropy
            wanted = encode(target["boxes"][number].tolist(), anchors[place].tolist(), (0.1, 0.1, 0.2, 0.2))
            for value, goal in zip(regression[image, place].tolist(), wanted, strict=True):
                error = abs(value - goal)
                box_sum += 0.5 * error * error if error < 1 else error - 0.5
        class_sum += sum(sorted(negatives, reverse=True)[: 3 * count])
        positives += count
    assert positives == 4  # one of them below the threshold
    assert losses["bbox_regression"].item() == pytest.approx(box_sum / positives, rel=1e-4)
    assert losses["classification"].item() == pytest.approx(class_sum / positives, rel=1e-4)


def test_focal_loss_over_a_batch_equals_a_plain_loop():
    network = detector("retinanet", num_classes=3).network
    anchors, targets, regression, generator = scenes()
    logits = torch.randn(2, 60, 3, generator=generator)
    losses = network.compute_loss(targets, {"bbox_regression": regression, "cls_logits": logits}, [anchors, anchors])
    box_sum, class_sum, positives, between = 0.0, 0.0, 0, 0
    for image, target in enumerate(targets):
        found = matches(anchors.tolist(), target["boxes"].tolist(), 0.5, 0.4, several=True)
        for place, number in enumerate(found):
            if number == -2:
                between += 1
                continue
            for column, value in enumerate(logits[image, place].tolist()):
                probability = 1 / (1 + math.exp(-value))
                if number >= 0 and target["labels"][number].item() == column + 1:
                    class_sum -= 0.25 * (1 - probability) ** 2 * math.log(probability)
                else:
                    class_sum -= 0.75 * probability**2 * math.log(1 - probability)
            if number >= 0:
                positives += 1
                wanted = encode(target["boxes"][number].tolist(), anchors[place].tolist(), (1, 1, 1, 1))
                box_sum += sum(
                    abs(value - goal) for value, goal in zip(regression[image, place].tolist(), wanted, strict=True)
                )
    assert positives > 3
    assert between > 0
    assert losses["classification"].item() == pytest.approx(class_sum / positives, rel=1e-4)
    assert losses["bbox_regression"].item() == pytest.approx(box_sum / positives, rel=1e-4)


@pytest.mark.parametrize("name", ["ssdlite", "retinanet"])
def test_losses_without_objects_are_finite_and_have_gradients(name):
    module = detector(name).train()
    nothing = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
    losses = module.network([torch.rand(3, 64, 64)] * 2, [nothing, nothing])
    sum(losses.values()).backward()
    assert all(math.isfinite(value.item()) for value in losses.values())
    assert losses["bbox_regression"].item() == 0.0


@pytest.mark.parametrize("name", ["ssdlite", "retinanet"])
def test_answers_that_encode_an_object_are_decoded_to_it(name):
    """A head that is sure of one object at its best anchor gives that object, with its label, in pixels."""
    module = detector(name, num_classes=3).eval()
    network = module.network
    box = [10.0, 12.0, 45.0, 40.0]
    network.eval()
    images, _ = network.transform([torch.zeros(3, 64, 64)])
    maps = list(network.backbone(images.tensors).values())
    anchors = network.anchor_generator(images, maps)[0]
    place = max(range(len(anchors)), key=lambda number: overlap(box, anchors[number].tolist()))
    deviations = (0.1, 0.1, 0.2, 0.2) if name == "ssdlite" else (1, 1, 1, 1)
    regression = torch.zeros(1, len(anchors), 4)
    regression[0, place] = torch.tensor(encode(box, anchors[place].tolist(), deviations))
    logits = torch.full((1, len(anchors), 4 if name == "ssdlite" else 3), -12.0)
    logits[0, :, 0] = 12.0 if name == "ssdlite" else -12.0
    column = 2 if name == "ssdlite" else 1  # label 2: behind the background, or the second of the classes
    logits[0, place, 0], logits[0, place, column] = -12.0, 12.0
    network.head = Answers({"bbox_regression": regression, "cls_logits": logits})
    found = module([torch.zeros(3, 64, 64)])[0]
    assert found["labels"].tolist() == [2]
    assert found["scores"].item() == pytest.approx(1.0, abs=1e-4)
    assert found["boxes"][0].tolist() == pytest.approx(box, abs=1e-3)


class Answers(torch.nn.Module):
    def __init__(self, outputs):
        super().__init__()
        self.outputs = outputs

    def forward(self, maps):
        return self.outputs


@pytest.mark.parametrize("name", ["ssdlite", "retinanet"])
def test_boxes_are_exact_to_the_pixel_in_mixed_precision(name):
    """In bfloat16 the numbers above 256 are two apart."""
    module = detector(name, image_size=320, score_threshold=0.0).eval()
    kinds = []
    module.network.anchor_generator.register_forward_hook(lambda *call: kinds.append(call[-1][0].dtype))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found = module([torch.rand(3, 32, 320)])[0]
    assert kinds == [torch.float32]
    assert found["boxes"].dtype == torch.float32
    right = found["boxes"][:, 2]
    inner = right[(right > 256) & (right < 320)]
    assert len(inner) > 0
    assert (inner % 1 != 0).any()


def test_a_backbone_with_other_strides_is_refused():
    with pytest.raises(ValueError, match=r"have strides \[8, 16\]; SSDLite needs \[16, 32\]"):
        build_ssdlite(FeatureBackbone(BACKBONE, (2, 3)), 3, 64, MEAN, STD)
    with pytest.raises(ValueError, match=r"have strides \[4, 8, 16\]; RetinaNet needs \[8, 16, 32\]"):
        build_retinanet(FeatureBackbone(BACKBONE, (1, 2, 3)), 3, MEAN, STD)


def test_retinanet_freezes_the_first_stages_of_emo():
    module = Detector("retinanet", "emo_1m", frozen_stages=2, norm_eval=True, num_classes=2)
    frozen = {name.split(".")[4] for name, p in module.named_parameters() if not p.requires_grad}
    assert frozen == {"stage0", "stage1"}
    norms = [m for m in module.train().features.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert norms
    assert not any(norm.training for norm in norms)
