"""Rows of messages that a chat template writes: what is trained, what is asked, and what is told of them."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from mlxlora_core.chat import Behind, ChatTemplate, Renderer, SpecialTexts, SpecialToken
from mlxlora_core.errors import DataError
from mlxlora_core.files.rows import read_rows
from mlxlora_core.model.prompts import prompt_ids
from mlxlora_core.model.tokenizers import CheckedTokenizer
from mlxlora_core.plugins import Component
from mlxlora_core.training.examples import Examples, make_examples
from mlxlora_core.values import Piece

CHATML = (
    "{% if tools %}<|im_start|>tools\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | trim if m.content }}"
    "{{ m.tool_calls | tojson if m.tool_calls }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# A prompt opens a thought that answers do not have.
THINKING = CHATML.replace("assistant\n{% endif %}", "assistant\n<think>{% endif %}")
SPECIAL = ("<|im_start|>", "<|im_end|>", "<think>")


class Bytes:
    """A tokenizer whose ids are bytes, with three special tokens behind them."""

    vocab_size, bos, stops, fingerprint = 259, None, frozenset([257]), "bytes"
    special_texts = frozenset(SPECIAL)

    def __init__(self, source: str) -> None:
        special = SpecialTexts(SpecialToken(256 + i, text) for i, text in enumerate(SPECIAL))
        self._renderer = Renderer(ChatTemplate(source, where="own.jinja"), special, self._part)

    def _part(self, text: str, behind: Behind) -> list[int]:
        return list(text.encode())

    def encode(self, text: str, *, bos: bool = True, eos: bool = False) -> list[int]:
        return list(text.encode()) + [257] * eos

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(i for i in ids if i < 256).decode("utf-8", "replace")

    def stream(self, ids: Iterable[int], every: int = 1) -> Iterator[str]:
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        yield from filter(None, (decoder.decode(bytes([i])) for i in ids if i < 256))

    def render(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] = ()) -> list[Piece]:
        return self._renderer.render(messages, tools)


def opened(tokenizer: CheckedTokenizer, source: str) -> CheckedTokenizer:
    component: Component = tokenizer.component
    return CheckedTokenizer(component, {}, Bytes(source))


def read(folder: Path, tokenizer: CheckedTokenizer, *rows: Mapping[str, Any], mask: bool = True) -> Examples:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    placed = ((f"{path.name}:{number}", content) for number, content in read_rows(path))
    return make_examples(placed, path, tokenizer, max_seq_length=10_000, mask_prompt=mask)


def shown(ids: Iterable[int]) -> str:
    return "".join(chr(i) if i < 256 else SPECIAL[i - 256] for i in ids)


def talk(*contents: str, **more: Any) -> dict[str, Any]:
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[i % 2], "content": c} for i, c in enumerate(contents)], **more}


def test_answers_count_up_to_the_end_of_their_turn(tmp_path: Path, tokenizer: CheckedTokenizer) -> None:
    chatml = opened(tokenizer, CHATML)
    (example,) = read(tmp_path, chatml, talk("a", "b", "c", "d")).examples
    whole = (
        "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>"
        "\n<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\nd<|im_end|>"
    )
    assert shown(example.tokens.tolist()) == whole
    assert shown(example.tokens[example.mask].tolist()) == "b<|im_end|>d<|im_end|>"
    asked = prompt_ids(chatml, talk("a", "b", "c")["messages"])
    assert asked == example.tokens.tolist()[: len(asked)]
    (example,) = read(tmp_path, chatml, talk("a", "b"), mask=False).examples
    assert example.mask.tolist() == [False] + [True] * (len(example.tokens) - 1)


def test_tools_and_their_calls_reach_the_template(tmp_path: Path, tokenizer: CheckedTokenizer) -> None:
    call = {"function": {"name": "f", "arguments": {"x": 1}}}
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "5"},
        {"role": "assistant", "content": "five"},
    ]
    examples = read(tmp_path, opened(tokenizer, CHATML), {"messages": messages, "tools": [{"name": "f"}]})
    (example,) = examples.examples
    assert shown(example.tokens.tolist()).startswith(
        '<|im_start|>tools\n[{"name": "f"}]<|im_end|>\n<|im_start|>user'
    )
    assert shown(example.tokens[example.mask].tolist()) == f"[{json.dumps(call)}]<|im_end|>five<|im_end|>"
    assert list(examples.words("train")) == []


def test_a_prompt_that_training_does_not_know_is_told(tmp_path: Path, tokenizer: CheckedTokenizer) -> None:
    examples = read(tmp_path, opened(tokenizer, THINKING), talk("a", "b"))
    (example,) = examples.examples
    assert shown(example.tokens[example.mask].tolist()) == "b<|im_end|>"
    (word,) = examples.words("train")
    assert word.startswith("warning: 1 train row with another beginning than when they are asked")


def test_white_space_that_a_template_cuts_off_is_told(tmp_path: Path, tokenizer: CheckedTokenizer) -> None:
    keeps = CHATML.replace(" | trim", "")
    told = "1 train row with white space at the ends of messages, which "
    for source, how in ((CHATML, "the form of the model cuts off"), (keeps, "is kept")):
        (word,) = read(tmp_path, opened(tokenizer, source), talk(" a", "b\n")).words("train")
        assert word == f"{told}{how} (the first: rows.jsonl:1)"


def test_what_people_say_is_no_token(tmp_path: Path, tokenizer: CheckedTokenizer) -> None:
    examples = read(tmp_path, opened(tokenizer, CHATML), talk("<|im_end|>", "x<|im_start|>"))
    ids = examples.examples[0].tokens.tolist()
    assert (ids.count(256), ids.count(257)) == (2, 2)
    (word,) = examples.words("train")
    assert "with <|im_end|>, <|im_start|> as text: letters" in word


def test_what_a_template_refuses_is_told_with_the_row(tmp_path: Path, tokenizer: CheckedTokenizer) -> None:
    source = "{% if messages | length > 2 %}{{ raise_exception('one turn only') }}{% endif %}" + CHATML
    with pytest.raises(DataError) as caught:
        read(tmp_path, opened(tokenizer, source), talk("a", "b"), talk("a", "b", "c", "d"))
    told = "rows.jsonl:2: the chat template refuses the conversation: one turn only (own.jinja:1)"
    assert told in str(caught.value)
