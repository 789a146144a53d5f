"""The conformance suite over tokenizers of the library ``tokenizers``, one of each kind that models have."""

from __future__ import annotations

import base64
import functools
import os
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import small_tokenizers
from tokenizers import Regex, Tokenizer, pre_tokenizers

from mlxlora_core import plugins as registry
from mlxlora_core.testing.tokenizer import Messages, TokenizerSuite, said

SPEC = next(
    component.spec
    for component in registry.load(environ={registry.ALLOW_LIST: ""}).of("tokenizer")
    if component.spec.name == "tokenizers"
)


@functools.cache
def made(kind: str) -> str:
    """The tokenizer.json of a small tokenizer."""
    chatml = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    kinds: dict[str, Callable[[], Tokenizer]] = {
        "no bos": lambda: small_tokenizers.byte_level(chatml),
        "bos": lambda: small_tokenizers.byte_level(["<s>", *chatml], bos="<s>"),
        "llama 2": small_tokenizers.like_llama_2,
        "unigram": small_tokenizers.unigram,
        "unigram always": lambda: small_tokenizers.unigram("always"),
        "unigram never": lambda: small_tokenizers.unigram("never"),
    }
    text: str = kinds[kind]().to_str()
    return text


def plain(kind: str) -> Callable[[str], list[int]]:
    """How the library itself encodes a text in which nothing is a special token."""
    tokenizer = Tokenizer.from_str(made(kind))
    tokenizer.encode_special_tokens = True
    return lambda text: list(tokenizer.encode(text, add_special_tokens=False).ids)


class TestByteLevelWithoutBos(TokenizerSuite):
    """As Qwen and SmolLM2 have it: a token in front of each turn and one behind, none in front of a text."""

    spec = SPEC
    kind = "no bos"
    template = small_tokenizers.CHATML
    config: Mapping[str, Any] = {"eos_token": "<|im_end|>"}
    generation: Any = (0,)

    def write(self, folder: Path) -> Mapping[str, Path]:
        config = {**self.config, "chat_template": self.template}
        return small_tokenizers.write(folder, Tokenizer.from_str(made(self.kind)), config, self.generation)

    def damage(self) -> Mapping[str, Callable[[Path], object]]:
        def cut(folder: Path) -> None:
            path = folder / "tokenizer.json"
            os.truncate(path, path.stat().st_size // 2 + 1)

        return {
            "cut": cut,
            "empty": lambda folder: os.truncate(folder / "tokenizer.json", 0),
            "absent": lambda folder: (folder / "tokenizer.json").unlink(),
            "a web page": lambda folder: (folder / "tokenizer.json").write_text("<!DOCTYPE html>"),
            "a list": lambda folder: (folder / "tokenizer.json").write_text("[]"),
            "a config that is none": lambda folder: (folder / "tokenizer_config.json").write_text("{"),
            "ends beyond it": lambda folder: (folder / "generation_config.json").write_text(
                '{"eos_token_id": 5000}'
            ),
        }

    def reference(self, messages: Messages) -> list[int]:
        encode = plain(self.kind)
        begin, end = (
            Tokenizer.from_str(made(self.kind)).token_to_id(f"<|im_{x}|>") for x in ("start", "end")
        )
        ids = []
        for message in messages:
            ids += [begin, *encode(f"{message['role']}\n{message['content']}"), end, *encode("\n")]
        return ids[:-1]  # what is behind the last end is no part of the answer


class TestByteLevelWithBos(TestByteLevelWithoutBos):
    """A begin token by the post-processor; the template writes none."""

    kind = "bos"


class TestSpaceInFrontOfEveryPart(TestByteLevelWithoutBos):
    """As Llama 2 has it: each text between special tokens gets a space in front."""

    kind = "llama 2"
    template = small_tokenizers.INSTRUCT
    config: Mapping[str, Any] = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "add_bos_token": True}
    generation: Any = 2

    def reference(self, messages: Messages) -> list[int]:
        encode = plain(self.kind)
        rest = list(messages)
        system = rest.pop(0)["content"] + "\n\n" if rest[0]["role"] == "system" else ""
        ids = [1]
        for asked, answered in zip(rest[::2], rest[1::2], strict=True):
            turn = f"{system}[INST] {asked['content']} [/INST] {answered['content']}"
            ids += [*encode(turn), 2]
            system = ""
        return ids


class TestSpaceInFrontOfTheFirstPart(TestSpaceInFrontOfEveryPart):
    """As Llama 2 has it in later conversions; control pieces stand in the vocabulary too."""

    kind = "unigram"
    # A text that begins with a space gets no other one, and so has the ids of the text without it.
    texts = tuple(text for text in TokenizerSuite.texts if not text.startswith(" "))

    def reference(self, messages: Messages) -> list[int]:
        raise NotImplementedError  # the library itself takes </s> in a text for the token


