"""``mlxlora train``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mlxlora_core.cli import declare, show
from mlxlora_core.cli.evaluate import measure
from mlxlora_core.cli.generate import speak
from mlxlora_core.cli.session import JSON_OPTION, SETS_OPTION, start, verb
from mlxlora_core.errors import DataError
from mlxlora_core.recipe import DEFAULT_ADAPTER, DEFAULT_SAMPLER, Choice, check_sections, choose, overrides
from mlxlora_core.registry import Registry
from mlxlora_core.train_config import EvaluateConfig, GenerateConfig, TrainConfig

if TYPE_CHECKING:
    from mlxlora_core.data import Examples
    from mlxlora_core.model_folder import Model

DEFAULT_ADAPTER_FILE = Path("adapters.safetensors")
LONG_ROW_TOKENS = 2048


@verb(
    click.option("--model", type=Path, default=Path("mlx_model"), show_default=True, help="Model folder."),
    click.option(
        "--data",
        type=Path,
        default=Path("data"),
        show_default=True,
        help="Folder with train.jsonl and valid.jsonl.",
    ),
    click.option("--adapter", help=f"Adapter to train. [default: {DEFAULT_ADAPTER}, or what is resumed]"),
    click.option(
        "--lora-layers", metavar="LAYERS", help="Adapt the top so many layers; -1 is all. [default: 16]"
    ),
    click.option(
        "--adapter-file",
        type=Path,
        default=DEFAULT_ADAPTER_FILE,
        show_default=True,
        help="Adapter file to write, .safetensors or .npz.",
    ),
    click.option("--resume-adapter-file", type=Path, help="Start from these adapter weights."),
    declare.flags(TrainConfig),
    click.option(
        "--seed", type=click.IntRange(0, 2**32 - 1), default=0, show_default=True, help="Random seed."
    ),
    click.option(
        "--metrics-file", type=Path, help="Write every report to this file, one JSON object a line."
    ),
    click.option("--test", is_flag=True, help="Measure the test set after training."),
    declare.flags(EvaluateConfig),
    click.option("-p", "--prompt", help="Continue this prompt after training."),
    click.option("--sampler", default=DEFAULT_SAMPLER, show_default=True, help="Sampler for --prompt."),
    click.option("--temp", help="Sampling temperature for --prompt; 0 is argmax. [default: 0.8]"),
    declare.flags(GenerateConfig),
    SETS_OPTION,
    JSON_OPTION,
)
def command(
    registry: Registry,
    model: Path,
    data: Path,
    adapter: str | None,
    lora_layers: str | None,
    adapter_file: Path,
    resume_adapter_file: Path | None,
    seed: int,
    metrics_file: Path | None,
    test: bool,
    prompt: str | None,
    sampler: str,
    temp: str | None,
    sets: tuple[str, ...],
    as_json: bool,
    **arguments: Any,
) -> None:
    """Train an adapter on a dataset folder.

    The base stays as it is; only the adapter's own parameters train. A
    quantized model folder makes it QLoRA.
    """
    config = declare.take(TrainConfig, arguments)
    given = overrides(sets)
    check_sections(given, ("adapter", "sampler"))
    values = given.get("adapter", {}) | ({"layers": lora_layers} if lora_layers is not None else {})
    chosen = choose("adapter", adapter or DEFAULT_ADAPTER, values, registry)
    speaking = _sampler(registry, sampler, temp, given.get("sampler", {})) if prompt is not None else None
    measuring = declare.take(EvaluateConfig, arguments)
    writing = declare.take(GenerateConfig, arguments)
    start(registry)
    from mlxlora_core import adapter_file as files
    from mlxlora_core import durable, model_folder, tensor_file

    tensor_file.check_ending(adapter_file)
    durable.check_file(adapter_file)
    base = model_folder.load(model, registry)
    train_set = _read(base, data / "train.jsonl", config, "train")
    valid_set = _read(base, data / "valid.jsonl", config, "valid")
    if resume_adapter_file is not None:
        adapted = files.load(resume_adapter_file, base, registry, (adapter, values))
    else:
        assert chosen.component is not None
        adapted = files.attach(base, chosen.component, chosen.options, seed)
    show.progress(show.adapter_size(files.count(base), len(adapted.paths)))
    last = _train(base, train_set, valid_set, config, seed, metrics_file)
    files.save(adapter_file, base, adapted)
    result: dict[str, Any] = {"adapter_file": str(adapter_file), **files.count(base), **last}
    show.progress(f"{adapter_file} written")
    if test:
        result["test"] = measure(base, data, config, measuring, as_json)
    if speaking is not None and prompt is not None:
        result["text"] = speak(base, prompt, speaking, writing, seed, as_json)
    if as_json:
        show.as_json(result)


def _sampler(registry: Registry, name: str, temp: str | None, values: dict[str, Any]) -> Choice:
    from mlxlora_core.cli.generate import choose_sampler

    return choose_sampler(registry, name, temp, values)


def _read(base: Model, path: Path, config: TrainConfig, split: str) -> Examples:
    """The rows of one split, with a word on those that are long."""
    from mlxlora_core.data import read_examples

    if not path.is_file():
        raise DataError(f"training needs {split}.jsonl", where=path, fix="make the folder with: mlxlora data")
    examples = read_examples(
        path,
        base.tokenizer,
        max_seq_length=base.sequence_limit(config.max_seq_length),
        mask_prompt=config.mask_prompt,
    )
    longest = max(len(example.tokens) for example in examples.examples)
    if longest > LONG_ROW_TOKENS:
        show.progress(f"warning: {split} has rows of up to {longest} tokens; long rows take much memory")
    if examples.cut:
        share = examples.cut_tokens / (examples.tokens + examples.cut_tokens)
        show.progress(f"warning: {examples.cut} {split} rows were cut, {share:.1%} of all tokens are lost")
    if examples.empty:
        show.progress(f"warning: {examples.empty} {split} rows have no token that counts and were left out")
    return examples


def _train(
    base: Model,
    train_set: Examples,
    valid_set: Examples,
    config: TrainConfig,
    seed: int,
    metrics_file: Path | None,
) -> dict[str, Any]:
    """Train to the end, showing and keeping every report; the last losses."""
    from mlxlora_core.durable import append_line, write_text
    from mlxlora_core.pipeline import report_line
    from mlxlora_core.train import train

    if metrics_file is not None:
        write_text(metrics_file, "")
    last: dict[str, Any] = {}
    with show.training(config.iters) as display:
        for report in train(base.language_model, train_set.examples, valid_set.examples, config, seed):
            line = report_line(report)
            last[f"{line['kind']}_loss"] = report.loss
            if metrics_file is not None:
                append_line(metrics_file, json.dumps(line))
            display(report)
    return last
