"""What verbs do with a model: load it with its adapter, measure it, let it go on with a prompt."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mlxlora_core.cli import show
from mlxlora_core.errors import UsageError
from mlxlora_core.options import explain
from mlxlora_core.plugins import Choice, Registry
from mlxlora_core.runs.recipe import choose_samplers
from mlxlora_core.runs.samplers import TEMPERATURE, names
from mlxlora_core.training.settings import BatchConfig, EvaluateConfig, GenerateConfig

if TYPE_CHECKING:
    from mlxlora_core.model.folder import Model
    from mlxlora_core.model.generate import Segment


def load_base(folder: Path, registry: Registry) -> Model:
    """The model in a folder; what there is to tell of it is told."""
    from mlxlora_core.model.folder import load

    model = load(folder, registry)
    if model.note:
        show.progress(model.note)
    return model


def load_adapted(
    folder: Path,
    adapter_file: Path | None,
    adapter: str | None,
    values: Mapping[str, Any],
    registry: Registry,
) -> Model:
    """A model with, if a file is named, the adapter in it, which must be what the caller insists on."""
    from mlxlora_core.model import adapters

    model = load_base(folder, registry)
    if adapter_file is not None:
        adapters.load(adapter_file, model, registry, adapter, values)
    return model


def measure(
    model: Model, data: Path, batches: BatchConfig, config: EvaluateConfig, *, quiet: bool
) -> dict[str, Any]:
    """Loss on ``test.jsonl``; printed unless ``quiet``."""
    from mlxlora_core.training.evaluation import evaluate, room_for
    from mlxlora_core.training.examples import read_examples

    rows = read_examples(
        data / "test.jsonl",
        model.tokenizer,
        max_seq_length=model.sequence_limit(batches.max_seq_length),
        mask_prompt=batches.mask_prompt,
    )
    most, said = room_for(model.language_model, rows.examples, batches.batch_size)
    show.progress(said)
    loss = evaluate(model.language_model, rows.examples, batches.batch_size, config.test_batches, most)
    if not quiet:
        click.echo(f"test loss {loss.mean:.4f}, perplexity {loss.perplexity:.3f}, {loss.tokens} tokens")
    return {"loss": loss.mean, "perplexity": loss.perplexity, "tokens": loss.tokens, "rows": len(rows)}


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
    model: Model, prompt: str, samplers: Sequence[Choice], config: GenerateConfig, seed: int, *, quiet: bool
) -> Segment:
    """Continue a prompt; segments are printed as they come unless ``quiet``."""
    from mlxlora_core.model.generate import generate, whole

    started = time.perf_counter()
    segments = generate(
        model.language_model,
        model.tokenizer,
        prompt,
        [(sampler.component, sampler.options) for sampler in samplers],
        num_tokens=config.num_tokens,
        seed=seed,
        write_every=config.write_every,
        told=show.progress,
    )
    text = whole(segments if quiet else _shown(segments))
    show.progress(f"{time.perf_counter() - started:.2f} s")
    return text


def _shown(segments: Iterable[Segment]) -> Iterator[Segment]:
    """The segments, each printed as it comes; the last ends the line."""
    for segment in segments:
        click.echo(segment.text, nl=segment.finish is not None)
        sys.stdout.flush()
        yield segment
