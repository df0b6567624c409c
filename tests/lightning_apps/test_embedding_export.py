"""Tables of embeddings in files: what is refused, and what an interruption leaves."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from lightning_apps.embedding_export import check_network_formats, export_embeddings
from lightning_apps.errors import UserError
from tests.modules.small_graph import ENTITIES, RELATIONS, base_model

NAMES = SimpleNamespace(
    entity_names=[f"e{row}" for row in range(ENTITIES)], relation_names=[f"r{row}" for row in range(RELATIONS)]
)


def test_formats_of_tables_are_not_for_networks():
    with pytest.raises(
        UserError, match=r"^--formats npz, parquet: is for tables of embeddings, but SimpleNamespace is a"
    ):
        check_network_formats(SimpleNamespace(), ["onnx", "npz", "parquet", "safetensors"])
    check_network_formats(SimpleNamespace(), ["onnx", "safetensors"])


def test_names_are_needed_and_as_many_as_rows(tmp_path):
    with pytest.raises(UserError, match="needs the data, for the names"):
        export_embeddings(base_model(), None, {}, tmp_path)
    fewer = SimpleNamespace(entity_names=NAMES.entity_names[1:], relation_names=NAMES.relation_names)
    with pytest.raises(UserError, match=f"^entities: {ENTITIES} rows for {ENTITIES - 1} names"):
        export_embeddings(base_model(), fewer, {}, tmp_path)
    assert not list(tmp_path.iterdir())


def test_all_files_may_be_read_by_those_whom_the_system_lets(tmp_path):
    (tmp_path / "other").write_text("")
    paths = export_embeddings(base_model(), NAMES, {}, tmp_path, ["npz", "parquet", "safetensors"]).values()
    assert {path.stat().st_mode for path in paths} == {(tmp_path / "other").stat().st_mode}


def test_an_interruption_leaves_what_was_there(tmp_path, monkeypatch):
    first, second = base_model(seed=0), base_model(seed=1)
    export_embeddings(first, NAMES, {}, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert before.keys() == {"embeddings.npz", "embeddings.safetensors", "export.json"}

    def interrupted(file, **arrays):
        file.write(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(np, "savez", interrupted)
        with pytest.raises(KeyboardInterrupt):
            export_embeddings(second, NAMES, {}, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    export_embeddings(second, NAMES, {}, tmp_path, ["npz"])
    with np.load(tmp_path / "embeddings.npz") as file:
        assert np.array_equal(file["entities"], second.tables.entities.detach().numpy())
        assert file["relation_names"].tolist()[RELATIONS:] == [f"r{row}_reverse" for row in range(RELATIONS)]
    assert json.loads((tmp_path / "export.json").read_text())["files"] == {"npz": "embeddings.npz"}
