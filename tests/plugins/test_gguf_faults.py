"""Faults that are planted in GGUF files on their way out: the check of exports finds each of them."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf_files
import numpy as np
import pytest
import small_models

from mlxlora_core.errors import ModelError
from mlxlora_core.model.adapters import AdapterFile
from mlxlora_core.model.events import result_of
from mlxlora_core.model.export import ExportReport, export
from mlxlora_core.plugins import Choice, Component, Plugin, Registry
from mlxlora_core.values import ExportSource

MODEL, ADAPTER = (small_models.REGISTRY.find("exporter", name) for name in ("gguf", "gguf-lora"))
Held = tuple[dict[str, Any], dict[str, tuple[str, tuple[int, ...], bytes]]]
GGML = "tokenizer.ggml."


@pytest.fixture(scope="module")
def registry() -> Registry:
    return small_models.REGISTRY


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A function that gives a folder of a family, made once."""
    made: dict[str, Path] = {}

    def folder(family: str) -> Path:
        if family not in made:
            made[family] = small_models.write(tmp_path_factory.mktemp("hf") / "base", family)
            merge_digits(made[family] / "tokenizer.json")
        return made[family]

    return folder


def merge_digits(path: Path) -> None:
    """Give a tokenizer tokens of several digits, which texts have that are cut in the right places alone."""
    held = json.loads(path.read_text())
    vocabulary, merges = held["model"]["vocab"], held["model"]["merges"]
    for first, second in (("1", "2"), ("3", "4"), ("12", "34")):
        vocabulary[first + second] = max(vocabulary.values()) + 1
        merges.append([first, second])
    path.write_text(json.dumps(held))


def spoilt(component: Component, change: Callable[[Held], Held], **options: Any) -> Choice:
    """An exporter that writes its file again, changed, by another writer."""

    def spoil(source: ExportSource, target: Path, options: Any) -> None:
        component.spec.export(source, target, options)
        (file,) = target.iterdir()
        keys, tensors = change(gguf_files.read(file.read_bytes()))
        written = [
            gguf_files.Tensor(name, shape, kind, data) for name, (kind, shape, data) in tensors.items()
        ]
        file.write_bytes(gguf_files.gguf(keys, written))

    spec = replace(component.spec, export=spoil)
    plugin = Plugin("odd", "odd", "1", "installed", "odd")
    return Choice(Component("exporter", spec, plugin), spec.options(**options))


def said(**keys: Any) -> Callable[[Held], Held]:
    """Keys that are something else; None takes one away."""
    changed = {key.replace("__", "."): value for key, value in keys.items()}

    def change(held: Held) -> Held:
        made = {**held[0], **changed}
        return {key: value for key, value in made.items() if value is not None}, held[1]

    return change


def turned(name: str, function: Callable[[np.ndarray], np.ndarray]) -> Callable[[Held], Held]:
    """One tensor changed, F32."""

    def change(held: Held) -> Held:
        kind, shape, data = held[1][name]
        assert kind == "F32"
        made = np.ascontiguousarray(function(np.frombuffer(data, "<f4").reshape(shape)), "<f4")
        return held[0], {**held[1], name: (kind, made.shape, made.tobytes())}

    return change


def permuted(rows: np.ndarray) -> np.ndarray:
    """Heads of 16, as a converter orders them that thinks that they are Hugging Face's."""
    return rows.reshape(-1, 2, 8, rows.shape[-1]).swapaxes(1, 2).reshape(rows.shape)


def doubled(held: Held) -> Held:
    return held[0], {**held[1], "output.weight": held[1]["token_embd.weight"]}


def without(name: str) -> Callable[[Held], Held]:
    return lambda held: (held[0], {key: value for key, value in held[1].items() if key != name})


def typed(held: Held) -> Held:
    """No token is special."""
    return {**held[0], f"{GGML}token_type": [1] * len(held[0][f"{GGML}tokens"])}, held[1]


