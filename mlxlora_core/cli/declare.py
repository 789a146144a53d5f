"""Command-line options, each declared once: those that verbs share, and those of option dataclasses."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from mlxlora_core.options import Option, explain, items, parse
from mlxlora_core.path_text import check_path
from mlxlora_core.plugins.defaults import DEFAULT_QUANTIZER, DEFAULT_SAMPLER
from mlxlora_core.training import sources

T = TypeVar("T")

COMMON = "Options"  # what options stand under that no section has

if TYPE_CHECKING:
    _ParamType = click.ParamType[Path]
else:
    _ParamType = click.ParamType  # which is generic only since click 8.2


class PathType(_ParamType):
    """The path of a file or folder that is read or written, whose name at least makes sense.

    Attributes:
        writes: ``file`` or ``folder``, where it is written; or nothing.
    """

    name = "path"

    def __init__(self, writes: str = "") -> None:
        self.writes = writes

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        """The value as a path."""
        try:
            check_path(str(value))
        except ValueError as fault:
            self.fail(str(fault), param, ctx)
        return Path(value)


class NameOrPathType(PathType):
    """A path, or a name that stands for one, as it was given."""

    name = "text"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The text, which is a path at least."""
        super().convert(value, param, ctx)
        return value


INPUT, OUTPUT_FILE, OUTPUT_FOLDER = PathType(), PathType("file"), PathType("folder")
NAME_OR_PATH = NameOrPathType()

# What several verbs have, and mean the same by.
SOURCES = (
    "Hugging Face or mlx-lm folder, GGUF file, package:NAME/FILE of an installed distribution, "
    "ORG/NAME[@REVISION] on the Hub"
)
MODEL = click.option(
    "--model",
    type=NAME_OR_PATH,
    default="mlx_model",
    show_default=True,
    help=f"Model folder, or any other model: {SOURCES}.",
)
DEFAULT_ADAPTER_FILE = Path("adapters.safetensors")  # what train writes, and others read where it is
ADAPTER_FILE = click.option(
    "--adapter-file",
    type=INPUT,
    help="Adapter to put on the model: a file, or a folder or file of PEFT or mlx-lm. "
    f"[default: {DEFAULT_ADAPTER_FILE}, where that is]",
)
ADAPTER_FILES = click.option(
    "--adapter-file",
    "adapter_files",
    type=INPUT,
    multiple=True,
    help="Adapter to put on the model, as for generate. May be repeated; each is called by the name of its "
    f"file or folder. [default: {DEFAULT_ADAPTER_FILE}, where that is]",
)
NO_ADAPTER = click.option("--no-adapter", is_flag=True, help="Take the model as it is.")
ADAPTER = click.option("--adapter", help="Insist on this adapter. [default: what the file says]")
BASE_MISMATCH = click.option(
    "--base-mismatch",
    type=click.Choice(["refuse", "allow"]),
    default="refuse",
    show_default=True,
    help="Whether an adapter may go on another base than its own, such as the same model in other bits.",
)
_QUANTIZE = (
    click.option(
        "-q",
        "--quantize",
        is_flag=False,
        flag_value=DEFAULT_QUANTIZER,
        metavar="[NAME]",
        help="Quantize dense linears, each as it is read, by the quantizer NAME. "
        f"[default of NAME: {DEFAULT_QUANTIZER}]",
    ),
    click.option(
        "--q-group-size", metavar="WEIGHTS", help="Weights that share one scale and bias. [default: 64]"
    ),
    click.option("--q-bits", metavar="BITS", help="Bits a weight. [default: 4]"),
)
SAMPLER = click.option(
    "--sampler", help=f"Samplers, in order: NAME or NAME,NAME. [default: {DEFAULT_SAMPLER}]"
)
TEMP = click.option("--temp", help="Sampling temperature; 0 is argmax. [default: 0.8]")
_SETTINGS = (
    click.option("--top-k", metavar="TOKENS", help="Only the so many most likely tokens take part."),
    click.option("--top-p", metavar="P", help="Only the likely tokens that reach this probability together."),
    click.option("--min-p", metavar="P", help="Only tokens with this share of the highest probability."),
    click.option(
        "--repetition-penalty", metavar="FACTOR", help="Divides the logits of tokens that came before."
    ),
    click.option(
        "--presence-penalty", metavar="NUMBER", help="Taken from the logits of tokens that came before."
    ),
    click.option(
        "--frequency-penalty", metavar="NUMBER", help="Taken from them for each time that one came."
    ),
)
STOP = click.option(
    "--stop", multiple=True, metavar="TEXT", help="End the text before this one. May be repeated."
)
SEED = click.option(
    "--seed", type=click.IntRange(0, 2**32 - 1), default=0, show_default=True, help="Random seed."
)
COLUMNS = click.option(
    "--columns",
    multiple=True,
    metavar="NAME=COLUMN",
    help="Read NAME from this column, such as prompt=question,completion=answer. May be repeated.",
)


