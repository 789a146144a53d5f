"""Files that were made to do harm are refused before they do: no code runs, nothing is written."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import struct
import warnings
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import torch

from mlxlora_core.files import tensor_file

Command = Callable[..., Any]


class Touch:
    """Makes a file when it is unpickled by anything that trusts it."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> Any:
        return os.system, (f"touch '{self.canary}'",)


def refused(mlxlora: Command, code: int, *arguments: object) -> str:
    """The error of a command that must end with ``code`` and one line."""
    done = mlxlora(*arguments)
    assert done.code == code, (done.code, done.err)
    assert done.out == ""
    line: str = done.error
    return line


# --- pickles ------------------------------------------------------------------


def zip_pth(path: Path, canary: Path) -> None:
    torch.save({"norm.weight": torch.ones(3), "w": Touch(canary)}, path)


def legacy_pth(path: Path, canary: Path) -> None:
    torch.save({"w": Touch(canary)}, path, _use_new_zipfile_serialization=False)


def torchscript(path: Path, canary: Path) -> None:
    """A program for torch.jit with a payload in its pickle of constants."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated
        torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), str(path))
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            payload = pickle.dumps(Touch(canary), 2)
            archive.writestr(name, payload if name.endswith(("constants.pkl", "data.pkl")) else data)


def seven_zip(path: Path, canary: Path) -> None:
    """A 7z archive with one file, a pickle, that is stored as it is."""
    payload = pickle.dumps(Touch(canary), 2)
    name = "data.pkl\0".encode("utf-16-le")
    header = bytes(
        [
            *(1, 4),  # header, streams
            *(6, 0, 1, 9, len(payload), 0),  # one packed stream
            *(7, 11, 1, 0, 1, 1, 0, 12, len(payload), 0),  # one folder with one coder, copy
            *(0, 5, 1, 17, 1 + len(name), 0, *name, 0, 0),  # one file and its name
        ]
    )
    start = struct.pack("<2QL", len(payload), len(header), zlib.crc32(header))
    path.write_bytes(
        b"7z\xbc\xaf\x27\x1c\0\4" + struct.pack("<L", zlib.crc32(start)) + start + payload + header
    )


def cut_behind_the_payload(path: Path, canary: Path) -> None:
    zip_pth(path, canary)
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data[:-5] + b"\xff" if name.endswith("data.pkl") else data)


PICKLES = {
    zip_pth: "its pickle asks for posix.system",
    legacy_pth: "is a bare pickle",
    torchscript: "is a TorchScript archive",
    seven_zip: "is a 7z archive",
    cut_behind_the_payload: "its pickle asks for posix.system",
}


@pytest.mark.parametrize(("write", "says"), PICKLES.items(), ids=[write.__name__ for write in PICKLES])
def test_a_pickle_in_any_wrapper_runs_nothing_and_makes_nothing(
    mlxlora: Command,
    source: Path,
    tmp_path: Path,
    canary: Path,
    write: Callable[[Path, Path], None],
    says: str,
) -> None:
    write(source / "consolidated.00.pth", canary)
    before = sorted(tmp_path.iterdir())
    assert says in refused(mlxlora, 5, "convert", "--torch-path", source, "--mlx-path", tmp_path / "out")
    assert sorted(tmp_path.iterdir()) == before


def test_the_payloads_are_live(tmp_path: Path) -> None:
    live = tmp_path / "live"
    pickle.loads(pickle.dumps(Touch(live), 2))
    assert live.exists(), "or the tests above show nothing"
    live.unlink()
    np.save(tmp_path / "a.npy", np.array([Touch(live)], dtype=object), allow_pickle=True)
    np.load(tmp_path / "a.npy", allow_pickle=True)
    assert live.exists()


def test_an_array_of_objects_in_an_npz_is_not_unpickled(
    mlxlora: Command, model: Path, tmp_path: Path, canary: Path
) -> None:
    objects = np.array([Touch(canary)], dtype=object)
    np.savez(tmp_path / "adapter.npz", **{"layers.0.attention.wq.lora_a": objects})
    shutil.copy(tmp_path / "adapter.npz", model / "weights.npz")
    generate = ("generate", "--model", model, "-p", "A")
    line = refused(mlxlora, 4, *generate, "--adapter-file", tmp_path / "adapter.npz")
    assert "there are both" in line
    (model / "weights.npz").rename(tmp_path / "weights.npz")
    line = refused(mlxlora, 4, *generate, "--adapter-file", tmp_path / "adapter.npz")
    assert "is of type '|O', wanted numbers" in line
    (model / "model.safetensors").unlink()
    (tmp_path / "weights.npz").rename(model / "weights.npz")
    assert "is of type '|O', wanted numbers" in refused(mlxlora, 4, *generate)


def test_pickles_that_lie_about_are_not_looked_at(
    mlxlora: Command, model: Path, tiny_data: Path, tmp_path: Path, canary: Path
) -> None:
    for name in ("optimizer.pt", "rng_state.pth", "training_args.bin", "pytorch_model.bin", "data.pkl"):
        for folder in (model, tiny_data):
            (folder / name).write_bytes(pickle.dumps(Touch(canary)))
    adapter = tmp_path / "a.safetensors"
    files = ("--model", model, "--data", tiny_data, "--adapter-file", adapter)
    assert mlxlora("train", *files, "--iters", 1, "--val-batches", 1).code == 0
    assert (
        mlxlora("generate", "--model", model, "--adapter-file", adapter, "-p", "A", "--num-tokens", 1).code
        == 0
    )


# --- names and places ---------------------------------------------------------


def shard(model: Path, name: str, index_name: str | None = None) -> None:
    """Call the weights ``name`` and have an index name them."""
    tensors, _ = tensor_file.load(model / "model.safetensors")
    if "/" not in name:
        (model / "model.safetensors").rename(model / name)
    else:
        (model / "model.safetensors").unlink()
    weights = dict.fromkeys(tensors, index_name or name)
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weights}))


@pytest.mark.parametrize(
    "name",
    [
        "../outside.safetensors",
        "/dev/zero",
        "/etc/passwd",
        "sub/inside.safetensors",
        "..",
        "a\\b",
        "\0",
        "\ud800",
    ],
)
def test_an_index_names_files_of_its_folder_alone(mlxlora: Command, model: Path, name: str) -> None:
    shutil.copy(model / "model.safetensors", model.parent / "outside.safetensors")
    (model / "sub").mkdir()
    shutil.copy(model / "model.safetensors", model / "sub" / "inside.safetensors")
    shard(model, "one.safetensors", name)
    line = refused(mlxlora, 5, "generate", "--model", model, "-p", "A")
    assert "model.safetensors.index.json: names shards outside its folder" in line


def test_a_link_in_an_index_leads_nowhere_else(mlxlora: Command, model: Path, tmp_path: Path) -> None:
    generate = ("generate", "--model", model, "-p", "A", "--num-tokens", 1)
    shard(model, "one.safetensors")
    assert mlxlora(*generate).code == 0
    (model / "one.safetensors").rename(tmp_path / "elsewhere.safetensors")
    for target in (tmp_path / "elsewhere.safetensors", Path("/dev/zero"), Path("one.safetensors")):
        (model / "one.safetensors").symlink_to(target)
        assert "names shards outside its folder" in refused(mlxlora, 5, *generate)
        (model / "one.safetensors").unlink()


def test_the_links_of_a_download_cache_are_followed(mlxlora: Command, model: Path, tmp_path: Path) -> None:
    shard(model, "one.safetensors")
    cache = tmp_path / "models--org--name"
    (cache / "blobs").mkdir(parents=True)
    (cache / "snapshots").mkdir()
    snapshot = cache / "snapshots" / "0123abcd"
    snapshot.mkdir()
    for number, path in enumerate(sorted(model.iterdir())):
        path.rename(cache / "blobs" / f"{number}")
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    assert mlxlora("generate", "--model", snapshot, "-p", "A", "--num-tokens", 1).code == 0
    (snapshot / "one.safetensors").unlink()
    (snapshot / "one.safetensors").symlink_to(tmp_path / "blobs" / "0")
    assert "outside its folder" in refused(mlxlora, 5, "generate", "--model", snapshot, "-p", "A")


def test_names_in_files_do_not_reach_the_terminal(mlxlora: Command, model: Path, tmp_path: Path) -> None:
    evil = "\x1b[2J\x1b]0;x\x07\u202e\nmlxlora: all is well"
    path = tmp_path / "a.safetensors"
    mx.save_safetensors(str(path), {evil: mx.ones(1)})
    line = refused(mlxlora, 4, "generate", "--model", model, "--adapter-file", path, "-p", "A")
    assert "\\x1b[2J" in line and "cannot be printed" in line
    folder = tmp_path / evil.replace("/", "")
    line = refused(mlxlora, 4, "generate", "--model", folder, "-p", "A")
    assert "\\x1b[2J" in line
    np.savez(tmp_path / "a.npz", **{evil: np.ones(1)})
    refused(mlxlora, 4, "generate", "--model", model, "--adapter-file", tmp_path / "a.npz", "-p", "A")
    torch.save({evil: torch.ones(1), 3: evil}, tmp_path / "consolidated.00.pth")
    (tmp_path / "params.json").write_text("{}")
    (tmp_path / "tokenizer.model").write_bytes(b"x")
    refused(mlxlora, 4, "convert", "--torch-path", tmp_path, "--mlx-path", tmp_path / "out")


# --- what is no file ----------------------------------------------------------


def fifo(path: Path) -> None:
    os.mkfifo(path)


def zeros(path: Path) -> None:
    path.symlink_to("/dev/zero")


def loop(path: Path) -> None:
    path.symlink_to(path.name)


def loop_of_folders(path: Path) -> None:
    path.symlink_to(".")


@pytest.mark.parametrize("make", [fifo, zeros, loop, loop_of_folders])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.model"])
def test_what_is_no_file_is_told_and_never_waited_for(
    mlxlora: Command, model: Path, name: str, make: Callable[[Path], None]
) -> None:
    (model / name).unlink()
    make(model / name)
    line = refused(mlxlora, 4, "generate", "--model", model, "-p", "A")
    assert name in line or (name == "config.json" and "config.json" in line)


@pytest.mark.parametrize("make", [fifo, zeros, loop])
def test_no_adapter_index_row_or_recipe_is_waited_for(
    mlxlora: Command, model: Path, tiny_data: Path, tmp_path: Path, make: Callable[[Path], None]
) -> None:
    make(tmp_path / "a.npz")
    refused(mlxlora, 4, "generate", "--model", model, "--adapter-file", tmp_path / "a.npz", "-p", "A")
    make(tmp_path / "recipe.toml")
    refused(mlxlora, 2, "run", tmp_path / "recipe.toml")
    (tiny_data / "train.jsonl").unlink()
    make(tiny_data / "train.jsonl")
    refused(mlxlora, 3, "train", "--model", model, "--data", tiny_data, "--adapter-file", tmp_path / "b.npz")
    shard(model, "one.safetensors")
    (model / "one.safetensors").unlink()
    make(model / "one.safetensors")
    # A link out of the folder is refused for safety, a pipe for what it is.
    refused(mlxlora, 4 if make is fifo else 5, "generate", "--model", model, "-p", "A")


def test_stand_ins_of_weights_are_told_for_what_they_are(mlxlora: Command, model: Path) -> None:
    generate = ("generate", "--model", model, "-p", "A")
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 9\n"
    for name in ("model.safetensors", "tokenizer.model"):
        good = (model / name).read_bytes()
        (model / name).write_bytes(pointer)
        assert "Git LFS pointer" in refused(mlxlora, 4, *generate)
        (model / name).write_bytes(b"<!DOCTYPE html><html>404</html>")
        assert "web page" in refused(mlxlora, 4, *generate)
        (model / name).write_bytes(good)
    size = (model / "model.safetensors").stat().st_size
    os.truncate(model / "model.safetensors", size - 1)
    assert f"is {size - 1} bytes, its header needs {size}" in refused(mlxlora, 4, *generate)


# --- code that a config asks for ----------------------------------------------


@pytest.mark.parametrize(
    "asked", [{"auto_map": {"AutoModelForCausalLM": "evil.Model"}}, {"model_file": "evil.py"}]
)
def test_a_config_that_asks_for_code_is_refused(
    mlxlora: Command, model: Path, source: Path, tmp_path: Path, canary: Path, asked: dict[str, Any]
) -> None:
    for folder, name in ((model, "config.json"), (source, "params.json")):
        (folder / "evil.py").write_text(f"open({str(canary)!r}, 'w')\n")
        path = folder / name
        path.write_text(json.dumps(json.loads(path.read_text()) | asked))
    (key,) = asked
    line = refused(mlxlora, 5, "generate", "--model", model, "-p", "A")
    assert f"asks for code of its own ({key})" in line
    line = refused(mlxlora, 5, "convert", "--torch-path", source, "--mlx-path", tmp_path / "out")
    assert f"asks for code of its own ({key})" in line
    assert not (tmp_path / "out").exists()


def test_templates_in_a_model_folder_are_not_run(mlxlora: Command, model: Path, canary: Path) -> None:
    template = "{{ ''.__class__.__mro__[1].__subclasses__() }}{% for i in range(10**12) %}{% endfor %}"
    template += f"{{{{ cycler.__init__.__globals__.os.system('touch {canary}') }}}}"
    (model / "chat_template.jinja").write_text(template)
    (model / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    generate = ("generate", "--model", model, "-p", "A", "--num-tokens", 1)
    assert mlxlora(*generate).code == 0
    path = model / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": template}))
    refused = mlxlora(*generate)
    assert refused.code == 4 and "has no option 'chat_template'" in refused.error
    assert not canary.exists()


@pytest.mark.parametrize(
    ("template", "told"),
    [
        (
            "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
            "it loops for too",
        ),
        ("{{ 'a' * 10**9 }}", "it loops for too long or makes too much text"),
        ("{{ cycler.__init__.__globals__.os.system('touch CANARY') }}", "it reaches for '__init__' of type"),
    ],
)
def test_a_chat_template_that_is_hostile_is_stopped(
    mlxlora: Command, model: Path, canary: Path, template: str, told: str
) -> None:
    (model / "chat_template.jinja").write_text(template.replace("CANARY", str(canary)))
    path = model / "config.json"
    config = json.loads(path.read_text()) | {"tokenizer_files": ["tokenizer.model", "chat_template.jinja"]}
    path.write_text(json.dumps(config))
    done = mlxlora("generate", "--model", model, "-p", "A", "--num-tokens", 1, "--chat")
    assert done.code == 5
    assert "chat_template.jinja:1: the chat template was stopped: " + told in done.error
    assert not canary.exists()


def test_numbers_of_a_config_allocate_nothing(mlxlora: Command, source: Path, tmp_path: Path) -> None:
    path = source / "params.json"
    good = json.loads(path.read_text())
    convert = ("convert", "--torch-path", source, "--mlx-path", tmp_path / "out")
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    for key in ("dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size"):
        for value in (10**18, 10**6, -(10**6), "7"):
            path.write_text(json.dumps(good | {key: value}))
            done = mlxlora(*convert)
            if done.code == 0:  # a negative size means that the weights tell
                assert (key, value) == ("vocab_size", -(10**6))
                shutil.rmtree(tmp_path / "out")
            else:
                assert done.code == 4 and done.error
    assert mx.get_peak_memory() - before < 64 << 20
