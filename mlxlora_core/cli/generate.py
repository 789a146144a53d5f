"""``mlxlora generate``: a prompt is continued."""

from __future__ import annotations

import os
import select
import sys
from pathlib import Path
from typing import Any

import click

from mlxlora_core.cli import declare, show
from mlxlora_core.cli.model import (
    as_spent,
    asked_adapter,
    asked_quantization,
    chosen_samplers,
    continue_prompt,
    given_text,
    load_adapted,
)
from mlxlora_core.cli.session import JSON_OPTION, SETS_OPTION, start, verb
from mlxlora_core.errors import UsageError
from mlxlora_core.model.stop_texts import checked_stops
from mlxlora_core.plugins import Registry
from mlxlora_core.runs.recipe import check_sections, overrides
from mlxlora_core.runs.samplers import check_samplers
from mlxlora_core.training.settings import GenerateConfig

PROMPT_BYTES = 16 << 20
SILENCE_SECONDS = 10  # for what comes from a stdin that does not block


@verb(
    declare.MODEL,
    declare.quantize,
    click.option("-p", "--prompt", required=True, help="Text to continue; - reads it from stdin."),
    declare.ADAPTER_FILE,
    declare.NO_ADAPTER,
    declare.ADAPTER,
    declare.BASE_MISMATCH,
    declare.TEMP,
    declare.settings,
    declare.SAMPLER,
    declare.SEED,
    declare.flags(GenerateConfig),
    declare.STOP,
    SETS_OPTION,
    JSON_OPTION,
)
def command(
    registry: Registry,
    model: str,
    prompt: str,
    adapter_file: Path | None,
    no_adapter: bool,
    adapter: str | None,
    base_mismatch: str,
    temp: str | None,
    sampler: str | None,
    seed: int,
    stop: tuple[str, ...],
    sets: tuple[str, ...],
    as_json: bool,
    **arguments: Any,
) -> None:
    """Continue a prompt.

    Only the continuation goes to stdout. It ends at an end token, before a
    --stop text, after --num-tokens tokens, or where the model's context is full.
    """
    stops = checked_stops(map(given_text, stop))
    config = declare.config_from(GenerateConfig, arguments)
    given = overrides(sets)
    any_base = base_mismatch == "allow"
    asked = asked_adapter(adapter_file, no_adapter, adapter, given.get("adapter", {}), any_base)
    check_sections(given, ("adapter", "sampler", "quantize"))
    quantization = asked_quantization(registry, arguments, given)
    chosen = chosen_samplers(registry, sampler, temp, given.get("sampler", {}), arguments)
    text = _stdin() if prompt == "-" else given_text(prompt)
    start(registry)
    check_samplers(chosen)
    base, said = load_adapted(model, asked, registry, quantization)
    result = continue_prompt(base, text, chosen, config, seed, stops, quiet=as_json)
    show.progress(said)
    if as_json:
        answer = {"prompt": text, "text": result.text, **as_spent(result)}
        show.as_json({"adapter_file": asked and str(asked.path), **answer})


def _stdin() -> str:
    """What stdin holds, to its end.

    Raises:
        UsageError: it is closed, cannot be read, keeps silent though it does not block, is too
            long or no text.
    """
    if sys.stdin is None:
        raise UsageError("stdin is closed", fix="give the prompt after -p")
    try:
        content = _read(sys.stdin.fileno())
    except OSError as fault:
        raise UsageError(f"stdin cannot be read: {fault.strerror}", fix="give the prompt after -p") from fault
    if len(content) > PROMPT_BYTES:
        raise UsageError(f"stdin holds more than {PROMPT_BYTES >> 20} MiB", fix="shorten the prompt")
    try:
        return content.decode()
    except UnicodeDecodeError as fault:
        raise UsageError(f"stdin is not UTF-8: {fault}") from fault


def _read(descriptor: int) -> bytes:
    """All that a descriptor gives, up to a byte more than a prompt may have.

    Raises:
        OSError: it cannot be read, or does not block and has had nothing for :data:`SILENCE_SECONDS`.
    """
    content = bytearray()
    while len(content) <= PROMPT_BYTES:
        try:
            part = os.read(descriptor, PROMPT_BYTES + 1 - len(content))
        except BlockingIOError:
            # Somebody who types may take his time.
            if not select.select([descriptor], [], [], None if os.isatty(descriptor) else SILENCE_SECONDS)[0]:
                raise
            continue
        if not part:
            break
        content += part
    return bytes(content)
