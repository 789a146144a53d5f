"""A run as it grows, read from its folder."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from made_run import write_run

from mlxlora_core.errors import DataError
from mlxlora_core.runs import live

LOG = "metrics.jsonl"


def line(step: int, kind: str = "train", **more: Any) -> str:
    return json.dumps({"kind": kind, "step": step, "loss": 1.5, **more}) + "\n"


def steps(told: dict[str, Any]) -> list[tuple[str, int]]:
    return [(report["kind"], report["step"]) for report in told["reports"]]


def test_each_look_tells_what_is_new(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a", steps=20, done=3)
    reading = live.Reading(folder)
    first = live.look(reading)
    wanted = [json.loads(text) for text in (folder / LOG).read_text().splitlines()]
    assert first["anew"] and sorted(steps(first)) == sorted((w["kind"], w["step"]) for w in wanted)
    again = live.look(reading, first["cursor"])
    assert (again["reports"], again["anew"]) == ([], False)
    with open(folder / LOG, "a") as log:
        log.write(line(21) + line(21, "valid") + '{"kind": "tra')
    more = live.look(reading, again["cursor"])
    assert steps(more) == [("train", 21), ("valid", 21)] and not more["anew"]
    with open(folder / LOG, "a") as log:
        log.write('in", "step": 22, "loss": 1.0}\n' + line(23, loss=None) + "no json\n")
    assert steps(live.look(reading, more["cursor"])) == [("train", 22)], "torn before, whole now"


def test_a_log_that_was_begun_anew_is_told_whole(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a", steps=20, done=3)
    cursor = live.look(live.Reading(folder))["cursor"]
    (folder / "new").write_text(line(1))
    os.replace(folder / "new", folder / LOG)  # as a training does that goes on from a step
    told = live.look(live.Reading(folder), cursor)
    assert told["anew"] and steps(told) == [("train", 1)]
    (folder / LOG).write_text(line(1))
    shorter = live.look(live.Reading(folder), f"{(folder / LOG).stat().st_ino}:999")
    assert shorter["anew"] and steps(shorter) == [("train", 1)]


def test_nothing_is_lost_where_what_was_read_is_not_read_again(tmp_path: Path) -> None:
    """However long ago that was: lines that came since, and a log that was begun anew."""
    folder = write_run(tmp_path / "a", steps=20, done=3)
    reading = live.Reading(folder)
    cursor = live.look(reading)["cursor"]
    reading._due = float("inf")  # as after a log that takes minutes to read
    with open(folder / LOG, "a") as log:
        log.write(line(21))
    late = live.look(reading)  # another page, which has no cursor yet
    assert late["anew"] and ("train", 21) not in steps(late)
    assert steps(live.look(reading, late["cursor"])) == [("train", 21)]
    (folder / "new").write_text(line(1))
    os.replace(folder / "new", folder / LOG)
    told = live.look(reading, cursor)
    assert told["anew"] and steps(told) == [("train", 1)]
    with open(folder / LOG, "a") as log:
        log.write(line(2))
    assert steps(live.look(reading, told["cursor"])) == [("train", 2)]


@pytest.mark.parametrize("cursor", ["x", ":", "1:-1", "1:" + "9" * 30, "\u0663:\u0663", "a" * 1000])
def test_an_odd_cursor_is_none(tmp_path: Path, cursor: str) -> None:
    folder = write_run(tmp_path / "a", steps=20, done=3)
    assert live.look(live.Reading(folder), cursor)["anew"]


def test_where_it_stands(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a", steps=40, done=3)
    lines = (folder / LOG).read_text().splitlines(keepends=True)
    (folder / LOG).write_text("".join(text for text in lines if json.loads(text)["step"] <= 10))
    told = live.look(live.Reading(folder))
    assert (told["stage"], told["run"]["step"], told["run"]["steps"]) == ("train", 10, 40)
    done = live.look(live.Reading(write_run(tmp_path / "b", steps=20)))
    assert done["stage"] is None
    with pytest.raises(DataError, match="no run folder"):
        live.look(live.Reading(tmp_path))


def test_what_it_says_comes_from_the_stages_and_from_on_the_way(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a", steps=20, questions=1)
    said = {"kind": "sample", "step": 10, "prompt": "p", "text": "t"}
    (folder / "samples.jsonl").write_text(json.dumps(said) + "\n{}\n" + json.dumps(said)[:20])
    told = live.samples(folder)
    assert [(one["step"], one["text"][:6]) for one in told][-1] == (10, "t")
    assert [one["step"] for one in told] == ["before", "after", 10]


def test_rows_say_which_part_counts(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a", steps=20)
    (folder / "data").mkdir()
    rows = [
        {"text": "all"},
        {"prompt": "p", "completion": "c"},
        {"messages": [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]},
    ]
    (folder / "data" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    counted = [[(part["text"], part["counts"]) for part in row] for row in live.rows(folder)]
    assert counted == [[("all", True)], [("p", True), ("c", True)], [("u", True), ("a", True)]]
    recipe = (folder / "recipe.toml").read_text().replace("[train]", "[train]\nmask_prompt = true")
    (folder / "recipe.toml").write_text(recipe)
    counted = [[(part["text"], part["counts"]) for part in row] for row in live.rows(folder)]
    assert counted[1:] == [[("p", False), ("c", True)], [("u", False), ("a", True)]]
    (folder / "data" / "train.jsonl").write_text('{"text": 1}\n[\n')
    assert live.rows(folder) == []


def test_only_runs_that_stand_beside_it_are_told_of(tmp_path: Path) -> None:
    place = tmp_path / "runs"
    for name, count in (("b", 20), ("a", 40)):
        write_run(place / name, name=name, steps=count)
    write_run(tmp_path / "elsewhere", steps=20)
    runs = live.beside(place / "b")
    assert [run["path"] for run in runs] == ["b", "a"], "this one first"
    assert [run["differing"]["train.iters"] for run in runs] == [20, 40]
    assert len(live.curves(place / "b", "a")["train"]) == 40
    for name in ("../elsewhere", "elsewhere", "", "..", "/etc", "a/../../elsewhere", "\0"):
        with pytest.raises(DataError, match="no such run"):
            live.curves(place / "b", name)


def test_a_log_is_not_read_again_and_again_but_a_change_of_the_record_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_run(tmp_path / "a", steps=20, done=3)
    read: list[Path] = []
    true_read = live.read_facts
    monkeypatch.setattr(live, "read_facts", lambda path: (read.append(path), true_read(path))[1])
    reading = live.Reading(folder)
    reading.told()
    with open(folder / LOG, "a") as log:
        log.write(line(21))
    reading.told()
    assert len(read) == 1
    record = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps({**record, "ended": "failed: it did"}))
    assert live.look(reading)["run"]["fault"] == "it did" and len(read) == 2
