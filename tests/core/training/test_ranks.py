"""Several ranks train what one process trains: every adapter, resumed on another number, agreed before."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rank_work

from mlxlora_core.distributed.group import spare_numbers

ALL = os.environ.get("MLXLORA_TEST_ALL", "") not in ("", "0")
STEPS = 50
_DRAW = random.Random(0)
_WORDS = (
    "a",
    "layer",
    "scales",
    "the",
    "weights",
    "and",
    "adapter",
    "keeps",
    "its",
    "inputs",
    "while",
    "this",
)
TEXTS = [" ".join(_DRAW.choices(_WORDS, k=_DRAW.randrange(2, 24))) for _ in range(29)]
ROWS = {"train": [{"text": text} for text in TEXTS], "valid": [{"text": text} for text in TEXTS[:7]]}
UNLIKE = {**ROWS, "valid": [{"text": "0123456789 QWXZ #@!"}] * 3}
SETTINGS = {
    "iters": STEPS,
    "batch_size": 5,
    "learning_rate": 1e-3,
    "steps_per_report": 1,
    "steps_per_eval": 25,
    "grad_clip": 1.0,
    "reuse_prefix": "off",
}
#: every adapter, and with one of them the ways in which a step is computed; those that draw at random do
CASES: dict[str, dict[str, Any]] = {
    "lora": {"options": {"rank": 2, "dropout": 0.2}},
    "again": {"options": {"rank": 2, "dropout": 0.2}},
    "rslora": {"adapter": "rslora", "options": {"rank": 2, "dropout": 0.2}},
    "lora-plus": {"adapter": "lora-plus", "options": {"rank": 2, "dropout": 0.2}},
    "dora": {"adapter": "dora", "options": {"rank": 2, "dropout": 0.2}},
    "pissa": {"adapter": "pissa", "options": {"rank": 2}},
    "vera": {"adapter": "vera", "options": {"rank": 4, "dropout": 0.2}},
    "ia3": {"adapter": "ia3"},
    "accumulated": {"settings": {"batch_size": 2, "grad_accumulation": 3}},
    "packed": {"settings": {"packing": True}},
    "compiled": {"settings": {"compile": "on"}, "options": {"rank": 2, "dropout": 0.2}},
    "reused": {"settings": {"reuse_prefix": "on"}, "options": {"layers": 1}},
    "patient": {"settings": {"patience": 2, "steps_per_eval": 2, "learning_rate": 0.02}, "rows": UNLIKE},
    "fewer rows than ranks": {"settings": {"batch_size": 2}},
    "ahead": {
        "as_on_a_gpu": True,
        "options": {"rank": 2, "dropout": 0.2},
        "settings": {"steps_per_report": 7},
    },
}
COUNTS = (2, 3, 4) if ALL else (3,)
BY_DAY = ("lora", "again", "reused", "patient", "ahead")
NAMES = tuple(CASES) if ALL else BY_DAY

Found = list[tuple[dict[str, Any], dict[str, Any]]]  # of each rank
Trained = Callable[..., Found]


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Callable[..., Path]:
    """A function that writes a job of some cases."""

    def write(cases: dict[str, Any], folder: Path | None = None) -> Path:
        folder = folder or tmp_path_factory.mktemp("job")
        path = folder / "job.json"
        held = {"model": str(tiny_model), "rows": ROWS, "settings": SETTINGS, "cases": cases}
        path.write_text(json.dumps({**held, "folder": str(folder)}))
        return path

    return write


def found(job: Path, case: str, count: int) -> Found:
    """What each rank has found of a case."""
    stems = [job.with_name(f"{case}.{rank}") for rank in range(count)]
    return [(json.loads(Path(f"{s}.json").read_text()), dict(np.load(f"{s}.npz"))) for s in stems]


@pytest.fixture(scope="module")
def trained(job: Callable[..., Path]) -> Trained:
    """A function that gives what so many ranks find of one of :data:`CASES`."""

    @cache
    def done(count: int) -> Path:
        written = job({name: CASES[name] for name in NAMES})
        for code, told in run(written, count):
            assert code == 0, told
        return written

    return lambda count, case: found(done(count), case, count)


def run(job: Path, count: int) -> list[tuple[int, str]]:
    return rank_work.finish(rank_work.start(count, rank_work.work_on(job), job.parent))


def assert_alike(one: tuple[Any, Any], other: tuple[Any, Any]) -> None:
    """The losses and the adapter of two trainings agree within 1e-5."""
    np.testing.assert_allclose(one[0]["losses"], other[0]["losses"], atol=1e-5, rtol=0)
    assert one[1].keys() == other[1].keys()
    for name, tensor in one[1].items():
        np.testing.assert_allclose(tensor, other[1][name], atol=1e-5, rtol=0, err_msg=name)
    assert one[0]["tokens"] == other[0]["tokens"]


def same_bits(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one.keys() == other.keys() and all(np.array_equal(one[n], other[n]) for n in one)


@pytest.mark.parametrize("case", NAMES)
@pytest.mark.parametrize("count", COUNTS)
def test_ranks_train_what_one_process_trains(trained: Trained, count: int, case: str) -> None:
    (alone,), ranks = trained(1, case), trained(count, case)
    assert_alike(alone, ranks[0])
    for other in ranks[1:]:
        assert other[0]["losses"] == ranks[0][0]["losses"]
        assert same_bits(other[1], ranks[0][1])
    if case == "patient":
        assert len({told["adapter_step"] for told, _ in (alone, *ranks)}) == 1
        assert alone[0]["adapter_step"] < alone[0]["step"] < STEPS


@pytest.mark.parametrize("count", COUNTS)
def test_a_step_sends_one_message_and_a_validation_two(trained: Trained, count: int) -> None:
    for told, arrays in trained(count, "lora"):
        sizes = told["messages"][1:]  # before the first step others come
        assert sum(map(len, sizes)) == STEPS - 1 + 2 * (STEPS // 25)
        numbers = sum(array.size for array in arrays.values()) + 7 + 3 * count
        whole = numbers + spare_numbers(numbers, count)
        assert max(size for step in sizes for size in step) == 4 * whole


# --- what goes wrong ----------------------------------------------------------

FAULTS: dict[str, dict[str, Any]] = {
    "changed": {"at": {"5 2": "change"}},
    "stopped": {"at": {"7 1": "SIGTERM"}},
    "stopped ahead": {"at": {"8 1": "SIGTERM"}, "as_on_a_gpu": True, "settings": {"steps_per_report": 4}},
    "seeds": {"of_rank": {"1": {"seed": 4}}},
    "rows": {"of_rank": {"2": {"rows": {**ROWS, "train": ROWS["train"][1:]}}}},
    "settings": {"of_rank": {"0": {"settings": {"learning_rate": 0.5, "iters": 60}}}},
}


@pytest.fixture(scope="module")
def failed(
    job: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory, model_folder: Callable[..., Path]
) -> Callable[[str], Found]:
    """A function that gives what three ranks find of one of :data:`FAULTS`, or of another base on one."""
    folder = tmp_path_factory.mktemp("checkpoints")
    cases = FAULTS | {"base": {"of_rank": {"2": {"model": str(model_folder(seed=5))}}}}
    written = job({name: {**case, "checkpoints": str(folder / name)} for name, case in cases.items()})
    for code, told in run(written, 3):
        assert code == 0, told
    return lambda case: found(written, case, 3)


def test_a_rank_that_has_diverged_is_named_by_all(failed: Callable[[str], Found]) -> None:
    for told, _ in failed("changed"):
        assert told["code"] == 10 and told["fault"].startswith("rank 2 has diverged: before step 6 ")
        assert told["step"] == 5


@pytest.mark.parametrize(("case", "step"), [("stopped", 8), ("stopped ahead", 10)])
def test_a_signal_that_one_rank_gets_ends_all_after_the_same_step(
    failed: Callable[[str], Found], case: str, step: int
) -> None:
    ranks = failed(case)
    assert {told["code"] for told, _ in ranks} == {128 + 15}
    assert {told["step"] for told, _ in ranks} == {step}
    assert f"step {step} is saved" in ranks[0][0]["fault"]


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("seeds", "seed is 3 on ranks 0, 2 and 4 on rank 1"),
        ("rows", "train rows is "),
        ("base", "base is "),
        ("settings", "iters is 60 on rank 0 and 50 on ranks 1, 2; learning_rate is 0.5 on rank 0 and 0.001"),
    ],
)
def test_ranks_that_do_not_train_the_same_make_no_step(
    failed: Callable[[str], Found], case: str, words: str
) -> None:
    for told, _ in failed(case):
        assert told["code"] == 10 and not told["losses"]
        assert told["fault"].startswith(f"the ranks do not train the same: {words}")


# --- over again ---------------------------------------------------------------


def test_killed_on_four_ranks_it_goes_on_with_two(
    job: Callable[..., Path], trained: Trained, tmp_path: Path
) -> None:
    folder = tmp_path / "checkpoints"
    case = {**CASES["lora"], "checkpoints": str(folder), "save_every": 10}
    killed = job({"killed": {**case, "at": {f"25 {rank}": "SIGKILL" for rank in range(4)}}})
    assert {code for code, _ in run(killed, 4)} == {-9}
    assert sorted(path.name for path in folder.glob("step-*")) == ["step-0000010", "step-0000020"]
    resumed = job({"killed": case})
    for code, told in run(resumed, 2):
        assert code == 0, told
    (alone,), ranks = trained(1, "lora"), found(resumed, "killed", 2)
    count = len(ranks[0][0]["losses"])
    assert count == 30 + 2  # steps and validations
    alone[0]["losses"] = alone[0]["losses"][-count:]
    assert_alike(alone, ranks[0])
    assert same_bits(ranks[0][1], ranks[1][1])


@pytest.mark.parametrize("count", COUNTS)
def test_as_many_ranks_again_come_to_the_same_bits(
    job: Callable[..., Path], trained: Trained, count: int
) -> None:
    others = [trained(count, "again")]
    if ALL:  # in other processes too
        again = job({"lora": CASES["lora"]})
        assert {code for code, _ in run(again, count)} == {0}
        others.append(found(again, "lora", count))
    for other in others:
        for first, second in zip(trained(count, "lora"), other, strict=True):
            assert first[0]["losses"] == second[0]["losses"] and same_bits(first[1], second[1])
