"""A plugin, the components that it gives, and the kinds that there are."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from mlxlora_core import specs
from mlxlora_core.errors import PluginError

DISTRIBUTION = "mlxlora"

#: kind -> (the hook that gives it, the class of its specs)
KINDS: dict[str, tuple[str, type[specs.Spec]]] = {
    "loader": ("mlxlora_weight_loaders", specs.WeightLoader),
    "tokenizer": ("mlxlora_tokenizers", specs.TokenizerLoader),
    "architecture": ("mlxlora_architectures", specs.Architecture),
    "adapter": ("mlxlora_adapters", specs.Adapter),
    "adapter-loader": ("mlxlora_adapter_loaders", specs.AdapterLoader),
    "quantizer": ("mlxlora_quantizers", specs.Quantizer),
    "builder": ("mlxlora_dataset_builders", specs.DatasetBuilder),
    "sampler": ("mlxlora_samplers", specs.Sampler),
    "exporter": ("mlxlora_exporters", specs.Exporter),
    "observer": ("mlxlora_observers", specs.Observer),
    "evaluator": ("mlxlora_evaluators", specs.Evaluator),
    "command": ("mlxlora_commands", specs.Command),
    "runtime": ("mlxlora_runtimes", specs.Runtime),
    "recipe": ("mlxlora_recipes", specs.RecipeFile),
}

T = TypeVar("T")

Status = Literal["active", "disabled", "not selected", "error"]


@dataclass(frozen=True)
class Plugin:
    """One entry point, or one file named with ``-P``, and what became of it.

    Attributes:
        name: the entry-point name.
        distribution: who ships it.
        version: of the distribution.
        origin: ``built-in``, ``installed`` or ``file``.
        value: what the entry point names, or the path of the file.
        status: ``active``, ``disabled``, ``not selected`` or ``error``.
        reason: why it is not active.
        components: (kind, name) of what it gives.
        fault: the exception behind an error, for its traceback.
    """

    name: str
    distribution: str
    version: str
    origin: str
    value: str
    status: Status = "active"
    reason: str = ""
    components: tuple[tuple[str, str], ...] = ()
    fault: BaseException | None = field(default=None, repr=False, compare=False)

    def __str__(self) -> str:
        return f"{self.name} ({self.distribution} {self.version})".replace(" )", ")")

    def answers_to(self, name: str) -> bool:
        """Whether ``name`` is this plugin's entry point, its distribution, or ``distribution/plugin``."""
        return normal_name(name) in map(normal_name, self.owners)

    @property
    def owners(self) -> tuple[str, str, str]:
        """What may stand before the colon of a full id, shortest first."""
        return self.name, self.distribution, f"{self.distribution}/{self.name}"


@dataclass(frozen=True)
class Component:
    """A spec and the plugin that it came from.

    Attributes:
        kind: a key of :data:`KINDS`.
        spec: what the plugin handed over.
        plugin: who handed it over.
        owner: what stands before the colon of its full id; the plugin's name
            unless the registry needs more to tell two plugins apart.
    """

    kind: str
    spec: Any
    plugin: Plugin
    owner: str = ""

    @property
    def id(self) -> str:
        """The full id ``plugin:name``; in a registry it stands for this component alone."""
        return f"{self.owner or self.plugin.name}:{self.spec.name}"

    def checked(self, function: str, value: Any, wanted: type[T]) -> T:
        """``value``, which ``function`` of the spec has returned.

        Raises:
            PluginError: it is not what the contract says.
        """
        if not isinstance(value, wanted):
            raise self.breach(function, type(value).__name__, wanted.__name__)
        return value

    def breach(self, function: str, got: str, want: str) -> PluginError:
        """The error that ``function`` of the spec broke its contract: it gave ``got``."""
        return PluginError(f"{self.kind} {self.id}: {function} gives {got}, wanted {want}")

    def answers_to(self, name: str) -> bool:
        """Whether ``name`` is this component's name or one of its full ids."""
        owner, _, bare = name.rpartition(":")
        return bare == self.spec.name and (not owner or self.plugin.answers_to(owner))


@dataclass(frozen=True)
class Choice:
    """A component and the options that it is used with.

    Attributes:
        component: which one.
        options: an instance of its options.
    """

    component: Component
    options: Any


def normal_name(name: str) -> str:
    """A distribution or plugin name as PEP 503 compares them."""
    return re.sub(r"[-_.]+", "-", name.strip()).lower()
