"""Small things to try a plugin on: a model of each architecture, a tokenizer, rows, an adapter.

They are made in a moment, of random numbers that are the same every time, and need no network.
As functions::

    from mlxlora_core.testing.fixtures import tiny_model

    folder = tiny_model(tmp_path / "model", "gemma")

As pytest fixtures, made once a session, to read and never to write to::

    pytest_plugins = ["mlxlora_core.testing.fixtures"]  # in conftest.py, or in a test file

    def test_mine(tiny_model): ...

    @pytest.mark.parametrize("tiny_model", ["gemma", "phi3"], indirect=True)
    def test_of_others(tiny_model): ...
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_unflatten

from mlxlora_core.errors import UsageError, listing
from mlxlora_core.files import save_tensors, write_json, write_text
from mlxlora_core.model import adapters
from mlxlora_core.model.architectures import build, model_config
from mlxlora_core.model.folder import CONFIG
from mlxlora_core.model.linears import parameters
from mlxlora_core.model.loading import load
from mlxlora_core.model.tokenizers import FILES
from mlxlora_core.model.weights import WEIGHTS
from mlxlora_core.options import explain, parse
from mlxlora_core.plugins import load as load_plugins
from mlxlora_core.plugins.sections import configure
from mlxlora_core.values import LazyTensor

VOCAB_SIZE = 307  # V: tokens of the tiny tokenizer
#: what an argument of an architecture is in a tiny model, by the names that people give it
ARGS: Mapping[str, Any] = {
    **dict.fromkeys(("vocab_size", "vocabulary"), VOCAB_SIZE),
    **dict.fromkeys(("dim", "width", "hidden_size"), 64),
    **dict.fromkeys(("n_layers", "layers", "num_hidden_layers"), 2),
    "head_dim": 16,
    **dict.fromkeys(("hidden_dim", "hidden", "intermediate_size"), 128),
    **dict.fromkeys(("n_heads", "heads", "num_attention_heads"), 4),
    **dict.fromkeys(("n_kv_heads", "kv_heads", "num_key_value_heads"), 2),
    **dict.fromkeys(("norm_eps", "rms_norm_eps"), 1e-5),
    "rope_theta": 1e4,
    "query_pre_attn_scalar": 16.0,
    **dict.fromkeys(("max_seq_len", "max_position_embeddings"), 256),
}
SPECIALS = ("<s>", "<|im_start|>", "<|im_end|>")  # ids 0 to 2; 0 begins a text, 2 ends one
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
WORDS = ("What", " is", " plus", *(f" {number}" for number in NUMBERS))
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' "
    "+ '\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
SPLITS = {"train": 20, "valid": 5, "test": 5}  # rows


def tiny_model(folder: Path, architecture: str = "llama", args: Mapping[str, Any] | None = None) -> Path:
    """A model folder with random weights in float32 and the tokenizer of :func:`tiny_tokenizer`.

    Two layers, D 64, H 4, K 2, E 16, F 128, V 307: half a megabyte.

    Args:
        folder: to write into; made where it is absent.
        architecture: name of one that is registered.
        args: arguments of the architecture beside :data:`ARGS`, or instead of them. Its vocabulary must
            be :data:`VOCAB_SIZE`, or larger.

    Returns:
        The folder.

    Raises:
        UsageError: the architecture needs arguments that nobody has given, or refuses some.
        PluginError: no such architecture, or one that breaks its contract.
    """
    component = load_plugins().find("architecture", architecture)
    given = {**ARGS, "model_type": component.spec.model_types[0], **(args or {})}
    known = {option.name for option in explain(component.spec.args)}
    odd = [name for name in args or {} if name not in known]
    if odd:
        raise UsageError(f"architecture '{architecture}' has no argument {listing(odd)}")
    made = parse(
        component.spec.args,
        {name: value for name, value in given.items() if name in known},
        owner=f"architecture '{architecture}'",
    )
    draw = np.random.default_rng(7)
    shapes = {name: tensor.shape for name, tensor in parameters(build(component, made)).items()}
    tiny_tokenizer(folder)
    save_tensors(folder / WEIGHTS["safetensors"], {n: _weight(draw, n, s) for n, s in shapes.items()})
    config = model_config(component, made, given) | {FILES: sorted(tokenizer_files())}
    write_json(folder / CONFIG, config)
    return folder


def tiny_tokenizer(folder: Path) -> Path:
    """The files of a byte-level tokenizer with a chat template, as the library ``tokenizers`` reads them.

    Any text comes back as it was. There are :data:`VOCAB_SIZE` tokens: :data:`SPECIALS`, the 256 bytes,
    and what makes a token of each of :data:`WORDS`, of which :func:`tiny_rows` are made.

    Args:
        folder: to write into; made where it is absent.

    Returns:
        The folder.
    """
    for name, text in tokenizer_files().items():
        write_text(folder / name, text)
    return folder


def tiny_rows(folder: Path) -> Path:
    """A dataset folder: ``train.jsonl``, ``valid.jsonl`` and ``test.jsonl`` of sums in words.

    Each row is a prompt and its completion, and none stands in two of the files.

    Args:
        folder: to write into; made where it is absent.

    Returns:
        The folder.
    """
    numbers = range(len(NUMBERS))
    sums = [(a, b) for a in numbers for b in numbers if a + b < len(NUMBERS)]
    order = np.random.default_rng(8).permutation(len(sums))
    rows = iter([sums[i] for i in order])
    for split, count in SPLITS.items():
        lines = [json.dumps(_row(*next(rows))) + "\n" for _ in range(count)]
        write_text(folder / f"{split}.jsonl", "".join(lines))
    return folder


def tiny_adapter(folder: Path, model: Path) -> Path:
    """An adapter file with a LoRA of rank 4 on every layer of a model, as if it had been trained.

    Its values are random ones, so that the model answers otherwise with it than without.

    Args:
        folder: to write into; made where it is absent.
        model: that the adapter is for, such as a :func:`tiny_model`.

    Returns:
        The file, ``adapters.safetensors``.

    Raises:
        ModelError: the model cannot be read.
        UsageError: there is nothing in it that LoRA goes on.
    """
    registry = load_plugins()
    base = load(model, registry)
    choice, config = configure(registry.find("adapter", "lora:lora"), {"rank": 4, "layers": -1})
    adapted = adapters.attach(base, choice, config, seed=0)
    draw = np.random.default_rng(9)
    trained = {
        name: mx.array(draw.normal(0, 0.1, tensor.shape).astype(np.float32)).astype(tensor.dtype)
        for name, tensor in sorted(adapters.trainable(base.module).items())
    }
    base.module.update(tree_unflatten(list(trained.items())))
    path = folder / "adapters.safetensors"
    adapters.save(path, base, adapted)
    return path


# --- as fixtures --------------------------------------------------------------


@pytest.fixture(name="tiny_model", scope="session")
def _tiny_model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a :func:`tiny_model`: llama, or what the test is parametrized with."""
    return tiny_model(tmp_path_factory.mktemp("model"), getattr(request, "param", "llama"))


