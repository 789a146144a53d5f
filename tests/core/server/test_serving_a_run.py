"""``mlxlora serve RUN``: the base, the adapter and the questions of a run folder."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from served_models import ServerProcess

from mlxlora_core.cli import execute, watch

PROMPTS = ["A layer scales", "no such row"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path) -> Path:
    """A run folder: a model converted, and an adapter trained for three steps."""
    folder = tmp_path_factory.mktemp("run")
    rows = [{"text": f"A layer scales the weights {n} times."} for n in range(1)]
    rows += [{"text": f"Row {n} keeps a mask."} for n in range(40)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = folder / "small.toml"
    recipe.write_text(
        f"""
        [run]
        folder = "{folder}/tuned"
        [model]
        torch_path = "{tiny_checkpoint}"
        [data]
        use = "jsonl"
        options = {{ path = "{folder}/rows.jsonl" }}
        [train]
        iters = 3
        batch_size = 2
        [generate]
        num_tokens = 4
        prompts = {json.dumps(PROMPTS)}
        """
    )
    assert execute(["run", str(recipe)]) == 0
    return folder / "tuned"


@pytest.fixture(scope="module")
def server(run: Path) -> Iterator[ServerProcess]:
    """A server of it."""
    with ServerProcess(run, folder=run.parent) as process:
        yield process


def test_base_and_adapter_are_served(server: ServerProcess, tiny_checkpoint: Path) -> None:
    models = json.loads(server.request("GET", "/v1/models")[2])["data"]
    assert [(model["id"], model["mlxlora"]["kind"]) for model in models] == [
        (tiny_checkpoint.name, "base"),
        ("tuned", "adapter"),
    ]
    for model in models:
        assert server.text(model=model["id"], prompt=PROMPTS[0], max_tokens=5, seed=1)


def test_the_page_is_told_the_questions(server: ServerProcess) -> None:
    told = json.loads(server.request("GET", "/api/page")[2])
    assert told["title"] == "tuned"
    assert told["models"][-1] == "tuned"
    assert (told["template"], told["token"]) == (True, False)
    assert [question["prompt"] for question in told["questions"]] == PROMPTS
    assert told["questions"][0]["answer"] == " the weights 0 times."
    assert told["questions"][1]["answer"] is None
    assert all((one["chat"], one["system"]) == (False, "") for one in told["questions"])
    status, headers, _ = server.request("GET", "/")
    assert (status, headers["content-type"]) == (200, "text/html; charset=utf-8")


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--model", "elsewhere"], 2, "leave out --model"),
        (["--adapter-file", "elsewhere"], 2, "leave out --model"),
        (["-q"], 2, "leave out --model"),
        (["--places", "0"], 2, "--places"),
        (["--port", "70000"], 2, "--port"),
        (["--host", "no such host", "--api-key-file", "keys"], 2, "keys"),
    ],
)
def test_what_makes_no_sense_beside_a_run(
    run: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, words: str
) -> None:
    assert execute(["serve", str(run), *arguments]) == code
    assert words in capsys.readouterr().err


def test_the_run_has_a_page_of_its_own(server: ServerProcess) -> None:
    assert json.loads(server.request("GET", "/api/page")[2])["run"] is True
    status, _, page = server.request("GET", "/run")
    assert status == 200 and b'<a href="/">' in page, "and one finds back"
    status, headers, _ = server.request("GET", "/api/run")
    assert (status, headers["content-type"]) == (200, "application/json")
    assert "default-src 'none'" in headers["content-security-policy"]


def test_without_the_extra_one_line_says_how_to_get_it(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "find_spec", lambda name: None)
    assert execute(["serve", str(run)]) == 2
    assert "pip install 'mlxlora[serve]'" in capsys.readouterr().err


def test_a_folder_of_something_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert execute(["serve", str(tmp_path)]) == 3
    assert "is no run folder" in capsys.readouterr().err
