"""The model folder: config.json, the weights and the tokenizer, and which files they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mlxlora_core.errors import ModelError, listing
from mlxlora_core.files import tensor_file
from mlxlora_core.files.documents import read_json
from mlxlora_core.files.targets import hold_only_files
from mlxlora_core.model.strangers import FOREIGN_KEYS, known_as
from mlxlora_core.model.tokenizers import FILES, tokenizer_files
from mlxlora_core.model.weights import WEIGHTS, weight_files

CONFIG = "config.json"
SOURCE = "source"  # the key of config.json that names what it was made of, where that has a name

_CONFIG_BYTES = 1 << 20


def is_model_folder(folder: Path) -> bool:
    """Whether a folder with a config.json is one that mlxlora reads by its own config.

    Raises:
        ModelError: the config cannot be read.
    """
    config = read_config(folder)
    return FILES in config or not FOREIGN_KEYS & config.keys()


def holds_only_a_model(folder: Path) -> bool:
    """Whether everything in ``folder`` is what mlxlora writes into one, by the header of its weights."""
    if not (folder / CONFIG).is_file():
        return False
    try:
        tokenizer = tokenizer_files(folder, read_config(folder))
    except ModelError:  # damaged: it may be replaced where the rest is ours
        tokenizer = tokenizer_files(folder, {})
    weights = [path for name in WEIGHTS.values() if (path := folder / name).exists()]
    written = all(tensor_file.FINGERPRINT in tensor_file.stated(path) for path in weights)
    return written and bool(weights) and hold_only_files(folder, [CONFIG, *tokenizer, *WEIGHTS.values()])


def files(folder: Path) -> list[Path]:
    """The files that make the model.

    Raises:
        ModelError: there is no model, or a shard that its index names is absent.
    """
    tokenizer = tokenizer_files(folder, read_config(folder))
    found = [folder / CONFIG, *tokenizer.values(), *weight_files(folder)]
    absent = [path.name for path in found if not path.is_file()]
    if absent:
        raise ModelError(f"lacks {listing(absent)}", where=folder)
    return found


def read_config(folder: Path) -> dict[str, Any]:
    """config.json.

    Raises:
        ModelError: it is absent or is no JSON object.
    """
    path = folder / CONFIG
    if not path.exists():
        known = known_as(folder)
        told = f"is {known}, which is not read here" if known else "there is no config.json"
        raise ModelError(
            f"{told}; this is not a model folder",
            where=folder,
            fix="make one with: mlxlora convert --torch-path DIR --mlx-path " + str(folder),
        )
    config = read_json(path, _CONFIG_BYTES)
    if not isinstance(config, dict):
        raise ModelError(f"wanted a JSON object, got {type(config).__name__}", where=path)
    return config
