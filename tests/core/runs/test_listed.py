"""Run folders listed: their states, their losses, and what differs."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from made_run import write_run

from mlxlora_core.errors import DataError
from mlxlora_core.files import lock
from mlxlora_core.runs.listed import DAMAGED, RUNNING, list_runs


def change(folder: Path, **values: object) -> None:
    record = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps({**record, **values}))


def test_each_state_is_told(tmp_path: Path) -> None:
    for name, done in (("a", 5), ("b", 3), ("c", 3), ("d", 3), ("e", 5)):
        write_run(tmp_path / name, name=name, steps=20, done=done)
    change(tmp_path / "c", ended="failed: a loss is not finite")
    (tmp_path / "e" / "run.json").write_text("{")
    with lock.hold(tmp_path / "d"):
        found = {run.path.name: run for run in list_runs([tmp_path])}
    states = {name: run.state for name, run in found.items()}
    assert states == {"a": "done", "b": "interrupted", "c": "failed", "d": RUNNING, "e": DAMAGED}
    assert found["c"].fault == "a loss is not finite" and "no JSON" in found["e"].fault
    assert (found["a"].step, found["a"].steps, found["a"].trained_tokens) == (20, 20, 8000)
    last = [json.loads(line) for line in (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()]
    assert found["a"].train_loss == [line["loss"] for line in last if line["kind"] == "train"][-1]
    assert found["a"].valid_loss == [line["loss"] for line in last if line["kind"] == "valid"][-1]
    assert found["a"].test_loss == 2.3
    assert found["a"].seconds == pytest.approx(20 / 3 + 10)


def test_only_what_differs_is_marked(tmp_path: Path) -> None:
    write_run(tmp_path / "a", steps=20)
    write_run(tmp_path / "b", steps=40)
    assert [dict(run.differing) for run in list_runs([tmp_path / "a", tmp_path / "b"])] == [
        {"train.iters": 20, "train.warmup": 2},
        {"train.iters": 40, "train.warmup": 4},
    ]
    assert [dict(run.differing) for run in list_runs([tmp_path / "a", tmp_path / "a"])] == [{}]


def test_the_lock_of_one_that_was_killed_is_no_running_run(tmp_path: Path) -> None:
    write_run(tmp_path / "a", steps=20, done=3)
    with lock.hold(tmp_path / "a"):
        held = (tmp_path / ".a.lock").read_text()
        assert lock.is_held(tmp_path / "a")
    gone = os.fork()
    if gone == 0:
        os._exit(0)
    os.waitpid(gone, 0)
    (tmp_path / ".a.lock").write_text(held.replace(f'"{os.getpid()}"', f'"{gone}"'))
    assert not lock.is_held(tmp_path / "a")
    for odd in ("", "[]", "{}", '{"process": "x"}', '{"process": "9999999999999999999999"}'):
        (tmp_path / ".a.lock").write_text(odd)
        assert not lock.is_held(tmp_path / "a")
    os.unlink(tmp_path / ".a.lock")
    os.mkfifo(tmp_path / ".a.lock")
    assert not lock.is_held(tmp_path / "a")


@pytest.mark.parametrize("damage", [b"", b"[]", b"\xff", b'{"mlxlora": 1}', b"[" * 100_000])
def test_a_damaged_folder_is_one_line(tmp_path: Path, damage: bytes) -> None:
    folder = write_run(tmp_path / "a", steps=20)
    (folder / "run.json").write_bytes(damage)
    (run,) = list_runs([tmp_path])
    assert run.state == DAMAGED and "\n" not in run.fault and run.fault
    for name in ("recipe.toml", "metrics.jsonl"):
        folder = write_run(tmp_path / f"b-{name}", steps=20)
        (folder / name).write_bytes(damage)
        assert len(list_runs([folder])) == 1


def test_it_looks_below_and_not_into_runs(tmp_path: Path) -> None:
    write_run(tmp_path / "x" / "a", steps=20)
    write_run(tmp_path / "x" / "a" / "inside", steps=20)
    write_run(tmp_path / "x" / "y" / "z" / "far", steps=20)
    os.symlink(tmp_path, tmp_path / "x" / "loop")
    assert [str(run.path.relative_to(tmp_path)) for run in list_runs([tmp_path])] == ["x/a"]
    with pytest.raises(DataError, match="there is no such folder"):
        list_runs([tmp_path / "not there"])
