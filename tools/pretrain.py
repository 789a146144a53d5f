"""Train the embedded base model from scratch, out of mlxlora's own parts.

The text is the docstrings of the standard library and of the packages in
``pretrain-requirements.txt``, read from their sources without importing them;
mlx, and every docstring that mentions it, is left out. One package is held out
whole, to measure what the model makes of documentation that it has not seen.

Run from a checkout, with the packages installed somewhere::

    python -m venv corpus && corpus/bin/pip install -r tools/pretrain-requirements.txt
    python tools/pretrain.py --site corpus/lib/python3.11/site-packages
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import io
import json
import math
import os
import re
import sysconfig
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import click

HERE = Path(__file__).parent
BASE = HERE.parent / "plugins" / "mlxlora_demo" / "base"
REQUIREMENTS = HERE / "pretrain-requirements.txt"
HELD_OUT = "networkx"

VOCABULARY = 4096
CONTEXT_TOKENS = 256
ROW_CHARACTERS = 600
PARAMS = {
    "dim": 256,
    "n_layers": 6,
    "head_dim": 64,
    "hidden_dim": 640,
    "n_heads": 4,
    "n_kv_heads": 2,
    "norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "vocab_size": VOCABULARY,
    "max_seq_len": CONTEXT_TOKENS,
}

_ASIDE = re.compile(r"(^|/)(tests?|testing|conftest|test_\w+|\w+_test|_?vendor\w*|extern\w*|__main__)\b")
_PARAMETER = re.compile(r"^(\*{0,2}[A-Za-z_]\w*) : .+\n((?:    .+\n?)+)", re.MULTILINE)


# --- text ---------------------------------------------------------------------


@dataclass(frozen=True)
class Document:
    """One docstring and the dotted path that it stands under."""

    package: str
    path: str
    text: str


def documents(root: Path, package: str) -> Iterator[Document]:
    """The docstrings in the sources of one package, in the order of its files."""
    place = root / package if (root / package).is_dir() else root / f"{package}.py"
    files = sorted(place.rglob("*.py")) if place.is_dir() else [place]
    for file in files:
        name = str(file.relative_to(root))
        if _ASIDE.search(name) or not file.is_file():
            continue
        parts = name.removesuffix(".py").removesuffix("/__init__").split("/")
        yield from _in_file(file, ".".join(p for p in parts if not p.startswith("_")), package)


def _in_file(file: Path, module: str, package: str) -> Iterator[Document]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)
            tree = ast.parse(file.read_text("utf-8"))
    except (SyntaxError, UnicodeDecodeError, ValueError):
        return
    stack: list[tuple[ast.AST, str]] = [(tree, module)]
    while stack:
        node, path = stack.pop()
        text = ast.get_docstring(node) if isinstance(node, _DOCUMENTED) else None
        if text and len(text) > 20 and "mlx" not in text.lower():
            yield Document(package, path, text)
        for child in ast.iter_child_nodes(node):
            if isinstance(child, _DOCUMENTED[1:]) and not child.name.startswith("_"):
                stack.append((child, f"{path}.{child.name}"))


_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def rows(document: Document) -> Iterator[str]:
    """Training rows of one document: its path and how it begins, and a question for each parameter."""
    yield f"{document.path} {_beginning(document.text)}"
    for match in _PARAMETER.finditer(document.text):
        meaning = inspect.cleandoc(match[2])
        if len(meaning) > 20:
            yield f"Q: What is the argument `{match[1]}` for?\nA: {meaning[:ROW_CHARACTERS]}"


def _beginning(text: str) -> str:
    """The first paragraphs of ``text``, of about ``ROW_CHARACTERS``."""
    first, *rest = text.split("\n\n")
    beginning = first[: 2 * ROW_CHARACTERS]
    for paragraph in rest:
        if len(beginning) + len(paragraph) > ROW_CHARACTERS:
            break
        beginning += "\n\n" + paragraph
    return beginning


def corpus(site: Path) -> tuple[list[Document], list[Document]]:
    """The distinct documents to train on, and those of the package that is held out."""
    stdlib = Path(sysconfig.get_path("stdlib"))
    standard = sorted(
        path.stem for path in stdlib.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()
    )
    found = [d for name in standard if not _ASIDE.search(name) for d in documents(stdlib, name)]
    for name in _packages(site):
        found += documents(site, name)
    unique = {hashlib.sha256(d.text.encode()).digest(): d for d in reversed(found)}
    kept = sorted(unique.values(), key=lambda d: (d.path, d.text))
    return [d for d in kept if d.package != HELD_OUT], [d for d in kept if d.package == HELD_OUT]


def _packages(site: Path) -> list[str]:
    """The import names of the required distributions that stand in ``site``."""
    wanted = {re.split(r"[=<> ]", line)[0].lower() for line in REQUIREMENTS.read_text().splitlines() if line}
    names = set()
    for distribution in distributions(path=[str(site)]):
        if distribution.metadata["Name"].lower() in wanted:
            top = {str(f).split("/")[0] for f in distribution.files or () if str(f).endswith("__init__.py")}
            names |= {name for name in top if name.isidentifier()}
    return sorted(names)


# --- tokenizer ----------------------------------------------------------------


def train_tokenizer(texts: Sequence[str]) -> bytes:
    """A SentencePiece BPE model with byte fallback that gives every text back exactly."""
    import sentencepiece

    model = io.BytesIO()
    lines = (line for text in texts for line in text.split("\n") if line)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=lines,
        model_writer=model,
        model_type="bpe",
        vocab_size=VOCABULARY,
        byte_fallback=True,
        character_coverage=0.9995,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        split_digits=True,
        user_defined_symbols=["\n"],
        input_sentence_size=400_000,
        shuffle_input_sentence=True,
        num_threads=2,
        minloglevel=2,
    )
    return model.getvalue()


# --- model --------------------------------------------------------------------


def new_model(config: dict[str, Any]) -> Any:
    """A Llama with random weights: normal with deviation 0.02, smaller where a residual is written."""
    import mlx.core as mx
    from mlx.utils import tree_flatten, tree_unflatten

    from mlxlora_core.options import parse
    from mlxlora_core.plugins import load

    architecture = load().find("architecture", "llama").spec
    stated = {**config, "model_type": "llama", "tie_word_embeddings": True}
    model = architecture.build(parse(architecture.args, stated, owner="llama"))
    mx.random.seed(0)
    residual = 0.02 / math.sqrt(2 * config["n_layers"])
    values = []
    for name, value in dict(tree_flatten(model.parameters())).items():
        if name.endswith("norm.weight"):
            values.append((name, mx.ones(value.shape)))
        else:
            deviation = residual if re.search(r"\.(wo|w2)\.", name) else 0.02
            values.append((name, deviation * mx.random.normal(value.shape)))
    model.update(tree_unflatten(values))
    mx.eval(model.parameters())
    return model


def save(model: Any, folder: Path) -> None:
    """Write the weights as a PyTorch checkpoint in float16, with params.json."""
    import numpy as np
    import torch
    from mlx.utils import tree_flatten

    tensors = {
        name: torch.from_numpy(np.array(value)).to(torch.float16)
        for name, value in dict(tree_flatten(model.parameters())).items()
    }
    torch.save(tensors, folder / "consolidated.00.pth.new")
    os.replace(folder / "consolidated.00.pth.new", folder / "consolidated.00.pth")
    (folder / "params.json").write_text(json.dumps(PARAMS, indent=2) + "\n")


def examples(texts: Iterable[str], tokenizer: Any) -> list[Any]:
    """Rows as tokens that all count but the first, cut at ``CONTEXT_TOKENS``."""
    import numpy as np

    from mlxlora_core.training.examples import Example

    made = []
    for text in texts:
        tokens = np.array(tokenizer.encode(text, eos=True)[:CONTEXT_TOKENS], np.uint32)
        made.append(Example(tokens, np.arange(len(tokens)) > 0))
    return made


@click.command()
@click.option("--site", type=Path, required=True, help="site-packages that holds the corpus.")
@click.option("--out", type=Path, default=BASE, help="Folder for the checkpoint.")
@click.option("--steps", type=int, default=3200, help="Updates.")
@click.option("--batch-size", type=int, default=64, help="Rows an update.")
@click.option("--learning-rate", type=float, default=6e-3, help="Peak learning rate.")
def main(site: Path, out: Path, steps: int, batch_size: int, learning_rate: float) -> None:
    """Train the embedded base model and write it as a PyTorch checkpoint."""
    from mlxlora_sentencepiece.tokenizer import SentencePieceTokenizer

    from mlxlora_core.machine.device import prepare_cpu
    from mlxlora_core.plugins import load, start_runtimes
    from mlxlora_core.training.events import TrainReport, ValidReport
    from mlxlora_core.training.loop import train
    from mlxlora_core.training.settings import TrainConfig

    train_documents, held_out = corpus(site)
    texts = list(dict.fromkeys(row for document in train_documents for row in rows(document)))
    size = sum(map(len, texts)) / 1e6
    click.echo(f"{len(train_documents)} documents, {len(texts)} rows, {size:.1f} M characters")
    out.mkdir(parents=True, exist_ok=True)
    if not (out / "tokenizer.model").is_file():
        (out / "tokenizer.model").write_bytes(train_tokenizer(texts))
    tokenizer = SentencePieceTokenizer(out / "tokenizer.model")
    prepare_cpu()
    click.echo([note.text for note in start_runtimes(load())])
    unseen = [row for document in held_out for row in rows(document)][::20]
    config = TrainConfig(
        iters=steps,
        batch_size=batch_size,
        optimizer="muon",
        learning_rate=learning_rate,
        weight_decay=0.05,
        schedule="cosine",
        warmup=min(100, steps // 10),
        min_learning_rate=learning_rate / 20,
        grad_clip=1.0,
        val_batches=-1,
        steps_per_report=20,
        steps_per_eval=200,
    )
    train_set, valid_set = examples(texts, tokenizer), examples(unseen, tokenizer)
    click.echo(f"{sum(len(e.tokens) for e in train_set) / 1e6:.2f} M tokens to train on")
    bits = sum(len(e.tokens) - 1 for e in valid_set) / math.log(2)
    characters = sum(len(tokenizer.decode(e.tokens.tolist()).encode()) for e in valid_set)
    model, started = new_model(PARAMS), time.time()
    for report in train(model, train_set, valid_set, config, seed=0):
        line = f"{time.time() - started:7.0f} s  step {report.step}  loss {report.loss:.4f}"
        if isinstance(report, ValidReport):
            line += f"  held out: {report.loss * bits / characters:.4f} bits a byte"
            save(model, out)
        elif isinstance(report, TrainReport):
            line += f"  {report.tokens_per_second:.0f} tokens/s"
        click.echo(line)
    save(model, out)


if __name__ == "__main__":
    main()
