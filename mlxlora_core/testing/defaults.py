"""The suite of a component whose author has written none: what it needs is guessed, or left out.

A test that needs what nobody can guess, such as files that a loader of a
format of its own reads, raises NotImplementedError by a method of the suite.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_unflatten

from mlxlora_core.errors import MlxloraError
from mlxlora_core.model.adapters import adapter_parameters, trainable
from mlxlora_core.model.linears import parameters
from mlxlora_core.options import Option, explain, parse
from mlxlora_core.plugins import Component
from mlxlora_core.plugins import load as load_plugins
from mlxlora_core.testing import fixtures
from mlxlora_core.testing.exporter import ADAPTED, CONFIG, SHAPES, ExporterSuite
from mlxlora_core.values import Place

#: kind -> the suite that its components are tried by
SUITES = {
    "loader": "weight_loader:WeightLoaderSuite",
    "tokenizer": "tokenizer:TokenizerSuite",
    "architecture": "architecture:ArchitectureSuite",
    "adapter": "adapter:AdapterSuite",
    "adapter-loader": "adapter_loader:AdapterLoaderSuite",
    "quantizer": "quantizer:QuantizerSuite",
    "builder": "dataset_builder:DatasetBuilderSuite",
    "sampler": "sampler:SamplerSuite",
    "exporter": "exporter:ExporterSuite",
    "observer": "observer:ObserverSuite",
    "evaluator": "evaluator:EvaluatorSuite",
    "command": "command:CommandSuite",
    "runtime": "runtime:RuntimeSuite",
    "recipe": "recipe:RecipeSuite",
}


def suite_of(kind: str) -> type[Any]:
    """The suite of a kind."""
    module, _, name = SUITES[kind].partition(":")
    found: type[Any] = getattr(importlib.import_module(f"mlxlora_core.testing.{module}"), name)
    return found


def guessed_suite(component: Component) -> type[Any]:
    """A suite for one component, with what can be guessed of what its author would state."""
    spec = component.spec
    members: dict[str, Any] = {"spec": spec, "option_sets": (_values(spec.options),)}
    guess = _GUESSES.get(component.kind)
    members |= guess(component, members["option_sets"][0]) if guess else {}
    return type(f"Test {component.kind} {spec.name}", (suite_of(component.kind),), members)


def _values(options: type[Any]) -> dict[str, Any]:
    """A value for each option that must be given; nothing is dropped out at random."""
    rules = {field.name: field.metadata for field in dataclasses.fields(options)}
    values = {o.name: _value(o, rules[o.name]) for o in explain(options) if o.required}
    return values | ({"dropout": 0.0} if "dropout" in rules else {})


def _value(option: Option, rules: Mapping[str, Any]) -> Any:
    """A value that an option may have, as far as its declaration tells."""
    if rules.get("choices"):
        return rules["choices"][0]
    if option.type_name in ("integer", "number"):
        lowest, above, highest = (rules.get(key) for key in ("minimum", "above", "maximum"))
        return next((v for v in (lowest, above and above + 1, highest) if v is not None), 1)
    return {"true/false": True, "text": "text", "path": "path"}.get(option.type_name, [])


# --- kind by kind -------------------------------------------------------------


def _adapter(component: Component, values: Mapping[str, Any]) -> dict[str, Any]:
    """Whether it goes on embeddings, and what of it does not train, by trying."""
    spec = component.spec
    options = parse(spec.options, values, owner=spec.name)

    def frozen(module: nn.Module | None) -> set[str]:
        return adapter_parameters(module).keys() - set(trainable(module)) if module is not None else set()

    try:
        linear = spec.wrap(nn.Linear(64, 32), Place("layers.0.attention.wq", 0, (32, 64)), options)
        place = Place("tok_embeddings", None, (50, 64), "embedding")
        embedding = spec.wrap(nn.Embedding(50, 64), place, options)
        return {"embeds": embedding is not None, "frozen": tuple(sorted(frozen(linear)))}
    except Exception:  # the suite will meet it, and tell it
        return {}


def _quantizer(component: Component, values: Mapping[str, Any]) -> dict[str, Any]:
    """No weight may be further off than the largest one of its row: it could as well be forgotten."""

    def error_bound(self: Any, weight: np.ndarray, parts: Any, options: Any) -> np.ndarray:
        largest: np.ndarray = np.abs(weight).max(axis=-1, keepdims=True)
        return largest * 1.001 + 1e-37

    return {"error_bound": error_bound}


def _sampler(component: Component, values: Mapping[str, Any]) -> dict[str, Any]:
    """Which probabilities tokens should have, nobody can guess."""

    def probabilities(self: Any, *given: Any) -> None:
        raise NotImplementedError("probabilities")

    return {"probabilities": probabilities}


def _builder(component: Component, values: Mapping[str, Any]) -> dict[str, Any]:
    """Files of many kinds, for the option that is a path."""
    spec = component.spec
    paths = [option.name for option in explain(spec.options) if "path" in option.type_name]

    def options(folder: Path) -> dict[str, Any]:
        if len(paths) != 1:
            raise NotImplementedError("sources")
        return {**values, paths[0]: str(folder)}

    def sources(self: Any, folder: Path) -> Mapping[str, Any]:
        write_samples(folder)
        try:
            spec.build(parse(spec.options, options(folder), owner=spec.name))
        except MlxloraError:
            raise NotImplementedError("sources") from None
        return options(folder)

    def empty_sources(self: Any, folder: Path) -> Mapping[str, Any]:
        return options(folder)

    def change(self: Any, folder: Path) -> None:
        for path in folder.iterdir():
            with path.open("a", encoding="utf-8") as file:
                file.write(_MORE[path.suffix])

    return {"sources": sources, "empty_sources": empty_sources, "change": change}


_LINES = [(f"Question {i}", f"The answer to question {i} is {i * i}.") for i in range(12)]
_MORE = {
    ".md": "\n# One more\n\nOne more text.\n",
    ".txt": "\nOne more text.\n",
    ".rst": "\nOne more\n========\n\nOne more text.\n",
    ".csv": "One more,One more text.\n",
    ".jsonl": '{"text": "One more text."}\n',
}


def write_samples(folder: Path) -> None:
    """Write the same dozen of texts as Markdown, plain text, reStructuredText, CSV and JSON Lines."""
    texts = {
        ".md": "".join(f"# {title}\n\n{text}\n\n" for title, text in _LINES),
        ".txt": "".join(f"{title}\n{text}\n\n" for title, text in _LINES),
        ".rst": "".join(f"{title}\n{'=' * len(title)}\n\n{text}\n\n" for title, text in _LINES),
        ".csv": "prompt,completion\n" + "".join(f"{title},{text}\n" for title, text in _LINES),
        ".jsonl": "".join(json.dumps({"text": f"{title} {text}"}) + "\n" for title, text in _LINES),
    }
    for ending, text in texts.items():
        (folder / f"sample{ending}").write_text(text, encoding="utf-8")


def _loader(component: Component, values: Mapping[str, Any]) -> dict[str, Any]:
    """The sample that it ships with, or what an exporter writes that it opens, one of its plugin first."""
    spec = component.spec

    def write(self: Any, folder: Path) -> Mapping[str, mx.array]:
        sample = _sample(component)
        if sample is not None:
            shutil.copytree(sample, folder, dirs_exist_ok=True)
            tensors = spec.open(self.path(folder), spec.options()).tensors
            return {name: tensor.read() for name, tensor in tensors.items()}
        exporters = load_plugins().of("exporter")
        for exporter in sorted(exporters, key=lambda one: one.plugin.name != component.plugin.name):
            written = _exported(exporter, spec, folder)
            if written is not None:
                return written
        raise NotImplementedError("write")

    def path(self: Any, folder: Path) -> Path:
        files = list(folder.iterdir()) if folder.is_dir() else []
        return files[0] if len(files) == 1 and spec.detect(files[0]) else folder

    def parts(self: Any) -> None:
        """Without any one of its files, a checkpoint is refused."""
        raise NotImplementedError("write")  # an exporter may write some that do no harm

    return {"write": write, "path": path, "test_missing_part_is_an_error": parts}


def _exported(exporter: Component, loader: Any, folder: Path) -> dict[str, mx.array] | None:
    """The tensors of a small model that was exported into a folder, if the loader knows it by these names."""
    if exporter.spec.takes != "model":
        return None
    suite = guessed_suite(exporter)()
    options = parse(exporter.spec.options, suite.option_sets[0], owner=exporter.spec.name)
    with tempfile.TemporaryDirectory() as room:
        (Path(room) / "source").mkdir()
        try:
            source = suite.source(Path(room) / "source", "float32")
            target = suite.exported(source, Path(room) / "target", options)
            path = next(target.iterdir()) if exporter.spec.ending else target
            found = loader.open(path, loader.options()).tensors if loader.detect(path) else {}
        except (MlxloraError, NotImplementedError):
            return None
        if found.keys() != source.tensors.keys():
            return None
        shutil.copytree(target, folder, dirs_exist_ok=True)
        types = {name: getattr(mx, tensor.dtype) for name, tensor in found.items()}
        return {name: tensor.read().astype(types[name]) for name, tensor in source.tensors.items()}


def _sample(component: Component) -> Path | None:
    """The folder ``sample`` of a plugin's package or of its tests, where there is one."""
    module = sys.modules.get(component.plugin.value.partition(":")[0])
    places = [Path(place) for place in getattr(module, "__path__", ())]
    samples = [place / name for place in places for name in ("sample", "tests/sample")]
    return next((sample for sample in samples if sample.is_dir()), None)


