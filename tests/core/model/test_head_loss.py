"""Head and cross-entropy in chunks: loss and gradient are torch's in float64, in a part of the memory."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import torch
from mlx.utils import tree_flatten

from mlxlora_core.machine.device import on_cpu
from mlxlora_core.model import head_loss
from mlxlora_core.model.head_loss import chunk_rows, head_nats
from mlxlora_core.model.ops import cross_entropy

torch.set_num_threads(1)


def torch_loss(model: Any, hidden: mx.array, targets: mx.array, weights: mx.array) -> dict[str, Any]:
    """The loss, and its gradients with respect to what enters the head, to its weight and to its bias."""
    given = {"hidden": hidden, "weight": model.output.weight, "bias": model.output.bias}
    leaves = {name: torch.from_numpy(np.array(x)).double().requires_grad_() for name, x in given.items()}
    logits = leaves["hidden"] @ leaves["weight"].T + leaves["bias"]
    each = torch.nn.functional.cross_entropy(
        logits, torch.from_numpy(np.array(targets)).long(), reduction="none"
    )
    total = (each * torch.from_numpy(np.array(weights)).double()).sum()
    total.backward()
    return {"loss": total.item(), **{name: leaf.grad.numpy() for name, leaf in leaves.items()}}


def agree(got: mx.array, want: Any, what: str, plain: float = 0.0) -> None:
    """To 1e-5 of the largest, or as far as the plain way is from it: MLX's BLAS adds words one by one."""
    assert error(got, want) < max(1e-5, 1.1 * plain), what


def error(got: mx.array, want: Any) -> float:
    return float(np.abs(np.array(got) - want).max() / np.abs(want).max())


@pytest.mark.parametrize(
    ("rows", "words", "width", "chunk"),
    [(40, 300, 8, 9), (1, 300, 8, 1), (7, 300, 8, 3), (260, 131_072, 16, 0)],
)
@pytest.mark.parametrize("training", [True, False])
def test_loss_and_gradients_are_torch_s(
    stand_in: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    training: bool,
    rows: int,
    words: int,
    width: int,
    chunk: int,
) -> None:
    """Of small sizes in small chunks, and of a vocabulary that is taken in chunks as it is (chunk 0)."""
    if chunk:
        monkeypatch.setattr(head_loss, "CPU_CHUNK_BYTES", 4 * words * chunk)
        monkeypatch.setattr(head_loss, "GPU_CHUNK_BYTES", 4 * words * chunk)
    elif on_cpu():
        assert chunk_rows(rows, words) < rows
    model = stand_in(vocab_size=words, width=width)
    hidden = 3 * mx.random.normal((rows, width), key=mx.random.key(1))
    targets = mx.random.randint(0, words, (rows,), key=mx.random.key(2))
    weights = (mx.arange(rows) % 3 != 2).astype(mx.float32)
    want = torch_loss(model, hidden, targets, weights)
    model.train(training)
    by_model = nn.value_and_grad(model, lambda: head_nats(model, hidden, targets, weights))
    by_hidden = mx.value_and_grad(lambda hidden: 2.0 * head_nats(model, hidden, targets, weights))
    loss, gradients = by_model()
    twice, gradient = by_hidden(hidden)
    assert loss.item() == pytest.approx(want["loss"], rel=1e-6)
    assert twice.item() == pytest.approx(2 * want["loss"], rel=1e-6)
    plain = mx.grad(lambda hidden: cross_entropy(model.head(hidden), targets, weights))(hidden)
    agree(gradient, 2 * want["hidden"], "hidden", error(plain, want["hidden"]))
    agree(gradients["output"]["weight"], want["weight"], "weight")
    agree(gradients["output"]["bias"], want["bias"], "bias")
    assert {name for name, x in tree_flatten(gradients) if mx.abs(x).max() > 0} == {
        "output.weight",
        "output.bias",
    }


def test_parameters_are_in_their_places_afterwards(
    stand_in: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head_loss, "CPU_CHUNK_BYTES", 4 * 50 * 3)
    model = stand_in()
    before = dict(tree_flatten(model.parameters()))
    head_nats(model, mx.ones((20, 8)), mx.zeros((20,), mx.uint32))
    after = dict(tree_flatten(model.parameters()))
    assert all(after[name] is tensor for name, tensor in before.items())


def test_few_rows_go_through_the_head_at_once() -> None:
    most = (head_loss.CPU_CHUNK_BYTES if on_cpu() else head_loss.GPU_CHUNK_BYTES) // (4 * 128_000)
    assert chunk_rows(2 * most, 128_000) == 2 * most
    assert chunk_rows(2 * most + 1, 128_000) == -(-(2 * most + 1) // 3)
    assert chunk_rows(10**6, 8192) <= head_loss.GPU_CHUNK_BYTES // (4 * 8192)
    assert chunk_rows(5, 2**40) == 1


def test_a_few_rows_have_the_bits_that_they_have_in_one_piece(stand_in: Callable[..., Any]) -> None:
    model = stand_in()
    hidden, targets = mx.random.normal((30, 8), key=mx.random.key(1)), mx.arange(30)
    logits = model.head(hidden)
    assert mx.array_equal(head_nats(model, hidden, targets), cross_entropy(logits, targets))


MEASURE = """
import sys
from mlxlora_core.machine.device import prepare_cpu
prepare_cpu()
import mlx.core as mx, mlx.nn as nn
from mlxlora_core.model import head_loss
from mlxlora_core.model.language_model import LanguageModel

class Head(LanguageModel):
    vocab_size, head_path, layers = 8000, "output", []
    def __init__(self):
        super().__init__()
        self.output = nn.Linear(48, 8000, bias=False)
    def head(self, hidden):
        return self.output(hidden)

head_loss.CPU_CHUNK_BYTES = head_loss.GPU_CHUNK_BYTES = int(sys.argv[1])
model = Head()
model.freeze()
hidden, targets = mx.random.normal((1024, 48)), mx.random.randint(0, 8000, (1024,))
mx.eval(model.parameters(), hidden, targets)
mx.reset_peak_memory()
mx.eval(mx.value_and_grad(lambda x: head_loss.head_nats(model, x, targets))(hidden))
print(mx.get_peak_memory())
"""


def test_chunks_take_less_than_a_third_of_the_memory() -> None:
    """In processes of their own, of 1024 tokens and 8000 words, in chunks of 64 rows and in one piece."""
    chunks, plain = (
        int(
            subprocess.run([sys.executable, "-c", MEASURE, str(size)], capture_output=True, check=True).stdout
        )
        for size in (4 * 8000 * 64, 2**40)
    )
    assert chunks < plain / 3, f"{chunks} of {plain}"
