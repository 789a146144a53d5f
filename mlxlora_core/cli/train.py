"""``mlxlora train``: an adapter is trained on a dataset folder."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mlxlora_core.cli import declare, show
from mlxlora_core.cli.command_line import resume_command
from mlxlora_core.cli.model import (
    asked_quantization,
    chosen_samplers,
    continue_prompt,
    given_text,
    load_base,
    located,
    measure,
    read_test,
)
from mlxlora_core.cli.session import JSON_OPTION, SETS_OPTION, joined, start, verb
from mlxlora_core.distributed.environment import rank
from mlxlora_core.errors import UsageError
from mlxlora_core.options import explain, plain
from mlxlora_core.plugins import Choice, Registry
from mlxlora_core.plugins.defaults import DEFAULT_ADAPTER
from mlxlora_core.plugins.progress import progress_shown
from mlxlora_core.plugins.sections import AdapterConfig, Quantization
from mlxlora_core.runs.folder import REPORT, RunFolder
from mlxlora_core.runs.observing import ObserverFailed, event_values, observed
from mlxlora_core.runs.pipeline import circumstances
from mlxlora_core.runs.recipe import (
    DEFAULT,
    check_sections,
    choose,
    choose_beside,
    overrides,
    without_none,
)
from mlxlora_core.runs.report import length_counts
from mlxlora_core.runs.samplers import check_samplers
from mlxlora_core.runs.training_record import TrainingRecord, open_folder
from mlxlora_core.series import RunInfo
from mlxlora_core.training.checkpoints import Found, Start, check_plugins, find, find_for
from mlxlora_core.training.events import TrainEvent, TrainResult
from mlxlora_core.training.outputs import (
    Outputs,
    check_outputs,
    checkpoints_of,
    held,
    inputs_of,
    refuse_finished,
)
from mlxlora_core.training.settings import (
    BatchConfig,
    EvaluateConfig,
    GenerateConfig,
    SaveConfig,
    TrainConfig,
)
from mlxlora_core.training.sources import SplitRows, read_data

if TYPE_CHECKING:
    from mlxlora_core.distributed.group import Group
    from mlxlora_core.model.adapters import AdapterFile
    from mlxlora_core.model.loading import Model
    from mlxlora_core.training.examples import Examples
    from mlxlora_core.training.session import NewAdapter


@verb(
    declare.section(
        "Model and data",
        declare.MODEL,
        declare.quantize,
        declare.data("train.jsonl and, to validate on, valid.jsonl"),
        declare.COLUMNS,
        declare.flags(BatchConfig),
    ),
    declare.section(
        "Adapter",
        click.option(
            "--adapter",
            help="Adapter to train, such as lora or dora. Its options, its targets (names, patterns, "
            "all-linear) and its overrides are keys of `adapter` for --set. "
            f"[default: {DEFAULT_ADAPTER}, or what is resumed]",
        ),
        click.option(
            "--lora-layers", metavar="LAYERS", help="How many top layers to adapt; -1 is all. [default: 16]"
        ),
        click.option(
            "--adapter-file",
            type=declare.OUTPUT_FILE,
            default=declare.DEFAULT_ADAPTER_FILE,
            show_default=True,
            help="Adapter file to write, .safetensors or .npz.",
        ),
        click.option(
            "--resume-adapter-file",
            type=declare.INPUT,
            help="Start from this adapter: a file, or a folder or file of PEFT or mlx-lm.",
        ),
        declare.BASE_MISMATCH,
    ),
    declare.section("Training", declare.flags(TrainConfig, BatchConfig), declare.SEED),
    declare.section(
        "Checkpoints and reports",
        declare.flags(SaveConfig),
        click.option("--resume", is_flag=True, help="Go on from the newest checkpoint of this training."),
        click.option(
            "--overwrite",
            is_flag=True,
            help="Begin anew where a training has not ended, or has left its adapter.",
        ),
        click.option(
            "--metrics-file",
            type=declare.OUTPUT_FILE,
            help="Write every report to this file, one JSON object a line.",
        ),
        click.option(
            "--observer",
            "observers",
            multiple=True,
            metavar="NAME",
            help="Let an observer watch, such as csv. May be repeated.",
        ),
    ),
    declare.section(
        "After training",
        click.option("--test", is_flag=True, help="Measure the test set."),
        declare.flags(EvaluateConfig),
        click.option("-p", "--prompt", help="Continue this prompt."),
        declare.SAMPLER,
        declare.TEMP,
        declare.flags(GenerateConfig, letters=False),
    ),
    SETS_OPTION,
    JSON_OPTION,
    ranked=True,
)
def command(
    registry: Registry,
    model: str,
    data: Path,
    adapter_file: Path,
    resume_adapter_file: Path | None,
    seed: int,
    metrics_file: Path | None,
    test: bool,
    prompt: str | None,
    as_json: bool,
    **given: Any,
) -> None:
    """Train an adapter on a dataset folder.

    The base stays as it is; only the adapter's own parameters train. A
    quantized model, or -q, makes it QLoRA. Checkpoints go into a folder beside
    the adapter file, NAME.checkpoints; --resume goes on from the newest. So
    does report.html, a page that shows the training.
    """
    checkpoints = checkpoints_of(adapter_file)
    asked = _check(registry, checkpoints, given, speaks=prompt is not None)
    outputs = Outputs(adapter_file, checkpoints, metrics_file, asked.save, resume_command(resume=True))
    with joined() as (group, watch):
        with group.first_of_machine():
            place = located(model)
        written = _written(outputs, asked.how, inputs_of(place.path, data, resume_adapter_file))
        rows = _rows(data, asked.columns, test=test)
        runtimes = start(registry)
        from mlxlora_core.model.generate import fitting_ids
        from mlxlora_core.training.session import open_training

        # A sampler that is faulty is told now and not when hours of training are over.
        check_samplers(asked.samplers)
        with group.first_of_machine():
            base = load_base(place, registry, asked.quantization)
        check_samplers(asked.samplers, base.tokenizer)
        test_rows = rows.pop("test") if test else None
        if prompt is not None and group.leads:  # one that does not fit is told now, too
            fitting_ids(base.language_model, base.tokenizer, asked.generate.asked(given_text(prompt)))
        adapter, config = _adapter(asked, resume_adapter_file), asked.train
        also: Any = {"outputs": outputs, "runtimes": runtimes, "group": group, "watch": watch}
        with show.Bar() as bar, progress_shown(bar.move):
            session = open_training(base, adapter, rows, config, registry, seed=seed, **also)
        rows.clear()  # of which there are tokens now
        held_out = read_test(base, test_rows, config) if test_rows is not None else None
        told = session.start(asked.how, written.found if written else None)
        events: Iterator[TrainEvent | ObserverFailed] = told
        if written is not None:
            facts = circumstances(adapter_file.stem, seed, _origins(given), registry, runtimes)
            lengths = length_counts(session.rows["train"].lengths)
            record = TrainingRecord(written.folder, facts, _settings(asked, place.name, data, seed), lengths)
            info = _info(adapter_file, place.name, data, asked)
            events = _watched(record.keep(told), info, base, asked)
        trained = _follow(events)
        of_best = f", of step {trained.adapter_step}, the best" if config.patience is not None else ""
        show.progress(f"{adapter_file} written{of_best}; {checkpoints / REPORT} shows the training")
        after = _after(base, held_out, prompt, asked, seed, group, quiet=as_json)
    if as_json:
        show.as_json({"adapter_file": str(adapter_file), **asdict(trained), **after})


@dataclass(frozen=True)
class _Written:
    """What stands where a training writes.

    Attributes:
        found: its checkpoints.
        folder: that its record goes into.
    """

    found: Found
    folder: RunFolder


def _written(outputs: Outputs, how: Start, inputs: Sequence[Path]) -> _Written | None:
    """What stands where a training writes, held until this verb ends; None on a rank that does not write."""
    if rank() > 0:
        return None
    click.get_current_context().with_resource(held(outputs))
    check_outputs(outputs, inputs)
    assert outputs.checkpoints is not None, "a verb writes some"
    written = _Written(find_for(how, outputs.checkpoints), open_folder(outputs.checkpoints))
    refuse_finished(outputs.adapter_file, how)
    return written


@dataclass(frozen=True)
class _Asked:
    """What the command line asks for, checked.

    Attributes:
        adapter: the adapter to begin with, and where it goes.
        name: the adapter that the user insists on, or None.
        values: the options of it that the user insists on.
        any_base: whether it may be one of another base.
    """

    how: Start
    adapter: tuple[Choice, AdapterConfig]
    name: str | None
    values: dict[str, Any]
    any_base: bool
    samplers: tuple[Choice, ...]
    observers: tuple[Choice, ...]
    train: TrainConfig
    save: SaveConfig
    evaluate: EvaluateConfig
    generate: GenerateConfig
    columns: Mapping[str, str]
    quantization: Quantization | None


def _check(registry: Registry, checkpoints: Path, given: dict[str, Any], *, speaks: bool) -> _Asked:
    """Tell what is wrong with a command line before anything is loaded."""
    if given["resume"] and given["overwrite"]:
        raise UsageError("--resume goes on and --overwrite begins anew; give one of them")
    if given["resume"]:
        check_plugins(find(checkpoints), registry)
    sets = overrides(given["sets"])
    check_sections(sets, ("adapter", "sampler", "observe", "quantize"))
    layers = given["lora_layers"]
    values = sets.get("adapter", {}) | ({"layers": layers} if layers is not None else {})
    return _Asked(
        how=Start.RESUME if given["resume"] else Start.OVERWRITE if given["overwrite"] else Start.BEGIN,
        adapter=choose("adapter", given["adapter"] or DEFAULT_ADAPTER, values, registry),
        name=given["adapter"],
        values=values,
        any_base=given["base_mismatch"] == "allow",
        samplers=chosen_samplers(registry, given["sampler"], given["temp"], sets.get("sampler", {}))
        if speaks
        else (),
        observers=choose_beside("observer", given["observers"], sets.get("observe", {}), registry),
        train=declare.config_from(TrainConfig, given),
        save=declare.config_from(SaveConfig, given),
        evaluate=declare.config_from(EvaluateConfig, given),
        generate=declare.config_from(GenerateConfig, given),
        columns=declare.columns_from(given["columns"]),
        quantization=asked_quantization(registry, given, sets),
    )


def _rows(data: Path, columns: Mapping[str, str], *, test: bool) -> dict[str, SplitRows]:
    """The rows to train with; those to test on are read in any case, for a bad one is refused as by data."""
    wanted, optional = (("train", "test"), ("valid",)) if test else (("train",), ("valid", "test"))
    rows = read_data(data, wanted, optional, columns)
    return {split: rows[split] for split in (*wanted, "valid") if split in rows}


def _after(
    base: Model,
    held_out: Examples | None,
    prompt: str | None,
    asked: _Asked,
    seed: int,
    group: Group,
    *,
    quiet: bool,
) -> dict[str, Any]:
    """What comes after a training: the loss on the test set, and the answer to a prompt, of one rank."""
    result: dict[str, Any] = {}
    if held_out is not None:
        result["test"] = measure(base, held_out, asked.train, asked.evaluate, group, quiet=quiet)
    if prompt is not None and group.leads:
        said = continue_prompt(base, given_text(prompt), asked.samplers, asked.generate, seed, quiet=quiet)
        result |= {"text": said.text, "finish": said.finish}
    return result


def _adapter(asked: _Asked, path: Path | None) -> NewAdapter | AdapterFile:
    """The adapter to train: the one in a file, or a new one."""
    from mlxlora_core.model.adapters import AdapterFile
    from mlxlora_core.training.session import NewAdapter

    if path is not None:
        return AdapterFile(path, asked.name, asked.values, asked.any_base)
    return NewAdapter(*asked.adapter)


def _settings(asked: _Asked, model: str, data: Path, seed: int) -> dict[str, Any]:
    """What the training was begun with, in the sections of a recipe."""
    choice, config = asked.adapter
    columns = [f"{name}={column}" for name, column in asked.columns.items()]
    sections = {
        "run": {"seed": seed},
        "model": {"mlx_path": model},
        "data": {"use": "jsonl", "options": {"path": plain(data), "columns": columns}},
        "adapter": {"use": choice.component.id, **plain(config), "options": plain(choice.options)},
        "train": plain(asked.train),
        "checkpoints": plain(asked.save),
    }
    if asked.quantization is not None:
        sections["quantize"] = asked.quantization.values()
    return {name: without_none(values) for name, values in sections.items()}


def _origins(given: dict[str, Any]) -> dict[str, str]:
    """``section.key`` -> whether the command line said its value."""
    return {
        f"{section}.{known.name}": DEFAULT if given.get(known.name) is None else "command line"
        for section, config in (("train", TrainConfig), ("checkpoints", SaveConfig))
        for known in explain(config)
    } | dict.fromkeys(("model.mlx_path", "data.path"), "command line")


def _info(adapter_file: Path, model: str, data: Path, asked: _Asked) -> RunInfo:
    """What observers are told of the training before it begins."""
    settings = {
        "model": model,
        "data": plain(data),
        "adapter": {**plain(asked.adapter[0].options), **plain(asked.adapter[1])},
        "train": plain(asked.train),
        "checkpoints": plain(asked.save),
    }
    return RunInfo(adapter_file.parent, adapter_file.stem, settings, stem=adapter_file.stem)


def _watched(
    events: Iterator[TrainEvent], info: RunInfo, base: Model, asked: _Asked
) -> Iterator[TrainEvent | ObserverFailed]:
    """What a training tells, told to its observers too, none of whom takes its room on the disk."""
    from mlxlora_core.training.disk import written_bytes

    return observed(events, asked.observers, info, event_values, partial(written_bytes, base, asked.save))


def _follow(events: Iterator[TrainEvent | ObserverFailed]) -> TrainResult:
    """Show a training to its end; what it has come to."""
    result = None
    with show.Bar() as bar:
        display = show.training(bar)
        for event in events:
            if isinstance(event, ObserverFailed):
                show.warning(event.text)
                continue
            display(event)
            if isinstance(event, TrainResult):
                result = event
    assert result is not None, "a training ends with its result"
    return result
