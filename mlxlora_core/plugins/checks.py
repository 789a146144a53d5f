"""Checks what a plugin hands over when it is loaded."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields
from numbers import Real
from pathlib import Path
from typing import Any

import pluggy

from mlxlora_core import hookspecs, specs
from mlxlora_core.errors import PluginError, bounded, listing, nearest
from mlxlora_core.options import check_declaration, explain
from mlxlora_core.plugins.plugin import KINDS, Component
from mlxlora_core.plugins.sections import config_of
from mlxlora_core.values import Tokenizer, Transform

_NAME = re.compile(r"[a-z0-9][a-z0-9-]*")
_PART = re.compile(r"(?!bias$)[A-Za-z][A-Za-z0-9_]*")

#: what a recipe writes beside the options of a component
_RESERVED = {"use", "options"}

#: kind -> its functions, and what each is called with
FUNCTIONS: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "loader": {"detect": ("path",), "open": ("path", "options")},
    "tokenizer": {"detect": ("files",), "open": ("files", "options")},
    "architecture": {
        "read": ("config", "shapes"),
        "tensors": ("found", "args"),
        "build": ("args",),
        "notes": ("config", "shapes"),
    },
    "adapter": {
        "wrap": ("linear", "place", "options"),
        "fuse": ("module", "weight"),
        "low_rank": ("module",),
        "learning_rates": ("options",),
        "initialise": ("module",),
        "fuse_bias": ("module", "bias"),
    },
    "adapter-loader": {"detect": ("path",), "open": ("path", "options")},
    "quantizer": {
        "quantize": ("weight", "options"),
        "dequantize": ("parts", "options"),
        "matmul": ("x", "parts", "options"),
        "bind": ("parts", "options"),
    },
    "builder": {"build": ("options",), "inputs": ("options",)},
    "sampler": {"build": ("options",)},
    "exporter": {
        "export": ("source", "target", "options"),
        "packed": ("options",),
        "wrote": ("path",),
    },
    "observer": {"start": ("run", "options")},
    "evaluator": {"score": ("answer", "options"), "prepare": ("options",), "inputs": ("options",)},
    "command": {"command": ()},
    "runtime": {"start": ()},
    "recipe": {},
}

#: kind -> function -> what it is called with besides, where it has a parameter of that name
_ASKED = {"sampler": {"build": "tokenizer"}}

#: annotation of a spec's field -> what its value must be, in words and as a test
_FIELDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "str": ("text", lambda value: isinstance(value, str) and bool(value.strip())),
    "Path": ("a Path", lambda value: isinstance(value, Path)),
    "tuple[str, ...]": (
        "a tuple of texts",
        lambda value: isinstance(value, tuple) and all(isinstance(item, str) for item in value),
    ),
    "Mapping[str, str]": (
        "a mapping of texts to texts",
        lambda value: (
            isinstance(value, Mapping)
            and all(isinstance(text, str) for item in value.items() for text in item)
        ),
    ),
    "Mapping[str, Layout]": ("a mapping of names to layouts", lambda value: not _layouts_fault(value)),
}

#: what fields of an exporter may say
_EXPORTER_WORDS = {"takes": ("model", "adapter"), "opens": ("", "model", "adapter")}

#: the functions of a layout, and what each is called with
_LAYOUT_FUNCTIONS = {
    "read": ("config", "shapes"),
    "table": ("args",),
    "notes": ("config", "shapes"),
    "write": ("args",),
}
_OPTIONAL = ("notes", "write")


def collect_specs(module: Any) -> Iterable[tuple[str, specs.Spec]]:
    """The checked specs of one plugin, kind by kind."""
    version = getattr(module, "mlxlora_api", hookspecs.API_VERSION)
    if version != hookspecs.API_VERSION:
        raise PluginError(f"it needs plugin API {version}, this is {hookspecs.API_VERSION}")
    by_name = _hooks(module)
    for kind, (hook, _) in KINDS.items():
        names: set[str] = set()
        for function in by_name.get(hook, ()):
            for spec in _specs(hook, function()):
                _check(kind, spec)
                if spec.name in names:
                    raise PluginError(f"{hook} gives '{spec.name}' twice")
                names.add(spec.name)
                yield kind, spec


def _hooks(module: Any) -> dict[str, list[Callable[[], Any]]]:
    """hook -> its implementations in ``module``; what is no hook, or is not marked as one, is refused."""
    manager = pluggy.PluginManager(hookspecs.PROJECT)
    manager.add_hookspecs(hookspecs)
    manager.register(module, "plugin")
    known = sorted(hook for hook, _ in KINDS.values())
    by_name: dict[str, list[Callable[[], Any]]] = {}
    for caller in manager.get_hookcallers(module) or ():
        implementations = [i for i in caller.get_hookimpls() if i.plugin is module]
        by_name[caller.name] = [implementation.function for implementation in implementations]
        # An optional hook is one that only some versions of mlxlora have.
        if caller.name not in known and not all(i.optionalhook for i in implementations):
            raise PluginError(
                f"unknown hook '{caller.name}' ({nearest(caller.name, known)}there is {listing(known)})"
            )
    unmarked = [name for name in known if name not in by_name and callable(getattr(module, name, None))]
    if unmarked:
        raise PluginError(f"{listing(unmarked)} lacks @hookimpl")
    if not by_name:
        raise PluginError("it implements no hook of mlxlora")
    return by_name


def _specs(hook: str, given: Any) -> list[Any]:
    if isinstance(given, specs.Spec):
        return [given]
    if given is None or isinstance(given, (str, bytes)) or not isinstance(given, Iterable):
        raise PluginError(f"{hook} gives {type(given).__name__}, wanted an iterable of specs")
    return list(given)


def _check(kind: str, spec: Any) -> None:
    """Refuse a spec that would only fail later, when it is used."""
    hook, wanted = KINDS[kind]
    if not isinstance(spec, wanted):
        raise PluginError(f"{hook} gives {type(spec).__name__}, wanted {wanted.__name__}")
    if not isinstance(spec.name, str) or not _NAME.fullmatch(spec.name) or spec.name == "none":
        raise PluginError(f"{hook}: name {spec.name!r} does not match {_NAME.pattern}, or is 'none'")
    for member in fields(wanted):
        value = getattr(spec, member.name)
        arguments = FUNCTIONS[kind].get(member.name)
        asked = _ASKED.get(kind, {}).get(member.name)
        if arguments is not None and asked is not None and asks_for(asked, value):
            arguments = (*arguments, asked)
        optional = member.default == "" and value == ""
        fault = "" if optional else _field_fault(str(member.type), arguments, value)
        if fault:
            raise PluginError(f"{hook}: {member.name} of '{spec.name}' {fault}")
    reserved = _RESERVED | {option.name for option in explain(config_of(kind))}
    taken = sorted(reserved & {option.name for option in explain(spec.options)})
    if taken:
        raise PluginError(f"{hook}: '{spec.name}' cannot have an option '{taken[0]}', recipes use that word")
    if isinstance(spec, specs.Exporter):
        for word, allowed in _EXPORTER_WORDS.items():
            got = getattr(spec, word)
            if got not in allowed:
                raise PluginError(f"{hook}: {word} of '{spec.name}' is {got!r}, wanted {listing(allowed)}")
    if isinstance(spec, specs.Quantizer) and not _are_parts(spec.parts):
        raise PluginError(
            f"{hook}: parts of '{spec.name}' are {spec.parts}, wanted different names without a dot, "
            "and none of them 'bias'"
        )


def _are_parts(names: tuple[str, ...]) -> bool:
    """Whether names can be those of tensors beside the bias of a linear."""
    return bool(names) and len(set(names)) == len(names) and all(map(_PART.fullmatch, names))


def _field_fault(annotation: str, arguments: Sequence[str] | None, value: Any) -> str:
    """What is wrong with the value of a spec's field, or nothing; a function has ``arguments``."""
    if annotation.startswith("type["):
        try:
            return check_declaration(value)
        except Exception as fault:
            return f"cannot be used: {reason_of(fault)}"
    if arguments is not None:
        return "" if value is None and annotation.endswith("| None") else _call_fault(value, arguments)
    words, good = _FIELDS[annotation]
    return "" if good(value) else f"must be {words}, got {value!r}"


