import numpy as np
from sklearn.datasets import load_digits

from datamodules.readers.digits import DigitsReader


def test_all_digits_with_their_labels():
    samples = DigitsReader().read()["all"]
    digits = load_digits()
    assert samples.pixels.shape == (1797, 8, 8, 1)
    assert np.array_equal(samples.labels, digits.target)
    assert np.abs(samples.pixels[..., 0] - digits.images / 16 * 255).max() <= 0.5
    assert (samples.pixels.min(), samples.pixels.max()) == (0, 255)


def test_mean_and_deviation_are_those_of_the_pixels():
    pixels = DigitsReader().read()["all"].pixels / 255
    assert abs(pixels.mean() - DigitsReader.facts.mean[0]) < 1e-4
    assert abs(pixels.std() - DigitsReader.facts.std[0]) < 1e-4
