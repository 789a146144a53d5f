from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from mlxlora_core.errors import DataError
from mlxlora_core.model.tokenizers import CheckedTokenizer
from mlxlora_core.training.examples import Example, Examples, read_examples
from mlxlora_core.values import Piece


def read(tmp_path: Path, tokenizer: CheckedTokenizer, *rows: dict[str, Any], **options: Any) -> Examples:
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_examples(tmp_path / "train.jsonl", tokenizer, **{"max_seq_length": 512, **options})


def counted(example: Example, tokenizer: CheckedTokenizer) -> str:
    """The text of the tokens that count, with what is not text by name."""
    names = {tokenizer.bos: "<BOS>", 2: "<EOS>"}
    ids = example.tokens[example.mask].tolist()
    return "".join(names[id] if id in names else tokenizer.decode([id]) for id in ids)


def test_a_text_row_counts_whole_but_for_its_begin_token(tmp_path: Path, tokenizer: CheckedTokenizer) -> None:
    (example,) = read(tmp_path, tokenizer, {"text": "The adapter scales."}).examples
    assert example.tokens.tolist() == tokenizer.encode("The adapter scales.", eos=True)
    assert example.mask.tolist() == [False] + [True] * (len(example.tokens) - 1)
    assert counted(example, tokenizer) == " The adapter scales.<EOS>"


@pytest.mark.parametrize(
    ("prompt", "completion", "answer"),
    [
        ("Q: what?\nA:", " a layer", " a layer"),
        ("Q: what?\nA: ", "a layer", "a layer"),  # a text has the space in one piece with the answer
        ("th", "e", "e"),  # and this is one piece
        ("Q", "", ""),
        ("", "the weights", " the weights"),
        ("é", "😀", "😀"),
    ],
)
def test_a_prompt_ends_where_the_answer_begins(
    tmp_path: Path, tokenizer: CheckedTokenizer, prompt: str, completion: str, answer: str
) -> None:
    row = {"prompt": prompt, "completion": completion}
    (masked,) = read(tmp_path, tokenizer, row, {"prompt": "x", "completion": "y"}, mask_prompt=True).examples[
        :1
    ]
    (whole,) = read(tmp_path, tokenizer, row, {"text": "x"}).examples[:1]
    assert masked.tokens.tolist() == whole.tokens.tolist()
    asked = tokenizer.encode(prompt)
    assert masked.tokens.tolist()[: len(asked)] == asked
    assert tokenizer.decode(masked.tokens.tolist()) == prompt + completion
    ids = masked.tokens[masked.mask].tolist()
    assert ids.pop() == 2
    assert tokenizer.decode(ids) == answer
    assert whole.mask.tolist() == [False] + [True] * (len(whole.tokens) - 1)


def test_every_assistant_turn_counts_and_no_begin_token_does(
    tmp_path: Path, tokenizer: CheckedTokenizer
) -> None:
    roles = ("system", "user", "assistant", "user", "assistant")
    said = ("be brief", "what?", "a layer", "why?", "the weights")
    row = {"messages": [{"role": r, "content": c} for r, c in zip(roles, said, strict=True)]}
    (example,) = read(tmp_path, tokenizer, row, mask_prompt=True).examples
    first = "[INST] <<SYS>>\nbe brief\n<</SYS>>\n\nwhat? [/INST] a layer"
    second = "[INST] why? [/INST] the weights"
    assert example.tokens.tolist() == tokenizer.encode(first, eos=True) + tokenizer.encode(second, eos=True)
    assert counted(example, tokenizer) == " a layer<EOS> the weights<EOS>"
    (whole,) = read(tmp_path, tokenizer, row).examples
    assert whole.mask.tolist() == (whole.tokens != tokenizer.bos).tolist()
    assert (whole.tokens == tokenizer.bos).sum() == 2


@pytest.mark.parametrize("roles", [("assistant",), ("user", "user"), ("system",), ("a", "b")])
def test_messages_that_make_no_turns_are_refused(
    tmp_path: Path, tokenizer: CheckedTokenizer, roles: tuple[str, ...]
) -> None:
    row = {"messages": [{"role": role, "content": "x"} for role in roles]}
    with pytest.raises(DataError, match=r"train.jsonl:2: messages must alternate user, assistant"):
        read(tmp_path, tokenizer, {"text": "a"}, row)


