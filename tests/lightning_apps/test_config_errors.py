"""Complaints of the real parser, in the words a person gets."""

import pytest

from lightning_apps.ankge import APP as ANKGE
from lightning_apps.bolt import APP
from lightning_apps.cli import AppCLI
from lightning_apps.errors import UserError


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model.learning_rat", "1"], r"unknown key 'model\.learning_rat': modules\.bolt\.BOLT takes no"),
        (["--model.mixx", "1"], r"unknown key 'model\.mixx'.* Nearest valid key: model\.mix$"),
        (
            ["--callbacks.ema.momentun", "1"],
            r"'callbacks\.ema\.momentun'.* Nearest valid key: callbacks\.ema\.momentum",
        ),
        (["--callbacks.emma.momentum", "1"], r"unknown option --callbacks\.emma\.momentum \(value 1\)"),
        (["--trainer.max_epoch", "3"], r"unknown option --trainer\.max_epoch \(value 3\)\..*key: trainer\.max_epochs$"),
        (["--trainer.max_epochs", "x"], r"trainer\.max_epochs: expected int, got 'x'"),
        (["--model.lr", "fast"], r"model\.lr: expected float, got 'fast'"),
        (["--model", "Nonsense"], r"model.*Nonsense"),
        (["--trainer.logger", "tensorbord"], r"--trainer\.logger tensorbord: expected one of .*tensorboard"),
        (["--config", "nowhere.yaml"], r"--config nowhere\.yaml: no such file"),
        (["--config"], r"--config needs a value"),
    ],
)
def test_message(arguments, message, tmp_path):
    with pytest.raises(UserError, match=message) as error:
        AppCLI(APP, ["fit", "--run.root", str(tmp_path), *arguments])
    assert "usage:" not in str(error.value)
    assert not list(tmp_path.rglob("*.json")), "a run that never started leaves nothing behind"


def test_a_wrong_key_in_a_file_names_the_nearest(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("trainer: {max_epoch: 3}\n")
    with pytest.raises(UserError, match=r"unknown key 'trainer\.max_epoch'.*Nearest valid key: trainer\.max_epochs"):
        AppCLI(APP, ["fit", "--config", str(path), "--run.root", str(tmp_path)])


def test_an_argument_that_a_nested_class_lacks_is_named(tmp_path):
    arguments = ["--model.scoring", "modules.knowledge_graph.TransE", "--model.scoring.dimension", "5"]
    with pytest.raises(
        UserError, match=r"^model\.scoring\.margin: modules\.knowledge_graph\.TransE needs a value for it$"
    ):
        AppCLI(ANKGE, ["fit", "--run.root", str(tmp_path), *arguments])
