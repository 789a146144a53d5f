"""What the tests of the core share: a small language model, examples, and converted models."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlxlora_core import plugins as registry_module
from mlxlora_core.model.language_model import LanguageModel
from mlxlora_core.model.tokenizers import CheckedTokenizer, open_tokenizer
from mlxlora_core.plugins import Registry
from mlxlora_core.training.examples import Example

VOCAB = 50


class MeanCache:
    """The sum of what a layer has seen, instead of keys and values."""

    def __init__(self) -> None:
        self.offset = 0
        self.total = mx.zeros((1, 1, 1))


class Block(nn.Module):
    """Adds to each token a function of the mean of all tokens up to it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.wq = nn.Linear(width, 2 * width, bias=False)
        self.wv = nn.Linear(2 * width, width)

    def __call__(self, x: mx.array, cache: MeanCache | None) -> mx.array:
        held, total = (cache.offset, cache.total) if cache is not None else (0, mx.zeros((1, 1, 1)))
        sums = total + mx.cumsum(x, axis=1)
        if cache is not None:
            cache.offset, cache.total = held + x.shape[1], sums[:, -1:]
        mean = sums / mx.arange(held + 1, held + x.shape[1] + 1)[None, :, None]
        return x + self.wv(nn.silu(self.wq(mean)))


class StandIn(LanguageModel):
    """A causal language model of a few lines."""

    head_path = "output"

    def __init__(self, vocab_size: int = VOCAB, width: int = 8, context_tokens: int | None = 64) -> None:
        super().__init__()
        self.vocab_size, self.context_tokens = vocab_size, context_tokens
        self.embedding = nn.Embedding(vocab_size, width)
        self.layers = [Block(width), Block(width)]
        self.output = nn.Linear(width, vocab_size)

    def embed(self, tokens: mx.array) -> mx.array:
        return self.embedding(tokens)

    def run(self, hidden: mx.array, first: int = 0, last: int | None = None, cache: Any = None) -> mx.array:
        blocks = self.layers[first:last]
        for block, entry in zip(blocks, cache[first:last] if cache else [None] * len(blocks), strict=True):
            hidden = block(hidden, entry)
        return hidden

    def head(self, hidden: mx.array) -> mx.array:
        return self.output(hidden)

    def make_cache(self) -> list[Any]:
        return [MeanCache() for _ in self.layers]


@pytest.fixture
def stand_in() -> Callable[..., Any]:
    """A function that makes the stand-in model, the same for the same seed."""

    def make(seed: int = 0, **arguments: Any) -> Any:
        mx.random.seed(seed)
        model = StandIn(**arguments)
        mx.eval(model.parameters())
        return model

    return make


@pytest.fixture
def make_examples() -> Callable[..., tuple[Example, ...]]:
    """A function that makes random examples of given lengths; about a third of their tokens do not count."""

    def make(lengths: Sequence[int], seed: int = 0) -> tuple[Example, ...]:
        draw = np.random.default_rng(seed)
        examples = []
        for length in lengths:
            mask = draw.random(length) < 0.7
            mask[0], mask[-1] = False, True
            examples.append(Example(draw.integers(3, VOCAB, length).astype(np.uint32), mask))
        return tuple(examples)

    return make


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch, registry: Registry) -> None:
    """Every module takes the ways that it takes on a GPU, which MLX computes on the CPU."""
    for name, module in list(sys.modules.items()):
        if name.startswith("mlxlora") and hasattr(module, "on_cpu"):
            monkeypatch.setattr(module, "on_cpu", lambda: False)


@pytest.fixture(scope="session")
def registry() -> Registry:
    """The built-in plugins."""
    return registry_module.load(environ={"MLXLORA_PLUGINS": ""})


@pytest.fixture(scope="session")
def tokenizer(tiny_tokenizer: Path, registry: Registry) -> CheckedTokenizer:
    """The tiny tokenizer: 320 pieces, byte fallback, nothing normalised."""
    return open_tokenizer({"tokenizer.model": tiny_tokenizer}, registry, tiny_tokenizer)


MakeModel = Callable[..., Path]


@pytest.fixture(scope="session")
def model_folder(
    tmp_path_factory: pytest.TempPathFactory, make_checkpoint: Callable[..., Path], registry: Registry
) -> MakeModel:
    """A function that converts a tiny checkpoint and gives the model folder; read it, never write to it.

    ``seed`` is that of the weights, ``bits`` quantizes by groups of 32, and
    ``head`` quantizes the head too.
    """
    from mlxlora_core.model.convert import convert
    from mlxlora_core.model.events import result_of
    from mlxlora_core.plugins import Choice
    from mlxlora_core.plugins.sections import Quantization, QuantizeConfig

    made: dict[Any, Path] = {}

    def make(
        *,
        dtype: str = "float32",
        file_format: str = "safetensors",
        bits: int | None = None,
        head: bool = False,
        seed: int = 0,
    ) -> Path:
        key = (dtype, file_format, bits, head, seed)
        if key not in made:
            folder = tmp_path_factory.mktemp("converted")
            quantization = None
            if bits is not None:
                affine = registry.find("quantizer", "affine")
                choice = Choice(affine, affine.spec.options(group_size=32, bits=bits))
                quantization = Quantization(choice, QuantizeConfig(head=head))
            result_of(
                convert(
                    make_checkpoint(folder / "checkpoint", seed=seed),
                    folder / "model",
                    registry,
                    dtype=dtype,
                    file_format=file_format,
                    quantization=quantization,
                )
            )
            made[key] = folder / "model"
        return made[key]

    return make
