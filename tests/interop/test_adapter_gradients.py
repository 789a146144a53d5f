"""The gradients of every adapter that PEFT has are PEFT's, to 1e-4, over dense and quantized bases.

Random Llamas of transformers, in float64 there: a tiny dense one, and one in 4 bits that is large
enough for tiles of attention and expanded products here, whose weights there are what the bits say.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import torch
from mlx.utils import tree_flatten
from test_hf_folders import write_tokenizer

import mlxlora_core as mlxlora
from mlxlora_core.model import adapters
from mlxlora_core.model.architectures import folder_args
from mlxlora_core.model.linears import dense_weight
from mlxlora_core.training.batches import Collator
from mlxlora_core.training.examples import Example
from mlxlora_core.training.gradient import mean_gradient

transformers: Any = pytest.importorskip(
    "transformers", reason="needs transformers: pip install 'mlxlora[interop]'"
)
peft: Any = pytest.importorskip("peft", reason="needs peft: pip install 'mlxlora[interop]'")
pytestmark = pytest.mark.usefixtures("one_torch_thread")

Arrays = Mapping[str, np.ndarray]
COMMON = {"num_hidden_layers": 2, "tie_word_embeddings": False, "rope_theta": 1e4}
COMMON |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "num_key_value_heads": 2}
SIZES = {
    "dense": {"hidden_size": 48, "intermediate_size": 80, "num_attention_heads": 4, "vocab_size": 300},
    "4 bits": {"hidden_size": 256, "intermediate_size": 384, "num_attention_heads": 4, "vocab_size": 320},
}
TOKENS = {"dense": 24, "4 bits": 150}
QUANTIZE: dict[str, Any] = {
    "dense": None,
    "4 bits": {"use": "affine", "bits": 4, "group_size": 32, "head": True},
}
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
LINEARS = [*ATTENTION, "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True)
class Kind:
    """An adapter of ours and of theirs.

    Attributes:
        config: of PEFT.
        name: of ours.
        options: of ours.
    """

    config: Callable[[], Any]
    name: str
    options: Mapping[str, Any]


KINDS = {
    "lora": Kind(
        lambda: peft.LoraConfig(r=4, lora_alpha=10, target_modules=LINEARS),
        "lora",
        {"rank": 4, "scale": 2.5, "targets": ["all-linear"]},
    ),
    "lora, embedding and head": Kind(
        lambda: peft.LoraConfig(r=4, lora_alpha=8, target_modules=["embed_tokens", "lm_head", "q_proj"]),
        "lora",
        {"rank": 4, "scale": 2.0, "targets": ["embed_tokens", "lm_head", "q_proj"]},
    ),
    "lora, ranks by path": Kind(
        lambda: peft.LoraConfig(
            r=4,
            lora_alpha=8,
            target_modules=ATTENTION,
            rank_pattern={"q_proj": 2, "model.layers.1.self_attn.v_proj": 6},
            alpha_pattern={"q_proj": 1},
        ),
        "lora",
        {
            "rank": 4,
            "scale": 2.0,
            "targets": ATTENTION,
            "overrides": [
                "q_proj: rank=2, scale=0.5",
                f"model.layers.1.self_attn.v_proj: rank=6, scale={8 / 6}",
            ],
        },
    ),
    "rslora": Kind(
        lambda: peft.LoraConfig(r=4, lora_alpha=3, use_rslora=True, target_modules=LINEARS),
        "rslora",
        {"rank": 4, "alpha": 3.0, "targets": ["all-linear"]},
    ),
    "dora": Kind(
        lambda: peft.LoraConfig(r=4, lora_alpha=6, use_dora=True, target_modules=LINEARS),
        "dora",
        {"rank": 4, "scale": 1.5, "targets": ["all-linear"]},
    ),
    "pissa": Kind(
        lambda: peft.LoraConfig(r=4, lora_alpha=6, init_lora_weights="pissa", target_modules=ATTENTION),
        "pissa",
        {"rank": 4, "scale": 1.5, "targets": ATTENTION},
    ),
    "ia3": Kind(
        lambda: peft.IA3Config(
            target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]
        ),
        "ia3",
        {},
    ),
    "vera": Kind(
        lambda: peft.VeraConfig(r=16, target_modules=LINEARS, d_initial=0.1),
        "vera",
        {"rank": 16, "targets": ["all-linear"]},
    ),
}


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """What PEFT warns of is not about gradients."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a random Llama with biases in its attention, as transformers saves it."""
    made: dict[str, Path] = {}

    def base(size: str) -> Path:
        if size not in made:
            made[size] = folder = tmp_path_factory.mktemp("base")
            config = transformers.LlamaConfig(**COMMON, **SIZES[size], attention_bias=True)
            model = transformers.AutoModelForCausalLM.from_config(config)
            torch.manual_seed(3)
            with torch.no_grad():
                for name, weight in model.named_parameters():
                    wide = weight.shape[-1] ** -0.5 if weight.ndim > 1 else 0.2
                    weight.copy_(torch.randn_like(weight) * wide + float("norm" in name))
            model.save_pretrained(folder)
            write_tokenizer(folder)
            stated = json.loads((folder / "config.json").read_text())
            (folder / "config.json").write_text(json.dumps(stated | {"rope_theta": 1e4}))
        return made[size]

    return base


