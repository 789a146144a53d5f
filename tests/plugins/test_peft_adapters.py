"""What PEFT has saved is read as PEFT reads it, and what cannot be converted is refused by name."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlxlora_peft.opening import detect, open_adapter
from mlxlora_peft.patterns import Patterns
from mlxlora_peft.places import number_patterns, targets

from mlxlora_core.errors import MlxloraError, ModelError

Q, V = "base_model.model.model.layers.0.self_attn.q_proj", "base_model.model.model.layers.1.self_attn.v_proj"
EMBED, HEAD = "base_model.model.model.embed_tokens", "base_model.model.lm_head"
LORA: dict[str, Any] = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "bias": "none"}


def pair(path: str, rank: int = 2) -> dict[str, mx.array]:
    return {f"{path}.lora_A.weight": mx.ones((rank, 8)), f"{path}.lora_B.weight": mx.ones((6, rank))}


def write(folder: Path, config: Any, tensors: Mapping[str, mx.array]) -> Path:
    mx.save_safetensors(str(folder / "adapter_model.safetensors"), dict(tensors))
    if config is not None:
        (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def refused(path: Path) -> str:
    with pytest.raises(ModelError) as fault:
        for held in open_adapter(path).linears.values():
            mx.eval([tensor.read() for tensor in held.values()])
    line = str(fault.value)
    assert "\n" not in line and len(line.encode()) < 2000
    return line


#: what a config asks for -> what is said of it
ASKED: dict[str, tuple[dict[str, Any], str]] = {
    "modules_to_save": ({"modules_to_save": ["lm_head"]}, "modules_to_save ['lm_head'] (whole modules"),
    "bias": ({"bias": "lora_only"}, "bias 'lora_only' (biases that are trained)"),
    "lora_bias": ({"lora_bias": True}, "lora_bias True (biases in the updates)"),
    "fan_in_fan_out": ({"fan_in_fan_out": True}, "fan_in_fan_out True (weights that are stored transposed)"),
    "pissa": ({"init_lora_weights": "pissa"}, "init_lora_weights 'pissa' (weights of the base were changed"),
    "pissa, fast": ({"init_lora_weights": "pissa_niter_4"}, "path_initial_model_for_weight_conversion"),
    "olora": ({"init_lora_weights": "olora"}, "init_lora_weights 'olora'"),
    "loftq": ({"init_lora_weights": "loftq"}, "init_lora_weights 'loftq'"),
    "corda": ({"init_lora_weights": "corda"}, "init_lora_weights 'corda'"),
    "an init that is not known": ({"init_lora_weights": ["x"]}, "init_lora_weights ['x']"),
    "target_parameters": (
        {"target_parameters": ["experts.w"]},
        "target_parameters ['experts.w'] (parameters",
    ),
    "tokens": ({"trainable_token_indices": [1, 2]}, "trainable_token_indices [1, 2] (single tokens"),
    "layer_replication": ({"layer_replication": [[0, 2], [1, 3]]}, "layer_replication [[0, 2], [1, 3]]"),
    "qalora": ({"use_qalora": True}, "use_qalora True (QALoRA"),
    "alora": ({"alora_invocation_tokens": [4]}, "alora_invocation_tokens [4] (an activated LoRA"),
    "bdlora": ({"use_bdlora": {"nblocks": 2}}, "use_bdlora {'nblocks': 2}"),
    "arrow": ({"arrow_config": {"top_k": 3}}, "arrow_config {'top_k': 3} (routing"),
    "several": ({"bias": "all", "use_qalora": True}, "bias 'all' (biases that are trained); use_qalora True"),
    "another type": ({"peft_type": "LOHA"}, "peft_type is 'LOHA', wanted LORA, IA3, VERA"),
    "no type": ({"peft_type": None}, "peft_type is None, wanted LORA"),
    "a list for a type": ({"peft_type": ["LORA"]}, "peft_type is ['LORA'], wanted LORA"),
    "DoRA without magnitudes": ({"use_dora": True}, "use_dora is True, but there are no magnitudes"),
    "a word for a flag": ({"use_rslora": "yes"}, "use_rslora is 'yes', wanted true or false"),
    "alpha": ({"lora_alpha": True}, "lora_alpha is True, wanted a number"),
    "a large alpha": ({"lora_alpha": 10**40}, "lora_alpha is 1000000"),
    "rank": ({"r": 0}, "r is 0, wanted a number above 0"),
    "another rank": (
        {"r": 3},
        "the tensors have other ranks than it says: model.layers.0.self_attn.q_proj 2",
    ),
    "dropout": ({"lora_dropout": 1}, "lora_dropout is 1, wanted a number from 0 up to 1"),
    "a rank pattern": ({"rank_pattern": {"q_proj": 4}}, "model.layers.0.self_attn.q_proj 2, wanted 4"),
    "patterns are a list": ({"alpha_pattern": ["q_proj"]}, "alpha_pattern is ['q_proj'], wanted a table"),
    "a pattern's number": (
        {"alpha_pattern": {"q_proj": "x"}},
        "alpha_pattern has q_proj: 'x', wanted numbers",
    ),
    "a pattern that may take for ever": (
        {"alpha_pattern": {"(a+)+b": 1}},
        "alpha_pattern has the patterns (a+)+b, which is more than names",
    ),
    "a pattern that is none": ({"alpha_pattern": {"(": 1}}, "alpha_pattern has the patterns (, which"),
}


@pytest.mark.parametrize(("config", "says"), ASKED.values(), ids=ASKED)
def test_what_a_config_asks_for_and_is_not_computed_is_refused_by_name(
    tmp_path: Path, config: dict[str, Any], says: str
) -> None:
    line = refused(write(tmp_path, {**LORA, **config}, pair(Q)))
    assert says in line and "adapter_config.json" in line


#: tensors -> what is said of them
HELD: dict[str, tuple[dict[str, mx.array], str]] = {
    "a saved head": ({f"{HEAD}.weight": mx.ones((4, 4))}, "holds whole embeddings or heads (save_embedding"),
    "a saved embedding": ({f"{EMBED}.weight": mx.ones((4, 4))}, f"no adapter here computes: {EMBED}.weight"),
    "a module": (
        {f"{HEAD}.modules_to_save.default.weight": mx.ones((4, 4))},
        "modules_to_save (whole modules that were trained beside the adapter)",
    ),
    "tokens": (
        {f"{EMBED}.token_adapter.trainable_tokens_delta": mx.ones((1, 4))},
        "holds trainable tokens, which no adapter here computes",
    ),
    "a bias": ({f"{Q}.lora_B.bias": mx.ones((6,))}, "holds lora_bias"),
    "the base's bias": ({f"{Q}.bias": mx.ones((6,))}, "holds biases that were trained"),
    "anything": (
        {"base_model.model.x": mx.ones((6,))},
        "holds base_model.model.x, which nothing here computes",
    ),
    "several": (
        {f"{HEAD}.weight": mx.ones((4, 4)), f"{Q}.bias": mx.ones((6,))},
        "; holds whole embeddings or heads",
    ),
    "half a pair": ({f"{V}.lora_A.weight": mx.ones((2, 8))}, "lacks model.layers.1.self_attn.v_proj.lora_B"),
    "no product": (
        {f"{V}.lora_A.weight": mx.ones((2, 8)), f"{V}.lora_B.weight": mx.ones((2, 6))},
        "has updates that are no product (outputs, R) times (R, inputs)",
    ),
    "nothing": (
        {f"{V}.lora_A.weight": mx.ones((0, 8)), f"{V}.lora_B.weight": mx.ones((6, 0))},
        "no product",
    ),
    "some magnitudes": (
        pair(V) | {f"{V}.lora_magnitude_vector": mx.ones((6,))},
        "lacks model.layers.0.self_attn.q_proj.lora_magnitude_vector",
    ),
    "two adapters": (
        {f"{V}.lora_A.one.weight": mx.ones((2, 8)), f"{V}.lora_B.two.weight": mx.ones((6, 2))},
        "holds adapters one, two",
    ),
    "a tensor twice": ({f"{Q}.lora_A.default.weight": mx.ones((2, 8))}, "holds lora_A of"),
    "other vectors": ({f"{V}.ia3_l": mx.ones((6, 1))}, "its tensors are those of IA3 and LORA, but"),
}


@pytest.mark.parametrize(("tensors", "says"), HELD.values(), ids=HELD)
def test_what_a_file_holds_and_is_not_converted_is_refused_by_name(
    tmp_path: Path, tensors: dict[str, mx.array], says: str
) -> None:
    assert says in refused(write(tmp_path, LORA, pair(Q) | tensors))


def test_pickles_are_refused_with_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps(LORA))
    (tmp_path / "adapter_model.bin").write_bytes(b"\x80\x02}q\x00.")
    for path in (tmp_path, tmp_path / "adapter_model.bin"):
        assert detect(path)
        line = refused(path)
        assert "is a pickle, which is not read" in line and "save it again" in line


@pytest.mark.parametrize(
    ("config", "tensors", "says"),
    [
        ({}, {f"{Q}.ia3_l": mx.ones((6,))}, "neither (1, inputs) nor (outputs, 1)"),
        ({}, {f"{Q}.ia3_l": mx.ones((1, 8))}, "scales the inputs of model.layers.0.self_attn.q_proj"),
        ({}, {f"{V}.ia3_l": mx.ones((1, 8))}, "feedforward_modules is None, which the vectors of"),
        ({"feedforward_modules": ["v_proj"]}, {f"{V}.ia3_l": mx.ones((6, 1))}, "feedforward_modules is ['v_"),
        ({"feedforward_modules": "(a+)+"}, {f"{V}.ia3_l": mx.ones((6, 1))}, "wanted a list of names"),
    ],
)
def test_ia3_that_is_none(
    tmp_path: Path, config: dict[str, Any], tensors: dict[str, mx.array], says: str
) -> None:
    assert says in refused(write(tmp_path, {"peft_type": "IA3", **config}, tensors))


VERA = {"base_model.vera_A": mx.ones((3, 9)), "base_model.vera_B": mx.ones((9, 3))}


@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        ({"base_model.vera_A": None, "base_model.vera_B": None}, "lacks vera_A, vera_B: without them"),
        ({f"{Q}.vera_lambda_b": None}, "lacks model.layers.0.self_attn.q_proj.vera_lambda_b"),
        ({f"{Q}.vera_lambda_d": mx.ones((4,))}, "vectors that do not fit its projections"),
        ({f"{Q}.vera_lambda_b": mx.ones((10,))}, "vectors that do not fit its projections"),
        ({"base_model.vera_B": mx.ones((9, 4))}, "which are no product"),
    ],
)
def test_vera_that_is_none(tmp_path: Path, tensors: dict[str, mx.array | None], says: str) -> None:
    good = VERA | {f"{Q}.vera_lambda_b": mx.ones((6,)), f"{Q}.vera_lambda_d": mx.ones((3,))}
    held = {name: tensor for name, tensor in (good | tensors).items() if tensor is not None}
    assert says in refused(write(tmp_path, {"peft_type": "VERA", "r": 3}, held))


def test_an_embedding_that_peft_saves_with_its_update_is_not_looked_at_and_told(tmp_path: Path) -> None:
    tensors = {f"{EMBED}.lora_embedding_A": mx.ones((2, 9)), f"{EMBED}.lora_embedding_B": mx.ones((8, 2))}
    write(tmp_path, LORA, tensors | {f"{EMBED}.base_layer.weight": mx.ones((9, 8))})
    opened = open_adapter(tmp_path)
    held = opened.linears["model.embed_tokens"]
    assert {name: tensor.shape for name, tensor in held.items()} == {"lora_a": (9, 2), "lora_b": (2, 8)}
    assert opened.embedding_alone and "not looked at" in opened.notes[0]


def test_a_file_without_a_config_says_its_ranks_and_not_its_scale(tmp_path: Path) -> None:
    write(tmp_path, None, pair(Q) | pair(V, 3) | pair(V.replace("1", "2"), 3))
    for path in (tmp_path, tmp_path / "adapter_model.safetensors"):
        if path.is_dir():
            assert "says no peft_type" in refused(path)
            continue
        opened = open_adapter(path)
        assert (opened.options, opened.unstated) == ({"rank": 3}, ("scale",))
        assert opened.overrides == {"model.layers.0.self_attn.q_proj": {"rank": 2}}


def test_what_is_noted(tmp_path: Path) -> None:
    write(tmp_path, {**LORA, "base_model_name_or_path": "org/base", "new_thing": 3, "other": None}, pair(Q))
    assert open_adapter(tmp_path).notes == [
        "its config names the base 'org/base'",
        "keys of its config that are not known were not looked at: new_thing",
    ]


# --- patterns -----------------------------------------------------------------

PATHS = ["model.layers.0.self_attn.q_proj", "model.layers.11.mlp.down_proj", "lm_head", "q_proj"]


@pytest.mark.parametrize(
    "pattern",
    [
        "q_proj",
        "self_attn.q_proj",
        "^model.layers.0.self_attn.q_proj",
        r"layers\.\d+\.mlp\.(down|up)_proj",
        r".*\.mlp\.down_proj",
        r"model.layers.(?:11|12).mlp.down_proj",
        "layers.[0-9]+.mlp.down_proj",
        "proj",
        "model.layers.1.mlp.down_proj",
        "lm_head$",
    ],
)
def test_patterns_match_as_in_peft(pattern: str) -> None:
    patterns = Patterns("rank_pattern", {pattern: 7, "lm_head": 9}, least=0)
    for path in PATHS:
        hit = next((k for k in (pattern, "lm_head") if re.match(rf"(.*\.)?({k})$", path)), None)
        assert patterns.get(path, 1) == {pattern: 7, "lm_head": 9, None: 1}[hit]


@pytest.mark.parametrize(
    "pattern", ["(a|a)*b", "(x+x+)+y", ".*.*.*z", "a{1,99}{1,99}", r"(\w+)+$", "[a-z]*", "[0-9]" * 99 + "!"]
)
def test_patterns_that_may_take_for_ever_are_not_tried(pattern: str) -> None:
    with pytest.raises(MlxloraError, match="not read"):
        Patterns("rank_pattern", {pattern: 1}, least=0)


def test_the_slowest_pattern_that_is_tried_is_fast() -> None:
    patterns = Patterns("rank_pattern", {r".*[a-z].\d+.\d+\.x": 1}, least=0)
    started = time.process_time()
    patterns.get("a.1" * 85, 1)
    assert time.process_time() - started < 20  # it takes thousandths of a second


# --- what a config says of modules --------------------------------------------


def modules(names: list[str], layers: list[int]) -> list[str]:
    return [f"model.layers.{layer}.self_attn.{name}" for layer in layers for name in names]


@pytest.mark.parametrize(
    ("paths", "told"),
    [
        (modules(["k", "q"], [0, 1, 2]), {"target_modules": ["k", "q"], "layers_to_transform": None}),
        (
            modules(["q"], [1, 2]),
            {"target_modules": ["q"], "layers_to_transform": [1, 2], "layers_pattern": "layers"},
        ),
        (
            [*modules(["q"], [0, 1, 2]), "lm_head"],
            {"target_modules": ["lm_head", "q"], "layers_to_transform": None},
        ),
        (
            [*modules(["q"], [2]), "lm_head"],
            {"target_modules": ["lm_head", "model.layers.2.self_attn.q"], "layers_to_transform": None},
        ),
        (
            [*modules(["q"], [0, 1, 2]), "model.layers.0.self_attn.k"],
            {
                "target_modules": ["model.layers.0.self_attn.k", *modules(["q"], [0, 1, 2])],
                "layers_to_transform": None,
            },
        ),
        (["lm_head"], {"target_modules": ["lm_head"], "layers_to_transform": None}),
    ],
)
def test_targets(paths: list[str], told: dict[str, Any]) -> None:
    assert targets(paths, 3) == told


def test_number_patterns_are_short_where_they_can_be() -> None:
    numbers = {f"model.layers.{layer}.q": 4 for layer in range(3)} | {
        f"model.layers.{n}.k": 2 for n in (0, 1)
    }
    assert number_patterns(numbers) == (4, {"k": 2})
    numbers["model.layers.2.q"] = 8
    common, patterns = number_patterns(numbers)
    assert (common, patterns) == (4, {"k": 2, r"model\.layers\.2\.q": 8}) or common == 2
    for path, number in numbers.items():
        assert Patterns("rank_pattern", patterns, least=0).get(path, common) == number
