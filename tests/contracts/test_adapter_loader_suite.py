"""The conformance suite over every adapter loader that is registered, and over loaders that break it."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf_files
import mlx.core as mx
import pytest
from _pytest.outcomes import Failed

from mlxlora_core import plugins as registry
from mlxlora_core.api import ForeignAdapter
from mlxlora_core.testing.adapter_loader import AdapterLoaderSuite

REGISTRY = registry.load(environ={registry.ALLOW_LIST: ""})
LOADERS = {component.spec.name: component.spec for component in REGISTRY.of("adapter-loader")}
Q, V, DOWN = (
    f"model.layers.{path}" for path in ("0.self_attn.q_proj", "1.self_attn.v_proj", "1.mlp.down_proj")
)


def draw(*shape: int) -> mx.array:
    return mx.random.normal(shape)


def at(file: str, text: str) -> Callable[[Path], object]:
    return lambda folder: (folder / file).write_text(text)


def cut(file: str, size: int) -> Callable[[Path], object]:
    return lambda folder: os.truncate(folder / file, size)


class TestPeft(AdapterLoaderSuite):
    """LoRA with a rank and an alpha that differ, in bfloat16, names as PEFT has them and has had them."""

    spec = LOADERS["peft"]
    config: Mapping[str, Any] = {
        "peft_type": "LORA",
        "r": 4,
        "lora_alpha": 8,
        "lora_dropout": 0.1,
        "rank_pattern": {"v_proj": 2},
        "alpha_pattern": {"model.layers.1.mlp.down_proj": 3},
        "target_modules": ["q_proj", "v_proj", "down_proj"],
        "bias": "none",
    }

    def write(self, folder: Path) -> Mapping[str, mx.array]:
        ranks = {Q: 4, V: 2, DOWN: 4}
        a = {path: draw(rank, 8).astype(mx.bfloat16) for path, rank in ranks.items()}
        b = {path: draw(6, rank) for path, rank in ranks.items()}
        names = {
            Q: "base_model.model.{}.{}.weight",
            V: "base_model.model.{}.{}.default.weight",
            DOWN: "{}.{}",
        }
        tensors = {names[path].format(path, "lora_A"): tensor for path, tensor in a.items()}
        tensors |= {names[path].format(path, "lora_B"): tensor for path, tensor in b.items()}
        mx.save_safetensors(str(folder / "adapter_model.safetensors"), tensors, {"format": "pt"})
        (folder / "adapter_config.json").write_text(json.dumps(dict(self.config)))
        want = {f"{path}.lora_a": tensor.T for path, tensor in a.items()}
        return want | {f"{path}.lora_b": tensor.T for path, tensor in b.items()}

    def damage(self) -> Mapping[str, Callable[[Path], object]]:
        file = "adapter_model.safetensors"
        return {
            "truncated": cut(file, 200),
            "emptied": cut(file, 0),
            "gone": lambda folder: (folder / file).unlink(),
            "a pickle": lambda folder: (folder / file).rename(folder / "adapter_model.bin"),
            "config cut": cut("adapter_config.json", 9),
            "config of nobody": at("adapter_config.json", "{}"),
            "another rank": at("adapter_config.json", json.dumps({**self.config, "r": 8})),
            "another kind": at("adapter_config.json", json.dumps({**self.config, "peft_type": "IA3"})),
            "alpha is a word": at("adapter_config.json", json.dumps({**self.config, "lora_alpha": "8"})),
        }

    def test_scales(self, tmp_path: Path) -> None:
        """Alpha by rank, each of which may be a module's own."""
        self.write(tmp_path)
        opened = self._open(tmp_path)
        assert (opened.adapter, opened.layout, dict(opened.outputs)) == ("lora", "hf", {"lora_b": 1})
        assert opened.options == {"rank": 4, "scale": 2.0, "dropout": 0.1}
        assert opened.overrides == {V: {"rank": 2, "scale": 4.0}, DOWN: {"scale": 0.75}}


class TestPeftFile(TestPeft):
    """The file itself, with the config beside it."""

    def path(self, folder: Path) -> Path:
        return folder / "adapter_model.safetensors"

    def damage(self) -> Mapping[str, Callable[[Path], object]]:
        kinds = dict(super().damage())
        del kinds["config of nobody"]  # then there is none
        return kinds


