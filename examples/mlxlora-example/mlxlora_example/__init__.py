"""A plugin distribution for mlxlora, as a third party would publish it.

Dataset builder ``markdown``, adapter ``scaling`` and sampler ``typical``. This
module is light: it declares what there is, and what needs mlx is imported by
the function that is called.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mlxlora_core.api import (
    Adapter,
    DatasetBuilder,
    NoOptions,
    Place,
    Rows,
    Sampler,
    Transform,
    hookimpl,
    option,
)

if TYPE_CHECKING:
    import mlx.core as mx
    import mlx.nn as nn

mlxlora_api = 2


@dataclass(frozen=True)
class MarkdownOptions:
    """Where the Markdown files are, and what a row looks like."""

    path: Path = option(help="a Markdown file, or a folder that is searched for *.md")
    form: str = option("text", help="one text, or a prompt and a completion", choices=("text", "prompt"))
    limit: int = option(4000, help="longest section", unit="characters", minimum=1)


@dataclass(frozen=True)
class TypicalOptions:
    """How much chance there is."""

    temp: float = option(1.0, help="divides the logits; 0 is the most likely token", minimum=0)
    mass: float = option(0.95, help="probability that the typical tokens reach together", above=0, maximum=1)


def build_rows(options: MarkdownOptions) -> Rows:
    """See :func:`mlxlora_example.markdown.rows`."""
    from mlxlora_example import markdown

    return markdown.rows(options.path, options.form, options.limit)


def inputs(options: MarkdownOptions) -> Mapping[str, str]:
    """See :func:`mlxlora_example.markdown.stamps`."""
    from mlxlora_example import markdown

    return markdown.stamps(options.path)


def wrap(linear: nn.Module, place: Place, options: NoOptions) -> nn.Module | None:
    """See :class:`mlxlora_example.scaling.ScaledLinear`; a stack of linears is left alone."""
    from mlxlora_example.scaling import ScaledLinear

    return ScaledLinear(linear) if place.kind == "linear" and len(place.shape) == 2 else None


def fuse(module: nn.Module, weight: mx.array) -> mx.array:
    """See :meth:`mlxlora_example.scaling.ScaledLinear.fuse`."""
    from mlxlora_example.scaling import ScaledLinear

    assert isinstance(module, ScaledLinear)
    return module.fuse(weight)


def typical(options: TypicalOptions) -> Transform:
    """See :func:`mlxlora_example.typical.sampler`."""
    from mlxlora_example.typical import sampler

    return sampler(options.temp, options.mass)


@hookimpl
def mlxlora_dataset_builders() -> Iterable[DatasetBuilder]:
    """Rows from Markdown files."""
    summary = "headings of Markdown files and the sections below them"
    return [
        DatasetBuilder(
            name="markdown", summary=summary, options=MarkdownOptions, build=build_rows, inputs=inputs
        )
    ]


@hookimpl
def mlxlora_adapters() -> Iterable[Adapter]:
    """One factor for each input of a linear."""
    summary = "one trained factor for each input of a frozen linear"
    return [Adapter(name="scaling", summary=summary, wrap=wrap, fuse=fuse)]


@hookimpl
def mlxlora_samplers() -> Iterable[Sampler]:
    """Locally typical sampling."""
    summary = "tokens whose surprise is closest to the expected one"
    return [Sampler(name="typical", summary=summary, options=TypicalOptions, build=typical)]
