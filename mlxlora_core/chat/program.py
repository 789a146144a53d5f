"""A template compiled, and run on values; whatever goes wrong is told in one line."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from datetime import date
from types import TracebackType
from typing import Any

from jinja2 import Template
from jinja2.exceptions import SecurityError, TemplateSyntaxError

from mlxlora_core.chat.allowance import units_of
from mlxlora_core.chat.sandbox import RefusedByTemplate, Sandbox
from mlxlora_core.errors import DataError, ModelError, SafetyError, short

_TOLD = 300  # characters of what a template says

ANOTHER = "use another chat template: put a chat_template.jinja beside the model's tokenizer"


class Program:
    """A template that can be run.

    Args:
        source: of the template.
        today: the date that it is told.
        where: the file that it stands in, for messages.

    Raises:
        ModelError: it is no template.
        SafetyError: it is too deep or too large to be compiled.
    """

    def __init__(self, source: str, today: date, where: str) -> None:
        self._where, self._lock = where, threading.Lock()
        self._sandbox = Sandbox(today)
        try:
            self._template: Template = self._sandbox.from_string(source)
        except TemplateSyntaxError as fault:
            place = f"{where}:{fault.lineno}"
            what = f"the chat template cannot be read: {short(fault.message or '', _TOLD)}"
            raise ModelError(what, where=place, fix=ANOTHER) from None
        except (RecursionError, MemoryError, SyntaxError) as fault:
            # Python's own compiler has limits that it reports as faults of the syntax.
            what = f"the chat template is nested too deeply ({type(fault).__name__})"
            raise SafetyError(what, where=where, fix=ANOTHER) from None
        except (ValueError, OverflowError, UnicodeError) as fault:
            what = f"the chat template cannot be read: {short(fault, _TOLD)}"
            raise ModelError(what, where=where, fix=ANOTHER) from None

    def run(self, values: Mapping[str, Any], marks: tuple[str, str] = ("", "")) -> str:
        """The text that the template makes of values.

        Args:
            values: name -> value of JSON.
            marks: put before and behind what ``{% generation %}`` holds.

        Raises:
            DataError: the template refuses these values, or fails on them.
            SafetyError: it wants more than templates are allowed.
        """
        with self._lock:
            self._sandbox.marks = marks
            self._sandbox.allow(units_of(values))
            try:
                text = "".join(self._template.root_render_func(self._template.new_context(dict(values))))
            except RefusedByTemplate as fault:
                what = f"the chat template refuses the conversation: {short(fault.message or '', _TOLD)}"
                raise DataError(what, where=self._place(fault.__traceback__)) from None
            except SecurityError as fault:
                what = f"the chat template was stopped: {short(fault.message or '', _TOLD)}"
                raise SafetyError(what, where=self._place(fault.__traceback__), fix=ANOTHER) from None
            except (RecursionError, MemoryError) as fault:
                what = f"the chat template was stopped: it goes too deep ({type(fault).__name__})"
                raise SafetyError(what, where=self._where, fix=ANOTHER) from None
            except Exception as fault:  # a template can raise whatever Python can
                what = f"the chat template fails on the conversation: {short(fault, _TOLD)}"
                raise DataError(what, where=self._place(fault.__traceback__)) from None
        return text

    def _place(self, trace: TracebackType | None) -> str:
        """The file and the line of the template that a traceback leads to."""
        lines = [
            self._template.get_corresponding_lineno(step.tb_lineno)
            for step in _steps(trace)
            if step.tb_frame.f_code.co_filename == self._template.filename or _is_template(step)
        ]
        return f"{self._where}:{lines[-1]}" if lines else self._where


def _steps(trace: TracebackType | None) -> Iterator[TracebackType]:
    while trace:
        yield trace
        trace = trace.tb_next


def _is_template(step: TracebackType) -> bool:
    return step.tb_frame.f_code.co_filename == "<template>"
