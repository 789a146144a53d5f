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
from mlx.utils import tree_flatten
from safetensors.numpy import load_file
from test_hf_folders import write_tokenizer

import mlxlora_core as mlxlora
from mlxlora_core.errors import ModelError

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
    "gemma3_text": {
        "sliding_window": 6,
        "tie_word_embeddings": True,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
    },
    "phi3": {"rope_theta": 1e4},
}
OLD_KEYS = {
    **{family: {"rope_theta": FAMILIES[family].get("rope_theta")} for family in ("llama", "qwen3", "phi3")},
    "gemma3_text": {"rope_theta": 1e6, "rope_local_base_freq": 1e4, "sliding_window_pattern": 3},
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
            path.write_text(json.dumps(stated | OLD_KEYS[family]))  # which mlx-lm looks for
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


def exported(folder: Path, adapter: Path, target: Path, to: str, **options: Any) -> Path:
    mlxlora.export(folder, to, target, adapter_file=adapter, **options)
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
    adapter = made_by_peft(base, tmp_path / "peft", KINDS[kind]())
    want, plain = theirs(base, adapter), theirs(base)
    assert apart(plain, want) > 0.02  # or agreeing would say nothing
    assert apart(ours(base, adapter), want) < CLOSE
    back = exported(base, adapter, tmp_path / "back", "peft")
    assert apart(theirs(base, back), want) < CLOSE
    held, again = (json.loads((folder / "adapter_config.json").read_text()) for folder in (adapter, back))
    names = ("peft_type", "r", "lora_alpha", "use_rslora", "use_dora", "lora_dropout", "d_initial")
    assert {n: held.get(n) for n in names} == {n: again.get(n) for n in names}
    if kind not in ("embedding", "head"):  # with which PEFT saves the base's own weights
        same_tensors(adapter / "adapter_model.safetensors", back / "adapter_model.safetensors")
    again_theirs = made_again(base, back, tmp_path / "again")
    same_tensors(back / "adapter_model.safetensors", again_theirs / "adapter_model.safetensors")


def made_again(base: Path, adapter: Path, folder: Path) -> Path:
    """The same adapter as PEFT saves it once more: it has read every tensor of it."""
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    peft.PeftModel.from_pretrained(model, adapter).save_pretrained(folder, save_embedding_layers=False)
    return folder


# --- made here ----------------------------------------------------------------


def made_here(base: Path, path: Path, adapter: str = "lora", noise: float = 0.1, **options: Any) -> Path:
    """An adapter file of ours, none of whose parameters is where it started."""
    model = mlxlora.load(base).attach(adapter, **options)
    mx.random.seed(5)
    module: Any = model.base.module
    moved = [
        (name, tensor + noise * mx.random.normal(tensor.shape))
        for name, tensor in tree_flatten(module.trainable_parameters())
    ]
    module.load_weights(moved, strict=False)
    model.save_adapter(path)
    return path


ALL = {"targets": ("all-linear",), "layers": -1}
OWN: dict[str, tuple[str, str, dict[str, Any]]] = {
    "lora": ("llama", "lora", {"layers": 2}),
    "lora of several ranks": (
        "llama",
        "lora",
        {**ALL, "overrides": ("wq: rank=2, scale=5.0", "layers.1.feed_forward.w1: rank=3")},
    ),
    "rslora": ("llama", "rslora", {**ALL, "rank": 5, "alpha": 3.0}),
    "lora-plus": ("llama", "lora-plus", ALL),
    "pissa": ("llama", "pissa", {**ALL, "rank": 4}),
    "dora": ("llama", "dora", ALL),
    "dora of several ranks": ("llama", "dora", {**ALL, "overrides": ("wk: rank=2, scale=5.0",)}),
    "ia3": ("llama", "ia3", {"layers": -1}),
    "ia3 on two layers": ("llama", "ia3", {"layers": 2}),
    "vera": ("llama", "vera", {**ALL, "rank": 12}),
    "head and embedding": ("llama", "lora", {"targets": ("output", "embed_tokens", "wq"), "layers": -1}),
    "qwen3": ("qwen3", "lora", ALL),
    "gemma3": ("gemma3_text", "lora", ALL),
    "phi3": ("phi3", "lora", ALL),
    "phi3, parts of its fused linears": ("phi3", "lora", {"targets": ("wq", "w3"), "layers": -1}),
    "phi3 dora": ("phi3", "dora", ALL),
    "phi3 ia3": ("phi3", "ia3", {"layers": -1}),
    "phi3 vera": ("phi3", "vera", {**ALL, "rank": 8}),
}


@pytest.mark.parametrize("name", OWN)
def test_what_was_made_here_does_in_peft_what_it_does_here(
    bases: Callable[[str], Path], tmp_path: Path, name: str
) -> None:
    family, adapter, options = OWN[name]
    base = bases(family)
    file = made_here(base, tmp_path / "a.safetensors", adapter, **options)
    there = exported(base, file, tmp_path / "peft", "peft", base="org/name")
    want = ours(base, file)
    assert apart(ours(base), want) > 0.01
    assert apart(theirs(base, there), want) < CLOSE
    assert apart(ours(base, there), want) < CLOSE
    config = json.loads((there / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "org/name"
    if config.get("layers_to_transform"):
        assert config["layers_to_transform"] == [0, 1, 2][-options["layers"] :]
    again = made_again(base, there, tmp_path / "again")
    same_tensors(there / "adapter_model.safetensors", again / "adapter_model.safetensors")


@pytest.mark.parametrize("family", ["qwen3", "gemma3_text", "phi3"])
def test_adapters_of_peft_on_other_families(
    bases: Callable[[str], Path], tmp_path: Path, family: str
) -> None:
    base = bases(family)
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules="all-linear")
    adapter = made_by_peft(base, tmp_path / "peft", config)
    want = theirs(base, adapter)
    assert apart(theirs(base), want) > 0.02
    assert apart(ours(base, adapter), want) < CLOSE
    back = exported(base, adapter, tmp_path / "back", "peft")
    same_tensors(adapter / "adapter_model.safetensors", back / "adapter_model.safetensors")
    assert apart(theirs(base, back), want) < CLOSE


def test_an_adapter_that_peft_trained(bases: Callable[[str], Path], tmp_path: Path) -> None:
    base = bases("llama")
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    torch.manual_seed(0)
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=8, target_modules=ATTENTION))
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    losses = []
    for _ in range(8):
        loss = model(torch.tensor(IDS), labels=torch.tensor(IDS)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < losses[0] - 0.5
    model.save_pretrained(tmp_path)
    assert apart(ours(base, tmp_path), theirs(base, tmp_path)) < CLOSE


# --- mlx-lm -------------------------------------------------------------------


@pytest.fixture(scope="session")
def mlx_lm() -> Any:
    pytest.importorskip("mlx_lm", reason="needs mlx-lm: pip install 'mlxlora[interop]'")
    from mlx_lm import utils
    from mlx_lm.tuner import utils as tuner

    class Library:
        load_model = staticmethod(utils.load_model)
        load_adapters = staticmethod(tuner.load_adapters)
        wrap = staticmethod(tuner.linear_to_lora_layers)

    return Library


def in_mlx_lm(mlx_lm: Any, base: Path, adapter: Path | None = None) -> np.ndarray:
    """Logits of mlx-lm, with an adapter of its in a folder."""
    model, _ = mlx_lm.load_model(base)
    model.set_dtype(mx.float32)
    if adapter is not None:
        mlx_lm.load_adapters(model, str(adapter))
    model.eval()  # what is wrapped later drops at random
    return np.array(model(mx.array(IDS)).astype(mx.float32))


def made_by_mlx_lm(mlx_lm: Any, base: Path, folder: Path, kind: str, layers: int, **parameters: Any) -> Path:
    """An adapter as mlx-lm saves it, none of whose parameters is where it started."""
    model, _ = mlx_lm.load_model(base)
    parameters = {"rank": 4, "scale": 3.0, "dropout": 0.0, **parameters}
    model.freeze()
    mlx_lm.wrap(model, layers, parameters, use_dora=kind == "dora")
    mx.random.seed(2)
    trained = dict(tree_flatten(model.trainable_parameters()))
    moved = {name: t + 0.1 * mx.random.normal(t.shape) for name, t in trained.items()}
    folder.mkdir()
    mx.save_safetensors(str(folder / "adapters.safetensors"), moved)
    config = {
        "fine_tune_type": kind,
        "num_layers": layers,
        "lora_parameters": parameters,
        "model": "some/name",
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


KEYS = ["self_attn.q_proj", "self_attn.k_proj", "mlp.down_proj"]


@pytest.mark.parametrize(
    ("family", "kind", "layers", "parameters"),
    [
        ("llama", "lora", 3, {}),
        ("llama", "lora", 2, {"keys": KEYS, "dropout": 0.1}),
        ("llama", "dora", 2, {"keys": KEYS}),
        ("llama", "lora", 3, {"keys": [*KEYS, "lm_head", "model.embed_tokens"]}),
        ("qwen3", "lora", 3, {}),
        ("gemma3_text", "lora", 2, {"keys": KEYS}),
        ("gemma3_text", "lora", 2, {"keys": [*KEYS, "model.embed_tokens"]}),
        ("phi3", "lora", 2, {"keys": ["self_attn.qkv_proj"], "rank": 5}),
        ("phi3", "dora", 2, {"keys": ["self_attn.qkv_proj", "self_attn.o_proj"]}),
    ],
)
def test_what_mlx_lm_has_made_does_here_what_it_does_there_and_comes_back(
    bases: Callable[[str], Path],
    mlx_lm: Any,
    tmp_path: Path,
    family: str,
    kind: str,
    layers: int,
    parameters: dict[str, Any],
) -> None:
    base = bases(family)
    adapter = made_by_mlx_lm(mlx_lm, base, tmp_path / "theirs", kind, layers, **parameters)
    want = in_mlx_lm(mlx_lm, base, adapter)
    assert apart(in_mlx_lm(mlx_lm, base), want) > 0.01
    assert apart(ours(base, adapter), want) < CLOSE
    assert apart(ours(base, adapter / "adapters.safetensors"), want) < CLOSE
    back = exported(base, adapter, tmp_path / "back", "mlx-lm-adapter")
    same_tensors(adapter / "adapters.safetensors", back / "adapters.safetensors")
    held, again = (json.loads((folder / "adapter_config.json").read_text()) for folder in (adapter, back))
    assert {k: held[k] for k in ("fine_tune_type", "num_layers")} == {
        k: again[k] for k in ("fine_tune_type", "num_layers")
    }
    assert (
        held["lora_parameters"].items()
        <= (again["lora_parameters"] | {"keys": parameters.get("keys")}).items()
    )
    assert apart(in_mlx_lm(mlx_lm, base, back), want) < CLOSE


@pytest.mark.parametrize(
    ("family", "adapter", "options"),
    [
        ("llama", "lora", {"layers": 2}),
        ("llama", "rslora", ALL),
        ("llama", "pissa", {**ALL, "rank": 4}),
        ("llama", "dora", {"layers": 2, "scale": 3.5}),
        ("llama", "vera", {**ALL, "rank": 12}),
        ("phi3", "lora", {"layers": -1, "targets": ("wq", "wk", "wv")}),
    ],
)
def test_what_was_made_here_does_in_mlx_lm_what_it_does_here(
    bases: Callable[[str], Path],
    mlx_lm: Any,
    tmp_path: Path,
    family: str,
    adapter: str,
    options: dict[str, Any],
) -> None:
    base = bases(family)
    file = made_here(base, tmp_path / "a.safetensors", adapter, **options)
    there = exported(base, file, tmp_path / "there", "mlx-lm-adapter")
    want = ours(base, file)
    assert apart(ours(base), want) > 0.01
    assert apart(in_mlx_lm(mlx_lm, base, there), want) < CLOSE
    assert apart(ours(base, there), want) < CLOSE


@pytest.mark.parametrize(
    ("adapter", "options", "says"),
    [
        ("lora", {**ALL, "overrides": ("wq: rank=2",)}, "one rank for all linears, this lora has 2, 8"),
        (
            "lora",
            {**ALL, "overrides": ("wq: scale=3.0",)},
            "one scale for all linears, this lora has 2.0, 3.0",
        ),
        ("lora", {"targets": ("layers.0.attention.wq",), "layers": -1}, "this adapter leaves out 1, 2 of 3"),
        (
            "lora",
            {"targets": ("wq", "layers.2.attention.wk"), "layers": -1},
            "the same linears in each layer, layer 0 lacks self_attn.k_proj",
        ),
        ("ia3", {"layers": -1}, "mlx-lm has no adapter like 'ia3'"),
    ],
)
def test_what_mlx_lm_cannot_say_is_refused_by_name(
    bases: Callable[[str], Path], tmp_path: Path, adapter: str, options: dict[str, Any], says: str
) -> None:
    base = bases("llama")
    file = made_here(base, tmp_path / "a.safetensors", adapter, **options)
    with pytest.raises(ModelError) as fault:
        exported(base, file, tmp_path / "there", "mlx-lm-adapter")
    assert says in str(fault.value) and "--to peft" in str(fault.value)
    assert not (tmp_path / "there").exists()


# --- what is not converted ----------------------------------------------------

#: what PEFT is asked for -> what is said here of what it saves
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "modules_to_save": ({"modules_to_save": ["lm_head"]}, "modules_to_save ['lm_head']"),
    "bias": ({"bias": "all"}, "bias 'all'"),
    "lora_bias": ({"lora_bias": True}, "lora_bias True"),
    "tokens": ({"trainable_token_indices": [1, 5]}, "trainable_token_indices [1, 5]"),
    "pissa": ({"init_lora_weights": "pissa"}, "init_lora_weights 'pissa'"),
    "olora": ({"init_lora_weights": "olora"}, "init_lora_weights 'olora'"),
    "alora": ({"alora_invocation_tokens": [4], "task_type": "CAUSAL_LM"}, "alora_invocation_tokens [4]"),
    "layer_replication": ({"layer_replication": [(0, 2), (1, 3)]}, "layer_replication [[0, 2], [1, 3]]"),
    "parameters": ({"target_parameters": ["lm_head.weight"]}, "target_parameters ['lm_head.weight']"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_peft_saves_and_is_not_computed_here_is_refused_by_name(
    bases: Callable[[str], Path], tmp_path: Path, name: str
) -> None:
    asked, says = REFUSED[name]
    base = bases("llama")
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    config = peft.LoraConfig(**{"r": 2, "target_modules": ["q_proj"], **asked})
    peft.get_peft_model(model, config).save_pretrained(tmp_path)
    with pytest.raises(ModelError) as fault:
        ours(base, tmp_path)
    line = str(fault.value)
    assert says in line and str(tmp_path) in line and "\n" not in line and len(line.encode()) < 2000


def test_embeddings_that_peft_saves_whole_are_refused(bases: Callable[[str], Path], tmp_path: Path) -> None:
    config = peft.LoraConfig(r=2, target_modules=["q_proj"])
    adapter = made_by_peft(bases("llama"), tmp_path, config, save_embedding_layers=True)
    with pytest.raises(
        ModelError, match=r"holds whole embeddings or heads .save_embedding_layers.*embed_tokens"
    ):
        ours(bases("llama"), adapter)


@pytest.mark.parametrize("kind", ["LoHaConfig", "LoKrConfig", "AdaLoraConfig", "OFTConfig"])
def test_other_kinds_of_peft_are_refused_by_name(
    bases: Callable[[str], Path], tmp_path: Path, kind: str
) -> None:
    base = bases("llama")
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    more = {"total_step": 10} if kind == "AdaLoraConfig" else {}
    config = getattr(peft, kind)(target_modules=["q_proj"], **more)
    peft.get_peft_model(model, config).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=f"peft_type is '{config.peft_type.value}', wanted LORA, IA3, VERA"):
        ours(base, tmp_path)


def test_pissa_that_peft_has_converted_is_a_lora(bases: Callable[[str], Path], tmp_path: Path) -> None:
    base = bases("llama")
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    config = peft.LoraConfig(r=3, lora_alpha=3, target_modules=ATTENTION, init_lora_weights="pissa")
    model = peft.get_peft_model(model, config)
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "start")
    model.peft_config["default"].init_lora_weights = "pissa"
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.add_(torch.randn_like(weight) * 0.05)
        want = np.asarray(model(torch.tensor(IDS)).logits)
    model.save_pretrained(tmp_path / "lora", path_initial_model_for_weight_conversion=tmp_path / "start")
    assert apart(ours(base, tmp_path / "lora"), want) < CLOSE
    assert apart(ours(base), want) > 0.01


def test_an_embedding_that_is_the_head_too(bases: Callable[[str], Path], tmp_path: Path) -> None:
    """PEFT adapts the one and leaves the other; here, and in mlx-lm, they are one."""
    base = bases("gemma3_text")
    config = peft.LoraConfig(r=2, target_modules=["embed_tokens"])
    adapter = made_by_peft(base, tmp_path / "peft", config)
    with pytest.raises(ModelError, match="adapts tok_embeddings and not the output head"):
        ours(base, adapter)
    file = made_here(base, tmp_path / "a.safetensors", targets=("tok_embeddings",), layers=-1)
    with pytest.raises(ModelError, match="is embedding and output head in one, of which PEFT adapts"):
        exported(base, file, tmp_path / "out", "peft")


# --- faults that these tests are there to find --------------------------------


def test_without_the_order_of_rows_the_numbers_are_others(
    bases: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlxlora_core.model import foreign_linears

    base = bases("llama")
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "k_proj"])
    adapter = made_by_peft(base, tmp_path / "peft", config)
    want, part = theirs(base, adapter), foreign_linears._part
    monkeypatch.setattr(
        foreign_linears, "_part", lambda path, own, rows=None, start=None: part(path, own, None, start)
    )
    assert apart(ours(base, adapter), want) > 100 * CLOSE


