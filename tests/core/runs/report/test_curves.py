"""The curves of a report: what is read of a log, and what is left of a long one."""

from __future__ import annotations

import json
import random
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from made_run import write_run

from mlxlora_core.errors import DataError
from mlxlora_core.runs.report import write_report
from mlxlora_core.runs.report.curves import POINTS, read_curves, thinned
from mlxlora_core.training.events import TrainReport, report_line

FIGURES = ("loss", "grad_norm")


def curve(count: int, seed: int = 0) -> list[dict[str, Any]]:
    draw = random.Random(seed)
    return [{"step": i, "loss": draw.gauss(0, 1), "grad_norm": draw.random()} for i in range(1, count + 1)]


@pytest.mark.parametrize("count", [0, 1, 2, POINTS - 1, POINTS])
def test_a_curve_that_can_be_shown_stays_as_it_is(count: int) -> None:
    reports = curve(count)
    assert thinned(reports, FIGURES) is reports


@pytest.mark.parametrize("count", [POINTS + 1, 5000, 123_457])
def test_a_long_curve_keeps_its_ends_and_its_extremes(count: int) -> None:
    reports = curve(count)
    reports[count // 3]["loss"], reports[count // 2]["grad_norm"] = 1e9, -1e9
    kept = thinned(reports, FIGURES)
    assert len(kept) <= POINTS + 2 and kept[0] is reports[0] and kept[-1] is reports[-1]
    assert [report["step"] for report in kept] == sorted({report["step"] for report in kept})
    for figure in FIGURES:
        for end in (min, max):
            assert end(r[figure] for r in kept) == end(r[figure] for r in reports)
    gaps = [b["step"] - a["step"] for a, b in pairwise(kept)]
    assert max(gaps) < 2 * count / (POINTS / 4) + 2, "a stretch is not shown"


def test_a_figure_that_is_there_once_in_a_while_is_kept(tmp_path: Path) -> None:
    reports = [{"step": i, **({"loss": 1.0} if i == 7777 else {})} for i in range(10_000)]
    assert {"step": 7777, "loss": 1.0} in thinned(reports, ("loss",))


@pytest.mark.parametrize(
    "line",
    [
        b'{"kind": "train", "step": 7.0, "loss": 1}',
        b'{"kind": "train", "step": true, "loss": 1}',
        b'{"kind": "train", "step": -7, "loss": 1}',
        b'{"kind": "train", "step": "7", "loss": 1}',
        b'{"kind": "train", "step": ' + b"9" * 4000 + b', "loss": 1}',
        b'{"kind": "train", "step": 7, "loss": ' + b"9" * 4000 + b"}",
        b'{"kind": "train", "step": 7, "loss": 1e999}',
        b'{"kind": "train", "step": 7, "loss": null}',
        b'{"kind": "train", "step": 7, "loss": [1]}',
        b'{"kind": "spike", "step": 7, "loss": 1}',
        b'{"kind": [], "step": 7, "loss": 1}',
        b'{"kind": "train", "kind": "valid", "step": 7, "loss": 1}',
        b'{"kind": "train", "step": 7, "loss": 1, "x": ' + b"[" * 100_000,
        b'{"kind": "train", "step": 7, "loss": 1, "x": "' + b"y" * 100_000 + b'"}',
        b'{"kind": "train", "step": 7, "loss": 1, "x": "\xff"}',
        b"[" * 100_000,
        b"\0" * 100,
        b"null",
    ],
)
def test_a_line_that_is_no_report_is_passed_over(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    good = b'{"kind": "train", "step": %d, "loss": 1.5}'
    path.write_bytes(b"\n".join([good % 1, line, good % 2]))
    curves = read_curves(path)
    assert [report["step"] for report in curves.train] == [1, 2] and curves.valid == []
    assert curves.not_finite == (b'"loss": null' in line)


def test_a_figure_that_is_none_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"kind": "train", "step": 3, "loss": 1, "grad_norm": null, "learning_rate": "x"}\n')
    assert read_curves(path).train == [{"step": 3, "loss": 1}]


@pytest.mark.parametrize(("count", "said"), [(0, None), (1, "1 report with"), (2, "2 reports with")])
def test_losses_that_are_not_finite_are_told(tmp_path: Path, count: int, said: str | None) -> None:
    folder = write_run(tmp_path / "run", steps=5)
    with open(folder / "metrics.jsonl", "a") as file:
        for step in range(count):
            odd = TrainReport(10 + step, float("nan"), 1e-3, float("inf"), 1.0, 1.0, 9, 9)
            file.write(json.dumps(report_line(odd)) + "\n")
    page = write_report(folder).read_text()
    assert (f"{said} a loss that is not finite" in page) if said else ("not finite" not in page)


def test_a_log_beyond_all_measure_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with open(path, "wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(DataError, match="is longer than 256 MiB"):
        read_curves(path)


def test_the_page_of_a_long_training_is_no_longer_than_others(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", steps=10)
    with open(folder / "metrics.jsonl", "w") as file:
        for report in curve(50_000):
            file.write(json.dumps({"kind": "train", **report}) + "\n")
    assert write_report(folder).stat().st_size < 2_000_000
