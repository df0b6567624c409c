import json
import pickle
import random

import numpy as np
import pytest
import torch
from PIL import Image

from datamodules import ObjectDetection, SampleKey
from datamodules.box_augmentations import BoxPipeline
from datamodules.readers.camvid_boxes import components
from datamodules.readers.coco import CocoReader
from tests.data_layouts import write_coco

KEY = (0, 1, 0, 5, 0)


@pytest.fixture
def coco(tmp_path):
    return write_coco(tmp_path / "coco")


def annotations_of(root, part="train"):
    file = root / "annotations" / f"instances_{part}2017.json"
    return file, json.loads(file.read_text())


def change(root, edit, part="train"):
    """Edit the content of a file of annotations and write it back."""
    file, content = annotations_of(root, part)
    edit(content)
    file.write_text(json.dumps(content))
    return file


def data(root, **options):
    defaults = {"layout": "coco", "root": str(root), "image_size": 64, "batch_size": 2, "num_workers": 0}
    return ObjectDetection(**{**defaults, **options})


# ---- COCO


def test_facts_are_known_without_setup(coco):
    module = data(coco)
    assert module.class_names == ["person", "traffic light", "zebra"]
    assert module.num_classes == 3
    assert (module.image_size, module.in_channels, module.main_metric) == (64, 3, "map")
    assert module.mean == [0.485, 0.456, 0.406]
    assert module.reader.category_ids == [1, 10, 24]  # sorted, with gaps


def test_boxes_labels_and_crowds_are_those_of_the_file(coco):
    module = data(coco)
    module.setup("validate")
    samples = module.samples("val")
    _, content = annotations_of(coco, "val")
    labels = {1: 1, 10: 2, 24: 3}
    for row, image in enumerate(content["images"]):
        assert samples.ids[row] == image["id"]
        assert samples.sizes[row].tolist() == [image["height"], image["width"]]
        where = samples.objects(row)
        own = [entry for entry in content["annotations"] if entry["image_id"] == image["id"]]
        assert samples.labels[where].tolist() == [labels[entry["category_id"]] for entry in own]
        assert samples.iscrowd[where].tolist() == [entry["iscrowd"] for entry in own]
        assert samples.area[where].tolist() == pytest.approx([entry["area"] for entry in own])
        for box, entry in zip(samples.boxes[where].tolist(), own, strict=True):
            x, y, w, h = entry["bbox"]
            assert box == pytest.approx([x, y, x + w, y + h])


def test_training_leaves_out_crowds_and_images_without_objects(coco):
    module = data(coco, augment=False, batch_size=1, drop_last=False)
    module.setup("fit")
    rows = sorted(row for batch in module.train_dataloader() for row in batch.index.tolist())
    _, content = annotations_of(coco)
    single = {entry["image_id"] for entry in content["annotations"] if not entry["iscrowd"]}
    assert rows == [row for row, image in enumerate(content["images"]) if image["id"] in single]
    assert len(rows) == len(content["images"]) - 2
    for batch in module.train_dataloader():
        assert not batch.targets[0]["iscrowd"].any()
    seen = list(module.val_dataloader())
    assert sum(target["iscrowd"].sum() for batch in seen for target in batch.targets) == 1
    assert sorted(row for batch in seen for row in batch.index.tolist()) == list(range(len(module.samples("val"))))


def test_evaluation_squeezes_image_and_boxes_alike(coco):
    module = data(coco)
    module.setup("validate")
    samples = module.samples("val")
    for batch in module.val_dataloader():
        for image, target, row in zip(batch.images, batch.targets, batch.index.tolist(), strict=True):
            assert image.shape == (3, 64, 64)
            assert image.dtype == torch.float32
            assert 0 <= image.min() <= image.max() <= 1
            height, width = samples.sizes[row].tolist()
            assert target["size"].tolist() == [height, width]
            factors = torch.tensor([64 / width, 64 / height] * 2)
            expected = torch.from_numpy(samples.boxes[samples.objects(row)]) * factors
            assert torch.allclose(target["boxes"], expected, atol=1e-3)


