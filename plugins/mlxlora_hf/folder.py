"""What kind of folder it is, told by the names of its files and the keys of its config.json."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from mlxlora_core.api import ModelError, listing
from mlxlora_core.files import read_json

CONFIG, PARAMS = "config.json", "params.json"
_CONFIG_BYTES = 1 << 20  # a table of bits for each linear of a large model is some 100 kB


@dataclass(frozen=True)
class Weights:
    """How the weight files of a kind of folder are called.

    Attributes:
        whole: of a model in one file.
        index: what names the shards of one in several.
    """

    whole: str
    index: str


HUGGING_FACE = Weights("model.safetensors", "model.safetensors.index.json")
MISTRAL = Weights("consolidated.safetensors", "consolidated.safetensors.index.json")

#: keys of which a config.json of Hugging Face has one at least
_MARKS = {
    *("architectures", "hidden_size", "num_hidden_layers", "text_config", "transformers_version"),
    *("n_embd", "d_model", "quantization_config"),
}
_OURS = "tokenizer_files"  # what every config.json that mlxlora writes has


class Kind(Enum):
    """Whose folder it is."""

    HUGGING_FACE = "hf"
    MISTRAL = "mistral"
    OTHER = "other"


def kind_of(folder: Path) -> Kind:
    """Whose folder it is; a path that is none, or cannot be read, is somebody else's."""
    names = names_in(folder)
    mistral = {MISTRAL.whole, MISTRAL.index} & names
    weights = {HUGGING_FACE.whole, HUGGING_FACE.index} & names
    if CONFIG in names and (weights or not mistral) and _is_hugging_face(folder, bool(weights)):
        torch = any(name.startswith("consolidated.") and name.endswith(".pth") for name in names)
        # Meta's own have a config.json beside consolidated.00.pth now and then.
        return Kind.HUGGING_FACE if weights or not torch else Kind.OTHER
    return Kind.MISTRAL if mistral else Kind.OTHER


def names_in(folder: Path) -> set[str]:
    """The names of the files in a folder; none where it cannot be read."""
    try:
        return set(os.listdir(folder))
    except (OSError, ValueError):
        return set()


def read_table(path: Path) -> dict[str, Any]:
    """The object in a JSON file such as config.json.

    Raises:
        ModelError: it is absent, or holds something else.
    """
    value = read_json(path, _CONFIG_BYTES)
    if not isinstance(value, dict):
        raise ModelError(f"holds a {type(value).__name__}, wanted an object", where=path)
    return value


def no_weights(folder: Path, names: Collection[str], wanted: Weights) -> ModelError:
    """The error for a folder without weights that are read, with what it has instead."""
    read = f"read are {wanted.whole}, or shards that {wanted.index} names"
    for ending, what, fix in _INSTEAD:
        found = sorted(name for name in names if name.endswith(ending))
        if found:
            return ModelError(f"has {listing(found, 4)}{what}; {read}", where=folder, fix=fix)
    return ModelError(f"there are no weights; {read}", where=folder, fix="download the whole folder")


#: ending of weights that are not read -> what they are, and what to do
_INSTEAD = (
    (
        ".safetensors",
        ", but no index of them",
        f"download the whole folder, {HUGGING_FACE.index} among it",
    ),
    (
        ".bin",
        ", which are pickles and can hold code",
        "take a revision with .safetensors, or save it as such with transformers: save_pretrained(NEW)",
    ),
    (".gguf", ", which are read one by one", "name the .gguf file and not its folder"),
    (".npz", ", as early MLX examples had them", "convert the original model again"),
    (".onnx", ", which are programs and not weights", "take the folder that they were made of"),
    (".h5", ", as TensorFlow had them", "save it as .safetensors with transformers: save_pretrained(NEW)"),
    (".msgpack", ", as Flax had them", "save it as .safetensors with transformers: save_pretrained(NEW)"),
)


def _is_hugging_face(folder: Path, weights: bool) -> bool:
    """Whether config.json is one of Hugging Face's; one that is damaged counts beside such weights."""
    try:
        config: Mapping[str, Any] = read_table(folder / CONFIG)
    except ModelError:
        return weights
    return _OURS not in config and bool(_MARKS & config.keys())