class TestMlxLm(AdapterLoaderSuite):
    """What mlx-lm writes."""

    spec = LOADERS["mlx-lm"]
    config: Mapping[str, Any] = {
        "fine_tune_type": "lora",
        "num_layers": 2,
        "lora_parameters": {"rank": 4, "scale": 20.0, "dropout": 0.0},
    }
    parts: Mapping[str, tuple[int, ...]] = {"lora_a": (8, 4), "lora_b": (4, 6)}

    def write(self, folder: Path) -> Mapping[str, mx.array]:
        tensors = {
            f"{path}.{part}": draw(*shape) for path in (Q, V, DOWN) for part, shape in self.parts.items()
        }
        mx.save_safetensors(str(folder / "adapters.safetensors"), tensors)
        (folder / "adapter_config.json").write_text(json.dumps(dict(self.config)))
        return tensors

    def damage(self) -> Mapping[str, Callable[[Path], object]]:
        def config(**changed: Any) -> Callable[[Path], object]:
            return at("adapter_config.json", json.dumps({**self.config, **changed}))

        return {
            "truncated": cut("adapters.safetensors", 200),
            "emptied": cut("adapters.safetensors", 0),
            "gone": lambda folder: (folder / "adapters.safetensors").unlink(),
            "config cut": cut("adapter_config.json", 9),
            "a whole model": config(fine_tune_type="full"),
            "another type": config(fine_tune_type=["lora"]),
            "another rank": config(lora_parameters={"rank": 8, "scale": 2.0}),
            "scale is a word": config(lora_parameters={"rank": 4, "scale": "2"}),
            "parameters are a list": config(lora_parameters=[4, 2.0]),
        }


class TestDoraOfMlxLm(TestMlxLm):
    """With magnitudes."""

    config: Mapping[str, Any] = {**TestMlxLm.config, "fine_tune_type": "dora"}
    parts: Mapping[str, tuple[int, ...]] = {**TestMlxLm.parts, "m": (6,)}


class TestAppleNpz(TestMlxLm):
    """The file of Apple's example: Meta's names, and no config."""

    def path(self, folder: Path) -> Path:
        return folder / "adapters.npz"

    def write(self, folder: Path) -> Mapping[str, mx.array]:
        tensors = {
            f"layers.{layer}.attention.wq.{part}": draw(*shape)
            for layer in (0, 1)
            for part, shape in self.parts.items()
        }
        mx.savez(str(folder / "adapters.npz"), **tensors)
        return tensors

    def damage(self) -> Mapping[str, Callable[[Path], object]]:
        return {"truncated": cut("adapters.npz", 200), "emptied": cut("adapters.npz", 0)}

    def test_the_scale_is_not_told(self, tmp_path: Path) -> None:
        self.write(tmp_path)
        opened = self._open(tmp_path)
        assert (dict(opened.options), opened.unstated) == ({"rank": 4}, ("scale",))


