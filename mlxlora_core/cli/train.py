"""``mlxlora train``."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mlxlora_core.cli import declare, show
from mlxlora_core.cli.evaluate import measure
from mlxlora_core.cli.generate import continue_prompt
from mlxlora_core.cli.session import JSON_OPTION, SETS_OPTION, hold, start, verb
from mlxlora_core.errors import DataError, SettingsChanged, UsageError
from mlxlora_core.registry import Choice, Registry
from mlxlora_core.registry.defaults import DEFAULT_ADAPTER, DEFAULT_SAMPLER
from mlxlora_core.run.recipe import check_sections, choose, overrides
from mlxlora_core.training import checkpoints, identity
from mlxlora_core.training.settings import EvaluateConfig, GenerateConfig, SaveConfig, TrainConfig

if TYPE_CHECKING:
    from mlxlora_core.model.folder import Model
    from mlxlora_core.training.examples import Examples
    from mlxlora_core.training.session import TrainingSession

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
    declare.flags(SaveConfig),
    click.option("--resume", is_flag=True, help="Go on from the newest checkpoint of this training."),
    click.option("--overwrite", is_flag=True, help="Begin anew where a training has not ended."),
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
    resume: bool,
    overwrite: bool,
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
    quantized model folder makes it QLoRA. Checkpoints go into a folder beside
    the adapter file, NAME.checkpoints; --resume goes on from the newest.
    """
    if resume and overwrite:
        raise UsageError("--resume goes on and --overwrite begins anew; give one of them")
    kept = adapter_file.with_name(f"{adapter_file.stem}.checkpoints")
    if resume:
        checkpoints.check_plugins(checkpoints.find(kept), registry)
    config = declare.config_from(TrainConfig, arguments)
    given = overrides(sets)
    check_sections(given, ("adapter", "sampler"))
    values = given.get("adapter", {}) | ({"layers": lora_layers} if lora_layers is not None else {})
    chosen, placing = choose("adapter", adapter or DEFAULT_ADAPTER, values, registry)
    speaking = _sampler(registry, sampler, temp, given.get("sampler", {})) if prompt is not None else None
    measuring = declare.config_from(EvaluateConfig, arguments)
    writing = declare.config_from(GenerateConfig, arguments)
    saving = declare.config_from(SaveConfig, arguments)
    hold(adapter_file)
    found = (
        checkpoints.find_to_resume(kept) if resume else checkpoints.find_to_begin(kept, overwrite=overwrite)
    )
    notes = start(registry)
    from mlxlora_core.files import durable, tensor_file
    from mlxlora_core.model import adapters as files
    from mlxlora_core.model import folder as model_folder
    from mlxlora_core.training.loop import Training
    from mlxlora_core.training.memory import training_memory
    from mlxlora_core.training.session import TrainingSession

    tensor_file.check_ending(adapter_file)
    durable.check_file(adapter_file)
    base = model_folder.load(model, registry)
    if base.note:
        show.progress(base.note)
    train_set = _read(base, data / "train.jsonl", config, "train")
    valid_set = _read(base, data / "valid.jsonl", config, "valid")
    if resume_adapter_file is not None:
        adapted = files.load(resume_adapter_file, base, registry, adapter, values)
    else:
        adapted = files.attach(base, chosen, placing, seed)
    show.progress(show.adapter_size(files.count(base), len(adapted.paths)))
    training = Training(base.language_model, train_set.examples, valid_set.examples, config, seed)
    splits = {"train": train_set.examples, "valid": valid_set.examples}
    made_of = identity.identify(base, adapted, training, splits, registry, notes)
    session = TrainingSession(kept, training, base, adapted, made_of)
    with training_memory(base, train_set, config.batch_size) as said:
        show.progress(said)
        try:
            told = session.resume(found) if resume else session.begin(found)
        except SettingsChanged as fault:
            show.changes(fault.rows)
            raise
        for note in told:
            show.progress(note)
        last = _train(session, saving, metrics_file)
    files.save(adapter_file, base, adapted)
    done = {"steps": training.progress.step, "adapter_step": session.adapter_step}
    result: dict[str, Any] = {"adapter_file": str(adapter_file), **files.count(base), **done, **last}
    of_best = f", of step {session.adapter_step}, the best" if config.patience is not None else ""
    show.progress(f"{adapter_file} written{of_best}")
    if test:
        result["test"] = measure(base, data, config, measuring, as_json)
    if speaking is not None and prompt is not None:
        result["text"] = continue_prompt(base, prompt, speaking, writing, seed, as_json)
    if as_json:
        show.as_json(result)


def _sampler(registry: Registry, name: str, temp: str | None, values: dict[str, Any]) -> Choice:
    from mlxlora_core.cli.generate import choose_sampler

    return choose_sampler(registry, name, temp, values)


def _read(base: Model, path: Path, config: TrainConfig, split: str) -> Examples:
    """The rows of one split, with a word on those that are long."""
    from mlxlora_core.training.examples import read_examples

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


def _train(checkpoints: TrainingSession, saving: SaveConfig, metrics_file: Path | None) -> dict[str, Any]:
    """Train to the end, showing every report; the last losses."""
    from mlxlora_core.training.loop import TrainReport, ValidReport
    from mlxlora_core.training.session import report_line

    last: dict[str, Any] = {}
    with show.training(checkpoints.training.config.iters) as display:
        for event in checkpoints.train(saving, metrics_file, resume_command(resume=True)):
            if isinstance(event, TrainReport | ValidReport):
                line = report_line(event)
                last[f"{line['kind']}_loss"] = line["loss"]
            display(event)
    return last


def resume_command(*, resume: bool) -> str:
    """The command line that was given, ready to be given again to go on."""
    arguments = [argument for argument in sys.argv[1:] if argument not in ("--resume", "--overwrite")]
    return shlex.join(["mlxlora", *arguments, *(["--resume"] if resume else [])])