def _tokenizer(component: Component, values: Mapping[str, Any]) -> dict[str, Any]:
    """The sample that it ships with, or the files of the tokenizer of the fixtures, where it opens those."""

    def write(self: Any, folder: Path) -> Mapping[str, Path]:
        sample = _sample(component)
        if sample is not None:
            shutil.copytree(sample, folder, dirs_exist_ok=True)
            return {path.name: path for path in folder.iterdir()}
        fixtures.tiny_tokenizer(folder)
        files = {name: folder / name for name in fixtures.tokenizer_files()}
        if not component.spec.detect(files):
            raise NotImplementedError("write")
        return files

    return {"write": write}


def _architecture(component: Component, values: Mapping[str, Any]) -> dict[str, Any]:
    """A model of the arguments that tiny models have, with random weights; it comes from no checkpoint."""
    spec = component.spec

    def model(self: Any) -> Any:
        known = {option.name for option in explain(spec.args)}
        given = {**fixtures.ARGS, "vocab_size": 50, "model_type": spec.model_types[0]}
        try:
            chosen = {name: value for name, value in given.items() if name in known}
            args = parse(spec.args, chosen, owner=spec.name)
        except MlxloraError:
            raise NotImplementedError("raw") from None
        built = spec.build(args)
        draw = np.random.default_rng(5)
        built.update(_random(built, draw))
        built.eval()
        return built

    def wide(self: Any) -> tuple[str, ...]:
        """A family that computes in float32 in place of the narrower of the half types does so on purpose."""
        kept = {}
        for name in ("float16", "bfloat16"):
            built = model(self)
            built.set_dtype(getattr(mx, name))
            kept[name] = built.run(built.embed(mx.array([[1, 2]]))).dtype != mx.float32
        return ("float16",) if kept == {"float16": False, "bfloat16": True} else ()

    return {"model": model, "wide": property(wide)} | {
        name: _missing(name) for name in ("raw", "checkpoint", "sizes", "smooth")
    }


