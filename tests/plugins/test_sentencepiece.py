from __future__ import annotations

import hashlib
import io
import os
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from mlxlora_sentencepiece.tokenizer import SPACE, SentencePieceTokenizer

from mlxlora_core.errors import DataError, ModelError

TEXTS = [f"The quick brown fox number {i} jumps over the lazy dog, naïve café." for i in range(200)]
HARD = ["naïve 😀 日本語 café", "  two spaces,  and more ", "a\tb\nc", "x", "0 ⁇ 1"]


@pytest.fixture(scope="module")
def train(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A function that trains a SentencePiece model and gives its file."""

    def make(texts: Sequence[str] = TEXTS, **options: Any) -> Path:
        model = io.BytesIO()
        settings = {"model_type": "bpe", "vocab_size": 330, "byte_fallback": True} | options
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_writer=model,
            hard_vocab_limit=False,
            num_threads=1,
            minloglevel=2,
            **settings,
        )
        path = tmp_path_factory.mktemp("model") / "tokenizer.model"
        path.write_bytes(model.getvalue())
        return path

    return make


KINDS: dict[str, dict[str, Any]] = {
    "as Llama": {"normalization_rule_name": "identity", "remove_extra_whitespaces": False},
    "defaults": {},
    "no space in front": {"add_dummy_prefix": False, "remove_extra_whitespaces": False},
    "unigram": {"model_type": "unigram", "remove_extra_whitespaces": False},
    "no bytes": {"byte_fallback": False, "vocab_size": 100},
}


@pytest.fixture(scope="module", params=list(KINDS))
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def tokenizer(kind: str, train: Callable[..., Path]) -> SentencePieceTokenizer:
    return SentencePieceTokenizer(train(**KINDS[kind]))


@pytest.fixture(scope="module")
def llama(train: Callable[..., Path]) -> SentencePieceTokenizer:
    return SentencePieceTokenizer(train(**KINDS["as Llama"]))


def reference(tokenizer: SentencePieceTokenizer) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_file=str(tokenizer.path))


# --- encoding -----------------------------------------------------------------


def test_the_begin_id_goes_in_front_and_the_end_id_behind_on_request(
    tokenizer: SentencePieceTokenizer,
) -> None:
    ids = reference(tokenizer).encode("the fox")
    assert tokenizer.encode("the fox") == [tokenizer.bos, *ids]
    assert tokenizer.encode("the fox", eos=True) == [tokenizer.bos, *ids, tokenizer.eos]
    assert tokenizer.encode("the fox", bos=False) == ids
    assert tokenizer.encode("", eos=True) == [tokenizer.bos, tokenizer.eos]
    assert (tokenizer.bos, tokenizer.eos) == (1, 2)


def test_what_looks_like_a_special_token_in_a_text_is_text(llama: SentencePieceTokenizer) -> None:
    ids = llama.encode("<s>the</s>", bos=False)
    assert llama.bos not in ids and llama.eos not in ids
    assert llama.decode(llama.encode("<s>the</s>")) == "<s>the</s>"


def test_half_a_surrogate_pair_is_refused_and_a_null_is_not(llama: SentencePieceTokenizer) -> None:
    with pytest.raises(DataError, match=r"character 3 of the text is '\\ud800'"):
        llama.encode("ab\ud800c")
    assert llama.decode(llama.encode("a\0b")) == "a\0b"


# --- decoding -----------------------------------------------------------------


def test_the_leading_space_of_the_first_piece_is_given_back(llama: SentencePieceTokenizer) -> None:
    ids = llama.encode("the fox", bos=False)
    assert reference(llama).id_to_piece(ids[0]).startswith(SPACE)
    assert reference(llama).decode(ids) == "the fox"
    assert llama.decode(ids) == " the fox"
    inside = [id for id in ids if not reference(llama).id_to_piece(id).startswith(SPACE)]
    assert llama.decode(inside) == reference(llama).decode(inside)


@pytest.mark.parametrize("text", HARD)
def test_a_text_comes_back_as_it_was(llama: SentencePieceTokenizer, text: str) -> None:
    assert llama.decode(llama.encode(text, eos=True)) == text


def test_no_space_is_made_up_where_the_model_puts_none_in_front(train: Callable[..., Path]) -> None:
    tokenizer = SentencePieceTokenizer(train(**KINDS["no space in front"]))
    assert tokenizer.decode(tokenizer.encode("the fox")) == "the fox"
    assert tokenizer.decode(tokenizer.encode(" the fox")) == " the fox"
    assert tokenizer.decode(tokenizer.encode(" the fox", bos=False)) == " the fox"


def test_decoding_is_sentencepiece_s_own_but_for_leading_spaces(tokenizer: SentencePieceTokenizer) -> None:
    model = reference(tokenizer)
    draw = random.Random(0)
    pieces = [id for id in range(tokenizer.vocab_size) if not model.is_byte(id)]
    assert any(model.is_unknown(id) for id in pieces) and any(model.is_control(id) for id in pieces)
    for _ in range(300):
        ids = draw.choices(pieces, k=draw.randrange(12))
        assert tokenizer.decode(ids).lstrip(" ") == model.decode(ids).lstrip(" "), ids


# --- streaming ----------------------------------------------------------------


@pytest.mark.parametrize("every", [1, 2, 3, 7, 1000])
def test_segments_joined_are_the_text_of_all_ids(tokenizer: SentencePieceTokenizer, every: int) -> None:
    draw = random.Random(every)
    for _ in range(100):
        ids = draw.choices(range(tokenizer.vocab_size), k=draw.randrange(30))
        if ids[:1] == [tokenizer.bos]:
            continue  # what follows a prompt does not begin a text
        segments = list(tokenizer.stream(iter(ids), every))
        assert "".join(segments) == tokenizer.decode(ids)
        assert all(segments)
        assert len(segments) <= len(ids) // every + 1


@pytest.mark.parametrize("every", [1, 2, 3])
def test_no_character_is_ever_shown_in_parts(llama: SentencePieceTokenizer, every: int) -> None:
    text = "é😀日本語 naïve 😀"
    ids = llama.encode(text, bos=False)
    assert sum(reference(llama).is_byte(id) for id in ids) > 10
    segments = list(llama.stream(ids, every))
    assert "".join(segments) == " " + text
    assert "\ufffd" not in "".join(segments)
    assert len(segments) > 3


def test_a_character_that_never_ends_is_shown_as_such_at_the_end_alone(llama: SentencePieceTokenizer) -> None:
    ids = llama.encode("the 😀", bos=False)[:-1]
    assert list(llama.stream(ids))[-1] == "\ufffd"
    assert llama.decode(ids) == " the \ufffd"


def test_nothing_streams_to_nothing(llama: SentencePieceTokenizer) -> None:
    assert list(llama.stream([])) == []
    assert list(llama.stream([llama.eos, llama.bos])) == []


# --- conversations --------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "form", "warning"),
    [
        ({}, "Llama 2", ""),
        ({"control_symbols": ["[INST]", "[/INST]"]}, "second and third version", ""),
        ({"user_defined_symbols": ["[INST]", "[/INST]"]}, "second and third version", ""),
        ({"control_symbols": ["[INST]"]}, "Llama 2", ""),
        ({"control_symbols": ["[INST]", "[/INST]", "[SYSTEM_PROMPT]"]}, "second and third version", ""),
        (
            {"control_symbols": ["[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"]},
            "seventh version",
            "",
        ),
        ({"user_defined_symbols": ["<start_of_turn>"]}, "Llama 2", "the vocabulary has <start_of_turn>"),
        ({"control_symbols": ["<|im_start|>", "<|im_end|>"]}, "Llama 2", "the vocabulary has <|im_start|>"),
    ],
)
def test_the_form_of_conversations_is_read_off_the_vocabulary(
    train: Callable[..., Path], options: dict[str, Any], form: str, warning: str
) -> None:
    tokenizer = SentencePieceTokenizer(train(**options))
    assert form in tokenizer.chat_form
    assert tokenizer.chat_warning.startswith(warning) and bool(tokenizer.chat_warning) is bool(warning)
    named = {*options.get("control_symbols", ()), *options.get("user_defined_symbols", ())}
    assert tokenizer.special_texts == {"<s>", "</s>", "<unk>", *named}


def test_user_defined_pieces_that_are_words_are_no_special_texts(train: Callable[..., Path]) -> None:
    tokenizer = SentencePieceTokenizer(train(user_defined_symbols=["\u2581<PRE>", "fox", "  ", "<>"]))
    assert tokenizer.special_texts == {"<s>", "</s>", "<unk>", "<PRE>"}


def test_a_piece_over_the_boundary_adds_no_space(train: Callable[..., Path]) -> None:
    """Where prompt and answer are encoded apart, the answer says what it says."""
    turns = [f"[INST] {i} [/INST] It" for i in range(50)]
    tokenizer = SentencePieceTokenizer(
        train(**KINDS["as Llama"], split_by_whitespace=False, split_by_unicode_script=False, texts=turns * 9)
    )
    asked = tokenizer.encode("[INST] 7 [/INST]")
    assert tokenizer.encode("[INST] 7 [/INST] It")[: len(asked)] != asked
    roles = ("user", "assistant")
    said = [{"role": role, "content": text} for role, text in zip(roles, ("7", "It"), strict=True)]
    first, answer = tokenizer.render(said)
    assert list(first.ids) == asked and tokenizer.decode(answer.ids) == " It"


# --- bad files ----------------------------------------------------------------


def test_the_fingerprint_is_that_of_the_file(llama: SentencePieceTokenizer) -> None:
    assert llama.fingerprint == hashlib.sha256(llama.path.read_bytes()).hexdigest()


def piece(text: bytes, kind: int = 1) -> bytes:
    """A piece as a field of a model: text, score 0 and type."""
    body = b"\x0a" + bytes([len(text)]) + text + b"\x15\0\0\0\0" + b"\x18" + bytes([kind])
    return b"\x0a" + bytes([len(body)]) + body


BAD_MODELS = {
    b"": "is empty",
    b"\0" * 64: "has the number 0",
    b"no model\n": "is not a SentencePiece model",
    b"version https://git-lfs.github.com/spec/v1\n": "run: git lfs pull",
    b"<html></html>": "is a web page",
    b"\x0a\xff\xff\xff\xff\x0f": "is 6 bytes, a field needs 4294967301",
    b"\xff" * 20: "has no end",
    piece(b"\xff\xfe"): "piece 0 is no UTF-8",
    piece(b"a") + piece(b""): "piece 1 has 0 bytes",
    piece(b"a", 9): "is of type 9",
    piece(b"<0x-1>", 6): "piece 0 is no byte",
    piece(b"a")[:-1]: "a field needs 12",
    b"\x12\0": "it has 0 pieces",
    piece(b"a") + b"\x12\0\x12\0": "its field 2 is there twice",
    piece(b"a") + b"\x10\0": "its field 2 is of another kind",
    piece(b"a"): "unk",
}


@pytest.mark.parametrize(("content", "says"), BAD_MODELS.items(), ids=BAD_MODELS.values())
def test_a_file_that_is_no_model_is_refused(tmp_path: Path, content: bytes, says: str) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=says):
        SentencePieceTokenizer(path)


def test_what_is_no_file_is_no_tokenizer(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path, says in (
        (tmp_path, "is a folder"),
        (tmp_path / "absent.model", "there is no tokenizer"),
        (tmp_path / "pipe", "is a pipe or a device"),
        (Path("/dev/zero"), "is a pipe or a device"),
    ):
        with pytest.raises(ModelError, match=says):
            SentencePieceTokenizer(path)


def test_a_damaged_model_is_refused_or_works(tmp_path: Path, llama: SentencePieceTokenizer) -> None:
    content = llama.path.read_bytes()
    draw = random.Random(0)
    refused = 0
    for _ in range(150):
        damaged = bytearray(content[: draw.randrange(len(content))])
        damaged[draw.randrange(len(damaged))] = draw.randrange(256)
        (tmp_path / "tokenizer.model").write_bytes(damaged)
        try:
            SentencePieceTokenizer(tmp_path / "tokenizer.model").encode("the fox")
        except ModelError:
            refused += 1
    assert refused > 100


def test_a_model_without_a_begin_piece_is_refused(train: Callable[..., Path]) -> None:
    with pytest.raises(ModelError, match="no begin or no end piece"):
        SentencePieceTokenizer(train(bos_id=-1))
