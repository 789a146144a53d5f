"""Bits per byte of the embedded base model on documentation that it has not seen.

Beside it stand two measures that need no network: a 5-gram model of the same
training tokens (interpolated Kneser-Ney: Chen and Goodman 1999, section 2.7)
and ``xz -9`` over the same text in one piece::

    PYTHONPATH=tools python benchmarks/base_model.py --site corpus/lib/python3.11/site-packages
"""

from __future__ import annotations

import lzma
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path

import click
import numpy as np
from mlxlora_sentencepiece.tokenizer import SentencePieceTokenizer
from numpy.typing import NDArray
from pretrain import BASE, VOCABULARY, corpus, documents, examples, rows

from mlxlora_core.machine.device import prepare_cpu
from mlxlora_core.model import loading
from mlxlora_core.model.convert import convert
from mlxlora_core.model.events import result_of
from mlxlora_core.plugins import load, start_runtimes
from mlxlora_core.training.evaluation import evaluate
from mlxlora_core.training.examples import Example

BITS = (VOCABULARY - 1).bit_length()
ORDER = 5
# The one that was held out, and some that the corpus needs to run but does not read.
PACKAGES = ("networkx", "urllib3", "dateutil", "toolz", "patsy", "setuptools", "wrapt", "formulaic")

Grams = NDArray[np.uint64]


class KneserNey:
    """P(token | the four before it), interpolated down to the uniform distribution.

    A gram of k tokens is one number of k · ``BITS`` bits, its last token lowest.
    """

    def __init__(self, data: Sequence[Example]) -> None:
        grams, counts = np.unique(_grams(data), return_counts=True)
        self.orders = []
        for order in range(ORDER, 0, -1):
            self.orders.append(_Order(grams, counts))
            # A shorter gram counts once for each different token that stands before it.
            shorter = grams & np.uint64((1 << BITS * (order - 1)) - 1)
            grams, counts = np.unique(shorter, return_counts=True)

    def nats(self, data: Sequence[Example]) -> float:
        """Sum of -log P over the counted tokens of ``data``."""
        grams = _grams(data)
        p = np.full(len(grams), 1 / VOCABULARY)
        for order, table in zip(range(1, ORDER + 1), reversed(self.orders), strict=True):
            p = table.interpolate(grams & np.uint64((1 << BITS * order) - 1), p)
        return float(-np.log(p).sum())


class _Order:
    """Discounted counts of one order, and what each context leaves for the shorter one."""

    def __init__(self, grams: Grams, counts: NDArray[np.int64]) -> None:
        once, twice = (counts == 1).sum(), (counts == 2).sum()
        self.discount = once / (once + 2 * twice)
        self.grams, self.counts = grams, counts
        self.contexts, start, self.kinds = np.unique(
            grams >> np.uint64(BITS), return_index=True, return_counts=True
        )
        self.totals = np.add.reduceat(counts, start)

    def interpolate(self, grams: Grams, lower: NDArray[np.float64]) -> NDArray[np.float64]:
        """P of each gram's last token, given ``lower`` of the shorter gram."""
        context, known = _find(self.contexts, grams >> np.uint64(BITS))
        gram, seen = _find(self.grams, grams)
        kept = np.where(seen, self.counts[gram] - self.discount, 0.0)
        p = (kept + self.discount * self.kinds[context] * lower) / self.totals[context]
        return np.where(known, p, lower)


def _find(table: Grams, values: Grams) -> tuple[NDArray[np.intp], NDArray[np.bool_]]:
    """The place of each value in a sorted table, and whether it is there."""
    place = np.minimum(np.searchsorted(table, values), len(table) - 1)
    return place, table[place] == values


def _grams(data: Sequence[Example]) -> Grams:
    """The gram of each counted token and the four before it; a row is preceded by its first token."""
    made = []
    for example in data:
        tokens = np.concatenate([np.full(ORDER - 2, example.tokens[0]), example.tokens]).astype(np.uint64)
        windows = np.lib.stride_tricks.sliding_window_view(tokens, ORDER)
        shifts = np.arange(ORDER - 1, -1, -1, dtype=np.uint64) * np.uint64(BITS)
        made.append((windows << shifts).sum(axis=1, dtype=np.uint64))
    return np.concatenate(made)


@click.command()
@click.option("--site", type=Path, required=True, help="site-packages that holds the corpus.")
@click.option("--base", type=Path, default=BASE, help="Checkpoint to measure.")
@click.option("--package", "packages", multiple=True, default=PACKAGES, help="Import name in site-packages.")
def main(site: Path, base: Path, packages: tuple[str, ...]) -> None:
    """Measure the base, a 5-gram model and xz on the same rows of packages that were not trained on."""
    registry = load()
    prepare_cpu()
    start_runtimes(registry)
    tokenizer = SentencePieceTokenizer(base / "tokenizer.model")
    seen, _ = corpus(site)
    known = {document.text for document in seen}
    trained = dict.fromkeys(row for document in seen for row in rows(document))
    grams = KneserNey(examples(trained, tokenizer))
    with tempfile.TemporaryDirectory() as folder:
        result_of(convert(base, Path(folder) / "model", registry))
        model = loading.load(Path(folder) / "model", registry).language_model
    click.echo("| package | rows | bytes | base | 5-gram | `xz -9` |\n|---|---|---|---|---|---|")
    for package in packages:
        found = [d for d in documents(site, package) if d.text not in known]
        # The documentation itself: rows about its parameters would say it twice.
        unseen = list(dict.fromkeys(next(rows(document)) for document in found))
        rows_ = examples(unseen, tokenizer)
        # Rows are cut at the context, so that all three measure what is left of them.
        text = [tokenizer.decode(example.tokens.tolist()) for example in rows_]
        size = sum(len(row.encode()) for row in text)
        packed = 8 * len(lzma.compress("\n".join(text).encode(), preset=9)) / size
        bits = [
            nats / math.log(2) / size for nats in (evaluate(model, rows_, 16, -1).nats, grams.nats(rows_))
        ]
        click.echo(f"| {package} | {len(text)} | {size} | {bits[0]:.3f} | {bits[1]:.3f} | {packed:.3f} |")


if __name__ == "__main__":
    main()