def test_shorter_side_keeps_the_ratio_and_limits_the_longer(tmp_path):
    pipeline = BoxPipeline("shorter_side", 60, train=False)
    image, boxes, kept = pipeline(torch.zeros(3, 30, 40, dtype=torch.uint8), torch.tensor([[10.0, 5, 20, 15]]), KEY)
    assert image.shape == (3, 60, 80)
    assert boxes[0].tolist() == pytest.approx([20, 10, 40, 30])
    assert kept.tolist() == [0]
    image, _, _ = pipeline(torch.zeros(3, 30, 120, dtype=torch.uint8), torch.zeros(0, 4), KEY)
    assert image.shape == (3, 25, 100)  # 60 / 800 * 1333


def test_results_are_in_the_format_of_coco(coco):
    module = data(coco)
    module.setup("predict")
    found = {
        "boxes": torch.tensor([[1.0, 2.0, 11.0, 22.0]]),
        "labels": torch.tensor([3]),
        "scores": torch.tensor([0.5]),
    }
    nothing = {key: value[:0] for key, value in found.items()}
    results = module.coco_results([2, 0], [found, nothing])
    image = annotations_of(coco, "val")[1]["images"][2]["id"]
    assert results == [{"image_id": image, "category_id": 24, "bbox": [1.0, 2.0, 10.0, 20.0], "score": 0.5}]
    with pytest.raises(ValueError, match="the model predicts label 4, but the data set has 3 classes"):
        module.coco_results([0], [{**found, "labels": torch.tensor([4])}])


def test_a_folder_of_pictures_is_predicted(coco):
    module = data(coco, predict_path=str(coco / "val2017"), batch_size=3)
    module.setup("predict")
    batches = list(module.predict_dataloader())
    assert sum(len(batch.images) for batch in batches) == 4
    assert all(len(target["boxes"]) == 0 for batch in batches for target in batch.targets)
    first = {"boxes": torch.ones(1, 4), "labels": torch.tensor([1]), "scores": torch.ones(1)}
    result = module.coco_results([0], [first])[0]
    name = sorted(path.name for path in (coco / "val2017").iterdir())[0]
    assert result["file_name"] == name
    assert result["image_id"] == int(name.split(".")[0])
    assert module.picture(0).dtype == torch.uint8


def test_the_order_of_classes_can_be_given(coco):
    reader = CocoReader(str(coco), ["zebra", "person", "traffic light"])
    assert reader.category_ids == [24, 1, 10]
    first = reader.read("val")
    plain = CocoReader(str(coco)).read("val")
    assert first.labels.tolist() == [{1: 2, 2: 3, 3: 1}[label] for label in plain.labels.tolist()]


def test_repeated_images_are_augmented_on_their_own(coco):
    module = data(coco, repeat_factor=3)
    module.setup("fit")
    dataset = module.train_dataloader().dataset
    count = len(dataset) // 3
    assert len(dataset) == 3 * len(module.samples("train").trainable())
    first, again, other = dataset[0], dataset[SampleKey(0, 0, 0)], dataset[count]
    assert first[2] == other[2]
    assert torch.equal(first[0], again[0])
    assert not torch.equal(first[0], other[0])


# ---- augmentation


def scene():
    generator = torch.Generator().manual_seed(3)
    image = torch.randint(0, 256, (3, 48, 80), dtype=torch.uint8, generator=generator)
    return image, torch.tensor([[4.0, 6, 40, 40], [50, 10, 75, 30], [30, 20, 60, 45]])


