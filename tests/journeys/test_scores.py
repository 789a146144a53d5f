"""Evaluators on the command line and in a recipe: what is asked and reported, what is refused and when."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from mlxlora_core import cli

Capfd = pytest.CaptureFixture[str]

PLUGIN = """
import json
from dataclasses import asdict
from mlxlora_core.api import Evaluator, NoOptions, hookimpl, UsageError


def keep(answer, options):
    with open({log!r}, "a") as file:
        print(json.dumps({{**asdict(answer), "row": dict(answer.row)}}), file=file)
    return len(answer.text) % 3 / 2


def refuse(options):
    raise UsageError("not on a Friday")


@hookimpl
def mlxlora_evaluators():
    made = {{"keep": keep, "high": lambda answer, options: 1.5,
             "vast": lambda answer, options: 10**5000, "none-at-all": lambda answer, options: None,
             "nan": lambda answer, options: float("nan"), "breaks": lambda answer, options: 1 / 0,
             "exact-match": lambda answer, options: True}}
    return [*(Evaluator(name=name, summary="s", score=score) for name, score in made.items()),
            Evaluator(name="picky", summary="s", score=keep, prepare=refuse),
            Evaluator(name="needy", summary="s", score=keep, needs={{"no_such_module": "nosuch"}})]
"""

ROWS: list[dict[str, Any]] = [
    {"prompt": "The adapter scales", "completion": " the weights in float32."},
    {"text": "A layer keeps its inputs."},
    {"prompt": "A gradient", "completion": " is an array of floats."},
    {"prompt": "Every plugin reads", "completion": " a mask."},
]


@pytest.fixture
def bench(tiny_model: Path, tmp_path: Path) -> Path:
    """A working folder with rows, a plugin, and the model."""
    (tmp_path / "odd.py").write_text(PLUGIN.format(log=str(tmp_path / "log")))
    (tmp_path / "model").symlink_to(tiny_model)
    (tmp_path / "rows").mkdir()
    for split in ("train", "valid", "test"):
        text = "".join(json.dumps(row) + "\n" for row in ROWS)
        (tmp_path / "rows" / f"{split}.jsonl").write_text(text)
    return tmp_path


def evaluate(bench: Path, capfd: Capfd, *words: object) -> tuple[int, str, str]:
    files = ("--model", bench / "model", "--data", bench / "rows", "--no-adapter")
    code = cli.execute([*map(str, ("evaluate", *files, "-P", bench / "odd.py", *words))])
    told = capfd.readouterr()
    return int(code), told.out, told.err


def answers(bench: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (bench / "log").read_text().splitlines()]


def test_each_row_is_answered_as_generate_answers_it(bench: Path, capfd: Capfd) -> None:
    words = ("--evaluator", "keep", "-n", 7, "--json")
    code, out, err = evaluate(bench, capfd, *words)
    assert code == 0, err
    assert "warning: 1 of 4 test rows ask nothing and are not scored" in err
    asked = [row for row in ROWS if "prompt" in row]
    told = answers(bench)
    assert [one["prompt"] for one in told] == [row["prompt"] for row in asked]
    assert [one["expected"] for one in told] == [row["completion"] for row in asked]
    assert [one["row"] for one in told] == asked
    wanted = sum(len(one["text"]) % 3 / 2 for one in told) / 3
    result = json.loads(out)
    assert result["scores"] == {"keep": {"score": pytest.approx(wanted), "rows": 3}}
    scored = [{**one, "scores": {"keep": len(one["text"]) % 3 / 2}} for one in told]
    assert [{**one, "row": row} for one, row in zip(result["answers"], asked, strict=True)] == scored
    for one in told:
        line = ("generate", "--model", bench / "model", "--no-adapter", "-n", 7, "--sampler", "greedy")
        assert cli.execute([*map(str, (*line, "-p", one["prompt"], "--json"))]) == 0
        said = json.loads(capfd.readouterr().out)
        assert (said["text"], said["finish"] == "stop") == (one["text"], one["ended"])


def test_some_rows_are_scored_at_even_distances(bench: Path, capfd: Capfd) -> None:
    assert evaluate(bench, capfd, "--evaluator", "keep", "--score-rows", 2, "-n", 1)[0] == 0
    assert [one["prompt"] for one in answers(bench)] == [ROWS[0]["prompt"], ROWS[2]["prompt"]]


def test_two_evaluators_of_one_name_are_told_apart(bench: Path, capfd: Capfd) -> None:
    both = ("--evaluator", "odd:exact-match", "--evaluator", "evaluators:exact-match")
    code, out, _ = evaluate(bench, capfd, *both, "-n", 1, "--set", "evaluator.form=words")
    assert code == 0
    assert "odd:exact-match 1.0000 on 3 test rows\nevaluators:exact-match 0.0000 on 3 test rows\n" in out


@pytest.mark.parametrize(
    ("words", "code", "line"),
    [
        ("--evaluator high", 8, "evaluator odd:high: score gives 1.5, wanted a number from 0 to 1"),
        ("--evaluator vast", 8, "evaluator odd:vast: score gives inf, wanted a number from 0 to 1"),
        ("--evaluator nan", 8, "evaluator odd:nan: score gives nan, wanted a number from 0 to 1"),
        ("--evaluator none-at-all", 8, "evaluator odd:none-at-all: score gives NoneType, wanted a number"),
        ("--evaluator breaks", 8, "plugin odd (file) failed in score of evaluator 'breaks': ZeroDivision"),
        ("--evaluator picky", 2, "not on a Friday"),
        ("--evaluator needy", 8, "needs no_such_module, which is not installed. Fix: pip install 'nosuch'"),
        ("--evaluator exact-match", 8, "'exact-match' is given by evaluators (mlxlora"),
        ("--evaluator kep", 8, "no evaluator 'kep' (did you mean 'keep'?"),
        ("--evaluator regex", 2, "the evaluator regex has no pattern"),
        ("--evaluator regex --set evaluator.pattern=(", 2, "'(' is no regular expression"),
        ("--evaluator keep --evaluator keep", 2, "evaluator 'keep' is named twice"),
        ("--evaluator keep --score-rows 0", 2, "--score-rows"),
        ("--score-rows 3 -n 2", 2, "--num-tokens, --score-rows given without --evaluator"),
        ("--set evaluator.form=words", 2, "options of an evaluator (form), but none is named"),
    ],
)
def test_what_cannot_be_is_one_line(bench: Path, capfd: Capfd, words: str, code: int, line: str) -> None:
    got, out, err = evaluate(bench, capfd, *words.split())
    assert (got, line in err.splitlines()[-1]) == (code, True), err
    if line.startswith(("evaluator", "plugin")):
        assert err.splitlines()[-1].count("Traceback") == 0
    else:  # known before any work
        assert out == "" and "test loss" not in err


def test_rows_that_ask_nothing_are_refused_before_the_work(bench: Path, capfd: Capfd) -> None:
    (bench / "rows" / "test.jsonl").write_text('{"text": "A layer."}\n')
    code, out, err = evaluate(bench, capfd, "--evaluator", "keep")
    assert (code, out) == (3, "") and "no row of 1 asks anything" in err and "memory" not in err


def test_a_program_of_ones_own(bench: Path, capfd: Capfd) -> None:
    program = bench / "score.py"
    program.write_text(
        "import json, sys\nasked = json.loads(sys.stdin.readline())\n"
        "assert sorted(asked) == ['ended', 'expected', 'prompt', 'row', 'text']\n"
        "print(float(asked['row']['prompt'] == 'A gradient'))\n"
    )
    named = ("--evaluator", "command", "-n", 2, "--set", f"evaluator.program={sys.executable} {program}")
    code, out, err = evaluate(bench, capfd, *named)
    assert code == 0 and f"command {1 / 3:.4f} on 3 test rows" in out, err


RECIPE = """
[model]
mlx_path = "model"
[data]
use = "jsonl"
test_set_size = 0.5
options = {{ path = "rows/train.jsonl" }}
[train]
iters = 2
batch_size = 2
[evaluator]
use = ["keep", "token-f1"]
options = {{ form = "exact" }}
[generate]
num_tokens = 4
[evaluate]
score_rows = {rows}
"""


def test_a_recipe_scores_before_and_after(bench: Path, capfd: Capfd, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(bench)
    rows = [{"prompt": f"The mask {i} keeps", "completion": f" row {i}."} for i in range(12)]
    (bench / "rows" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (bench / "scored.toml").write_text(RECIPE.format(rows=2))
    line = ["run", "scored.toml", "-P", "./odd.py"]
    assert cli.execute(line) == 0
    told = capfd.readouterr()
    record = json.loads((bench / "runs" / "scored" / "run.json").read_text())
    said = answers(bench)
    assert [one["prompt"] for one in said[:2]] == [one["prompt"] for one in said[2:]] and len(said) == 4
    means = [sum(len(one["text"]) % 3 / 2 for one in part) / 2 for part in (said[:2], said[2:])]
    assert record["summary"]["scores"]["keep"] == {"rows": 2, "before": means[0], "after": means[1]}
    assert [*record["stages"]["after"]["result"]["scores"]] == ["keep", "token-f1"]
    assert f"keep on 2 test rows: {means[0]:.4f} -> {means[1]:.4f}" in told.out
    assert f"[before] keep {means[0]:.4f} on 2 test rows" in told.err
    page = (bench / "runs" / "scored" / "report.html").read_text()
    assert "Scores of the answers to 2 test rows, from 0 to 1" in page and ">token-f1<" in page
    assert cli.execute(line) == 0 and len(answers(bench)) == 4, "done already"
    (bench / "scored.toml").write_text(RECIPE.format(rows=1))
    assert cli.execute(line) == 0 and len(answers(bench)) == 6
    assert "[train] done already" in capfd.readouterr().err
