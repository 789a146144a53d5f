"""What mlx-lm has saved is read as mlx-lm reads it, and what it cannot say is refused by name."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlxlora_mlx_lm.opening import detect, open_adapter
from mlxlora_mlx_lm.writing import write as write_adapter
from safetensors.numpy import load_file

from mlxlora_core.api import ExportAdapter, ExportSource, ForeignTensor, LowRank
from mlxlora_core.errors import ModelError

Q, K = "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.k_proj"
CONFIG: dict[str, Any] = {
    "fine_tune_type": "lora",
    "num_layers": 2,
    "lora_parameters": {"rank": 2, "scale": 5.0, "dropout": 0.25},
}


def pair(path: str, rank: int = 2) -> dict[str, mx.array]:
    return {f"{path}.lora_a": mx.ones((8, rank)), f"{path}.lora_b": mx.ones((rank, 6))}


def write(folder: Path, config: Any, tensors: Mapping[str, mx.array]) -> Path:
    mx.save_safetensors(str(folder / "adapters.safetensors"), dict(tensors))
    if config is not None:
        (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def test_what_a_folder_says(tmp_path: Path) -> None:
    write(tmp_path, {**CONFIG, "model": "some/base"}, pair(Q) | pair(K))
    assert detect(tmp_path) and detect(tmp_path / "adapters.safetensors")
    for path in (tmp_path, tmp_path / "adapters.safetensors"):
        opened = open_adapter(path)
        assert opened.options == {"rank": 2, "scale": 5.0, "dropout": 0.25}
        assert (opened.adapter, opened.unstated, opened.layout) == ("lora", (), "hf")
        assert opened.notes == ["its config names the model 'some/base'"]


def test_a_config_of_another_tool_beside_a_file_is_not_its(tmp_path: Path) -> None:
    write(tmp_path, {**CONFIG, "peft_type": "LORA"}, pair(Q))
    assert not detect(tmp_path)
    opened = open_adapter(tmp_path / "adapters.safetensors")
    assert (opened.options, opened.unstated) == ({"rank": 2}, ("scale",))


def test_a_config_beside_files_with_meta_s_names_is_not_theirs(tmp_path: Path) -> None:
    write(tmp_path, CONFIG, pair("layers.0.attention.wq", 3))
    opened = open_adapter(tmp_path / "adapters.safetensors")
    assert (opened.options, opened.unstated) == ({"rank": 3}, ("scale",))


@pytest.mark.parametrize(
    ("config", "tensors", "says"),
    [
        ({"fine_tune_type": "full"}, pair(Q), "holds whole weights (fine_tune_type full) and no adapter"),
        ({"fine_tune_type": "loha"}, pair(Q), "fine_tune_type is 'loha', wanted lora, dora"),
        ({"fine_tune_type": "dora"}, pair(Q), f"lacks {Q}.m"),
        ({}, pair(Q) | {f"{Q}.m": mx.ones((6,))}, "has magnitudes (.m), but fine_tune_type is lora"),
        ({"fine_tune_type": "dora"}, pair(Q) | pair(K) | {f"{Q}.m": mx.ones((6,))}, f"lacks {K}.m"),
        ({"fine_tune_type": "dora"}, pair(Q) | {f"{Q}.m": mx.ones((5,))}, "no product"),
        ({"lora_parameters": {"rank": 3, "scale": 1.0}}, pair(Q), "rank is 3, but the tensors have 2"),
        ({"lora_parameters": {"scale": 10**400}}, pair(Q), "scale is 1000"),
        ({"lora_parameters": {"scale": [1]}}, pair(Q), "scale is [1], wanted a number"),
        ({}, pair(Q) | pair(K, 3), "has updates of several ranks: 2, 3"),
        ({}, pair(Q) | {"model.norm.weight": mx.ones((8,))}, "holds model.norm.weight beside the updates"),
        ({}, {"lora_a": mx.ones((8, 2))}, "holds lora_a beside the updates"),
    ],
)
def test_what_cannot_be_converted_is_refused_by_name(
    tmp_path: Path, config: dict[str, Any], tensors: dict[str, mx.array], says: str
) -> None:
    write(tmp_path, {**CONFIG, **config}, tensors)
    assert detect(tmp_path)
    with pytest.raises(ModelError) as fault:
        open_adapter(tmp_path)
    assert says in str(fault.value) and "\n" not in str(fault.value)


# --- out ----------------------------------------------------------------------


def source(updates: Mapping[str, LowRank], layers: int = 2, **changed: Any) -> ExportSource:
    """An adapter whose linears have the names there that they have here."""
    adapter = ExportAdapter(
        name="lora:lora",
        options={"dropout": 0.5},
        paths=tuple(updates),
        tensors={},
        low_rank=updates,
        places={path: ForeignTensor(f"{path}.weight", f"{path}.weight") for path in updates},
        layers=layers,
    )
    return ExportSource({}, {}, {}, dataclasses.replace(adapter, **changed), base="the/base", card="# Card\n")


def update(rank: int = 2, scale: float = 3.0, outputs: int = 6) -> LowRank:
    return LowRank(mx.random.normal((8, rank)), mx.random.normal((rank, outputs)), scale)


def test_a_folder_that_mlx_lm_reads(tmp_path: Path) -> None:
    updates = {path: update() for path in (K, K.replace("k_proj", "q_proj"), "lm_head")}
    write_adapter(source(updates), tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text()) == {
        "fine_tune_type": "lora",
        "num_layers": 1,
        "lora_parameters": {
            "rank": 2,
            "scale": 3.0,
            "dropout": 0.5,
            "keys": ["lm_head", "self_attn.k_proj", "self_attn.q_proj"],
        },
        "model": "the/base",
    }
    held = load_file(tmp_path / "adapters.safetensors")
    assert held.keys() == {f"{path}.{part}" for path in updates for part in ("lora_a", "lora_b")}
    assert (held["lm_head.lora_b"] == updates["lm_head"].b).all()
    card = '---\nbase_model: "the/base"\nlibrary_name: mlx\n---\n\n# Card\n'
    assert (tmp_path / "README.md").read_text() == card


def test_outputs_go_back_into_the_order_there(tmp_path: Path) -> None:
    rows = [0, 3, 1, 4, 2, 5]
    places = {K: ForeignTensor("x", f"{K}.weight", rows)}
    held = update()
    write_adapter(source({K: held}, places=places), tmp_path)
    b = load_file(tmp_path / "adapters.safetensors")[f"{K}.lora_b"]
    assert all((b[:, there] == held.b[:, here]).all() for here, there in enumerate(rows))


def test_parts_of_a_fused_linear_are_on_their_own_outputs(tmp_path: Path) -> None:
    fused = "model.layers.1.self_attn.qkv_proj"
    places = {
        "q": ForeignTensor("q", f"{fused}.weight", [1, 0], 0),
        "v": ForeignTensor("v", f"{fused}.weight", None, 3),
    }
    updates = {"q": update(2, 3.0, 2), "v": update(1, 6.0, 2)}
    heights = {f"{fused}.weight": 5}
    write_adapter(source(updates, places=places, heights=heights), tmp_path)
    held = load_file(tmp_path / "adapters.safetensors")
    x = mx.random.normal((4, 8))
    got = 3.0 * (x @ mx.array(held[f"{fused}.lora_a"])) @ mx.array(held[f"{fused}.lora_b"])
    q, v = (part.scale * (x @ part.a) @ part.b for part in updates.values())
    want = mx.concatenate([q[:, 1:], q[:, :1], mx.zeros((4, 1)), v], axis=1)
    assert held[f"{fused}.lora_a"].shape == (8, 3)
    assert mx.allclose(got, want, atol=1e-5)


def test_parts_that_were_one_are_one_again(tmp_path: Path) -> None:
    fused = "model.layers.1.self_attn.qkv_proj"
    places = {name: ForeignTensor(name, f"{fused}.weight", None, 2 * i) for i, name in enumerate("qkv")}
    whole = update(2, 3.0, 6)
    updates = {name: LowRank(whole.a, whole.b[:, 2 * i : 2 * i + 2], 3.0) for i, name in enumerate("qkv")}
    write_adapter(source(updates, places=places, heights={f"{fused}.weight": 6}), tmp_path)
    held = load_file(tmp_path / "adapters.safetensors")
    assert (held[f"{fused}.lora_a"] == whole.a).all() and (held[f"{fused}.lora_b"] == whole.b).all()


@pytest.mark.parametrize(
    ("updates", "says"),
    [
        ({Q: update(), K.replace("k_", "q_"): update(3)}, "one rank for all linears, this lora has 2, 3"),
        ({Q: update(), K.replace("k_", "q_"): update(2, 4.0)}, "one scale for all linears"),
        ({Q: update()}, "adapts the top layers, this adapter leaves out 1 of 2"),
        ({Q: update(), K: update()}, "the same linears in each layer, layer 0 lacks self_attn.k_proj"),
    ],
)
def test_what_mlx_lm_cannot_say(tmp_path: Path, updates: dict[str, LowRank], says: str) -> None:
    with pytest.raises(ModelError) as fault:
        write_adapter(source(updates), tmp_path)
    assert says in str(fault.value) and "--to peft" in str(fault.value)