def test_augmentation_is_a_function_of_the_key_and_leaves_random_states_alone():
    pipeline = BoxPipeline("fixed", 64, train=True)
    torch.manual_seed(7)
    random.seed(7)
    states = torch.get_rng_state(), random.getstate()
    first = pipeline(*scene(), KEY)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    torch.manual_seed(8)
    random.seed(8)
    copy = pickle.loads(pickle.dumps(pipeline))  # as a loading process gets it
    for own, other in zip(first, copy(*scene(), KEY), strict=True):
        assert torch.equal(own, other)
    assert any(not torch.equal(first[0], pipeline(*scene(), (0, 1, 0, place, 0))[0]) for place in (6, 7))


def test_boxes_follow_the_picture_through_the_augmentation():
    """A white rectangle on black stays within its box, which is as tight as pixels allow, whatever happens to it."""
    image = torch.zeros(3, 96, 96, dtype=torch.uint8)
    image[:, 30:60, 20:70] = 255
    pipeline = BoxPipeline("fixed", 96, train=True)
    seen = set()
    for place in range(40):
        changed, boxes, kept = pipeline(image, torch.tensor([[20.0, 30, 70, 60]]), (0, 0, 0, place, 0))
        assert kept.tolist() == [0]
        light = changed.amax(0)
        bright = (light >= (light.min() + light.max()) / 2).nonzero()
        left, top, right, bottom = boxes[0].tolist()
        assert abs(bright[:, 1].min() - left) < 3
        assert abs(bright[:, 1].max() + 1 - right) < 3
        assert abs(bright[:, 0].min() - top) < 3
        assert abs(bright[:, 0].max() + 1 - bottom) < 3
        seen.add(round(right - left))
    assert len(seen) > 10
    assert min(seen) < 25  # zoomed out
    assert max(seen) > 75  # cropped


def test_no_zoom_out_if_it_is_one():
    image, boxes = torch.full((3, 64, 64), 200, dtype=torch.uint8), torch.tensor([[10.0, 10, 50, 50]])
    plain = BoxPipeline("fixed", 64, train=True, fill=(0.0, 0.0, 0.0), zoom_out=1.0)
    zoomed = BoxPipeline("fixed", 64, train=True, fill=(0.0, 0.0, 0.0))
    keys = [(0, 0, 0, place, 0) for place in range(12)]
    assert all(plain(image, boxes, key)[0].min() > 0 for key in keys)
    assert any(zoomed(image, boxes, key)[0].min() == 0 for key in keys)


def test_loading_processes_give_the_same_batches(coco):
    loaders = []
    for workers in (0, 1):
        module = data(coco, num_workers=workers, seed=3)
        module.setup("fit")
        loaders.append(module.train_dataloader())
    list(loaders[0])  # a loader with workers starts, outside of a trainer, with the second pass
    for own, other in zip(*loaders, strict=True):
        assert torch.equal(own.index, other.index)
        assert all(torch.equal(a, b) for a, b in zip(own.images, other.images, strict=True))
        assert all(torch.equal(a["boxes"], b["boxes"]) for a, b in zip(own.targets, other.targets, strict=True))


def test_the_seed_is_that_of_the_run(coco, monkeypatch):
    monkeypatch.setenv("PL_GLOBAL_SEED", "12")
    assert data(coco).seed == 12
    assert data(coco, seed=3).seed == 3
    monkeypatch.delenv("PL_GLOBAL_SEED")
    assert data(coco).seed == 0


# ---- CamVid


def test_components_of_masks():
    mask = np.full((60, 80), 3, dtype=np.uint8)
    mask[5:25, 10:20] = 8  # a car of 200 pixels
    mask[25:35, 20:40] = 8  # touches it over a corner: the same object
    mask[40:50, 0:10] = 8  # exactly 100 pixels: too few
    mask[40:51, 60:80] = 10  # a bicyclist at the edge
    mask[0:4, 0:40] = 9  # a pedestrian of 160 pixels
    mask[30:40, 50:60] = 11  # void
    assert components(mask).tolist() == [
        [10, 5, 40, 35, 1, 0, 400],
        [0, 0, 40, 4, 2, 0, 160],
        [60, 40, 80, 51, 3, 0, 220],
    ]


