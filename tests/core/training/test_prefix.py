"""What enters the lowest adapted layer is kept: the same numbers, wherever they stand."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlxlora_core.errors import UsageError
from mlxlora_core.files.leftovers import temporary_name
from mlxlora_core.machine.processors import THREADS
from mlxlora_core.model.language_model import LanguageModel
from mlxlora_core.training import prefix, row_store
from mlxlora_core.training.batches import Collator
from mlxlora_core.training.evaluation import evaluate
from mlxlora_core.training.events import TrainReport, ValidReport
from mlxlora_core.training.examples import Example
from mlxlora_core.training.gradient import mean_gradient
from mlxlora_core.training.loop import Training
from mlxlora_core.training.prefix import Prefix
from mlxlora_core.training.reuse import Reuse, decide, lowest_layer
from mlxlora_core.training.row_store import RowStore
from mlxlora_core.training.settings import TrainConfig

MakeExamples = Callable[..., tuple[Example, ...]]
MakeModel = Callable[..., Any]
LENGTHS = [17, 4, 2, 30, 9, 9, 21, 5, 33, 12, 12, 28]
DEAD = 2**22 + 7  # more than a process number can be


def top(model: Any, *more: nn.Module) -> Any:
    """Only the top layer trains, and what else is named."""
    model.freeze()
    for module in (model.layers[-1], *more):
        module.unfreeze()
    return model


def settings(**values: Any) -> TrainConfig:
    return TrainConfig(
        **{"iters": 24, "batch_size": 2, "learning_rate": 0.01, "steps_per_report": 1} | values
    )


def open_prefix(
    model: LanguageModel,
    splits: dict[str, Sequence[Example]],
    folder: Path | None = None,
    memory_mb: int | None = None,
    **values: Any,
) -> Prefix:
    reuse = decide(model, settings(**values), splits)
    assert reuse.on, reuse.why_not
    return Prefix(model, splits, reuse, ["base"], folder, memory_mb)


def filled(*arguments: Any, **values: Any) -> Prefix:
    made = open_prefix(*arguments, **values)
    list(made.fill())
    return made


def bits(array: mx.array | None) -> bytes:
    assert array is not None
    return bytes(np.array(array).tobytes())


def states(made: Prefix, split: str = "train", rows: Sequence[int] = range(len(LENGTHS))) -> list[bytes]:
    """What is kept of rows, one by one."""
    collate = made.collator(split)
    return [bits(collate([row]).hidden) for row in rows]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch, stand_in: MakeModel) -> dict[int, int]:
    """Layer -> how many tokens have gone through it, counted from now on, padding among them."""
    counted = {0: 0, 1: 0}
    block = type(stand_in().layers[0])
    run = block.__call__

    def count(self: Any, x: mx.array, cache: Any) -> mx.array:
        counted[self.number] += x.shape[0] * x.shape[1]
        return run(self, x, cache)  # type: ignore[no-any-return]  # a stand-in's

    monkeypatch.setattr(block, "__call__", count)
    return counted


@pytest.fixture
def model(stand_in: MakeModel) -> Any:
    made = top(stand_in())
    for number, layer in enumerate(made.layers):
        layer.number = number
    return made


@pytest.fixture
def small_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefix, "TOKENS", 60)


# --- the numbers --------------------------------------------------------------


@pytest.mark.parametrize("cores", ["1", "2"])
def test_a_step_over_what_was_filled_in_the_same_batches_is_the_same_to_the_bit(
    model: Any, make_examples: MakeExamples, monkeypatch: pytest.MonkeyPatch, cores: str
) -> None:
    monkeypatch.setenv(THREADS, cores)
    examples = make_examples(sorted(LENGTHS)[:8])
    made = filled(model, {"train": examples}, batch_size=8)
    assert len({id(group) for group, _ in made._where.values()}) == 1, "all rows in one batch, as below"
    plain, reused = Collator(examples), made.collator("train")
    rows = sorted(range(8), key=lambda row: len(examples[row].tokens), reverse=True)  # as they were read
    want, got = (mean_gradient(model, collate, rows, 8) for collate in (plain, reused))
    assert reused(rows).first == 1 and plain(rows).first == 0
    assert want[:2] == got[:2]
    for (_, one), (_, other) in zip(tree_flatten(want[2]), tree_flatten(got[2]), strict=True):
        assert mx.array_equal(one, other)


def test_a_row_is_what_it_is_alone_and_padding_is_nothing(model: Any, make_examples: MakeExamples) -> None:
    examples = make_examples(LENGTHS)
    collate = filled(model, {"train": examples}).collator("train")
    for row, example in enumerate(examples):
        want = model.run(model.embed(mx.array(example.tokens[None, :-1])), last=1)
        assert mx.allclose(collate([row]).hidden, want, rtol=1e-5, atol=1e-6)
    both = collate([3, 2]).hidden
    assert both.shape == (2, 29, 8) and mx.all(both[1, 1:] == 0) and mx.any(both[1, 0] != 0)


def test_many_rows_are_read_in_batches_of_bounded_size(
    model: Any, make_examples: MakeExamples, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prefix, "TOKENS", 60)
    examples = make_examples(LENGTHS)
    made = open_prefix(model, {"train": examples})
    events = list(made.fill())
    assert [event.count for event in events] == [12] * len(events)
    assert events[-1].done == 12 and [e.done for e in events] == sorted({e.done for e in events})
    for rows in {id(group): group.rows for group, _ in made._where.values()}.values():
        longest = max(len(examples[row].tokens) - 1 for row in rows)
        assert len(rows) == 1 or len(rows) * longest <= 60
    whole = filled(model, {"train": examples})
    for one, other in zip(states(made), states(whole), strict=True):
        np.testing.assert_allclose(
            np.frombuffer(one, np.float32), np.frombuffer(other, np.float32), atol=1e-6
        )


@pytest.mark.parametrize("half", ["float16", "bfloat16"])
def test_halves_take_half_of_the_room_and_say_what_they_change(
    model: Any, make_examples: MakeExamples, half: str
) -> None:
    splits = {"train": make_examples(LENGTHS)}
    whole, made = (filled(model, splits, prefix_type=kind) for kind in ("compute", half))
    assert made.reuse.number_bytes * 2 == whole.reuse.number_bytes
    for one, other in zip(states(made), states(whole), strict=True):
        want = mx.array(np.frombuffer(other, np.float32)).astype(getattr(mx, half)).astype(mx.float32)
        assert bits(want) == one
    made = open_prefix(model, splits, prefix_type=half)
    training = Training(model, splits["train"], (), settings(prefix_type=half), 0, prefix=made)
    said = [str(event) for event in training.prepare()][-1]
    assert said.startswith(f"{half} changes the loss of the first batch, ")
    assert 0 < abs(float(said.rpartition(" ")[2])) < 0.01


def test_what_float16_cannot_hold_is_refused(model: Any, make_examples: MakeExamples) -> None:
    model.embedding.weight = model.embedding.weight * 1e6
    made = open_prefix(model, {"train": make_examples(LENGTHS)}, prefix_type="float16")
    with pytest.raises(UsageError, match=r"prefix_type float16 cannot hold what enters layer 2 \(up to "):
        list(made.fill())


# --- training -----------------------------------------------------------------


def run(model: Any, train: Any, valid: Any, reuse: bool, **values: Any) -> list[Any]:
    splits = {"train": train, "valid": valid}
    made = open_prefix(model, splits, **values) if reuse else None
    training = Training(model, train, valid, settings(**values), 3, prefix=made)
    list(training.prepare())
    return [report for reports in training for report in reports]


@pytest.mark.usefixtures("small_groups")
def test_the_curve_is_that_without_it_and_the_layers_below_are_run_once(
    stand_in: MakeModel, make_examples: MakeExamples, calls: dict[int, int]
) -> None:
    train, valid = make_examples(LENGTHS), make_examples([7, 20, 3], seed=1)
    curves, tokens = [], []
    for reuse in (False, True):
        model = top(stand_in())
        for number, layer in enumerate(model.layers):
            layer.number = number
        calls.update({0: 0, 1: 0})
        curves.append(run(model, train, valid, reuse, steps_per_eval=4, patience=20, learning_rate=0.03))
        tokens.append(dict(calls))
    for one, other in zip(*curves, strict=True):
        assert type(one) is type(other) and one.step == other.step
        assert one.loss == pytest.approx(other.loss, rel=1e-6)
    assert {type(report) for report in curves[0]} == {TrainReport, ValidReport}
    losses = [report.loss for report in curves[0] if isinstance(report, TrainReport)]
    assert sum(losses[:6]) > sum(losses[-6:]) + 0.1, "it trains"
    once = sum(len(example.tokens) - 1 for example in (*train, *valid))
    assert tokens[0][0] == tokens[0][1] == tokens[1][1]
    # Once for all rows, with what padding their groups have, and the two rows that are looked at before.
    assert once <= tokens[1][0] < 1.5 * once + 40 < tokens[0][0] / 2


def test_an_evaluation_of_what_is_kept_is_the_same(model: Any, make_examples: MakeExamples) -> None:
    examples = make_examples(LENGTHS)
    made = filled(model, {"train": examples})
    want = evaluate(model, examples, 3)
    got = evaluate(model, examples, 3, collate=made.collator("train"))
    assert got.tokens == want.tokens and got.nats == pytest.approx(want.nats, rel=1e-6)


# --- whether ------------------------------------------------------------------


def test_it_is_kept_where_rows_are_read_more_than_once(
    stand_in: MakeModel, make_examples: MakeExamples
) -> None:
    train, valid = make_examples([5] * 10), make_examples([6] * 4, seed=1)

    def on(with_valid: bool = False, **values: Any) -> Reuse:
        splits = {"train": train, "valid": valid} if with_valid else {"train": train}
        return decide(top(stand_in()), settings(**values), splits)

    assert not on(iters=5).on and on(iters=6).on
    assert on(iters=5).why_not == "10 rows are read in all, and there are 10"
    assert not on(iters=2, grad_accumulation=2).on and not on(iters=3, grad_accumulation=2).on
    # The last step of an epoch of 10 rows in steps of 4 has two.
    assert on(iters=6, batch_size=4).times == 2.0
    # Validations: before the first step, and after steps 3 and 5, on 4 rows or the 2 of one batch.
    assert on(with_valid=True, iters=5, steps_per_eval=3).times == (10 + 3 * 4) / 14
    one = on(with_valid=True, iters=5, steps_per_eval=3, val_batches=1)
    assert one.rows["valid"] == [0, 2] and one.times == (10 + 3 * 2) / 12
    assert on(iters=1, reuse_prefix="on").on
    assert on(reuse_prefix="off").why_not == "reuse_prefix is off"


def untouched(model: Any) -> None:
    """Nothing more."""


def lower(model: Any) -> None:
    model.layers[0].wv.unfreeze()


def embedding(model: Any) -> None:
    model.embedding.unfreeze()


def head(model: Any) -> None:
    model.output.unfreeze()


def only_head(model: Any) -> None:
    model.freeze()
    model.output.unfreeze()


def dropout_below(model: Any) -> None:
    model.layers[0].wq = nn.Sequential(nn.Dropout(0.1), model.layers[0].wq)


def dropout_above(model: Any) -> None:
    model.layers[1].wq = nn.Sequential(nn.Dropout(0.1), model.layers[1].wq)


def tied_head(model: Any) -> None:
    model.head_path = ""
    model.output.unfreeze()


@pytest.mark.parametrize(
    ("change", "first", "why"),
    [
        (untouched, 1, ""),
        (head, 1, ""),
        (only_head, 2, ""),
        (dropout_above, 1, ""),
        (lower, 0, "the lowest layer trains"),
        (embedding, 0, "embedding.weight trains, which no layer has"),
        (tied_head, 0, "output.bias and 1 more trains, which no layer has"),
        (dropout_below, 0, "below layer 2 something is drawn at random"),
    ],
)
def test_nothing_that_trains_or_is_random_stands_below(
    model: Any, make_examples: MakeExamples, change: Callable[[Any], None], first: int, why: str
) -> None:
    change(model)
    assert lowest_layer(model) == (first, why)
    splits = {"train": make_examples(LENGTHS)}
    reuse = decide(model, settings(), splits)
    assert reuse.on == (not why) and reuse.why_not == why
    if why:
        assert reuse.words == f"every step computes all 2 layers: {why}"
        with pytest.raises(UsageError, match="reuse_prefix cannot be on: "):
            decide(model, settings(reuse_prefix="on"), splits)
    else:
        want = f"what enters layer {first + 1} of 2" if first < 2 else "what leaves the last of 2 layers"
        assert reuse.words == f"{want} is kept: {first} of 2 layers are computed once a row and not 4 times"


def test_an_architecture_that_runs_all_layers_or_none_trains_without(
    model: Any, make_examples: MakeExamples, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind, run_layers = type(model), type(model).run

    def run_all(self: Any, hidden: mx.array, cache: Any = None) -> mx.array:
        return run_layers(self, hidden, cache=cache)  # type: ignore[no-any-return]  # likewise

    monkeypatch.setattr(kind, "run", run_all)
    examples = make_examples(LENGTHS)
    reuse = decide(model, settings(), {"train": examples})
    assert reuse.why_not == "this architecture runs all of its layers or none"
    training = Training(model, examples, (), settings(), 0, prefix=Prefix(model, {"train": examples}, reuse))
    assert [str(event) for event in training.prepare()] == [reuse.words]
    assert len(list(training)) == 24


def test_states_that_depend_on_the_width_of_a_batch_are_not_kept(
    model: Any, make_examples: MakeExamples, monkeypatch: pytest.MonkeyPatch
) -> None:
    embed = type(model).embed
    monkeypatch.setattr(type(model), "embed", lambda self, tokens: embed(self, tokens) / tokens.shape[1])
    examples = make_examples(LENGTHS)
    made = open_prefix(model, {"train": examples})
    training = Training(model, examples, (), settings(), 0, prefix=made)
    assert [str(event) for event in training.prepare()] == [
        "every step computes all 2 layers: what a row becomes depends on the length of those beside it"
    ]
    made = open_prefix(model, {"train": examples})
    forced = Training(model, examples, (), settings(reuse_prefix="on"), 0, prefix=made)
    with pytest.raises(UsageError, match="depends on the length"):
        list(forced.prepare())


# --- where --------------------------------------------------------------------


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("half", ["compute", "bfloat16"])
@pytest.mark.usefixtures("small_groups")
def test_files_hold_the_same_bits_as_memory_and_are_gone_at_the_end(
    model: Any, make_examples: MakeExamples, tmp_path: Path, half: str
) -> None:
    splits = {"train": make_examples(LENGTHS), "valid": make_examples([7, 20], seed=1)}
    inside = filled(model, splits, None, None, prefix_type=half)
    folder = tmp_path / "checkpoints"
    outside = filled(model, splits, folder, 0, prefix_type=half)
    assert len(files(folder)) == len({id(group) for group, _ in outside._where.values()}) > 3
    assert sum(path.stat().st_size for path in files(folder)) > outside.reuse.number_bytes
    assert "MB in memory" in inside.words and "MB in files in " in outside.words
    for split, rows in (("train", range(12)), ("valid", range(2))):
        assert states(inside, split, rows) == states(outside, split, rows)
    outside.close()
    assert not folder.exists()


def test_a_budget_is_kept_to_and_what_is_left_goes_into_files(tmp_path: Path) -> None:
    rows = [np.full((10, 4), n, np.uint32) for n in range(6)]  # 160 bytes each
    store = RowStore(400, tmp_path)
    places = [store.keep(b"k" * 32, [row]) for row in rows]
    assert (store.memory_bytes, store.file_bytes) == (320, 640)
    for place, row in zip(places, rows, strict=True):
        assert place is not None
        found = store.read(place, 0)
        assert found is not None and np.array_equal(found, row)
    store.close()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("ranks", "kept"), [(1, 3), (3, 1)])
def test_ranks_of_one_machine_share_half_of_its_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ranks: int, kept: int
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=2 * 3 * 160)  # half of it takes three rows
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    store = RowStore(0, tmp_path, ranks)
    row = np.zeros((10, 4), np.uint32)
    assert [store.keep(b"k" * 32, [row]) is not None for _ in range(5)] == [True] * kept + [False] * (
        5 - kept
    )
    store.close()


def test_without_a_folder_files_stand_in_a_temporary_one_and_what_was_left_of_another_goes(
    model: Any, make_examples: MakeExamples, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    left = tmp_path / temporary_name("mlxlora-prefix", DEAD, "tmp")
    left.mkdir()
    (left / "000000").write_bytes(b"x")
    made = filled(model, {"train": make_examples(LENGTHS)}, None, 0)
    (folder,) = tmp_path.iterdir()
    assert folder != left and folder.stat().st_mode & 0o777 == 0o700 and files(folder)
    made.close()
    assert list(tmp_path.iterdir()) == []


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


def of_another(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[20] ^= 1
    path.write_bytes(content)


def a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def a_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize("damage", [cut, flip, of_another, a_folder, a_pipe, Path.unlink])
@pytest.mark.usefixtures("small_groups")
def test_a_damaged_file_is_made_again_to_the_bit(
    model: Any, make_examples: MakeExamples, tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    splits = {"train": make_examples(LENGTHS)}
    want = states(filled(model, splits))
    made = filled(model, splits, tmp_path, 0)
    assert made.notes() == []
    for path in files(tmp_path):
        damage(path)
    assert states(made) == want
    told = made.notes()
    assert len(told) == len({id(group) for group, _ in made._where.values()})
    for line in told:
        assert line.startswith("warning: a file of ") and line.endswith("; it is made again")
    assert states(made) == want and made.notes() == []


@pytest.mark.usefixtures("small_groups")
def test_what_is_damaged_again_is_computed_in_every_step(
    model: Any, make_examples: MakeExamples, tmp_path: Path
) -> None:
    made = filled(model, {"train": make_examples(LENGTHS)}, tmp_path, 0)
    for _ in range(2):
        for path in files(tmp_path):
            path.write_bytes(b"")
        states_or_none = [made.collator("train")([row]).hidden for row in range(12)]
    assert all(found is None for found in states_or_none)
    assert made.notes()[-1].endswith("; every step that reads them computes all layers")


@pytest.mark.parametrize("fault", ["no space", "half of the disk"])
@pytest.mark.usefixtures("small_groups")
def test_a_full_disk_is_a_warning_and_the_rest_is_computed(
    stand_in: MakeModel,
    make_examples: MakeExamples,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fault: str,
) -> None:
    train = make_examples(LENGTHS)
    curves = []
    for full in (False, True):
        model = top(stand_in())
        made = open_prefix(model, {"train": train}, tmp_path, 0)
        if full and fault == "no space":
            monkeypatch.setattr(row_store, "open", full_after(2), raising=False)
        elif full:
            monkeypatch.setattr(row_store, "_SHARE_OF_DISK", 0.0)
        training = Training(model, train, (), settings(), 3, prefix=made)
        told = [line for line in map(str, training.prepare()) if line.startswith("warning: ")]
        curves.append([report.loss for reports in training for report in reports])
        assert bool(told) == full
        made.close()
    reasons = {"no space": "No space left", "half of the disk": "half of the space that was free is taken"}
    assert reasons[fault] in told[0] and "rows have no room" in told[0] and len(told) == 1
    assert curves[1] == pytest.approx(curves[0], rel=1e-6)
    assert list(tmp_path.iterdir()) == []


def full_after(files: int) -> Callable[..., Any]:
    """``open`` on a disk that takes so many files: the next is written in part."""
    count = iter(range(files))

    def opened(path: Path, mode: str) -> Any:
        if next(count, None) is None:
            path.write_bytes(b"part")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return path.open(mode)

    return opened


def test_memory_that_is_left_decides_where_it_is_kept(
    model: Any, make_examples: MakeExamples, monkeypatch: pytest.MonkeyPatch
) -> None:
    splits = {"train": make_examples([2000] * 600)}

    def settled(free: int | None, need: int, memory_mb: int | None = None) -> int:
        monkeypatch.setattr(prefix, "free_memory_bytes", lambda: free)
        return open_prefix(model, splits, None, memory_mb, iters=1000).budget_memory(need)

    whole = 600 * 1999 * 8 * 4
    assert settled(None, 10**9) == settled(10**9, 10**6) == whole
    assert settled(120 * 10**6, 10**6) == 30 * 10**6  # a quarter
    assert settled(10**9, 999 * 10**6) == 0  # what training needs goes first, and what MLX may keep
    assert settled(10**9, 0, memory_mb=5) == 5 * 10**6
    assert settled(10**9, 0, memory_mb=0) == 0


def test_a_training_that_goes_on_keeps_to_what_it_began_with(model: Any, make_examples: MakeExamples) -> None:
    made = open_prefix(model, {"train": make_examples(LENGTHS)})
    made.go_on(False)
    assert not made.reuse.on and made.words.endswith("it was begun so")
    made.go_on(True)
    assert made.reuse.on
    made.reuse = replace(made.reuse, on=False, possible=False)
    made.go_on(True)
    assert not made.reuse.on
