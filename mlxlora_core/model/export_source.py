"""What an exporter is handed: config and tensors in its layout, the tokenizer, the adapter."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlxlora_core.errors import UsageError
from mlxlora_core.files import tensor_file
from mlxlora_core.files.tensor_checks import type_name
from mlxlora_core.model import adapters
from mlxlora_core.model.architectures import folder_args
from mlxlora_core.model.foreign_layout import foreign_config, foreign_places, foreign_tensors
from mlxlora_core.model.linears import linear_shape
from mlxlora_core.model.loading import Model
from mlxlora_core.model.own_weights import own_tensors
from mlxlora_core.model.quantization import without_quantization
from mlxlora_core.options import plain
from mlxlora_core.plugins import Choice, Component
from mlxlora_core.plugins.sections import Quantization
from mlxlora_core.values import ExportAdapter, ExportSource, ForeignTensor, LazyTensor, LowRank

Told = Callable[[str, int, int], None]
EXPORTING = "exporting"


@dataclass(frozen=True)
class Exported:
    """What is exported.

    Attributes:
        model: the base, whose parameters hold nothing, the adapter on it.
        stored: the tensors of its files.
        adapted: the adapter, or None.
        file: the file that the adapter was in, or None.
        exporter: who writes it, with which options.
        quantization: how the base was quantized as it was opened, or None.
        base: what the model was opened from, in words.
        card: lines of Markdown on where it comes from and how it was tuned.
    """

    model: Model
    stored: Mapping[str, LazyTensor]
    adapted: adapters.Adapted | None
    file: Path | None
    exporter: Choice
    quantization: Quantization | None
    base: str
    card: str

    @property
    def args(self) -> Any:
        """The model's arguments."""
        return folder_args(self.model.architecture.spec, self.model.config)

    @property
    def packed(self) -> bool:
        """Whether the exporter takes quantized weights packed."""
        asked = self.exporter.component.spec.packed
        if asked is None:
            return False
        return self.exporter.component.checked("packed", asked(self.exporter.options), bool)

    @property
    def exact(self) -> bool:
        """Whether an exporter that could take them packed takes them dense: it rounds them itself."""
        return self.exporter.component.spec.packed is not None and not self.packed

    def own_tensors(self) -> dict[str, LazyTensor]:
        """Every parameter under its name here, as the exporter is handed it."""
        return own_tensors(self.model, self.stored, self.adapted, packed=self.packed, exact=self.exact)

    def places(self) -> dict[str, ForeignTensor]:
        """Parameter -> how it is stored in the exporter's layout, where it asks for one."""
        layout = self.exporter.component.spec.layout
        return foreign_places(self.model.architecture, layout, self.args) if layout else {}

    def shifts(self) -> dict[str, float]:
        """Parameter -> what is added to it when it is read from the exporter's layout."""
        return {name: entry.shift for name, entry in self.places().items()}


def source_of(exported: Exported, told: Told) -> ExportSource:
    """What the exporter gets.

    Args:
        exported: what is exported.
        told: called with (what is done, tensors begun, all) as the exporter takes them.

    Raises:
        UsageError: the exporter writes adapters, and there is none.
        ModelError: the architecture does not write the exporter's layout.
        PluginError: the architecture or the adapter breaks its contract.
    """
    model, spec = exported.model, exported.exporter.component.spec
    if spec.takes == "adapter" and exported.adapted is None:
        raise UsageError(
            f"exporter '{spec.name}' writes an adapter alone, and none is named", fix="add --adapter-file"
        )
    config: Mapping[str, Any] = without_quantization(model.config)
    tensors = {} if spec.takes == "adapter" else exported.own_tensors()
    if spec.layout:
        config = foreign_config(model.architecture, spec.layout, exported.args, model.folder)
    places = exported.places()
    if places:
        tensors = foreign_tensors(model.architecture, tensors, places) if tensors else {}
    return ExportSource(
        config=config,
        tokenizer=model.tokenizer.files,
        tensors=_counted(tensors, told),
        adapter=_adapter(exported, places) if exported.adapted else None,
        stops=model.tokenizer.stops,
        vocab_size=model.language_model.vocab_size,
        base=exported.base,
        card=exported.card,
    )


def _counted(tensors: Mapping[str, LazyTensor], told: Told) -> dict[str, LazyTensor]:
    """The tensors, and a word of each that is begun."""
    begun: set[str] = set()

    def read(name: str, tensor: LazyTensor) -> mx.array:
        begun.add(name)
        told(EXPORTING, len(begun), len(tensors))
        mx.clear_cache()  # of the tensor before
        value = tensor.read()
        mx.eval(value)
        return value

    def counted(name: str, tensor: LazyTensor) -> LazyTensor:
        packed = tensor.packed
        if packed is not None:
            parts = {n: replace(part, read=partial(read, name, part)) for n, part in packed.parts.items()}
            packed = replace(packed, parts=parts)
        return replace(tensor, read=partial(read, name, tensor), packed=packed)

    return {name: counted(name, tensor) for name, tensor in tensors.items()}


def _adapter(exported: Exported, places: Mapping[str, ForeignTensor]) -> ExportAdapter:
    """The adapter's own parameters; they are small, and stand in memory already."""
    adapted, model = exported.adapted, exported.model
    assert adapted is not None and exported.file is not None, "an adapter comes from a file"
    metadata = tensor_file.stated(exported.file)
    tensors = {
        name: LazyTensor(tensor.shape, type_name(tensor.dtype), _giver(tensor))
        for name, tensor in adapters.adapter_parameters(model.module, adapted.paths).items()
    }
    weights = {path: f"{path}.weight" for path in adapted.paths}
    common = plain(adapted.choice.options)
    differing = {
        path: {key: value for key, value in plain(options).items() if value != common[key]}
        for path, options in adapted.options.items()
    }
    return ExportAdapter(
        name=adapted.choice.component.id,
        options=common,
        overrides={path: options for path, options in differing.items() if options},
        paths=adapted.paths,
        tensors=tensors,
        metadata={key: value for key, value in metadata.items() if key == adapters.METADATA},
        low_rank=_low_rank(adapted.choice.component, adapted.paths, model),
        places={path: places.get(name, ForeignTensor(name, name)) for path, name in weights.items()},
        heights=_heights(model, places),
        layers=len(model.language_model.layers),
    )


def _heights(model: Model, places: Mapping[str, ForeignTensor]) -> dict[str, int]:
    """name there -> rows, of the weights there that hold those of several linears."""
    heights: dict[str, int] = {}
    modules = dict(model.module.named_modules())
    for name, place in places.items():
        if place.start is not None:
            module = modules[name.rpartition(".")[0]]
            rows = linear_shape(module.get("linear", module))[-2]
            heights[place.foreign] = max(heights.get(place.foreign, 0), place.start + rows)
    return heights


def _low_rank(component: Component, paths: tuple[str, ...], model: Model) -> dict[str, LowRank]:
    """path -> the update that the adapter is there, where it is one and nothing else."""
    asked = component.spec.low_rank
    if asked is None:
        return {}
    modules = dict(model.module.named_modules())
    return {path: component.checked("low_rank", asked(modules[path]), LowRank) for path in paths}


def _giver(tensor: mx.array) -> Callable[[], mx.array]:
    return lambda: tensor