def test_the_smallest_component_can_be_chosen():
    mask = np.zeros((60, 80), dtype=np.uint8)
    mask[:10, :10], mask[20:40, 20:40] = 8, 8
    assert [row[6] for row in components(mask, 99).tolist()] == [100, 400]
    assert [row[6] for row in components(mask, 399).tolist()] == [400]
    assert len(components(mask, 400)) == 0


def write_frames(root, parts=("train", "val", "test")):
    for part in parts:
        lines = []
        for number in range(3):
            mask = np.zeros((36, 48), dtype=np.uint8)
            if number:
                mask[5:25, 5 + number : 25] = 7 + number
            name = f"{part}_{number}"
            for folder in (part, f"{part}annot"):
                (root / folder).mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.full((36, 48, 3), 90, dtype=np.uint8)).save(root / part / f"{name}.jpg")
            Image.fromarray(mask).save(root / f"{part}annot" / f"{name}.png")
            lines.append(f"/SegNet/CamVid/{part}/{name}.png /SegNet/CamVid/{part}annot/{name}.png")
        (root / f"{part}.txt").write_text("\n".join(lines) + "\n")
    return root


def test_camvid_in_its_layout(tmp_path):
    module = data(write_frames(tmp_path), layout="camvid", drop_last=False)
    assert module.class_names == ["Car", "Pedestrian", "Bicyclist"]
    module.setup()
    assert [len(module.samples(part)) for part in ("train", "val", "test")] == [3, 3, 3]
    samples = module.samples("train")
    assert samples.boxes.tolist() == [[6, 5, 25, 25], [7, 5, 25, 25]]
    assert samples.labels.tolist() == [1, 2]
    assert samples.trainable().tolist() == [1, 2]
    assert sum(len(batch.images) for batch in module.test_dataloader()) == 3
    with pytest.raises(ValueError, match=r"class_names is .* layout 'camvid' has classes of its own"):
        data(tmp_path, layout="camvid", class_names=["Car"])


@pytest.mark.realdata
def test_camvid_itself(shared_data):
    module = data(shared_data / "camvid", layout="camvid", image_size=128, batch_size=4)
    module.setup()
    assert {part: len(module.samples(part)) for part in ("train", "val", "test")} == {
        "train": 367,
        "val": 101,
        "test": 233,
    }
    samples = module.samples("val")
    assert (samples.area > 100).all()
    assert (samples.boxes[:, 2:] > samples.boxes[:, :2]).all()
    assert (samples.boxes[:, 2:] <= [480, 360]).all()
    batch = next(iter(module.train_dataloader()))
    assert [image.shape for image in batch.images] == [(3, 128, 128)] * 4


# ---- bad input


