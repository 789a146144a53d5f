"""Adapters that PEFT and mlx-lm make compute here what they do there, and those made here do so there."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from test_hf_folders import write_tokenizer

import mlxlora_core as mlxlora

transformers: Any = pytest.importorskip(
    "transformers", reason="needs transformers: pip install 'mlxlora[interop]'"
)
peft: Any = pytest.importorskip("peft", reason="needs peft: pip install 'mlxlora[interop]'")
pytestmark = pytest.mark.usefixtures("one_torch_thread")

IDS = [[5, 17, 230, 4, 99, 200, 31, 8, 140, 77], [9, 8, 7, 250, 5, 4, 3, 22, 101, 60]]
SIZES = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"rope_theta": 5e5},
    "qwen3": {"rope_theta": 1e6, "head_dim": 32},
    "gemma3_text": {"sliding_window": 6, "tie_word_embeddings": True},
    "phi3": {"rope_theta": 1e4},
}
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
LINEARS = [*ATTENTION, "gate_proj", "up_proj", "down_proj"]
CLOSE = 1e-5


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a tiny random model of a family, as transformers saves it."""
    made: dict[str, Path] = {}

    def base(family: str) -> Path:
        if family not in made:
            made[family] = folder = tmp_path_factory.mktemp(family)
            config = transformers.AutoConfig.for_model(family, **SIZES | FAMILIES[family])
            model = transformers.AutoModelForCausalLM.from_config(config)
            torch.manual_seed(3)
            with torch.no_grad():
                for name, weight in model.named_parameters():
                    weight.copy_(torch.randn_like(weight) * (0.3 if weight.ndim == 1 else 0.15))
                    if weight.ndim == 1 and "norm" in name and "gemma" not in family:
                        weight.add_(1)
            model.save_pretrained(folder)
            write_tokenizer(folder)
            path = folder / "config.json"
            stated = json.loads(path.read_text())
            theta = FAMILIES[family].get("rope_theta")
            path.write_text(json.dumps(stated | ({"rope_theta": theta} if theta else {})))
        return made[family]

    return base


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """What PEFT warns of where a model lies on the disk is not about adapters."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def theirs(base: Path, adapter: Path | None = None, ids: list[list[int]] = IDS) -> np.ndarray:
    """Logits of transformers, with an adapter of PEFT's in a folder."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        base, dtype=torch.float32, attn_implementation="eager"
    )
    if adapter is not None:
        model = peft.PeftModel.from_pretrained(model, adapter)
    with torch.no_grad():
        return np.asarray(model.eval()(torch.tensor(ids)).logits)


def ours(base: Path, adapter: Path | None = None, ids: list[list[int]] = IDS) -> np.ndarray:
    model = mlxlora.load(base, adapter_file=adapter)
    return np.array(model.base.language_model(mx.array(ids)).astype(mx.float32))


def apart(got: np.ndarray, want: np.ndarray) -> float:
    """How far apart, relative to the largest."""
    return float(np.abs(got - want).max() / np.abs(want).max())


def made_by_peft(base: Path, folder: Path, config: Any, noise: float = 0.1, **saved: Any) -> Path:
    """An adapter as PEFT saves it, none of whose parameters is where it started."""
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    torch.manual_seed(7)
    model = peft.get_peft_model(model, config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.requires_grad:
                weight.add_(torch.randn_like(weight) * noise)
            assert weight.requires_grad or "lora_" not in name
    model.save_pretrained(folder, **saved)
    return folder


def exported(base: Path, adapter: Path, target: Path, to: str, **options: Any) -> Path:
    mlxlora.export(base, target, to, adapter_file=adapter, **options)
    return target


def same_tensors(a: Path, b: Path) -> None:
    """Two files hold the same tensors, to the bit."""
    one, other = load_file(a), load_file(b)
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        np.testing.assert_array_equal(tensor, other[name], err_msg=name)


KINDS: dict[str, Any] = {
    "lora": lambda: peft.LoraConfig(r=4, lora_alpha=10, target_modules=["q_proj", "v_proj"]),
    "all linears": lambda: peft.LoraConfig(r=3, lora_alpha=8, target_modules="all-linear"),
    "rslora": lambda: peft.LoraConfig(r=4, lora_alpha=3, use_rslora=True, target_modules=LINEARS),
    "dora": lambda: peft.LoraConfig(r=4, lora_alpha=6, use_dora=True, target_modules=LINEARS),
    "some layers": lambda: peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=ATTENTION, layers_to_transform=[0, 2], layers_pattern="layers"
    ),
    "patterns": lambda: peft.LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=LINEARS,
        rank_pattern={"q_proj": 2, "model.layers.1.mlp.down_proj": 7, r"layers\.\d+\.self_attn\.v_proj": 5},
        alpha_pattern={"k_proj": 16, "^model.layers.2.self_attn.q_proj": 1},
    ),
    "head": lambda: peft.LoraConfig(r=4, lora_alpha=8, target_modules=["lm_head", "q_proj"]),
    "embedding": lambda: peft.LoraConfig(r=4, lora_alpha=8, target_modules=["embed_tokens", "v_proj"]),
    "ia3": lambda: peft.IA3Config(
        target_modules=["k_proj", "q_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]
    ),
    "ia3 elsewhere": lambda: peft.IA3Config(
        target_modules=["k_proj", "up_proj", "down_proj"], feedforward_modules=["up_proj"]
    ),
    "vera": lambda: peft.VeraConfig(r=16, target_modules=LINEARS, d_initial=0.5),
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_peft_has_made_does_here_what_it_does_there_and_comes_back(
    bases: Callable[[str], Path], tmp_path: Path, kind: str
) -> None:
    base = bases("llama")
    saved = {"save_embedding_layers": False} if kind == "head" else {}
    adapter = made_by_peft(base, tmp_path / "peft", KINDS[kind](), **saved)
    want, plain = theirs(base, adapter), theirs(base)
    assert apart(plain, want) > 0.02  # or agreeing would say nothing
    assert apart(ours(base, adapter), want) < CLOSE
    back = exported(base, adapter, tmp_path / "back", "peft")
    assert apart(theirs(base, back), want) < CLOSE
    held, again = (json.loads((folder / "adapter_config.json").read_text()) for folder in (adapter, back))
    names = ("peft_type", "r", "lora_alpha", "use_rslora", "use_dora", "lora_dropout", "d_initial")
    assert {n: held.get(n) for n in names} == {n: again.get(n) for n in names}
    if kind != "embedding":  # PEFT saves the embedding of the base too
        same_tensors(adapter / "adapter_model.safetensors", back / "adapter_model.safetensors")
    again_theirs = made_again(base, back, tmp_path / "again")
    same_tensors(back / "adapter_model.safetensors", again_theirs / "adapter_model.safetensors")


def made_again(base: Path, adapter: Path, folder: Path) -> Path:
    """The same adapter as PEFT saves it once more: it has read every tensor of it."""
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    peft.PeftModel.from_pretrained(model, adapter).save_pretrained(folder, save_embedding_layers=False)
    return folder
