"""``mlxlora run``: the straight lines as stages, each done once for its inputs.

A stage whose output carries the fingerprint of its inputs (see
:mod:`mlxlora_core.runs.plan`) is skipped.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

from mlxlora_core.distributed.group import ALONE, Group
from mlxlora_core.distributed.watch import Watch
from mlxlora_core.errors import RankError
from mlxlora_core.files import leftovers
from mlxlora_core.plugins import Registry
from mlxlora_core.runs.base import pinned
from mlxlora_core.runs.context import Context
from mlxlora_core.runs.events import Event, RunStarted, StageDone, StageStarted
from mlxlora_core.runs.folder import ADAPTER, METRICS, RunFolder
from mlxlora_core.runs.grading import summarize
from mlxlora_core.runs.observing import INTERRUPTED, event_values, how_ended, observed
from mlxlora_core.runs.places import check_run
from mlxlora_core.runs.plan import fingerprints, is_done
from mlxlora_core.runs.recipe import Recipe
from mlxlora_core.runs.report import write_report
from mlxlora_core.runs.stages import STAGES
from mlxlora_core.series import RunInfo
from mlxlora_core.version import __version__

_DONE = b"done"  # in the place of the name of a stage


def run(
    recipe: Recipe,
    registry: Registry,
    runtimes: Sequence[str] = (),
    resume_command: str = "mlxlora run",
    *,
    watched: bool = False,
    group: Group = ALONE,
    watch: Watch | None = None,
) -> Iterator[Event]:
    """Do what a recipe says, stage by stage; what is done already is skipped.

    Of several ranks the first calls this, and the others :func:`assist`.

    Args:
        recipe: with every value filled in.
        registry: where plugins are looked up.
        runtimes: what the runtimes said, for the record.
        resume_command: the command that goes on with this run.
        watched: whether the model is to be asked on its way, for whoever looks on.
        group: the ranks that share the work.
        watch: is told what this rank is at.

    Raises:
        UsageError: the run would write over what it reads.
        SafetyError: the run folder holds something that no run has made.
        MlxloraError: as the stages raise.
    """
    for place in (recipe.folder, (recipe.folder / ADAPTER).parent):  # of a run that was killed in its checks
        leftovers.clear_leftovers(place, "*")
    folder = RunFolder(recipe.folder)
    recipe, said = pinned(recipe)
    check_run(recipe, folder.record)
    marks = fingerprints(recipe)
    facts = circumstances(recipe.name, recipe.run.seed, recipe.origins, registry, runtimes)
    folder.begin(facts | {"inputs": marks}, recipe.values())
    unsound = (f"warning: not sound, and taken as not done: {fault}" for fault in folder.faults)
    yield RunStarted((*runtimes, *said, *unsound))
    context = Context(recipe, registry, folder, runtimes, resume_command, watched, group, watch)
    info = RunInfo(folder.path, recipe.name, recipe.values())
    yield from observed(_do_all(context, marks), recipe.observe, info, event_values, context.written_bytes)


def _do_all(context: Context, marks: Mapping[str, str]) -> Iterator[Event]:
    """The stages, and what is written of the run as a whole."""
    folder = context.folder
    try:
        yield from _do_stages(context, marks)
    except BaseException as fault:
        with suppress(Exception):  # what stopped the run is what there is to tell
            folder.stop(INTERRUPTED if isinstance(fault, GeneratorExit) else how_ended(fault))
        if (folder.path / METRICS).is_file():
            with suppress(Exception):
                write_report(folder.path)
        raise
    folder.conclude(summarize(folder.result("before"), folder.result("after")))
    write_report(folder.path)


def _do_stages(context: Context, marks: Mapping[str, str]) -> Iterator[Event]:
    """Each stage that does not hold, in order; what it has come to is kept before anybody is told."""
    folder = context.folder
    for stage in (stage for stage in STAGES if stage.name in marks):
        mark = marks[stage.name]
        skipped = is_done(stage, mark, folder, context.recipe)
        yield StageStarted(stage.name, skipped)
        if skipped:
            continue
        folder.start(stage.name, mark)
        context.watch.phase(f"stage {stage.name}")
        context.group.broadcast(json.dumps([stage.name, mark]).encode())
        for event in stage.work(context):
            if isinstance(event, StageDone):
                folder.keep(stage.name, mark, stage.outputs(folder.path), event.result)
            yield event
    context.group.broadcast(_DONE)


def assist(
    recipe: Recipe, registry: Registry, runtimes: Sequence[str], group: Group, watch: Watch
) -> Iterator[Event]:
    """Do the part of another rank than the first, in each stage that the first does; see :func:`run`.

    Raises:
        RankError: the run folder of the first rank is not to be seen here.
        MlxloraError: as the stages raise.
    """
    context: Context | None = None
    while (told := group.broadcast()) != _DONE:
        name, mark = json.loads(told)
        watch.phase(f"stage {name}")
        if RunFolder(recipe.folder).record.get("started", {}).get(name) != mark:
            raise RankError(
                "is not the folder that rank 0 writes the run into",
                where=recipe.folder,
                fix="name a folder that all machines share, or train with mlxlora train, which needs none",
            )
        if context is None:  # rank 0 has fetched by now what is on the Hub
            folder = RunFolder(recipe.folder)
            context = Context(pinned(recipe)[0], registry, folder, runtimes, "", group=group, watch=watch)
        yield from next(stage for stage in STAGES if stage.name == name).assist(context)


def circumstances(
    name: str, seed: int, origins: Mapping[str, str], registry: Registry, runtimes: Sequence[str]
) -> dict[str, Any]:
    """What run.json says beside the stages.

    Args:
        name: of the recipe.
        seed: of the run.
        origins: ``section.key`` -> where its value comes from.
        registry: the plugins that are there.
        runtimes: what the runtimes said.
    """
    return {
        "mlxlora": __version__,
        "recipe": name,
        "seed": seed,
        "plugins": {
            p.name: f"{p.distribution} {p.version}".strip() for p in registry.plugins if p.components
        },
        "runtime": list(runtimes),
        "machine": {
            "system": platform.platform(),
            "python": platform.python_version(),
            "cores": os.cpu_count(),
        },
        "origins": dict(origins),
    }
