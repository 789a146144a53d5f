"""What observers have left with TensorBoard, W&B and trackio, read back by the libraries themselves."""

from __future__ import annotations

import importlib
import json
import time
from pathlib import Path
from typing import Any

import pytest

Curves = dict[str, list[tuple[int, float]]]


def need(library: str, test: str) -> None:
    """Skip a test whose library is not here."""
    for name in (library, *(["tensorboard"] if library == "tensorboardX" else [])):
        pytest.importorskip(name, reason=f"needs {name}: pip install {name}")


def surroundings(folder: Path) -> dict[str, str]:
    """Environment variables by which nothing is sent, and all is kept in ``folder``."""
    names = ("WANDB_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR", "TRACKIO_DIR")
    return {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline"} | {
        name: str(folder / name.lower()) for name in names
    }


def tensorboard(folder: Path) -> Curves:
    """The curves in the event files of a run folder, as TensorBoard shows them."""
    return {
        tag: [(e.step, e.value) for e in events.Scalars(tag)]
        for events in [accumulated(folder)]
        for tag in events.Tags()["scalars"]
    }


def accumulated(folder: Path) -> Any:
    """The event files of a run folder, read by TensorBoard's own reader."""
    from tensorboard.backend.event_processing import event_accumulator

    events = event_accumulator.EventAccumulator(
        str(folder / "metrics.tensorboard"), size_guidance={"scalars": 0, "tensors": 0}
    )
    return events.Reload()


def wandb_records(folder: Path) -> list[Any]:
    """The records in all files of W&B of a run folder, the oldest file first.

    Its format is that of LevelDB's log: after 7 bytes, blocks of 32 KiB that hold
    parts of records, each behind a checksum (4 bytes), a length (2) and a kind (1;
    1 and 4 end a record).
    """
    found = []
    for path in sorted(folder.glob("wandb/*run-*/*.wandb")):  # their names begin with the time
        records, end = wandb_file(path), time.monotonic() + 20
        while not any(each.WhichOneof("record_type") == "exit" for each in records):
            assert time.monotonic() < end, f"{path} has no end"
            time.sleep(0.05)  # a process of W&B's own writes it
            records = wandb_file(path)
        found += records
    return found


def wandb_file(path: Path) -> list[Any]:
    """The records that a file of W&B has by now."""
    record = importlib.import_module("wandb.proto.wandb_internal_pb2").Record
    data, at, held, found = path.read_bytes(), 7, b"", []
    while at + 7 <= len(data):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        size, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        if at + 7 + size > len(data):
            break
        held += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):
            found.append(record.FromString(held))
            held = b""
    return found


def wandb(folder: Path) -> Curves:
    """The curves of the newest run of W&B in a run folder."""
    records = wandb_records(folder)
    runs = [record.run.run_id for record in records if record.WhichOneof("record_type") == "run"]
    curves: Curves = {}
    run = ""
    for record in records:
        kind = record.WhichOneof("record_type")
        if kind == "run":
            run = record.run.run_id
        elif kind == "history" and run == runs[-1]:
            row = {(i.key or ".".join(i.nested_key)): json.loads(i.value_json) for i in record.history.item}
            for name, value in row.items():
                if "/" in name:
                    curves.setdefault(name, []).append((row["step"], value))
    return curves


def trackio(folder: Path) -> Curves:
    """The curves of the run of trackio that belongs to a run folder."""
    storage = importlib.import_module("trackio.sqlite_storage").SQLiteStorage
    name = f"a run-{json.loads((folder / 'metrics.trackio.json').read_text())['run']}"
    curves: Curves = {}
    for row in storage.get_logs("mlxlora", name):
        for key, value in row.items():
            if "/" in key:
                curves.setdefault(key, []).append((row["step"], value))
    return curves