def _random(model: nn.Module, draw: np.random.Generator) -> Any:
    """Parameters of a model, drawn anew."""
    found = []
    for name, tensor in parameters(model).items():
        noise = np.asarray(draw.standard_normal(tensor.shape))
        scaled = 1 + 0.2 * noise if len(tensor.shape) == 1 else noise * 1.5 / tensor.shape[-1] ** 0.5
        found.append((name, mx.array(scaled.astype(np.float32))))
    return tree_unflatten(found)


def _exporter(component: Component, values: Mapping[str, Any]) -> dict[str, Any]:
    """A small Llama as the layout spells it that the exporter asks for, read by what opens it again."""
    spec = component.spec
    members = {"read": _read_again(spec), "error_bound": lambda self, options: 2.0**-8}  # bfloat16 at worst
    if not spec.layout:
        return members
    family = load_plugins().find("architecture", "llama:llama").spec
    layout = family.layouts.get(spec.layout)
    if layout is None or layout.write is None:
        return members | {"config": _missing("config")}
    words = len(json.loads(fixtures.tokenizer_json())["model"]["vocab"])
    args = parse(family.args, {**CONFIG, "max_seq_len": 64, "vocab_size": words}, owner=spec.name)
    table = {entry.name: entry for entry in layout.table(args)}
    adapted = table[f"{ADAPTED}.weight"]
    return members | {
        "config": dict(layout.write(args)),
        "shapes": {table[name].foreign: _as_high(shape, words) for name, shape in SHAPES.items()},
        "source": lambda self, *given: replace(ExporterSuite.source(self, *given), vocab_size=words),
        "foreign": adapted.foreign,
        "rows": adapted.rows,
        "packed": (adapted.foreign,),
        "tokenizer": {name: text.encode() for name, text in fixtures.tokenizer_files().items()},
    }


def _as_high(shape: tuple[int, ...], words: int) -> tuple[int, ...]:
    """The shape of a weight of a small Llama with so many words."""
    return (words, *shape[1:]) if shape[0] == CONFIG["vocab_size"] else shape


def _read_again(spec: Any) -> Callable[[Any, Path, Any], Mapping[str, np.ndarray]]:
    """The tensors of an export of a model by the one weight loader that knows its form."""

    def read(self: Any, folder: Path, options: Any) -> Mapping[str, np.ndarray]:
        path = next(folder.iterdir()) if spec.ending else folder
        there = [c.spec for c in load_plugins().of("loader") if spec.opens == "model" and c.spec.detect(path)]
        if len(there) != 1:
            raise NotImplementedError("read")
        tensors = there[0].open(path, there[0].options()).tensors
        return {name: np.array(tensor.read().astype(mx.float32)) for name, tensor in tensors.items()}

    return read


def _missing(name: str) -> property:
    """An attribute that nobody can guess."""

    def get(self: Any) -> Any:
        raise NotImplementedError(name)

    return property(get)


_GUESSES: dict[str, Callable[[Component, Mapping[str, Any]], dict[str, Any]]] = {
    "loader": _loader,
    "adapter": _adapter,
    "quantizer": _quantizer,
    "builder": _builder,
    "sampler": _sampler,
    "tokenizer": _tokenizer,
    "architecture": _architecture,
    "exporter": _exporter,
}