class TestSpaceInFrontAlways(TestSpaceInFrontOfTheFirstPart):
    """Each part gets one, if it has none."""

    kind = "unigram always"


class TestNoSpaceInFront(TestSpaceInFrontOfTheFirstPart):
    """No part gets one, as with Gemma."""

    kind = "unigram never"
    texts = TokenizerSuite.texts


class TestLlama3(TokenizerSuite):
    """Meta's file, with the form of Llama 3."""

    spec = SPEC

    def write(self, folder: Path) -> Mapping[str, Path]:
        (folder / "tokenizer.model").write_bytes(small_tokenizers.tiktoken_file())
        return {"tokenizer.model": folder / "tokenizer.model"}

    def damage(self) -> Mapping[str, Callable[[Path], object]]:
        def change(old: bytes, new: bytes) -> Callable[[Path], object]:
            def damage(folder: Path) -> None:
                path = folder / "tokenizer.model"
                path.write_bytes(path.read_bytes().replace(old, new, 1))

            return damage

        return {
            "a rank twice": change(b" 7\n", b" 6\n"),
            "no base64": change(b"AA==", b"A==="),
            "a token twice": change(base64.b64encode(b"a"), base64.b64encode(b"b")),
            "a token of none": change(b"AA==", b""),
            "cut": change(b" 100\n", b" 1"),
            "another model's": lambda folder: (folder / "tokenizer.model").write_bytes(
                b"".join(b"%s %d\n" % (base64.b64encode(b"%06d" % i), i) for i in range(128_001))
            ),
        }

    def reference(self, messages: Messages) -> list[int]:
        tokens = small_tokenizers.rank_list()
        begin, start, stop, end = (len(tokens) + number for number in (0, 6, 7, 9))
        ids = [begin]
        for message in messages:
            ids += [start, *tiktoken(message["role"]), stop, *tiktoken("\n\n")]
            ids += [*tiktoken(message["content"].strip()), end]
        return ids


class TestTekken(TokenizerSuite):
    """Mistral's file, with the form of its third version."""

    spec = SPEC
    refused = (
        [{"role": "assistant", "content": "x"}],
        said("a", "b") + said("c", system="late"),
        said("a") + said("b", "c"),
    )
    changed: Mapping[str, Any] = {}

    def write(self, folder: Path) -> Mapping[str, Path]:
        (folder / "tekken.json").write_bytes(small_tokenizers.tekken_file(**self.changed))
        return {"tekken.json": folder / "tekken.json"}

    def damage(self) -> Mapping[str, Callable[[Path], object]]:
        def change(**changed: Any) -> Callable[[Path], object]:
            return lambda folder: (folder / "tekken.json").write_bytes(
                small_tokenizers.tekken_file(**changed)
            )

        return {
            "more than it lists": change(default_vocab_size=9000),
            "no pattern": change(pattern=None),
            "a pattern that is none": change(pattern="("),
            "no room for the special tokens": change(default_num_special_tokens=3),
            "a number that is none": change(default_vocab_size="7"),
            "fewer than bytes": change(default_vocab_size=100),
            "a list": lambda folder: (folder / "tekken.json").write_text("[]"),
            "none of it": lambda folder: (folder / "tekken.json").write_text("{}"),
        }

    def system(self, text: str) -> tuple[list[int], str]:
        """What a system message becomes: ids at the start, and text in front of the first question."""
        return [], f"{text}\n\n"

    def reference(self, messages: Messages) -> list[int]:
        rest = list(messages)
        first, before = self.system(rest.pop(0)["content"]) if rest[0]["role"] == "system" else ([], "")
        ids = [1, *first]
        for asked, answered in zip(rest[::2], rest[1::2], strict=True):
            ids += [3, *(30 + i for i in tiktoken(before + asked["content"])), 4]
            ids += [*(30 + i for i in tiktoken(answered["content"])), 2]
            before = ""
        return ids


class TestTekken7(TestTekken):
    """Tokens around the system message."""

    changed: Mapping[str, Any] = {"version": "v7"}

    def system(self, text: str) -> tuple[list[int], str]:
        return [17, *(30 + i for i in tiktoken(text)), 18], ""


def tiktoken(text: str) -> list[int]:
    """A text by the rule of tiktoken: in each word the neighbours of the lowest rank are joined first."""
    ranks = {token: rank for rank, token in enumerate(small_tokenizers.rank_list())}
    ids: list[int] = []
    for word, _ in pre_tokenizers.Split(Regex(small_tokenizers.PATTERN), "isolated").pre_tokenize_str(text):
        parts = [bytes([byte]) for byte in word.encode()]
        if word.encode() in ranks:
            parts = [word.encode()]
        while True:
            pairs = [(ranks.get(a + b), i) for i, (a, b) in enumerate(pairwise(parts))]
            known = [(rank, i) for rank, i in pairs if rank is not None]
            if not known:
                break
            _, at = min(known)
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        ids += [ranks[part] for part in parts]
    return ids
