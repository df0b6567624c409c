"""What stands for a data set that is not at hand says the same as the data set."""

import shutil

import numpy as np
import pytest
from PIL import Image

from datamodules import ImageClassification, MedicalImages, ObjectDetection, SemanticSegmentation
from datamodules.readers.described import DescribedBoxes, DescribedImages, DescribedPictures
from tests.data_layouts import (
    save_image,
    write_ade20k,
    write_aptos,
    write_camvid,
    write_class_folders,
    write_coco,
    write_isic,
    write_mask_folder,
)

FACTS = ("class_names", "num_classes", "image_size", "in_channels", "main_metric", "mean", "std")
IMAGES = {
    "folder": (ImageClassification, write_class_folders),
    "isic2019": (MedicalImages, write_isic),
    "aptos2019": (MedicalImages, write_aptos),
}
PICTURES = {
    "ade20k": write_ade20k,
    "camvid": write_camvid,
    "folder": lambda root: write_mask_folder(root, ["a", "b", "c"]),
}


def elsewhere(module, root, folder):
    """The same options with the description, where the data is not."""
    for number in range(3):
        save_image(folder / f"{number}.png", number, (40, 36))
    options = dict(module.hparams) | {"predict_path": str(folder), "num_workers": 0}
    options["description"] = module.description
    shutil.rmtree(root)
    with pytest.raises(FileNotFoundError):
        type(module)(**options | {"description": None})
    return type(module)(**options)


@pytest.mark.parametrize("layout", IMAGES)
def test_images(tmp_path, layout):
    kind, write = IMAGES[layout]
    root = write(tmp_path / "data")
    module = kind(layout=layout, root=str(root))
    before = {name: getattr(module, name) for name in FACTS}
    table = module.reader.predictions(["a", "b"], np.eye(module.num_classes)[:2])
    other = elsewhere(module, root, tmp_path / "new")
    assert {name: getattr(other, name) for name in FACTS} == before
    assert other.reader.facts == module.reader.facts
    assert other.reader.predictions(["a", "b"], np.eye(module.num_classes)[:2]).equals(table)
    other.setup("predict")
    assert next(iter(other.predict_dataloader())).images.shape[0] == 3
    assert len(other.prediction_table(np.arange(3), np.ones((3, module.num_classes)))) == 3
    with pytest.raises(ValueError, match="the data set itself is not read"):
        other.setup("test")


@pytest.mark.parametrize("layout", PICTURES)
def test_pictures(tmp_path, layout):
    root = PICTURES[layout](tmp_path / "data")
    module = SemanticSegmentation(layout, root=str(root))
    names = (*FACTS, "palette", "flip")
    before = {name: getattr(module, name) for name in names}
    mask = np.array([[0, 1, 2, 255]], dtype=np.uint8)
    stored = module.mask_to_file(mask)
    other = elsewhere(module, root, tmp_path / "new")
    assert {name: getattr(other, name) for name in names} == before
    assert np.array_equal(other.mask_to_file(mask), stored)
    other.setup("predict")
    assert other.sample_ids() == ["0", "1", "2"]
    assert next(iter(other.predict_dataloader())).images.shape == (1, 3, 36, 40)
    with pytest.raises(ValueError, match="the data set itself is not read"):
        other.setup("test")


def test_boxes(tmp_path):
    root = write_coco(tmp_path / "data")
    module = ObjectDetection(root=str(root))
    ids = module.reader.category_ids
    other = elsewhere(module, root, tmp_path / "new")
    assert {name: getattr(other, name) for name in FACTS} == {name: getattr(module, name) for name in FACTS}
    assert other.reader.category_ids == ids
    other.setup("predict")
    size = Image.open(tmp_path / "new/0.png").size
    assert next(iter(other.predict_dataloader())).targets[0]["size"].tolist() == [size[1], size[0]]
    with pytest.raises(ValueError, match="the data set itself is not read"):
        other.setup("test")


@pytest.mark.parametrize("kind", [DescribedImages, DescribedPictures, DescribedBoxes])
def test_a_description_of_something_else(kind):
    with pytest.raises(ValueError, match="description has colour, expected '"):
        kind('{"colour": 1}')


def test_a_description_with_an_entry_that_nobody_knows():
    with pytest.raises(ValueError, match="description has smell, which SegmentationFacts does not know"):
        DescribedPictures('{"facts": {"class_names": ["a", "b"], "image_size": 33, "smell": 1}}')
