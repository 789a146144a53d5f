"""``mlxlora evaluate``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mlxlora_core.cli import declare, show
from mlxlora_core.cli.session import JSON_OPTION, SETS_OPTION, start, verb
from mlxlora_core.registry import Registry
from mlxlora_core.run.recipe import check_sections, overrides
from mlxlora_core.training.settings import BatchConfig, EvaluateConfig

if TYPE_CHECKING:
    from mlxlora_core.model.folder import Model


@verb(
    click.option("--model", type=Path, default=Path("mlx_model"), show_default=True, help="Model folder."),
    click.option(
        "--data", type=Path, default=Path("data"), show_default=True, help="Folder with test.jsonl."
    ),
    click.option("--adapter-file", type=Path, help="Adapter file to put on the model."),
    click.option("--adapter", help="Insist on this adapter. [default: what the file says]"),
    declare.flags(BatchConfig),
    declare.flags(EvaluateConfig),
    SETS_OPTION,
    JSON_OPTION,
)
def command(
    registry: Registry,
    model: Path,
    data: Path,
    adapter_file: Path | None,
    adapter: str | None,
    sets: tuple[str, ...],
    as_json: bool,
    **arguments: Any,
) -> None:
    """Measure loss and perplexity on the test set.

    The loss is the sum of nats over the sum of counted tokens, whatever the
    batch size.
    """
    batches, config = (
        declare.config_from(BatchConfig, arguments),
        declare.config_from(EvaluateConfig, arguments),
    )
    given = overrides(sets)
    check_sections(given, ("adapter",))
    start(registry)
    base = load_adapted(registry, model, adapter_file, adapter, given.get("adapter", {}))
    result = measure(base, data, batches, config, as_json)
    if as_json:
        show.as_json(result)


def load_adapted(
    registry: Registry, folder: Path, adapter_file: Path | None, adapter: str | None, values: dict[str, Any]
) -> Model:
    """A model with, if a file is named, the adapter in it."""
    from mlxlora_core.model import adapters as files
    from mlxlora_core.model import folder as model_folder

    model = model_folder.load(folder, registry)
    if model.note:
        show.progress(model.note)
    if adapter_file is not None:
        files.load(adapter_file, model, registry, adapter, values)
    return model


def measure(
    model: Model, data: Path, batches: BatchConfig, config: EvaluateConfig, quiet: bool
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
