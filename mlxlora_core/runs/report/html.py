"""Elements of a page. Whatever is not made here is text, and is escaped."""

from __future__ import annotations

import html
import json
from typing import Any

_LEFT_AS_THEY_ARE = "\n\t\u200d\ufe0f"  # with the joiners that emoji are made of
_VOID = frozenset({"meta", "link", "br", "col"})


class Html(str):
    """Markup that needs no escaping."""

    __slots__ = ()


def element(name: str, /, *children: object, **attributes: object) -> Html:
    """``<name attributes>children</name>``.

    Args:
        name: of the element.
        children: :class:`Html` stays as it is, None is nothing, anything else is text.
        attributes: ``_`` in a name stands for ``-``, one at its end for nothing;
            True is an attribute without a value, None and False are none.
    """
    given = "".join(
        f" {key.rstrip('_').replace('_', '-')}" + ("" if value is True else f'="{escaped(value)}"')
        for key, value in attributes.items()
        if value is not None and value is not False
    )
    if name in _VOID:
        return Html(f"<{name}{given}>")
    return Html(f"<{name}{given}>{join(*children)}</{name}>")


def join(*children: object) -> Html:
    """Elements and texts one after another."""
    return Html("".join(c if isinstance(c, Html) else escaped(c) for c in children if c is not None))


def escaped(value: object) -> str:
    """A value as text of a page, control characters and marks that turn the direction made visible."""
    shown = "".join(
        c if c.isprintable() or c in _LEFT_AS_THEY_ARE else c.encode("unicode_escape").decode()
        for c in str(value)
    )
    return html.escape(shown)


def data(value: Any) -> Html:
    """JSON that may stand in a script element, whatever is in it."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))  # ASCII: U+2028 is escaped with the rest
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Html(text)
