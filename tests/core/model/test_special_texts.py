from __future__ import annotations

import pytest

from mlxlora_core.model.special_texts import special_texts
from mlxlora_core.testing.tokenizer import SPECIAL_TEXTS

MORE = (
    "<|eot_id|>",
    "<|start_header_id|>",
    "<\uff5cUser\uff5c>",
    "<\uff5cbegin\u2581of\u2581sentence\uff5c>",
)
FORMS = (
    "[/INST]",
    "<<SYS>>",
    "<</SYS>>",
    "[SYSTEM_PROMPT]",
    "[TOOL_CALLS]",
    "<fim_prefix>",
    "<PRE>",
    "<end_of_turn>",
)


@pytest.mark.parametrize("special", [*SPECIAL_TEXTS, *MORE, *FORMS])
@pytest.mark.parametrize("around", ["{}", "a{}b", "a {}\n", "<{}>", "[{}] {}"])
def test_what_begins_and_ends_texts_and_turns_is_found_wherever_it_stands(special: str, around: str) -> None:
    assert special in special_texts(around.replace("{}", special))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a < b > c",
        "[1] and [link](x)",
        "<b>bold</b> <br/>",
        "array[0]",
        "<|>",
        "< s >",
        "List<String>",
        "x<|y|",
    ],
)
def test_ordinary_text_is_left_alone(text: str) -> None:
    assert not special_texts(text)


def test_a_tokenizer_has_names_of_its_own() -> None:
    assert special_texts("a <unused7> [control_9] <other>", {"<unused7>", "[control_9]"}) == {
        "<unused7>",
        "[control_9]",
    }


def test_no_control_character_is_ever_taken_for_a_name() -> None:
    assert not special_texts("<|\x1b]0;evil\x07|> <|a\x00|>")


def test_a_text_of_brackets_is_read_in_one_pass() -> None:
    assert not special_texts("<" * 200_000 + "[" * 200_000 + "<a" * 100_000)
