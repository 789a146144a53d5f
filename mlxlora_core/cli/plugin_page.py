"""The page of a plugin, in Markdown: what it gives, the options of each, and how each is used."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.metadata import metadata
from pathlib import Path
from typing import Any

import click
import tomli_w

from mlxlora_core.errors import PluginError, UsageError, listing, nearest, one_line
from mlxlora_core.options import Option, explain, parse, plain
from mlxlora_core.plugins import KINDS, Component, Plugin, Registry
from mlxlora_core.plugins.sections import config_of
from mlxlora_core.runs.recipe import CHOICES

#: how a page ends, by which it is known again
MARK = "<!-- made by: mlxlora plugins docs"

#: kind -> the command line that calls a component of it
_CALLS = {
    "loader": "mlxlora convert --torch-path PATH --loader {}",
    "adapter": "mlxlora train --adapter {}",
    "quantizer": "mlxlora convert --torch-path PATH --quantize {}",
    "builder": "mlxlora data --builder {} --out data",
    "sampler": 'mlxlora generate --sampler {} --prompt "Q: …"',
    "exporter": "mlxlora export --to {} --out PATH",
    "observer": "mlxlora train --observer {}",
    "evaluator": "mlxlora evaluate --evaluator {}",
    "recipe": "mlxlora run {}",
    "command": "mlxlora {} --help",
}
#: kind -> when a component of it is at work that nobody names
_BY_ITSELF = {
    "tokenizer": "It opens the tokenizer of every model whose files it knows.",
    "adapter-loader": "It opens every `--adapter-file` that it knows.",
    "runtime": "It is started before MLX computes anything; `mlxlora doctor` says what came of it.",
}
#: type of an option without a default -> a value that shows where one goes; numbers are made to fit
_EXAMPLES = {"text": "TEXT", "path": "PATH", "true/false": True}


def find_plugin(name: str, registry: Registry) -> Plugin:
    """The active plugin of a name: that of an entry point, of a distribution, or both with a slash.

    Raises:
        PluginError: there is none, there are several, or it is not active; the message says why.
    """
    found = [plugin for plugin in registry.plugins if plugin.answers_to(name)]
    if len(found) == 1 and found[0].status == "active":
        return found[0]
    if len(found) == 1:
        raise PluginError(f"plugin {found[0]}: {found[0].status}: {found[0].reason}")
    if found:
        raise PluginError(
            f"'{name}' are several plugins: {listing((p.owners[-1] for p in found), 30)}",
            fix="write one of them",
        )
    known = [plugin.name for plugin in registry.plugins]
    raise PluginError(
        f"no plugin '{name}' ({nearest(name, known)}there is {listing(known, 30)})",
        fix="install it, or add its file: -P ./FILE.py",
    )


def page(plugin: Plugin, registry: Registry) -> str:
    """The page of a plugin.

    Args:
        plugin: an active one.
        registry: in which it is.

    Raises:
        PluginError: a command of it cannot be made.
    """
    held = [component for component in registry.components if component.plugin == plugin]
    held.sort(key=lambda component: (list(KINDS).index(component.kind), component.spec.name))
    parts = [f"# {one_line(plugin.name)}", *_about(plugin)]
    rows = ((c.kind, _code(c.spec.name), c.spec.summary) for c in held)
    parts.append(_table(("kind", "name", "what it does"), rows))
    for component in held:
        parts += _component(component, registry)
    for section, (kind, _, _) in CHOICES.items():
        keys = explain(config_of(kind))
        if keys and any(component.kind == kind for component in held):
            parts.append(f"## Beside `use` in `[{section}]`")
            parts.append(_options("key", keys))
    parts.append(f"{MARK} {one_line(plugin.name)} -->")
    return "\n\n".join(parts) + "\n"


def _about(plugin: Plugin) -> Iterator[str]:
    """What the distribution says of itself, and how to have it."""
    if plugin.origin == "file":
        name = one_line(Path(plugin.value).name)
        yield f"A plugin for mlxlora in one file: `-P ./{name}` adds it to a command."
        return
    if plugin.origin == "built-in":
        yield "A plugin that comes with mlxlora."
        return
    said = metadata(plugin.distribution)
    yield one_line(said["Summary"]) if "Summary" in said else "A plugin for mlxlora."
    yield f"Version {one_line(plugin.version)} is installed by:"
    yield f"```console\n$ python -m pip install {one_line(plugin.distribution)}\n```"


def _component(component: Component, registry: Registry) -> Iterator[str]:
    """The part about one component."""
    yield f"## {component.kind} {_code(component.spec.name)}"
    summary = one_line(component.spec.summary)
    yield f"{summary[0].upper()}{summary[1:].removesuffix('.')}."
    for module, wanted in getattr(component.spec, "needs", {}).items():
        yield f"It needs {_code(module)}: {_code(f'python -m pip install {shlex.quote(wanted)}')}."
    own = explain(component.spec.options)
    if own:
        yield _options("option", own)
    yield from _use(component, _name(component, registry), own)


def _name(component: Component, registry: Registry) -> str:
    """What a recipe or a command line calls it: its name, or its full id where others have that name."""
    same = [c for c in registry.of(component.kind) if c.spec.name == component.spec.name]
    return component.spec.name if len(same) == 1 else component.id


def _use(component: Component, name: str, own: Sequence[Option]) -> Iterator[str]:
    """How it is used in a recipe and on the command line."""
    kind = component.kind
    sections = [section for section, (of, _, _) in CHOICES.items() if of == kind]
    needed, shown = _values(component.spec.options, own)
    for section in sections:
        held: dict[str, Any] = {"use": name, **({"options": shown} if shown else {})}
        yield "In a recipe:"
        yield f"```toml\n{tomli_w.dumps({section: held}).strip()}\n```"
    if kind in _CALLS:
        told = needed or dict(list(shown.items())[:1])
        sets = [f"--set {shlex.quote(f'{s}.{n}={_word(v)}')}" for s in sections for n, v in told.items()]
        yield "On the command line:"
        yield f"```console\n$ {' '.join([_CALLS[kind].format(name), *sets])}\n```"
    if kind == "architecture":
        types = _codes(component.spec.model_types)
        yield f"It builds every model whose `config.json` says `model_type` {types}."
        for layout, spelt in component.spec.layouts.items():
            called = _codes(spelt.model_types)
            yield f"In the layout {_code(layout)}, it reads models that are called {called}."
    if kind in _BY_ITSELF:
        yield _BY_ITSELF[kind]
    if kind == "command":
        yield f"```\n{_help(component)}\n```"


def _values(options: type[Any], known: Sequence[Option]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Values that options must be given, made up; and those with all defaults but none and empty ones."""
    rules = {field.name: field.metadata for field in dataclasses.fields(options)}
    needed = {option.name: _example(option, rules[option.name]) for option in known if option.required}
    defaults = {option.name: plain(option.default) for option in known if not option.required}
    bare = [option for option in known if defaults.get(option.name, True) in (None, "", [])]
    for option in bare:  # of several, one may have to be given
        try:
            parse(options, needed, owner="")
            break
        except UsageError:
            needed[option.name] = _example(option, rules[option.name])
    held = {**defaults, **needed}
    return needed, {o.name: held[o.name] for o in known if held[o.name] not in (None, "", [])}


