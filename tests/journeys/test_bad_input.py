"""A bad input is one clear line and its exit code, and leaves nothing half-written."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Command = Callable[..., Any]


BROKEN = """
from mlxlora_core.api import Sampler, hookimpl


def build(options):
    return 1 / 0


@hookimpl
def mlxlora_samplers():
    return [Sampler(name="broken", summary="divides by zero", build=build)]
"""


@pytest.fixture
def source(tmp_path: Path, tiny_checkpoint: Path) -> Path:
    """A checkpoint of one's own, to damage."""
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "source"))


@pytest.fixture
def model(tmp_path: Path, tiny_checkpoint: Path, mlxlora: Command) -> Path:
    folder = tmp_path / "model"
    assert mlxlora("convert", "--torch-path", tiny_checkpoint, "--mlx-path", folder).code == 0
    return folder


def refused(mlxlora: Command, code: int, *arguments: object) -> str:
    """The error of a command that must end with ``code`` and one line."""
    done = mlxlora(*arguments)
    assert done.code == code, (done.code, done.err)
    assert done.out == ""
    line: str = done.error
    return line


# --- checkpoints --------------------------------------------------------------


class ShellCommand:
    """Runs a shell command when it is unpickled by anything that trusts it."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.canary}",)


def change_tensors(source: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Rewrite the checkpoint's tensors."""
    import torch

    path = source / "consolidated.00.pth"
    tensors = torch.load(path, weights_only=True)
    change(tensors)
    torch.save(tensors, path)


def four_faults(tensors: dict[str, Any]) -> None:
    del tensors["layers.0.attention.wq.weight"], tensors["layers.1.ffn_norm.weight"]
    tensors["layers.0.attention.wx.weight"] = tensors["norm.weight"]
    tensors["layers.1.attention.wk.weight"] = tensors["layers.1.attention.wk.weight"][:, :-1].clone()


def edit(name: str, text: str | bytes) -> Callable[[Path], None]:
    def change(source: Path) -> None:
        (source / name).write_bytes(text.encode() if isinstance(text, str) else text)

    return change


def second_shard(number: int) -> Callable[[Path], object]:
    first = "consolidated.00.pth"
    return lambda source: shutil.copy(source / first, source / f"consolidated.{number:02d}.pth")


def params(**values: Any) -> Callable[[Path], None]:
    def change(source: Path) -> None:
        path = source / "params.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return change


def other_tokenizer(source: Path) -> None:
    import sentencepiece

    (source / "tokenizer.model").unlink()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["A layer scales the weights."] * 50),
        model_prefix=str(source / "tokenizer"),
        model_type="bpe",
        vocab_size=340,
        hard_vocab_limit=False,
        user_defined_symbols=[f"<{i}>" for i in range(60)],
        byte_fallback=True,
        minloglevel=2,
    )


