"""Conversations in the form of Llama 2."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mlxlora_core.errors import DataError, listing


def turns(messages: Sequence[Mapping[str, str]]) -> list[tuple[str, str]]:
    """(prompt, answer) of each turn of a conversation, in the Llama 2 instruction format."""
    rest = list(messages)
    system = rest.pop(0)["content"] if rest and rest[0]["role"] == "system" else ""
    roles = [message["role"] for message in rest]
    if not rest or roles != ["user", "assistant"] * (len(rest) // 2):
        raise DataError(
            f"messages must alternate user, assistant after an optional system, got {listing(roles)}"
        )
    turns: list[tuple[str, str]] = []
    for user, assistant in zip(rest[::2], rest[1::2], strict=True):
        text = (
            f"<<SYS>>\n{system}\n<</SYS>>\n\n{user['content']}" if system and not turns else user["content"]
        )
        turns.append((f"[INST] {text} [/INST]", f" {assistant['content']}"))
    return turns
