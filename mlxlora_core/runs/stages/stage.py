"""What a stage of a run is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from mlxlora_core.options import plain
from mlxlora_core.plugins import Choice
from mlxlora_core.plugins.sources import source_digest
from mlxlora_core.runs.events import Event
from mlxlora_core.runs.recipe import Recipe

if TYPE_CHECKING:
    from mlxlora_core.runs.context import Context


class Stage(ABC):
    """A piece of a run that is done once for its inputs.

    Importing one loads nothing heavy: :meth:`work` imports what it needs.

    Attributes:
        name: what the command line, ``run.json`` and the report call it.
        builds_on: names of the stages whose outputs it reads; it is done again when they are.
    """

    name: ClassVar[str]
    builds_on: ClassVar[tuple[str, ...]] = ()

    def wanted(self, recipe: Recipe) -> bool:
        """Whether a recipe asks for it."""
        return True

    @abstractmethod
    def inputs(self, recipe: Recipe) -> Mapping[str, Any]:
        """Plain values of all that the result depends on, beside the stages that it builds on."""

    def outputs(self, folder: Path) -> list[str]:
        """The files that it has written, relative to the run folder ``folder``; a change to one undoes it."""
        return []

    @abstractmethod
    def work(self, context: Context) -> Iterator[Event]:
        """Do it; the last event is a :class:`~mlxlora_core.runs.events.StageDone`.

        Raises:
            MlxloraError: it cannot be done.
        """

    def assist(self, context: Context) -> Iterator[Event]:
        """Do the part of another rank than the first, which does :meth:`work`: nothing, unless it is shared.

        Raises:
            MlxloraError: it cannot be done.
        """
        yield from ()

    def fits(self, result: Mapping[str, Any], recipe: Recipe) -> bool:
        """Whether a result that was read back can be one of this recipe; else the stage is done again."""
        return True

    def words(self, result: Mapping[str, Any]) -> list[str]:
        """What came of it, in lines for a person."""
        return []


def identity_of(choice: Choice | None, config: Any = None) -> list[Any] | None:
    """A component, version and code of its plugin, its options, and what its section holds beside them.

    None for a part that is left out.
    """
    if choice is None:
        return None
    component = choice.component
    plugin = component.plugin
    version = plugin.version if plugin.origin == "built-in" else f"{plugin.version} {source_digest(plugin)}"
    return [component.id, version, plain(choice.options), plain(config)]


def read_by(choice: Choice) -> dict[str, Any]:
    """What a component says that it reads: source -> state.

    Raises:
        PluginError: it says something else.
    """
    function = choice.component.spec.inputs
    given = {} if function is None else function(choice.options)
    if not isinstance(given, Mapping):
        raise choice.component.breach("inputs", type(given).__name__, "source -> state")
    return dict(given)
