"""Each verb does what its help says, one after the other, on a tiny model."""

from __future__ import annotations

import csv
import json
import os
import pty
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from mlxlora_core.machine.processors import processors

Command = Callable[..., Any]

RECIPE = """
[run]
folder = "{folder}"

[model]
torch_path = "{checkpoint}"
dtype = "float32"

[data]
use = "jsonl"
options = {{ path = "{data}" }}

[adapter]
use = "lora"
options = {{ rank = 4, targets = ["all-linear"], layers = -1 }}

[train]
iters = 20
batch_size = 4
learning_rate = 1e-2
steps_per_report = 10
steps_per_eval = 10

[generate]
prompts = ["A layer"]
num_tokens = 4
"""


@pytest.fixture
def model(tmp_path: Path, tiny_model: Path) -> Path:
    """A model folder of one's own."""
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


def train(mlxlora: Command, model: Path, data: Path, adapter: Path, *more: object) -> dict[str, Any]:
    """Train for twenty steps; the result as --json gives it."""
    flags = ("--iters", 20, "--learning-rate", 1e-2, "--lora-layers", -1)
    targets = ("--set", "adapter.targets=all-linear")
    files = ("--model", model, "--data", data, "--adapter-file", adapter)
    done = mlxlora("train", *files, *flags, *targets, "--json", *more)
    assert done.code == 0, done.err
    result: dict[str, Any] = json.loads(done.out)
    return result


@pytest.mark.parametrize("suffix", ["safetensors", "npz"])
def test_train_evaluate_generate_and_fuse(
    mlxlora: Command, model: Path, tiny_data: Path, tmp_path: Path, suffix: str
) -> None:
    base = json.loads(mlxlora("evaluate", "--model", model, "--data", tiny_data, "--json").out)
    adapter = tmp_path / f"adapter.{suffix}"
    result = train(
        mlxlora, model, tiny_data, adapter, "--test", "-p", "A layer", "--num-tokens", 3, "--temp", 0
    )
    assert result["test"]["loss"] < 0.8 * base["loss"]
    on_base = ("--model", model, "--adapter-file", adapter)
    again = json.loads(mlxlora("evaluate", *on_base, "--data", tiny_data, "--json").out)
    assert again["loss"] == pytest.approx(result["test"]["loss"], abs=1e-6)

    said = mlxlora("generate", *on_base, "-p", "A layer", "-n", 3, "--temp", 0)
    assert said.out == result["text"] + "\n"

    fused = tmp_path / "fused"
    report = json.loads(mlxlora("fuse", *on_base, "--save-path", fused, "--json").out)
    assert report["distance"] < 1e-4 < report["base_distance"]
    alone = json.loads(mlxlora("evaluate", "--model", fused, "--data", tiny_data, "--json").out)
    assert alone["loss"] == pytest.approx(again["loss"], abs=1e-4)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantized_folder_makes_it_qlora(
    mlxlora: Command, tmp_path: Path, make_checkpoint: Callable[..., Path], tiny_data: Path, bits: int
) -> None:
    source = make_checkpoint(tmp_path / "source", dim=64)
    model = tmp_path / "quantized"
    flags = ("-q", "--q-bits", bits, "--q-group-size", 32)
    done = mlxlora("convert", "--torch-path", source, "--mlx-path", model, *flags)
    assert done.code == 0, done.err
    assert json.loads((model / "config.json").read_text())["quantization"] == {"group_size": 32, "bits": bits}
    base = json.loads(mlxlora("evaluate", "--model", model, "--data", tiny_data, "--json").out)
    result = train(mlxlora, model, tiny_data, tmp_path / "a.safetensors", "--test")
    assert result["test"]["loss"] < 0.8 * base["loss"]


def test_metrics_file_has_every_report(
    mlxlora: Command, model: Path, tiny_data: Path, tmp_path: Path
) -> None:
    metrics = tmp_path / "metrics.jsonl"
    train(mlxlora, model, tiny_data, tmp_path / "a.npz", "--metrics-file", metrics, "--steps-per-report", 5)
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert [line["step"] for line in lines if line["kind"] == "train"] == [5, 10, 15, 20]
    assert [line["step"] for line in lines if line["kind"] == "valid"] == [0, 20]
    wanted = {"loss", "learning_rate", "steps_per_second", "tokens_per_second", "peak_memory_bytes"}
    assert wanted <= lines[1].keys()


