"""Reads what an offline W&B run has recorded."""

import json
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BLOCK, FILE_HEADER, RECORD_HEADER = 32768, 7, 7
WHOLE, LAST = 1, 4


def history(folder: Path, patience: float = 10.0) -> list[dict[str, Any]]:
    """Rows that the only, finished run below ``folder`` has logged; nested keys are joined by ``/``.

    ``finish()`` may return before W&B's own process has written the last records, hence the patience in seconds.
    """
    (path,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    deadline = time.monotonic() + patience
    while not (records := _read(path)) or records[-1][0] != "exit":
        if time.monotonic() > deadline:
            raise TimeoutError(f"{path} holds no record of the run's end")
        time.sleep(0.05)
    return [
        {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
        for kind, record in records
        if kind == "history"
    ]


def _read(path: Path) -> list[tuple[str, Any]]:
    from wandb.proto import wandb_internal_pb2

    records = []
    for data in _records(path.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        records.append((record.WhichOneof("record_type"), record))
    return records


def _records(data: bytes) -> Iterator[bytes]:
    """Records of a LevelDB log: pieces of (checksum, length, kind, content) that never cross a block's end."""
    position, content = FILE_HEADER, b""
    while position + RECORD_HEADER <= len(data):
        left = BLOCK - position % BLOCK
        if left < RECORD_HEADER:
            position += left
            continue
        _, length, kind = struct.unpack("<IHB", data[position : position + RECORD_HEADER])
        position += RECORD_HEADER
        content += data[position : position + length]
        position += length
        if kind in (WHOLE, LAST):
            yield content
            content = b""
