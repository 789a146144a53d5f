"""Where the chat template of a model is found among the files of its tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mlxlora_core.chat import find_template
from mlxlora_core.errors import ModelError

MESSAGES = [{"role": "user", "content": "hi"}]


def files(folder: Path, **contents: Any) -> dict[str, Path]:
    """Files by name, an underscore for the dot: a text as it is, anything else as JSON."""
    found = {}
    for name, content in contents.items():
        path = folder / ".".join(name.rsplit("__", 1))
        path.write_text(content if isinstance(content, str) else json.dumps(content), "utf-8")
        found[path.name] = path
    return found


def test_there_may_be_none(tmp_path: Path) -> None:
    assert find_template({}) is None
    assert find_template(files(tmp_path, tokenizer_config__json={"bos_token": "<s>"})) is None
    assert find_template(files(tmp_path, tokenizer_config__json={"chat_template": None})) is None


def test_the_first_place_that_has_one_counts(tmp_path: Path) -> None:
    every = files(
        tmp_path,
        chat_template__jinja="one",
        tokenizer_config__json={"chat_template": "two"},
        chat_template__json={"chat_template": "three"},
    )
    for text, gone in (("one", "chat_template.jinja"), ("two", "tokenizer_config.json"), ("three", "")):
        template = find_template(every)
        assert template is not None
        assert template.render(MESSAGES) == text
        every.pop(gone, None)


def test_files_may_be_inside_another_file() -> None:
    held = {
        "tokenizer_config.json": json.dumps({"chat_template": "{{ bos_token }}", "bos_token": "<s>"}).encode()
    }
    template = find_template(held)
    assert template is not None
    assert (template.render(MESSAGES), template.where) == ("<s>", "tokenizer_config.json")


def test_templates_have_names(tmp_path: Path) -> None:
    named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tools"}]
    template = find_template(files(tmp_path, tokenizer_config__json={"chat_template": named}))
    assert template is not None
    assert (template.render(MESSAGES), template.render(MESSAGES, [{}])) == ("plain", "tools")
    one = find_template(
        files(tmp_path, tokenizer_config__json={"chat_template": [{**named[1], "name": "own"}]})
    )
    assert one is not None and one.render(MESSAGES) == "tools"
    both = [{**named[0], "name": "rag"}, named[1]]
    with pytest.raises(ModelError, match="has the chat templates rag, tool_use, and none is named default"):
        find_template(files(tmp_path, tokenizer_config__json={"chat_template": both}))


def test_special_tokens_are_told_by_name(tmp_path: Path) -> None:
    config = {
        "bos_token": {"content": "<s>", "lstrip": False},
        "eos_token": None,
        "add_bos_token": True,
        "extra_special_tokens": {"image_token": "<image>", "count": 1},
        "chat_template": "{{ bos_token }}{{ eos_token }}{{ unk_token }}{{ image_token }}{{ add_bos_token }}",
    }
    old = {"eos_token": "</s>", "unk_token": {"content": "<unk>"}, "bos_token": "<old>"}
    template = find_template(files(tmp_path, tokenizer_config__json=config, special_tokens_map__json=old))
    assert template is not None
    assert template.render(MESSAGES) == "<s></s><unk><image>"


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("tokenizer_config__json", "{", "tokenizer_config.json:1:2: is no JSON"),
        ("tokenizer_config__json", [], "tokenizer_config.json: holds no JSON object"),
        (
            "tokenizer_config__json",
            {"chat_template": 5},
            "chat_template is neither a text nor a list of {name",
        ),
        ("tokenizer_config__json", {"chat_template": [{"name": "a"}]}, "chat_template is neither a text nor"),
        ("tokenizer_config__json", {"chat_template": [1]}, "chat_template is neither a text nor"),
        ("tokenizer_config__json", {"chat_template": []}, "chat_template is neither a text nor"),
        (
            "tokenizer_config__json",
            {"chat_template": [{"name": "a", "template": "x"}, {"name": "a", "template": "y"}]},
            "chat_template is neither a text nor",
        ),
        (
            "chat_template__json",
            {"chat_template": {}},
            "chat_template.json: chat_template is neither a text nor",
        ),
        ("chat_template__jinja", "", "chat_template.jinja: is empty"),
    ],
)
def test_what_is_no_template_is_told_with_its_file(
    tmp_path: Path, name: str, content: Any, told: str
) -> None:
    with pytest.raises(ModelError) as caught:
        find_template(files(tmp_path, **{name: content}))
    assert told in str(caught.value)


def test_a_template_is_utf_8(tmp_path: Path) -> None:
    path = tmp_path / "chat_template.jinja"
    path.write_bytes(b"\xef\xbb\xbfa\xc3\xa9")
    template = find_template({path.name: path})
    assert template is not None and template.render(MESSAGES) == "aé"
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ModelError, match=r"chat_template.jinja: is not UTF-8"):
        find_template({path.name: path})
