"""Data folders as people have them: ``data``, ``train`` and ``run`` take and refuse the same ones."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

Command = Callable[..., Any]

U, A, S = "user", "assistant", "system"


def lines(*rows: Mapping[str, Any]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def said(*turns: tuple[str, Any]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


TEXTS = [{"text": f"Line {i} keeps the last token."} for i in range(6)]
TALK = said((U, "Hi"), (A, "Hello"))
SHARED = [
    {"id": f"x{i}", "conversations": [{"from": "human", "value": f"{i}?"}, {"from": "gpt", "value": f"{i}."}]}
    for i in range(6)
]
INSTRUCTIONS = [{"instruction": f"Name {i}.", "input": "", "output": f"It is {i}."} for i in range(6)]
QUESTIONS = [{"question": f"Name {i}.", "answer": f"It is {i}."} for i in range(6)]
PARTS = said((U, [{"type": "text", "text": "Hi"}]), (A, [{"type": "text", "text": "Hello"}]))
PAIRS = [{"prompt": TALK["messages"][:1], "completion": [{"role": A, "content": str(i)}]} for i in range(6)]
COLUMNS = "prompt=question,completion=answer"

#: name -> the files of a folder, and the columns to read
GOOD: dict[str, tuple[dict[str, str], str]] = {
    "three splits": (
        {"train.jsonl": lines(*TEXTS), "valid.jsonl": lines(*TEXTS), "test.jsonl": lines(TALK)},
        "",
    ),
    "only train": ({"train.jsonl": lines(*TEXTS)}, ""),
    "empty valid": ({"train.jsonl": lines(*TEXTS), "valid.jsonl": "\n"}, ""),
    "val": ({"train.jsonl": lines(*TEXTS), "val.jsonl": lines(TEXTS[0])}, ""),
    "dev and an array": ({"train.json": json.dumps(TEXTS, indent=2), "dev.json": json.dumps(TEXTS)}, ""),
    "tables": ({"train.csv": "text\na\nb\n", "validation.csv": '"text"\r\n"c, d"\r\n'}, ""),
    "ShareGPT": ({"train.jsonl": lines(*SHARED), "valid.jsonl": lines(*SHARED)}, ""),
    "Alpaca": ({"train.jsonl": lines(*INSTRUCTIONS), "valid.jsonl": lines(*INSTRUCTIONS)}, ""),
    "TRL": ({"train.jsonl": lines(*PAIRS), "valid.jsonl": lines(*PAIRS)}, ""),
    "parts": ({"train.jsonl": lines(PARTS, TALK), "valid.jsonl": lines(PARTS)}, ""),
    "shapes side by side": (
        {"train.jsonl": lines(*TEXTS, *SHARED, *INSTRUCTIONS, *PAIRS, PARTS), "eval.jsonl": lines(TALK)},
        "",
    ),
    "question and answer": ({"train.jsonl": lines(*QUESTIONS), "valid.jsonl": lines(*QUESTIONS)}, COLUMNS),
    "columns of a table": ({"train.csv": "question,answer,id\na,b,1\nc,d,2\n"}, COLUMNS),
    "text and messages, chosen": (
        {"train.jsonl": lines({**TALK, "text": "a"}, {**TALK, "text": "b"})},
        "text=text",
    ),
    "mark, CRLF, blank lines": ({"train.jsonl": "\ufeff" + lines(*TEXTS).replace("\n", "\r\n\r\n")}, ""),
}

#: name -> the files of a folder, the columns to read, and words of the error
BAD: dict[str, tuple[dict[str, str | bytes], str, str]] = {
    "ends with user": (
        {"train.jsonl": lines(*[said((U, "a"), (A, "b"), (U, "c"))] * 3), "valid.jsonl": lines(TALK)},
        "",
        r"3 bad lines: .*train\.jsonl:1: the last message is of user, .*\(3 of this kind: 1, 2",
    ),
    "two systems": (
        {"train.jsonl": lines({**said((S, "a"), (U, "b"), (A, "c")), "system": "d"})},
        "",
        "has system beside messages that begin with one of system",
    ),
    "tools of another kind": (
        {"train.jsonl": lines({**TALK, "tools": "f"})},
        "",
        "tools is a string that is no JSON",
    ),
    "text and messages": ({"train.jsonl": lines({**TALK, "text": "a"})}, "", "has text and messages"),
    "question and answer": (
        {"train.jsonl": lines(*QUESTIONS)},
        "",
        r"it has the keys question, answer \(6 of this kind.*--columns prompt=question,completion=answer",
    ),
    "columns that are not there": (
        {"train.jsonl": lines(*TEXTS)},
        COLUMNS,
        "has no column question for prompt",
    ),
    "two valid": (
        {"train.jsonl": lines(*TEXTS), "valid.jsonl": lines(*TEXTS), "val.jsonl": lines(*TEXTS)},
        "",
        "val.jsonl and valid.jsonl could both be the valid rows",
    ),
    "bad test set": (
        {"train.jsonl": lines(*TEXTS), "test.jsonl": lines({"txt": "a"})},
        "",
        r"test\.jsonl:1: needs text",
    ),
    "pretty array": (
        {"train.jsonl": json.dumps(TEXTS, indent=2)},
        "",
        r"1 bad line: .*train\.jsonl:1: is one JSON array over several lines, .*jq -c '\.\[\]'",
    ),
    "array on a line": (
        {"train.jsonl": json.dumps(TEXTS)},
        "",
        r"train\.jsonl:1: is an array, .*jq -c '\.\[\]'",
    ),
    "torn array": ({"train.json": json.dumps(TEXTS)[:-1]}, "", r"train\.json:1: no JSON"),
    "half a surrogate": ({"train.jsonl": '{"text": "\\ud83d"}\n'}, "", r"train\.jsonl:1: text holds half"),
    "number": ({"train.jsonl": '{"text": 5}\n{"text": "a"}\n'}, "", r"train\.jsonl:1: text is a number"),
    "picture": (
        {"train.jsonl": lines(said((U, [{"type": "image_url"}]), (A, "b")))},
        "",
        "has a part of type 'image_url'",
    ),
    "no rows to train on": ({"valid.jsonl": lines(*TEXTS)}, "", "train"),
    "nothing": ({}, "", "there is no"),
    "UTF-16": ({"train.jsonl": lines(*TEXTS).encode("utf-16")}, "", "is UTF-16"),
    "cells": ({"train.csv": "prompt,completion\na,b\nc\n"}, "", r"train\.csv:3: has 1 cells, the heading 2"),
    "many kinds": (
        {"train.jsonl": lines(*[{f"key{letter}" * 30: 1} for letter in "abcdefghijklmnopqrst"])},
        "",
        "20 bad lines: .*; and ",
    ),
}


@pytest.fixture(scope="module")
def model(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from mlxlora_core import cli

    folder = tmp_path_factory.mktemp("model") / "model"
    assert cli.execute(["convert", "--torch-path", str(tiny_checkpoint), "--mlx-path", str(folder)]) == 0
    return folder


def write(folder: Path, files: Mapping[str, str | bytes]) -> Path:
    folder.mkdir()
    for name, text in files.items():
        (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return folder


def verbs(data: Path, columns: str, model: Path, tmp_path: Path) -> dict[str, list[str]]:
    """The command line of each verb that reads rows to train on."""
    recipe = tmp_path / "recipe.toml"
    option = f", columns = {json.dumps(columns.split(','))}" if columns else ""
    recipe.write_text(
        f'[run]\nfolder = "{tmp_path}/run"\n[model]\nmlx_path = "{model}"\n[train]\niters = 1\n'
        f'[data]\nuse = "jsonl"\noptions = {{ path = "{data}"{option} }}\n'
    )
    asked = ["--columns", columns] if columns else []
    adapter = f"{tmp_path}/a.safetensors"
    return {
        "data": ["data", "--builder", "jsonl", "--set", f"path={data}", "--out", f"{tmp_path}/out", *asked],
        "train": [
            *("train", "--model", str(model), "--data", str(data), "--iters", "1"),
            *("--adapter-file", adapter, *asked),
        ],
        "run": ["run", str(recipe)],
    }


@pytest.mark.parametrize("name", GOOD)
def test_all_verbs_take_what_one_takes(mlxlora: Command, model: Path, tmp_path: Path, name: str) -> None:
    files, columns = GOOD[name]
    data = write(tmp_path / "data", files)
    for verb, arguments in verbs(data, columns, model, tmp_path).items():
        done = mlxlora(*arguments)
        assert done.code == 0, (verb, done.err)
        has_valid = any(
            name.startswith(("val", "dev", "eval")) and text.strip() for name, text in files.items()
        )
        if verb != "data":
            assert ("training without validation" in done.err) is not has_valid
            assert ("valid loss" in done.err) is has_valid


@pytest.mark.parametrize("name", BAD)
def test_all_verbs_refuse_what_one_refuses(mlxlora: Command, model: Path, tmp_path: Path, name: str) -> None:
    files, columns, words = BAD[name]
    data = write(tmp_path / "data", files)
    for verb, arguments in verbs(data, columns, model, tmp_path).items():
        done = mlxlora(*arguments)
        assert done.code == 3, (verb, done.code, done.err)
        error = done.err.splitlines()[-1]
        assert error.startswith("mlxlora: ") and re.search(words, error), (verb, error)
        assert len(error.encode()) < 2000
    assert not (tmp_path / "out").exists() and not (tmp_path / "a.safetensors").exists()


def test_rows_of_any_form_train_as_the_plain_ones_do(mlxlora: Command, model: Path, tmp_path: Path) -> None:
    plain = [said((U, f"{i}?"), (A, f"{i}.")) for i in range(6)]
    forms = {
        "plain.jsonl": lines(*plain),
        "shared.jsonl": lines(*SHARED),
        "array.json": json.dumps(SHARED, indent=3),
        "split.jsonl": lines(
            *[{"prompt": row["messages"][:1], "completion": row["messages"][1:]} for row in plain]
        ),
    }
    adapters = set()
    for name, text in forms.items():
        (tmp_path / name).write_text(text)
        adapter = tmp_path / f"{name}.safetensors"
        done = mlxlora(
            *("train", "--model", model, "--data", tmp_path / name, "--iters", 2, "--adapter-file", adapter)
        )
        assert done.code == 0 and "training without validation" in done.err, done.err
        adapters.add(adapter.read_bytes())
    assert len(adapters) == 1


def test_a_file_is_a_data_path_of_every_verb(mlxlora: Command, model: Path, tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("question,answer\n" + "".join(f"{i}?,{i}.\n" for i in range(20)))
    for arguments in verbs(path, COLUMNS, model, tmp_path).values():
        assert mlxlora(*arguments).code == 0
    done = mlxlora(
        "evaluate", "--model", model, "--data", path, "--columns", COLUMNS, "--json", "--no-adapter"
    )
    assert json.loads(done.out)["rows"] == 20
    assert json.loads((tmp_path / "out" / "dataset.json").read_text())["rows"]["train"] == 18


def test_a_missing_test_set_is_told_before_the_first_step(
    mlxlora: Command, model: Path, tmp_path: Path
) -> None:
    data = write(tmp_path / "data", {"train.jsonl": lines(*TEXTS)})
    adapter = tmp_path / "a.safetensors"
    train = ("train", "--model", model, "--data", data, "--iters", 1, "--adapter-file", adapter, "--test")
    done = mlxlora(*train)
    assert done.code == 3 and "there is no test.jsonl" in done.error
    (data / "test.jsonl").write_text("\n")
    assert "test.jsonl: there is no row in it" in mlxlora(*train).error
    (data / "test.jsonl").write_text(lines({"text": ""}))
    done = mlxlora(*train)
    assert done.code == 3 and "step" not in done.err and "none of 1 rows has a token" in done.err
    assert not adapter.exists()
    (data / "test.jsonl").write_text(lines({"text": "a b"}))
    assert "test loss" in mlxlora(*train).out


def test_columns_that_mean_nothing_are_a_matter_of_usage(
    mlxlora: Command, model: Path, tmp_path: Path
) -> None:
    data = write(tmp_path / "data", {"train.jsonl": lines(*TEXTS)})
    for arguments in verbs(data, "promt=question", model, tmp_path).values():
        done = mlxlora(*arguments)
        assert done.code == 2 and "did you mean 'prompt'?" in done.error
    done = mlxlora("data", "--builder", "docstrings", "--columns", COLUMNS, "--out", tmp_path / "out")
    assert done.code == 2 and "--columns: builder 'docstrings' reads no columns" in done.error


def test_what_was_cut_is_told_with_the_limit(mlxlora: Command, model: Path, tmp_path: Path) -> None:
    data = write(
        tmp_path / "data", {"train.jsonl": lines({"text": "a b " * 50}), "test.jsonl": lines(*TEXTS)}
    )
    options = ("--model", model, "--data", data, "--max-seq-length", 8)
    done = mlxlora("train", *options, "--iters", 1, "--adapter-file", tmp_path / "a.safetensors")
    assert "warning: 1 train rows were cut at 8 tokens (max_seq_length), " in done.err
    told = "warning: 6 test rows were cut at 8 tokens (max_seq_length), "
    assert told in mlxlora("evaluate", *options, "--no-adapter").err
    run = verbs(data, "", model, tmp_path)["run"]
    assert mlxlora(*run, "--set", "train.max_seq_length=8").err.count(told) == 1