NORM, QUERIES, KEYS = "blk.1.attn_norm.weight", "blk.0.attn_q.weight", "blk.1.attn_k.weight"
FAULTS: Mapping[str, tuple[str, Callable[[Held], Held], str]] = {
    "queries permuted twice": ("llama", turned(QUERIES, permuted), "attention.wq.weight differs by 1"),
    "keys permuted, where they are not": (
        "qwen3",
        turned(KEYS, permuted),
        "attention.wk.weight differs by 1",
    ),
    "norms without the one": ("gemma3", turned(NORM, lambda w: w - 1), "attention_norm.weight differs"),
    "a norm with two": ("gemma2", turned("output_norm.weight", lambda w: w + 1), "norm.weight differs"),
    "a tied head twice": ("llama tied", doubled, "tie_word_embeddings is False, wanted True"),
    "no pre": ("llama", said(tokenizer__ggml__pre=None), "its tokenizer has other ids for"),
    "another pre": ("llama", said(tokenizer__ggml__pre="qwen2"), "its tokenizer has other ids for"),
    "another end id": ("llama", said(tokenizer__ggml__eos_token_id=5), "texts end with"),
    "no types of tokens": ("llama", typed, "conversation"),
    "another begin id": ("llama", said(tokenizer__ggml__bos_token_id=2), "texts begin with 2, wanted 0"),
    "no begin id": ("llama", said(tokenizer__ggml__add_bos_token=False), "texts begin with no id"),
    "no template": ("llama", said(tokenizer__chat_template=None), "chat template"),
    "another base of the rope": ("qwen2", said(qwen2__rope__freq_base=1e4), "rope_theta is 10000.0"),
    "no divisors": ("llama tied", without("rope_freqs.weight"), "computes something else"),
    "another eps": (
        "olmo2",
        said(olmo2__attention__layer_norm_rms_epsilon=1e-6),
        "norm_eps is",
    ),
    "another window": (
        "gemma3",
        said(gemma3__attention__sliding_window=12),
        "sliding_window is 12, wanted 24",
    ),
    "windows in other layers": (
        "gemma3",
        said(gemma3__attention__sliding_window_pattern=[False, True]),
        "window_layers",
    ),
    "one layer less": ("phi3", said(phi3__block_count=1), "n_layers is 1, wanted 2"),
    "no tensor": ("llama", without(QUERIES), QUERIES),
}


def run(base: Path, target: Path, choice: Choice, registry: Registry, **more: Any) -> ExportReport:
    return result_of(export(base, target, choice, registry, **more))


@pytest.mark.parametrize("family", [name for name in small_models.FAMILIES if name != "mistral"])
def test_each_family_passes(
    folders: Callable[[str], Path], registry: Registry, tmp_path: Path, family: str
) -> None:
    choice = Choice(MODEL, MODEL.spec.options())
    report = run(folders(family), tmp_path / "model.gguf", choice, registry)
    assert report.check is not None and report.check.distance < 1e-5 and report.check.same_argmax == 1
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]
    # Written again without a change, it passes as well: what follows is found for what it is.
    again = run(folders(family), tmp_path / "again.gguf", spoilt(MODEL, lambda held: held), registry)
    assert again.check == report.check


@pytest.mark.parametrize("case", FAULTS)
def test_a_planted_fault_is_4_in_one_line_and_leaves_nothing(
    folders: Callable[[str], Path], registry: Registry, tmp_path: Path, case: str
) -> None:
    family, change, words = FAULTS[case]
    with pytest.raises(ModelError) as caught:
        run(folders(family), tmp_path / "model.gguf", spoilt(MODEL, change), registry)
    told = str(caught.value)
    assert words in told and "which was not kept" in told
    assert "\n" not in told and len(told.encode()) < 2000
    assert caught.value.exit_code == 4 and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_1"])
