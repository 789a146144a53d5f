"""Sampler ``json``: whatever a model would say, what it says is JSON, and whole.

This module is light: it declares what there is, and what needs mlx is imported
by the function that is called.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from mlxlora_core.api import Sampler, Tokenizer, Transform, UsageError, hookimpl, listing, option

mlxlora_api = 2

#: type of a field -> the kinds of values that it has
TYPES = {
    "string": ("string",),
    "number": ("number",),
    "integer": ("integer",),
    "boolean": ("boolean",),
    "array": ("array",),
    "object": ("object",),
    "any": ("string", "number", "boolean", "null", "array", "object"),
}


@dataclass(frozen=True)
class JsonOptions:
    """What the JSON looks like."""

    form: str = option("object", help="what the text is", choices=("object", "array", "any"))
    fields: tuple[str, ...] = option(
        (), help="NAME:TYPE of all that each object has, in this order; none is anything"
    )
    within: int = option(100, help="the text is whole after so many at most", unit="tokens", minimum=4)
    depth: int = option(8, help="arrays and objects in each other at most", minimum=1, maximum=64)

    def __post_init__(self) -> None:
        """Refuse fields that make no sense before anything is loaded."""
        names = [name for name, _ in self.typed()]
        if len(set(names)) < len(names):
            raise UsageError(f"fields name one twice: {listing(names)}", fix="name each field once")
        if names and self.form == "any":
            raise UsageError("fields are of objects", fix="set form=object, or form=array for many of them")
        inside = any({"array", "object"} & {*kinds} and "number" not in kinds for _, kinds in self.typed())
        least = (self.form == "array" and bool(names)) + 1 + inside
        if self.depth < least:
            raise UsageError(
                f"depth is {self.depth}, the fields need {least}", fix=f"set depth={least} or more"
            )

    def typed(self) -> list[tuple[str, tuple[str, ...]]]:
        """(name, kinds of values) of each field.

        Raises:
            UsageError: there is no such type.
        """
        found = []
        for text in self.fields:
            name, _, kind = text.rpartition(":") if ":" in text else (text, ":", "any")
            base = kind.removesuffix("?")
            if base not in TYPES or not name:
                wanted = f"NAME:TYPE with one of {listing(TYPES)}"
                raise UsageError(
                    f"field {text!r} is none", fix=f"write {wanted}, with ? behind it for null too"
                )
            found.append((name, (*TYPES[base], *["null"] * kind.endswith("?"))))
        return found


def build(options: JsonOptions, tokenizer: Tokenizer) -> Transform:
    """See :func:`mlxlora_json.masks.transform`."""
    from mlxlora_json import masks

    return masks.transform(options, tokenizer)


@hookimpl
def mlxlora_samplers() -> Iterable[Sampler]:
    """JSON and nothing else."""
    summary = "the tokens that go on with JSON, with the fields that are named"
    return [Sampler(name="json", summary=summary, options=JsonOptions, build=build)]
