"""torch-pth: the tensors of a model under whatever names a trainer has saved them, and the numbers right."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llama_torch
import mlx.core as mx
import numpy as np
import pytest
import torch
from mlxlora_torch import open_folder

from mlxlora_core import plugins
from mlxlora_core.api import ForeignModel, ModelError, NoOptions, SafetyError
from mlxlora_core.model import loading
from mlxlora_core.model.convert import ConvertReport, convert
from mlxlora_core.model.events import result_of

Tensors = dict[str, torch.Tensor]
Change = Callable[[Tensors], Any]

RAW = {"dim": 32, "n_heads": 4, "n_kv_heads": 2, "head_dim": 8, "norm_eps": 1e-5}


def renamed(change: Callable[[str], str]) -> Change:
    return lambda tensors: {change(name): tensor for name, tensor in tensors.items()}


def compiled_blocks(name: str) -> str:
    """As torch.compile of each block alone names them."""
    parts = name.split(".")
    return ".".join([*parts[:2], "_orig_mod", *parts[2:]]) if parts[0] == "layers" else name


def with_attributes(tensors: Tensors) -> Tensors:
    """As Megatron and fairscale mark the parts of a split matrix."""
    for number, tensor in enumerate(tensors.values()):
        tensor.tensor_model_parallel, tensor.partition_dim = bool(number % 2), number
        tensor.where, tensor.seen = torch.device("cpu"), {1, 2}
        tensor.original = {"dtype": torch.bfloat16, "shape": torch.Size([2, 3]), "scale": torch.ones(2)}
    return tensors


def parameters_with_attributes(tensors: Tensors) -> dict[str, Any]:
    parameters = {name: torch.nn.Parameter(tensor) for name, tensor in tensors.items()}
    for parameter in parameters.values():
        parameter.is_shared = False
    return parameters


OPTIMIZER = {
    "state": {0: {"exp_avg": torch.ones(3), "step": torch.tensor(7)}},
    "param_groups": [{"lr": 1e-4}],
}
BESIDE = {"optimizer": OPTIMIZER, "epoch": 3, "args": {"dim": 32}}

ODD: dict[str, tuple[Change, str]] = {
    "data parallel": (renamed(lambda n: f"module.{n}"), "taken off the names of the tensors: 'module.'"),
    "twice": (renamed(lambda n: f"module.module.{n}"), "'module.'"),
    "compiled": (renamed(lambda n: f"_orig_mod.{n}"), "'_orig_mod.'"),
    "both": (renamed(lambda n: f"module._orig_mod.{n}"), "'_orig_mod.', 'module.'"),
    "the other way round": (renamed(lambda n: f"_orig_mod.module.{n}"), "'_orig_mod.', 'module.'"),
    "blocks compiled": (renamed(compiled_blocks), "'_orig_mod.'"),
    "fully sharded": (renamed(lambda n: f"_fsdp_wrapped_module.{n}"), "'_fsdp_wrapped_module.'"),
    "lightning": (renamed(lambda n: f"model.{n}"), "'model.'"),
    "any other": (renamed(lambda n: f"net.llama.{n}"), "'net.llama.'"),
    "some apart": (
        lambda t: {f"model.{n}": v for n, v in t.items()} | {"loss.rope.freqs": torch.ones(2)},
        "'model.'",
    ),
    "below model": (
        lambda t: {"model": t, **BESIDE},
        "below 'model'; left out beside them: 'optimizer', 'epoch'",
    ),
    "below state_dict": (lambda t: {"state_dict": t}, "the tensors stand below 'state_dict'"),
    "deep below": (lambda t: {"state": 1, "state_dict": {"model": t}}, "below 'state_dict' and 'model'"),
    "below its own": (lambda t: {"llama": t, "steps": 3}, "below 'llama'; left out beside them: 'steps'"),
    "beside others": (
        lambda t: {"model": t, "rng": {"cpu": torch.zeros(4, dtype=torch.uint8)}},
        "below 'model'",
    ),
    "below and wrapped": (
        lambda t: {"model": {f"module.{n}": v for n, v in t.items()}},
        "the tensors stand below 'model'",
    ),
    "attributes": (with_attributes, ""),
    "parameters": (lambda t: {n: torch.nn.Parameter(v) for n, v in t.items()}, ""),
    "parameters with attributes": (parameters_with_attributes, ""),
    "complex frequencies": (
        lambda t: t | {"freqs_cis": torch.ones(4, 2, dtype=torch.complex64)},
        "left out, since they are computed: 'freqs_cis'",
    ),
}


def plain(folder: Path) -> Tensors:
    tensors: Tensors = torch.load(folder / "consolidated.00.pth", weights_only=True)
    return tensors


@pytest.fixture
def checkpoint(tmp_path: Path, make_checkpoint: Callable[..., Path]) -> Callable[[Change], Path]:
    """A function that writes the tiny checkpoint as ``change`` would have it saved."""

    def make(change: Change) -> Path:
        folder = make_checkpoint(tmp_path / "checkpoint")
        torch.save(change(plain(folder)), folder / "consolidated.00.pth")
        return folder

    return make


def opened(folder: Path) -> ForeignModel:
    return open_folder(folder, NoOptions())


@pytest.mark.parametrize("how", ODD)
def test_an_odd_checkpoint_computes_what_the_plain_one_does(
    how: str, checkpoint: Callable[[Change], Path], tiny_checkpoint: Path, tmp_path: Path
) -> None:
    change, told = ODD[how]
    registry = plugins.load(environ={"MLXLORA_PLUGINS": ""})
    report = result_of(convert(checkpoint(change), tmp_path / "model", registry, dtype="float32"))
    assert isinstance(report, ConvertReport)
    assert told in "; ".join(report.notes) if told else not report.notes
    weights = {name: tensor.float() for name, tensor in plain(tiny_checkpoint).items()}
    tokens = torch.tensor([[1, 5, 300, 17, 9]])
    want = llama_torch.logits(weights, tokens, {**RAW, "n_layers": 2})
    got = loading.load(tmp_path / "model", registry).language_model(mx.array(tokens.numpy()))
    np.testing.assert_allclose(np.array(got), want.numpy(), atol=2e-5)


def test_names_that_only_some_tensors_have_are_no_wrapper(checkpoint: Callable[[Change], Path]) -> None:
    def some(name: str) -> str:
        return f"module.{name}" if name.startswith("layers") else name

    model = opened(checkpoint(renamed(some)))
    assert not model.notes and any(name.startswith("module.layers") for name in model.tensors)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: {"model": t, "state_dict": t}, "holds several tables of tensors: 'model', 'state_dict'"),
        (lambda t: {"a": t, "b": t}, "holds several tables of tensors: 'a', 'b'"),
        (lambda t: t | {"_orig_mod.norm.weight": t["norm.weight"]}, "two tensors of one name"),
        (
            lambda t: {"optimizer": OPTIMIZER, "epoch": 3},
            "holds more than named tensors: 'optimizer' is a dict",
        ),
        (lambda t: t | {"epoch": 3}, "holds more than named tensors: 'epoch' is a value of type int"),
        (lambda t: {"model": t | {"x" * 9999: 3}}, "xxx... is a value of type int"),
        (lambda t: {"model": {"model": {"model": {"model": {"model": t}}}}}, "'model' is a dict"),
    ],
)
def test_what_cannot_be_told_apart_is_refused(
    checkpoint: Callable[[Change], Path], change: Change, words: str
) -> None:
    with pytest.raises(ModelError, match=r"torch\.save") as caught:
        opened(checkpoint(change))
    assert words in str(caught.value) and len(str(caught.value)) < 2000


class Marked(torch.Tensor):
    """A kind of tensor that only its own module knows."""


def test_a_tensor_of_a_foreign_class_is_still_refused(checkpoint: Callable[[Change], Path]) -> None:
    marked = Marked(torch.ones(2))
    marked.mark = 1
    with pytest.raises(SafetyError, match=r"test_torch_names\.Marked"):
        opened(checkpoint(lambda tensors: tensors | {"marked": marked}))


def test_a_table_that_holds_itself_ends(tmp_path: Path) -> None:
    code = (
        "import sys, torch; table = {}; table['model'] = table; table['state_dict'] = table;"
        "torch.save(table, sys.argv[1])"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "consolidated.00.pth")], check=True)
    (tmp_path / "params.json").write_text("{}")
    (tmp_path / "tokenizer.model").write_bytes(b"pieces")
    with pytest.raises(ModelError, match="holds more than named tensors"):
        opened(tmp_path)
