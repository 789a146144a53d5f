"""``mlxlora chat``: a conversation with a model on the terminal."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mlxlora_core.cli import declare
from mlxlora_core.cli.chat_lines import open_lines
from mlxlora_core.cli.chat_session import AnswerConfig, Manner, Session
from mlxlora_core.cli.model import (
    ANOTHER_ADAPTER,
    adapter_names,
    adapter_paths,
    asked_quantization,
    given_text,
    load_base,
    located,
    put_on,
)
from mlxlora_core.cli.session import SETS_OPTION, start, verb
from mlxlora_core.errors import DataError, ModelError, UsageError
from mlxlora_core.model.stop_texts import checked_stops
from mlxlora_core.plugins import Registry
from mlxlora_core.plugins.sections import Quantization
from mlxlora_core.runs.recipe import check_sections, overrides
from mlxlora_core.runs.samplers import check_samplers

if TYPE_CHECKING:
    from mlxlora_core.model.several import AdapterSet
    from mlxlora_core.model.tokenizers import CheckedTokenizer


@verb(
    declare.MODEL,
    declare.quantize,
    declare.ADAPTER_FILES,
    declare.NO_ADAPTER,
    declare.BASE_MISMATCH,
    click.option("--compare", is_flag=True, help="Let base and adapter answer, one under the other."),
    click.option("--system", default="", help="System message in front of the conversation."),
    declare.TEMP,
    declare.settings,
    declare.SAMPLER,
    declare.flags(AnswerConfig),
    declare.STOP,
    click.option("--no-history", is_flag=True, help="Neither read nor keep what was asked."),
    SETS_OPTION,
)
def command(
    registry: Registry,
    model: str,
    adapter_files: tuple[Path, ...],
    no_adapter: bool,
    base_mismatch: str,
    compare: bool,
    system: str,
    sampler: str | None,
    stop: tuple[str, ...],
    no_history: bool,
    sets: tuple[str, ...],
    **arguments: Any,
) -> None:
    """Talk to a model on the terminal, with and without adapters.

    It is asked in the form of its chat template. Lines are edited, the arrows bring back those of before, and
    /help lists what can be changed on the way. Out of a pipe each line is a
    question. Only answers go to stdout.
    """
    given = overrides(sets)
    check_sections(given, ("sampler", "quantize"))
    files = adapter_paths(adapter_files, no_adapter)
    names = adapter_names(files)
    if compare and not files:
        raise UsageError("--compare needs an adapter", fix="add --adapter-file")
    settings = {name: value for name, value in arguments.items() if value is not None}
    manner = Manner(
        registry, sampler, given.get("sampler", {}), settings, checked_stops(map(given_text, stop))
    )
    chosen, _ = manner.samplers, manner.config
    quantization = asked_quantization(registry, arguments, given)
    start(registry)
    check_samplers(chosen)
    adapters = _load(model, registry, quantization)
    try:
        put_on(adapters, dict(zip(names, files, strict=True)), registry, base_mismatch == "allow")
    except ModelError as fault:
        if not adapter_files:
            fault.fix = ANOTHER_ADAPTER
        raise
    first = next(iter(names), None)
    session = Session(adapters, first, given_text(system), manner, compare=compare)
    session.run(open_lines(not no_history, session.words))


def _load(model: str, registry: Registry, quantization: Quantization | None) -> AdapterSet:
    """A model that chats, without an adapter yet."""
    from mlxlora_core.model.several import AdapterSet

    base = load_base(located(model), registry, quantization)
    _require_chat(base.tokenizer, base.folder)
    return AdapterSet(base)


def _require_chat(tokenizer: CheckedTokenizer, where: Path) -> None:
    """Refuse a model whose tokenizer has no form for conversations.

    Raises:
        ModelError: with what to do.
    """
    try:
        tokenizer.render([{"role": "user", "content": "Hello"}])
    except DataError as fault:
        raise ModelError(
            f"this model does not chat: {fault.what}",
            where=where,
            fix="let it continue texts with mlxlora generate, or put the chat_template.jinja of its chat "
            "version beside its tokenizer",
        ) from fault
