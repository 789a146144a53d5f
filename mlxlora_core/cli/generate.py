"""``mlxlora generate``."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mlxlora_core.cli import declare, show
from mlxlora_core.cli.evaluate import load_adapted
from mlxlora_core.cli.session import JSON_OPTION, SETS_OPTION, start, verb
from mlxlora_core.errors import UsageError
from mlxlora_core.options import explain
from mlxlora_core.registry import Registry
from mlxlora_core.registry.defaults import DEFAULT_SAMPLER
from mlxlora_core.run.plan import needed
from mlxlora_core.run.recipe import Choice, check_sections, choose_samplers, overrides
from mlxlora_core.run.samplers import TEMPERATURE, names
from mlxlora_core.training.settings import GenerateConfig

if TYPE_CHECKING:
    from mlxlora_core.model.folder import Model
    from mlxlora_core.model.generate import Segment

PROMPT_BYTES = 16 << 20


@verb(
    click.option("--model", type=Path, default=Path("mlx_model"), show_default=True, help="Model folder."),
    click.option("-p", "--prompt", required=True, help="Text to continue; - reads it from stdin."),
    click.option("--adapter-file", type=Path, help="Adapter file to put on the model."),
    click.option("--adapter", help="Insist on this adapter. [default: what the file says]"),
    click.option(
        "--sampler", default=DEFAULT_SAMPLER, show_default=True, help="Samplers, in order: NAME or NAME,NAME."
    ),
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
    chosen = chosen_samplers(registry, sampler, temp, given.get("sampler", {}))
    start(registry)
    base = load_adapted(registry, model, adapter_file, adapter, given.get("adapter", {}))
    text = _stdin() if prompt == "-" else prompt
    result = continue_prompt(base, text, chosen, config, seed, as_json)
    if as_json:
        show.as_json({"prompt": text, "text": result.text, "finish": result.finish})


def _stdin() -> str:
    content = sys.stdin.buffer.read(PROMPT_BYTES + 1)
    if len(content) > PROMPT_BYTES:
        raise UsageError(f"stdin holds more than {PROMPT_BYTES >> 20} MiB", fix="shorten the prompt")
    try:
        return content.decode()
    except UnicodeDecodeError as fault:
        raise UsageError(f"stdin is not UTF-8: {fault}") from fault


def chosen_samplers(
    registry: Registry, use: str, temp: str | None, values: dict[str, Any]
) -> tuple[Choice, ...]:
    """Samplers with their options; ``temp`` goes to the first that has it.

    Raises:
        UsageError: a temperature for samplers that have none.
    """
    if temp is not None:
        found = [registry.find("sampler", name) for name in names(use)]
        known = {option.name for component in found for option in explain(component.spec.options)}
        if TEMPERATURE not in known:
            raise UsageError(f"--temp: sampler '{use}' has no temperature", fix="leave --temp out")
        values = {**values, TEMPERATURE: temp}
    return choose_samplers(use, values, registry)


def continue_prompt(
    model: Model, prompt: str, samplers: Sequence[Choice], config: GenerateConfig, seed: int, quiet: bool
) -> Segment:
    """Continue a prompt; segments are printed as they come unless ``quiet``."""
    from mlxlora_core.model.generate import generate, whole

    def shown(segments: Iterable[Segment]) -> Iterator[Segment]:
        for segment in segments:
            if not quiet:
                click.echo(segment.text, nl=False)
                sys.stdout.flush()
            yield segment

    started = time.perf_counter()
    segments = generate(
        model.language_model,
        model.tokenizer,
        prompt,
        [(needed(sampler), sampler.options) for sampler in samplers],
        num_tokens=config.num_tokens,
        seed=seed,
        write_every=config.write_every,
    )
    text = whole(shown(segments))
    if not quiet:
        click.echo()
    show.progress(f"{time.perf_counter() - started:.2f} s")
    return text
