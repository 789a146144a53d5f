"""``mlxlora generate``."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mlxlora_core.cli import declare, show
from mlxlora_core.cli.evaluate import load_adapted
from mlxlora_core.cli.session import JSON_OPTION, SETS_OPTION, start, verb
from mlxlora_core.errors import UsageError
from mlxlora_core.options import explain
from mlxlora_core.registry import Choice, Registry
from mlxlora_core.registry.defaults import DEFAULT_SAMPLER
from mlxlora_core.run.recipe import check_sections, choose, overrides
from mlxlora_core.training.settings import GenerateConfig

if TYPE_CHECKING:
    from mlxlora_core.model.folder import Model

PROMPT_BYTES = 16 << 20


@verb(
    click.option("--model", type=Path, default=Path("mlx_model"), show_default=True, help="Model folder."),
    click.option("-p", "--prompt", required=True, help="Text to continue; - reads it from stdin."),
    click.option("--adapter-file", type=Path, help="Adapter file to put on the model."),
    click.option("--adapter", help="Insist on this adapter. [default: what the file says]"),
    click.option("--sampler", default=DEFAULT_SAMPLER, show_default=True, help="Chooses each token."),
    click.option("--temp", help="Sampling temperature; 0 is argmax. [default: 0.8]"),
    click.option(
        "--seed", type=click.IntRange(0, 2**32 - 1), default=0, show_default=True, help="Random seed."
    ),
    declare.flags(GenerateConfig),
    SETS_OPTION,
    JSON_OPTION,
)
def command(
    registry: Registry,
    model: Path,
    prompt: str,
    adapter_file: Path | None,
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
    check_sections(given, ("adapter", "sampler"))
    chosen = choose_sampler(registry, sampler, temp, given.get("sampler", {}))
    start(registry)
    base = load_adapted(registry, model, adapter_file, adapter, given.get("adapter", {}))
    text = _stdin() if prompt == "-" else prompt
    result = continue_prompt(base, text, chosen, config, seed, as_json)
    if as_json:
        show.as_json({"prompt": text, "text": result})


def _stdin() -> str:
    content = sys.stdin.buffer.read(PROMPT_BYTES + 1)
    if len(content) > PROMPT_BYTES:
        raise UsageError(f"stdin holds more than {PROMPT_BYTES >> 20} MiB", fix="shorten the prompt")
    try:
        return content.decode()
    except UnicodeDecodeError as fault:
        raise UsageError(f"stdin is not UTF-8: {fault}") from fault


def choose_sampler(registry: Registry, name: str, temp: str | None, values: dict[str, Any]) -> Choice:
    """A sampler with its options; ``temp`` goes to the one that has it.

    Raises:
        UsageError: a temperature for a sampler that has none.
    """
    if temp is not None:
        known = {option.name for option in explain(registry.find("sampler", name).spec.options)}
        if "temp" not in known:
            raise UsageError(f"--temp: sampler '{name}' has no temperature", fix="leave --temp out")
        values = {**values, "temp": temp}
    return choose("sampler", name, values, registry)[0]


def continue_prompt(
    model: Model, prompt: str, sampler: Choice, config: GenerateConfig, seed: int, quiet: bool
) -> str:
    """Continue a prompt; segments are printed as they come unless ``quiet``."""
    from mlxlora_core.model.generate import generate

    sample = sampler.component.spec.build(sampler.options)
    segments = []
    started = time.perf_counter()
    for segment in generate(
        model.language_model,
        model.tokenizer,
        prompt,
        sample,
        num_tokens=config.num_tokens,
        seed=seed,
        write_every=config.write_every,
    ):
        segments.append(segment)
        if not quiet:
            click.echo(segment, nl=False)
            sys.stdout.flush()
    if not quiet:
        click.echo()
    show.progress(f"{time.perf_counter() - started:.2f} s")
    return "".join(segments)