class Pair:
    """A model of ours and what it is called and ordered as there.

    Attributes:
        model: ours.
        there: module path here -> path there.
        rows: module path here -> which output there each output here is.
    """

    def __init__(self, model: mlxlora.Model) -> None:
        self.model = model
        spec = model.base.architecture.spec
        self._table = spec.layouts["hf"].table(folder_args(spec, model.base.config))
        weights = [entry for entry in self._table if entry.name.endswith(".weight")]
        self.there = {
            entry.name.removesuffix(".weight"): entry.foreign.removesuffix(".weight") for entry in weights
        }
        self.rows = {
            entry.name.removesuffix(".weight"): np.array(entry.rows)
            for entry in weights
            if entry.rows is not None
        }

    def weights(self) -> dict[str, torch.Tensor]:
        """What every parameter of the base says, under its name and in its order there."""
        modules = dict(self.model.base.module.named_modules())
        found = {}
        for entry in self._table:
            path, _, part = entry.name.rpartition(".")
            here = dense_weight(modules[path]) if part == "weight" else modules[path].bias
            value = np.array(here.astype(mx.float32))
            if entry.rows is not None:
                turned = np.empty_like(value)
                turned[np.array(entry.rows)] = value
                value = turned
            found[entry.foreign] = torch.from_numpy(value)
        return found


