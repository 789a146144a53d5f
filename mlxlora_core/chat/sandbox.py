"""The environment in which templates run: what they may reach, call and use up."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import date
from types import BuiltinMethodType, MethodType
from typing import Any

from jinja2 import nodes
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.filters import FILTERS
from jinja2.parser import Parser
from jinja2.runtime import Context, Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment, SandboxedFormatter
from jinja2.tests import TESTS
from jinja2.utils import Cycler, Joiner, Namespace
from markupsafe import Markup

from mlxlora_core.chat import growth
from mlxlora_core.chat.allowance import Allowance, Overrun
from mlxlora_core.chat.compiler import CountingGenerator

_MOST_RANGE = 100_000
_CALL_UNITS = 16
_MOST_FORM = 200  # characters of a form of dates

#: filters of Jinja that are not here: chance, markup for web pages, and what takes time by the square
_LEFT_OUT = {"pprint", "random", "striptags", "urlize", "wordwrap", "xmlattr"}
#: filters and tests that look at the outside of a value, or go through it where it is counted one by one
_SHALLOW = {"attr", "batch", "count", "d", "default", "first", "items", "last", "length", "list", "map"}
_SHALLOW |= {"reject", "rejectattr", "reverse", "select", "selectattr", "slice"}
_SHALLOW |= {"boolean", "callable", "defined", "false", "filter", "float", "integer", "iterable", "mapping"}
_SHALLOW |= {"none", "number", "sameas", "sequence", "string", "test", "true", "undefined"}

_TEXT_METHODS = {
    "capitalize",
    "casefold",
    "center",
    "count",
    "endswith",
    "expandtabs",
    "find",
    "index",
    "isalnum",
}
_TEXT_METHODS |= {
    "isalpha",
    "isascii",
    "isdecimal",
    "isdigit",
    "isidentifier",
    "islower",
    "isnumeric",
    "isprintable",
    "isspace",
}
_TEXT_METHODS |= {
    "istitle",
    "isupper",
    "join",
    "ljust",
    "lower",
    "lstrip",
    "partition",
    "removeprefix",
    "removesuffix",
}
_TEXT_METHODS |= {
    "replace",
    "rfind",
    "rindex",
    "rjust",
    "rpartition",
    "rsplit",
    "rstrip",
    "split",
    "splitlines",
}
_TEXT_METHODS |= {"startswith", "strip", "swapcase", "title", "upper", "zfill"}
_METHODS: Mapping[type, frozenset[str]] = {
    str: frozenset(_TEXT_METHODS),
    dict: frozenset({"copy", "get", "items", "keys", "values"}),
    list: frozenset({"copy", "count", "index"}),
    tuple: frozenset({"count", "index"}),
    range: frozenset({"count", "index"}),
    float: frozenset({"is_integer"}),
    int: frozenset({"bit_length"}),
}
_JINJA_ARGUMENTS = ("_loop_vars", "_block_vars")  # what compiled code hands to every call beside its own


class RefusedByTemplate(TemplateError):
    """A template says itself that it cannot render a conversation."""


class Generation(Extension):
    """``{% generation %}``: what the assistant says."""

    tags = {"generation"}  # noqa: RUF012 - Jinja's own form

    def parse(self, parser: Parser) -> nodes.Node:
        """The block as a call of :meth:`said`."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("said"), [], [], body).set_lineno(line)

    def said(self, caller: Callable[[], str]) -> str:
        """The text of the block, between the marks that are asked for."""
        begin, end = self.environment.marks  # type: ignore[attr-defined]  # ours
        return f"{begin}{caller()}{end}"


class Names(Namespace):
    """``namespace(...)`` without names that begin with an underscore."""

    def __init__(*args: Any, **named: Any) -> None:
        held = dict(*args[1:], **named)
        for name in held:
            _refuse_hidden(name)
        Namespace.__init__(args[0], held)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_hidden(name)
        Namespace.__setitem__(self, name, value)


def _refuse_hidden(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"it stores {name[:80]!r}, a name that begins with an underscore")


