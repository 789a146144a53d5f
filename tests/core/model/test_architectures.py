"""Which architecture builds a model, and what core does not take from one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.nn as nn
import pytest

from mlxlora_core.errors import ModelError, PluginError, SafetyError, UsageError
from mlxlora_core.model import architectures
from mlxlora_core.options import option
from mlxlora_core.plugins import Component, Registry
from mlxlora_core.specs import Architecture
from mlxlora_core.values import ForeignModel, LazyTensor

HERE = Path("model")


@dataclass(frozen=True)
class Args:
    """Those of the stand-in."""

    size: int = option(help="size", minimum=1, maximum=100)
    kind: str | None = option(None, help="what kind")
    shares: tuple[float, ...] = option((), help="some numbers", maximum=1)


def spec(**members: Any) -> Architecture:
    """An architecture for ``model_type`` odd, with other members."""
    good = {
        "name": "odd",
        "summary": "s",
        "model_types": ("odd", "even"),
        "args": Args,
        "read": lambda raw, shapes: Args(raw["odd"]) if "odd" in raw else None,
        "tensors": lambda found, args: found,
        "build": lambda args: None,
    }
    return Architecture(**good | members)


@pytest.fixture
def component(registry: Registry) -> Component:
    return Component("architecture", spec(), registry.find("architecture", "llama").plugin)


def of(component: Component, **members: Any) -> Component:
    return replace(component, spec=spec(**members))


def only(registry: Registry, *components: Component) -> Registry:
    others = [c for c in registry.components if c.kind != "architecture"]
    return Registry(registry.plugins, [*others, *components])


def foreign(config: dict[str, Any]) -> ForeignModel:
    return ForeignModel(config, {}, {})


# --- a foreign config -----------------------------------------------------------


def test_a_config_is_read_by_the_only_architecture_that_knows_it(
    registry: Registry, component: Component
) -> None:
    both = only(registry, component, registry.find("architecture", "llama"))
    found, args = architectures.read_foreign(foreign({"odd": 7}), both, HERE)
    assert (found.spec.name, args) == ("odd", Args(7))
    assert architectures.model_config(found, args, {"odd": 7}) == {
        "model_type": "odd",
        "size": 7,
        "shares": [],
    }
    assert architectures.model_config(found, args, {"model_type": "even"})["model_type"] == "even"
    with pytest.raises(ModelError, match=r"model: no model_type is stated or recog.* \(there is even, llama"):
        architectures.read_foreign(foreign({}), both, HERE)
    twice = only(registry, component, of(component, name="other"))
    with pytest.raises(ModelError, match="several architectures build this: llama:odd, llama:other"):
        architectures.read_foreign(foreign({"odd": 7}), twice, HERE)


def test_what_read_gives_is_held_against_the_args(registry: Registry, component: Component) -> None:
    for given, error, says in (
        (Args(101), ModelError, "model: size: must be at least 1 and at most 100, got 101"),
        (Args("7"), ModelError, "model: size: wanted integer, got '7'"),  # type: ignore[arg-type]  # as it must not be
        (Args(None), ModelError, "model: size is required"),  # type: ignore[arg-type]  # as it must not be
        ({"size": 7}, PluginError, "architecture llama:odd: read gives dict, wanted Args"),
    ):
        odd = only(registry, of(component, read=lambda raw, shapes, given=given: given))
        with pytest.raises(error) as caught:
            architectures.read_foreign(foreign({}), odd, HERE)
        assert says in str(caught.value)


def test_a_complaint_of_read_is_about_the_model(registry: Registry, component: Component) -> None:
    def refuse(raw: Any, shapes: Any) -> Any:
        raise UsageError("it is odd", fix="even it out")

    with pytest.raises(ModelError, match=r"^model: it is odd\. Fix: even it out$") as caught:
        architectures.read_foreign(foreign({}), only(registry, of(component, read=refuse)), HERE)
    assert caught.value.exit_code == 4


def test_a_config_that_asks_for_code_is_refused(registry: Registry, component: Component) -> None:
    raw = {"odd": 7, "auto_map": {"AutoModel": "x.py"}}
    with pytest.raises(SafetyError, match="auto_map"):
        architectures.read_foreign(foreign(raw), only(registry, component), HERE)
    installed = replace(component, plugin=replace(component.plugin, origin="installed"))
    assert architectures.read_foreign(foreign(raw), only(registry, installed), HERE)[1] == Args(7)
    assert architectures.folder_args(installed.spec, {"size": 7, "model_file": "x.py"}) == Args(7)


# --- a model folder's config ----------------------------------------------------


def test_a_folder_is_built_by_its_model_type_alone(registry: Registry, component: Component) -> None:
    def never(raw: Any, shapes: Any) -> Any:
        raise AssertionError

    both = only(registry, of(component, read=never))
    assert architectures.find_architecture({"model_type": "even"}, both, HERE).spec.name == "odd"
    for stated in (None, "llama", ["odd"], 3):
        with pytest.raises(ModelError):
            architectures.find_architecture({"model_type": stated}, both, HERE)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"size": "7"}, "size: wanted integer, got '7'"),
        ({"size": True}, "size: wanted a whole number, got True"),
        ({"size": 7, "shares": "1,2"}, "shares: wanted list of number, got '1,2'"),
        ({"size": 7, "shares": [2]}, "shares: must be at most 1, got 2.0"),
        ({"size": 7, "kind": 3}, "kind: wanted text, got 3"),
        ({"size": 7, "sizes": 3}, "has no option 'sizes' (did you mean 'size'?"),
        ({}, "size is required: size"),
        ({"size": None}, "size is required: size"),
    ],
)
def test_config_values_are_taken_as_they_are(config: dict[str, Any], says: str) -> None:
    with pytest.raises(ModelError) as caught:
        architectures.folder_args(spec(), config)
    assert says in str(caught.value)


def test_keys_of_core_and_nulls_are_passed_over() -> None:
    own = {
        "model_type": "odd",
        "quantizer": "a",
        "quantization": {},
        "quantized": {},
        "tokenizer_files": ["t"],
    }
    assert architectures.folder_args(spec(), {**own, "size": 7, "kind": None}) == Args(7)


# --- what is built --------------------------------------------------------------


def test_tensors_that_are_none_are_a_breach(component: Component) -> None:
    def tensors(given: Any) -> Callable[..., Any]:
        return lambda: architectures.model_tensors(
            of(component, tensors=lambda *_: given), foreign({}), Args(7), {}
        )

    good = LazyTensor((1,), "float32", lambda: None)  # type: ignore[arg-type, return-value]  # unread
    assert tensors({"a": good})() == {"a": good}
    for given, says in (
        (None, "gives NoneType, wanted a mapping"),
        ([good], "gives list, wanted a mapping"),
        ({"a": 1}, "gives int, wanted LazyTensor"),
        ({1: good}, "gives int, wanted str"),
    ):
        with pytest.raises(PluginError, match="architecture llama:odd: tensors") as caught:
            tensors(given)()
        assert says in str(caught.value)


def test_a_model_without_its_members_is_a_breach(component: Component, stand_in: Callable[..., Any]) -> None:
    model = stand_in()
    assert architectures.build(of(component, build=lambda args: model), Args(7)) is model
    model.head_path = ""
    assert architectures.build(of(component, build=lambda args: model), Args(7)) is model
    for member, value, says in (
        ("layers", (), "layers of type tuple"),
        ("layers", [1], "layers of type list"),
        ("layers", [], "layers of type list"),
        ("vocab_size", 0, "vocab_size 0"),
        ("vocab_size", True, "vocab_size True"),
        ("vocab_size", None, "vocab_size None"),
        ("context_tokens", "64", "context_tokens '64'"),
        ("head_path", None, "head_path None"),
        ("head_path", "no.such", "head_path 'no.such'"),
        ("head_path", "embedding", "head_path 'embedding'"),
    ):
        broken = stand_in()
        setattr(broken, member, value)
        with pytest.raises(PluginError, match="architecture llama:odd: build gives ") as caught:
            architectures.build(of(component, build=lambda args, broken=broken: broken), Args(7))
        assert says in str(caught.value)
    for other in (None, nn.Linear(2, 2), object()):
        with pytest.raises(PluginError, match="wanted LanguageModel"):
            architectures.build(of(component, build=lambda args, other=other: other), Args(7))
