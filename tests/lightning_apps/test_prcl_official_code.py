"""What `prcl/official_code.yaml` takes from the released code is what that code computes."""

import math

import numpy as np
import pytest
import yaml

from lightning_apps.config_files import SHIPPED

TEXT = (SHIPPED / "prcl/official_code.yaml").read_text()
SETTINGS = yaml.safe_load(TEXT)["model"]["init_args"]


def test_thresholds_are_those_of_confidences_that_went_through_8_bits():
    confidence = np.concatenate([np.linspace(0, 1, 100_001), np.arange(256) / 255]).astype(np.float32)
    floored = np.floor(np.round(confidence.astype(np.float64) * 255, 4)) / 255
    for name, threshold in (("unsupervised_threshold", 0.97), ("weak_threshold", 0.7)):
        assert np.array_equal(confidence >= np.float32(SETTINGS[name]), floored >= threshold), name
        assert not np.array_equal(confidence >= threshold, floored >= threshold), "it makes a difference"


def test_the_similarity_is_the_mean_at_temperature_100():
    assert (SETTINGS["method"], SETTINGS["mls_reduction"], SETTINGS["temperature"]) == ("prcl", "mean", 100)


@pytest.mark.parametrize(("labels", "batch", "ranks", "steps"), [(662, 2, 8, 84), (662, 2, 1, 993), (150, 6, 1, 325)])
def test_lengths_of_an_epoch_that_the_comment_gives_are_those_of_the_code(labels, batch, ranks, steps):
    """Section 8: as many whole passes over the labelled loader as fit into 2000 pictures."""
    loader = math.ceil(math.ceil(labels / ranks) / batch)
    assert int(2000 / batch / ranks / loader) * loader == steps
    assert f"--data.images_per_epoch {steps * batch * ranks}" in TEXT, "steps are images // (batch * processes)"
