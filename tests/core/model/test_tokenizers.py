"""Which plugin opens a tokenizer. What is not taken from it: ``tests/contracts/test_tokenizer_suite.py``."""

from __future__ import annotations

import base64
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mlxlora_core.errors import ModelError, PluginError
from mlxlora_core.model.tokenizers import (
    CheckedTokenizer,
    check_vocabulary,
    is_plain_name,
    open_tokenizer,
    tokenizer_files,
)
from mlxlora_core.plugins import Component, Registry


def with_other(registry: Registry, detect: Callable[..., bool]) -> Registry:
    """The registry with a second tokenizer."""
    first = registry.find("tokenizer", "sentencepiece")
    other = Component("tokenizer", replace(first.spec, name="other", detect=detect), first.plugin)
    return Registry(registry.plugins, [*registry.components, other])


def test_the_only_one_that_knows_the_files_opens_them(
    registry: Registry, tiny_tokenizer: Path, tokenizer: CheckedTokenizer
) -> None:
    files = {"tokenizer.model": tiny_tokenizer}
    opened = open_tokenizer(files, with_other(registry, lambda files: False), tiny_tokenizer)
    assert opened.component.id == "sentencepiece:sentencepiece"
    assert opened.files == files and opened.fingerprint == tokenizer.fingerprint
    with pytest.raises(ModelError, match=r"sentencepiece:other can open tokenizer.model.*leave one"):
        open_tokenizer(files, with_other(registry, lambda files: True), tiny_tokenizer)


def test_files_that_nobody_opens_are_named_with_what_there_is(registry: Registry, tmp_path: Path) -> None:
    (tmp_path / "words.txt").write_text("a b")
    with pytest.raises(ModelError) as caught:
        open_tokenizer({"words.txt": tmp_path / "words.txt"}, registry, tmp_path)
    assert caught.value.what == "no tokenizer opens words.txt; there is sentencepiece, tokenizers"
    with pytest.raises(ModelError, match=r"there is no tokenizer: it lacks tokenizer\.model"):
        open_tokenizer({"tokenizer.model": tmp_path / "tokenizer.model"}, registry, tmp_path)


def test_a_list_of_ranks_under_the_same_name_is_told_for_what_it_is(
    registry: Registry, tmp_path: Path
) -> None:
    """As Llama 3 has it, where the plugin that opens it is left out."""
    fewer = [component for component in registry.components if component.id != "tokenizers:tokenizers"]
    lines = (base64.b64encode(bytes([i, 65])).decode() + f" {i}\n" for i in range(256))
    (tmp_path / "tokenizer.model").write_text("".join(lines))
    with pytest.raises(ModelError) as caught:
        open_tokenizer(
            {"tokenizer.model": tmp_path / "tokenizer.model"}, Registry(registry.plugins, fewer), tmp_path
        )
    named = "tokenizer.model (a tiktoken vocabulary, as Llama 3 has it)"
    assert caught.value.what == f"no tokenizer opens {named}; there is sentencepiece"


def test_a_model_may_have_more_ids_than_its_tokenizer_and_not_fewer(tokenizer: CheckedTokenizer) -> None:
    check_vocabulary(tokenizer, 320, Path("m"))
    check_vocabulary(tokenizer, 384, Path("m"))
    with pytest.raises(ModelError, match=r"m: the tokenizer has 320 pieces, the model a vocabulary of 319"):
        check_vocabulary(tokenizer, 319, Path("m"))


def test_a_folder_that_names_no_files_has_a_tokenizer_model() -> None:
    assert tokenizer_files(Path("m"), {}) == {"tokenizer.model": Path("m/tokenizer.model")}
    named = tokenizer_files(Path("m"), {"tokenizer_files": ["tokenizer.json", "vocab.txt"]})
    assert named == {"tokenizer.json": Path("m/tokenizer.json"), "vocab.txt": Path("m/vocab.txt")}


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "/a", "a\\b", "c:x", "a\nb", None, 1])
def test_a_name_that_leads_elsewhere_is_not_plain(name: Any) -> None:
    assert not is_plain_name(name)
    assert is_plain_name("chat_template.jinja")


def test_what_a_plugin_gives_is_checked_at_each_call(tokenizer: CheckedTokenizer) -> None:
    class Odd:
        vocab_size, bos, stops, fingerprint = 320, 1, frozenset([2]), "odd"

        def encode(self, text: str, *, bos: bool = True, eos: bool = False) -> Any:
            return {"none": None, "high": [1, 320], "float": [1, 3.0], "no begin": [5], "no end": [1]}[text]

        def decode(self, ids: Any) -> Any:
            return b"bytes"

        def stream(self, ids: Any, every: int = 1) -> Any:
            return [None]

    odd = CheckedTokenizer(tokenizer.component, {}, Odd())
    owner = "tokenizer sentencepiece:sentencepiece: "
    for text, says in (
        ("none", "encode gives None, wanted a list of ids below 320"),
        ("high", "encode gives [1, 320], wanted a list of ids below 320"),
        ("float", "encode gives [1, 3.0], wanted"),
        ("no begin", "encode gives [5], wanted the begin id 1 in front"),
        ("no end", "encode gives [1], wanted one of the end ids [2] behind"),
    ):
        with pytest.raises(PluginError) as caught:
            odd.encode(text, eos=True)
        assert caught.value.what.startswith(owner + says)
        assert caught.value.exit_code == 8
    with pytest.raises(PluginError, match="decode gives bytes, wanted str"):
        odd.decode([1])
    with pytest.raises(PluginError, match="stream gives NoneType, wanted str"):
        list(odd.stream([1]))
