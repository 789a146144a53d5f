"""A batch whose rows stand one after the other: the loss and the gradient of those rows, without padding."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import small_models
from mlx.utils import tree_flatten

from mlxlora_core.errors import UsageError
from mlxlora_core.machine.processors import THREADS
from mlxlora_core.model import adapters, loading
from mlxlora_core.model.loading import Model
from mlxlora_core.model.ops import LARGE
from mlxlora_core.plugins import Choice, Registry
from mlxlora_core.plugins.sections import Quantization, QuantizeConfig, configure
from mlxlora_core.training.batches import Collator, make_batch, steps_from
from mlxlora_core.training.events import TrainReport, ValidReport
from mlxlora_core.training.examples import Example, Examples
from mlxlora_core.training.gradient import mean_gradient
from mlxlora_core.training.loop import Training
from mlxlora_core.training.loss import hidden_states, nats
from mlxlora_core.training.parallel import split_rows
from mlxlora_core.training.prefix import Prefix
from mlxlora_core.training.reuse import decide
from mlxlora_core.training.session import NewAdapter, open_training
from mlxlora_core.training.settings import TrainConfig

MakeExamples = Callable[..., tuple[Example, ...]]
#: rows of two and three tokens, some shorter and some longer than windows and than tiles of attention
LENGTHS = (40, 2, 3, 130, 25, 2, 90, 9)
#: adapter -> options with which it goes on something, the head and the embedding among it
KINDS: dict[str, dict[str, Any]] = {
    "lora": {"targets": ("wq", "w2", "tok_embeddings", "lm_head"), "rank": 4},
    "rslora": {"overrides": "wq: rank=3, wv: alpha=2"},
    "lora-plus": {"targets": ("embed_tokens", "q_proj")},
    "dora": {"targets": ("all-linear",), "rank": 4},
    "pissa": {"targets": ("q_proj", "lm_head"), "rank": 4},
    "ia3": {},
    "vera": {"targets": ("all-linear",), "rank": 12},
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A function that gives the folder of a small model of a family; read it, never write to it."""
    folder = tmp_path_factory.mktemp("bases")

    def make(family: str) -> Path:
        return folder / family if (folder / family).exists() else small_models.write(folder / family, family)

    return make


def opened(path: Path, registry: Registry, bits: int | None) -> Model:
    quantization = None
    if bits is not None:
        affine = registry.find("quantizer", "affine")
        choice = Choice(affine, affine.spec.options(bits=bits, group_size=32))
        quantization = Quantization(choice, QuantizeConfig(head=True))
    return loading.load(path, registry, quantization)


def with_adapter(model: Model, registry: Registry, name: str = "lora") -> Model:
    options = dict(KINDS[name])
    if not model.language_model.head_path and "targets" in options:  # the embedding stands for both
        options["targets"] = tuple(target for target in options["targets"] if target != "lm_head")
    adapters.attach(model, *configure(registry.find("adapter", name), options), 0)
    model.module.train()
    moved = [
        (key, tensor + 0.05 * mx.random.normal(tensor.shape, key=mx.random.key(number)))
        for number, (key, tensor) in enumerate(adapters.trainable(model.module).items())
    ]
    model.module.load_weights(moved, strict=False)
    return model


def settings(**values: Any) -> TrainConfig:
    return TrainConfig(
        **{"iters": 6, "batch_size": 4, "learning_rate": 0.01, "steps_per_report": 1, "grad_clip": 1.0}
        | values
    )


def curve(model: Model, train: Any, valid: Any, **values: Any) -> list[Any]:
    """What training says of each step and of each validation."""
    training = Training(model.language_model, train, valid, settings(**values), 3)
    return [report for reports in training for report in reports]


# --- the layout -----------------------------------------------------------------


def test_a_packed_batch_asks_for_the_same_tokens_as_a_padded_one(make_examples: MakeExamples) -> None:
    examples = make_examples([5, 9, 2, 7])
    rows = (3, 1, 2)
    packed, padded = (make_batch(examples, rows, packing) for packing in (True, False))
    assert packed.lengths == (6, 8, 1) and padded.lengths is None
    assert (packed.padding, padded.padding) == (0, 3 * 8 - 15)
    assert packed.inputs.shape == (1, 15) and padded.inputs.shape == (3, 8)
    assert packed.starts == [0, 6, 14] and list(padded.starts) == [0, 8, 16]
    assert mx.array_equal(packed.targets, padded.targets)
    before = [batch.inputs.reshape(-1)[batch.positions] for batch in (packed, padded)]
    assert mx.array_equal(*before)
    for start, row in zip(packed.starts, rows, strict=True):
        tokens = examples[row].tokens
        assert packed.inputs[0, start : start + len(tokens) - 1].tolist() == tokens[:-1].tolist()


