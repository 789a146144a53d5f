"""The conformance suite over every exporter that is registered, and what it must find."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf_files
import mlx.core as mx
import numpy as np
import pytest
import small_tokenizers
from safetensors.numpy import load_file

from mlxlora_core import plugins as registry
from mlxlora_core.api import neighbour_rows
from mlxlora_core.specs import Exporter
from mlxlora_core.testing.exporter import ExporterSuite
from mlxlora_core.values import ExportAdapter, ExportSource

EXPORTERS = {c.spec.name: c.spec for c in registry.load(environ={registry.ALLOW_LIST: ""}).of("exporter")}


class TestNpz(ExporterSuite):
    spec = EXPORTERS["npz"]
    option_sets = ({}, {"dtype": "float32"}, {"dtype": "float16"})

    def read(self, folder: Path, options: Any) -> Mapping[str, np.ndarray]:
        with np.load(folder / "weights.npz", allow_pickle=False) as archive:
            return dict(archive)

    def error_bound(self, options: Any) -> float:
        return 2.0**-11 if options.dtype == "float16" else 0.0


HF_CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "vocab_size": 50,
}
HF_LAYER = "model.layers.0."
HF_SHAPES = {
    "model.embed_tokens.weight": (50, 32),
    f"{HF_LAYER}self_attn.q_proj.weight": (32, 32),
    f"{HF_LAYER}mlp.down_proj.weight": (32, 64),
    f"{HF_LAYER}input_layernorm.weight": (32,),
    "lm_head.weight": (50, 32),
}


class TestHf(ExporterSuite):
    spec = EXPORTERS["hf"]
    option_sets = ({}, {"dtype": "float32"}, {"dtype": "bfloat16"})
    dtypes = ("float16", "bfloat16", "float32")
    config, shapes, foreign = HF_CONFIG, HF_SHAPES, f"{HF_LAYER}self_attn.q_proj.weight"

    def read(self, folder: Path, options: Any) -> Mapping[str, np.ndarray]:
        return {name: np.array(array.astype(mx.float32)) for name, array in weights(folder).items()}

    def error_bound(self, options: Any) -> float:
        return 2.0**-8 if options.dtype == "bfloat16" else 0.0


class TestMlxLm(TestHf):
    spec = EXPORTERS["mlx-lm"]
    packed = (f"{HF_LAYER}self_attn.q_proj.weight", "lm_head.weight")

    def read(self, folder: Path, options: Any) -> Mapping[str, np.ndarray]:
        """The words are taken apart by MLX, which mlx-lm multiplies with."""
        table = json.loads((folder / "config.json").read_text()).get("quantization")
        held = weights(folder)
        found = {}
        for name, array in held.items():
            path = name.removesuffix(".weight")
            if f"{path}.scales" in held:
                parts = [held[f"{path}.{part}"].astype(mx.float32) for part in ("scales", "biases")]
                array = mx.dequantize(array, *parts, table["group_size"], table["bits"])
            if name.endswith("weight"):
                found[name] = np.array(array.astype(mx.float32))
        return found


class TestPeftAdapter(TestHf):
    """Heads of 8 features, whose halves PEFT's library has against each other."""

    spec = EXPORTERS["peft"]
    option_sets = ({}, {"base": "org/name"})
    rows = neighbour_rows(4, 8)

    def read(self, folder: Path, options: Any) -> Mapping[str, np.ndarray]:
        config = json.loads((folder / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == (options.base or "a base")
        assert (config["r"], config["lora_alpha"]) == (2, 4)
        held = load_file(folder / "adapter_model.safetensors")
        path = f"base_model.model.{self.foreign.removesuffix('.weight')}"
        a, b = held.pop(f"{path}.lora_A.weight"), held.pop(f"{path}.lora_B.weight")
        assert not held
        return {f"{self.adapted}.lora_a": a.T, f"{self.adapted}.lora_b": b.T[:, self.rows]}

    def error_bound(self, options: Any) -> float:
        return 0.0


class TestMlxLmAdapter(TestPeftAdapter):
    spec = EXPORTERS["mlx-lm-adapter"]
    option_sets = ({},)

    def adapter(self) -> ExportAdapter:
        return replace(super().adapter(), layers=1)  # the only one, so that it is the top one

    def read(self, folder: Path, options: Any) -> Mapping[str, np.ndarray]:
        held = load_file(folder / "adapters.safetensors")
        path = self.foreign.removesuffix(".weight")
        a, b = held.pop(f"{path}.lora_a"), held.pop(f"{path}.lora_b")
        assert not held
        return {f"{self.adapted}.lora_a": a, f"{self.adapted}.lora_b": b[:, self.rows]}


GGUF_CONFIG = {
    "general.architecture": "llama",
    "llama.context_length": 64,
    "llama.embedding_length": 32,
    "llama.block_count": 1,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
}
GGUF_SHAPES = {
    "token_embd.weight": (50, 32),
    "blk.0.attn_q.weight": (32, 32),
    "blk.0.ffn_down.weight": (32, 64),
    "blk.0.ffn_up.weight": (48, 40),  # no whole blocks
    "blk.0.attn_norm.weight": (32,),
    "output.weight": (50, 32),
}
GGUF_WIDE = {**GGUF_SHAPES, "blk.0.attn_q.weight": (32, 128)}
GGUF_TOKENIZER = {"tokenizer.json": small_tokenizers.tiny()[0]}


class TestGguf(ExporterSuite):
    spec = EXPORTERS["gguf"]
    option_sets = tuple(
        {"type": kind, "pre": "gpt-2"} for kind in ("auto", "F32", "F16", "BF16", "Q8_0", "Q4_1", "Q5_1")
    )
    dtypes = ("float16", "bfloat16", "float32")
    config, shapes, foreign = GGUF_CONFIG, GGUF_SHAPES, "blk.0.attn_q.weight"
    tokenizer = GGUF_TOKENIZER
    packed = ("blk.0.attn_q.weight", "output.weight")

    def read(self, folder: Path, options: Any) -> Mapping[str, np.ndarray]:
        _, found = gguf_files.read((folder / "model.gguf").read_bytes())
        return {
            name: np.array(gguf_files.weights(kind, data)).reshape(shape)
            for name, (kind, shape, data) in found.items()
        }

    def error_bound(self, options: Any) -> float:
        """Half a step of the largest group, whose numbers go up to the largest of the tensor."""
        steps = {"auto": 0.0, "F32": 0.0, "F16": 2.0**-11, "BF16": 2.0**-8}
        return {**steps, "Q8_0": 0.6 / 127, "Q4_1": 1.1 / 15, "Q5_1": 1.1 / 31}[options.type]


class TestGgufOfLargeGroups(TestGguf):
    shapes = GGUF_WIDE
    group_size = 128
    packed = ("blk.0.attn_q.weight",)


class TestGgufLora(ExporterSuite):
    spec = EXPORTERS["gguf-lora"]
    option_sets = ({}, {"type": "F16"})
    config, shapes, foreign = GGUF_CONFIG, GGUF_SHAPES, "blk.0.attn_q.weight"
    rows = (*range(16, 32), *range(16))

    def read(self, folder: Path, options: Any) -> Mapping[str, np.ndarray]:
        keys, found = gguf_files.read((folder / "adapter.gguf").read_bytes())
        assert keys["general.type"] == "adapter" and keys["adapter.type"] == "lora"
        assert keys["general.architecture"] == "llama" and keys["adapter.lora.alpha"] == 2.0 * 2
        a, b = (
            np.array(gguf_files.weights(kind, data)).reshape(shape)
            for kind, shape, data in (found[f"{self.foreign}.lora_{letter}"] for letter in "ab")
        )
        assert len(found) == 2
        return {f"{self.adapted}.lora_a": a.T, f"{self.adapted}.lora_b": b[list(self.rows)].T}

    def error_bound(self, options: Any) -> float:
        return 2.0**-11 if options.type == "F16" else 0.0


def weights(folder: Path) -> dict[str, mx.array]:
    """What MLX, which knows nothing of mlxlora, reads of a folder."""
    loaded: Any = mx.load(str(folder / "model.safetensors"))
    return dict(loaded)


def test_every_exporter_is_tested() -> None:
    assert {value.spec.name for name, value in globals().items() if name.startswith("Test")} == set(EXPORTERS)


# --- what the suite must find -------------------------------------------------


class Suite(TestNpz):
    """The suite as a tool, for exporters that are broken on purpose."""

    __test__ = False


def changed(export: Any) -> Suite:
    suite = Suite()
    suite.spec = Exporter(name="bad", summary="s", export=export)
    return suite


def test_a_transposed_tensor_is_found(tmp_path: Path) -> None:
    def export(source: ExportSource, target: Path, options: Any) -> None:
        wrong = {n: replace(t, read=lambda t=t: mx.flip(t.read(), -1)) for n, t in source.tensors.items()}
        TestNpz.spec.export(replace(source, tensors=wrong), target, TestNpz.spec.options())

    with pytest.raises(AssertionError, match=r"tok_embeddings\.weight by"):
        changed(export).test_an_independent_reader_finds_every_number(
            TestNpz.spec.options(), "float32", tmp_path
        )


def test_one_that_keeps_what_it_reads_is_found(tmp_path: Path) -> None:
    def export(source: ExportSource, target: Path, options: Any) -> None:
        np.savez(target / "weights.npz", **{n: np.array(t) for n, t in _all(source).items()})

    def _all(source: ExportSource) -> dict[str, mx.array]:
        return {name: tensor.read() for name, tensor in source.tensors.items()}

    with pytest.raises(AssertionError, match="it keeps what it has read"):
        changed(export).test_tensors_are_let_go_one_after_another(None, tmp_path)


def test_one_that_forgets_to_clear_up_is_found(tmp_path: Path) -> None:
    def export(source: ExportSource, target: Path, options: Any) -> None:
        (target / ".weights.tmp").write_bytes(b"x")

    with pytest.raises(AssertionError):
        changed(export).test_whole_files_and_nothing_else(None, tmp_path)


def test_one_that_writes_the_time_is_found(tmp_path: Path) -> None:
    count = iter(range(9))

    def export(source: ExportSource, target: Path, options: Any) -> None:
        (target / "model").write_text(str(next(count)))

    with pytest.raises(AssertionError):
        changed(export).test_the_same_model_gives_the_same_bytes(None, tmp_path)
