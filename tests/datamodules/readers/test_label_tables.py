"""CSV tables that are not as they should be: what is told, and that nothing is guessed."""

import re

import pytest

from datamodules.readers.label_tables import read_table

COLUMNS = ("name", "label")


def read(folder, text):
    (folder / "table.csv").write_text(text)
    return read_table(folder / "table.csv", COLUMNS)


def test_names_with_commas_and_line_breaks_in_quotes(tmp_path):
    table = read(tmp_path, 'name,label\n"Paris, France",1\n\n"two\nlines", 2\nshort\n')
    assert table.to_dict("list") == {"name": ["Paris, France", "two\nlines", "short"], "label": ["1", "2", ""]}


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (
            "Paris, France,1\n",
            "line 2: 3 fields, more than the 2 of the header; put names with commas in double quotes",
        ),
        ("a,1\n\nParis, France,1\nb,2,3,4\n", "line 4: 3 fields, more than the 2 of the header"),
        ('"two\nlines",1\na,1,\n', "line 4: 3 fields, more than the 2 of the header"),
    ],
    ids=["first line", "later", "a comma at the end"],
)
def test_a_line_with_more_fields_than_the_header(tmp_path, lines, expected):
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path / 'table.csv'}, {expected}")):
        read(tmp_path, f"name,label\n{lines}")


@pytest.mark.parametrize("separator", [";", "\t"])
def test_other_separators(tmp_path, separator):
    with pytest.raises(
        ValueError, match=r"name, label missing; found .*, expected name, label; separate columns by com"
    ):
        read(tmp_path, separator.join(COLUMNS) + "\n" + separator.join("a1") + "\n")


def test_a_column_that_is_missing(tmp_path):
    with pytest.raises(ValueError, match=r"label missing; found name, other, expected name, label$"):
        read(tmp_path, "name,other\na,1\n")


def test_a_quote_that_is_not_closed(tmp_path):
    with pytest.raises(ValueError, match="is no CSV table"):
        read(tmp_path, 'name,label\n"a,1\n')
