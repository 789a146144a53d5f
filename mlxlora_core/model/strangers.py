"""What a path holds that no plugin here reads: known formats of other tools, told by name."""

from __future__ import annotations

from pathlib import Path

from mlxlora_core.errors import ModelError
from mlxlora_core.files.documents import read_json
from mlxlora_core.files.input_file import open_regular

#: keys of config.json that Hugging Face's libraries and mlx-lm write
FOREIGN_KEYS = frozenset(("hidden_size", "architectures", "text_config", "transformers_version"))

_CONFIG_BYTES = 1 << 20
#: first bytes of a file -> what it is
_MAGIC = (
    (b"GGUF", "a GGUF file"),
    (b"ggjt", "a GGML file, as llama.cpp wrote before GGUF"),
    (b"tjgg", "a GGML file, as llama.cpp wrote before GGUF"),
)
#: endings of the files in a folder -> what it is
_ENDINGS = {
    ".gguf": "a folder of GGUF files",
    ".bin": "a folder with pytorch_model.bin, as Hugging Face had it before safetensors",
    ".pt": "a folder of .pt files",
    ".pth": "a folder of .pth files of which none is called consolidated.NN.pth",
}


def known_as(path: Path) -> str:
    """What a file or folder is, where it is of a format that many have, else nothing."""
    try:
        if path.is_dir():
            return _folder(path)
        with open_regular(path) as file:
            head = file.read(4)
    except (ModelError, OSError, ValueError):
        return ""
    return next((what for magic, what in _MAGIC if head == magic), "")


def _folder(path: Path) -> str:
    """What a folder is, by its config.json or the endings of its files."""
    config = path / "config.json"
    if config.is_file():
        try:
            stated = read_json(config, _CONFIG_BYTES)
        except ModelError:
            return ""
        if isinstance(stated, dict) and FOREIGN_KEYS & stated.keys():
            return "a Hugging Face folder (config.json with hidden_size)"
        if isinstance(stated, dict) and "tokenizer_files" in stated:
            return "a model folder already: add -q or --dtype to change it"
    endings = {file.suffix.lower() for file in path.iterdir()}
    return next((what for ending, what in _ENDINGS.items() if ending in endings), "")
