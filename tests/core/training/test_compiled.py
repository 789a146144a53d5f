"""The step that is compiled, and the one whose loss is read late, against the plain one."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlxlora_core.errors import DivergedError
from mlxlora_core.machine import device
from mlxlora_core.model import adapters
from mlxlora_core.model.linears import QuantizedLinear, linear_shape, linears, parameters, replace_modules
from mlxlora_core.model.loading import Model
from mlxlora_core.model.tokenizers import CheckedTokenizer
from mlxlora_core.options import plain
from mlxlora_core.plugins import Choice, Registry, load, start_runtimes
from mlxlora_core.plugins.sections import configure
from mlxlora_core.training import loop, update
from mlxlora_core.training.events import SpikeReport, TrainReport, ValidReport
from mlxlora_core.training.examples import Example
from mlxlora_core.training.loop import Training
from mlxlora_core.training.settings import TrainConfig

MakeExamples = Callable[..., tuple[Example, ...]]
MakeModel = Callable[..., Any]

VOCAB = 50
#: relative, of the loss of a step
CLOSE = 1e-6


def lengths(count: int, longest: int = 24) -> list[int]:
    draw = random.Random(1)
    return [draw.randrange(3, longest) for _ in range(count)]


def training(model: Any, examples: Any, valid: Any = (), seed: int = 0, **values: Any) -> Training:
    settings = {"iters": 6, "batch_size": 3, "learning_rate": 0.01, "steps_per_report": 1, **values}
    return Training(model, examples, valid, TrainConfig(**settings), seed)


def reports(work: Training) -> list[Any]:
    return [report for given in work for report in given]


def held(work: Training, model: Any) -> dict[str, np.ndarray[Any, Any]]:
    """Parameters and the state of the optimizer."""
    trained = dict(tree_flatten(model.trainable_parameters()))
    return {name: np.array(tensor) for name, tensor in {**trained, **work.optimizer_tensors()}.items()}


def same(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    return all(np.array_equal(one[name], other[name], equal_nan=True) for name in one)


def told(report: Any) -> Any:
    """A report without what takes time and memory."""
    kept = {k: v for k, v in vars(report).items() if "second" not in k and "bytes" not in k}
    return type(report).__name__, repr(kept)


# --- curves -------------------------------------------------------------------

BASE: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 64,
    "vocab_size": VOCAB,
    "rms_norm_eps": 1e-5,
    "rope_theta": 100.0,
    "max_position_embeddings": 512,
}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {**BASE, "model_type": "mistral", "sliding_window": 7},
    "gemma": {
        **BASE,
        "model_type": "gemma3_text",
        "rope_local_base_freq": 10.0,
        "query_pre_attn_scalar": 8,
        "sliding_window": 5,
        "layer_types": ["sliding_attention", "full_attention"],
        "hidden_activation": "gelu_pytorch_tanh",
    },
    "gemma 2": {
        **BASE,
        "model_type": "gemma2",
        "query_pre_attn_scalar": 8,
        "sliding_window": 5,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 3.0,
        "hidden_activation": "gelu_pytorch_tanh",
    },
    "olmo2": {**BASE, "model_type": "olmo2"},
    "phi3": {**BASE, "model_type": "phi3"},
}
#: adapter -> options with which it goes on something
ADAPTERS: dict[str, dict[str, Any]] = {
    "lora": {"targets": ("wq", "w2", "tok_embeddings", "lm_head"), "rank": 4},
    "rslora": {"rank": 3},
    "lora-plus": {"rank": 4},
    "dora": {"targets": ("all-linear",), "rank": 4},
    "pissa": {"rank": 4},
    "ia3": {},
    "vera": {"rank": 12},
}


@pytest.fixture
def base(registry: Registry, tokenizer: CheckedTokenizer) -> Callable[..., Model]:
    """A function that makes a small model with an adapter on it, the same each time."""

    def make(architecture: str = "llama", adapter: str = "lora", bits: int | None = None) -> Model:
        raw = ARCHITECTURES[architecture]
        component = registry.find("architecture", architecture.split()[0])
        args = component.spec.layouts["hf"].read(raw, {"lm_head.weight": (VOCAB, 32)})
        mx.random.seed(3)
        module = component.spec.build(args)
        if bits is not None:
            affine = registry.find("quantizer", "affine")
            choice = Choice(affine, affine.spec.options(group_size=32, bits=bits))
            pack = affine.spec.quantize
            packed = {
                path: QuantizedLinear(choice, pack(linear.weight, choice.options), linear_shape(linear))
                for path, linear in linears(module)
                if path.startswith("layers.")
            }
            replace_modules(module, packed)
        mx.eval(module.parameters())
        model = Model(Path("base"), module, tokenizer, plain(args), None, component, "", "")
        values = {"layers": -1, **ADAPTERS[adapter]} if architecture == "llama" else {"layers": -1}
        adapters.attach(model, *configure(registry.find("adapter", adapter), values), 0)
        return model

    return make


def check_curves(make: Callable[[], Any], examples: Any, **values: Any) -> None:
    """Six steps, compiled and not, have the same losses and norms."""
    plain = reports(training(make(), examples, compile="off", **values))
    work = training(make(), examples, compile="on", **values)
    compiled = reports(work)
    assert 2 <= work.compiles <= 12
    assert len(plain) == len(compiled) == 6
    for one, other in zip(plain, compiled, strict=True):
        assert other.loss == pytest.approx(one.loss, rel=CLOSE)
        assert other.grad_norm == pytest.approx(one.grad_norm, rel=1e-4)
        assert (other.trained_tokens, other.clipped) == (one.trained_tokens, one.clipped)
    assert plain[-1].loss != plain[0].loss


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_every_adapter_has_the_curve_of_the_plain_step(
    base: Callable[..., Model], make_examples: MakeExamples, adapter: str
) -> None:
    check_curves(lambda: base(adapter=adapter).language_model, make_examples(lengths(7)))


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_has_the_curve_of_the_plain_step(
    base: Callable[..., Model], make_examples: MakeExamples, architecture: str, bits: int | None
) -> None:
    check_curves(lambda: base(architecture, bits=bits).language_model, make_examples(lengths(7)))


def test_weights_that_stay_packed_in_a_compiled_step_have_the_curve_of_the_plain_step(
    base: Callable[..., Model], make_examples: MakeExamples
) -> None:
    start_runtimes(load())
    models = [base("llama", bits=4).language_model for _ in range(2)]
    packed = [m for _, m in models[0].named_modules() if isinstance(m, QuantizedLinear) and m.stays_packed]
    assert packed or device.lent("packed_product") is None
    check_curves(iter(models).__next__, make_examples(lengths(7)))


@pytest.mark.parametrize(
    "values",
    [
        {"grad_clip": 0.05},
        {"grad_clip": 1e9},
        {"grad_accumulation": 2},
        {"grad_accumulation": 3, "batch_size": 1, "grad_clip": 0.05},
        {"optimizer": "muon", "grad_clip": 0.05},
        {"optimizer": "adamw", "weight_decay": 0.3, "schedule": "cosine", "warmup": 2},
    ],
    ids=str,
)
def test_every_way_to_update_is_that_of_the_plain_step(
    stand_in: MakeModel, make_examples: MakeExamples, values: dict[str, Any]
) -> None:
    check_curves(stand_in, make_examples(lengths(7)), **values)
    clipped = sum(r.clipped for r in reports(training(stand_in(), make_examples(lengths(7)), **values)))
    assert bool(clipped) == (values.get("grad_clip", 1e9) < 1)


def dropping(stand_in: MakeModel) -> Any:
    model = stand_in()
    model.layers[0].wq = nn.Sequential(nn.Dropout(0.3), model.layers[0].wq)
    return model


def test_dropout_draws_the_same_where_the_shapes_are_the_same(
    stand_in: MakeModel, make_examples: MakeExamples, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A padded batch draws other numbers, and so do the parts that a CPU computes side by side."""
    monkeypatch.setenv("MLXLORA_THREADS", "1")
    check_curves(lambda: dropping(stand_in), make_examples([9] * 6))
    losses = [r.loss for r in reports(training(dropping(stand_in), make_examples([9] * 3), compile="on"))]
    assert len(set(losses)) == 6
    again = [r.loss for r in reports(training(dropping(stand_in), make_examples([9] * 3), compile="on"))]
    assert again == losses


