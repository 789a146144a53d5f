"""Conversations in the form of Llama 2."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mlxlora_core.api import DataError, listing


def turns(messages: Sequence[Mapping[str, Any]]) -> list[tuple[str, str | None]]:
    """(prompt, answer) of each turn of a conversation, in the Llama 2 instruction format.

    The last answer is None where the conversation waits for one. Texts are taken
    as they are, white space at their ends included.

    Raises:
        DataError: roles that do not alternate.
    """
    rest = list(messages)
    system = rest.pop(0)["content"] if rest and rest[0]["role"] == "system" else ""
    roles = [message["role"] for message in rest]
    if not rest or roles != (["user", "assistant"] * len(rest))[: len(rest)]:
        raise DataError(
            f"messages must alternate user, assistant after an optional system, got {listing(roles)}"
        )
    contents = [message["content"] for message in rest]
    answers = [f" {content}" for content in contents[1::2]]
    if system:
        contents[0] = f"<<SYS>>\n{system}\n<</SYS>>\n\n{contents[0]}"
    prompts = [f"[INST] {content} [/INST]" for content in contents[::2]]
    waiting: list[str | None] = [None] * (len(prompts) - len(answers))
    return list(zip(prompts, answers + waiting, strict=True))