class _Objects:
    """``dict(...)`` without the attributes of the type."""

    def __call__(self, *args: Any, **named: Any) -> dict[Any, Any]:
        return dict(*args, **named)

    def fromkeys(self, keys: Iterable[Any], value: Any = None) -> dict[Any, Any]:
        """An object with one value for all keys."""
        return dict.fromkeys(keys, value)


class Sandbox(ImmutableSandboxedEnvironment):
    """Jinja as it is for chat templates, with everything counted that a template uses up.

    Args:
        today: the date that templates are told.

    Attributes:
        marks: what stands before and behind each ``{% generation %}`` block.
    """

    code_generator_class = CountingGenerator
    intercepted_binops = frozenset(ImmutableSandboxedEnvironment.default_binop_table)

    def __init__(self, today: date) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            optimized=False,
            cache_size=0,
            extensions=[Generation, loopcontrols],
        )
        self.marks = ("", "")
        self._allowance = Allowance(0)
        self._today = today
        own: dict[str, Callable[..., Any]] = {**FILTERS, "tojson": _tojson}
        tests: dict[str, Any] = dict(TESTS)
        self.filters = {
            name: self._counted(name, call) for name, call in own.items() if name not in _LEFT_OUT
        }
        self.tests = {name: self._counted(name, call) for name, call in tests.items()}
        self.globals = {
            "cycler": Cycler,
            "dict": _Objects(),
            "joiner": Joiner,
            "namespace": Names,
            "raise_exception": self._raise,
            "range": _range,
            "strftime_now": self._strftime,
        }

    def allow(self, units: int) -> None:
        """Begin to count anew, from so many units down."""
        self._allowance = Allowance(units)

    # --- what compiled templates call -----------------------------------------

    def tick(self, units: int) -> bool:
        """Count a turn of a loop or a call of a macro; true, so that it can stand in a condition."""
        self._allowance.spend(units)
        return True

    def weighed(self, value: Any) -> Any:
        """A value that is printed or compared, once it is counted with all that it holds."""
        self._allowance.weigh(value)
        return value

    def made(self, value: Any) -> Any:
        """A value that has just been made, once its own size is counted."""
        if isinstance(value, Iterator):
            return self._one_by_one(value)
        size = (
            len(value)
            if isinstance(value, str)
            else 8 * len(value)
            if isinstance(value, list | tuple | dict)
            else 0
        )
        self._allowance.spend(_CALL_UNITS)
        self._allowance.text(size)
        return value

    def joined(self, values: tuple[Any, ...]) -> str:
        """Values as one text."""
        self._allowance.weigh(values)
        return "".join(map(str, values))

    def _one_by_one(self, values: Iterator[Any]) -> Iterator[Any]:
        for value in values:
            self._allowance.spend(_CALL_UNITS)
            self._allowance.weigh(value)
            yield value

    # --- what Jinja calls -----------------------------------------------------

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """An operator between two values."""
        growth.operator(self._allowance, operator, left, right)
        return super().call_binop(context, operator, left, right)

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        """A call of something that a template has."""
        allowance = __self._allowance
        allowance.spend(_CALL_UNITS)
        for value in args:
            allowance.weigh(value)
        for name, value in kwargs.items():
            if name not in _JINJA_ARGUMENTS:
                allowance.weigh(value)
        if isinstance(__obj, BuiltinMethodType) or isinstance(getattr(__obj, "__self__", None), str):
            args = __self._method(__obj, args, kwargs)
        return __self.made(super().call(__context, __obj, *args, **kwargs))

    def _method(self, method: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, ...]:
        """The arguments of a method of a built-in type, if it may be called with them."""
        owner, name = method.__self__, method.__name__
        allowed = next((names for kind, names in _METHODS.items() if isinstance(owner, kind)), frozenset())
        if name not in allowed:
            raise SecurityError(f"it calls {name} of {type(owner).__name__}")
        self._allowance.weigh(owner)
        if isinstance(owner, str):
            if name == "join" and args:
                args = (self._listed(args[0]), *args[1:])
                growth.joined(self._allowance, args[0], owner)
            elif check := growth.METHODS.get(name):
                named = {key: value for key, value in kwargs.items() if key not in _JINJA_ARGUMENTS}
                self._checked(check, (owner, *args), named)
        return args

    def getitem(self, obj: Any, argument: Any) -> Any:
        """An element; a key that holds others is hashed with all of them."""
        if isinstance(argument, tuple):
            self._allowance.weigh(argument)
        return super().getitem(obj, argument)

    def unsafe_undefined(self, obj: Any, attribute: str) -> Undefined:
        """Nothing: a template that reaches for the inside of Python is stopped."""
        raise SecurityError(f"it reaches for {attribute[:80]!r} of {type(obj).__name__}")

    def wrap_str_format(self, value: Any) -> Any:
        """``str.format`` that resolves attributes as templates do and counts what it makes."""
        kinds = (BuiltinMethodType, MethodType)  # markup has methods of its own
        if not isinstance(value, kinds) or value.__name__ not in ("format", "format_map"):
            return None
        form: Any = value.__self__
        if not isinstance(form, str):
            return None
        if isinstance(form, Markup):
            raise SecurityError("it formats markup")
        formatter, whole = _Formatter(self, self._allowance), value.__name__ == "format_map"

        def formatted(*args: Any, **named: Any) -> str:
            if whole:
                (named,), args = args, ()
            return formatter.vformat(form, args, named)

        return formatted

    # --- filters, tests and functions -----------------------------------------

    def _counted(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """A filter or test that counts what it is given and what it gives."""
        hidden = 1 if hasattr(call, "jinja_pass_arg") else 0  # arguments that a template does not see
        check, shallow = growth.FILTERS.get(name), name in _SHALLOW
        modulo = name in ("odd", "even", "divisibleby")

        @functools.wraps(call)
        def counted(*args: Any, **kwargs: Any) -> Any:
            own = args[hidden:]
            self._allowance.spend(_CALL_UNITS)
            if not shallow:
                if name in growth.WHOLE:
                    own = (self._listed(own[0]), *own[1:])
                for value in (*own, *kwargs.values()):
                    self._allowance.weigh(value)
            if check:
                self._checked(check, own, kwargs)
            if modulo:
                growth.operator(self._allowance, "%", own[0], own[1] if own[1:] else 2)
            return self.made(call(*args[:hidden], *own, **kwargs))

        return counted

    def _checked(self, check: growth.Check, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Count what a filter or method will make."""
        try:
            check(self._allowance, *args, **kwargs)
        except TypeError as fault:
            raise TemplateError(f"wrong arguments: {fault}") from None

    def _listed(self, values: Any) -> Any:
        """Values that are given one by one as a list, whose length can be counted."""
        return self.made(list(self._one_by_one(values))) if isinstance(values, Iterator) else values

    def _raise(self, message: Any = "") -> None:
        """``raise_exception``: the template refuses."""
        raise RefusedByTemplate(str(self.weighed(message)))

    def _strftime(self, form: str) -> str:
        """``strftime_now``: the fixed date in a form."""
        if not isinstance(form, str) or len(form) > _MOST_FORM or re.search(r"%[-_0^#+]*[0-9]", form):
            raise Overrun("it asks for a date in a form that is too long")
        return self._today.strftime(form)


class _Formatter(SandboxedFormatter):
    """Formats a field at a time, and counts each."""

    def __init__(self, sandbox: Sandbox, allowance: Allowance) -> None:
        super().__init__(sandbox)
        self._allowance = allowance

    def format_field(self, value: Any, format_spec: str) -> str:
        """A value in a form such as ``>20``."""
        growth.width(self._allowance, format_spec)
        self._allowance.weigh(value)
        return str(super().format_field(value, format_spec))


def _range(*args: int) -> range:
    """``range`` of a length that a loop can go through."""
    values = range(*args)
    if len(values) > _MOST_RANGE:
        raise Overrun(f"it counts further than {_MOST_RANGE}")
    return values


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: Any = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    """JSON with letters as they are; Jinja's own filter is for web pages."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
