"""The tokenizer files that are made of the vocabulary inside a GGUF file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf_files
import pytest
import sentencepiece
from gguf_files import ARCHITECTURE, BYTE_LEVEL, PIECES
from mlxlora_gguf.model import open_model, tokenizer_files
from mlxlora_gguf.sentencepiece_model import read_pieces
from mlxlora_gguf.splitting import RULES
from mlxlora_gguf.words import from_pieces

from mlxlora_core.errors import ModelError
from mlxlora_core.values import TokenizerFiles

GGML = "tokenizer.ggml."
TEXTS = (
    "hello hello",
    "h\u00e9llo \U0001f600",
    " hell\n\n  he",
    "a<|im_start|>b<tool>c",
    "12 \u00bd \u0663",
    "",
)


def files_of(folder: Path, base: dict[str, Any] = BYTE_LEVEL, **change: Any) -> TokenizerFiles:
    """The files of a vocabulary with keys changed, or left out where they are None."""
    keys = {**ARCHITECTURE, **base} | {GGML + key: value for key, value in change.items()}
    path = folder / "vocabulary.gguf"
    path.write_bytes(gguf_files.gguf({key: value for key, value in keys.items() if value is not None}))
    return tokenizer_files(path)


def read(files: TokenizerFiles, name: str) -> Any:
    content = files[name]
    assert isinstance(content, bytes)
    return json.loads(content)


def notes_of(folder: Path, **change: Any) -> list[str]:
    files_of(folder, **change)
    return list(open_model(folder / "vocabulary.gguf", "exact").notes)


# --- byte-level BPE -----------------------------------------------------------


def bpe(files: TokenizerFiles) -> Any:
    tokenizers = pytest.importorskip("tokenizers")
    content = files["tokenizer.json"]
    assert isinstance(content, bytes)
    return tokenizers.Tokenizer.from_str(content.decode())


def test_merges_and_added_tokens(tmp_path: Path) -> None:
    tokenizer = bpe(files_of(tmp_path))

    def tokens(text: str) -> list[str]:
        return list(tokenizer.encode(text, add_special_tokens=False).tokens)

    assert tokens("hello hello") == ["hello", "\u0120hello"]
    assert tokens("hell") == ["hell"] and tokens("hehe") == ["he", "he"]
    assert tokens("a<|im_start|>hello<tool>") == ["a", "<|im_start|>", "hello", "<tool>"]
    for text in TEXTS:
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        assert tokenizer.decode(ids, skip_special_tokens=False) == text
    added = {
        token.content: (number, token.special)
        for number, token in tokenizer.get_added_tokens_decoder().items()
    }
    assert added == {"<|im_start|>": (261, True), "<|im_end|>": (262, True), "<tool>": (263, False)}


def test_files_beside_tokenizer_json(tmp_path: Path) -> None:
    files = files_of(tmp_path, padding_token_id=262)
    assert set(files) == {"tokenizer.json", "tokenizer_config.json", "generation_config.json"}
    assert read(files, "tokenizer_config.json") == {
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "pad_token": "<|im_end|>",
        "add_bos_token": False,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "chat_template": "{{ messages }}",
        "gguf_keys": {"pre": "smollm"},  # what no other key says, for the way back
    }
    assert read(files, "generation_config.json") == {
        "bos_token_id": 261,
        "pad_token_id": 262,
        "eos_token_id": [262],
    }


def test_named_templates(tmp_path: Path) -> None:
    path = tmp_path / "vocabulary.gguf"
    keys = {**ARCHITECTURE, **BYTE_LEVEL, "tokenizer.chat_template.tool_use": "tools"}
    path.write_bytes(gguf_files.gguf(keys))
    assert read(tokenizer_files(path), "tokenizer_config.json")["chat_template"] == [
        {"name": "default", "template": "{{ messages }}"},
        {"name": "tool_use", "template": "tools"},
    ]


@pytest.mark.parametrize(
    ("change", "front"),
    [
        ({}, []),
        ({"add_bos_token": True}, [261]),
        ({"add_bos_token": None, "pre": "llama-bpe"}, [261]),
        ({"add_bos_token": None, "pre": "tekken"}, [261]),
        ({"add_bos_token": None, "pre": "qwen2"}, []),
        ({"add_bos_token": False, "pre": "llama-bpe"}, []),
        ({"add_bos_token": True, "bos_token_id": None}, []),
    ],
)
def test_what_is_put_in_front(change: dict[str, Any], front: list[int], tmp_path: Path) -> None:
    files = files_of(tmp_path, **change)
    assert bpe(files).encode("he").ids == [*front, 256]
    assert read(files, "tokenizer_config.json")["add_bos_token"] is bool(front)


def test_what_is_put_behind(tmp_path: Path) -> None:
    tokenizer = bpe(files_of(tmp_path, add_eos_token=True, add_bos_token=True))
    assert tokenizer.encode("he").ids == [261, 256, 262]
    assert tokenizer.encode("he", "ll").ids == [261, 256, 262, 261, 257, 262]


@pytest.mark.parametrize(
    ("pre", "text", "parts"),
    [
        ("gpt-2", "ab 1234'll  y", ["ab", "\u01201234", "'ll", "\u0120", "\u0120y"]),
        ("smollm", "ab 12'LL", ["ab", "\u0120", "1", "2", "'", "LL"]),
        ("llama-bpe", "ab 1234'LL\n x", ["ab", "\u0120", "123", "4", "'LL", "\u010a", "\u0120x"]),
        ("qwen2", "ab 12'LL", ["ab", "\u0120", "1", "2", "'LL"]),
        ("tekken", "abCd 12", ["ab", "Cd", "\u0120", "1", "2"]),
        ("gpt-4o", "abCd'll 1234", ["ab", "Cd'll", "\u0120", "123", "4"]),
        ("qwen35", "e\u0301e", ["e\u00cc\u0123e"]),
        ("qwen2", "e\u0301e", ["e", "\u00cc\u0123e"]),
        ("falcon", "a>=b, 1234 c", ["a", ">=", "b", ",", "\u0120", "123", "4", "\u0120c"]),
        ("deepseek-llm", "ab 12\n+x  ", ["ab", "\u0120", "12", "\u010a", "+", "x", "\u0120\u0120"]),
        ("deepseek-llm", "a\u01bbb\u3002", ["a", "\u00c6\u00bb", "b", "\u00e3\u0122\u0124"]),
    ],
)
def test_texts_are_split_by_the_rule_that_is_named(
    pre: str, text: str, parts: list[str], tmp_path: Path
) -> None:
    splitter = bpe(files_of(tmp_path, pre=pre)).pre_tokenizer
    assert [part for part, _ in splitter.pre_tokenize_str(text)] == parts


@pytest.mark.parametrize("pre", RULES)
def test_every_rule_opens(pre: str, tmp_path: Path) -> None:
    tokenizer = bpe(files_of(tmp_path, pre=pre))
    for text in TEXTS:
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        assert tokenizer.decode(ids, skip_special_tokens=False) == text


@pytest.mark.parametrize("pre", [None, "default"])
def test_a_rule_that_is_not_stated_is_assumed_and_told(pre: str | None, tmp_path: Path) -> None:
    assert [note for note in notes_of(tmp_path, pre=pre) if "does not say how its tokenizer splits" in note]
    assert notes_of(tmp_path) == []


def test_tokens_that_are_whole_are_taken_whole_where_the_rule_says_so(tmp_path: Path) -> None:
    change = {"merges": ["h e"], "pre": "llama-bpe", "add_bos_token": False}
    assert bpe(files_of(tmp_path, **change)).encode("hello").tokens == ["hello"]
    assert bpe(files_of(tmp_path, **change | {"pre": "qwen2"})).encode("hello").tokens == [
        "he",
        "l",
        "l",
        "o",
    ]


def test_merges_begin_with_a_space_where_they_do(tmp_path: Path) -> None:
    tokens = [*BYTE_LEVEL[GGML + "tokens"][:256], " ", "  ", "<eos>"]
    change = {"tokens": tokens, "token_type": [1] * 258 + [3], "merges": ["   "], "eos_token_id": 258}
    merges = read(files_of(tmp_path, **change | {"bos_token_id": None}), "tokenizer.json")["model"]["merges"]
    assert merges == [[" ", " "]]


# --- SentencePiece ------------------------------------------------------------


def pieces(files: TokenizerFiles) -> sentencepiece.SentencePieceProcessor:
    assert set(files) == {"tokenizer.model", "tokenizer_config.json", "generation_config.json"}
    return sentencepiece.SentencePieceProcessor(model_proto=files["tokenizer.model"])


def test_pieces_and_their_types(tmp_path: Path) -> None:
    files = files_of(tmp_path, PIECES)
    model = pieces(files)
    assert [model.id_to_piece(n) for n in range(model.vocab_size())] == PIECES[GGML + "tokens"]
    assert [model.get_score(n) for n in range(model.vocab_size())] == PIECES[GGML + "scores"]
    assert (model.unk_id(), model.bos_id(), model.eos_id(), model.pad_id()) == (0, 1, 2, -1)
    assert model.is_unknown(0) and model.is_control(1) and model.is_control(2) and model.is_byte(3)
    assert model.encode("hello hello", out_type=str) == ["\u2581hello", "\u2581hello"]
    assert model.encode("<tool>", out_type=str) == ["\u2581", "<tool>"]
    assert model.encode("\u00e9", out_type=str) == ["\u2581", "<0xC3>", "<0xA9>"]
    for text in TEXTS[:3]:
        assert model.decode(model.encode(text)) == text
    config = read(files, "tokenizer_config.json")
    assert config["add_bos_token"] is True and config["add_prefix_space"] is True
    assert (config["bos_token"], config["eos_token"], config["unk_token"]) == ("<s>", "</s>", "<unk>")
    assert read(files, "generation_config.json") == {"bos_token_id": 1, "eos_token_id": [2]}


def test_no_space_in_front_where_the_file_says_so(tmp_path: Path) -> None:
    model = pieces(files_of(tmp_path, PIECES, add_space_prefix=False, add_bos_token=False))
    assert model.encode("he hell", out_type=str) == ["he", "\u2581hell"]


def test_several_spaces_are_one_token_where_the_vocabulary_has_it(tmp_path: Path) -> None:
    """As Gemma has them: found before a text is split, and so with their spaces as they are."""
    size = len(PIECES[GGML + "tokens"])
    change = {
        "tokens": [*PIECES[GGML + "tokens"], "  ", "\n\n"],
        "token_type": [*PIECES[GGML + "token_type"], 4, 4],
        "scores": [*PIECES[GGML + "scores"], -1000.0, -1000.0],
    }
    files = files_of(tmp_path, PIECES, add_space_prefix=False, **change)
    model = pieces(files)
    assert model.encode("he  he\n\nhe", out_type=str) == ["he", "\u2581\u2581", "he", "\n\n", "he"]
    file = files["tokenizer.model"]
    content = file if isinstance(file, bytes) else file.read_bytes()
    words = from_pieces(read_pieces(content, tmp_path))
    assert (words.texts[size], words.types[size]) == ("  ", 4) and words.texts[size + 1] == "\n\n"
    assert words.texts[PIECES[GGML + "tokens"].index("\u2581he")] == "\u2581he"


def test_ids_that_are_usual_where_none_are_stated(tmp_path: Path) -> None:
    change = dict.fromkeys(("bos_token_id", "eos_token_id", "unknown_token_id"))
    model = pieces(files_of(tmp_path, PIECES, **change))
    assert (model.unk_id(), model.bos_id(), model.eos_id()) == (0, 1, 2)


def test_one_unknown_piece_is_left(tmp_path: Path) -> None:
    types = list(PIECES[GGML + "token_type"])
    types[0], types[1], types[259] = 3, 1, 2  # as in the files of Phi-3
    model = pieces(files_of(tmp_path, PIECES, token_type=types))
    assert [n for n in range(model.vocab_size()) if model.is_unknown(n)] == [0]
    assert model.bos_id() == 1
    assert model.encode("<tool>", out_type=str) == ["\u2581", "<tool>"]


def test_pieces_without_bytes(tmp_path: Path) -> None:
    keep = [0, 1, 2, *range(260, len(PIECES[GGML + "tokens"]))]
    change = {key: [PIECES[GGML + key][n] for n in keep] for key in ("tokens", "token_type", "scores")}
    assert pieces(files_of(tmp_path, PIECES, **change)).encode("hello\u00e9") == [7, 0]


# --- which tokens end a text --------------------------------------------------


def ends(folder: Path, tokens: list[str], types: list[int], **change: Any) -> Any:
    whole = [*BYTE_LEVEL[GGML + "tokens"], *tokens]
    kinds = [*BYTE_LEVEL[GGML + "token_type"], *types]
    files = files_of(folder, tokens=whole, token_type=kinds, **change)
    return read(files, "generation_config.json")["eos_token_id"]


def test_ends_by_key_and_by_text(tmp_path: Path) -> None:
    assert ends(tmp_path, ["<|eot_id|>", "<|eom_id|>", "<x>"], [3, 4, 3]) == [262, 264, 265]
    assert ends(tmp_path, ["<a>", "<b>"], [3, 1], eot_token_id=264, eom_token_id=265) == [262, 264, 265]
    assert ends(tmp_path, ["<|endoftext|>"], [1]) == [262]  # ordinary text
    assert ends(tmp_path, ["</s>"], [4]) == [262] and ends(tmp_path, ["</s>"], [3]) == [262, 264]
    assert ends(tmp_path, ["<|end|>"], [3]) == [262, 264]
    assert ends(tmp_path, ["<|end|>", "<|return|>", "<|call|>"], [3, 3, 3]) == [262, 265, 266]
    assert ends(tmp_path, ["<eos>"], [3], eos_token_id=None) == [262, 264]  # <|im_end|> is known by its text


def test_an_end_that_the_file_calls_ordinary_is_special(tmp_path: Path) -> None:
    files = files_of(tmp_path, token_type=None)
    added = read(files, "tokenizer.json")["added_tokens"]
    assert [(token["id"], token["special"]) for token in added] == [(261, True), (262, True)]


# --- damage -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("base", "change", "reason"),
    [
        (BYTE_LEVEL, {"model": None}, "has no tokenizer"),
        (BYTE_LEVEL, {"model": "bert"}, r"tokenizer of model 'bert' \(WordPiece, wanted gpt2 or llama\)"),
        (BYTE_LEVEL, {"model": "x" * 999}, "tokenizer of model 'xxx"),
        (BYTE_LEVEL, {"model": 5}, r"key tokenizer\.ggml\.model of type int, wanted str"),
        (
            BYTE_LEVEL,
            {"pre": "deepseek-v9"},
            "splits text by the rule 'deepseek-v9' .* which is not known; known are",
        ),
        (BYTE_LEVEL, {"tokens": None}, "has 0 tokens, wanted 1 to"),
        (BYTE_LEVEL, {"tokens": [1, 2]}, r"key tokenizer\.ggml\.tokens of int items, wanted str"),
        (BYTE_LEVEL, {"tokens": ["a", "b", "a"]}, "has the token 'a' 2 times"),
        (BYTE_LEVEL, {"tokens": ["a" * 5000]}, "has a token of 5000 letters"),
        (BYTE_LEVEL, {"token_type": [1, 2]}, r"has 2 values of tokenizer\.ggml\.token_type for 264 tokens"),
        (BYTE_LEVEL, {"token_type": [9] * 264}, "has tokens of type 9, wanted 0 to 6"),
        (BYTE_LEVEL, {"token_type": [0.5] * 264}, "of float items, wanted int"),
        (BYTE_LEVEL, {"merges": None}, "gpt2 without merges"),
        (BYTE_LEVEL, {"merges": ["he"]}, "has a merge 'he' that makes no token of two others"),
        (BYTE_LEVEL, {"merges": ["h zz"]}, "has a merge 'h zz' that"),
        (BYTE_LEVEL, {"merges": ["he he"]}, "has a merge 'he he' that"),
        (BYTE_LEVEL, {"eos_token_id": 264}, "eos_token_id 264, wanted an id below 264"),
        (BYTE_LEVEL, {"bos_token_id": 2**31}, "bos_token_id 2147483648, wanted an id below 264"),
        (BYTE_LEVEL, {"eos_token_id": "x"}, "eos_token_id of type str, wanted int"),
        (BYTE_LEVEL, {"add_bos_token": 1}, "add_bos_token of type int, wanted bool"),
        (BYTE_LEVEL, {"eos_token_id": None, "token_type": None}, "does not say which token ends a text"),
        (PIECES, {"scores": None}, "llama without scores"),
        (PIECES, {"scores": ["x"]}, "scores of str items, wanted float"),
        (
            PIECES,
            {"token_type": [2, 3, 3, *[6] * 255, 1, 4, *[1] * 10]},
            "255 tokens of type byte, wanted <0x00>",
        ),
        (
            PIECES,
            {"token_type": [2, 3, 3, 1, *[6] * 256, *[1] * 10]},
            "a token of type byte that is '<tool>'",
        ),
    ],
)
def test_a_vocabulary_that_cannot_be_is_one_line(
    base: dict[str, Any], change: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match=reason) as fault:
        files_of(tmp_path, base, **change)
    assert str(fault.value).startswith(str(tmp_path)) and str(fault.value).isprintable()


def test_a_template_must_be_text(tmp_path: Path) -> None:
    path = tmp_path / "vocabulary.gguf"
    path.write_bytes(gguf_files.gguf({**ARCHITECTURE, **BYTE_LEVEL, "tokenizer.chat_template": ["a"]}))
    with pytest.raises(ModelError, match=r"key tokenizer\.chat_template of type list, wanted str"):
        tokenizer_files(path)


def test_ids_that_do_not_matter_and_do_not_exist_are_left_out(tmp_path: Path) -> None:
    files = files_of(tmp_path, padding_token_id=9999, unknown_token_id=2**32 - 1)
    assert not {"pad_token", "unk_token"} & read(files, "tokenizer_config.json").keys()


def test_an_empty_token_has_a_name(tmp_path: Path) -> None:
    tokens = [*BYTE_LEVEL[GGML + "tokens"], ""]
    files = files_of(tmp_path, tokens=tokens, token_type=[*BYTE_LEVEL[GGML + "token_type"], 1])
    assert bpe(files).token_to_id("[EMPTY_264]") == 264
