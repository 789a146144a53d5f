"""What verbs do with a model: load it with its adapter, measure it, let it go on with a prompt."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mlxlora_core.cli import show
from mlxlora_core.errors import UsageError
from mlxlora_core.options import explain
from mlxlora_core.registry import Choice, Registry
from mlxlora_core.run.recipe import choose
from mlxlora_core.training.settings import BatchConfig, EvaluateConfig, GenerateConfig

if TYPE_CHECKING:
    from mlxlora_core.model.folder import Model


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
    from mlxlora_core.training.evaluation import evaluate
    from mlxlora_core.training.examples import read_examples

    rows = read_examples(
        data / "test.jsonl",
        model.tokenizer,
        max_seq_length=model.sequence_limit(batches.max_seq_length),
        mask_prompt=batches.mask_prompt,
    )
    loss = evaluate(model.language_model, rows.examples, batches.batch_size, config.test_batches)
    if not quiet:
        click.echo(f"test loss {loss.mean:.4f}, perplexity {loss.perplexity:.3f}, {loss.tokens} tokens")
    return {"loss": loss.mean, "perplexity": loss.perplexity, "tokens": loss.tokens, "rows": len(rows)}


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
    model: Model, prompt: str, sampler: Choice, config: GenerateConfig, seed: int, *, quiet: bool
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