def test_a_conversation_without_a_last_answer_is_refused(tmp_path: Path, tokenizer: CheckedTokenizer) -> None:
    row = {"messages": [{"role": role, "content": "x"} for role in ("user", "assistant", "user")]}
    with pytest.raises(DataError, match=r"train.jsonl:2: messages must end with an answer of the assistant"):
        read(tmp_path, tokenizer, {"text": "a"}, row)


class NoBegin:
    """Words with ids of their own, no begin id, and two ids that end a text."""

    words = ("a", "b", "c", "user:", "</s>", "<end>")
    vocab_size, bos, stops, fingerprint = 6, None, frozenset([4, 5]), "words"

    def encode(self, text: str, *, bos: bool = True, eos: bool = False) -> list[int]:
        return [self.words.index(word) for word in text.split()] + [4] * eos

    def decode(self, ids: Iterable[int]) -> str:
        return " ".join(self.words[i] for i in ids if i not in self.stops)

    def stream(self, ids: Iterable[int], every: int = 1) -> Iterable[str]:
        return map(self.decode, ([i] for i in ids))

    def render(self, messages: Any) -> list[Piece]:
        said = [(m["role"] == "assistant", tuple(self.encode(m["content"]))) for m in messages]
        return [Piece((*ids, 5), True) if answer else Piece((3, *ids), False) for answer, ids in said]


@pytest.fixture
def no_begin(tokenizer: CheckedTokenizer) -> CheckedTokenizer:
    return CheckedTokenizer(tokenizer.component, {}, NoBegin())


def test_without_a_begin_id_the_first_token_is_foretold_by_nothing(
    tmp_path: Path, no_begin: CheckedTokenizer
) -> None:
    rows = {"text": "a b"}, {"prompt": "a", "completion": " b c"}, {"text": ""}
    examples = read(tmp_path, no_begin, *rows)
    assert [e.tokens.tolist() for e in examples.examples] == [[0, 1, 4], [0, 1, 2, 4]]
    assert [e.mask.tolist() for e in examples.examples] == [[False, True, True], [False, True, True, True]]
    assert examples.empty == 1


def test_a_conversation_counts_as_its_pieces_say(tmp_path: Path, no_begin: CheckedTokenizer) -> None:
    roles = ("user", "assistant", "user", "assistant")
    row = {"messages": [{"role": r, "content": c} for r, c in zip(roles, ("a", "b", "a", "c"), strict=True)]}
    (masked,) = read(tmp_path, no_begin, row, mask_prompt=True).examples
    assert masked.tokens.tolist() == [3, 0, 1, 5, 3, 0, 2, 5]
    assert masked.mask.tolist() == [False, False, True, True, False, False, True, True]
    (whole,) = read(tmp_path, no_begin, row).examples
    assert whole.mask.tolist() == [False] + [True] * 7


def test_long_rows_are_cut_and_counted(tmp_path: Path, tokenizer: CheckedTokenizer) -> None:
    long = "the weights " * 30
    length = len(tokenizer.encode(long, eos=True))
    examples = read(tmp_path, tokenizer, {"text": long}, {"text": "x"}, max_seq_length=10)
    assert (examples.cut, examples.cut_tokens, examples.empty) == (1, length - 10, 0)
    assert length in examples.lengths and len(examples.lengths) == len(examples)
    assert examples.examples[0].tokens.tolist() == tokenizer.encode(long)[:10]
    assert examples.tokens == 10 + len(examples.examples[1].tokens)
    exact = read(tmp_path, tokenizer, {"text": long}, max_seq_length=length)
    assert (exact.cut, exact.cut_tokens) == (0, 0)


def test_a_row_whose_answer_is_cut_away_is_left_out_and_counted(
    tmp_path: Path, tokenizer: CheckedTokenizer
) -> None:
    row = {"prompt": "the weights " * 30, "completion": "x"}
    examples = read(tmp_path, tokenizer, row, {"prompt": "a", "completion": "b"}, max_seq_length=10)
    assert len(examples) == 2
    masked = {"max_seq_length": 10, "mask_prompt": True}
    examples = read(tmp_path, tokenizer, row, {"prompt": "a", "completion": "b"}, **masked)
    assert (len(examples), examples.empty, examples.cut) == (1, 1, 1)
    with pytest.raises(DataError, match=r"train.jsonl: none of 1 rows has a token that counts"):
        read(tmp_path, tokenizer, row, **masked)


def test_rows_that_say_nothing_are_left_out_and_counted(tmp_path: Path, tokenizer: CheckedTokenizer) -> None:
    examples = read(tmp_path, tokenizer, {"text": ""}, {"text": "x"}, {"prompt": "", "completion": ""})
    assert (len(examples), examples.empty) == (1, 2)
    with pytest.raises(DataError, match="none of 1 rows"):
        read(tmp_path, tokenizer, {"text": ""})