class TestGgufLora(AdapterLoaderSuite):
    """A LoRA file of llama.cpp with two ranks, an embedding, and matrices in float16 and in blocks."""

    spec = LOADERS["gguf-lora"]
    shapes: Mapping[str, tuple[str, tuple[int, int]]] = {
        "blk.0.attn_q.weight.lora_a": ("F32", (4, 8)),
        "blk.0.attn_q.weight.lora_b": ("F16", (6, 4)),
        "blk.1.ffn_down.weight.lora_a": ("Q8_0", (2, 32)),
        "blk.1.ffn_down.weight.lora_b": ("BF16", (6, 2)),
        "token_embd.weight.lora_a": ("F32", (9, 4)),
        "token_embd.weight.lora_b": ("F32", (6, 4)),
    }

    def path(self, folder: Path) -> Path:
        return folder / "adapter.gguf"

    def write(self, folder: Path, **changed: Any) -> Mapping[str, mx.array]:
        keys = {"general.type": "adapter", "general.architecture": "llama", "adapter.type": "lora"}
        keys |= {"adapter.lora.alpha": 8.0, **changed}
        tensors, want = [], {}
        for name, (kind, shape) in self.shapes.items():
            array = draw(*shape)
            if kind == "Q8_0":
                data = gguf_files.blocks(kind, shape[0] * shape[1] // 32)
                array = mx.array(gguf_files.weights(kind, data)).astype(mx.float32).reshape(shape)
            elif kind == "F32":
                data = bytes(memoryview(array).cast("B"))
            else:
                array = array.astype(mx.float16 if kind == "F16" else mx.bfloat16)
                data = bytes(memoryview(array.view(mx.uint16)).cast("B"))
            tensors.append(gguf_files.Tensor(name, shape, kind, data))
            path, _, letter = name.replace(".weight.", ".").rpartition(".")
            want[f"{path}.{letter}"] = array if name == "token_embd.weight.lora_a" else array.T
        self.path(folder).write_bytes(gguf_files.gguf(keys, tensors))
        return want

    def damage(self) -> Mapping[str, Callable[[Path], object]]:
        return {
            "truncated": lambda folder: os.truncate(self.path(folder), 300),
            "emptied": lambda folder: os.truncate(self.path(folder), 0),
            "gone": lambda folder: self.path(folder).unlink(),
            "another kind": lambda folder: self.write(folder, **{"adapter.type": "ia3"}),
            "a model": lambda folder: self.write(folder, **{"general.type": "model"}),
            "an alpha in words": lambda folder: self.write(folder, **{"adapter.lora.alpha": "8"}),
        }


def test_every_loader_is_tried() -> None:
    assert LOADERS.keys() == {suite.spec.name for suite in (TestPeft, TestMlxLm, TestGgufLora)}


# --- loaders that break the contract are found out ----------------------------


def changing(**changed: Any) -> Callable[..., ForeignAdapter]:
    def opened(path: Path, options: Any) -> ForeignAdapter:
        return dataclasses.replace(LOADERS["mlx-lm"].open(path, options), **changed)

    return opened


def doubled(path: Path, options: Any) -> ForeignAdapter:
    found = LOADERS["mlx-lm"].open(path, options)
    linears = {
        at: {name: dataclasses.replace(t, read=lambda t=t: 2 * t.read()) for name, t in held.items()}
        for at, held in found.linears.items()
    }
    return dataclasses.replace(found, linears=linears)


def leaving(path: Path, options: Any) -> ForeignAdapter:
    (path / "read.txt").write_text("x")
    return LOADERS["mlx-lm"].open(path, options)


def swallowing(path: Path, options: Any) -> ForeignAdapter:
    try:
        return LOADERS["mlx-lm"].open(path, options)
    except Exception:
        return ForeignAdapter("lora", {}, {})


BROKEN: dict[str, tuple[dict[str, Any], str]] = {
    "knows nothing": ({"detect": lambda path: False}, "test_knows_its_adapters"),
    "knows everything": ({"detect": lambda path: True}, "test_knows_its_adapters"),
    "other values": ({"open": doubled}, "test_names_shapes_and_values"),
    "an option that there is not": ({"open": changing(options={"alpha": 1})}, "test_says_what_it_is_here"),
    "an adapter that there is not": ({"open": changing(adapter="olora")}, "test_says_what_it_is_here"),
    "options that do not differ": (
        {"open": changing(options={"rank": 4}, overrides={Q: {"rank": 4}})},
        "test_says_what_it_is_here",
    ),
    "stated and not": ({"open": changing(unstated=("rank",))}, "test_says_what_it_is_here"),
    "an axis too many": (
        {"open": changing(outputs={"lora_b": 2})},
        "test_outputs_are_axes_of_its_parameters",
    ),
    "no axis": ({"open": changing(outputs={})}, "test_outputs_are_axes_of_its_parameters"),
    "writes": ({"open": leaving}, "test_source_is_left_alone"),
    "takes what is damaged": ({"open": swallowing}, "test_damage_is_an_error"),
}


@pytest.mark.parametrize(("functions", "test"), BROKEN.values(), ids=BROKEN)
def test_the_suite_finds_out(tmp_path: Path, functions: dict[str, Any], test: str) -> None:
    class Broken(TestMlxLm):
        spec = dataclasses.replace(LOADERS["mlx-lm"], **functions)

    with pytest.raises((AssertionError, Failed, Exception)) as found:
        getattr(Broken(), test)(tmp_path)
    assert not isinstance(found.value, (TypeError, AttributeError, NameError))
