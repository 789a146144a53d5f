"""recipe.toml + overrides -> one frozen Recipe; every value knows where it came from.

Precedence: plugin default < recipe < command line. Component sections name a
component and its options::

    [adapter]
    use = "lora"
    options = { rank = 8 }

``--set adapter.rank=16`` is short for ``--set adapter.options.rank=16``.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from mlxlora_core.errors import UsageError, nearest, some
from mlxlora_core.options import explain, option, parse, plain
from mlxlora_core.registry import Component, Registry
from mlxlora_core.train_config import EvaluateConfig, GenerateConfig, TrainConfig

DEFAULT_ADAPTER = "lora"
DEFAULT_QUANTIZER = "affine"
DEFAULT_SAMPLER = "temperature"
DEFAULT_RECIPE = "demo"
COMMAND_LINE = "command line"
DEFAULT = "default"


@dataclass(frozen=True)
class RunConfig:
    """The run as a whole."""

    folder: str = option("", help="run folder to make; left empty, runs/NAME of the recipe")
    seed: int = option(0, help="seed of everything that is random", minimum=0, maximum=2**32 - 1)


@dataclass(frozen=True)
class ModelConfig:
    """Where the base comes from: a checkpoint to convert, or a model folder that is there."""

    torch_path: Path | None = option(None, help="checkpoint to convert")
    mlx_path: Path | None = option(None, help="model folder to use as it is")
    dtype: str = option("float16", help="type of the weights", choices=("float16", "bfloat16", "float32"))
    format: str = option("safetensors", help="format of the weights", choices=("safetensors", "npz"))

    def __post_init__(self) -> None:
        if (self.torch_path is None) == (self.mlx_path is None):
            raise ValueError("wanted either torch_path or mlx_path")


@dataclass(frozen=True)
class AskConfig(GenerateConfig):
    """What to ask the model before and after it is tuned."""

    prompts: tuple[str, ...] = option((), help="prompts; none asks nothing")


@dataclass(frozen=True)
class Choice:
    """A component and its options.

    Attributes:
        component: None where a recipe leaves the part out.
        options: an instance of the component's options.
    """

    component: Component | None
    options: Any = None


@dataclass(frozen=True)
class Recipe:
    """Everything that a run does, with every default filled in.

    Attributes:
        name: of the recipe file or of the folder it stands in.
        origins: ``section.key`` -> where its value came from.
    """

    name: str
    run: RunConfig
    model: ModelConfig
    loader: Choice
    quantize: Choice
    data: Choice
    adapter: Choice
    train: TrainConfig
    evaluate: EvaluateConfig
    sampler: Choice
    generate: AskConfig
    origins: Mapping[str, str] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Path(self.run.folder or f"runs/{self.name}")

    def values(self) -> dict[str, Any]:
        """What ``recipe.toml`` holds: sections of plain values, without the parts left out."""
        out: dict[str, Any] = {}
        for section in (f.name for f in fields(self) if f.name not in ("name", "origins")):
            value = getattr(self, section)
            if not isinstance(value, Choice):
                out[section] = _without_none(plain(value))
            elif value.component is not None:
                out[section] = {"use": value.component.id, "options": _without_none(plain(value.options))}
        return out


#: section -> the dataclass of its values
_PLAIN = {
    "run": RunConfig,
    "model": ModelConfig,
    "train": TrainConfig,
    "evaluate": EvaluateConfig,
    "generate": AskConfig,
}
#: section -> (kind of component, the component when nothing is said)
_CHOICES: dict[str, tuple[str, str | None]] = {
    "loader": ("loader", None),
    "quantize": ("quantizer", None),
    "data": ("builder", None),
    "adapter": ("adapter", DEFAULT_ADAPTER),
    "sampler": ("sampler", "greedy"),
}


def read(path: Path, sets: Iterable[str], registry: Registry) -> Recipe:
    """Read a recipe and put the command line's values over it.

    Args:
        path: recipe.toml; relative paths in it are relative to its folder.
        sets: ``section.key=value``.
        registry: where components are looked up.

    Raises:
        UsageError: no such file, broken TOML, an unknown section or key (the
            nearest one is suggested), a value of a wrong type or range.
        PluginError: a component that is not there.
    """
    text = _text(path)
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as fault:
        raise UsageError(f"is no TOML: {fault}", where=path) from fault
    source = _Source(path, text, document, overrides(sets))
    source.check_sections()
    sections: dict[str, Any] = {name: source.plain(name, kind) for name, kind in _PLAIN.items()}
    for name, (kind, default) in _CHOICES.items():
        sections[name] = source.choice(name, kind, default, registry)
    if sections["data"].component is None:
        known = some(c.spec.name for c in registry.of("builder"))
        raise UsageError(
            "[data] use is required: the dataset builder", where=path, fix=f"name one of {known}"
        )
    name = path.stem if path.stem != "recipe" else path.absolute().parent.name
    return Recipe(name=name, **sections, origins=source.origins)


def overrides(sets: Iterable[str]) -> dict[str, dict[str, Any]]:
    """``section.key=value`` texts as section -> key -> text; ``options.`` is understood.

    Raises:
        UsageError: a text that is no such thing.
    """
    nested: dict[str, dict[str, Any]] = {}
    for text in sets:
        name, equals, value = text.partition("=")
        section, _, key = name.strip().partition(".")
        key = key.removeprefix("options.") if section in _CHOICES else key
        if not equals or not key or "." in key:
            raise UsageError(
                f"--set {text}: wanted section.key=value", fix="for example --set adapter.rank=16"
            )
        nested.setdefault(section, {})[key] = value
    return nested


def choose(
    kind: str, use: str, values: Mapping[str, Any], registry: Registry, where: Path | str = ""
) -> Choice:
    """The component named ``use`` with options made of ``values``.

    Raises:
        PluginError: no such component.
        UsageError: options that it does not have or that are out of range.
    """
    component = registry.find(kind, use)
    owner = f"{kind} '{component.spec.name}'"
    return Choice(component, parse(component.spec.options, values, owner=owner, where=str(where)))


def check_sections(sets: Mapping[str, Any], known: Iterable[str]) -> None:
    """Refuse ``--set`` for a section that a verb does not have.

    Raises:
        UsageError: with the nearest one.
    """
    known = list(known)
    for section in sets:
        if section not in known:
            raise UsageError(
                f"--set {section}: no such section ({nearest(section, known)}there is {some(known)})"
            )


class _Source:
    """One recipe file and what the command line puts over it."""

    def __init__(
        self, path: Path, text: str, document: Mapping[str, Any], sets: Mapping[str, dict[str, Any]]
    ) -> None:
        self.path, self._text, self._document, self._sets = path, text, document, sets
        self.origins: dict[str, str] = {}

    def check_sections(self) -> None:
        """Refuse sections that a recipe does not have."""
        known = [*_PLAIN, *_CHOICES]
        for name in self._document:
            if name not in known:
                raise UsageError(
                    f"no section '{name}' ({nearest(name, known)}there is {some(known, 20)})",
                    where=self._place(name),
                )
            if not isinstance(self._document[name], dict):
                raise UsageError(f"'{name}' must be a table", where=self._place(name))
        check_sections(self._sets, known)

    def plain(self, section: str, kind: type[Any]) -> Any:
        """The values of a section that is not about a component."""
        return parse(
            kind,
            self._values(section, kind, self._document.get(section, {})),
            owner=f"[{section}]",
            where=self._where(section),
        )

    def choice(self, section: str, kind: str, default: str | None, registry: Registry) -> Choice:
        """The component of a section, with its options."""
        table = dict(self._document.get(section, {}))
        sets = self._sets.get(section, {})
        written = table.pop("use", None)
        use = sets.get("use", written if written is not None else default)
        self.origins[f"{section}.use"] = (
            COMMAND_LINE if "use" in sets else self.path.name if written is not None else DEFAULT
        )
        if not use or use == "none":
            self._refuse_orphans(section, sets, table)
            return Choice(None)
        if not isinstance(use, str):
            raise UsageError(f"[{section}] use: wanted text, got {use!r}", where=self._where(section))
        options = table.pop("options", {}) | table
        if "use" in sets and written not in (None, use):
            options = {}  # they belong to the component that was replaced
        component = registry.find(kind, use)
        values = self._values(section, component.spec.options, options)
        return choose(kind, use, values, registry, self._where(section))

    def _refuse_orphans(self, section: str, sets: Mapping[str, Any], table: Mapping[str, Any]) -> None:
        orphans = [key for key in (*table, *sets) if key != "use"]
        if orphans and "use" not in sets:
            raise UsageError(
                f"[{section}] has {some(orphans)} but names no component",
                where=self._where(section),
                fix="add use =",
            )

    def _values(self, section: str, kind: type[Any], table: Mapping[str, Any]) -> dict[str, Any]:
        """File values with the command line's over them; notes where each came from."""
        sets = {key: value for key, value in self._sets.get(section, {}).items() if key != "use"}
        values = {}
        for known in explain(kind):
            name = known.name
            origin = COMMAND_LINE if name in sets else self.path.name if name in table else DEFAULT
            self.origins[f"{section}.{name}"] = origin
        for name, value in table.items():
            values[name] = self._rooted(value) if _is_path(kind, name) else value
        return values | sets

    def _rooted(self, value: Any) -> Any:
        """A path in the recipe, relative to the recipe's folder."""
        if isinstance(value, list):
            return [self._rooted(item) for item in value]
        return self.path.parent / Path(value).expanduser() if isinstance(value, str) and value else value

    def _where(self, section: str) -> str:
        return self._place(section) if section in self._document else str(self.path)

    def _place(self, name: str) -> str:
        """``file:line`` of the first line that opens a table or sets a key of that name."""
        pattern = re.compile(rf"^\s*(\[+\s*)?{re.escape(name)}\b", re.MULTILINE)
        match = pattern.search(self._text)
        return f"{self.path}:{self._text[: match.start()].count(chr(10)) + 1}" if match else str(self.path)


def _text(path: Path) -> str:
    try:
        return path.read_text("utf-8-sig")
    except FileNotFoundError as fault:
        raise UsageError("there is no such recipe", where=path) from fault
    except (OSError, UnicodeDecodeError) as fault:
        raise UsageError(f"cannot be read: {fault}", where=path) from fault


def _is_path(kind: type[Any], name: str) -> bool:
    return any(known.name == name and "path" in known.type_name for known in explain(kind))


def _without_none(values: Mapping[str, Any]) -> dict[str, Any]:
    """TOML has no none: what is not set is not written."""
    return {key: value for key, value in values.items() if value is not None}
