"""A program of one's own scores answers: JSON on its stdin, a number on its stdout, once for each answer."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

from mlxlora_core.api import Answer, DataError, UsageError
from mlxlora_core.files import content_digest
from mlxlora_evaluators import ProgramOptions


def score(answer: Answer, options: ProgramOptions) -> float:
    """What the program prints for an answer.

    It gets ``{"prompt": …, "expected": …, "text": …, "ended": …, "row": {…}}``. It is a process
    group of its own, which ends with it: what it has started is not left behind.

    Raises:
        UsageError: it cannot be started, takes too long, fails, or prints no number from 0 to 1.
    """
    words = words_of(options.program)
    line = json.dumps(asdict(answer) | {"row": dict(answer.row)}) + "\n"
    try:
        process = subprocess.Popen(
            words,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            errors="replace",
            start_new_session=True,
        )
    except OSError as fault:
        raise UsageError(f"the program {words[0]!r} cannot be started: {fault.strerror}") from fault
    with process:
        try:
            out, err = process.communicate(line, options.seconds)
        except subprocess.TimeoutExpired as fault:
            raise UsageError(
                f"the program {words[0]!r} took more than {options.seconds:g} s for an answer",
                fix="--set evaluator.seconds=…",
            ) from fault
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    if process.returncode:
        last = (err.strip().splitlines() or ["without a word"])[-1]
        raise UsageError(f"the program {words[0]!r} ended with {process.returncode}: {last}")
    return _number(words[0], out)


def words_of(program: str) -> list[str]:
    """The words of a command line, the first of which is a program that is there.

    Raises:
        UsageError: they are none, or it is not.
    """
    try:
        words = shlex.split(program)
    except ValueError as fault:
        raise UsageError(f"the program {program!r} is no command line: {fault}") from fault
    if not words:
        raise UsageError(
            "the evaluator command has no program", fix="--set evaluator.program='PROGRAM WORDS'"
        )
    if shutil.which(words[0]) is None:
        raise UsageError(f"the program {words[0]!r} of the evaluator command is not there, or cannot be run")
    return words


def inputs(program: str) -> dict[str, str]:
    """file -> digest of its bytes, of the program and of every file among its words.

    Raises:
        UsageError: as :func:`words_of`.
        DataError: one of them cannot be read.
    """
    first, *others = words_of(program)
    files = [shutil.which(first) or first, *(word for word in others if os.path.isfile(word))]
    return {file: content_digest(Path(file), DataError) for file in files}


def _number(program: str, printed: str) -> float:
    try:
        number = float(printed)
    except ValueError:
        number = -1.0
    if not 0 <= number <= 1:
        raise UsageError(
            f"the program {program!r} printed {printed.strip()[:80]!r}, wanted a number from 0 to 1"
        )
    return number
