"""A chat template: the text of a conversation, and which parts of it the assistant says."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date as Date
from functools import cached_property
from typing import TYPE_CHECKING, Any

from mlxlora_core.chat.beginnings import KnownBeginnings
from mlxlora_core.chat.turn_ends import find_turn_ends, find_warning
from mlxlora_core.chat.turns import Turn, find_turns
from mlxlora_core.errors import DataError, ModelError

if TYPE_CHECKING:
    from mlxlora_core.chat.program import Program

Messages = Sequence[Mapping[str, Any]]

#: The date that every template is told, whenever it runs: a training that is resumed on another day, and
#: a model that is asked on another day, get the ids that the training began with.
DATE = Date(2024, 7, 26)

MOST_CHARACTERS = 1 << 16  # of a template

_REASONING = ("reasoning_content", "thinking", "reasoning")  # what the text before an answer is called
_VERSION = 1  # of how a conversation becomes text


@dataclass(frozen=True)
class ChatTemplate:
    """A program in Jinja that writes conversations as a model was tuned with.

    It is run as transformers runs it, in a sandbox: what it reads is the conversation alone,
    and how much it may loop and write is bounded.

    Attributes:
        source: of the template.
        specials: ``bos_token``, ``eos_token`` and so on -> text.
        date: what ``strftime_now`` tells.
        tools_source: of the template for conversations with tools, where there is one of its own.
        where: the file that it stands in, for messages.
    """

    source: str
    specials: Mapping[str, str] = field(default_factory=dict)
    date: Date = DATE
    tools_source: str = ""
    where: str = "chat_template.jinja"

    def render(
        self, messages: Messages, tools: Sequence[Any] = (), add_generation_prompt: bool = False, **more: Any
    ) -> str:
        """The text of a conversation.

        Args:
            messages: ``{"role": ..., "content": ...}`` and what else the template reads.
            tools: JSON schemas of functions that the assistant may call.
            add_generation_prompt: whether the beginning of an answer stands behind.
            more: further variables of the template, such as ``enable_thinking``.

        Raises:
            DataError: the template refuses the conversation, or fails on it.
            ModelError: it is no template.
            SafetyError: it reaches for what it must not, or wants to loop or write without end.
        """
        return self.marked(messages, tools, add_generation_prompt, ("", ""), **more)

    def marked(
        self,
        messages: Messages,
        tools: Sequence[Any],
        add_generation_prompt: bool,
        marks: tuple[str, str],
        **more: Any,
    ) -> str:
        """As :meth:`render`, with marks before and behind what ``{% generation %}`` holds."""
        values = {
            **self.specials,
            **{name: _plain(value) for name, value in more.items()},
            "messages": [_message(message) for message in messages],
            "tools": _plain(tools) if tools else None,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        return self._program(bool(tools)).run(values, marks)

    def turns(
        self,
        messages: Messages,
        tools: Sequence[Any] = (),
        is_special: Callable[[str], bool] | None = None,
    ) -> list[Turn]:
        """The text of a conversation in parts, of which each is the assistant's or is not.

        Joined they are the rendering up to the end of the last answer, or where the conversation
        waits for one, up to where it begins. What the assistant says goes up to the token that
        ends its turn, that included.

        Args:
            messages: as of :meth:`render`.
            tools: as of :meth:`render`.
            is_special: whether a text is one token of the tokenizer that is no ordinary text; by
                its shape (``<|im_end|>``, ``[/INST]``) where it is None.

        Raises:
            DataError: as :meth:`render`, or it cannot be told for certain which part the assistant says.
            ModelError: it is no template.
            SafetyError: as :meth:`render`.
        """
        return find_turns(self, messages, tools, self.turn_ends(is_special), self._known)

    def turn_ends(self, is_special: Callable[[str], bool] | None = None) -> tuple[str, ...]:
        """The texts by which the template ends a turn of the assistant; none where it writes no such token.

        There are two where the last turn of a conversation ends in another way than those before it.

        Args:
            is_special: as of :meth:`turns`.

        Raises:
            ModelError: it is no template.
            SafetyError: as :meth:`render`.
        """
        if is_special not in self._ends:
            self._ends[is_special] = find_turn_ends(self, is_special)
        return self._ends[is_special]

    def warning(self, is_special: Callable[[str], bool] | None = None) -> str:
        """What speaks against training on conversations of this template, or nothing.

        Args:
            is_special: as of :meth:`turns`.
        """
        return find_warning(self, self.turn_ends(is_special))

    @cached_property
    def _ends(self) -> dict[Callable[[str], bool] | None, tuple[str, ...]]:
        return {}

    @cached_property
    def _known(self) -> KnownBeginnings:
        return KnownBeginnings()

    @cached_property
    def fingerprint(self) -> str:
        """A hash of all that decides which text a conversation becomes."""
        parts = [
            _VERSION,
            self.source,
            self.tools_source,
            sorted(self.specials.items()),
            self.date.isoformat(),
        ]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    @cached_property
    def has_generation(self) -> bool:
        """Whether the template marks itself what the assistant says."""
        return "endgeneration" in self.source + self.tools_source

    def _program(self, with_tools: bool) -> Program:
        return self._programs(self.tools_source if with_tools and self.tools_source else self.source)

    @cached_property
    def _programs(self) -> Callable[[str], Program]:
        from mlxlora_core.chat.program import Program

        made: dict[str, Program] = {}

        def program(source: str) -> Program:
            if source not in made:
                if len(source) > MOST_CHARACTERS:
                    what = f"the chat template has more than {MOST_CHARACTERS} characters"
                    raise ModelError(what, where=self.where)
                made[source] = Program(source, self.date, self.where)
            return made[source]

        return program


def _message(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message as templates expect it: nothing in it is null, and reasoning has the names that they read."""
    said = {str(key): _plain(value) for key, value in message.items() if value is not None}
    reasoning = next((said[key] for key in _REASONING if key in said), None)
    return said if reasoning is None else {"thinking": reasoning, **said, "reasoning_content": reasoning}


def _plain(value: Any) -> Any:
    """A value of JSON alone, which has no methods that a template could misuse.

    Raises:
        DataError: it is another one.
    """
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    raise DataError(f"a conversation holds {type(value).__name__}, wanted what JSON can say")