def test_resume_adapter_file_starts_from_its_weights(
    mlxlora: Command, model: Path, tiny_data: Path, tmp_path: Path
) -> None:
    first = train(mlxlora, model, tiny_data, tmp_path / "a.safetensors")
    resumed = train(
        mlxlora,
        model,
        tiny_data,
        tmp_path / "b.safetensors",
        "--resume-adapter-file",
        tmp_path / "a.safetensors",
    )
    assert resumed["valid_loss"] < first["valid_loss"]


@pytest.fixture
def recipe(tmp_path: Path, tiny_checkpoint: Path, tiny_data: Path) -> Path:
    path = tmp_path / "recipe.toml"
    path.write_text(RECIPE.format(folder=tmp_path / "run", checkpoint=tiny_checkpoint, data=tiny_data))
    return path


def plan(mlxlora: Command, recipe: Path, *more: object) -> dict[str, bool]:
    """stage -> whether a run would do it."""
    stages: dict[str, bool] = json.loads(mlxlora("run", recipe, "--dry-run", "--json", *more).out)["stages"]
    return stages


def test_run_does_the_whole_and_then_nothing(mlxlora: Command, recipe: Path, tmp_path: Path) -> None:
    first = mlxlora("run", recipe)
    assert first.code == 0, first.err
    assert "held-out loss (test" in first.out and "A layer" in first.out
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    before, after = (record["stages"][stage]["result"] for stage in ("before", "after"))
    assert after["losses"]["test"]["loss"] < before["losses"]["test"]["loss"]
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*") if path.is_file()}

    second = mlxlora("run", recipe)
    assert second.code == 0
    assert second.err.count("done already") == 5
    changed = {path.name for path, time_ns in files.items() if path.stat().st_mtime_ns != time_ns}
    assert changed <= {"run.json", "recipe.toml", "report.html"}
    took = re.compile(r"; [\d.]+ s$", re.MULTILINE)
    assert took.sub("", second.out) == took.sub("", first.out)


def ask_rows(data: Path) -> list[str]:
    """Prompts that begin a training row, a test row and no row; put into the rows of ``data``."""
    for name, subject in (("train", "a gear"), ("test", "a wheel")):
        with open(data / f"{name}.jsonl", "a") as file:
            file.write(json.dumps({"text": f"Q: {subject}\nA: scales. It does."}) + "\n")
    return ["Q: a gear\nA:", "Q: a wheel\nA:", "Nobody asked"]


def test_run_tells_memory_from_the_rest_everywhere(
    mlxlora: Command, recipe: Path, tiny_data: Path, tmp_path: Path
) -> None:
    prompts = ask_rows(tiny_data)
    recipe.write_text(recipe.read_text().replace('["A layer"]', json.dumps(prompts)))
    done = mlxlora("run", recipe)
    assert done.code == 0, done.err
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    answers = record["stages"]["after"]["result"]["answers"]
    assert [answer["split"] for answer in answers] == ["train", "test", None]
    assert [answer["expected"] for answer in answers] == [" scales. It does."] * 2 + [None]
    assert {name: asked["questions"] for name, asked in record["summary"]["questions"].items()} == {
        "memory": 1,
        "held_out": 1,
        "no_row": 1,
    }
    losses = record["summary"]["losses"]["test"]
    assert losses["after"] == record["stages"]["after"]["result"]["losses"]["test"]["loss"]
    assert losses["change"] == pytest.approx(losses["after"] / losses["before"] - 1)
    assert "1 question about training rows (memory): first sentence exact 0 -> " in done.out
    assert "1 question about held-out rows (generalises)" in done.out
    assert re.search(r"^Q: a gear A: +train +✗ +✗$", done.out, re.MULTILINE)
    assert re.search(r"^Nobody asked +none +- +-$", done.out, re.MULTILINE)

    trained = record["stages"]["train"]["result"]
    assert sum(trained["lengths"]["rows"]) == trained["rows"] > 30
    page = (tmp_path / "run" / "report.html").read_text()
    assert "Nobody asked" in page and "1 question about training rows" in page


