"""A training step with a large vocabulary: head and cross-entropy in chunks and in one piece.

    python benchmarks/large_vocabulary.py [--words 128000] [--layers 2] [--bits 4]

A random Llama of width 768 with LoRA on q and v takes steps of 2 rows of 1024 tokens; the ways take turns in
one process. Peak memory is what MLX counts, weights included; processor seconds are those of all threads.
Both must give the same loss. ``recomputed`` is gradient checkpointing, with chunks.
"""

from __future__ import annotations

import gc
import statistics
import time

import click
import mlx.core as mx
import mlx.nn as nn
import numpy as np
from workers.environment import own_kernels

from mlxlora_core.api import Place
from mlxlora_core.cli.session import start
from mlxlora_core.model import head_loss
from mlxlora_core.model.language_model import LanguageModel
from mlxlora_core.model.linears import QuantizedLinear
from mlxlora_core.plugins import Choice, Registry, load
from mlxlora_core.training.batches import Collator
from mlxlora_core.training.examples import Example
from mlxlora_core.training.gradient import mean_gradient

WIDTH, ROWS, TOKENS = 768, 2, 1024
WAYS = {"one piece": (2**40, False), "chunks": (None, False), "recomputed": (None, True)}


def build(registry: Registry, words: int, layers: int, bits: int | None) -> LanguageModel:
    """A model with random weights, and LoRA on all of its layers."""
    spec = registry.find("architecture", "llama").spec
    sizes = {"dim": WIDTH, "n_layers": layers, "head_dim": 64, "hidden_dim": 2048, "n_heads": 12}
    args = spec.args(model_type="llama", n_kv_heads=6, norm_eps=1e-5, vocab_size=words, **sizes)
    mx.random.seed(0)
    model = spec.build(args)
    if bits is not None:
        affine = registry.find("quantizer", "affine")
        choice = Choice(affine, affine.spec.options(bits=bits))
        weight = model.output.weight
        parts = affine.spec.quantize(weight, choice.options)
        model.output = QuantizedLinear(choice, parts, weight.shape)
    model.freeze()
    lora = registry.find("adapter", "lora").spec
    for number, layer in enumerate(model.layers):
        for name in ("wq", "wv"):
            inner: nn.Linear = getattr(layer.attention, name)
            place = Place(f"layers.{number}.attention.{name}", layer=number, shape=inner.weight.shape)
            setattr(layer.attention, name, lora.wrap(inner, place, lora.options()))
    mx.eval(model.parameters())
    made: LanguageModel = model
    return made


@click.command(help=(__doc__ or "").split("\n\n")[0])
@click.option("--words", default=128_000, show_default=True, help="Vocabulary.")
@click.option("--layers", default=2, show_default=True)
@click.option("--bits", type=int, help="Of the head; dense if left out.")
@click.option(
    "--steps", default=3, show_default=True, help="Of each way, beside the first, which does not count."
)
def main(words: int, layers: int, bits: int | None, steps: int) -> None:
    """Measure and print a line for each way."""
    own_kernels()
    registry = load()
    start(registry)
    model = build(registry, words, layers, bits)
    model.train()
    draw = np.random.default_rng(0)
    mask = np.arange(TOKENS + 1) > 0
    rows = [Example(draw.integers(3, words, TOKENS + 1).astype(np.uint32), mask) for _ in range(ROWS)]
    usual = head_loss.CPU_CHUNK_BYTES, head_loss.GPU_CHUNK_BYTES
    taken: dict[str, list[tuple[float, float, int, float]]] = {way: [] for way in WAYS}
    for _ in range(1 + steps):
        for way, (size, recompute) in WAYS.items():
            sizes = usual if size is None else (size, size)
            head_loss.CPU_CHUNK_BYTES, head_loss.GPU_CHUNK_BYTES = sizes
            gc.collect()
            mx.clear_cache()
            mx.reset_peak_memory()
            began, at = time.perf_counter(), time.process_time()
            loss, _, gradient = mean_gradient(model, Collator(rows), range(ROWS), ROWS, recompute)
            mx.eval(gradient)
            wall, processor = time.perf_counter() - began, time.process_time() - at
            taken[way].append((wall, processor, mx.get_peak_memory(), loss.mean))
    plain = min(peak for _, _, peak, _ in taken["one piece"])
    click.echo(
        f"{words} words, width {WIDTH}, {layers} layers, {ROWS} x {TOKENS} tokens, head: {bits or 'dense'}"
    )
    for way, samples in taken.items():
        wall, processor = (statistics.median(sample[i] for sample in samples[1:]) for i in (0, 1))
        peak = max(sample[2] for sample in samples)
        click.echo(
            f"{way:10s}  {ROWS * TOKENS / wall:7.1f} tokens/s  {processor:6.2f} processor seconds a step  "
            f"peak {peak / 1e9:5.2f} GB, {peak / plain:.2f} of one piece  loss {samples[0][3]:.6f}"
        )


if __name__ == "__main__":
    main()
