"""The list of apps, the shadowing check and the order of callbacks."""

import subprocess
import sys

import pytest
from lightning.pytorch import Callback

import lightning_apps
from callbacks import DifficultyRanking, EMATarget, GracefulStop
from lightning_apps.__main__ import describe, find_apps
from lightning_apps.app import App
from lightning_apps.bolt import APP
from lightning_apps.cli import sort_callbacks


def test_every_app_has_one_line():
    assert "bolt" in [app.name for app in find_apps()]
    for app in find_apps():
        assert "\n" not in describe(app)
        assert app.summary in describe(app)


def test_a_missing_extra_is_named():
    app = App("x", "does x", APP.model, APP.data, requires={"no_such_package": "extra_x"})
    assert "lacks no_such_package: pip install 'lightning-apps[extra_x]'" in describe(app)


@pytest.mark.parametrize("name", ["callbacks", "modules", "datamodules", "configs"])
def test_a_folder_that_shadows_a_package_is_named(tmp_path, name):
    package = tmp_path / name
    package.mkdir()
    (package / "__init__.py").write_text("")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import lightning_apps"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=_root(), check=False)
    assert done.returncode == 1
    assert f"package '{name}' of lightning-apps is shadowed by {package}" in done.stderr
    assert "Rename that folder" in done.stderr


def _root():
    return next(iter(lightning_apps.__path__)).rsplit("/", 1)[0]


def test_callbacks_that_add_parameters_come_before_those_that_copy_the_module():
    plain = Callback()
    given = [GracefulStop(), EMATarget("a", "b"), plain, DifficultyRanking()]
    ordered = [type(callback) for callback in sort_callbacks(given)]
    assert ordered == [DifficultyRanking, EMATarget, Callback, GracefulStop]


def test_heavy_packages_wait_until_they_are_needed():
    heavy = ("timm", "albumentations", "wandb", "sklearn", "pandas", "cv2", "torch_geometric", "onnxruntime")
    code = f"import sys, lightning_apps.bolt; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=_root(), check=True)
    assert done.stdout.strip() == "[]"
