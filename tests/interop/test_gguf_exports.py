"""GGUF files that are exported, in llama.cpp: models of each family, SmolLM2 in several types, adapters.

In float32 llama.cpp computes what mlxlora does, to 1e-4 nats. With packed weights it rounds what
comes into each product to 8 bits, which it cannot be told to leave: single log-probabilities are
then off by some hundredths, up to half a nat, as they are here where the same is done. What holds
is the mean. Where it is built with a BLAS it multiplies in float32, and each of them is right.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import gguf_files
import mlx.core as mx
import numpy as np
import pytest
import small_models
from llama_cpp_server import LlamaCpp, with_blas
from test_smollm2 import CHAT, GREEDY, TEXTS

import mlxlora_core
from mlxlora_core import cli
from mlxlora_core.model import adapters, linears, loading
from mlxlora_core.plugins.sections import configure

pytest.importorskip("xllamacpp", reason="needs llama.cpp: pip install xllamacpp")

REGISTRY = small_models.REGISTRY
FAMILIES = [family for family in small_models.FAMILIES if family != "mistral"]  # llama.cpp has no such window
QUESTION, ANSWER = "What is ReLU in mlx?", "Applies the Rectified Linear Unit, element by element."
#: a text of 120 tokens, the model's own
TEXT = [id for _, ids, _ in TEXTS for id in ids] + CHAT + [504, 3575, 282, 4649, 314, *GREEDY]


def export(base: Path | str, to: str, out: Path, adapter: Path | None = None, **options: Any) -> Path:
    report = mlxlora_core.export(str(base), to, out, adapter_file=adapter, **options)
    assert report.check is not None
    return out


def logits_of(base: Path, ids: Sequence[int], adapter: Path | None = None) -> np.ndarray:
    """Log-probabilities (T, V) here, the adapter beside the model."""
    model = loading.load(base, REGISTRY)
    if adapter is not None:
        adapters.load(adapter, model, REGISTRY)
    logits = model.language_model(mx.array([list(ids)]))[0].astype(mx.float32)
    return np.array(logits - mx.logsumexp(logits, axis=-1, keepdims=True), np.float64)


def new_adapter(base: Path, path: Path) -> Path:
    """A low-rank update of all linears, of two ranks, that changes what the model computes."""
    model = loading.load(base, REGISTRY)
    values = {"rank": 2, "targets": ("all-linear",), "overrides": ("wo: rank=3, scale=3.0",)}
    choice, config = configure(REGISTRY.find("adapter", "lora"), values)
    adapted = adapters.attach(model, choice, config, seed=1)
    held = adapters.trainable(model.module)
    keys = mx.random.split(mx.random.key(5), len(held))
    drawn = [(n, mx.random.normal(t.shape, key=k) / 10) for (n, t), k in zip(held.items(), keys, strict=True)]
    model.module.load_weights(drawn, strict=False)
    adapters.save(path, model, adapted)
    return path


@pytest.mark.parametrize("family", FAMILIES)
def test_each_family_computes_the_same(family: str, tmp_path: Path) -> None:
    """The base, an adapter in its weights, and the adapter as a file on the base."""
    base = small_models.write(tmp_path / "base", family)
    adapter = new_adapter(base, tmp_path / "adapter.safetensors")
    ids = [int(n) for n in np.random.default_rng(3).integers(4, 400, 40)]
    plain, adapted = logits_of(base, ids), logits_of(base, ids, adapter)
    assert np.abs(plain - adapted).max() > 0.3
    files = {
        "plain": (export(base, "gguf", tmp_path / "plain.gguf"), None, plain),
        "fused": (export(base, "gguf", tmp_path / "fused.gguf", adapter), None, adapted),
    }
    lora = export(base, "gguf-lora", tmp_path / "adapter.gguf", adapter)
    files["beside"] = (tmp_path / "plain.gguf", lora, adapted)
    for name, (path, beside, want) in files.items():
        model = LlamaCpp(path, beside)
        for length in (1, 7, 30, 40):  # beyond the windows of the small models, too
            found = model.log_probabilities(ids[:length])
            apart = max(abs(value - want[length - 1, token]) for token, value in found.items())
            # llama.cpp reads Gemma's gelu off a table of float16
            assert apart < (0.01 if family.startswith("gemma") else 1e-4), f"{name} after {length} tokens"
            best = int(want[length - 1].argmax())
            assert max(found, key=lambda token: found[token]) == best


# --- SmolLM2 ------------------------------------------------------------------


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder whose files are gone after the tests: pytest keeps those of earlier runs."""
    folder = tmp_path_factory.mktemp("exports")
    yield folder
    for path in folder.glob("*.gguf"):
        path.unlink()