def test_missing_files(coco, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"--data.root '.*nowhere' does not exist"):
        data(tmp_path / "nowhere")
    (coco / "annotations" / "instances_train2017.json").unlink()
    module = data(coco)  # facts come from the other part
    with pytest.raises(FileNotFoundError, match=r"instances_train2017.json does not exist; --data.root is the folder"):
        module.setup("fit")
    (coco / "annotations" / "instances_val2017.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"instances_val2017.json does not exist"):
        data(coco)


def test_a_missing_picture(coco):
    victim = next((coco / "train2017").iterdir())
    victim.unlink()
    with pytest.raises(FileNotFoundError, match=rf"instances_train2017.json: 1 of 8 images are missing.*{victim.name}"):
        data(coco).setup("fit")


def test_a_broken_picture_and_one_of_another_size(coco):
    pictures = sorted((coco / "val2017").iterdir())
    pictures[0].write_bytes(b"no picture")
    module = data(coco)
    module.setup("validate")
    with pytest.raises(ValueError, match=rf"{pictures[0].name}: cannot be decoded"):
        list(module.val_dataloader())
    Image.new("RGB", (7, 9)).save(pictures[0])
    with pytest.raises(ValueError, match=rf"{pictures[0].name}: is 7 x 9 pixels, but its annotations are for"):
        list(module.val_dataloader())


def test_categories_outside_the_given_names(coco):
    with pytest.raises(ValueError, match=r"instances_val2017.json: categories zebra are not among --data.class_names"):
        data(coco, class_names=["person", "traffic light"])
    with pytest.raises(ValueError, match=r"--data.class_names: giraffe not among the categories of"):
        data(coco, class_names=["person", "traffic light", "zebra", "giraffe"])
    change(coco, lambda content: content["categories"].pop())
    with pytest.raises(ValueError, match=r"instances_train2017.json: its categories differ"):
        data(coco).setup("fit")


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("image_id", 999, r"annotation 102 belongs to image 999, which the file does not list"),
        ("category_id", 2, r"annotation 102 has category 2, which is not among the file's categories"),
        ("bbox", [5, 5, 90, 10], r"annotation 102 has the box \[5, 5, 90, 10\] .* ends outside image"),
        ("bbox", [-9, 5, 20, 10], r"annotation 102 has the box \[-9, 5, 20, 10\] .* ends outside image"),
    ],
)
def test_annotations_that_do_not_fit(coco, field, value, message):
    change(coco, lambda content: content["annotations"][1].update({field: value}))
    with pytest.raises(ValueError, match=rf"instances_train2017.json: {message}"):
        data(coco).setup("fit")


def test_boxes_of_no_size_are_left_out_and_told(coco):
    def edit(content):
        content["annotations"][0]["bbox"] = [3, 3, 0, 10]
        content["annotations"][1]["bbox"] = [3, 3, 10, -4]

    change(coco, edit)
    before = len(annotations_of(coco)[1]["annotations"])
    module = data(coco)
    with pytest.warns(UserWarning, match=r"2 boxes without width or height left out: annotation 101, 102"):
        module.setup("fit")
    assert len(module.samples("train").boxes) == before - 2


def test_a_box_that_ends_a_little_outside_is_cut(coco):
    change(coco, lambda content: content["annotations"][0].update({"bbox": [-0.5, 2, 20, 10]}))
    module = data(coco)
    module.setup("fit")
    assert module.samples("train").boxes[0].tolist() == [0, 2, 19.5, 12]


def test_an_empty_training_set(coco):
    change(coco, lambda content: content.update(annotations=[]))
    with pytest.raises(ValueError, match=r"none of the 8 training images has an object to learn from"):
        data(coco).setup("fit")


def test_a_file_that_is_no_json_and_one_of_another_kind(coco):
    file = change(coco, lambda content: content.pop("categories"), "val")
    with pytest.raises(
        ValueError, match=r"instances_val2017.json: has no categories; expected a file of COCO instances"
    ):
        data(coco)
    file.write_text("{")
    with pytest.raises(ValueError, match=r"instances_val2017.json: is no JSON"):
        data(coco)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size": 16}, "image_size is 16, expected 32 or more"),
        ({"repeat_factor": 0}, "repeat_factor is 0, expected 1 or more"),
        ({"zoom_out": 0.5}, r"zoom_out is 0.5, expected 1 \(none\) or more"),
        ({"min_pixels": -1}, "min_pixels is -1, expected 0 or more"),
        ({"resize": "crop"}, "resize is 'crop', expected fixed or shorter_side"),
        ({"layout": "voc"}, "layout is 'voc', expected coco or camvid"),
        ({"mean": [0.5]}, "mean has 1 values, expected one per channel"),
        ({"std": [0.5, 0.5, 0.0]}, "std is .* expected values above 0"),
    ],
)
def test_values_out_of_range(coco, options, message):
    with pytest.raises(ValueError, match=message):
        data(coco, **options)