CHECKPOINTS: dict[str, tuple[Callable[[Path], object], int, str]] = {
    "no folder": (shutil.rmtree, 4, "no such folder"),
    "no shard": (lambda s: (s / "consolidated.00.pth").unlink(), 4, "no weight loader knows this folder"),
    "a gap": (second_shard(2), 4, "01"),
    "one shard twice": (
        lambda s: shutil.copy(s / "consolidated.00.pth", s / "consolidated.01.pth"),
        4,
        "shard",
    ),
    "truncated": (
        lambda s: os.truncate(s / "consolidated.00.pth", (s / "consolidated.00.pth").stat().st_size // 2),
        4,
        "consolidated.00.pth",
    ),
    "not torch": (edit("consolidated.00.pth", b"<html>not found</html>" * 100), 4, "consolidated.00.pth"),
    "no params": (lambda s: (s / "params.json").unlink(), 4, "params.json"),
    "broken params": (edit("params.json", '{"dim": 32,'), 4, "params.json"),
    "params are a list": (edit("params.json", "[1]"), 4, "params.json"),
    "negative dim": (params(dim=-32), 4, "dim"),
    "dim is text": (params(dim="wide"), 4, "dim"),
    "absurd dim": (params(dim=10**18), 4, "dim"),
    "heads do not divide": (params(n_kv_heads=3), 4, "n_kv_heads"),
    "no tokenizer": (lambda s: (s / "tokenizer.model").unlink(), 4, "tokenizer.model"),
    "tokenizer is text": (edit("tokenizer.model", "hello"), 4, "tokenizer.model"),
    "tokenizer of another vocabulary": (other_tokenizer, 4, "vocab"),
}


@pytest.mark.parametrize(("damage", "code", "words"), CHECKPOINTS.values(), ids=CHECKPOINTS)
def test_a_bad_checkpoint(
    mlxlora: Command,
    source: Path,
    tmp_path: Path,
    damage: Callable[[Path], object],
    code: int,
    words: str,
) -> None:
    damage(source)
    line = refused(mlxlora, code, "convert", "--torch-path", source, "--mlx-path", tmp_path / "out")
    assert words in line
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*tmp*"))


def test_all_tensors_that_do_not_fit_are_told_at_once(mlxlora: Command, source: Path, tmp_path: Path) -> None:
    change_tensors(source, four_faults)
    line = refused(mlxlora, 4, "convert", "--torch-path", source, "--mlx-path", tmp_path / "out")
    for name in ("0.attention.wq", "1.ffn_norm", "0.attention.wx", "1.attention.wk"):
        assert name in line
    assert not (tmp_path / "out").exists()


def test_a_pickle_with_foreign_globals_is_refused_and_not_run(
    mlxlora: Command, source: Path, tmp_path: Path
) -> None:
    import torch

    canary = tmp_path / "canary"
    torch.save({"weight": ShellCommand(canary)}, source / "consolidated.00.pth")
    line = refused(mlxlora, 5, "convert", "--torch-path", source, "--mlx-path", tmp_path / "out")
    assert "system" in line
    assert not canary.exists() and not (tmp_path / "out").exists()


def test_a_target_that_holds_something_else_is_left_alone(
    mlxlora: Command, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    target = tmp_path / "thesis"
    target.mkdir()
    (target / "chapter.txt").write_text("years of work")
    for more in ((), ("--overwrite",)):
        refused(mlxlora, 5, "convert", "--torch-path", tiny_checkpoint, "--mlx-path", target, *more)
    assert [path.name for path in target.iterdir()] == ["chapter.txt"]
    refused(mlxlora, 5, "data", "--builder", "docstrings", "--package", "pluggy", "--out", target)
    assert (target / "chapter.txt").read_text() == "years of work"


def test_a_model_folder_is_replaced_only_when_asked(
    mlxlora: Command, tiny_checkpoint: Path, model: Path
) -> None:
    again = ("convert", "--torch-path", tiny_checkpoint, "--mlx-path", model)
    assert "--overwrite" in refused(mlxlora, 5, *again)
    assert mlxlora(*again, "--overwrite").code == 0


@pytest.mark.parametrize("flags", [("--q-bits", 7), ("--q-group-size", 10), ("--q-bits", "four")])
def test_bad_quantization(
    mlxlora: Command, tiny_checkpoint: Path, tmp_path: Path, flags: tuple[object, ...]
) -> None:
    paths = ("--torch-path", tiny_checkpoint, "--mlx-path", tmp_path / "out")
    refused(mlxlora, 2, "convert", *paths, "-q", *flags)
    assert not (tmp_path / "out").exists()


# --- rows ---------------------------------------------------------------------

GOOD = b'{"text": "A layer scales the weights."}\n'
ROWS: dict[str, tuple[bytes, str]] = {
    "a bad line": (GOOD * 2 + b'{"text": "A lay\n', "train.jsonl:3"),
    "a missing key in row 900": (GOOD * 899 + b'{"txt": "A layer"}\n', "train.jsonl:900"),
    "text that is no string": (GOOD + b'{"text": 3}\n', "train.jsonl:2"),
    "an empty file": (b"", "train.jsonl"),
    "only blank lines": (b"\n\n", "train.jsonl"),
    "invalid UTF-8": (GOOD + b'{"text": "\xff"}\n', "train.jsonl:2"),
    "an array": (b'[{"text": "A layer"}]\n', "train.jsonl:1"),
}


@pytest.mark.parametrize(("content", "words"), ROWS.values(), ids=ROWS)
def test_bad_rows(
    mlxlora: Command, model: Path, tiny_data: Path, tmp_path: Path, content: bytes, words: str
) -> None:
    (tiny_data / "train.jsonl").write_bytes(content)
    adapter = tmp_path / "a.safetensors"
    line = refused(mlxlora, 3, "train", "--model", model, "--data", tiny_data, "--adapter-file", adapter)
    assert words in line
    assert not adapter.exists()


def test_bom_and_crlf_are_read_as_if_they_were_not_there(
    mlxlora: Command, model: Path, tiny_data: Path
) -> None:
    measure = ("evaluate", "--model", model, "--data", tiny_data, "--json")
    plain = json.loads(mlxlora(*measure).out)
    path = tiny_data / "test.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    assert json.loads(mlxlora(*measure).out) == plain


def test_training_needs_rows_to_train_on(mlxlora: Command, model: Path, tiny_data: Path) -> None:
    (tiny_data / "train.jsonl").unlink()
    told = refused(mlxlora, 3, "train", "--model", model, "--data", tiny_data)
    assert "there is no train.jsonl" in told and "there is test.jsonl, valid.jsonl" in told


# --- adapters -----------------------------------------------------------------


@pytest.fixture
def adapter(mlxlora: Command, model: Path, tiny_data: Path, tmp_path: Path) -> Path:
    path = tmp_path / "adapter.safetensors"
    files = ("--model", model, "--data", tiny_data, "--adapter-file", path)
    assert mlxlora("train", *files, "--iters", 1).code == 0
    return path


def test_an_adapter_of_another_base(
    mlxlora: Command, adapter: Path, make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    other = tmp_path / "other"
    source = make_checkpoint(tmp_path / "other-source", seed=1)
    assert mlxlora("convert", "--torch-path", source, "--mlx-path", other).code == 0
    line = refused(mlxlora, 4, "generate", "--model", other, "--adapter-file", adapter, "-p", "A")
    assert "another base" in line


def test_an_adapter_of_another_rank(mlxlora: Command, model: Path, adapter: Path, tiny_data: Path) -> None:
    before = adapter.read_bytes()
    files = ("--model", model, "--data", tiny_data, "--adapter-file", adapter.with_name("new.safetensors"))
    flags = ("--resume-adapter-file", adapter, "--set", "adapter.rank=4", "--iters", 1)
    assert "rank" in refused(mlxlora, 4, "train", *files, *flags)
    assert adapter.read_bytes() == before


def test_an_adapter_that_lacks_a_tensor(mlxlora: Command, model: Path, adapter: Path) -> None:
    import mlx.core as mx

    tensors, metadata = mx.load(str(adapter), return_metadata=True)
    del tensors["layers.0.attention.wq.lora_a"]
    mx.save_safetensors(str(adapter), tensors, metadata)
    line = refused(mlxlora, 4, "generate", "--model", model, "--adapter-file", adapter, "-p", "A")
    assert "damaged" in line


@pytest.mark.parametrize(
    "flags",
    [
        ("--set", "adapter.rank=0"),
        ("--iters", "-1"),
        ("--iters", "0"),
        ("--batch-size", "0"),
        ("--learning-rate", "nan"),
        ("--set", "adapter.dropout=1"),
        ("--set", "adapter.rnk=4"),
        ("--set", "adapter.targets=wz"),
        ("--set", "optimizer.rank=4"),
        ("--lora-layers", "0"),
        ("--val-batches", "0"),
        ("--schedule", "linear"),
        ("--grad-accumulation", "0"),
        ("--temp", "-1", "-p", "A"),
        ("--nonsense",),
    ],
)
def test_values_out_of_range(
    mlxlora: Command, model: Path, tiny_data: Path, tmp_path: Path, flags: tuple[str, ...]
) -> None:
    path = tmp_path / "a.safetensors"
    files = ("--model", model, "--data", tiny_data, "--adapter-file", path)
    refused(mlxlora, 2, "train", *files, *flags)
    assert not path.exists()


def test_a_flag_is_named_as_it_was_written(mlxlora: Command, model: Path, tiny_data: Path) -> None:
    files = ("--model", model, "--data", tiny_data)
    line = refused(mlxlora, 2, "train", *files, "--batch-size", 0, "--learning-rate", "fast")
    assert "--batch-size: must be at least 1, got 0" in line and "--learning-rate: wanted a" in line


def test_the_nearest_option_is_suggested(mlxlora: Command, model: Path, tiny_data: Path) -> None:
    flags = ("--set", "adapter.rnk=4")
    assert "did you mean 'rank'?" in refused(
        mlxlora, 2, "train", "--model", model, "--data", tiny_data, *flags
    )


# --- generation, components, recipes ------------------------------------------


def test_a_prompt_longer_than_the_context(
    mlxlora: Command, make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    source = make_checkpoint(tmp_path / "short", params={"max_seq_len": 16})
    model = tmp_path / "short-model"
    assert mlxlora("convert", "--torch-path", source, "--mlx-path", model).code == 0
    assert "16" in refused(mlxlora, 2, "generate", "--model", model, "-p", "A layer scales. " * 20)


def test_an_unknown_component_tells_what_there_is(mlxlora: Command, model: Path) -> None:
    line = refused(mlxlora, 8, "generate", "--model", model, "-p", "A", "--sampler", "gredy")
    assert "did you mean 'greedy'?" in line and "top-p" in line


PARTS = "[model]\ntorch_path = 'x'\n[data]\nuse = 'docstrings'\n"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[trian]\niters = 3\n", "did you mean 'train'?"),
        (
            "[model]\ntorch_path = 'x'\n[train]\nitres = 3\n[data]\nuse = 'docstrings'\n",
            "did you mean 'iters'?",
        ),
        ("[train\n", "TOML"),
        (PARTS.replace("docstrings", "docstring"), "did you mean 'docstrings'?"),
    ],
)
def test_a_bad_recipe(mlxlora: Command, tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(text)
    done = mlxlora("run", path)
    assert done.code in (2, 8)
    assert words in done.error and str(path) in done.error


def test_a_recipe_that_is_not_there(mlxlora: Command, tmp_path: Path) -> None:
    refused(mlxlora, 2, "run", tmp_path / "absent.toml")
    assert "demo" in refused(mlxlora, 2, "run", "dmeo")


def test_a_run_folder_that_holds_something_else(mlxlora: Command, tmp_path: Path) -> None:
    folder = tmp_path / "thesis"
    folder.mkdir()
    (folder / "chapter.txt").write_text("years of work")
    refused(mlxlora, 5, "run", "demo", "--set", f"run.folder={folder}")
    assert [path.name for path in folder.iterdir()] == ["chapter.txt"]


def test_a_folder_that_is_no_model(mlxlora: Command, tmp_path: Path) -> None:
    assert "convert" in refused(mlxlora, 4, "generate", "--model", tmp_path, "-p", "A")


def test_packages_that_cannot_be_read_are_told_and_the_others_go_on(
    mlxlora: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = {
        "mlxlora_raises": "raise RuntimeError('no')",
        "mlxlora_exits": "import sys; sys.exit(3)",
        "mlxlora_dies": "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)",
        "mlxlora_hangs": "import time; time.sleep(1000)",
    }
    for name, code in bad.items():
        (tmp_path / f"{name}.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    out = tmp_path / "out"
    packages = [part for name in (*bad, "mlxlora_absent", "pluggy") for part in ("--package", name)]
    done = mlxlora(
        "data", "--builder", "docstrings", *packages, "--out", out, "--set", "time_limit=3", "--json"
    )
    assert done.code == 0, done.err
    skipped = {skip["source"]: skip["reason"] for skip in json.loads(done.out)["skipped"]}
    assert {*bad, "mlxlora_absent"} <= skipped.keys()
    assert "SIGSEGV" in skipped["mlxlora_dies"] and "3 s" in skipped["mlxlora_hangs"]
    assert json.loads((out / "train.jsonl").read_text().splitlines()[0])["text"].startswith("Q: What is")


def test_a_plugin_that_raises_while_it_works_is_named(mlxlora: Command, model: Path, tmp_path: Path) -> None:
    path = tmp_path / "broken.py"
    path.write_text(BROKEN)
    arguments = ("-P", path, "--sampler", "broken", "-p", "A")
    line = refused(mlxlora, 8, "generate", "--model", model, *arguments)
    assert f"{path}:6: plugin broken" in line and "ZeroDivisionError" in line