def test_text_rows_have_no_prompt_to_mask(tmp_path: Path, tokenizer: CheckedTokenizer) -> None:
    rows = {"prompt": "a", "completion": "b"}, {"text": "x"}
    with pytest.raises(DataError, match=r"train.jsonl:2: a \{text\} row has no prompt to mask. Fix: leave"):
        read(tmp_path, tokenizer, *rows, mask_prompt=True)
    assert len(read(tmp_path, tokenizer, *rows)) == 2


# --- what is told of rows -------------------------------------------------------


def chat(*contents: str) -> dict[str, Any]:
    roles = ("user", "assistant") * len(contents)
    return {"messages": [{"role": role, "content": c} for role, c in zip(roles, contents, strict=False)]}


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"text": "<s>the</s>"}, ["with </s>, <s> as text: letters"]),
        ({"prompt": "a", "completion": " b<|eot_id|>"}, ["with <|eot_id|> as text"]),
        (chat("[INST] a", "b"), ["with [INST] as text"]),
        ({"text": " \n"}, ["of nothing but white space"]),
        ({"prompt": "a", "completion": ""}, ["with an answer without content"]),
        (chat("a", ""), ["with an answer without content"]),
        (chat("a", "b", "", "c"), ["with a question without content"]),
        (chat(" a", "b"), ["with white space at the ends of messages, which is kept"]),
        ({"text": "a \u2581 b"}, ["with characters that the tokenizer lacks or changes"]),
        (chat("a\u2581", "b"), ["with characters that the tokenizer lacks or changes"]),
        ({"prompt": "A: ", "completion": "the weights"}, ["would join in one token"]),
        ({"prompt": "A:", "completion": " the weights"}, []),
        ({"prompt": "", "completion": "a"}, []),
        ({"text": "the weights"}, []),
    ],
)
def test_what_a_row_does_not_say_is_told(
    tmp_path: Path, tokenizer: CheckedTokenizer, row: dict[str, Any], says: list[str]
) -> None:
    examples = read(tmp_path, tokenizer, {"text": "x"}, row, row)
    words = list(examples.words("train"))
    if "messages" in row:
        assert words.pop() == "2 train rows of messages in the form of Llama 2"
    assert len(words) == len(says)
    for word, part in zip(words, says, strict=True):
        assert part in word and "2 train rows " in word and "(the first: " in word and "jsonl:2)" in word


def test_a_row_that_is_left_out_is_told_once(tmp_path: Path, tokenizer: CheckedTokenizer) -> None:
    examples = read(tmp_path, tokenizer, {"text": ""}, {"text": "x"})
    assert list(examples.words("train")) == [
        "warning: 1 train rows have no token that counts and were left out"
    ]


class OtherForm(NoBegin):
    """A form that is asked otherwise than it is trained, and is not made for the vocabulary."""

    chat_form, chat_warning = "a form", "the vocabulary has <x> for another form"

    def render(self, messages: Any) -> list[Piece]:
        pieces = super().render(messages)
        return pieces if pieces[-1].answer else [*pieces, Piece((3,), False)]


def test_a_form_that_is_asked_otherwise_is_told(tmp_path: Path, tokenizer: CheckedTokenizer) -> None:
    other = CheckedTokenizer(tokenizer.component, {}, OtherForm())
    words = list(read(tmp_path, other, chat("a", "b"), {"text": "a"}).words("valid"))
    assert len(words) == 2
    assert words[0].startswith("warning: 1 valid row with another beginning than when they are asked")
    assert words[1] == (
        "warning: 1 valid row of messages in a form, though the vocabulary has <x> for another form"
    )


def test_a_character_without_a_token_is_told(tmp_path: Path, no_begin: CheckedTokenizer) -> None:
    """Also one that a tokenizer of somebody else replaces in silence."""

    class Replaces(NoBegin):
        def encode(self, text: str, *, bos: bool = True, eos: bool = False) -> list[int]:
            return super().encode(" ".join(w if w in self.words else "c" for w in text.split()), eos=eos)

    replacing = CheckedTokenizer(no_begin.component, {}, Replaces())
    (line,) = read(tmp_path, replacing, {"text": "a b"}, {"text": "a z"}).words("train")
    assert line.startswith("warning: 1 train row with characters that the tokenizer lacks or changes")