def _layouts_fault(value: Any) -> str:
    """What is wrong with the layouts of an architecture, or nothing."""
    if not isinstance(value, Mapping):
        return f"is {type(value).__name__}"
    for name, layout in value.items():
        if not isinstance(layout, specs.Layout) or not isinstance(name, str):
            return f"{name!r} is {type(layout).__name__}"
        for function, arguments in _LAYOUT_FUNCTIONS.items():
            given = getattr(layout, function)
            if (given is not None or function not in _OPTIONAL) and (fault := _call_fault(given, arguments)):
                return f"{function} of {name!r} {fault}"
    return ""


def _call_fault(function: Any, arguments: Sequence[str]) -> str:
    """Why ``function`` cannot be called with ``arguments``, or nothing."""
    if not callable(function):
        return f"must be a function, got {function!r}"
    takes = other_arguments(function, arguments)
    return f"takes {takes}, wanted ({', '.join(arguments)})" if takes else ""


def check_call(component: Component, function: str, given: Any, *arguments: str) -> Callable[..., Any]:
    """``given``, which ``function`` of a component has returned and which is called later.

    Args:
        component: whose function it was.
        function: the field of its spec.
        given: what it has returned.
        arguments: the names of what ``given`` will be called with, in order.

    Raises:
        PluginError: it is no function, or cannot be called with so many arguments.
    """
    want = f"a function ({', '.join(arguments)})"
    if not callable(given):
        raise component.breach(function, type(given).__name__, want)
    takes = other_arguments(given, arguments)
    if takes:
        raise component.breach(function, f"a function {takes}", want)
    checked: Callable[..., Any] = given
    return checked