def _example(option: Option, rules: Mapping[str, Any]) -> Any:
    """A value that can stand where an option has none, in plain values."""
    kind = option.type_name.removesuffix(" or none")
    one = _EXAMPLES.get(kind.removeprefix("list of "))
    if rules.get("choices"):
        one = rules["choices"][0]
    elif one is None:
        one = _within(rules)
        one = int(one) if kind.endswith("integer") else float(one)
    return [one] if kind.startswith("list of ") else one


def _within(rules: Mapping[str, Any]) -> float:
    """A number that an option allows."""
    low = rules.get("above") if rules.get("minimum") is None else rules["minimum"]
    high = rules.get("below") if rules.get("maximum") is None else rules["maximum"]
    if low is not None and high is not None:
        return float(low + high) / 2
    return float(low) + 1 if low is not None else 1.0 if high is None else float(high) - 1


def _word(value: Any) -> str:
    """A value as ``--set`` takes it."""
    if isinstance(value, list):
        return ",".join(map(_word, value))
    return str(value).lower() if isinstance(value, bool) else str(value)


def _help(component: Component) -> str:
    """What a command says of itself with ``--help``."""
    command = component.checked("command", component.spec.command(), click.Command)
    context = click.Context(command, info_name=f"mlxlora {component.spec.name}", terminal_width=80)
    return "\n".join(map(one_line, command.get_help(context).splitlines()))


def _options(title: str, known: Iterable[Option]) -> str:
    """A table of options."""
    rows = (
        [
            _code(option.name),
            option.type_name,
            "required" if option.required else _default(option.default),
            option.allowed,
            f"{option.help} ({option.unit})" if option.unit else option.help,
        ]
        for option in known
    )
    return _table((title, "type", "default", "allowed", "meaning"), rows)


def _default(value: object) -> str:
    if value in ((), ""):
        return "empty"
    return "none" if value is None else _code(_word(plain(value)))


def _table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table; a bar in a cell is one of the cell's."""
    lines = [headings, ["---"] * len(headings), *rows]
    cells = ([one_line(cell).replace("|", r"\|") for cell in line] for line in lines)
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def _codes(texts: Iterable[str]) -> str:
    """Names as code, one after the other."""
    return ", ".join(map(_code, texts))


def _code(text: str) -> str:
    """A name or a value as code."""
    return f"`{one_line(text).replace('`', '')}`"