def quantize(function: Any) -> Any:
    """Add the options that say how dense linears are quantized as they are read."""
    for decorate in reversed(_QUANTIZE):
        function = decorate(function)
    return function


def settings(function: Any) -> Any:
    """Add an option for each of :data:`mlxlora_core.runs.samplers.SETTINGS`."""
    for decorate in reversed(_SETTINGS):
        function = decorate(function)
    return function


def columns_from(given: tuple[str, ...]) -> dict[str, str]:
    """What is read -> the column that it is read from, from the texts of ``--columns``.

    Raises:
        UsageError: a text that is no such thing.
    """
    return sources.columns_from((item for text in given for item in items(text)), "--columns")


def data(files: str) -> Callable[[Any], Any]:
    """The option for a dataset folder, of which a verb reads ``files``."""
    return click.option(
        "--data",
        type=INPUT,
        default=Path("data"),
        show_default=True,
        help=f"Folder with {files}, or one file.",
    )


def section(title: str, *decorators: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """A decorator that adds options which stand under ``title`` in the help of their verb."""

    def decorate(function: Any) -> Any:
        before = list(getattr(function, "__click_params__", ()))
        for decorator in reversed(decorators):
            function = decorator(function)
        for parameter in function.__click_params__[len(before) :]:
            parameter.section = title
        return function

    return decorate


def sections(command: click.Command, ctx: click.Context) -> dict[str, list[click.Option]]:
    """The options of a verb by the titles that they stand under, those under none last."""
    by_title: dict[str, list[click.Option]] = {}
    for option in command.get_params(ctx):
        if isinstance(option, click.Option) and not option.hidden:
            by_title.setdefault(getattr(option, "section", COMMON), []).append(option)
    return {title: by_title[title] for title in sorted(by_title, key=lambda title: title == COMMON)}


def flags(
    config: type[Any], beside: type[Any] | None = None, *, letters: bool = True
) -> Callable[[Any], Any]:
    """A decorator that adds one option for each field of ``config`` that ``beside`` does not have.

    With ``letters`` off, none gets its letter, which means something else in this verb.
    Values arrive as None when the user said nothing, so that defaults stay the dataclass's own.
    """

    def decorate(function: Any) -> Any:
        others = {known.name for known in explain(beside)} if beside else set()
        for known in reversed(explain(config)):
            if known.name not in others:
                function = _flag(known, letters)(function)
        return function

    return decorate


def config_from(config: type[T], arguments: Mapping[str, Any]) -> T:
    """The value of ``config`` from parsed arguments, checked.

    Raises:
        UsageError: values out of range, all of them told.
    """
    names = {field.name for field in dataclasses.fields(config)}  # type: ignore[arg-type]  # a dataclass
    given = {name: value for name, value in arguments.items() if name in names and value is not None}
    return parse(config, given, owner="the command line", spell=flag_name)


def flag_name(name: str) -> str:
    """``batch_size`` as it is written: ``--batch-size``."""
    return "--" + name.replace("_", "-")


def _flag(known: Option, letters: bool) -> Callable[[Any], Any]:
    names = [flag_name(known.name), *([f"-{known.letter}"] if known.letter and letters else [])]
    help_text = _sentence(known)
    if known.type is bool:
        return click.option(*names, known.name, is_flag=True, default=None, help=help_text)
    # Conversion is left to the dataclass, so that a wrong value reads the same here and in a recipe.
    metavar = (known.unit or known.type_name.split(" or ")[0]).upper()
    return click.option(*names, known.name, default=None, metavar=metavar, help=help_text)


def _sentence(known: Option) -> str:
    facts = [f"default: {'none' if known.default is None else known.default}"]
    if known.allowed:
        facts.append(known.allowed)
    return f"{known.help[0].upper()}{known.help[1:]}. [{'; '.join(facts)}]"