# --- how often it is compiled -------------------------------------------------


@pytest.mark.parametrize("values", [{}, {"grad_accumulation": 3, "batch_size": 2}], ids=str)
def test_it_is_compiled_a_dozen_times_at_most(
    stand_in: MakeModel, make_examples: MakeExamples, values: dict[str, Any]
) -> None:
    examples = make_examples(lengths(100, longest=200))
    work = training(stand_in(), examples, iters=90, compile="on", **values)  # each row twice or more
    assert all(math.isfinite(report.loss) for report in reports(work))
    assert 6 < work.compiles <= 12


def test_packed_rows_are_of_too_many_shapes_to_be_compiled(
    base: Callable[..., Model], make_examples: MakeExamples
) -> None:
    examples = make_examples(lengths(7))
    plain = reports(training(base().language_model, examples, packing="on"))
    work = training(base().language_model, examples, packing="on", compile="on")
    compiled = reports(work)
    assert work.compiles == 1
    assert [r.loss for r in compiled] == pytest.approx([r.loss for r in plain], rel=CLOSE)
    assert [r.padding for r in compiled] == [0.0] * 6


def test_auto_compiles_on_a_gpu_alone(
    stand_in: MakeModel, make_examples: MakeExamples, monkeypatch: pytest.MonkeyPatch
) -> None:
    examples = make_examples(lengths(7))
    assert not training(stand_in(), examples).compiled
    monkeypatch.setattr(update, "runs_ahead", lambda: True)
    assert (
        training(stand_in(), examples).compiled and not training(stand_in(), examples, compile="off").compiled
    )