def test_rounding_does_not_hide_a_fault(
    folders: Callable[[str], Path], registry: Registry, tmp_path: Path, kind: str
) -> None:
    def halved(held: Held) -> Held:
        name, (kind, shape, data) = QUERIES, held[1][QUERIES]
        size = gguf_files.TYPES[kind][2]
        (scale,) = struct.unpack_from("<e", data)
        blocks = struct.pack("<e", 2 * scale) + data[2:size] if scale else data[:size]
        return held[0], {**held[1], name: (kind, shape, blocks * (len(data) // size))}

    with pytest.raises(ModelError, match=r"attention\.wq\.weight differs by .* explains"):
        run(folders("llama"), tmp_path / "model.gguf", spoilt(MODEL, halved, type=kind), registry)


# --- adapters -----------------------------------------------------------------


@pytest.fixture
def adapter(
    folders: Callable[[str], Path], registry: Registry, tmp_path: Path
) -> Callable[[str], AdapterFile]:
    """A function that makes a low-rank update of all linears of a family."""

    def make(family: str) -> AdapterFile:
        return small_adapter(folders(family), tmp_path / f"{family}.safetensors", registry)

    return make


def small_adapter(base: Path, path: Path, registry: Registry) -> AdapterFile:
    """A low-rank update of all linears that changes what the model computes, of two ranks and scales."""
    import mlx.core as mx

    from mlxlora_core.model import adapters, loading
    from mlxlora_core.plugins.sections import configure

    model = loading.load(base, registry)
    values = {"rank": 2, "targets": ("all-linear",), "overrides": ("wo: rank=3, scale=5.0",)}
    choice, config = configure(registry.find("adapter", "lora"), values)
    adapted = adapters.attach(model, choice, config, seed=1)
    held = adapters.trainable(model.module)
    drawn = [
        (n, mx.random.normal(t.shape, key=mx.random.key(i)) * 0.1) for i, (n, t) in enumerate(held.items())
    ]
    model.module.load_weights(drawn, strict=False)
    adapters.save(path, model, adapted)
    return AdapterFile(path)


@pytest.mark.parametrize("family", small_models.FAMILIES)
def test_adapters_of_each_family_pass(
    folders: Callable[[str], Path],
    registry: Registry,
    tmp_path: Path,
    adapter: Callable[[str], AdapterFile],
    family: str,
) -> None:
    if family == "mistral":
        pytest.skip("its window is none of llama.cpp's")
    choice, file = Choice(ADAPTER, ADAPTER.spec.options()), adapter(family)
    report = run(folders(family), tmp_path / "adapter.gguf", choice, registry, fused=file)
    assert report.check is not None and report.check.distance < 1e-5
    assert report.check.largest_rounding < 1e-6
    keys, tensors = gguf_files.read((tmp_path / "adapter.gguf").read_bytes())
    assert keys["adapter.lora.alpha"] == 4.0 or family == "phi3"
    assert all(name.rpartition(".")[2] in ("lora_a", "lora_b") for name in tensors)


def not_turned(held: Held) -> Held:
    """The columns of B for the queries as Hugging Face has them."""
    return turned("blk.0.attn_q.weight.lora_b", permuted)(held)


ADAPTER_FAULTS: Mapping[str, tuple[Callable[[Held], Held], str]] = {
    "another scale": (said(adapter__lora__alpha=8.0), "is changed otherwise: by 1"),
    "rows of the other library": (not_turned, "layers.0.attention.wq is changed otherwise"),
    "one linear less": (
        lambda held: (held[0], {n: t for n, t in held[1].items() if "blk.1.ffn_up" not in n}),
        "layers.1.feed_forward.w3",
    ),
    "half of a pair": (without("blk.1.ffn_up.weight.lora_a"), "lacks one of the two matrices"),
    "no adapter": (said(general__type="model"), "wanted .safetensors or .npz"),
}


@pytest.mark.parametrize("case", ADAPTER_FAULTS)
def test_a_planted_fault_in_an_adapter_is_found(
    folders: Callable[[str], Path],
    registry: Registry,
    tmp_path: Path,
    adapter: Callable[[str], AdapterFile],
    case: str,
) -> None:
    change, words = ADAPTER_FAULTS[case]
    file = adapter("llama")
    with pytest.raises(ModelError) as caught:
        run(folders("llama"), tmp_path / "out.gguf", spoilt(ADAPTER, change), registry, fused=file)
    told = str(caught.value)
    assert words in told and "\n" not in told and not (tmp_path / "out.gguf").exists()