def test_layers_begin_where_their_input_is_known_whatever_the_layout(
    bases: Callable[[str], Path], registry: Registry, make_examples: MakeExamples
) -> None:
    model = opened(bases("mistral"), registry, None).language_model
    for packing in (False, True):
        batch = make_batch(make_examples(LENGTHS), range(8), packing)
        low = model.run(model.embed(batch.inputs), last=1, lengths=batch.lengths)
        known = replace(batch, hidden=low, first=1)
        np.testing.assert_allclose(hidden_states(model, known), hidden_states(model, batch), atol=1e-6)
        assert nats(model, known).item() == pytest.approx(nats(model, batch).item(), rel=1e-6)


# --- the same numbers -----------------------------------------------------------


@pytest.mark.parametrize("bits", [None, 4], ids=["dense", "4 bits"])
@pytest.mark.parametrize("family", [*small_models.FAMILIES])
def test_packed_rows_have_the_loss_and_the_gradient_that_they_have_alone(
    bases: Callable[[str], Path],
    registry: Registry,
    make_examples: MakeExamples,
    family: str,
    bits: int | None,
) -> None:
    model = with_adapter(opened(bases(family), registry, bits), registry)
    language_model = model.language_model
    examples, rows = make_examples(LENGTHS), range(len(LENGTHS))
    batch = make_batch(examples, rows, packing=True)
    assert batch.inputs.size * 64 >= LARGE
    logits = language_model.head(hidden_states(language_model, batch))[0]
    for start, example in zip(batch.starts, examples, strict=True):
        alone = language_model(mx.array(example.tokens[None, :-1]))[0]
        far = mx.abs(logits[start : start + len(alone)] - alone).max()
        assert far <= 1e-5 * mx.maximum(1.0, mx.abs(alone).max())
    loss, _, gradient = mean_gradient(language_model, Collator(examples, packing=True), rows, len(rows))
    want, _, each = mean_gradient(language_model, Collator(examples), rows, 1)
    assert loss.mean == pytest.approx(want.mean, rel=1e-6)
    assert (loss.tokens, loss.padding, want.padding) == (want.tokens, 0, 0)
    got = dict(tree_flatten(gradient))
    for name, whole in tree_flatten(each):
        assert mx.abs(got[name] - whole).max() <= 1e-5 * mx.abs(whole).max(), name


@pytest.mark.parametrize("bits", [None, 4], ids=["dense", "4 bits"])
@pytest.mark.parametrize("name", KINDS)
def test_every_adapter_trains_along_the_same_curve(
    bases: Callable[[str], Path],
    registry: Registry,
    make_examples: MakeExamples,
    name: str,
    bits: int | None,
) -> None:
    train, valid = make_examples([*LENGTHS, 17, 33]), make_examples([30, 5, 2, 60, 8], seed=1)
    one, other = (with_adapter(opened(bases("qwen3"), registry, bits), registry, name) for _ in range(2))
    padded = curve(one, train, valid, steps_per_eval=3, packing="off")
    packed = curve(other, train, valid, steps_per_eval=3, packing="on")
    assert [type(report) for report in padded] == [type(report) for report in packed]
    for before, after in zip(padded, packed, strict=True):
        assert after.loss == pytest.approx(before.loss, rel=1e-5)
        assert (before.step, after.padding) == (after.step, 0)
        if isinstance(before, TrainReport) and isinstance(after, TrainReport):
            assert after.trained_tokens == before.trained_tokens
            assert after.grad_norm == pytest.approx(before.grad_norm, rel=1e-3)
    losses = [report.loss for report in packed if isinstance(report, ValidReport)]
    assert len(losses) == 3 and min(abs(one - other) for one, other in pairwise(losses)) > 1e-4