def theirs(pair: Pair, base: Path, kind: Kind) -> tuple[Any, dict[str, np.ndarray]]:
    """Their model with the same weights and an adapter, all that trains moved; and how PiSSA began."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        base, dtype=torch.float32, attn_implementation="eager"
    )
    model.load_state_dict(pair.weights())
    torch.manual_seed(7)
    model = peft.get_peft_model(model, kind.config())
    began = {
        name: weight.detach().numpy().copy() for name, weight in model.named_parameters() if "lora_" in name
    }
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.add_(torch.randn_like(weight) * 0.1)
    return model.double().eval(), began


def ours_of(pair: Pair, path: str, kind: Kind, held: Callable[[str], np.ndarray], began: Arrays) -> Arrays:
    """Own parameters of the adapter at a path, from theirs.

    Args:
        pair: both models.
        path: here.
        kind: of adapter.
        held: of the end of a name there, what it holds.
        began: their parameters before they were moved.
    """
    rows = pair.rows.get(path, slice(None))
    there = f"base_model.model.{pair.there[path]}"
    if kind.name == "ia3":
        value = held("ia3_l.default").reshape(-1)
        return {"ia3_l": value if path.endswith("w2") else value[rows]}
    if kind.name == "vera":
        outputs = held("vera_lambda_b.default")
        a, b = held("vera_A.default"), held("vera_B.default")
        wide = dict(pair.model.base.module.named_modules())[path].vera_a.shape[0]
        return {
            "vera_a": a[:, :wide].T,
            "vera_b": b[: len(outputs)].T[:, rows],
            "lambda_d": held("vera_lambda_d.default"),
            "lambda_b": outputs[rows],
        }
    if path == "tok_embeddings":
        return {
            "lora_a": held("lora_embedding_A.default").T,
            "lora_b": held("lora_embedding_B.default").T,
        }
    found = {"lora_a": held("lora_A.default.weight").T, "lora_b": held("lora_B.default.weight").T[:, rows]}
    if kind.name == "dora":
        found["m"] = held("lora_magnitude_vector.default.weight")[rows]
    if kind.name == "pissa":
        found["lora_a0"] = began[f"{there}.lora_A.default.weight"].T
        found["lora_b0"] = began[f"{there}.lora_B.default.weight"].T[:, rows]
    return found


def examples(size: str) -> list[Example]:
    draw = np.random.default_rng(0)
    length = TOKENS[size]
    rows = []
    for cut in (0, length // 3):
        tokens = draw.integers(3, 300, length - cut).astype(np.uint32)
        rows.append(Example(tokens, np.arange(len(tokens)) > cut // 4))
    return rows


def their_gradient(model: Any, rows: list[Example]) -> float:
    """Differentiate the mean over the counted tokens; gives the mean."""
    losses = []
    for row in rows:
        ids = torch.from_numpy(row.tokens.astype(np.int64))[None]
        logits = model(ids).logits[0, :-1]
        counted = torch.from_numpy(row.mask[1:])
        losses.append(
            torch.nn.functional.cross_entropy(logits[counted], ids[0, 1:][counted], reduction="sum")
        )
    loss = sum(losses) / sum(int(row.mask[1:].sum()) for row in rows)
    loss.backward()
    return float(loss.detach())


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", KINDS)
def test_gradients_are_pefts(bases: Callable[[str], Path], name: str, size: str) -> None:
    kind, base = KINDS[name], bases(size)
    pair = Pair(mlxlora.load(base, quantize=QUANTIZE[size]))
    model, began = theirs(pair, base, kind)
    pair.model.attach(kind.name, layers=-1, **kind.options)
    adapted = pair.model.needed_adapter()
    module = pair.model.base.module
    parameters = dict(model.named_parameters()) | dict(model.named_buffers(remove_duplicate=False))

    def at(path: str, grad: bool) -> Callable[[str], np.ndarray]:
        def held(end: str) -> np.ndarray:
            own = f"base_model.model.{pair.there[path]}.{end}"
            tensor = parameters[own]
            value = tensor.grad if grad and tensor.grad is not None else tensor
            return value.detach().numpy()

        return held

    values = {
        f"{path}.{part}": mx.array(np.ascontiguousarray(value, np.float32))
        for path in adapted.paths
        for part, value in ours_of(pair, path, kind, at(path, False), began).items()
    }
    assert values.keys() == adapters.adapter_parameters(module, adapted.paths).keys()
    module.load_weights(list(values.items()), strict=False)
    rows = examples(size)
    loss, _, gradient = mean_gradient(pair.model.base.language_model, Collator(rows), [0, 1], 2)
    want = their_gradient(model, rows)
    assert loss.mean == pytest.approx(want, rel=1e-5)
    got = dict(tree_flatten(gradient))
    trained = adapters.trainable(module)
    assert got.keys() == trained.keys()
    assert len({id(p) for p in model.parameters() if p.requires_grad}) == len(trained)
    for path in adapted.paths:
        for part, theirs_there in ours_of(pair, path, kind, at(path, True), began).items():
            key = f"{path}.{part}"
            if key in trained:
                largest = np.abs(theirs_there).max()
                assert largest > 1e-6, key
                apart = np.abs(np.array(got[key]) - theirs_there).max() / largest
                assert apart <= 1e-4, (key, apart)