def test_report_makes_it_again_and_prints_where(mlxlora: Command, recipe: Path, tmp_path: Path) -> None:
    mlxlora("run", recipe)
    page = tmp_path / "run" / "report.html"
    first = page.read_bytes()
    page.unlink()
    done = mlxlora("report", tmp_path / "run")
    assert (done.code, done.out, done.err) == (0, f"{page}\n", "")
    assert page.read_bytes() == first


def test_report_wants_a_run_folder(mlxlora: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for arguments in (["report"], ["report", tmp_path], ["report", tmp_path / "absent"]):
        done = mlxlora(*arguments)
        assert done.code == 3 and "is no run folder" in done.error
    assert "mlxlora-demo" in mlxlora("report").error, "that of the demo, as of run"


def test_a_run_that_is_stopped_leaves_a_report_of_what_there_is(recipe: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mlxlora_core", "run", str(recipe)]
    command += ["--set", "train.iters=1000000", "--set", "train.steps_per_report=1"]
    page = tmp_path / "run" / "report.html"
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("step       5/"):
                break
        during = subprocess.run(
            [sys.executable, "-m", "mlxlora_core", "report", str(tmp_path / "run")], capture_output=True
        )
        assert during.returncode == 0 and page.is_file()
        page.unlink()
        process.send_signal(signal.SIGINT)
        process.stderr.read()
        assert process.wait(30) == 130
    text = page.read_text()
    assert "This run has not come to its end." in text and "of 1000000)" in text


def test_a_run_that_diverges_leaves_a_report_and_says_why(
    mlxlora: Command, recipe: Path, tmp_path: Path
) -> None:
    done = mlxlora("run", recipe, "--set", "train.learning_rate=1e30")
    assert done.code == 7 and "is not finite" in done.err
    assert "This run has not come to its end." in (tmp_path / "run" / "report.html").read_text()


def test_a_changed_value_redoes_only_what_depends_on_it(mlxlora: Command, recipe: Path) -> None:
    mlxlora("run", recipe)
    todo = plan(mlxlora, recipe, "--set", "adapter.rank=2")
    assert todo == {"model": False, "data": False, "before": False, "train": True, "after": True}
    todo = json.loads(mlxlora("run", recipe, "--dry-run", "--json", "--set", "generate.num_tokens=2").out)[
        "stages"
    ]
    assert todo == {"model": False, "data": False, "before": True, "train": False, "after": True}


def test_a_stage_whose_files_changed_is_done_again(mlxlora: Command, recipe: Path, tmp_path: Path) -> None:
    mlxlora("run", recipe)
    (tmp_path / "run" / "adapter" / "adapter.safetensors").unlink()
    todo = plan(mlxlora, recipe)
    assert [stage for stage, will in todo.items() if will] == ["train"]


def test_the_same_seed_gives_the_same_bytes(mlxlora: Command, recipe: Path, tmp_path: Path) -> None:
    adapters = []
    for name in ("one", "two"):
        assert mlxlora("run", recipe, "--set", f"run.folder={tmp_path / name}").code == 0
        adapters.append((tmp_path / name / "adapter" / "adapter.safetensors").read_bytes())
    assert adapters[0] == adapters[1]


def test_the_written_recipe_runs_again(mlxlora: Command, recipe: Path, tmp_path: Path) -> None:
    mlxlora("run", recipe)
    todo = plan(mlxlora, tmp_path / "run" / "recipe.toml")
    assert not any(todo.values())


def test_dry_run_says_where_values_come_from_and_writes_nothing(
    mlxlora: Command, recipe: Path, tmp_path: Path
) -> None:
    done = mlxlora("run", recipe, "--dry-run", "--set", "adapter.rank=2")
    rows = {line.split()[0]: line for line in done.out.splitlines() if line.strip()}
    assert rows["adapter.rank"].split()[1:] == ["2", "command", "line"]
    assert rows["train.iters"].split()[1:] == ["20", "recipe.toml"]
    assert rows["run.seed"].split()[-1] == "default"
    assert not (tmp_path / "run").exists()


def test_dry_run_fits_a_hundred_columns_and_loses_nothing(mlxlora: Command, recipe: Path) -> None:
    long = ["Q: What is it that is said here?" * 6, "x" * 300]
    done = mlxlora("run", recipe, "--dry-run", "--set", f"generate.prompts={json.dumps(long)}")
    lines = done.out.splitlines()
    assert max(map(len, lines)) <= 100
    column = lines[0].index("value", 1) if "value" in lines[0][1:] else len(lines[0].split()[0])
    shown = "".join(line[column:].split("  command")[0] for line in lines)
    assert "".join(shown.split()).count("x" * 300) == 1


def test_a_run_shows_the_answers_of_its_own_prompts_and_the_command_that_asks_on(
    mlxlora: Command, recipe: Path, tmp_path: Path
) -> None:
    prompts = ["A layer", "Something that no row begins with"]
    more = ("--set", f"generate.prompts={json.dumps(prompts)}", "--set", "sampler.use=temperature")
    done = mlxlora("run", recipe, *more, "--set", "sampler.temp=0.5")
    assert done.code == 0, done.err
    assert all(prompt in done.out for prompt in prompts)
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    answers = record["stages"]["after"]["result"]["answers"]
    command = shlex.split(done.out.splitlines()[-1])
    asked = mlxlora(*command[1:])
    assert asked.out.strip() == answers[0]["text"].strip()


def test_generate_and_evaluate_take_the_adapter_that_train_wrote(
    mlxlora: Command, model: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    measure = ("evaluate", "--model", model, "--data", tiny_data, "--json")
    base = mlxlora(*measure)
    assert "without an adapter" in base.err and json.loads(base.out)["adapter_file"] is None
    result = train(mlxlora, model, tiny_data, Path("adapters.safetensors"), "--test")
    tuned = mlxlora(*measure)
    assert "lora:lora adapter of adapters.safetensors" in tuned.err
    assert json.loads(tuned.out)["loss"] == pytest.approx(result["test"]["loss"], abs=1e-6)
    plain = mlxlora(*measure, "--no-adapter")
    assert json.loads(plain.out)["loss"] == json.loads(base.out)["loss"]
    ask = ("generate", "--model", model, "-p", "A layer", "-n", 8, "--temp", 0)
    assert mlxlora(*ask).out == mlxlora(*ask, "--adapter-file", "adapters.safetensors").out
    assert mlxlora(*ask).out != mlxlora(*ask, "--no-adapter").out
    both = mlxlora(*ask, "--no-adapter", "--adapter-file", "adapters.safetensors")
    assert both.code == 2 and "give one of them" in both.error


def test_ranks_beyond_what_a_machine_can_use_are_taken_for_tokens(mlxlora: Command) -> None:
    """``-n`` of ``generate`` is how many tokens, and of ``train`` how many processes."""
    many = mlxlora("train", "-p", "A layer", "-n", 4 * processors() + 1)
    assert many.code == 2 and "--num-tokens" in many.error and f"use {4 * processors()} at most" in many.error
    both = mlxlora("train", "-n", 2, "--hosts", "hosts.json")
    assert both.code == 2 and "give one of them" in both.error


def test_a_default_adapter_of_another_base_is_never_passed_over_silently(
    mlxlora: Command,
    model: Path,
    make_checkpoint: Callable[..., Path],
    tiny_data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    train(mlxlora, model, tiny_data, Path("adapters.safetensors"))
    other = tmp_path / "other"
    mlxlora("convert", "--torch-path", make_checkpoint(tmp_path / "source", seed=5), "--mlx-path", other)
    refused = mlxlora("generate", "--model", other, "-p", "A layer")
    assert refused.code == 4 and "--no-adapter" in refused.err and refused.out == ""


def test_the_help_of_train_is_in_sections(mlxlora: Command) -> None:
    shown = mlxlora("train", "--help").out
    titles = [line.rstrip(":") for line in shown.splitlines() if re.fullmatch(r"[A-Z][\w ]+:", line)]
    assert titles == [
        "Model and data",
        "Adapter",
        "Training",
        "Checkpoints and reports",
        "After training",
        "Several machines",
        "Options",
    ]
    flags = [flag for line in shown.splitlines() for flag in re.findall(r"^ +(?:-\w, )?(--[\w-]+)", line)]
    assert len(flags) == len(set(flags)) > 35


def on_a_terminal(command: list[str]) -> str:
    """What a command that ends well shows on a terminal, without the sequences that move its cursor."""
    process, terminal = pty.fork()
    if process == 0:
        os.execv(command[0], command)
    shown = b""
    with suppress(OSError):  # Linux says so when the other side has gone
        while part := os.read(terminal, 1 << 16):
            shown += part
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 0
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.decode())


def test_a_terminal_sees_every_step_and_the_time_that_is_left(
    model: Path, tiny_data: Path, tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "mlxlora_core", "train", "--model", str(model), "--data", str(tiny_data)]
    command += [
        "--adapter-file",
        str(tmp_path / "a.npz"),
        "--iters",
        "400",
        "--test",
        "--steps-per-report",
        "400",
    ]
    text = on_a_terminal(command)
    seen = [int(step) for step in re.findall(r"training \S+ +(\d+)/400 \d\d:\d\d", text)]
    assert len(set(seen)) > 5, "though there is one report alone"
    assert re.search(r"test loss \S+ +\d+/\d+", text)


@pytest.mark.parametrize("verb", ["fuse", "export"])
def test_on_a_terminal_writing_a_model_shows_how_many_tensors_are_done(
    mlxlora: Command, model: Path, tiny_data: Path, tmp_path: Path, verb: str
) -> None:
    adapter = tmp_path / "a.safetensors"
    train(mlxlora, model, tiny_data, adapter)
    out = ["--save-path"] if verb == "fuse" else ["--to", "npz", "--out"]
    command = [sys.executable, "-m", "mlxlora_core", verb, "--model", str(model)]
    text = on_a_terminal([*command, "--adapter-file", str(adapter), *out, str(tmp_path / "out")])
    seen = re.findall(r"(?:fusing|exporting) \S+ +(\d+)/(\d+)", text)
    assert seen and seen[-1][0] == seen[-1][1] != "0"


def test_on_a_terminal_reading_packages_shows_how_many_are_done(tmp_path: Path) -> None:
    packages = ("colorsys", "json", "wave")
    command = [sys.executable, "-m", "mlxlora_core", "data", "--builder", "docstrings"]
    command += ["--out", str(tmp_path / "rows"), *(word for name in packages for word in ("--package", name))]
    seen = re.findall(r"reading packages \S+ +(\d+)/(\d+)", on_a_terminal(command))
    assert seen[-1] == ("3", "3")


def test_interrupted_training_says_how_to_go_on_and_leaves_no_adapter(
    model: Path, tiny_data: Path, tmp_path: Path
) -> None:
    adapter = tmp_path / "a.safetensors"
    command = [sys.executable, "-m", "mlxlora_core", "train", "--model", str(model), "--data", str(tiny_data)]
    command += ["--adapter-file", str(adapter), "--iters", "1000000", "--steps-per-report", "1"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("step       2/"):
                break
        process.send_signal(signal.SIGINT)
        rest = process.stderr.read()
        assert process.wait(30) == 130
    last = rest.splitlines()[-1]
    assert last.startswith("mlxlora: interrupted; step ") and last.endswith(" --resume")
    assert "Traceback" not in rest
    assert not adapter.exists() and not list(tmp_path.glob(".*tmp*"))


def test_a_closed_pipe_is_no_error_of_ours() -> None:
    script = f"{sys.executable} -m mlxlora_core options adapter lora | true; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=60)
    assert done.stdout in ("141\n", "0\n")  # 0 when all was written before the reader went
    assert done.stderr == ""


def test_a_prompt_comes_from_stdin(model: Path) -> None:
    command = [sys.executable, "-m", "mlxlora_core", "generate", "--model", str(model), "-p", "-", "-n", "2"]
    done = subprocess.run(command, input="A layer", capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("\n")


def test_samplers_in_a_row_give_the_same_text_at_any_length(mlxlora: Command, model: Path) -> None:
    samplers = ("--sampler", "repetition-penalty,top-p", "--temp", 1, "--set", "sampler.penalty=1.3")

    def said(count: int) -> dict[str, Any]:
        done = mlxlora("generate", "--model", model, "-p", "A layer", *samplers, "-n", count, "--json")
        assert done.code == 0, done.err
        result: dict[str, Any] = json.loads(done.out)
        return result

    long = said(30)
    for count in (1, 2, 9):
        short = said(count)
        assert long["text"].startswith(short["text"])
        assert short["finish"] == ("stop" if short["text"] == long["text"] else "length")


def test_a_recipe_with_samplers_in_a_row_runs_and_reads_back(
    mlxlora: Command, recipe: Path, tmp_path: Path
) -> None:
    recipe.write_text(recipe.read_text() + '[sampler]\nuse = ["repetition-penalty", "min-p"]\n')
    done = mlxlora("run", recipe, "--set", "sampler.min-p.p=0.2", "--set", "sampler.penalty=1.1")
    assert done.code == 0, done.err
    written = tmp_path / "run" / "recipe.toml"
    assert not any(plan(mlxlora, written).values())
    rows = mlxlora("run", written, "--dry-run").out.splitlines()
    assert any(row.split()[:2] == ["sampler.min-p.p", "0.2"] for row in rows)
    assert "0.2" in (tmp_path / "run" / "report.html").read_text("utf-8")


def test_a_stage_whose_output_is_gone_is_done_again(mlxlora: Command, recipe: Path, tmp_path: Path) -> None:
    mlxlora("run", recipe)
    shutil.rmtree(tmp_path / "run" / "model")
    todo = plan(mlxlora, recipe)
    assert todo["model"] and not todo["data"]
    assert mlxlora("run", recipe).code == 0


def test_what_core_decides_is_set_and_explained_as_an_option_is(
    mlxlora: Command, tiny_checkpoint: Path, tiny_data: Path, tmp_path: Path
) -> None:
    shown = mlxlora("options", "adapter", "lora").out
    assert [
        line.split()[0] for line in shown.splitlines() if line.startswith(("rank", "targets", "layers"))
    ] == [
        "rank",
        "targets",
        "layers",
    ]
    assert "In the section of every adapter, beside use:" in shown
    records = json.loads(mlxlora("options", "builder", "jsonl", "--json").out)
    assert {r["name"]: r["section"] for r in records} == {
        "path": False,
        "files": False,
        "columns": False,
        "test_set_size": True,
        "split_seed": True,
        "write_batch_size": True,
        "extra_rows": True,
    }
    assert "beside use" not in mlxlora("options", "sampler", "top-k").out
    found = {one["name"]: one for one in json.loads(mlxlora("components", "adapter", "--json").out)}
    assert found["lora"]["options"] == ["rank", "scale", "dropout"]
    assert found["lora"]["section"] == ["targets", "layers", "overrides"]

    sets = ("--set", "test_set_size=0.5", "--set", "data.split_seed=3")
    path = ("--set", f"path={tiny_data / 'train.jsonl'}")
    done = mlxlora("data", "--builder", "jsonl", "--out", tmp_path / "rows", *path, *sets, "--json")
    record = json.loads(done.out)
    assert record["split"] == {
        "test_set_size": 0.5,
        "split_seed": 3,
        "write_batch_size": 1000,
        "extra_rows": None,
    }
    assert sum(record["rows"].values()) == pytest.approx(2 * record["rows"]["train"], abs=1)

    flags = ("-q", "--q-group-size", 32, "--set", "quantize.head=true")
    done = mlxlora("convert", "--torch-path", tiny_checkpoint, "--mlx-path", tmp_path / "model", *flags)
    assert done.code == 0, done.err
    assert "output" in json.loads((tmp_path / "model" / "config.json").read_text())["quantized"]
    refused = mlxlora("convert", "--torch-path", tiny_checkpoint, "-q", "--set", "quantize.haed=true")
    assert refused.code == 2
    assert "no option 'haed' (did you mean 'head'? it has group_size, bits, head)" in refused.error


# --- export and observers -----------------------------------------------------

BROKEN = """
from mlxlora_core.api import Observer, hookimpl

class Watcher:
    def __init__(self): self.count = 0
    def event(self, event):
        self.count += 1
        if self.count == 3: raise RuntimeError("lost my pencil")
    def end(self, how): raise SystemExit(9)

@hookimpl
def mlxlora_observers():
    return [
        Observer(name="clumsy", summary="s", start=lambda run, options: Watcher()),
        Observer(name="absent", summary="s", start=lambda run, options: None),
    ]
"""


def table(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def steps(path: Path) -> list[tuple[str, str]]:
    return [(row["kind"], row["step"]) for row in table(path)]


def test_export_gives_what_generate_says_the_same_with(
    mlxlora: Command, model: Path, tiny_data: Path, tmp_path: Path
) -> None:
    train(mlxlora, model, tiny_data, tmp_path / "a.safetensors")
    adapted = ("--model", model, "--adapter-file", tmp_path / "a.safetensors")
    asking = ("-p", "A layer", "-n", 8, "--temp", 0)
    want = mlxlora("generate", *adapted, *asking)
    done = mlxlora("export", "--to", "npz", *adapted, "--out", tmp_path / "out")
    assert done.code == 0 and "lora:lora fused in, by npz:npz, 4 files" in done.out, done.err
    assert mlxlora("generate", "--model", tmp_path / "out", *asking).out == want.out
    kept = tmp_path / "out" / "adapters.npz"
    assert mlxlora("generate", "--model", model, "--adapter-file", kept, *asking).out == want.out

    again = mlxlora("export", "--to", "npz", *adapted, "--out", tmp_path / "out")
    assert again.code == 5 and "--overwrite" in again.err
    flags = ("--overwrite", "--set", "export.dtype=float16", "--json")
    report = json.loads(mlxlora("export", "--to", "npz", *adapted, "--out", tmp_path / "out", *flags).out)
    assert report["exporter"] == "npz:npz" and set(report["files"]) == {
        "weights.npz",
        "config.json",
        "tokenizer.model",
        "adapters.npz",
    }
    assert mlxlora("export", "--to", "nzp", "--model", model, "--out", tmp_path / "b").code == 8
    assert mlxlora("export", "--to", "npz", "--model", model, "--out", model).code == 5
    orphan = mlxlora("export", "--to", "npz", "--model", model, "--adapter", "lora", "--out", tmp_path / "b")
    assert orphan.code == 2 and "add --adapter-file" in orphan.error


def test_a_recipe_exports_and_is_watched(mlxlora: Command, recipe: Path, tmp_path: Path) -> None:
    plain = mlxlora("run", recipe, "--set", f"run.folder={tmp_path / 'plain'}")
    assert plain.code == 0
    recipe.write_text(recipe.read_text() + '[export]\nuse = "npz"\n[observe]\nuse = ["csv"]\n')
    done = mlxlora("run", recipe)
    assert done.code == 0, done.err
    folder = tmp_path / "run"
    record = json.loads((folder / "run.json").read_text())
    assert list(record["stages"]) == ["model", "data", "before", "train", "after", "export"]
    assert record["stages"]["export"]["result"]["exporter"] == "npz:npz"
    assert (folder / "export" / "weights.npz").is_file()
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert steps(folder / "metrics.csv") == [(line["kind"], str(line["step"])) for line in lines]
    assert [row["loss"] for row in table(folder / "metrics.csv")] == [str(line["loss"]) for line in lines]
    for name in ("adapter/adapter.safetensors",):
        assert (folder / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()

    before = (folder / "metrics.csv").read_bytes()
    assert mlxlora("run", recipe).err.count("done already") == 6
    assert (folder / "metrics.csv").read_bytes() == before
    (folder / "export" / "weights.npz").unlink()
    assert [stage for stage, will in plan(mlxlora, recipe).items() if will] == ["export"]
    assert [s for s, will in plan(mlxlora, recipe, "--set", "export.dtype=float16").items() if will] == [
        "export"
    ]
    assert not any(plan(mlxlora, recipe, "--set", "export.use=none", "--set", "observe.use=none").values())
    # What the run wrote down names both, and is understood again.
    written = plan(mlxlora, folder / "recipe.toml")
    assert [stage for stage, will in written.items() if will] == ["export"]


def test_an_observer_of_train_writes_beside_the_adapter_and_goes_on(
    model: Path, tiny_data: Path, tmp_path: Path, mlxlora: Command
) -> None:
    files = ("--model", model, "--data", tiny_data, "--adapter-file", tmp_path / "a.safetensors")
    pace = ("--iters", 1000000, "--steps-per-report", 1, "--observer", "csv")
    command = [sys.executable, "-m", "mlxlora_core", "train", *map(str, (*files, *pace))]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("step       5/"):
                break
        process.send_signal(signal.SIGINT)
        process.stderr.read()
        assert process.wait(30) == 130
    first = steps(tmp_path / "a.csv")
    assert ("train", "5") in first
    with open(tmp_path / "a.csv", "a") as file:
        file.write("999,train,1.5,,,,,,,,,,,\n")  # told, but not saved
    for _ in range(2):
        limit = len(first) + 3
        with subprocess.Popen([*command, "--resume"], stderr=subprocess.PIPE, text=True) as process:
            assert process.stderr is not None
            for number, _ in enumerate(process.stderr):
                if number > limit:
                    break
            process.send_signal(signal.SIGINT)
            process.stderr.read()
            assert process.wait(30) == 130
    told = [int(step) for kind, step in steps(tmp_path / "a.csv") if kind == "train"]
    assert told == list(range(1, len(told) + 1)) and len(told) > len(first)


def test_a_broken_observer_changes_nothing(
    mlxlora: Command, model: Path, tiny_data: Path, tmp_path: Path
) -> None:
    (tmp_path / "broken.py").write_text(BROKEN)
    (tmp_path / "b.csv").write_text("my own table\n")
    files = ("--model", model, "--data", tiny_data, "--iters", 20, "--steps-per-report", 5)
    assert mlxlora("train", *files, "--adapter-file", tmp_path / "a.safetensors").code == 0
    watched = (
        "-P",
        tmp_path / "broken.py",
        "--observer",
        "clumsy",
        "--observer",
        "absent",
        "--observer",
        "csv",
    )
    done = mlxlora("train", *files, "--adapter-file", tmp_path / "b.safetensors", *watched, "--json")
    assert done.code == 0 and json.loads(done.out)["steps"] == 20
    warnings = [line for line in done.err.splitlines() if line.startswith("mlxlora: warning: ")]
    assert len(warnings) == 3, done.err
    assert "observer broken:clumsy failed in event and is left out: RuntimeError: lost my pencil" in done.err
    assert "start gives NoneType, wanted a watcher with event and end" in done.err
    assert "b.csv: is no table of this observer and was left alone" in done.err
    assert (tmp_path / "b.csv").read_text() == "my own table\n"
    one, other = ((tmp_path / f"{n}.safetensors").read_bytes() for n in "ab")
    assert one == other


def test_an_observer_that_is_not_there_is_an_error_before_any_work(
    mlxlora: Command, model: Path, tiny_data: Path, tmp_path: Path
) -> None:
    files = ("--model", model, "--data", tiny_data, "--adapter-file", tmp_path / "a.safetensors")
    done = mlxlora("train", *files, "--observer", "cvs")
    assert done.code == 8 and "no observer 'cvs' (did you mean 'csv'?" in done.error
    done = mlxlora("train", *files, "--set", "observe.columns=3")
    assert done.code == 2 and "none is named" in done.error
    twice = mlxlora("train", *files, "--observer", "csv", "--observer", "csv")
    assert twice.code == 2 and "observer 'csv' is named twice" in twice.error
