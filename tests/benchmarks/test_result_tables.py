"""Tables of long benchmarks: what goes on with them, and what they count."""

import subprocess
import sys

import pytest

from benchmarks.result_tables import append, check_settings, read, run


def test_a_finished_command_leaves_no_time_to_the_next(tmp_path):
    log, spent = tmp_path / "some.log", tmp_path / "some.seconds"
    spent.write_text("1000")  # of a start that was ended
    with pytest.raises(subprocess.CalledProcessError):
        run([sys.executable, "-c", "raise SystemExit(1)"], log)
    assert float(spent.read_text()) > 1000
    assert 1000 <= run([sys.executable, "-c", "print('done')"], log) < 1500
    assert run([sys.executable, "-c", "print('again')"], log) < 500
    assert log.read_text().split() == ["done", "again"]


def test_a_table_of_other_settings_is_refused(tmp_path):
    path = tmp_path / "results.csv"
    check_settings(read(path), path, "--some")
    append(path, {"seed": 0, "settings": "--some"})
    check_settings(read(path), path, "--some")
    with pytest.raises(SystemExit, match=r"results.csv was filled with the settings '--some', not ''; give another"):
        check_settings(read(path), path, "")


def test_a_table_without_settings_is_refused(tmp_path):
    path = tmp_path / "results.csv"
    append(path, {"seed": 0, "miou": 0.5})
    with pytest.raises(SystemExit, match=r"results.csv has no column 'settings', .*; give another --out"):
        check_settings(read(path), path, "")
