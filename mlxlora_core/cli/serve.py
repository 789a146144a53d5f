"""``mlxlora serve``: a model and its adapters over HTTP, for programs that speak the OpenAI protocol."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from mlxlora_core.cli import declare, show
from mlxlora_core.cli.model import (
    ANOTHER_ADAPTER,
    adapter_names,
    adapter_paths,
    asked_quantization,
    load_base,
    located,
    put_on,
)
from mlxlora_core.cli.session import SETS_OPTION, start, verb
from mlxlora_core.cli.watch import require_extra
from mlxlora_core.errors import DataError, ModelError, UsageError
from mlxlora_core.machine.signals import deferred
from mlxlora_core.model.located import hub_name
from mlxlora_core.plugins import Registry
from mlxlora_core.plugins.sections import Quantization
from mlxlora_core.runs.base import base_of, source
from mlxlora_core.runs.folder import ADAPTER, MODEL, RECIPE, RECORD
from mlxlora_core.runs.recipe import check_sections, overrides
from mlxlora_core.runs.recipe_source import read
from mlxlora_core.runs.report.facts import read_facts
from mlxlora_core.server.settings import ServeConfig

if TYPE_CHECKING:
    from socket import socket

    from mlxlora_core.server.app import Part
    from mlxlora_core.server.guard import Policy
    from mlxlora_core.server.served import Served

LOOPBACK = "127.0.0.1"


@dataclass(frozen=True)
class Source:
    """What is to be served.

    Attributes:
        base: where the model is, or what the command line calls it.
        quantization: how it is quantized when it is opened.
        adapters: name -> file.
        named: whether the user has named the adapters.
        called: what the base is called.
        run: the run folder that it comes from, or None.
    """

    base: str
    quantization: Quantization | None
    adapters: dict[str, Path]
    named: bool
    called: str
    run: Path | None = None


@verb(
    click.argument("run", required=False, type=declare.INPUT),
    declare.MODEL,
    declare.quantize,
    declare.ADAPTER_FILES,
    declare.NO_ADAPTER,
    declare.BASE_MISMATCH,
    click.option(
        "--port",
        type=click.IntRange(0, 65535),
        default=8080,
        show_default=True,
        help="Port to listen on; 0 takes one that is free.",
    ),
    click.option(
        "--host",
        help=f"Address to listen on; another than a loopback one needs keys. [default: {LOOPBACK}]",
    ),
    click.option(
        "--api-key-file", type=declare.INPUT, help="File of API keys, one a line: requests need one of them."
    ),
    declare.flags(ServeConfig),
    SETS_OPTION,
)
def command(
    registry: Registry,
    run: Path | None,
    model: str,
    adapter_files: tuple[Path, ...],
    no_adapter: bool,
    base_mismatch: str,
    port: int,
    host: str | None,
    api_key_file: Path | None,
    sets: tuple[str, ...],
    **arguments: Any,
) -> None:
    """Serve a model and its adapters over HTTP, by the OpenAI protocol.

    RUN is a run folder, whose base and adapter are served; without one, those
    of --model and --adapter-file are. Base and adapters are models of their
    own, by the names in /v1/models. The address is printed once requests are
    answered; Ctrl-C stops the server when those under way have ended.
    """
    config = declare.config_from(ServeConfig, arguments)
    given = overrides(sets)
    check_sections(given, ("quantize",))
    quantization = asked_quantization(registry, arguments, given)
    if run is None:
        files = adapter_paths(adapter_files, no_adapter)
        adapters = dict(zip(adapter_names(files), files, strict=True))
        asked = Source(model, quantization, adapters, bool(adapter_files), _called(model, adapters))
    else:
        _refuse_beside_run(bool(adapter_files) or no_adapter or quantization is not None)
        asked = _of_run(run, registry)
    require_extra()
    from mlxlora_core.server.guard import Policy, is_loopback
    from mlxlora_core.server.keys import read_keys
    from mlxlora_core.server.run import listen

    keys = read_keys(api_key_file) if api_key_file is not None else ()
    at_home = host is None or is_loopback(host)
    if not at_home and not keys:
        raise UsageError(f"--host {host} lets others ask", fix="add --api-key-file FILE, and give them a key")
    listening = listen(host or LOOPBACK, port)
    with listening:
        start(registry)
        served = _served(asked, registry, base_mismatch == "allow", config)
        _serve(served, Policy(keys, any_host=not at_home), _parts(served, asked, bool(keys)), listening)


def _refuse_beside_run(others: bool) -> None:
    """Refuse options that say again what a run folder says.

    Raises:
        UsageError: one was given.
    """
    given = click.get_current_context().get_parameter_source("model")
    if others or given is not ParameterSource.DEFAULT:
        raise UsageError(
            "RUN says which model and which adapter", fix="leave out --model and the like, or RUN"
        )


def _of_run(run: Path, registry: Registry) -> Source:
    """What a run folder has to serve.

    Raises:
        DataError: it is no run folder.
    """
    if not (run / RECORD).is_file():
        raise DataError("is no run folder", where=run, fix="name the folder that mlxlora run has made")
    recipe = read(run / RECIPE, (), registry)
    base, quantization = base_of(recipe, run / MODEL)
    adapter = run / ADAPTER
    adapters = {run.resolve().name: adapter} if adapter.is_file() else {}
    if not adapters:
        show.progress(f"{run} has no adapter yet: the base alone is served")
    called = _called(source(recipe.model), adapters)
    return Source(str(base), quantization, adapters, named=True, called=called, run=run)


def _served(asked: Source, registry: Registry, any_base: bool, config: ServeConfig) -> Served:
    """An engine of what is asked for, ready."""
    from mlxlora_core.model.several import AdapterSet
    from mlxlora_core.server.served import Served
    from mlxlora_core.serving.engine import Engine
    from mlxlora_core.serving.scheduler import Limits

    adapters = AdapterSet(load_base(located(asked.base), registry, asked.quantization))
    try:
        put_on(adapters, asked.adapters, registry, any_base)
    except ModelError as fault:
        if not asked.named:
            fault.fix = ANOTHER_ADAPTER
        raise
    model = adapters.model
    limits = Limits(places=config.places, queue=config.queue)
    engine = Engine(model.language_model, model.tokenizer, adapters, limits)
    engine.wait_until_ready()
    return Served(engine, model.tokenizer, registry, asked.called, config)


def _called(model: str, adapters: Collection[str]) -> str:
    """What a base is called that is named so: by its name on the Hub, or by the end of its path."""
    found = hub_name(model)
    path = Path(model).absolute()
    name = found.repo if found is not None else path.name if path.is_dir() else path.stem
    return name if name and name not in adapters else "base"


def _parts(served: Served, asked: Source, has_keys: bool) -> list[Part]:
    """The routes that come to those of the protocol: the page and, of a run folder, that of the run."""
    from mlxlora_core.server import live_routes, page_routes
    from mlxlora_core.server.app import Part

    facts = {
        "title": served.base if asked.run is None else asked.run.resolve().name,
        "models": list(served.names),
        "template": served.chats,
        "questions": [] if asked.run is None else _questions(asked.run),
        "token": has_keys,
        "run": asked.run is not None,
    }
    parts = [Part(page_routes.page_routes(facts), page_routes.OPEN_PATHS)]
    if asked.run is not None:
        parts.append(Part(live_routes.live_routes(asked.run, chats=True), live_routes.OPEN_PATHS))
    return parts


def _questions(run: Path) -> list[dict[str, Any]]:
    """What a run asks and how, and what its rows say to it."""
    facts = read_facts(run)
    found = facts.results.get("after") or facts.results.get("before") or {}
    section = facts.recipe.get("generate", {})
    form = {"chat": section.get("chat") is True, "system": str(section.get("system", ""))}
    return [{"prompt": a["prompt"], "answer": a["expected"], **form} for a in found.get("answers", [])]


def _serve(served: Served, policy: Policy, parts: list[Part], listening: socket) -> None:
    """Serve until a signal comes, and end what is under way."""
    from mlxlora_core.server.app import make_app
    from mlxlora_core.server.run import serve, url_of

    config = served.config
    for name in served.names:
        show.progress(f"serving {name}")
    with deferred() as pending:
        show.result(f"{url_of(listening)}\n", end="")
        serve(
            make_app(served, policy, parts, show.progress),
            listening,
            pending,
            connections=config.connections,
            stop=lambda: served.engine.stop(config.stop_timeout),
            stop_seconds=config.stop_timeout,
        )
    show.progress("stopped")
