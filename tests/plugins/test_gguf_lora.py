"""LoRA files of llama.cpp: what is read of them, and what is refused by name, both ways."""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf_files
import mlx.core as mx
import numpy as np
import pytest
from mlxlora_gguf import LoraOptions, detect, detect_adapter, export_adapter, open_adapter

from mlxlora_core.api import NoOptions
from mlxlora_core.errors import ModelError
from mlxlora_core.values import ExportAdapter, ExportSource, ForeignAdapter, ForeignTensor, LowRank

KEYS: dict[str, Any] = {
    "general.type": "adapter",
    "general.architecture": "llama",
    "adapter.type": "lora",
    "adapter.lora.alpha": 16.0,
}
QUERY, DOWN = "blk.0.attn_q.weight", "blk.1.ffn_down.weight"


def matrix(name: str, rows: int, columns: int, kind: str = "F32") -> gguf_files.Tensor:
    """A matrix of numbers that tell where they stand."""
    if kind == "F32":
        data = struct.pack(f"<{rows * columns}f", *(n / 8 for n in range(rows * columns)))
    else:
        _, weights, _ = gguf_files.TYPES[kind]
        data = gguf_files.blocks(kind, rows * columns // weights)
    return gguf_files.Tensor(name, (rows, columns), kind, data)


def pair(name: str, rank: int, inputs: int = 6, outputs: int = 4) -> list[gguf_files.Tensor]:
    return [matrix(f"{name}.lora_a", rank, inputs), matrix(f"{name}.lora_b", outputs, rank)]


def written(path: Path, tensors: list[gguf_files.Tensor], **changed: Any) -> Path:
    keys = {**KEYS, **{key.replace("__", "."): value for key, value in changed.items()}}
    path.write_bytes(gguf_files.gguf({k: v for k, v in keys.items() if v is not None}, tensors))
    return path


def opened(path: Path) -> ForeignAdapter:
    assert detect_adapter(path)
    return open_adapter(path, NoOptions())


def test_matrices_are_turned_round_and_the_scale_is_alpha_over_rank(tmp_path: Path) -> None:
    found = opened(written(tmp_path / "a.gguf", pair(QUERY, 2)))
    assert (found.adapter, found.layout, dict(found.outputs)) == ("lora", "gguf", {"lora_b": 1})
    assert found.options == {"rank": 2, "scale": 8.0} and not found.overrides and not found.notes
    (held,) = found.linears.values()
    assert list(found.linears) == ["blk.0.attn_q"]
    assert {name: tensor.shape for name, tensor in held.items()} == {"lora_a": (6, 2), "lora_b": (2, 4)}
    assert np.array_equal(np.array(held["lora_a"].read()), np.arange(12).reshape(2, 6).T / 8)
    assert np.array_equal(np.array(held["lora_b"].read()), np.arange(8).reshape(4, 2).T / 8)


def test_ranks_of_their_own_are_told_by_path(tmp_path: Path) -> None:
    tensors = [*pair(QUERY, 2), *pair("blk.1.attn_q.weight", 2), *pair(DOWN, 4)]
    found = opened(written(tmp_path / "a.gguf", tensors))
    assert found.options == {"rank": 2, "scale": 8.0}
    assert found.overrides == {"blk.1.ffn_down": {"rank": 4, "scale": 4.0}}


@pytest.mark.parametrize("alpha", [0.0, None])
def test_no_alpha_is_a_scale_of_1(tmp_path: Path, alpha: float | None) -> None:
    tensors = [*pair(QUERY, 2), *pair(DOWN, 4), *pair("blk.1.attn_q.weight", 2)]
    found = opened(written(tmp_path / "a.gguf", tensors, adapter__lora__alpha=alpha))
    assert found.options["scale"] == 1.0 and found.overrides == {"blk.1.ffn_down": {"rank": 4, "scale": 1.0}}


def test_an_embedding_keeps_its_rows(tmp_path: Path) -> None:
    name = "token_embd.weight"
    tensors = [matrix(f"{name}.lora_a", 7, 2), matrix(f"{name}.lora_b", 6, 2)]
    found = opened(written(tmp_path / "a.gguf", tensors))
    held = found.linears["token_embd"]
    assert (held["lora_a"].shape, held["lora_b"].shape) == ((7, 2), (2, 6)) and found.embedding_alone
    assert np.array_equal(np.array(held["lora_a"].read()), np.arange(14).reshape(7, 2) / 8)


def test_packed_matrices_are_expanded_and_norms_are_left_out(tmp_path: Path) -> None:
    a = matrix(f"{QUERY}.lora_a", 2, 64, "Q8_0")
    norm = gguf_files.Tensor("blk.0.attn_norm.weight", (4,), "F32", bytes(16))
    found = opened(written(tmp_path / "a.gguf", [a, matrix(f"{QUERY}.lora_b", 4, 2), norm]))
    want = np.array(gguf_files.weights("Q8_0", a.data)).reshape(2, 64).T
    assert np.array_equal(np.array(found.linears["blk.0.attn_q"]["lora_a"].read()), want.astype(np.float32))
    assert found.notes == ["1 norms are left out, as llama.cpp does (blk.0.attn_norm.weight)"]


REFUSED: Mapping[str, tuple[list[gguf_files.Tensor], dict[str, Any], str]] = {
    "another type": (pair(QUERY, 2), {"adapter__type": "ia3"}, "of type 'ia3', wanted 'lora'"),
    "aLoRA": (
        pair(QUERY, 2),
        {"adapter__alora__invocation_tokens": [1, 2]},
        "is an aLoRA, which changes the model from some tokens on",
    ),
    "half of a pair": (pair(QUERY, 2)[:1], {}, "lacks one of the two matrices of blk.0.attn_q"),
    "nothing": ([matrix("blk.0.attn_norm.weight", 1, 4)], {}, "has no LoRA in it"),
    "a whole weight": (
        [*pair(QUERY, 2), matrix("output.weight", 3, 4)],
        {},
        "tensors that are no LoRA: output.weight",
    ),
    "other ranks": (
        [pair(QUERY, 2)[0], pair(QUERY, 3)[1]],
        {},
        r"blk.0.attn_q has matrices \(2, 6\) and \(4, 3\), which do not fit",
    ),
    "an alpha below 0": (pair(QUERY, 2), {"adapter__lora__alpha": -1.0}, "alpha -1.0, wanted a number"),
    "an alpha in words": (pair(QUERY, 2), {"adapter__lora__alpha": "16"}, "alpha '16', wanted a number"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_converted_is_refused_by_name(tmp_path: Path, case: str) -> None:
    tensors, keys, words = REFUSED[case]
    path = written(tmp_path / "a.gguf", tensors, **keys)
    with pytest.raises(ModelError, match=words) as caught:
        opened(path)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


def test_a_model_is_no_adapter_and_damage_is_nothing_known(tmp_path: Path) -> None:
    gguf_files.write_model(tmp_path / "model.gguf", kinds=("F32",))
    assert not detect_adapter(tmp_path / "model.gguf") and detect(tmp_path / "model.gguf")
    whole = written(tmp_path / "a.gguf", pair(QUERY, 2)).read_bytes()
    for length in (0, 3, 30, 100, len(whole) // 2):
        (tmp_path / "cut.gguf").write_bytes(whole[:length])
        assert not detect_adapter(tmp_path / "cut.gguf")
    assert not detect_adapter(tmp_path) and not detect_adapter(tmp_path / "nothing")


# --- out ----------------------------------------------------------------------


def source(paths: Mapping[str, ForeignTensor], low_rank: Mapping[str, LowRank], **more: Any) -> ExportSource:
    adapter = ExportAdapter("lora:odd", {}, tuple(paths), {}, low_rank=low_rank, places=paths, **more)
    return ExportSource({"general.architecture": "phi3"}, {}, {}, adapter=adapter, base="org/a-base")


def update(inputs: int, rank: int, outputs: int, scale: float, seed: int = 0) -> LowRank:
    draw = np.random.default_rng(seed)
    a, b = draw.normal(size=(inputs, rank)), draw.normal(size=(rank, outputs))
    return LowRank(mx.array(a.astype(np.float32)), mx.array(b.astype(np.float32)), scale)


def matrices(folder: Path) -> tuple[dict[str, Any], Callable[[str], np.ndarray]]:
    keys, found = gguf_files.read((folder / "adapter.gguf").read_bytes())

    def get(name: str) -> np.ndarray:
        kind, shape, data = found[name]
        return np.array(gguf_files.weights(kind, data)).reshape(shape)

    return keys, get


def test_parts_of_one_linear_there_stand_on_their_own_outputs(tmp_path: Path) -> None:
    """Queries and values of a fused linear with different ranks and scales; the keys have no update."""
    name = "blk.0.attn_qkv.weight"
    held = {"wq": update(6, 2, 4, 2.0), "wv": update(6, 3, 2, 0.5, seed=1)}
    places = {
        "wq": ForeignTensor("wq.weight", name, [1, 0, 3, 2], start=0),
        "wv": ForeignTensor("wv.weight", name, None, start=6),
    }
    export_adapter(source(places, held, heights={name: 8}), tmp_path, LoraOptions())
    keys, get = matrices(tmp_path)
    a, b = get(f"{name}.lora_a"), get(f"{name}.lora_b")
    got = keys["adapter.lora.alpha"] / a.shape[0] * b @ a
    want = np.zeros((8, 6))
    for path, rows in (("wq", [1, 0, 3, 2]), ("wv", [6, 7])):
        one = held[path]
        want[rows] = one.scale * (np.array(one.a) @ np.array(one.b)).T
    assert np.abs(got - want).max() < 1e-6 * np.abs(want).max() and a.shape[0] == 5
    assert keys["general.base_model.0.name"] == "a-base" and keys["general.architecture"] == "phi3"


def test_what_llama_cpp_has_no_place_for_is_refused(tmp_path: Path) -> None:
    place = ForeignTensor("wq.weight", QUERY)
    with pytest.raises(ModelError, match=r"'odd' is no low-rank update alone \(wq\).*export --to gguf"):
        export_adapter(source({"wq": place}, {}), tmp_path, LoraOptions())
    embedding = {"tok_embeddings": ForeignTensor("tok_embeddings.weight", "token_embd.weight")}
    with pytest.raises(ModelError, match="tok_embeddings is an embedding"):
        export_adapter(source(embedding, {"tok_embeddings": update(9, 2, 4, 1.0)}), tmp_path, LoraOptions())
    assert list(tmp_path.iterdir()) == []


def test_float16_says_what_it_costs_and_refuses_what_it_cannot_hold(tmp_path: Path) -> None:
    from mlxlora_core.plugins.progress import notes_heard

    place = {"wq": ForeignTensor("wq.weight", QUERY)}
    with notes_heard() as notes:
        export_adapter(source(place, {"wq": update(6, 2, 4, 1.0)}), tmp_path, LoraOptions(type="F16"))
    assert len(notes) == 1 and notes[0].startswith("rounded to F16: 2 of the tensors, by ")
    large = LowRank(mx.full((6, 2), 1e6), mx.ones((2, 4)), 1.0)
    with pytest.raises(ModelError, match="numbers up to 1e\\+06, which F16 cannot hold"):
        export_adapter(source(place, {"wq": large}), tmp_path / "b", LoraOptions(type="F16"))
