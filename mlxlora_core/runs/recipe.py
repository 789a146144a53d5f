"""What a recipe holds: one frozen Recipe, in which every value knows where it came from.

Precedence: plugin default < recipe < command line. Component sections name a
component, its options, and what core decides beside it::

    [adapter]
    use = "lora"
    layers = 16
    options = { rank = 8 }

``--set adapter.rank=16`` is short for ``--set adapter.options.rank=16``. The
section of samplers may name several, see :mod:`mlxlora_core.runs.samplers`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from mlxlora_core.errors import UsageError, listing, nearest
from mlxlora_core.options import NoOptions, convert, option, plain
from mlxlora_core.path_text import path_text
from mlxlora_core.plugins import Choice, Registry
from mlxlora_core.plugins.defaults import DEFAULT_ADAPTER
from mlxlora_core.plugins.sections import AdapterConfig, Quantization, QuantizeConfig, SplitConfig, configure
from mlxlora_core.runs import samplers
from mlxlora_core.runs.requirements import PluginsConfig, check_libraries
from mlxlora_core.training.settings import ChatConfig, EvaluateConfig, SaveConfig, ScoreConfig, TrainConfig

COMMAND_LINE = "command line"
DEFAULT = "default"
NONE = "none"


@dataclass(frozen=True)
class RunConfig:
    """The run as a whole."""

    folder: str = option("", help="run folder to make; left empty, runs/NAME of the recipe")
    seed: int = option(0, help="seed of everything that is random", minimum=0, maximum=2**32 - 1)

    def __post_init__(self) -> None:
        if self.folder:
            convert(self.folder, Path)


@dataclass(frozen=True)
class ModelConfig:
    """Where the base comes from: a checkpoint to convert, or a model folder that is there."""

    torch_path: Path | None = option(None, help="model to convert, by whatever --model takes")
    mlx_path: Path | None = option(None, help="model to use as it is, by whatever --model takes")
    dtype: str | None = option(
        None,
        help="type of the converted weights; none is float16 of a .pth, else as stored",
        choices=("stored", "float16", "bfloat16", "float32"),
    )
    format: str = option("safetensors", help="format of the weights", choices=("safetensors", "npz"))

    def __post_init__(self) -> None:
        if (self.torch_path is None) == (self.mlx_path is None):
            raise ValueError("wanted either torch_path or mlx_path")


@dataclass(frozen=True)
class AskConfig(ChatConfig):
    """What to ask the model before and after it is tuned."""

    prompts: tuple[str, ...] = option((), help="prompts; none asks nothing")
    num_tokens: int = option(100, help="most tokens in an answer", unit="tokens", minimum=1)


@dataclass(frozen=True)
class MeasureConfig(ScoreConfig, EvaluateConfig):
    """What is measured before and after: losses, on what beside the held-out rows, and scores."""

    general_rows: Path | None = option(
        None, help="file of rows of another kind: their loss, before and after, shows what was forgotten"
    )


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
    loader: Choice | None
    quantize: Choice | None
    quantize_config: QuantizeConfig
    data: Choice
    data_config: SplitConfig
    adapter: Choice
    adapter_config: AdapterConfig
    train: TrainConfig
    checkpoints: SaveConfig
    evaluate: MeasureConfig
    evaluator: tuple[Choice, ...]
    sampler: tuple[Choice, ...]
    generate: AskConfig
    export: Choice | None
    observe: tuple[Choice, ...]
    plugins: PluginsConfig
    origins: Mapping[str, str] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        """The run folder; a relative one is in the working folder, not beside the recipe."""
        folder: Path = convert(self.run.folder or f"runs/{self.name}", Path)
        return folder

    @property
    def quantization(self) -> Quantization | None:
        """How the base is quantized, when it is converted or, used as it is, when it is opened."""
        return None if self.quantize is None else Quantization(self.quantize, self.quantize_config)

    def values(self) -> dict[str, Any]:
        """What ``recipe.toml`` holds: sections of plain values, without the parts left out."""
        out: dict[str, Any] = {}
        for section in (f.name for f in fields(self) if f.name in SECTIONS):
            value = getattr(self, section)
            if section in CHAINS and len(value) > 1:
                out[section] = _chain_values(value)
                continue
            if section in CHAINS:
                value = value[0] if value else None
            if isinstance(value, Choice):
                config = getattr(self, f"{section}_config", NoOptions())
                options = {"options": without_none(plain(value.options))}
                out[section] = {"use": value.component.id, **without_none(plain(config)), **options}
            elif value is not None:
                out[section] = without_none(plain(value))
        if self.run.folder:
            out["run"]["folder"] = path_text(self.folder)
        return out


#: section -> the dataclass of its values
PLAIN = {
    "run": RunConfig,
    "model": ModelConfig,
    "train": TrainConfig,
    "checkpoints": SaveConfig,
    "evaluate": MeasureConfig,
    "generate": AskConfig,
    "plugins": PluginsConfig,
}
#: section -> (kind of component, the component when nothing is said, whether a run needs one)
CHOICES: dict[str, tuple[str, str, bool]] = {
    "loader": ("loader", NONE, False),
    "quantize": ("quantizer", NONE, False),
    "data": ("builder", NONE, True),
    "adapter": ("adapter", DEFAULT_ADAPTER, True),
    "sampler": ("sampler", "greedy", True),
    "evaluator": ("evaluator", NONE, False),
    "export": ("exporter", NONE, False),
    "observe": ("observer", NONE, False),
}
SECTIONS = (*PLAIN, *CHOICES)
#: the sections that may name several components
CHAINS = ("sampler", "evaluator", "observe")


def overrides(sets: Iterable[str]) -> dict[str, dict[str, Any]]:
    """``section.key=value`` texts as section -> key -> text; ``options.`` is understood.

    Raises:
        UsageError: a text that is no such thing.
    """
    nested: dict[str, dict[str, Any]] = {}
    for text in sets:
        name, equals, value = text.partition("=")
        section, _, key = (part.strip() for part in name.partition("."))
        key = key.removeprefix("options.") if section in CHOICES else key
        if not equals or not key or ("." in key and section not in CHAINS):
            raise UsageError(
                f"--set {text}: wanted section.key=value", fix="for example --set adapter.rank=16"
            )
        nested.setdefault(section, {})[key] = value
    return nested


def choose(kind: str, use: str, values: Mapping[str, Any], registry: Registry) -> tuple[Choice, Any]:
    """The component named ``use`` with its options, and what its section holds beside them.

    Raises:
        PluginError: no such component.
        UsageError: values that neither has or that are out of range.
    """
    return configure(registry.find(kind, use), values)


def choose_samplers(use: str, values: Mapping[str, Any], registry: Registry) -> tuple[Choice, ...]:
    """The samplers named in ``"a,b"``, with options made of ``values``.

    Raises:
        PluginError: no such sampler.
        UsageError: none is named, or one twice; options that are out of range or
            that none of them, or several, have.
    """
    components = registry.find_all([("sampler", name) for name in samplers.names(use)])
    if not components:
        raise UsageError(f"wanted a sampler, got {use!r}", fix="see: mlxlora components sampler")
    rows = samplers.deal(values, components)
    samplers.cool_others(rows, components)
    return tuple(configure(c, row)[0] for c, row in zip(components, rows, strict=True))


def choose_beside(
    kind: str, names: Sequence[str], values: Mapping[str, Any], registry: Registry
) -> tuple[Choice, ...]:
    """The observers or evaluators of these names, with options made of ``values``.

    Raises:
        PluginError: no such component, or one whose library is not installed.
        UsageError: one is named twice; options, but no component; or as :func:`choose_samplers`.
    """
    components = registry.find_all([(kind, name) for name in names])
    if values and not components:
        raise UsageError(f"options of an {kind} ({listing(values)}), but none is named", fix="name it")
    rows = samplers.deal(values, components)
    for component in components:
        check_libraries(component)
    return tuple(configure(c, row)[0] for c, row in zip(components, rows, strict=True))


def check_sections(sets: Mapping[str, Any], known: Iterable[str]) -> None:
    """Refuse ``--set`` for a section that a verb does not have.

    Raises:
        UsageError: with the nearest one.
    """
    known = list(known)
    for section in sets:
        if section not in known:
            raise UsageError(
                f"--set {section}: no such section ({nearest(section, known)}there is {listing(known)})"
            )


def _chain_values(choices: Sequence[Choice]) -> dict[str, Any]:
    """Several components as a section holds them: each option is written COMPONENT.OPTION."""
    components = [choice.component for choice in choices]
    options = {
        f"{label}.{name}": value
        for label, choice in zip(samplers.labels(components), choices, strict=True)
        for name, value in without_none(plain(choice.options)).items()
    }
    return {"use": [component.id for component in components], "options": options}


def without_none(values: Mapping[str, Any]) -> dict[str, Any]:
    """TOML has no none: what is not set is not written."""
    return {key: value for key, value in values.items() if value is not None}
