"""benchmarks/peers.py and gpu.py: arithmetic, what their tools start from, and how workers and they talk.

The tools themselves are not here; a run of the benchmark checks that they agree.
"""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

from workers import commands, contest, table, weights  # noqa: E402
from workers.channel import Job  # noqa: E402
from workers.contest import Entry, Failed, Group, Pace, Run, Worker  # noqa: E402
from workers.shapes import SHAPES, Shape, decode_flop, prefill_flop, train_flop  # noqa: E402

TINY = Shape("tiny", 8, layers=2, heads=2, kv_heads=1, mlp=12, vocabulary=20)
SHAPE = {shape.name: shape for shape in SHAPES}


@pytest.mark.parametrize("path", sorted(BENCHMARKS.rglob("*.py")), ids=lambda p: p.name)
def test_every_program_compiles(path: Path) -> None:
    ast.parse(path.read_text("utf-8"), path)


def test_help_of_the_program() -> None:
    done = subprocess.run([sys.executable, BENCHMARKS / "peers.py", "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and "--quick" in done.stdout


def test_the_gpu_program_wants_a_gpu_or_a_small_model(monkeypatch: pytest.MonkeyPatch) -> None:
    import gpu
    from click.testing import CliRunner

    monkeypatch.delenv("OPENBLAS_CORETYPE", raising=False)  # set aside, but other tests compute with it
    assert "--tiny" in CliRunner().invoke(gpu.main, ["--help"]).output
    monkeypatch.setattr(gpu, "check_environment", lambda peers: None)
    monkeypatch.setattr(gpu.doctor, "device", lambda: gpu.doctor.Device("cpu", "cpu", "any"))
    refused = CliRunner().invoke(gpu.main, [])
    assert isinstance(refused.exception, SystemExit) and "MLX has no GPU here" in refused.output


def test_what_fails_or_would_end_too_late_is_told_and_the_rest_goes_on(tmp_path: Path) -> None:
    import click
    import gpu

    record = gpu.Record(gpu.doctor.Device("cpu", "cpu", "any"), ["1b"], 60.0, tmp_path / "result.json")

    def fail() -> None:
        raise click.ClickException("too\nlarge")

    assert record.attempt("one", lambda: None, timed=True) and not record.attempt("two", fail, timed=True)
    record._longest = 100.0
    assert not record.attempt("three", lambda: None, timed=True) and record.attempt("four", lambda: None)
    kept = json.loads((tmp_path / "result.json").read_text())
    assert kept["faults"] == ["two: too\\nlarge", "three: no time left"] and set(kept["seconds"]) == {
        "one", "two", "four"
    }  # fmt: skip


def test_a_python_without_peers_is_refused_with_the_commands_that_make_one(tmp_path: Path) -> None:
    (tmp_path / "python").symlink_to(sys.executable)
    bare = tmp_path / "bare"
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -S -I "$@"\n')
    bare.chmod(0o755)
    assert not commands.has_modules(str(bare), ("mlx_lm",))
    command = [sys.executable, BENCHMARKS / "peers.py", "--python", str(bare), "--no-keep"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert "pip install -r benchmarks/peers-requirements.txt" in " ".join(done.stderr.split())


# --- arithmetic -----------------------------------------------------------------


@pytest.mark.parametrize("shape", [TINY, SHAPE["embedded"], SHAPE["90m"]], ids=lambda s: s.name)
def test_parameters_are_those_of_the_model_that_mlxlora_builds(shape: Shape) -> None:
    """Counted from a built model: every linear, and the embedding where it is the head."""
    from mlxlora_llama.config import ModelArgs
    from mlxlora_llama.model import Model

    from mlxlora_core.model.linears import linears

    args = ModelArgs(
        "llama",
        dim=shape.width,
        n_layers=shape.layers,
        head_dim=shape.head,
        hidden_dim=shape.mlp,
        n_heads=shape.heads,
        n_kv_heads=shape.kv_heads,
        norm_eps=1e-5,
        vocab_size=shape.vocabulary,
        tie_word_embeddings=shape.tied,
    )
    model: Any = Model(args)
    sizes = {path: linear.weight.size for path, linear in linears(model)}
    if shape.tied:
        sizes["output"] = model.tok_embeddings.weight.size
    assert shape.matmul_parameters == sum(sizes.values())
    assert shape.head_parameters == sizes["output"]


def test_the_90m_shape_has_its_size() -> None:
    shape = SHAPE["90m"]
    assert round((shape.matmul_parameters + shape.head_parameters) / 1e6) == 90  # the embedding beside
    assert train_flop(shape, 1) == pytest.approx(0.337e9, rel=1e-2)


def test_operations_by_hand() -> None:
    # q and o 8·8 each, k and v 8·4 each, three of 8·12; two layers; head 20·8
    layers, head = 2 * (2 * 64 + 2 * 32 + 3 * 96), 160
    assert train_flop(TINY, 10) == 4 * (layers + head) * 10
    assert decode_flop(TINY, 10) == 2 * (layers + head) * 10
    assert prefill_flop(TINY, 10) == 2 * (layers * 10 + head)


def test_mfu_is_model_operations_by_the_rate() -> None:
    assert contest.mfu(0.337e9, 300.0, 185.0) == pytest.approx(0.337e9 * 300 / 185e9)


def test_the_summary_of_samples() -> None:
    assert contest.summary([3.0, 1.0, 2.0, 9.0]) == {"median": 2.5, "low": 1.0, "high": 9.0, "samples": 4}


def test_ratios_say_how_many_times_as_fast_mlxlora_is() -> None:
    common = {"shape": "s", "kind": "decode", "unit": "tokens/s"}
    rows: list[dict[str, Any]] = [
        {**common, "tool": "mlxlora", "median": 30.0},
        {**common, "tool": "mlx-lm", "median": 10.0},
        {**common, "tool": "mlxlora", "median": 24.0, "adapter": True},
        {**common, "tool": "mlx-lm", "median": 12.0, "adapter": True},
        {**common, "tool": "torch", "error": "gone"},
        {"shape": "s", "kind": "conversion", "unit": "seconds", "tool": "mlxlora", "median": 2.0},
        {"shape": "s", "kind": "conversion", "unit": "seconds", "tool": "mlx-lm", "median": 5.0},
    ]
    table.compare(rows)
    assert [row.get("ratio") for row in rows] == [1, 3, 1, 2, None, 1, 2.5]


def test_a_table_takes_the_place_of_the_one_before_it() -> None:
    page = (BENCHMARKS.parent / "docs" / "performance.md").read_text("utf-8")
    for begin, end in (table.PEERS, table.GPU):
        once = table.replaced(page, "| new |", (begin, end))
        assert "| new |" in once and begin in page
        assert table.replaced(once, "| newer |", (begin, end)) == once.replace("| new |", "| newer |")
        assert once.startswith(page.partition(begin)[0])
        assert once.endswith(page.partition(end)[2])


# --- weights --------------------------------------------------------------------


def test_both_layouts_turn_the_same_features_by_the_same_angle() -> None:
    """Scores of q and k under Meta's rotation of pairs, and of the reordered rows under that of halves."""
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    heads, head, width, tokens = 2, 6, 5, 4
    wq, wk, x = (
        rng.standard_normal(s) for s in ((heads * head, width), (heads * head, width), (tokens, width))
    )
    angle = np.arange(tokens)[:, None] * 10000.0 ** (-2 * np.arange(head // 2) / head)
    turn = np.exp(1j * angle)[:, None]  # (T, 1, E / 2)

    def pairs(y: Any) -> Any:
        y = y.reshape(tokens, heads, head // 2, 2)
        z = (y[..., 0] + 1j * y[..., 1]) * turn
        return np.concatenate([z.real, z.imag], -1)

    def halves(y: Any) -> Any:
        y = y.reshape(tokens, heads, 2, head // 2)
        z = (y[..., 0, :] + 1j * y[..., 1, :]) * turn
        return np.concatenate([z.real, z.imag], -1)

    def reordered(w: Any) -> Any:
        return weights.half_split(torch.from_numpy(w), heads).numpy()

    want = np.einsum("thd,shd->hts", pairs(x @ wq.T), pairs(x @ wk.T))
    got = np.einsum("thd,shd->hts", halves(x @ reordered(wq).T), halves(x @ reordered(wk).T))
    assert np.allclose(got, want)
    assert not np.allclose(np.einsum("thd,shd->hts", halves(x @ wq.T), halves(x @ wk.T)), want)


def test_every_tensor_has_a_name_in_either_layout() -> None:
    pytest.importorskip("torch")
    names = [weights.hugging_face_name(name) for name in weights.random_tensors(TINY)]
    assert len(set(names)) == len(names) == 2 * 9 + 3
    assert "model.layers.1.self_attn.q_proj.weight" in names and "lm_head.weight" in names


# --- workers --------------------------------------------------------------------

WORKER = """
import itertools, sys
from workers.channel import Channel, job
channel, work = Channel(), job()
print("what a library prints is no answer")
if work.dtype == "gone":
    sys.exit("it has gone")
channel.say(loss={"float32": 2.0, "bfloat16": 2.008, "4bit": 2.01}[work.dtype], versions={})
channel.serve((float(n) for n in itertools.count(1)))
"""


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """A run whose tools are the worker above."""
    (tmp_path / "workers").mkdir()
    (tmp_path / "workers" / "__init__.py").touch()
    (tmp_path / "workers" / "channel.py").symlink_to(BENCHMARKS / "workers" / "channel.py")
    (tmp_path / "workers" / "told.py").write_text(WORKER)
    monkeypatch.setattr(contest, "BENCHMARKS", tmp_path)
    result: dict[str, Any] = {
        "rows": [],
        "checks": [],
        "versions": {},
        "rates": {"float32": 2.0, "bfloat16": 4.0},
    }
    return Run(sys.executable, Pace(3, 1e9, batch=1, prompt_tokens=4, new_tokens=8), True, result)


def contestant(dtype: str) -> Entry:
    return Entry("tool " + dtype, "told", Path(), dtype, dtype)


def test_a_contest_counts_all_samples_but_the_first(run: Run) -> None:
    run.contest(TINY, "decode", Group("", [contestant("float32"), contestant("bfloat16")]), Path())
    first, second = run.result["rows"]
    assert (first["samples"], first["first_seconds"]) == (3, 1.0)
    assert first["median"] == 8 / 3 and (first["low"], first["high"]) == (8 / 4, 8 / 2)  # of 2, 3 and 4 s
    assert first["mfu"] == pytest.approx(2 * TINY.matmul_parameters * (8 / 3) / 2e9)
    assert second["mfu"] == pytest.approx(first["mfu"] / 2)
    assert first["peak_rss_bytes"] > 1e6
    assert [check["off"] for check in run.result["checks"]] == [0, pytest.approx(0.004)]


def test_tools_that_disagree_are_not_timed(run: Run) -> None:
    import click

    with pytest.raises(click.ClickException, match=r"differ by 5.0e-03, allowed is 0.001"):
        run.contest(TINY, "decode", Group("", [contestant("float32"), contestant("4bit")]), Path())
    assert run.result["rows"] == []


def test_a_tool_that_goes_away_is_a_row_with_its_last_word(run: Run) -> None:
    run.contest(TINY, "decode", Group("", [contestant("float32"), contestant("gone")]), Path())
    assert run.result["rows"][0]["samples"] == 3
    assert run.result["rows"][1]["error"] == "it has gone"


def test_a_slow_tool_gives_one_sample_which_counts(run: Run) -> None:
    run.pace = Pace(3, 0.0, batch=1, prompt_tokens=4, new_tokens=8)
    run.contest(TINY, "decode", Group("", [contestant("float32")]), Path())
    (row,) = run.result["rows"]
    assert (row["samples"], row["median"]) == (1, 8 / 1)


def on_a_gpu(run: Run) -> Run:
    """The same tools, as they take part where MLX computes on a GPU."""
    return Run(run.peers, run.pace, False, run.result)


def test_on_a_gpu_the_two_samples_that_build_kernels_never_count(run: Run) -> None:
    run = on_a_gpu(run)
    run.pace = Pace(3, 0.0, batch=1, prompt_tokens=4, new_tokens=8)
    tools = [contestant("bfloat16"), contestant("gone")]
    run.contest(TINY, "decode", Group("", tools), Path())
    first, gone = run.result["rows"]
    assert (first["samples"], first["median"], first["first_seconds"]) == (1, 8 / 3, 1.0)
    assert gone["error"] == "it has gone"


def test_on_a_gpu_4_bits_may_differ_as_much_as_the_type_that_they_are_computed_in(run: Run) -> None:
    on_a_gpu(run).contest(TINY, "decode", Group("", [contestant("bfloat16"), contestant("4bit")]), Path())
    assert [check["tolerance"] for check in run.result["checks"]] == [5e-3, 5e-3]


def test_warming_up_makes_a_sample_of_all_work_and_keeps_no_row(run: Run) -> None:
    tools = [contestant("bfloat16"), contestant("gone")]
    found = on_a_gpu(run).warm_up([("train", tools), ("decode", tools)], Path())
    assert [(each["kind"], each["seconds"]) for each in found] == [
        ("train", 1.0), ("train", None), ("decode", 1.0), ("decode", None)
    ]  # fmt: skip
    assert run.result["rows"] == []


def test_a_worker_that_is_silent_for_too_long_is_ended(run: Run) -> None:
    worker = Worker(sys.executable, "told", Job("decode", dtype="bfloat16"), run.environment("any"), 20.0)
    assert worker.read()["loss"] == 2.008
    worker.patience = 0.2
    with pytest.raises(Failed, match=r"it said nothing for 0\.2 s"):
        worker.read()
    worker.close()


def test_a_worker_says_why_it_ends(run: Run) -> None:
    worker = Worker(sys.executable, "told", Job("decode", dtype="gone"), run.environment("any"))
    with pytest.raises(Failed, match="it has gone"):
        worker.sample()
    assert worker.close() > 0


def test_a_command_is_timed_and_what_it_makes_removed(tmp_path: Path) -> None:
    code = "import sys, pathlib; pathlib.Path(sys.argv[1]).mkdir()"
    made = tmp_path / "made"
    command = commands.Command("make", "python", [sys.executable, "-c", code, str(made)], made)
    for _ in range(2):
        seconds, peak = commands.run_command(command, {})
        assert seconds > 0 and peak > 1e6 and not made.exists()
    commands.run_command(command, {}, keep=True)
    assert made.is_dir()


def test_a_job_survives_the_way_to_its_worker() -> None:
    job = Job("train", folder="x", adapter=True)
    assert Job(**json.loads(json.dumps(job.__dict__))) == job


# --- on a Mac -----------------------------------------------------------------

ON_METAL = BENCHMARKS / "on_metal.md"


def test_the_commands_for_a_mac_are_there() -> None:
    """Two lines, of which the first installs what the second runs."""
    import gpu

    page = ON_METAL.read_text("utf-8")
    (block,) = re.findall(r"```\n(.*?)```", page, re.DOTALL)
    install, run = block.splitlines()
    (environment,) = set(re.findall(r"\b(\w+)/bin/", block))
    assert f"-m venv {environment} &&" in install and run.startswith(f"{environment}/bin/python ")
    asked = [word for word in install.split() if word.endswith(".txt")]
    assert asked and all((BENCHMARKS.parent / path).is_file() for path in asked)
    (extra,) = re.findall(r"'\.\[(\w+)\]'", install)
    project = tomllib.loads((BENCHMARKS.parent / "pyproject.toml").read_text("utf-8"))["project"]
    assert extra in project["optional-dependencies"]
    _, program, *flags = run.split()
    assert (BENCHMARKS.parent / program).resolve() == Path(gpu.__file__).resolve()
    context = gpu.main.make_context("gpu.py", flags)
    assert context.params["shapes"] == ("1b",) and context.params["minutes"] == 20.0
    known = {name for parameter in gpu.main.params for name in parameter.opts}
    assert set(re.findall(r"--[a-z-]+", page)) <= known
    assert re.search(r"gpu-\*\.json", page) and "gpu-{name}.json" in Path(gpu.__file__).read_text("utf-8")


def test_how_often_a_step_was_compiled_is_told() -> None:
    row = {"shape": "1b", "kind": "train 2048", "tool": "mlxlora", "unit": "tokens/s", "error": "x"}
    machine = {"device": {"name": "D"}, "threads": 1, "memory_bytes": 1e9, "system": "S"}
    result = {"date": "d", "quick": False, "machine": machine, "versions": {}, "rates": {}}
    told = table.text({**result, "rows": [{**row, "compiles": 2}, {**row, "tool": "mlx-lm", "compiles": 1}]})
    assert "compiled: mlxlora 2 (1b, train 2048), mlx-lm 1 (1b, train 2048)." in told
    assert "compiled" not in table.text({**result, "rows": [row]})


def test_both_folders_state_the_same_positions_and_norms(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A default may differ from tool to tool, and has."""
    monkeypatch.setattr(weights, "tokenizer", lambda vocabulary: b"")
    tensors = weights.random_tensors(TINY, "float32", "cpu")
    weights.write_meta(tmp_path / "meta", TINY, tensors)
    weights.write_hugging_face(tmp_path / "hf", TINY, tensors)
    meta = json.loads((tmp_path / "meta" / "params.json").read_text())
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert meta["rope_theta"] == config["rope_theta"] and meta["norm_eps"] == config["rms_norm_eps"]
    assert meta["max_seq_len"] == config["max_position_embeddings"]