@pytest.fixture(scope="module")
def float32(smollm2: Path, room: Path) -> Path:
    return export(smollm2, "gguf", room / "f32.gguf", type="F32")


@pytest.fixture(scope="module")
def adapter(smollm2: Path, room: Path) -> Path:
    """An adapter on the 8 top layers, trained for 24 steps to answer one question."""
    rows = [(QUESTION, ANSWER), ("What is Softmax in mlx?", "Applies the softmax along the last axis.")]
    rows += [
        ("What is the capital of France?", "The capital of France is Paris."),
        ("What do bees make?", "Honey."),
    ]
    (room / "data").mkdir()
    for name in ("train", "valid"):
        lines = [
            {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]}
            for q, a in rows
        ]
        (room / "data" / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    command = ["train", "--model", smollm2, "--data", room / "data", "--adapter-file", room / "a.safetensors"]
    command += ["--iters", 24, "--learning-rate", 1e-3, "--batch-size", 4, "--mask-prompt"]
    where = {"targets": "all-linear", "layers": 8, "options.rank": 8}
    command += [part for key, value in where.items() for part in ("--set", f"adapter.{key}={value}")]
    assert cli.execute([*map(str, command)]) == 0
    return room / "a.safetensors"


def test_a_gguf_file_comes_out_as_it_went_in(smollm2: Path, room: Path) -> None:
    """Each tensor to the bit, and each key of the tokenizer; what is said of the model besides is its own."""
    out = export(smollm2, "gguf", room / "again.gguf")
    want, got = (gguf_files.read(path.read_bytes()) for path in (smollm2, out))
    assert got[1] == want[1] and len(got[1]) == 272
    for prefix in ("tokenizer.", "llama.", "general.file", "general.quant", "general.arch"):
        assert {k: v for k, v in got[0].items() if k.startswith(prefix) and k in want[0]} == {
            k: v for k, v in want[0].items() if k.startswith(prefix)
        }
    assert [k for k in got[0] if k.startswith("tokenizer.") and k not in want[0]] == []


def test_the_gguf_package_reads_every_number(smollm2: Path, room: Path, float32: Path) -> None:
    gguf: Any = pytest.importorskip("gguf", reason="needs another reader: pip install gguf")
    theirs = {t.name: t for t in gguf.GGUFReader(smollm2).tensors}
    for tensor in gguf.GGUFReader(float32).tensors:
        other = theirs[tensor.name]
        want = gguf.quants.dequantize(other.data, other.tensor_type)
        assert np.array_equal(np.asarray(tensor.data).reshape(want.shape), want), tensor.name


def test_greedy_text_token_for_token(float32: Path) -> None:
    model = LlamaCpp(float32)
    text, count = model.greedy([504, 3575, 282, 4649, 314], 40)
    assert (text, count) == (" Paris.\n\nThe answer is: 2018-01-22 12:12:53.", len(GREEDY))
    assert model.answer("What is the capital of France?") == ("The capital of France is Paris.", "stop")


def followed(model: LlamaCpp, ids: Sequence[int]) -> np.ndarray:
    """log p of each token after those before it; NaN where it is not among the most likely."""
    return np.array([model.log_probabilities(ids[:n]).get(ids[n], np.nan) for n in range(1, len(ids))])


def here(path: Path, ids: Sequence[int], adapter: Path | None = None) -> np.ndarray:
    held = logits_of(path, ids, adapter)
    return held[np.arange(len(ids) - 1), list(ids[1:])]


def test_float32_and_an_adapter_on_it_compute_the_same(
    smollm2: Path, room: Path, float32: Path, adapter: Path
) -> None:
    lora = export(smollm2, "gguf-lora", room / "lora.gguf", adapter)
    for beside, trained in ((None, None), (lora, adapter)):
        apart = followed(LlamaCpp(float32, beside), TEXT) - here(smollm2, TEXT, trained)
        assert np.isfinite(apart).mean() > 0.8 and np.nanmax(np.abs(apart)) < 1e-3


def of_8_bits(x: mx.array) -> mx.array:
    """What llama.cpp makes of what comes into a product with packed weights: 8 bits, a scale for 32."""
    grouped = x.astype(mx.float32).reshape(-1, x.shape[-1] // 32, 32)
    scale = mx.abs(grouped).max(axis=-1, keepdims=True) / 127
    steps = mx.round(mx.where(scale > 0, grouped / mx.maximum(scale, 1e-30), 0))
    return (steps * scale.astype(mx.float16).astype(mx.float32)).reshape(x.shape)


@pytest.mark.parametrize("kind", ["auto", "Q8_0"])
def test_packed_weights_compute_the_same_but_for_8_bits(
    smollm2: Path, room: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """``auto`` is Q4_1 without loss. The mean is compared, and single numbers with what 8 bits do here."""
    path = export(smollm2, "gguf", room / f"{kind}.gguf", type=kind)
    want, found = here(path, TEXT), followed(LlamaCpp(path), TEXT)
    apart = (found - want)[np.isfinite(found)]
    times: Callable[..., mx.array] = linears.Quantized._times
    monkeypatch.setattr(linears.Quantized, "_times", lambda self, x: times(self, of_8_bits(x)))
    usual = np.abs(here(path, TEXT) - want)[np.isfinite(found)]
    assert len(apart) > 90 and abs(apart.mean()) < 0.02
    assert np.abs(apart).mean() < 2 * usual.mean() and np.abs(apart).max() < 4 * usual.max()


def test_the_tuned_answer_in_both_forms(smollm2: Path, room: Path, adapter: Path) -> None:
    """GGUF -> trained -> GGUF with the adapter in it, in the file's own types, and beside the same file."""
    assert LlamaCpp(smollm2).answer(QUESTION)[0] != ANSWER
    fused = export(smollm2, "gguf", room / "fused.gguf", adapter)
    types = [kind for kind, *_ in gguf_files.read(fused.read_bytes())[1].values()]
    assert (types.count("Q4_1"), types.count("Q8_0")) == (210, 1)
    lora = export(smollm2, "gguf-lora", room / "beside.gguf", adapter)
    assert LlamaCpp(fused).answer(QUESTION) == (ANSWER, "stop")
    assert LlamaCpp(smollm2, lora).answer(QUESTION) == (ANSWER, "stop")


@pytest.mark.parametrize("kind", ["auto", "Q8_0"])
def test_packed_weights_compute_the_same_where_llama_cpp_multiplies_in_float32(
    smollm2: Path, room: Path, kind: str
) -> None:
    """Each of the 200 likeliest tokens at each place, in a llama.cpp that has a BLAS."""
    path = export(smollm2, "gguf", room / f"{kind}-blas.gguf", type=kind)
    want, found = logits_of(path, TEXT), with_blas(path, TEXT)
    likely = np.argsort(-want, axis=-1)[:, :200]
    assert np.abs(np.take_along_axis(found - want, likely, axis=-1)).max() < 1e-3
