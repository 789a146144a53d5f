"""Memory and time of ``mlxlora convert`` on a checkpoint that is larger than its memory may grow.

Makes a random float16 checkpoint of 1.1 B parameters (2.2 GB: width 2048, 22
layers, vocabulary 32000), converts it dense and quantized, each in a process
of its own, and prints the peak resident memory of that process::

    python benchmarks/conversion.py [--layers 22] [--json]
"""

from __future__ import annotations

import io
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import click
from workers.environment import own_kernels

WIDTH, HEADS, KV_HEADS, HIDDEN, VOCABULARY = 2048, 32, 4, 5632, 32000
VARIANTS = {"dense": [], "4 bits": ["-q"], "8 bits": ["-q", "--q-bits", "8"]}


def write_checkpoint(folder: Path, layers: int) -> int:
    """Write a random Llama checkpoint; its size in bytes."""
    import torch

    torch.manual_seed(0)
    head = WIDTH // HEADS
    shapes = {"tok_embeddings.weight": (VOCABULARY, WIDTH), "norm.weight": (WIDTH,)}
    for i in range(layers):
        shapes |= {
            f"layers.{i}.attention.wq.weight": (WIDTH, WIDTH),
            f"layers.{i}.attention.wk.weight": (KV_HEADS * head, WIDTH),
            f"layers.{i}.attention.wv.weight": (KV_HEADS * head, WIDTH),
            f"layers.{i}.attention.wo.weight": (WIDTH, WIDTH),
            f"layers.{i}.feed_forward.w1.weight": (HIDDEN, WIDTH),
            f"layers.{i}.feed_forward.w2.weight": (WIDTH, HIDDEN),
            f"layers.{i}.feed_forward.w3.weight": (HIDDEN, WIDTH),
            f"layers.{i}.attention_norm.weight": (WIDTH,),
            f"layers.{i}.ffn_norm.weight": (WIDTH,),
        }
    shapes["output.weight"] = (VOCABULARY, WIDTH)
    torch.save(
        {n: torch.randn(s).mul_(0.02).half() for n, s in shapes.items()}, folder / "consolidated.00.pth"
    )
    params = {"dim": WIDTH, "n_layers": layers, "n_heads": HEADS, "n_kv_heads": KV_HEADS, "norm_eps": 1e-5}
    (folder / "params.json").write_text(json.dumps({**params, "vocab_size": VOCABULARY}))
    (folder / "tokenizer.model").write_bytes(tokenizer())
    return (folder / "consolidated.00.pth").stat().st_size


def tokenizer() -> bytes:
    """A SentencePiece model of exactly the vocabulary, trained on made-up words."""
    import sentencepiece

    draw = random.Random(0)
    syllables = [a + b + c for a in "bdfgklmnprstvz" for b in "aeiou" for c in ("", "n", "r", "s")]
    words = ["".join(draw.choices(syllables, k=draw.randint(2, 5))) for _ in range(60_000)]
    lines = (" ".join(draw.choices(words, k=12)) for _ in range(30_000))
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=lines,
        model_writer=model,
        model_type="bpe",
        vocab_size=VOCABULARY,
        byte_fallback=True,
        minloglevel=2,
    )
    return model.getvalue()


def measure(source: Path, target: Path, flags: list[str]) -> dict[str, Any]:
    """Convert in a child process; its seconds and its peak resident memory."""
    command = [sys.executable, "-m", "mlxlora_core", "convert", "--torch-path", str(source)]
    started = time.perf_counter()
    process = subprocess.Popen(
        [*command, "--mlx-path", str(target), *flags], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"convert {flags} ended with {os.waitstatus_to_exitcode(status)}")
    written = sum(path.stat().st_size for path in target.iterdir())
    return {
        "seconds": round(time.perf_counter() - started, 1),
        "peak_rss_bytes": _rss_bytes(usage),
        "written_bytes": written,
        "said": output.strip().splitlines(),
    }


def _rss_bytes(usage: resource.struct_rusage) -> int:
    """ru_maxrss is in kilobytes on Linux and in bytes on macOS."""
    return usage.ru_maxrss if sys.platform == "darwin" else usage.ru_maxrss * 1024


@click.command()
@click.option("--layers", type=int, default=22, show_default=True, help="Layers of the checkpoint.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def main(layers: int, as_json: bool) -> None:
    """Measure what conversion takes, dense and quantized."""
    own_kernels()
    with tempfile.TemporaryDirectory(prefix="mlxlora-conversion-") as work:
        source = Path(work) / "checkpoint"
        source.mkdir()
        # In a process of its own: a child's peak counts from what its parent held when it began.
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            size = pool.submit(write_checkpoint, source, layers).result()
        results: dict[str, Any] = {"checkpoint_bytes": size}
        for name, flags in VARIANTS.items():
            results[name] = measure(source, Path(work) / name.replace(" ", "-"), flags)
    if as_json:
        click.echo(json.dumps(results, indent=2))
        return
    click.echo(f"checkpoint: {size / 1e9:.2f} GB")
    for name in VARIANTS:
        row = results[name]
        click.echo(
            f"{name:8s} {row['seconds']:6.1f} s  peak {row['peak_rss_bytes'] / 1e9:.3f} GB  "
            f"written {row['written_bytes'] / 1e9:.2f} GB"
        )


if __name__ == "__main__":
    main()
