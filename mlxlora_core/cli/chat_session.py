"""A conversation on the command line: questions, commands that begin with a slash, answers as they come."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlxlora_core.cli import show
from mlxlora_core.cli.chat_lines import Lines
from mlxlora_core.cli.declare import flag_name
from mlxlora_core.cli.model import chosen_samplers, how_it_ended
from mlxlora_core.errors import MlxloraError, UsageError, listing, nearest
from mlxlora_core.files.durable import utf8, write_file
from mlxlora_core.machine.signals import Pending, noted
from mlxlora_core.options import option, parse, plain
from mlxlora_core.path_text import check_path
from mlxlora_core.plugins import Choice, Registry
from mlxlora_core.runs.samplers import SETTINGS

if TYPE_CHECKING:
    from mlxlora_core.model.conversation import Conversation
    from mlxlora_core.model.several import AdapterSet


_FULL = "the context is full: /reset begins anew, and /save FILE keeps what was said"


@dataclass(frozen=True)
class AnswerConfig:
    """How long an answer may be, and what it is drawn by."""

    num_tokens: int = option(512, help="most tokens in an answer", unit="tokens", minimum=1, letter="n")
    seed: int = option(0, help="random seed", minimum=0, maximum=2**32 - 1)


@dataclass(frozen=True)
class Manner:
    """How answers are drawn.

    Attributes:
        registry: where samplers are looked up.
        named: what ``--sampler`` names, if it is given.
        sets: what ``--set sampler.KEY=`` was given.
        settings: ``temp``, those of :data:`~mlxlora_core.runs.samplers.SETTINGS` and those of
            :class:`AnswerConfig` that were set.
        stop: texts before which an answer ends.
    """

    registry: Registry
    named: str | None
    sets: Mapping[str, Any]
    settings: Mapping[str, Any]
    stop: Sequence[str]

    @property
    def samplers(self) -> tuple[Choice, ...]:
        """The samplers.

        Raises:
            UsageError: a setting that makes no sense.
        """
        return chosen_samplers(self.registry, self.named, self.settings.get("temp"), self.sets, self.settings)

    @property
    def config(self) -> AnswerConfig:
        """How long an answer may be, and its seed.

        Raises:
            UsageError: a setting out of range.
        """
        known = {field: self.settings[field] for field in ("num_tokens", "seed") if field in self.settings}
        return parse(AnswerConfig, known, owner="chat", spell=flag_name)

    @property
    def words(self) -> str:
        """All of it, in words."""
        chain = [
            " ".join(
                [c.component.spec.name, *(f"{k}={v}" for k, v in plain(c.options).items() if v is not None)]
            )
            for c in self.samplers
        ]
        return f"{', '.join(chain)}; num-tokens {self.config.num_tokens}, seed {self.config.seed}"

    def with_setting(self, name: str, value: str) -> Manner:
        """The same, one setting changed.

        Raises:
            UsageError: no such setting, or a value that it cannot have.
        """
        known = ["temp", *SETTINGS, "num_tokens", "seed"]
        key = name.removeprefix("--").replace("-", "_")
        if key not in known:
            there_is = f"{nearest(key, known)}there is {listing(k.replace('_', '-') for k in known)}"
            raise UsageError(f"there is no setting {name!r} ({there_is})")
        changed = replace(self, settings={**self.settings, key: value})
        _ = changed.samplers, changed.config
        return changed


class Session:
    """What goes on between somebody and a model.

    Args:
        adapters: on the model.
        adapter: the name of that which answers first, or None.
        system: message in front, or nothing.
        manner: how answers are drawn.
        compare: whether the base answers each question, too.
    """

    def __init__(
        self, adapters: AdapterSet, adapter: str | None, system: str, manner: Manner, *, compare: bool
    ) -> None:
        from mlxlora_core.model.conversation import Conversation

        self._adapters, self._manner = adapters, manner
        names = [None, adapter] if compare else [adapter]
        self._conversations = [Conversation(adapters, name, system) for name in names]
        self._saved: set[Path] = set()
        self._commands: dict[str, tuple[str, str, Callable[[str], None]]] = {
            "adapter": ("/adapter NAME", "let this adapter answer; without a name, list them", self._adapter),
            "base": ("/base", "let the base answer, without an adapter", self._base),
            "system": ("/system TEXT", "put this message in front; without a text, none", self._system),
            "set": (
                "/set KEY VALUE",
                "change how answers are drawn: /set temp 0.2; alone, list it",
                self._set,
            ),
            "reset": ("/reset", "begin anew", self._reset),
            "save": ("/save FILE", "write what was said as a row to train on", self._save),
            "help": ("/help", "show this", self._help),
            "quit": ("/quit", "end, as Ctrl-D does", lambda _: None),
        }

    def words(self) -> list[str]:
        """What a line that begins with a slash may be."""
        return [*(f"/{name}" for name in self._commands), *(f"/adapter {n}" for n in self._adapters.adapted)]

    def run(self, lines: Lines) -> None:
        """Answer until there is no question any more.

        Raises:
            MlxloraError: a fault in what comes out of a pipe; on a terminal it is told, and it goes on.
        """
        if not lines.is_terminal:
            self._each(lines, Pending())
            return
        show.progress("/help lists commands; Ctrl-C stops an answer, Ctrl-D ends")
        with noted() as pending:
            self._each(lines, pending)

    def _each(self, lines: Lines, pending: Pending) -> None:
        stopped = False  # by the Ctrl-C before
        while True:
            try:
                if pending.signum is not None:  # it came before there was a prompt
                    raise KeyboardInterrupt
                line = lines.read(self._prompt()).strip()
                if line == "/quit":
                    return
                self._take(line, pending)
            except EOFError:
                return
            except KeyboardInterrupt:
                if stopped:
                    return
                stopped, pending.signum = True, None
                show.progress("Ctrl-C again, or Ctrl-D, ends")
                continue
            except MlxloraError as fault:
                if not lines.is_terminal:
                    raise
                show.progress(str(fault))
            stopped, pending.signum = pending.signum is not None, None

    def _prompt(self) -> str:
        return f"{self._called(self._conversations[-1])}> " if self._adapters.adapted else "> "

    @staticmethod
    def _called(conversation: Conversation) -> str:
        return conversation.adapter or "base"

    def _take(self, line: str, pending: Pending) -> None:
        """Answer a question, or do what a command says; two slashes begin a question with one."""
        if line.startswith("/") and not line.startswith("//"):
            name, _, rest = line[1:].partition(" ")
            if name not in self._commands:
                known = list(self._commands)
                raise UsageError(f"there is no command /{name} ({nearest(name, known)}/help lists them)")
            self._commands[name][2](rest.strip())
        elif line:
            for conversation in self._conversations:
                if pending.signum is None:
                    self._answer(conversation, line.removeprefix("/"), pending)

    def _answer(self, conversation: Conversation, question: str, pending: Pending) -> None:
        """Show an answer as it comes, and what it took."""
        from mlxlora_core.model.generate import CONTEXT, PromptTooLong

        if len(self._conversations) > 1:
            show.result(f"{self._called(conversation)}:")
        config, manner = self._manner.config, self._manner
        segments = conversation.ask(
            question,
            [(choice.component, choice.options) for choice in manner.samplers],
            num_tokens=config.num_tokens,
            seed=config.seed,
            stop=manner.stop,
        )
        said, last = "", None
        try:
            with closing(segments):
                for segment in segments:
                    said, last = said + segment.text, segment
                    show.result(segment.text, end="")
                    if pending.signum is not None:
                        break
        except PromptTooLong as fault:
            fault.fix = _FULL
            raise
        finally:
            if said and not said.endswith("\n"):
                show.result()
        if last is None or last.spent is None:
            show.progress("stopped")
            return
        show.progress(how_it_ended(last, self._adapters.model.language_model.context_tokens))
        if last.finish == CONTEXT:
            show.progress(_FULL)

    # --- commands -------------------------------------------------------------

    def _adapter(self, name: str) -> None:
        if not name:
            show.progress(f"adapters: {listing(self._adapters.adapted)}")
            return
        self._adapters.select(name)
        self._conversations[-1].adapter = name

    def _base(self, _: str) -> None:
        if len(self._conversations) > 1:
            raise UsageError("the base answers already, beside the adapter")
        self._conversations[-1].adapter = None

    def _system(self, text: str) -> None:
        for conversation in self._conversations:
            conversation.system = text

    def _set(self, rest: str) -> None:
        name, _, value = rest.partition(" ")
        if name:
            self._manner = self._manner.with_setting(name, value.strip())
        else:
            show.progress(self._manner.words)

    def _reset(self, _: str) -> None:
        for conversation in self._conversations:
            conversation.forget()

    def _save(self, name: str) -> None:
        path, talks = _checked(name), [each.messages for each in self._conversations if each.turns]
        if not talks:
            raise UsageError("nothing has been said that could be saved")
        if path not in self._saved and path.exists():
            raise UsageError(f"{path} is there already", fix="give another name")
        rows = (json.dumps({"messages": talk}, ensure_ascii=False) + "\n" for talk in talks)
        write_file(path, utf8("".join(rows)))
        self._saved.add(path)
        show.progress(f"written: {path}")

    def _help(self, _: str) -> None:
        for usage, meaning, _call in self._commands.values():
            show.progress(f"{usage:<16} {meaning}")
        show.progress("Alt-Enter begins a new line; a question that begins with // is asked with one /")


def _checked(name: str) -> Path:
    """The file that a conversation is to be written to.

    Raises:
        UsageError: no name, or one that no file can have.
    """
    if not name:
        raise UsageError("/save needs the name of a file", fix="/save conversation.jsonl")
    try:
        check_path(name)
        return Path(name).expanduser().absolute()
    except (ValueError, RuntimeError) as fault:
        raise UsageError(f"{name!r} is no name of a file: {fault}") from fault
