"""What the suite of architectures asks of the spellings of other libraries."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from mlxlora_core.errors import ModelError
from mlxlora_core.model.architectures import foreign_args, foreign_table, model_tensors
from mlxlora_core.model.foreign_layout import foreign_tensors
from mlxlora_core.model.linears import parameters
from mlxlora_core.plugins import Component
from mlxlora_core.specs import Architecture, Layout
from mlxlora_core.testing.stand_in import choice
from mlxlora_core.values import ForeignModel, ForeignTensor, LazyTensor


class LayoutTests:
    """The part of :class:`mlxlora_core.testing.architecture.ArchitectureSuite` that is about layouts."""

    spec: Architecture
    raw: Mapping[str, Any]
    checkpoint: Mapping[str, tuple[int, ...]]
    layout: str
    #: layouts in which other tools could not compute ``raw``, so that it is read and not written there
    unsaid: Sequence[str] = ()

    def reader(self) -> Architecture | Layout:
        """What reads ``raw``: the architecture, or one of its layouts."""
        return self.spec.layouts[self.layout] if self.layout else self.spec

    def read(self, raw: Mapping[str, Any]) -> Any:
        """The arguments that the architecture reads out of a foreign config."""
        return foreign_args(self.reader(), raw, self.checkpoint)

    def made(
        self, found: Mapping[str, LazyTensor], args: Any, layout: str | None = None
    ) -> Mapping[str, LazyTensor]:
        """The model's tensors made of ``found``, by ``tensors`` or by the table of the layout."""
        name = self.layout if layout is None else layout
        foreign = ForeignModel(self.raw, {}, found, layout=name)
        return model_tensors(_component(self.spec), foreign, args, parameters(self.spec.build(args)))

    def test_a_table_out_and_in_again_is_the_identity(self) -> None:
        """In every layout each parameter is stored once, and comes back to the bit."""
        args = self.read(self.raw)
        draw = np.random.default_rng(7)
        shapes = {name: p.shape for name, p in parameters(self.spec.build(args)).items()}
        ours = {name: draw.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
        for layout in self.spec.layouts:
            table = foreign_table(_component(self.spec), layout, args)
            names = sorted(entry.name for entry in table)
            assert names == sorted(shapes), f"the table of {layout} does not name every parameter once"
            theirs = {name: _lazy(array) for name, array in stored(table, ours).items()}
            for name, tensor in self.made(theirs, args, layout).items():
                got, shift = np.array(tensor.read()), next(e.shift for e in table if e.name == name)
                near = np.allclose(got, ours[name], atol=1e-6) if shift else np.array_equal(got, ours[name])
                assert near, f"{name} comes out of {layout} as another one"
            out = foreign_tensors(
                _component(self.spec),
                {name: _lazy(array) for name, array in ours.items()},
                {entry.name: entry for entry in table},
            )
            assert out.keys() == theirs.keys()
            assert all(np.array_equal(out[name].read(), theirs[name].read()) for name in out)

    def test_what_a_layout_writes_is_read_as_the_same_arguments(self) -> None:
        """In each that writes; a library need not be able to say all that another one can."""
        args = self.read(self.raw)
        shapes = {name: p.shape for name, p in parameters(self.spec.build(args)).items()}
        for name, layout in self.spec.layouts.items():
            if layout.write is None:
                continue
            table = foreign_table(_component(self.spec), name, args)
            theirs = stored(table, {n: np.zeros(shape, np.float32) for n, shape in shapes.items()})
            try:
                written = layout.write(args)
            except ModelError:
                assert name != self.layout or name in self.unsaid, f"{name} cannot say what it has read"
                continue
            again = foreign_args(layout, written, {n: array.shape for n, array in theirs.items()})
            assert again == args, f"{name} reads {again} out of what it writes, wanted {args}"


def stored(table: Sequence[ForeignTensor], ours: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The tensors of another library that parameters here are stored as, the way back of its table."""
    pieces: dict[str, list[tuple[int, np.ndarray]]] = {}
    for entry in table:
        array = ours[entry.name] - entry.shift if entry.shift else ours[entry.name]
        if entry.rows is not None:
            assert sorted(entry.rows) == list(range(len(array))), f"rows of {entry.name} are no new order"
            array = array[np.argsort(entry.rows)]
        pieces.setdefault(entry.foreign, []).append((entry.start or 0, array))
    found = {}
    for name, parts in pieces.items():
        parts.sort(key=lambda part: part[0])
        ends = np.cumsum([len(array) for _, array in parts])
        assert [start for start, _ in parts] == [0, *ends[:-1]], f"the parts of {name} leave rows out"
        found[name] = np.concatenate([array for _, array in parts])
    return found


def _component(spec: Architecture) -> Component:
    """The architecture as it is held after it has found its plugin."""
    return choice("architecture", spec, None).component


def _lazy(array: np.ndarray) -> LazyTensor:
    """A tensor that reads as ``array``, float32."""
    return LazyTensor(array.shape, "float32", lambda: mx.array(array))
