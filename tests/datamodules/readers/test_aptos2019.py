import numpy as np
import pytest

from datamodules.readers.aptos2019 import Aptos2019Reader


def test_the_challenge_files_are_read_as_they_are(aptos_folder):
    reader = Aptos2019Reader(str(aptos_folder))
    samples = reader.read()["all"]
    assert samples.labels.tolist() == [number % 5 for number in range(60)]
    assert samples.ids[11] == "00000000000b"
    assert samples.paths[11] == str(aptos_folder / "train_images" / "00000000000b.png")
    assert (reader.facts.main_metric, reader.facts.crop_border, len(reader.facts.class_names)) == ("kappa", True, 5)


@pytest.mark.parametrize(
    ("value", "shown"), [("5", "'5'"), ("-1", "'-1'"), ("2.0", "'2.0'"), ("", "an empty field"), ("mild", "'mild'")]
)
def test_a_diagnosis_outside_the_grades_is_named(aptos_folder, value, shown):
    table = aptos_folder / "train.csv"
    lines = table.read_text().splitlines()
    lines[7] = f"{lines[7].split(',')[0]},{value}"
    table.write_text("\n".join(lines))
    with pytest.raises(ValueError, match=r"train\.csv: column 'diagnosis' has ") as caught:
        Aptos2019Reader(str(aptos_folder)).read()
    assert f"has {shown}, expected a whole number 0..4 (row 7, line 8)" in str(caught.value)


def test_missing_images_are_counted(aptos_folder):
    (aptos_folder / "train_images" / "000000000003.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"train\.csv: 1 of 60 images are missing on disk: .*000000000003"):
        Aptos2019Reader(str(aptos_folder)).read()


def test_a_missing_table_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"train\.csv does not exist; layout 'aptos2019' needs it"):
        Aptos2019Reader(str(tmp_path))


def test_predictions_are_the_most_probable_grades(aptos_folder):
    probabilities = np.array([[0.1, 0.2, 0.5, 0.1, 0.1], [0.6, 0.1, 0.1, 0.1, 0.1]])
    table = Aptos2019Reader(str(aptos_folder)).predictions(["b", "a"], probabilities)
    assert table.to_csv(index=False) == "id_code,diagnosis\nb,2\na,0\n"
