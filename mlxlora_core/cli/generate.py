"""``mlxlora generate``: a prompt is continued."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from mlxlora_core.cli import declare, show
from mlxlora_core.cli.model import asked_adapter, chosen_samplers, continue_prompt, load_adapted
from mlxlora_core.cli.session import JSON_OPTION, SETS_OPTION, start, verb
from mlxlora_core.errors import UsageError
from mlxlora_core.plugins import Registry
from mlxlora_core.runs.recipe import check_sections, overrides
from mlxlora_core.training.settings import GenerateConfig

PROMPT_BYTES = 16 << 20


@verb(
    declare.MODEL,
    click.option("-p", "--prompt", required=True, help="Text to continue; - reads it from stdin."),
    declare.ADAPTER_FILE,
    declare.NO_ADAPTER,
    declare.ADAPTER,
    declare.SAMPLER,
    declare.TEMP,
    declare.SEED,
    declare.flags(GenerateConfig),
    SETS_OPTION,
    JSON_OPTION,
)
def command(
    registry: Registry,
    model: Path,
    prompt: str,
    adapter_file: Path | None,
    no_adapter: bool,
    adapter: str | None,
    sampler: str,
    temp: str | None,
    seed: int,
    sets: tuple[str, ...],
    as_json: bool,
    **arguments: Any,
) -> None:
    """Continue a prompt.

    Only the continuation goes to stdout. It ends at an end token, after
    --num-tokens tokens, or where the model's context is full.
    """
    config = declare.config_from(GenerateConfig, arguments)
    given = overrides(sets)
    asked = asked_adapter(adapter_file, no_adapter, adapter, given.get("adapter", {}))
    check_sections(given, ("adapter", "sampler"))
    chosen = chosen_samplers(registry, sampler, temp, given.get("sampler", {}))
    start(registry)
    base, said = load_adapted(model, asked, registry)
    text = _stdin() if prompt == "-" else prompt
    result = continue_prompt(base, text, chosen, config, seed, quiet=as_json)
    show.progress(said)
    if as_json:
        answer = {"prompt": text, "text": result.text, "finish": result.finish}
        show.as_json({"adapter_file": asked and str(asked.path), **answer})


def _stdin() -> str:
    content = sys.stdin.buffer.read(PROMPT_BYTES + 1)
    if len(content) > PROMPT_BYTES:
        raise UsageError(f"stdin holds more than {PROMPT_BYTES >> 20} MiB", fix="shorten the prompt")
    try:
        return content.decode()
    except UnicodeDecodeError as fault:
        raise UsageError(f"stdin is not UTF-8: {fault}") from fault