def test_without_the_rank_in_the_scale_the_numbers_are_others(
    bases: Callable[[str], Path], tmp_path: Path
) -> None:
    base = bases("llama")
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["v_proj"])
    adapter = made_by_peft(base, tmp_path / "peft", config)
    want = theirs(base, adapter)
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"lora_alpha": 8 * 4}))
    assert apart(ours(base, adapter), want) > 100 * CLOSE


# --- a real model -------------------------------------------------------------


def test_smollm2_with_adapters_of_peft_and_of_ours(smollm2: Path, mlx_lm: Any, tmp_path: Path) -> None:
    """30 layers of 576 features, 9 heads over 3, dense and in float32: as PEFT and mlx-lm compute them."""
    ids = [[504, 3575, 282, 4649, 314, 7042, 28, 284, 260, 3575, 282, 4521, 314, 11452, 30]]
    base = tmp_path / "base"
    mlxlora.export(smollm2, "hf", base, dtype="float32")
    adapter = made_by_peft(
        base,
        tmp_path / "peft",
        peft.LoraConfig(r=4, lora_alpha=10, target_modules=LINEARS, layers_to_transform=list(range(20, 30))),
        noise=0.02,
    )
    want = theirs(base, adapter, ids)
    assert apart(theirs(base, None, ids), want) > 0.01
    assert apart(ours(base, adapter, ids), want) < CLOSE
    there = exported(base, adapter, tmp_path / "mlx-lm", "mlx-lm-adapter")
    model, _ = mlx_lm.load_model(base)
    mlx_lm.load_adapters(model, str(there))
    model.eval()
    assert apart(np.array(model(mx.array(ids)).astype(mx.float32)), want) < CLOSE
