"""One assembly of a training: with and without files, with rows from a file and from memory."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mlxlora_core.errors import DataError, MlxloraError, ModelError, SafetyError, UsageError
from mlxlora_core.machine import device
from mlxlora_core.machine.processors import THREADS
from mlxlora_core.machine.signals import Interrupted
from mlxlora_core.model import adapters, loading
from mlxlora_core.model.adapters import AdapterFile
from mlxlora_core.plugins import Registry
from mlxlora_core.plugins.sections import configure
from mlxlora_core.training import evaluation, gradient, loss
from mlxlora_core.training.checkpoints import Start
from mlxlora_core.training.events import (
    Advanced,
    CheckpointSaved,
    Note,
    TrainingStarted,
    TrainReport,
    TrainResult,
    ValidReport,
)
from mlxlora_core.training.outputs import Outputs
from mlxlora_core.training.session import NewAdapter, TrainingSession, open_training
from mlxlora_core.training.settings import SaveConfig, TrainConfig
from mlxlora_core.training.sources import read_data

TEXTS = ["A layer scales the weights.", "The adapter keeps its inputs.", "This module reads a mask."]
ROWS = {"train": [{"text": text} for text in TEXTS * 2], "valid": [{"text": TEXTS[0]}]}
BASIC = {"iters": 6, "batch_size": 2, "learning_rate": 0.02, "steps_per_report": 2, "steps_per_eval": 3}

Open = Callable[..., TrainingSession]


@pytest.fixture(autouse=True)
def one_core(monkeypatch: pytest.MonkeyPatch) -> None:
    """The numbers of a step depend on the parts that its batch is computed in."""
    monkeypatch.setenv(THREADS, "1")


@pytest.fixture
def session(model_folder: Callable[..., Path], registry: Registry) -> Open:
    """A function that opens a small training."""

    def make(
        rows: Any = ROWS, outputs: Outputs | None = None, adapter: AdapterFile | None = None, **settings: Any
    ) -> TrainingSession:
        lora = registry.find("adapter", "lora")
        new = NewAdapter(*configure(lora, {"rank": 2, "layers": 1}))
        model = loading.load(model_folder(), registry)
        config = TrainConfig(**BASIC | settings)
        read = read_data(rows, ("train",), ("valid",))
        return open_training(model, adapter or new, read, config, registry, outputs=outputs)

    return make


def adapter_of(session: TrainingSession) -> dict[str, mx.array]:
    return adapters.trainable(session.model.module)


def same(one: dict[str, mx.array], other: dict[str, mx.array]) -> bool:
    return one.keys() == other.keys() and all(mx.array_equal(one[name], other[name]) for name in one)


def write(folder: Path) -> Path:
    """The rows as files."""
    folder.mkdir()
    for split, rows in ROWS.items():
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_rows_in_memory_and_rows_in_files_train_the_same(session: Open, tmp_path: Path) -> None:
    from_memory, from_files = session(), session(write(tmp_path / "data"))
    events = list(from_memory.start())
    list(from_files.start())
    assert same(adapter_of(from_memory), adapter_of(from_files))
    kinds = [type(event) for event in events]
    assert kinds[:3] == [Note, Note, TrainingStarted] and kinds[-1] is TrainResult
    assert kinds.count(TrainReport) == 3 and kinds.count(ValidReport) == 3 and CheckpointSaved not in kinds


def test_what_is_written_changes_nothing(session: Open, tmp_path: Path) -> None:
    bare = session()
    list(bare.start())
    outputs = Outputs(
        adapter_file=tmp_path / "out" / "a.safetensors",
        checkpoints=tmp_path / "c",
        metrics=tmp_path / "m.jsonl",
        saving=SaveConfig(save_every=2),
    )
    saved = session(outputs=outputs)
    events = list(saved.start())
    assert same(adapter_of(bare), adapter_of(saved))
    assert [e.step for e in events if isinstance(e, CheckpointSaved)] == [2, 3, 4, 6]
    assert same(dict(mx.load(str(outputs.adapter_file))), adapter_of(saved))
    lines = [json.loads(line) for line in (tmp_path / "m.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["kind"] == "train"] == [2, 4, 6]


def test_a_validation_that_ends_worse_than_it_began_is_told(session: Open, tmp_path: Path) -> None:
    good = [event.text for event in session().start() if isinstance(event, Note)]
    assert not any("validation" in text for text in good)
    tuned = tmp_path / "tuned.safetensors"
    list(session(iters=40, outputs=Outputs(adapter_file=tuned)).start())
    unlike = {**ROWS, "train": [{"text": "0123456789 QWXZ #@!"}] * 4}

    def forget(steps: int) -> TrainingSession:
        outputs = Outputs(checkpoints=tmp_path / "c")
        return session(unlike, outputs, AdapterFile(tuned), iters=steps, learning_rate=0.1)

    broken = forget(20)
    events = list(broken.start())
    losses = [event.loss for event in events if isinstance(event, ValidReport)]
    told = [event.text for event in events if isinstance(event, Note) and "validation" in event.text]
    assert len(told) == 1 and f"({losses[0]:.4f} -> {losses[-1]:.4f})" in told[0] and "--patience" in told[0]
    again = forget(21)
    list(again.start(Start.RESUME))
    assert again.training.progress.first_loss == losses[0], "a training that was resumed knows it too"


def test_the_result_says_what_was_done(session: Open) -> None:
    rows = {**ROWS, "train": [*ROWS["train"], {"text": ""}, {"text": TEXTS[0] * 40}]}
    work = session(rows, max_seq_length=40)
    *events, result = work.start()
    assert isinstance(result, TrainResult)
    assert (result.rows, result.rows_cut, result.rows_empty) == (7, 1, 1)
    assert result.tokens_cut > 100 and result.max_seq_length == 40
    assert (result.steps, result.adapter_step, result.steps_skipped) == (6, 6, 0)
    assert result.trainable_parameters == sum(tensor.size for tensor in adapter_of(work).values())
    assert result.train_loss == [e.loss for e in events if isinstance(e, TrainReport)][-1]
    assert result.valid_loss == [e.loss for e in events if isinstance(e, ValidReport)][-1]
    assert json.dumps(asdict(result))
    texts = [event.text for event in events if isinstance(event, Note)]
    assert texts[0].startswith("warning: 1 train rows were cut at 40 tokens (max_seq_length), ")
    assert texts[1] == "warning: 1 train rows have no token that counts and were left out"
    assert "trainable" in texts[2] and texts[3].startswith("training needs about ")


def test_patience_keeps_the_best_without_a_folder_too(session: Open, tmp_path: Path) -> None:
    settings = {"iters": 500, "patience": 2, "steps_per_eval": 1, "learning_rate": 0.5}
    bare, saved = session(**settings), session(outputs=Outputs(checkpoints=tmp_path / "c"), **settings)
    *_, result = bare.start()
    assert isinstance(result, TrainResult) and result.adapter_step == result.steps - 2 > 0
    *_, with_folder = saved.start()
    assert with_folder == result and same(adapter_of(bare), adapter_of(saved))
    short = session(**{**settings, "iters": result.adapter_step, "patience": None})
    list(short.start())
    assert same(adapter_of(bare), adapter_of(short)), "the adapter is that of the best step"


def test_an_adapter_file_is_trained_on(session: Open, tmp_path: Path) -> None:
    first = session(outputs=Outputs(adapter_file=tmp_path / "a.safetensors"))
    *_, result = first.start()
    second = session(adapter=AdapterFile(tmp_path / "a.safetensors"))
    assert same(adapter_of(first), adapter_of(second))
    valid = next(event for event in second.start() if isinstance(event, ValidReport))
    assert isinstance(result, TrainResult) and valid.loss == pytest.approx(result.valid_loss, abs=1e-6)


@pytest.mark.parametrize(
    ("rows", "error", "words"),
    [
        ([{"text": "A layer."}, {"txet": "x"}, 7], DataError, "2 bad lines: train row 2: needs text"),
        ([{"text": ""}], DataError, "train rows: none of 1 rows has a token"),
        ([], DataError, "train rows: there is no row"),
        (Path("nowhere"), DataError, "nowhere: there is no such file or folder"),
    ],
)
def test_rows_that_are_none_are_refused(
    session: Open, rows: Any, error: type[MlxloraError], words: str
) -> None:
    with pytest.raises(error) as caught:
        session(rows)
    assert words in str(caught.value)


def test_an_adapter_file_that_cannot_be_written_is_refused_at_once(session: Open, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"wanted \.safetensors or \.npz"):
        session(outputs=Outputs(adapter_file=tmp_path / "a.bin"))
    (tmp_path / "a.npz").mkdir()
    with pytest.raises(SafetyError, match="no regular file"):
        session(outputs=Outputs(adapter_file=tmp_path / "a.npz"))


def test_there_is_nothing_to_resume_without_a_folder(session: Open) -> None:
    with pytest.raises(UsageError, match="no folder of checkpoints"):
        list(session().start(Start.RESUME))


def test_a_signal_without_a_folder_says_that_nothing_is_saved(session: Open) -> None:
    def interrupted() -> Iterator[object]:
        for event in session().start():
            yield event
            if isinstance(event, TrainReport):
                os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted, match="interrupted at step 2; nothing was saved"):
        list(interrupted())


def test_steps_and_validations_are_computed_as_asked_and_nothing_else(
    session: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    told, computed = ["float32"], []
    nats = loss.nats

    def note(*arguments: Any) -> Any:
        computed.append(told[-1])
        return nats(*arguments)

    monkeypatch.setattr(gradient, "nats", note)
    monkeypatch.setattr(evaluation, "nats", note)
    monkeypatch.setattr(device, "_precisions", [told.append])
    for event in session(compute="bfloat16x3").start():
        assert told[-1] == "float32" or isinstance(event, Advanced), event
    assert computed and set(computed) == {"bfloat16x3"}
    assert told[-1] == "float32"


def test_a_compute_that_the_machine_has_not_is_refused_before_any_work(
    session: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device, "_precisions", [])
    with pytest.raises(UsageError, match="compute is bfloat16"):
        session(outputs=Outputs(checkpoints=tmp_path / "c"), compute="bfloat16")
    assert not (tmp_path / "c").exists()
