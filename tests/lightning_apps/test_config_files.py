"""Configurations by bare name, and the errors of a wrong one."""

from pathlib import Path

import pytest

from lightning_apps.config_files import SHIPPED, find_config, read_config, shipped_names
from lightning_apps.errors import UserError


def test_bare_names_are_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("bolt.yaml", "bolt"):
        found = find_config(name, "bolt")
        assert found.path == SHIPPED / "bolt.yaml"
        assert found.shipped


def test_the_working_folder_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("bolt.yaml").write_text("app: bolt\n")
    found = find_config("bolt.yaml", "bolt")
    assert found.path == tmp_path / "bolt.yaml"
    assert not found.shipped


def test_an_unknown_name_lists_what_there_is_and_the_nearest():
    with pytest.raises(UserError, match=r"--config bolt\.yml: no such file in .*") as error:
        find_config("bolt.yml", "bolt")
    assert "Did you mean bolt.yaml?" in str(error.value)
    for name in shipped_names("bolt"):
        assert name in str(error.value)


def test_a_configuration_of_another_app_names_that_app(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("app: emo\nmodel: {}\n")
    with pytest.raises(UserError, match=r"configuration of the app 'emo', not of 'bolt'.*lightning_apps\.emo fit"):
        read_config(path, "bolt")


@pytest.mark.parametrize(
    ("text", "message"), [("a: [1", "not a YAML file"), ("- 1\n- 2\n", "expected a mapping of settings, found list")]
)
def test_what_is_no_configuration_is_refused(tmp_path, text, message):
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=message) as error:
        read_config(path, "bolt")
    assert str(path) in str(error.value)