@pytest.fixture(name="tiny_tokenizer", scope="session")
def _tiny_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a :func:`tiny_tokenizer`."""
    return tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(name="tiny_rows", scope="session")
def _tiny_rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of :func:`tiny_rows`."""
    return tiny_rows(tmp_path_factory.mktemp("rows"))


@pytest.fixture(name="tiny_adapter", scope="session")
def _tiny_adapter(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of a :func:`tiny_adapter` for the fixture ``tiny_model``."""
    return tiny_adapter(tmp_path_factory.mktemp("adapter"), tiny_model)


# --- what they are made of ----------------------------------------------------


def tokenizer_files() -> dict[str, str]:
    """File name -> text of the tokenizer of every tiny model."""
    config = {"bos_token": SPECIALS[0], "eos_token": SPECIALS[2], "chat_template": CHAT_TEMPLATE}
    return {"tokenizer.json": tokenizer_json(), "tokenizer_config.json": json.dumps(config, indent=2) + "\n"}


def tokenizer_json() -> str:
    """Byte-level BPE as GPT-2 has it (Radford et al. 2019); the letters of each word merge from the left."""
    letters = _letters()
    merges: dict[tuple[str, str], None] = {}
    for word in WORDS:
        spelt = [letters[byte] for byte in word.encode()]
        merges |= {("".join(spelt[:i]), spelt[i]): None for i in range(1, len(spelt))}
    pieces = [*SPECIALS, *sorted(letters), *map("".join, merges)]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    bos = {"SpecialToken": {"id": SPECIALS[0], "type_id": 0}}
    first, second = ({"Sequence": {"id": name, "type_id": i}} for i, name in enumerate("AB"))
    document = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": text, **flags} for i, text in enumerate(SPECIALS)],
        "normalizer": None,
        "pre_tokenizer": level,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [bos, first],
            "pair": [bos, first, second],
            "special_tokens": {SPECIALS[0]: {"id": SPECIALS[0], "ids": [0], "tokens": [SPECIALS[0]]}},
        },
        "decoder": level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {piece: i for i, piece in enumerate(pieces)},
            "merges": [list(pair) for pair in merges],
        },
    }
    return json.dumps(document, indent=1, ensure_ascii=False) + "\n"


def _letters() -> list[str]:
    """The letter that stands for each byte in a byte-level vocabulary: itself where it prints."""
    prints = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte) if byte in prints else chr(next(others)) for byte in range(256)]


def _row(a: int, b: int) -> dict[str, str]:
    """A sum in words."""
    return {
        "prompt": f"What is {NUMBERS[a]} plus {NUMBERS[b]}?",
        "completion": f" {NUMBERS[a + b]}",
    }


def _weight(draw: np.random.Generator, name: str, shape: tuple[int, ...]) -> LazyTensor:
    """Numbers of about the size of a trained model's; those of norms lie around 1."""
    spread = 0.1 if len(shape) == 1 else shape[-1] ** -0.5
    middle = 1.0 if len(shape) == 1 and not name.endswith("bias") else 0.0
    array = mx.array(draw.normal(middle, spread, shape).astype(np.float32))
    return LazyTensor(shape, "float32", lambda: array)