# --- what is not finite -------------------------------------------------------

BAD = 49  # a token whose embedding is not finite


def spoilt(stand_in: MakeModel) -> Any:
    """A model whose loss is not finite where a row has the token ``BAD``."""
    model = stand_in()
    model.freeze()
    for block in model.layers:
        block.wq.unfreeze()
        block.wv.unfreeze()
    model.embedding.weight[BAD] = math.nan
    return model


def with_bad(examples: tuple[Example, ...], *rows: int) -> tuple[Example, ...]:
    found = []
    for row, example in enumerate(examples):
        tokens = np.where(example.tokens == BAD, 3, example.tokens).astype(np.uint32)
        if row in rows:
            tokens[0] = BAD
        found.append(Example(tokens, example.mask))
    return tuple(found)


WAYS = {
    "plain": ("off", False),
    "compiled": ("on", False),
    "late": ("off", True),
    "compiled and late": ("on", True),
}


@pytest.mark.parametrize("way", WAYS)
def test_steps_that_are_not_finite_change_nothing(
    stand_in: MakeModel, make_examples: MakeExamples, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    compile, late = WAYS[way]
    monkeypatch.setattr(loop, "runs_ahead", lambda: late)
    good = make_examples([9] * 5)
    whole, spoiled = spoilt(stand_in), spoilt(stand_in)
    settings = {"batch_size": 1, "compile": compile, "on_nonfinite": "skip", "steps_per_report": 10}
    work = training(spoiled, with_bad(good, 2), iters=10, **settings)
    (report,) = reports(work)
    assert (report.skipped, work.progress.skipped, int(work.optimizer_tensors()["step"])) == (2, 2, 8)
    assert math.isfinite(report.loss)

    class WithoutBad:
        """The rows of :func:`steps_from` without those of the bad one."""

        def __call__(self, *arguments: Any) -> Any:
            return (rows for rows in steps_from(*arguments) if rows != [2])

    steps_from = loop.steps_from
    monkeypatch.setattr(loop, "steps_from", WithoutBad())
    other = training(whole, with_bad(good), iters=8, **settings)
    reports(other)
    one, two = held(work, spoiled), held(other, whole)
    assert one.keys() == two.keys() and same(one, two)


@pytest.mark.parametrize("way", WAYS)
def test_a_step_that_is_not_finite_stops_where_it_was(
    stand_in: MakeModel, make_examples: MakeExamples, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    compile, late = WAYS[way]
    monkeypatch.setattr(loop, "runs_ahead", lambda: late)
    good, bad = make_examples([9] * 5), 3  # steps come before it and after it
    (row,) = list(islice(loop.steps_from(good, 1, 0), bad))[-1]
    examples = with_bad(good, row)
    whole, spoiled = spoilt(stand_in), spoilt(stand_in)
    settings = {"batch_size": 1, "compile": compile, "steps_per_report": 100}
    work = training(spoiled, examples, iters=10, **settings)
    with pytest.raises(
        DivergedError, match=rf"loss of step {bad} is not finite \(rows {row}; last finite loss \d"
    ):
        reports(work)
    other = training(whole, examples, iters=bad - 1, **settings)
    reports(other)
    assert work.step == work.progress.step == bad - 1
    assert same(held(work, spoiled), held(other, whole))


# --- reading late -------------------------------------------------------------


@pytest.mark.parametrize("compile", ["off", "on"])
@pytest.mark.parametrize(
    "values",
    [
        {"steps_per_report": 4},
        {"grad_accumulation": 2, "steps_per_report": 3},
        {"steps_per_report": 5, "steps_per_eval": 3, "patience": 2, "learning_rate": 1.0},
    ],
    ids=str,
)
def test_reading_late_is_the_same_to_the_bit(
    stand_in: MakeModel,
    make_examples: MakeExamples,
    monkeypatch: pytest.MonkeyPatch,
    compile: str,
    values: dict[str, Any],
) -> None:
    examples, valid, found = make_examples(lengths(7)), make_examples(lengths(3), seed=1), []
    for late in (False, True):
        monkeypatch.setattr(loop, "runs_ahead", lambda late=late: late)
        model = dropping(stand_in)
        work = training(model, examples, valid, iters=14, compile=compile, **values)
        found.append((list(map(told, reports(work))), work.progress, held(work, model)))
        assert work.finished
    (events, progress, tensors), (other_events, other_progress, other_tensors) = found
    assert events == other_events and same(tensors, other_tensors)
    assert told(progress.window) == told(other_progress.window)
    assert {name: value for name, value in vars(progress).items() if name != "window"} == {
        name: value for name, value in vars(other_progress).items() if name != "window"
    }


def test_a_step_is_read_after_the_next_is_made_ready(
    stand_in: MakeModel, make_examples: MakeExamples, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "runs_ahead", lambda: True)
    work = training(stand_in(), make_examples(lengths(7)), steps_per_report=3, compile="off")
    order: list[tuple[str, int]] = []
    make, settle = work._updates.make_update, work.settle
    work._updates.make_update = lambda *a: order.append(("made", work.step + 1)) or make(*a)
    work.settle = lambda: (work._pending and order.append(("read", work.step))) or settle()
    steps = [(work.step, [report.step for report in given]) for given in work]
    assert steps == [(1, []), (2, []), (3, [3]), (4, []), (5, []), (6, [6])]
    assert order[:4] == [("made", 1), ("made", 2), ("read", 1), ("made", 3)]
    assert order[4:6] == [("read", 2), ("read", 3)]  # a report is due


@pytest.mark.parametrize("late", [False, True])
def test_a_spike_is_told_once_and_before_what_comes_after_it(
    stand_in: MakeModel, make_examples: MakeExamples, monkeypatch: pytest.MonkeyPatch, late: bool
) -> None:
    monkeypatch.setattr(loop, "runs_ahead", lambda: late)
    monkeypatch.setattr(loop, "SPIKE_FACTOR", 1.0)
    work = training(stand_in(), make_examples(lengths(9)), iters=40, steps_per_report=7, learning_rate=1e-9)
    found, asked = [], []
    for given in work:
        found += given
        if work.step % 5 == 0:
            asked.append(work.progress.step)  # waits, and must not lose what it finds
    spikes = [report.step for report in found if isinstance(report, SpikeReport)]
    assert len(spikes) > 5 and spikes == sorted(set(spikes))
    assert [report.step for report in found] == sorted(report.step for report in found)
    assert asked == list(range(5, 41, 5))


@pytest.mark.parametrize("way", WAYS)
def test_it_goes_on_to_the_bit_from_any_step(
    stand_in: MakeModel, make_examples: MakeExamples, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    compile, late = WAYS[way]
    monkeypatch.setattr(loop, "runs_ahead", lambda: late)
    examples, valid = make_examples(lengths(8)), make_examples(lengths(3), seed=1)
    settings = {"iters": 9, "compile": compile, "steps_per_report": 4, "steps_per_eval": 5, "grad_clip": 0.5}
    model = dropping(stand_in)
    work = training(model, examples, valid, **settings)
    events, states = [], {}
    for given in work:
        events += [told(report) for report in given]
        states[work.progress.step] = (
            work.progress,
            {name: mx.array(tensor) for name, tensor in work.optimizer_tensors().items()},
            {name: mx.array(tensor) for name, tensor in tree_flatten(model.trainable_parameters())},
            len(events),
        )
    for step, (progress, optimizer, trained, seen) in states.items():
        other = dropping(stand_in)
        other.load_weights(list(trained.items()), strict=False)
        again = training(other, examples, valid, **settings)
        again.restore(progress, optimizer)
        if step:
            assert list(map(told, reports(again))) == events[seen:]
            assert same(held(again, other), held(work, model)), step
    assert list(states) == list(range(10))
    kinds = {name for name, _ in events}
    assert kinds == {TrainReport.__name__, ValidReport.__name__}


def test_the_model_holds_numbers_after_it_was_compiled(
    base: Callable[..., Model], make_examples: MakeExamples
) -> None:
    model = base(adapter="dora")
    reports(training(model.language_model, make_examples(lengths(7)), compile="on"))
    assert all(np.isfinite(np.array(tensor)).all() for tensor in parameters(model.module).values())
