"""Text out of tokens that come one by one: whole characters, and stop texts wherever they are cut."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest

from mlxlora_core.model.tokenizers import CheckedTokenizer
from mlxlora_core.serving.text import Text


def told(tokenizer: CheckedTokenizer, ids: Sequence[int], stop: Sequence[str] = ()) -> tuple[list[str], bool]:
    text, parts = Text(tokenizer, stop), []
    for token in ids:
        parts.append(text.add(token))
        if text.stopped:
            break
    return [*parts, text.end()], text.stopped


@pytest.mark.parametrize("text", ["the weights", "naïve 漢字 🙂🙃 é", "\x00\x07 a\n\n b", "🙂"])
def test_the_parts_joined_are_the_text(tokenizer: CheckedTokenizer, text: str) -> None:
    ids = tokenizer.encode(text, bos=False)
    parts, _ = told(tokenizer, ids)
    assert "".join(parts) == "".join(tokenizer.stream(ids))
    assert not any("\ufffd" in part for part in parts)


def test_random_bytes_are_what_the_tokenizer_makes_of_them(tokenizer: CheckedTokenizer) -> None:
    draw = random.Random(0)
    for _ in range(30):
        ids = [draw.randrange(3, 320) for _ in range(40)]
        assert "".join(told(tokenizer, ids)[0]) == "".join(tokenizer.stream(ids))


def test_a_text_ends_before_the_first_stop_text_wherever_tokens_are_cut(tokenizer: CheckedTokenizer) -> None:
    whole = "the adapter scales the weights in float32. A mask"
    ids = tokenizer.encode(whole, bos=False)
    text = "".join(tokenizer.stream(ids))
    for start in range(len(text)):
        for size in (1, 2, 5, 9):
            stop = text[start : start + size]
            parts, stopped = told(tokenizer, ids, ["@@", stop])
            assert stopped and "".join(parts) == text[: text.find(stop)], stop


def test_of_several_the_first_that_is_complete_counts(tokenizer: CheckedTokenizer) -> None:
    ids = tokenizer.encode("abcdef", bos=False)
    before = "".join(tokenizer.stream(ids)).partition("bcdef")[0]
    assert "".join(told(tokenizer, ids, ["cde", "bcdef"])[0]) == before + "b"


def test_what_only_begins_like_a_stop_text_is_told_in_the_end(tokenizer: CheckedTokenizer) -> None:
    ids = tokenizer.encode("xabab", bos=False)
    whole = "".join(tokenizer.stream(ids))
    parts, stopped = told(tokenizer, ids, ["ababc"])
    assert "".join(parts) == whole and not stopped
    assert parts[-1].endswith("abab")
    assert "".join(told(tokenizer, [*ids, *tokenizer.encode("abc", bos=False)], ["ababc"])[0])[:3] != "aba"
