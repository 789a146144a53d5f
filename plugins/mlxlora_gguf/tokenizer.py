"""The files that a tokenizer is opened from, made of the vocabulary inside a GGUF file."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlxlora_gguf.byte_level import assumption, find_rule, tokenizer_json
from mlxlora_gguf.pieces import sentencepiece_model
from mlxlora_gguf.vocabulary import ID_KEYS, PREFIX, Vocabulary, read_vocabulary

#: key of tokenizer_config.json: what the GGUF file said of its tokenizer that no other file has a place for
KEPT_KEYS = "gguf_keys"

_ELSEWHERE = {"model", "add_bos_token", "add_space_prefix"}
_ELSEWHERE |= {ID_KEYS[name] for name in ("bos", "eos", "unk", "pad")}


@dataclass(frozen=True)
class Made:
    """What was made of a vocabulary.

    Attributes:
        files: plain name -> contents.
        notes: what had to be assumed, a sentence each.
    """

    files: Mapping[str, bytes]
    notes: Sequence[str]


def make_files(keys: Mapping[str, Any], path: Path) -> Made:
    """The tokenizer's files, from the keys of a GGUF file.

    Raises:
        ModelError: the vocabulary is damaged, or of a kind that is not read.
    """
    vocabulary = read_vocabulary(keys, path)
    files: dict[str, bytes] = {}
    if vocabulary.model == "gpt2":
        rule = find_rule(vocabulary, path)
        begin = "bos" in vocabulary.ids and vocabulary.flags.get("add_bos_token", rule.bos)
        files["tokenizer.json"] = tokenizer_json(vocabulary, rule, begin, path)
        notes = list(assumption(vocabulary))
    else:
        begin = "bos" in vocabulary.ids and vocabulary.flags.get("add_bos_token", True)
        files["tokenizer.model"] = sentencepiece_model(vocabulary, path)
        notes = []
    files["tokenizer_config.json"] = _json(_config(vocabulary, begin) | {KEPT_KEYS: _kept(keys)})
    files["generation_config.json"] = _json(_generation(vocabulary))
    return Made(files, notes)


def _config(vocabulary: Vocabulary, begin: bool) -> dict[str, Any]:
    """tokenizer_config.json."""
    names = ("bos", "eos", "unk", "pad")
    config: dict[str, Any] = {
        f"{name}_token": vocabulary.tokens[vocabulary.ids[name]] for name in names if name in vocabulary.ids
    }
    config["add_bos_token"] = begin
    config["add_eos_token"] = vocabulary.flags.get("add_eos_token", False)
    config["clean_up_tokenization_spaces"] = False
    if vocabulary.model == "llama":
        config["add_prefix_space"] = vocabulary.flags.get("add_space_prefix", True)
    config["tokenizer_class"] = "LlamaTokenizer" if vocabulary.model == "llama" else "PreTrainedTokenizerFast"
    templates = vocabulary.templates
    if list(templates) == ["default"]:
        config["chat_template"] = templates["default"]
    elif templates:
        config["chat_template"] = [{"name": name, "template": text} for name, text in templates.items()]
    return config


def _kept(keys: Mapping[str, Any]) -> dict[str, Any]:
    """The short keys of the tokenizer that are not said elsewhere, so that it can be written as it was."""
    found = {key.removeprefix(PREFIX): value for key, value in keys.items() if key.startswith(PREFIX)}
    kept = {key: value for key, value in found.items() if key not in _ELSEWHERE}
    return {key: v for key, v in kept.items() if type(v) in (bool, int) or key == "pre"}


def _generation(vocabulary: Vocabulary) -> dict[str, Any]:
    """generation_config.json, with every id that ends a text."""
    config: dict[str, Any] = {
        f"{name}_token_id": vocabulary.ids[name] for name in ("bos", "pad") if name in vocabulary.ids
    }
    config["eos_token_id"] = list(vocabulary.ends)
    return config


def _json(content: Mapping[str, Any]) -> bytes:
    return json.dumps(content, ensure_ascii=False, indent=2).encode()