def asks_for(name: str, function: Any) -> bool:
    """Whether ``function`` has a parameter of that name."""
    try:
        return name in inspect.signature(function).parameters
    except (TypeError, ValueError):  # some built-in functions tell nothing
        return False


def transform_of(component: Component, options: Any, tokenizer: Tokenizer | None) -> Transform:
    """What a sampler builds for one text.

    Args:
        component: the sampler.
        options: of it.
        tokenizer: of the model; None where the sampler does not ask for it.

    Raises:
        PluginError: it is no function of logits and ids.
    """
    build = component.spec.build
    given = build(options, tokenizer) if asks_for("tokenizer", build) else build(options)
    return check_call(component, "build", given, "logits", "tokens")


def as_float(number: Real | float) -> float:
    """A number as a float; infinity for a whole number beyond all of them."""
    try:
        return float(number)
    except OverflowError:
        return math.inf


def checked_score(component: Component, score: Any) -> float:
    """``score``, which an evaluator has given.

    Raises:
        PluginError: it is no number from 0 to 1.
    """
    if not isinstance(score, Real):
        raise component.breach("score", type(score).__name__, "a number from 0 to 1")
    number = as_float(score)
    if not 0 <= number <= 1:  # nor one that is not finite
        raise component.breach("score", repr(number), "a number from 0 to 1")
    return number


def other_arguments(function: Callable[..., Any], arguments: Sequence[str]) -> str:
    """What ``function`` takes, where it cannot be called with so many arguments; else nothing."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # some built-in functions tell nothing
        return ""
    try:
        signature.bind(*arguments)
    except TypeError:
        return str(signature)
    return ""


def reason_of(fault: BaseException) -> str:
    """What an exception says, on one line; even one that fails when it is asked."""
    if isinstance(fault, SystemExit):
        return bounded(f"it called {getattr(fault, 'call', f'sys.exit({fault.code!r})')}")
    try:
        text = str(fault)
    except Exception:
        text = "(its message cannot be shown)"
    if not isinstance(fault, PluginError):
        text = f"{type(fault).__name__}: {text}"
    return bounded(" ".join(text.split()))