def test_what_is_kept_of_rows_is_filled_without_padding(
    bases: Callable[[str], Path],
    registry: Registry,
    make_examples: MakeExamples,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(THREADS, "1")
    model: Any = opened(bases("llama"), registry, None).language_model
    model.freeze()
    model.layers[-1].unfreeze()
    first, examples = len(model.layers) - 1, make_examples(LENGTHS)
    reuse = decide(model, TrainConfig(iters=20, batch_size=2), {"train": examples})
    kept = Prefix(model, {"train": examples}, reuse)
    embed, shapes = model.embed, []
    monkeypatch.setattr(model, "embed", lambda inputs: shapes.append(inputs.shape) or embed(inputs))
    list(kept.fill())
    assert sum(map(math.prod, shapes)) == sum(LENGTHS) - len(LENGTHS)
    collate, longest_first = (
        replace(kept.collator("train"), packing=True),
        sorted(range(8), key=lambda row: LENGTHS[row], reverse=True),
    )
    for row, example in enumerate(examples):
        alone = model.run(embed(mx.array(example.tokens[None, :-1])), last=first)
        assert mx.allclose(collate([row]).hidden, alone, rtol=1e-5, atol=1e-5)
    batch = collate(longest_first)  # in which it was filled
    again = model.run(embed(batch.inputs), last=first, lengths=batch.lengths)
    assert mx.array_equal(batch.hidden, again)


@pytest.mark.parametrize("family", ["mistral", "gemma2", "phi3", "olmo2"])
def test_it_goes_together_with_all_else_that_saves_work(
    bases: Callable[[str], Path], registry: Registry, make_examples: MakeExamples, family: str
) -> None:
    """Packed over kept states of the frozen layer, layers computed again, the update compiled."""
    train, valid = make_examples([*LENGTHS, 17, 33]), make_examples([30, 5, 2, 60, 8], seed=1)
    saving = {"packing": "on", "reuse_prefix": "on", "grad_checkpoint": "on", "compile": "on"}
    curves = []
    for values in ({"packing": "off", "reuse_prefix": "off"}, saving):
        model = opened(bases(family), registry, None)
        lora = registry.find("adapter", "lora")
        new = NewAdapter(*configure(lora, {"targets": ("wq", "w2"), "layers": 1, "rank": 4}))
        splits = {"train": Examples(train), "valid": Examples(valid)}
        session = open_training(model, new, splits, settings(steps_per_eval=3, **values), registry, seed=3)
        events = list(session.start())
        curves.append([event for event in events if isinstance(event, TrainReport | ValidReport)])
        assert any("are computed once" in str(event) for event in events) is (values is saving), events
    for before, after in zip(*curves, strict=True):
        assert after.loss == pytest.approx(before.loss, rel=1e-5)
        assert after.padding == 0


@pytest.mark.parametrize("accumulated", [1, 2])
def test_a_model_without_lengths_is_refused_and_trains_padded(
    stand_in: Callable[..., Any], make_examples: MakeExamples, accumulated: int
) -> None:
    examples = make_examples(LENGTHS)
    with pytest.raises(UsageError, match="packing needs an architecture") as fault:
        Training(stand_in(), examples, (), settings(packing="on"), 0)
    assert "--packing" in str(fault.value.fix) and "\n" not in str(fault.value)
    config = settings(grad_accumulation=accumulated)
    for reports in Training(stand_in(), examples, (), config, 0):
        (report,) = reports
        assert isinstance(report, TrainReport) and 0 < report.padding < 0.8


# --- padding is told ------------------------------------------------------------


def test_the_share_of_padding_is_that_of_what_was_computed(
    stand_in: Callable[..., Any], make_examples: MakeExamples
) -> None:
    examples = make_examples(LENGTHS)
    config = settings(iters=4, batch_size=3, steps_per_report=2)
    reports = [r for some in Training(stand_in(), examples, examples, config, 0) for r in some]
    told = [report.padding for report in reports if isinstance(report, TrainReport)]
    rows = list(islice(steps_from(examples, 3, 0), 4))
    for share, steps in zip(told, (rows[:2], rows[2:]), strict=True):
        parts = [part for step in steps for part in split_rows(step, [LENGTHS[row] for row in step])]
        wide = [len(part) * (max(len(examples[row].tokens) for row in part) - 1) for part in parts]
        inputs = sum(len(examples[row].tokens) - 1 for step in steps for row in step)
        assert share == pytest.approx(1 - inputs / sum(wide))
        assert f"padding {100 * share:.1f} %" in str(next(r for r in reports if r.padding == share))
    first = next(report for report in reports if isinstance(report, ValidReport))
    assert 0 < first.padding < 1
