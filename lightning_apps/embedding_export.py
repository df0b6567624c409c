"""Write the vectors of entities and relations with their names: NumPy, Parquet and safetensors."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch import LightningDataModule, LightningModule
from torch import Tensor

from callbacks.atomic_files import atomic_text, atomic_write
from lightning_apps.errors import UserError

FORMATS = ("npz", "parquet", "safetensors")
DEFAULT_FORMATS = ("npz", "safetensors")
REVERSE = "_reverse"


def export_embeddings(
    module: LightningModule,
    datamodule: LightningDataModule | None,
    facts: dict[str, Any],
    folder: Path,
    formats: Sequence[str] | None = None,
) -> dict[str, Path]:
    """Export the tables of a module, and the few numbers that its score function has learned.

    Rows are in the order of the names: entities as the data numbers them, relations followed by their reverses, which
    are called ``<name>_reverse``.

    Args:
        module: A module with ``embedding_tables()``, whose names end in ``entities`` (E rows), ``relations`` (2R rows)
            or neither, and with ``tables.scoring`` that can ``describe()`` itself.
        datamodule: Has ``entity_names`` (E) and ``relation_names`` (R).
        facts: What the data says of itself; its hash of the names goes into each file that has room for it.
        folder: Where to write.
        formats: ``npz`` (tables and names in one file), ``parquet`` (a file for each table, a row is a name and a
            vector) and ``safetensors`` (tables, and in the metadata the score function); None for the first and last.

    Returns:
        The file of each format and table, and ``export.json`` that describes them.

    Raises:
        UserError: A format is for networks, there is no data to take names from, or a table has not as many rows as
            there are names.
    """
    formats = list(formats or DEFAULT_FORMATS)
    check_embedding_formats(module, formats)
    if datamodule is None:
        raise UserError("export of embeddings needs the data, for the names of entities and relations")
    tables = {name: tensor.detach().cpu().contiguous() for name, tensor in module.embedding_tables().items()}
    names = {"entities": list(datamodule.entity_names), "relations": both_directions(datamodule.relation_names)}
    for table, tensor in tables.items():
        if (rows := names_of(table, names)) is not None and len(rows) != len(tensor):
            raise UserError(f"{table}: {len(tensor)} rows for {len(rows)} names; give the data of the checkpoint")
    learned = {f"scoring_{name}": tensor.cpu() for name, tensor in module.tables.scoring.state_dict().items()}
    report = describe(module, facts, tables | learned)
    folder.mkdir(parents=True, exist_ok=True)
    written: dict[str, Path] = {}
    if "npz" in formats:
        written["npz"] = write_npz(folder / "embeddings.npz", tables | learned, names)
    if "parquet" in formats:
        for table, tensor in tables.items():
            rows = names_of(table, names) or list(map(str, range(len(tensor))))
            written[f"parquet {table}"] = write_parquet(folder / f"{table}.parquet", rows, tensor)
    if "safetensors" in formats:
        written["safetensors"] = write_safetensors(folder / "embeddings.safetensors", tables | learned, report)
    written["description"] = folder / "export.json"
    report["files"] = {kind: path.name for kind, path in written.items() if kind != "description"}
    atomic_text(written["description"], json.dumps(report, indent=2) + "\n")
    for path in written.values():
        print(f"wrote {path}")
    return written


def check_embedding_formats(module: LightningModule, formats: Sequence[str]) -> None:
    """Complain about formats that are for networks.

    Raises:
        UserError: There is one.
    """
    if others := [name for name in formats if name not in FORMATS]:
        raise UserError(
            f"--formats {', '.join(others)}: {type(module).__name__} is no network but tables of embeddings, which are "
            f"written as {', '.join(FORMATS)}"
        )


def check_network_formats(module: LightningModule, formats: Sequence[str]) -> None:
    """Complain about formats that are for embeddings alone.

    Raises:
        UserError: There is one.
    """
    if tables := [name for name in formats if name in FORMATS and name != "safetensors"]:
        raise UserError(
            f"--formats {', '.join(tables)}: is for tables of embeddings, but {type(module).__name__} is a network, "
            "which is written as onnx, safetensors or pt2"
        )


def both_directions(relation_names: Sequence[str]) -> list[str]:
    """Names of the R relations, and then of their reverses."""
    return [*relation_names, *(f"{name}{REVERSE}" for name in relation_names)]


def names_of(table: str, names: dict[str, list[str]]) -> list[str] | None:
    """What the rows of a table stand for, which the end of its name tells; None where they have no names."""
    return next((rows for kind, rows in names.items() if table.endswith(kind)), None)


def describe(module: LightningModule, facts: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Any]:
    """What a program needs to score triples with the tables."""
    told = {*facts, "scoring", "base"}
    settings = {name: value for name, value in module.hparams.items() if name not in told and not name.startswith("_")}
    if isinstance(getattr(module, "level_weights", None), Tensor):  # those that were chosen, if any were
        settings["level_weights"] = [round(weight, 6) for weight in module.level_weights.tolist()]
    return {
        "model": f"{type(module).__module__}.{type(module).__qualname__}",
        "scoring": module.tables.scoring.describe(),
        "settings": settings,
        "facts": facts,
        "shapes": {name: list(tensor.shape) for name, tensor in tensors.items()},
    }


def write_npz(path: Path, tensors: dict[str, Tensor], names: dict[str, list[str]]) -> Path:
    """Write tensors, and the names as ``entity_names`` and ``relation_names``, which NumPy reads without pickle."""
    arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
    arrays |= {"entity_names": np.array(names["entities"]), "relation_names": np.array(names["relations"])}
    with atomic_write(path) as file:
        np.savez(file, **arrays)
    return path


def write_parquet(path: Path, names: Sequence[str], table: Tensor) -> Path:
    """Write a table (n, width) as columns ``name`` and ``vector``, lists of that width."""
    import pyarrow as pa
    from pyarrow import parquet

    values = pa.array(table.reshape(-1).numpy())
    vectors = pa.FixedSizeListArray.from_arrays(values, table.shape[1])
    columns = {"name": pa.array(names, type=pa.string()), "vector": vectors}
    with atomic_write(path) as file:
        parquet.write_table(pa.table(columns), file)
    return path


def write_safetensors(path: Path, tensors: dict[str, Tensor], description: dict[str, Any]) -> Path:
    """Write tensors, with the description as JSON texts in the metadata."""
    from safetensors.torch import save

    metadata = {"format": "pt", **{name: json.dumps(value) for name, value in description.items()}}
    with atomic_write(path) as file:
        file.write(save(tensors, metadata))  # save_file makes a file that its owner alone may read
    return path
