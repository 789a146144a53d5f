"""mlx-lm's quantized folders: each packed weight is one tensor, by the table of its bits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hf_folder import CONFIG, WIDTH, dense, packed, write, write_json, write_shards
from mlxlora_hf import open_folder
from model_forms import unpacked

from mlxlora_core.api import ModelError, NoOptions, PackedTensor

BITS = {
    "model.embed_tokens": (64, 8),
    "model.layers.0.self_attn.q_proj": (64, 6),
    "model.layers.0.mlp.up_proj": (32, 2),
    "model.layers.1.mlp.up_proj": (64, 3),
    "model.layers.1.self_attn.o_proj": (32, 5),
    "model.layers.1.self_attn.v_proj": (0, 0),
}
TABLE: dict[str, Any] = {"group_size": 32, "bits": 4, "mode": "affine"}
TABLE |= {
    path: {"group_size": group, "bits": bits} if bits else False for path, (group, bits) in BITS.items()
}


def folder_of(path: Path, table: Any = TABLE, key: str = "quantization", shards: int = 0) -> Path:
    tensors = packed(dense(), BITS)
    config = CONFIG | {key: table}
    return write_shards(path, tensors, shards, config) if shards else write(path, tensors, config)


@pytest.mark.parametrize("shards", [0, 3])
@pytest.mark.parametrize("key", ["quantization", "quantization_config"])
def test_packed_weights_stay_packed_and_stand_for_the_same_numbers(
    tmp_path: Path, key: str, shards: int
) -> None:
    want = packed(dense(), BITS)
    model = open_folder(folder_of(tmp_path, key=key, shards=shards), NoOptions())
    assert key not in model.config
    assert sorted(model.tensors) == sorted(dense())
    for name, tensor in model.tensors.items():
        path = name.removesuffix(".weight")
        assert tensor.shape == dense()[name].shape
        if f"{path}.scales" not in want:
            assert tensor.packed is None and tensor.dtype == "bfloat16"
            assert mx.array_equal(tensor.read(), want[name]).item()
            continue
        group, bits = BITS.get(path, (32, 4))
        assert isinstance(tensor.packed, PackedTensor)
        assert (tensor.packed.quantizer, tensor.packed.options) == (
            "affine",
            {"group_size": group, "bits": bits},
        )
        parts = {part: lazy.read() for part, lazy in tensor.packed.parts.items()}
        assert all(
            mx.array_equal(parts[part], want[f"{path}.{part}"]).item()
            for part in ("weight", "scales", "biases")
        )
        got = tensor.read()
        assert (got.dtype, tensor.dtype) == (mx.float32, "float32")
        scales, biases = (np.array(parts[part].astype(mx.float32)) for part in ("scales", "biases"))
        exact = unpacked(np.array(parts["weight"]), scales, biases, group, bits)
        assert np.abs(np.array(got) - exact).max() <= 1e-6 * np.abs(exact).max()


def test_the_first_axis_of_every_part_are_the_rows(tmp_path: Path) -> None:
    model = open_folder(folder_of(tmp_path), NoOptions())
    for tensor in model.tensors.values():
        if tensor.packed:
            assert {part.shape[0] for part in tensor.packed.parts.values()} == {tensor.shape[0]}


@pytest.mark.parametrize(
    "table", [{"group_size": None, "bits": 4}, {"bits": None, "mode": None}, {"group_size": 64}]
)
def test_what_the_table_leaves_out_is_as_mlx_has_it(tmp_path: Path, table: dict[str, Any]) -> None:
    tensors = packed(
        dense(), {name.removesuffix(".weight"): (0, 0) for name in dense() if "down_proj" in name}, (64, 4)
    )
    model = open_folder(write(tmp_path, tensors, CONFIG | {"quantization": table}), NoOptions())
    head = model.tensors["lm_head.weight"].packed
    assert head is not None and head.options == {"group_size": 64, "bits": 4}


def test_a_head_is_not_needed_and_a_path_may_be_of_nothing(tmp_path: Path) -> None:
    """mlx-lm writes the table for the model and not for the file: a tied head stands in it now and then."""
    tensors = packed(dense(head=False), BITS)
    table = TABLE | {"lm_head": {"group_size": 64, "bits": 8}, "model.vision": False, "model.norm": True}
    model = open_folder(write(tmp_path, tensors, CONFIG | {"quantization": table}), NoOptions())
    assert "lm_head.weight" not in model.tensors and model.tensors["model.embed_tokens.weight"].packed


def test_paths_of_the_table_lose_what_the_names_lose(tmp_path: Path) -> None:
    tensors = {f"language_model.{name}": tensor for name, tensor in packed(dense(), BITS).items()}
    table = {f"language_model.{path}" if "." in path else path: value for path, value in TABLE.items()}
    model = open_folder(write(tmp_path, tensors, CONFIG | {"quantization": table}), NoOptions())
    query = model.tensors["model.layers.0.self_attn.q_proj.weight"]
    assert query.shape == (WIDTH, WIDTH) and query.packed and query.packed.options["bits"] == 6


def test_what_mlx_lm_states_counts_before_what_its_source_stated(tmp_path: Path) -> None:
    folder = folder_of(tmp_path)
    write_json(
        folder / "config.json",
        CONFIG | {"quantization": TABLE, "quantization_config": {"quant_method": "gptq"}},
    )
    assert open_folder(folder, NoOptions()).tensors["lm_head.weight"].packed


@pytest.mark.parametrize(
    ("table", "words"),
    [
        (None, "states no quantization, but 15 weights are packed"),
        ({}, "states no quantization"),
        ({**TABLE, "mode": "mxfp4"}, "is of mode 'mxfp4', which is not read; read is 'affine'"),
        ({**TABLE, "mode": "nvfp4"}, "is of mode 'nvfp4'"),
        ({**TABLE, "lm_head": {"mode": "mxfp8"}}, "of lm_head is of mode 'mxfp8'"),
        ({**TABLE, "bits": 7}, "bits of the quantization is 7, wanted one of 2, 3, 4, 5, 6, 8"),
        ({**TABLE, "bits": True}, "is True"),
        ({**TABLE, "bits": 4.0}, "is 4.0"),
        ({**TABLE, "group_size": 16}, "group_size of the quantization is 16"),
        ({**TABLE, "rotation": "hadamard"}, "keys that are not known: rotation"),
        ({**TABLE, "lm_head": {"bits": 8}}, "lm_head has parts of"),
        ({**TABLE, "lm_head": False}, "lm_head is packed, but stated to be dense"),
        ({**TABLE, "model.layers.1.self_attn.v_proj": {"bits": 4}}, "v_proj is stated, but not packed"),
        ([4], "quantization is a list"),
    ],
)
def test_a_table_that_does_not_fit(tmp_path: Path, table: Any, words: str) -> None:
    with pytest.raises(ModelError) as caught:
        open_folder(folder_of(tmp_path, table), NoOptions())
    assert words in str(caught.value) and "config.json" in caught.value.where


Change = Callable[[dict[str, mx.array]], object]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop("lm_head.biases"), "there is no lm_head.biases"),
        (lambda t: t.pop("lm_head.weight"), "there is no lm_head.weight"),
        (lambda t: t.update({"lm_head.weight": mx.ones((40, 8))}), "lm_head has parts of float32"),
        (
            lambda t: t.update({"lm_head.scales": mx.ones((40, 2), mx.uint32)}),
            "wanted uint32 and two of one float type",
        ),
        (
            lambda t: t.update({"lm_head.scales": mx.ones((40, 1), mx.bfloat16)}),
            "which are not 4 bits, 32 weights a group",
        ),
        (lambda t: t.update({"lm_head.weight": mx.ones((39, 8), mx.uint32)}), "(39, 8)"),
        (
            lambda t: t.update(
                {f"lm_head.{p}": t[f"lm_head.{p}"][None] for p in ("weight", "scales", "biases")}
            ),
            "(1, 40, 8)",
        ),
        (
            lambda t: t.update(
                {
                    f"lm_head.{p}": mx.array(1).astype(t[f"lm_head.{p}"].dtype)
                    for p in ("weight", "scales", "biases")
                }
            ),
            "parts of (), ()",
        ),
    ],
)
def test_parts_that_do_not_belong_together(tmp_path: Path, change: Change, words: str) -> None:
    tensors = packed(dense(), BITS)
    change(tensors)
    with pytest.raises(ModelError) as caught:
        open_folder(write(tmp_path, tensors, CONFIG | {"quantization": TABLE}), NoOptions())
    assert words in str(caught.value)
