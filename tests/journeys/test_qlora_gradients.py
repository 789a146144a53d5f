"""LoRA over packed weights has the gradients that torch finds in float64 for what the bits stand for.

Each family as each form has it; a GGUF of Llama's kind that asks for a window is refused, so that
Mistral's is of folders only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import llama_torch
import mlx.core as mx
import model_forms
import numpy as np
import pytest
import torch
from mlx.utils import tree_flatten
from model_forms import FAMILIES, GGUF_VOCAB, Config, Weights

import mlxlora_core as mlxlora
from mlxlora_core.model import linears
from mlxlora_core.model.convert import convert
from mlxlora_core.model.events import result_of
from mlxlora_core.plugins import Choice
from mlxlora_core.plugins.sections import Quantization, QuantizeConfig
from mlxlora_core.training.batches import Collator
from mlxlora_core.training.examples import Example
from mlxlora_core.training.gradient import mean_gradient

RANK, SCALE = 4, 2.0
pytestmark = pytest.mark.usefixtures("one_torch_thread")
#: rows and tokens of a batch: one, which is multiplied packed, some, and above 128 on each of two cores
SHAPES = ((1, 1), (2, 20), (4, 70))


@dataclass(frozen=True)
class Case:
    """A model with an adapter that has left its start, and the numbers that its bits stand for."""

    model: Any
    weights: Weights
    config: Config


def gguf(kind: str, **sizes: int) -> Callable[[Path, str], tuple[Path, Config, Weights]]:
    def make(folder: Path, family: str) -> tuple[Path, Config, Weights]:
        config = model_forms.config(family, vocab_size=GGUF_VOCAB, **sizes)
        path = folder / "model.gguf"
        return path, config, model_forms.write_gguf(path, config, (kind,), tied=family == "smollm3")

    return make


def mlx_lm(folder: Path, family: str) -> tuple[Path, Config, Weights]:
    config, path = model_forms.config(family), folder / "mlx-lm"
    weights = model_forms.write_hf(path, config, dtype=torch.bfloat16, tied=family == "qwen2", bits={})
    return path, config, weights


def affine(folder: Path, family: str) -> tuple[Path, Config, Weights]:
    """A folder of Hugging Face as ``convert -q`` packs it, the head too."""
    config = model_forms.config(family)
    model_forms.write_hf(folder / "hf", config, dtype=torch.bfloat16)
    registry = mlxlora.registry()
    quantizer = registry.find("quantizer", "affine")
    choice = Choice(quantizer, quantizer.spec.options(group_size=32, bits=4))
    asked = Quantization(choice, QuantizeConfig(head=True))
    result_of(convert(folder / "hf", folder / "own", registry, quantization=asked))
    return folder / "own", config, model_forms.read_folder(folder / "own")


FORMS = {
    "Q4_0": gguf("Q4_0"),
    "Q4_1": gguf("Q4_1"),
    "Q8_0": gguf("Q8_0"),
    "Q4_K": gguf("Q4_K", dim=256, hidden_dim=256),
    "mlx-lm": mlx_lm,
    "affine": affine,
}
CASES = [(f, form) for f in FAMILIES for form in FORMS if f != "mistral" or form in ("mlx-lm", "affine")]


def made(folder: Path, family: str, form: str) -> Case:
    path, config, weights = FORMS[form](folder, family)
    model = mlxlora.load(path)
    packed = {name for name, linear in linears.linears(model.base.module) if linears.is_packed(linear)}
    model.attach("lora", rank=RANK, layers=-1, targets=["all-linear"])
    assert model.adapted is not None and packed >= set(model.adapted.paths) and len(model.adapted.paths) > 13
    draw = np.random.default_rng(1)
    module = model.base.module
    for name, tensor in tree_flatten(module.trainable_parameters()):
        if name.endswith("lora_b"):
            grown = mx.array(0.1 * draw.standard_normal(tensor.shape).astype(np.float32))
            module.load_weights([(name, grown)], strict=False)
    return Case(model, weights, config)


def some_rows(rows: int, tokens: int, vocab: int) -> list[Example]:
    """Examples of which about a third of the tokens does not count."""
    draw = np.random.default_rng(rows)
    found = []
    for _ in range(rows):
        mask = draw.random(tokens + 1) < 0.7
        mask[0], mask[-1] = False, True
        found.append(Example(draw.integers(0, vocab, tokens + 1).astype(np.uint32), mask))
    return found


def autograd(case: Case, examples: Sequence[Example]) -> tuple[float, dict[str, torch.Tensor]]:
    """The mean over the counted tokens, in nats, and its gradients, by torch in float64."""
    leaves, weights = {}, dict(case.weights)
    for name, tensor in tree_flatten(case.model.base.module.trainable_parameters()):
        leaves[name] = torch.tensor(np.array(tensor), dtype=torch.float64, requires_grad=True)
    for path in case.model.adapted.paths:
        change = SCALE * (leaves[f"{path}.lora_a"] @ leaves[f"{path}.lora_b"]).T
        weights[f"{path}.weight"] = weights[f"{path}.weight"] + change
    nats, counted = torch.zeros((), dtype=torch.float64), 0
    for example in examples:
        ids, mask = torch.tensor(example.tokens.astype(np.int64)), torch.tensor(example.mask)
        logits = llama_torch.logits(weights, ids[None, :-1], case.config)[0]
        each = torch.nn.functional.cross_entropy(logits, ids[1:], reduction="none")
        nats, counted = nats + each[mask[1:]].sum(), counted + int(mask.sum())
    (nats / counted).backward()
    return float(nats.detach()) / counted, {name: leaf.grad for name, leaf in leaves.items()}


def check(case: Case, rows: int, tokens: int) -> None:
    examples = some_rows(rows, tokens, case.model.base.language_model.vocab_size)
    loss, _, gradient = mean_gradient(
        case.model.base.language_model, Collator(examples), list(range(rows)), rows
    )
    want_loss, want = autograd(case, examples)
    # A single row multiplies packed: scale · Σ q x + bias · Σ x, whose terms cancel in part.
    assert loss.mean == pytest.approx(want_loss, rel=3e-6 if rows * tokens == 1 else 1e-6)
    got = dict(tree_flatten(gradient))
    assert got.keys() == want.keys()
    for name, exact in want.items():
        largest = float(exact.abs().max())
        # One token sees itself alone, whatever its query and key are.
        assert largest > 1e-5 or (tokens == 1 and ("wq" in name or "wk" in name)), name
        away = np.abs(np.array(got[name]) - exact.numpy()).max()
        assert away <= 1e-4 * largest + 1e-9, (name, away / largest)


@pytest.mark.parametrize(("family", "form"), CASES)
def test_gradients_are_torchs(family: str, form: str, tmp_path: Path) -> None:
    case = made(tmp_path, family, form)
    for shape in SHAPES:
        check(case, *shape)


@pytest.mark.parametrize("form", FORMS)
def test_so_are_those_of_the_product_with_packed_weights(
    form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a GPU takes them, however many rows there are."""
    case = made(tmp_path, "llama", form)
    monkeypatch.setattr(linears, "on_cpu", lambda: False)
    for shape in SHAPES:
        check(case, *shape)
