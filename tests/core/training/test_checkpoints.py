"""Checkpoints: found, checked, written, gone on from (checkpoints.py, identity.py, saving.py, session.py)."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import takewhile
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlxlora_core.errors import (
    DivergedError,
    MlxloraError,
    ModelError,
    PluginError,
    SafetyError,
    SettingsChanged,
)
from mlxlora_core.files import tensor_file
from mlxlora_core.files.leftovers import temporary_name
from mlxlora_core.machine.processors import THREADS
from mlxlora_core.model import adapters, loading
from mlxlora_core.plugins import Registry
from mlxlora_core.plugins.sections import configure
from mlxlora_core.training import checkpoints, loop, update
from mlxlora_core.training.checkpoints import Start, find, find_to_begin, find_to_resume
from mlxlora_core.training.events import (
    CheckpointSaved,
    Note,
    SpikeReport,
    TrainingStarted,
    TrainReport,
    TrainResult,
    ValidReport,
)
from mlxlora_core.training.examples import Example, Examples
from mlxlora_core.training.identity import SOURCE
from mlxlora_core.training.outputs import Outputs
from mlxlora_core.training.session import NewAdapter, TrainingSession, open_training
from mlxlora_core.training.settings import SaveConfig, TrainConfig

EVERY = SaveConfig(save_every=1, save_minutes=1e9, keep=1000)
LAST = SaveConfig(save_every=1000, save_minutes=1e9)  # the last step, and what validates best
# 7 rows, 4 a step: an epoch is two steps, the second of which is short and ends inside an accumulation.
BASIC = {"iters": 9, "batch_size": 2, "grad_accumulation": 2, "learning_rate": 0.02, "steps_per_eval": 3}
BASIC |= {"schedule": "cosine", "warmup": 4, "optimizer": "adamw", "grad_clip": 1.0, "steps_per_report": 2}
LORA = {"rank": 2, "layers": 1, "dropout": 0.2}

MakeWork = Callable[..., "Work"]


class Work:
    """A training in two halves: up to its first step, and from there to its end."""

    def __init__(self, session: TrainingSession) -> None:
        assert session.checkpoints is not None
        self.session, self.checkpoints = session, session.checkpoints
        self.folder, self.training = self.checkpoints.path, session.training
        self.module: Any = session.model.language_model
        self._events: Iterator[Any] | None = None
        self.adapter_step = -1

    def begin(self, how: Start) -> list[str]:
        """Come to the first step; what is told of checkpoints."""
        self._events = self.session.start(how)
        told = list(takewhile(lambda event: not isinstance(event, TrainingStarted), self._events))
        texts = [event.text for event in told]
        memory = next(i for i, text in enumerate(texts) if text.startswith("training needs"))
        return texts[memory + 1 :]

    def train(self, saving: SaveConfig, metrics: Path | None = None) -> Iterator[Any]:
        """Go to the end; what is told on the way."""
        if self._events is None:
            self.begin(Start.BEGIN)
        self.session._outputs = replace(self.session._outputs, saving=saving, metrics=metrics)
        for event in self._events or ():
            if isinstance(event, TrainResult):
                self.adapter_step = event.adapter_step
            else:
                yield event


def finish(work: Work, saving: SaveConfig = EVERY, metrics: Path | None = None) -> list[Any]:
    """Train to the end; the events."""
    return list(work.train(saving, metrics))


def go_on(work: Work) -> list[str]:
    return work.begin(Start.RESUME)


def rows(lengths: Sequence[int], seed: int) -> tuple[Example, ...]:
    draw = np.random.default_rng(seed)
    examples = []
    for length in lengths:
        mask = np.ones(length, bool)
        mask[0] = False
        examples.append(Example(draw.integers(3, 300, length).astype(np.uint32), mask))
    return tuple(examples)


TRAIN, VALID = rows([9, 4, 12, 6, 7, 3, 10], 0), rows([6, 8], 1)


@pytest.fixture(autouse=True)
def one_core(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which step is the best depends on what dropout draws, and that on the parts of a batch."""
    monkeypatch.setenv(THREADS, "1")


@pytest.fixture
def start(model_folder: Callable[..., Path], registry: Registry) -> MakeWork:
    """A function that makes a training at its start, as the command line does."""

    def make(
        folder: Path,
        *,
        seed: int = 0,
        lora: dict[str, Any] | None = None,
        other: tuple[str, dict[str, Any]] | None = None,
        base: dict[str, Any] | None = None,
        train: Sequence[Example] = TRAIN,
        valid: Sequence[Example] = VALID,
        **settings: Any,
    ) -> Work:
        model = load(model_folder(**(base or {})), registry)
        name, values = other or ("lora", LORA | (lora or {}))
        component = registry.find("adapter", name)
        config = TrainConfig(**BASIC | settings)
        rows = {"train": Examples(tuple(train))} | ({"valid": Examples(tuple(valid))} if valid else {})
        adapter = NewAdapter(*configure(component, values))
        outputs = Outputs(checkpoints=folder)
        return Work(
            open_training(
                model,
                adapter,
                rows,
                config,
                registry,
                seed=seed,
                outputs=outputs,
                runtimes=["one thread"],
            )
        )

    return make


load = loading.load


def state(work: Work) -> tuple[str, Any]:
    """All that a training is: a hash of its tensors, and its progress without what is a matter of time."""
    digest = hashlib.sha256()
    own = adapters.adapter_parameters(work.module, work.session.adapted.paths)
    tensors = {**own, **work.training.optimizer_tensors()}
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode() + np.array(tensor).tobytes())
    progress = work.training.progress
    return digest.hexdigest(), replace(progress, window=replace(progress.window, seconds=0.0))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def steps(folder: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in folder.glob("step-*"))


def only(source: Path, target: Path, *wanted: int) -> Path:
    """A folder with some of the checkpoints of another."""
    for step in wanted:
        shutil.copytree(source / f"step-{step:07}", target / f"step-{step:07}")
    return target


# --- going on is exact --------------------------------------------------------

CASES: dict[str, dict[str, Any]] = {
    "adamw, cosine, dropout, accumulation": {},
    "muon": {"optimizer": "muon"},
    "adam, constant, no dropout": {"optimizer": "adam", "schedule": "constant", "lora": {"dropout": 0.0}},
    "all linears of a quantized base": {"base": {"bits": 4}, "lora": {"targets": ("all-linear",)}},
    "nothing to validate on, one row a step": {"valid": (), "batch_size": 1, "grad_accumulation": 1},
    "rslora, by overrides": {"other": ("rslora", {"layers": 1, "overrides": "wq: rank=2, wv: alpha=3"})},
    "lora-plus, on embedding and head": {
        "other": ("lora-plus", {"rank": 2, "targets": ("wq", "lm_head", "embed_tokens")})
    },
    "lora-plus, muon": {"other": ("lora-plus", {"rank": 2, "dropout": 0.2}), "optimizer": "muon"},
    "dora, a quantized base": {"other": ("dora", {"rank": 2, "dropout": 0.2}), "base": {"bits": 4}},
    "pissa": {"other": ("pissa", {"rank": 2, "layers": 1})},
    "ia3": {"other": ("ia3", {})},
    "vera": {"other": ("vera", {"rank": 5, "dropout": 0.2})},
    "compiled": {"compile": "on"},
    "compiled, muon, what frozen layers give kept": {
        "compile": "on",
        "optimizer": "muon",
        "reuse_prefix": "on",
        "lora": {"dropout": 0.0},
    },
    "compiled, packed, kept": {
        "compile": "on",
        "packing": "on",
        "reuse_prefix": "on",
        "lora": {"dropout": 0.0},
    },
}


@pytest.mark.parametrize("case", CASES)
def test_going_on_from_any_step_ends_bit_for_bit_the_same(start: MakeWork, tmp_path: Path, case: str) -> None:
    whole = start(tmp_path / "whole", **CASES[case])
    whole_metrics = tmp_path / "whole.jsonl"
    finish(whole, metrics=whole_metrics)
    assert steps(whole.folder) == list(range(1, 10))
    # The first step, mid epoch, its last, the first of the next, the edge of the warm-up, after a validation.
    for step in range(1, 10) if case in list(CASES)[:1] else (1, 4, 5):
        again = start(only(whole.folder, tmp_path / str(step), step), **CASES[case])
        metrics = tmp_path / f"{step}.jsonl"
        shutil.copy(whole_metrics, metrics)
        notes = go_on(again)
        assert again.training.progress.step == step
        assert notes == [
            f"resumed at step {step} of 9" if step < 9 else "nothing to do: step 9 of 9 was the last"
        ]
        finish(again, LAST, metrics)
        assert state(again) == state(whole), step
        assert untimed(metrics) == untimed(whole_metrics)


@pytest.mark.parametrize("compile", ["off", "on"])
def test_steps_that_are_read_late_are_saved_and_gone_on_with_to_the_bit(
    start: MakeWork, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compile: str
) -> None:
    """As on a GPU, with reports, validations and checkpoints after different steps."""
    settings = {"compile": compile, "iters": 14, "steps_per_report": 3, "steps_per_eval": 5}
    saving, found = SaveConfig(save_every=4, save_minutes=1e9, keep=1000), []
    for late in (False, True):
        monkeypatch.setattr(loop, "runs_ahead", lambda late=late: late)
        work, metrics = start(tmp_path / f"late {late}", **settings), tmp_path / f"late {late}.jsonl"
        told = [type(event).__name__ for event in finish(work, saving, metrics)]
        parts = [
            (path.parent.name, path.name, path.read_bytes())
            for path in sorted(work.folder.glob("*/*.safetensors"))
        ]
        found.append((told, untimed(metrics), parts, state(work)))
    assert found[0] == found[1]
    assert len({step for step, _, _ in found[1][2]}) >= 4
    for step in (4, 8, 12):
        again = start(only(work.folder, tmp_path / str(step), step), **settings)
        shutil.copy(metrics, tmp_path / f"{step}.jsonl")
        go_on(again)
        finish(again, saving, tmp_path / f"{step}.jsonl")
        assert state(again) == state(work)
        assert untimed(tmp_path / f"{step}.jsonl") == untimed(metrics)


@pytest.mark.parametrize("late", [False, True])
def test_a_spike_that_nobody_was_told_yet_is_logged_before_its_step_is_saved(
    start: MakeWork, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, late: bool
) -> None:
    monkeypatch.setattr(loop, "runs_ahead", lambda: late)
    monkeypatch.setattr(loop, "SPIKE_FACTOR", 1.0)
    settings = {"iters": 40, "steps_per_report": 50, "valid": (), "compile": "off", "learning_rate": 1e-9}
    work, metrics = start(tmp_path / "c", **settings), tmp_path / "m.jsonl"
    seen = []
    for event in work.train(EVERY, metrics):
        if isinstance(event, CheckpointSaved):
            lines = untimed(metrics) if metrics.exists() else []
            seen.append([line["step"] for line in lines if line["kind"] == "spike"])
    assert len(seen) == 40 and len(seen[-1]) > 3
    for step, spikes in enumerate(seen, start=1):
        assert spikes == [spike for spike in seen[-1] if spike <= step], step


def test_auto_stays_what_it_was_settled_to(
    start: MakeWork, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A training that was begun on a GPU goes on compiled on a CPU."""
    for module in (loop, update):
        monkeypatch.setattr(module, "runs_ahead", lambda: True)
    whole = start(tmp_path / "gpu")
    finish(whole)
    assert whole.training.compiled
    for module in (loop, update):
        monkeypatch.setattr(module, "runs_ahead", lambda: False)
    again = start(only(whole.folder, tmp_path / "cpu", 4))
    assert not again.training.compiled
    go_on(again)
    finish(again, LAST)
    assert again.training.compiled and state(again) == state(whole)
    other = start(only(whole.folder, tmp_path / "refused", 4), compile="off")
    with pytest.raises(SettingsChanged, match="compile"):
        go_on(other)


def untimed(path: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [{k: v for k, v in line.items() if "second" not in k and "memory" not in k} for line in lines]


def test_what_stands_in_a_checkpoint_is_what_it_says(start: MakeWork, tmp_path: Path) -> None:
    work = start(tmp_path / "c")
    finish(work)
    folder = tmp_path / "c" / "step-0000005"
    assert names(folder) == ["MANIFEST.json", "adapter.safetensors", "optimizer.safetensors", "state.json"]
    manifest = json.loads((folder / "MANIFEST.json").read_text())
    assert manifest["schema"] == 1 and manifest["step"] == 5 and not manifest["finished"]
    for name, stated in manifest["files"].items():
        content = (folder / name).read_bytes()
        assert stated == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    assert manifest["base"] == work.session.model.fingerprint
    assert manifest["settings"]["learning_rate"] == 0.02 and manifest["settings"]["adapter.rank"] == 2
    assert manifest["versions"].keys() >= {"mlxlora", "mlx", "python", "system", "runtimes"}
    assert manifest["plugins"]["lora"]["distribution"] == "mlxlora"
    assert json.loads((folder / "state.json").read_text())["seed"] == 0
    assert json.loads((tmp_path / "c" / "step-0000009" / "MANIFEST.json").read_text())["finished"]


def test_settings_that_cannot_change_the_result_may_differ(
    start: MakeWork, trained: Path, tmp_path: Path
) -> None:
    again = start(
        only(trained, tmp_path / "again", 4),
        steps_per_report=1,
        steps_per_eval=2,
        val_batches=1,
        on_nonfinite="skip",
    )
    go_on(again)
    finish(again, SaveConfig(save_every=2, save_minutes=1e-9, keep=1))
    for name in ("adapter.safetensors", "optimizer.safetensors"):
        ended = [tensor_file.load(folder / "step-0000009" / name) for folder in (trained, again.folder)]
        # The record of the adapter tells the settings; its tensors are the same to the bit.
        assert ended[0][1][tensor_file.FINGERPRINT] == ended[1][1][tensor_file.FINGERPRINT]


OTHERS: list[tuple[str, dict[str, Any]]] = [
    ("learning_rate", {"learning_rate": 0.03}),
    ("seed", {"seed": 1}),
    ("batch_size", {"batch_size": 4, "grad_accumulation": 1}),
    ("grad_accumulation", {"grad_accumulation": 3}),
    ("optimizer", {"optimizer": "adam"}),
    ("weight_decay", {"weight_decay": 0.5}),
    ("schedule", {"schedule": "constant"}),
    ("warmup", {"warmup": 3}),
    ("iters", {"iters": 12}),
    ("grad_clip", {"grad_clip": 0.5}),
    ("max_seq_length", {"max_seq_length": 5}),
    ("mask_prompt", {"mask_prompt": True}),
    ("patience", {"patience": 2}),
    ("adapter.rank", {"lora": {"rank": 3}}),
    ("adapter.layers", {"lora": {"layers": 2}}),
    ("adapter.targets", {"lora": {"targets": ("attention.wo",)}}),
    ("adapter.dropout", {"lora": {"dropout": 0.1}}),
]


@pytest.fixture(scope="session")
def trained(
    model_folder: Callable[..., Path], registry: Registry, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The checkpoints of the basic training; copy them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(THREADS, "1")
        folder = tmp_path_factory.mktemp("trained")
        model = load(model_folder(), registry)
        component = registry.find("adapter", "lora")
        adapter = NewAdapter(*configure(component, LORA))
        rows = {"train": Examples(TRAIN), "valid": Examples(VALID)}
        outputs = Outputs(checkpoints=folder)
        config = TrainConfig(**BASIC)
        finish(
            Work(
                open_training(
                    model, adapter, rows, config, registry, outputs=outputs, runtimes=["one thread"]
                )
            )
        )
        return folder


@pytest.mark.parametrize(("name", "other"), OTHERS, ids=[name for name, _ in OTHERS])
def test_other_settings_are_refused_with_old_and_new(
    start: MakeWork, trained: Path, name: str, other: dict[str, Any]
) -> None:
    with pytest.raises(SettingsChanged) as caught:
        go_on(start(trained, **other))
    assert caught.value.exit_code == 2
    ((old, new),) = [(old, new) for key, old, new in caught.value.rows if key == name]
    assert old != new and f"{name} {old} -> {new}" in str(caught.value)


def test_a_constant_schedule_may_be_made_longer_and_not_shorter(start: MakeWork, tmp_path: Path) -> None:
    whole = start(tmp_path / "whole", schedule="constant", iters=9)
    finish(whole, LAST)
    short = start(tmp_path / "short", schedule="constant", iters=6)
    finish(short, LAST)
    longer = start(tmp_path / "short", schedule="constant", iters=9)
    assert go_on(longer) == ["resumed at step 6 of 9"]
    finish(longer, LAST)
    assert state(longer)[0] == state(whole)[0]
    with pytest.raises(SettingsChanged, match="iters 9 -> 8"):
        go_on(start(tmp_path / "short", schedule="constant", iters=8))


def test_another_base_and_other_rows_are_refused_with_both_fingerprints(
    start: MakeWork, trained: Path
) -> None:
    with pytest.raises(ModelError, match=r"another base \([0-9a-f]{12}, this one is [0-9a-f]{12}"):
        go_on(start(trained, base={"seed": 1}))
    with pytest.raises(ModelError, match="another base"):
        go_on(start(trained, base={"bits": 8}))
    swapped = (TRAIN[1], TRAIN[0], *TRAIN[2:])
    for train in (swapped, TRAIN[:-1]):
        with pytest.raises(
            ModelError, match=r"train rows have changed since \([0-9a-f]{12}, now [0-9a-f]{12}\)"
        ):
            go_on(start(trained, train=train))
    go_on(start(trained, valid=VALID[:1]))  # these decide nothing without patience


def test_other_versions_are_told_and_recorded(start: MakeWork, tmp_path: Path, trained: Path) -> None:
    work = start(only(trained, tmp_path, 3))
    versions = {**work.checkpoints._identity.versions, "mlx": "0.99.0", "runtimes": "two threads"}
    work.checkpoints._identity = replace(work.checkpoints._identity, versions=versions)
    first, second, _ = go_on(work)
    assert "not be bit-exact across mlx 0." in first and first.endswith("-> 0.99.0")
    assert second.endswith("runtimes one thread -> two threads")
    finish(work)
    (record,) = json.loads((tmp_path / "step-0000009" / "state.json").read_text())["resumed"]
    assert record["step"] == 3 and record["versions"]["mlx"] == "0.99.0"


@pytest.mark.parametrize(("what", "now"), [("order of rows", "3"), ("dropout", "2")])
def test_what_rows_do_otherwise_is_told_of_a_checkpoint_of_before(
    start: MakeWork, tmp_path: Path, trained: Path, what: str, now: str
) -> None:
    folder = only(trained, tmp_path, 3)
    (manifest,) = folder.glob("*/MANIFEST.json")
    held = json.loads(manifest.read_text())
    assert held["versions"].pop(what) == now
    del held["sha256"]
    manifest.write_text(json.dumps({**held, "sha256": checkpoints.digest(held)}))
    assert f"exact across {what} of before -> {now}" in "".join(go_on(start(folder)))


def test_other_code_of_a_plugin_is_told_and_makes_a_training_another_one(
    start: MakeWork, tmp_path: Path, trained: Path
) -> None:
    def edited(work: Work, digest: str) -> Work:
        versions = {**work.checkpoints._identity.versions, f"{SOURCE}bias": digest}
        work.checkpoints._identity = replace(work.checkpoints._identity, versions=versions)
        return work

    folder = only(trained, tmp_path / "c", 3)
    work = edited(start(folder), "1a")
    assert not [note for note in go_on(work) if "bias" in note], "a checkpoint of before tells no code"
    finish(work)
    assert edited(start(folder), "1a").begin(Start.CONTINUE)[-1].startswith("nothing to do")
    (warning,) = [note for note in go_on(edited(start(folder), "2b")) if "bias" in note]
    assert warning.startswith("warning: the code of plugin bias has changed since (1a, now 2b)")
    assert "removed" in edited(start(folder), "2b").begin(Start.CONTINUE)[-1], "begun anew"


def test_a_plugin_that_is_gone_is_named_with_how_to_get_it(trained: Path, registry: Registry) -> None:
    found = find(trained)
    checkpoints.check_plugins(found, registry)
    without = Registry([p for p in registry.plugins if p.name != "lora"], registry.components)
    version = found.valid[0].manifest["plugins"]["lora"]["version"]
    with pytest.raises(PluginError, match=rf"not active: lora.*pip install mlxlora=={version}"):
        checkpoints.check_plugins(found, without)


# --- damage -------------------------------------------------------------------


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-2])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def link(path: Path) -> None:
    moved = path.rename(path.with_suffix(".moved"))
    path.symlink_to(moved)


def of_another_step(path: Path) -> None:
    shutil.copy(path.parent.parent / "step-0000007" / path.name, path)


@pytest.mark.parametrize("harm", [flip, truncate, empty, link, os.unlink, of_another_step])
@pytest.mark.parametrize(
    "part", ["MANIFEST.json", "adapter.safetensors", "optimizer.safetensors", "state.json"]
)
def test_a_damaged_checkpoint_is_passed_over_with_a_word_and_kept(
    trained: Path, tmp_path: Path, harm: Callable[[Path], None], part: str
) -> None:
    folder = only(trained, tmp_path / "c", 7, 8)
    harm(folder / "step-0000008" / part)
    content = names(folder / "step-0000008")
    found = find_to_resume(folder)
    assert [c.step for c in found.valid] == [7]
    (note,) = found.notes
    assert "step-0000008 was skipped: " in note and part in note
    assert names(folder / "step-0000008") == content


def test_a_damaged_checkpoint_makes_room_for_a_sound_one(
    start: MakeWork, trained: Path, tmp_path: Path
) -> None:
    folder = only(trained, tmp_path / "c", 6, 7)
    truncate(folder / "step-0000007" / "adapter.safetensors")
    work = start(folder)
    assert "step-0000007 was skipped" in go_on(work)[0]
    finish(work, SaveConfig(save_every=1, keep=2, save_minutes=1e9))
    assert names(folder)[0] == "damaged-step-0000007-1"
    assert steps(folder) == sorted({8, 9, work.training.best_step})
    assert len(names(folder / "damaged-step-0000007-1")) == 4
    assert (folder / "step-0000009" / "optimizer.safetensors").read_bytes() == (
        trained / "step-0000009" / "optimizer.safetensors"
    ).read_bytes()


def test_where_nothing_verifies_it_is_said_what_was_looked_for(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no checkpoint.*looked for step-\*/MANIFEST.json"):
        find_to_resume(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    with pytest.raises(ModelError, match="is no folder of checkpoints"):
        find_to_resume(tmp_path / "file")
    folder = only(trained, tmp_path / "c", 2)
    empty(folder / "step-0000002" / "state.json")
    with pytest.raises(ModelError, match=r"no checkpoint.*step-0000002: state.json has 0 bytes"):
        find_to_resume(folder)


def test_a_checkpoint_of_the_future_asks_for_an_upgrade(trained: Path, tmp_path: Path) -> None:
    folder = only(trained, tmp_path / "c", 2, 3)
    path = folder / "step-0000003" / "MANIFEST.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"schema": 9, "files": "of another kind"}))
    with pytest.raises(
        ModelError, match=r"newer mlxlora \(format 9, this one knows 1\).*--upgrade"
    ) as caught:
        find_to_resume(folder)
    assert caught.value.exit_code == 4


def test_what_another_tool_put_there_is_never_opened(start: MakeWork, trained: Path, tmp_path: Path) -> None:
    folder = only(trained, tmp_path / "c", 8)
    canary = tmp_path / "canary"
    payload = f"cposix\nsystem\n(S'touch {canary}'\ntR.".encode()
    for name in ("rng.pkl", "optimizer.pt", "optimizer.npz", "adapter.bin"):
        (folder / "step-0000008" / name).write_bytes(payload)
    (folder / "step-latest").write_bytes(payload)
    work = start(folder)
    go_on(work)
    finish(work)
    assert not canary.exists()
    # In the place of a file of ours it is damage.
    (folder / "step-0000009" / "optimizer.safetensors").write_bytes(payload)
    assert [c.step for c in find(folder).valid] == [8]
    assert not canary.exists()


# --- what is none of ours -----------------------------------------------------


def plain_file(path: Path) -> None:
    path.write_text("precious")


def folder_of_notes(path: Path) -> None:
    path.mkdir()
    (path / "notes.txt").write_text("precious")


def manifest_of_another_tool(path: Path) -> None:
    path.mkdir()
    (path / "MANIFEST.json").write_text('{"files": ["precious"]}')


def link_to_a_folder(path: Path) -> None:
    elsewhere = path.parent.parent / "elsewhere"
    folder_of_notes(elsewhere)
    path.symlink_to(elsewhere)


STRANGE = [plain_file, folder_of_notes, manifest_of_another_tool, link_to_a_folder]


def below(folder: Path) -> dict[str, str]:
    paths = [folder] if folder.is_file() else folder.rglob("*")
    return {str(path): path.read_text("utf-8", "replace") for path in paths if path.is_file()}


@pytest.mark.parametrize("make", STRANGE)
@pytest.mark.parametrize("how", [Start.BEGIN, Start.OVERWRITE, Start.CONTINUE, Start.RESUME])
def test_what_is_called_like_a_checkpoint_and_is_none_stays(
    start: MakeWork, trained: Path, tmp_path: Path, make: Callable[[Path], None], how: Start
) -> None:
    folder = only(trained, tmp_path / "c", *([8] if how in (Start.RESUME, Start.CONTINUE) else []))
    folder.mkdir(exist_ok=True)
    make(folder / "step-0000009")
    before = below(folder / "step-0000009")
    with pytest.raises(SafetyError, match="left alone"):
        start(folder).begin(how)
    assert below(folder / "step-0000009") == before and before


def test_notes_in_a_checkpoint_keep_it_where_it_would_go(
    start: MakeWork, trained: Path, tmp_path: Path
) -> None:
    folder = only(trained, tmp_path / "c", 6, 7)
    for step in (6, 7):
        (folder / f"step-000000{step}" / "notes.txt").write_text("precious")
    with pytest.raises(SafetyError, match="left alone"):
        start(folder).begin(Start.OVERWRITE)
    work = start(folder)
    go_on(work)
    finish(work, SaveConfig(save_every=1, keep=1, save_minutes=1e9))
    assert {6, 7, 9} <= set(steps(folder)), "neither is pruned"
    assert (folder / "step-0000007" / "notes.txt").read_text() == "precious"


# --- beginning ----------------------------------------------------------------


def test_a_training_that_has_not_ended_is_not_thrown_away(
    start: MakeWork, trained: Path, tmp_path: Path
) -> None:
    folder = only(trained, tmp_path / "c", 3, 4)
    with pytest.raises(SafetyError, match=r"not ended \(step 4\).*--resume.*--overwrite") as caught:
        find_to_begin(folder, overwrite=False)
    assert caught.value.exit_code == 5 and steps(folder) == [3, 4]
    work = start(folder, seed=5)
    work.begin(Start.OVERWRITE)
    assert steps(folder) == []
    finish(work, replace(EVERY, save_every=100))
    assert 9 in steps(folder)


def test_a_training_that_has_ended_gives_way(start: MakeWork, trained: Path, tmp_path: Path) -> None:
    folder = only(trained, tmp_path / "c", 8, 9)
    truncate(folder / "step-0000008" / "state.json")
    work = start(folder, seed=5)
    notes = work.begin(Start.BEGIN)
    assert "step-0000008 was skipped" in notes[0] and notes[1].startswith("1 checkpoints")
    assert names(folder) == ["damaged-step-0000008-1"]


def test_run_goes_on_by_itself_and_begins_anew_where_all_is_done(
    start: MakeWork, trained: Path, tmp_path: Path
) -> None:
    assert start(tmp_path / "none").begin(Start.CONTINUE) == []
    folder = only(trained, tmp_path / "c", 4)
    assert start(folder).begin(Start.CONTINUE) == ["resumed at step 4 of 9"]
    with pytest.raises(SettingsChanged, match=r"remove .*to begin anew"):
        start(folder, seed=1).begin(Start.CONTINUE)
    only(trained, folder, 9)
    assert start(folder).begin(Start.CONTINUE) == ["nothing to do: step 9 of 9 was the last"]
    assert start(folder, seed=1).begin(Start.CONTINUE) == [
        "2 checkpoints of an earlier training were removed"
    ]
    assert steps(folder) == []


# --- what is kept -------------------------------------------------------------


def test_the_newest_and_the_best_are_kept(start: MakeWork, tmp_path: Path) -> None:
    work = start(tmp_path / "c", steps_per_eval=1, learning_rate=0.3, schedule="constant", iters=12)
    events = finish(work, SaveConfig(save_every=1, keep=2, save_minutes=1e9))
    losses = {e.step: e.loss for e in events if isinstance(e, ValidReport) and e.step}
    best = min(losses, key=lambda step: losses[step])
    assert best < 11, "or this test shows nothing"
    assert steps(work.folder) == [best, 11, 12]
    assert work.training.progress.best_step == best
    assert work.adapter_step == 12
    assert [e.step for e in events if isinstance(e, CheckpointSaved)] == list(range(1, 13))


def test_a_reader_of_a_checkpoint_that_is_pruned_reads_on(
    start: MakeWork, trained: Path, tmp_path: Path
) -> None:
    folder = only(trained, tmp_path / "c", 4)
    content = (folder / "step-0000004" / "adapter.safetensors").read_bytes()
    work = start(folder)
    go_on(work)
    with open(folder / "step-0000004" / "adapter.safetensors", "rb") as reader:
        finish(work, SaveConfig(save_every=1, keep=1, save_minutes=1e9))
        assert steps(folder)[0] > 4
        assert reader.read() == content


def test_what_is_half_removed_or_half_written_is_no_checkpoint(trained: Path, tmp_path: Path) -> None:
    folder = only(trained, tmp_path / "c", 4)
    dead = 2**22 + 1
    for name, ending in (("step-0000008", "gone"), ("step-0000009", "tmp")):
        shutil.copytree(trained / "step-0000009", folder / temporary_name(name, dead, ending))
    living = temporary_name("step-0000009", os.getppid(), "tmp")
    shutil.copytree(trained / "step-0000009", folder / living)
    (folder / f".notes.{dead}.tmp").write_text("of somebody else")
    assert [c.step for c in find_to_resume(folder).valid] == [4]
    left = [f".notes.{dead}.tmp", living, "step-0000004"]
    assert names(folder) == sorted(left), "a living process keeps what it works on"


def test_the_newest_is_the_highest_step_whatever_the_clock_says(trained: Path, tmp_path: Path) -> None:
    folder = only(trained, tmp_path / "c", 5, 6)
    for step, time in ((5, 2e9), (6, 1e9)):
        for path in (folder / f"step-{step:07}", *(folder / f"step-{step:07}").iterdir()):
            os.utime(path, (time, time))
    assert find(folder).valid[0].step == 6


def test_time_makes_a_checkpoint_due_too(start: MakeWork, tmp_path: Path) -> None:
    seldom = SaveConfig(save_every=1000, save_minutes=1e9)
    work = start(tmp_path / "steps", valid=())
    finish(work, seldom)
    assert steps(work.folder) == [9]
    work = start(tmp_path / "time", valid=())
    finish(work, replace(seldom, save_minutes=1e-9, keep=100))
    assert steps(work.folder) == list(range(1, 10))


# --- patience -----------------------------------------------------------------


def test_patience_stops_and_keeps_the_best(start: MakeWork, tmp_path: Path) -> None:
    settings = {
        "steps_per_eval": 1,
        "learning_rate": 0.3,
        "schedule": "constant",
        "iters": 1000,
        "patience": 3,
    }
    work = start(tmp_path / "c", **settings)
    events = finish(work, SaveConfig(save_every=1, keep=1, save_minutes=1e9))
    losses = [e.loss for e in events if isinstance(e, ValidReport)][1:]
    best = int(np.argmin(losses)) + 1
    assert len(losses) == best + 3 and work.training.stopped_early
    assert steps(work.folder) == [best, best + 3] and work.adapter_step == best
    held = mx.load(str(work.folder / f"step-{best:07}" / "adapter.safetensors"))
    mine = adapters.trainable(work.module)
    assert all(mx.array_equal(mine[name], tensor) for name, tensor in dict(held).items())
    reported = sum(1 for e in events if isinstance(e, TrainReport) and e.step == best + 3)
    assert reported == 1, "the last steps are told"

    # Going on from before the end stops at the same step with the same adapter.
    again = start(only(work.folder, tmp_path / "again", best), **settings)
    go_on(again)
    finish(again)
    assert again.adapter_step == best and state(again)[0] == state(work)[0]
    # Going on from the end does nothing, and has the best adapter in hand all the same.
    over = start(work.folder, **settings)
    assert go_on(over)[-1].startswith("nothing to do")
    (word,) = finish(over)
    assert isinstance(word, Note) and "is worse than before training" in word.text
    assert over.adapter_step == best and state(over)[0] == state(work)[0]


def test_validations_decide_when_there_is_patience(start: MakeWork, tmp_path: Path) -> None:
    work = start(tmp_path / "c", patience=5, iters=6)
    finish(work)
    with pytest.raises(SettingsChanged, match="steps_per_eval"):
        go_on(start(tmp_path / "c", patience=5, iters=6, steps_per_eval=1))
    with pytest.raises(ModelError, match="valid rows have changed"):
        go_on(start(tmp_path / "c", patience=5, iters=6, valid=VALID[:1]))


# --- what must not be saved ---------------------------------------------------


def poison_from(work: Work, step: int, value: float = math.nan) -> None:
    """Let the loss of the steps from ``step`` on be no number."""
    model: Any = work.module
    head = model.head

    def poisoned(hidden: mx.array) -> mx.array:
        logits: mx.array = head(hidden)
        return logits * value if work.training.step + 1 >= step and model.training else logits

    object.__setattr__(model, "head", poisoned)


@pytest.mark.parametrize("late", [False, True])
def test_a_loss_that_is_no_number_ends_with_the_last_sound_state_saved(
    start: MakeWork, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, late: bool
) -> None:
    monkeypatch.setattr(loop, "runs_ahead", lambda: late)
    whole = start(tmp_path / "whole", compile="off")
    finish(whole, LAST)
    work = start(tmp_path / "c", compile="off")
    poison_from(work, 6)
    with pytest.raises(
        DivergedError, match=r"loss of step 6 is not finite \(rows .*last finite loss \d"
    ) as caught:
        finish(work, SaveConfig(save_every=4, save_minutes=1e9))
    assert caught.value.exit_code == 7
    assert find(work.folder).valid[0].step == 5
    well = start(work.folder, compile="off")
    go_on(well)
    finish(well, LAST)
    assert state(well) == state(whole), "what was saved was not poisoned"


def test_steps_that_are_no_number_are_skipped_and_counted(start: MakeWork, tmp_path: Path) -> None:
    work = start(tmp_path / "c", on_nonfinite="skip", schedule="constant", steps_per_report=3)
    poison_from(work, 8)
    metrics = tmp_path / "m.jsonl"
    events = finish(work, LAST, metrics)
    reports = [e for e in events if isinstance(e, TrainReport)]
    assert [r.skipped for r in reports] == [0, 0, 2] and work.training.progress.skipped == 2
    assert math.isfinite(reports[-1].loss) and not math.isfinite(reports[-1].grad_norm)
    assert json.loads(metrics.read_text().splitlines()[-2])["grad_norm"] is None
    # Skipped steps change nothing.
    seven = start(tmp_path / "seven", schedule="constant", iters=7)
    finish(seven, LAST)
    assert state(work)[0] == state(seven)[0]


def test_an_optimizer_that_is_no_number_is_not_saved(start: MakeWork, tmp_path: Path) -> None:
    work = start(tmp_path / "c")
    work.training._optimizer.state["learning_rate"] = mx.array(math.inf)
    with pytest.raises(DivergedError, match="optimizer is not finite and was not saved: learning_rate"):
        work.checkpoints.check_state()


def test_a_validation_that_is_no_number_is_told_and_never_the_best(start: MakeWork, tmp_path: Path) -> None:
    work = start(tmp_path / "c", steps_per_eval=2, iters=6)
    model: Any = work.module
    head = model.head
    progress = lambda: work.training.progress.step  # noqa: E731
    object.__setattr__(
        model, "head", lambda h: head(h) * (math.nan if not model.training and progress() != 4 else 1.0)
    )
    metrics = tmp_path / "m.jsonl"
    events = finish(work, LAST, metrics)
    losses = {e.step: e.loss for e in events if isinstance(e, ValidReport)}
    assert [step for step, loss in losses.items() if math.isfinite(loss)] == [4]
    assert work.training.progress.best_step == 4
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert [line["loss"] for line in lines if line["kind"] == "valid"].count(None) == 3


def test_a_base_that_changes_is_found_out(start: MakeWork, tmp_path: Path) -> None:
    work = start(tmp_path / "c")
    model: Any = work.module
    weight = model.layers[0].attention.wq
    for event in work.train(replace(EVERY, save_every=3)):
        if isinstance(event, TrainReport):
            weight.weight[0, 0] += 1
            break
    with pytest.raises(PluginError, match=r"plugin lora.*: the base has changed.*layers\.0\.attention\.wq"):
        work.checkpoints.check_state()


# --- the log ------------------------------------------------------------------


def test_a_torn_log_is_mended_and_no_step_comes_twice(start: MakeWork, trained: Path, tmp_path: Path) -> None:
    metrics = tmp_path / "m.jsonl"
    finish(start(tmp_path / "whole"), LAST, metrics)
    want = untimed(metrics)
    lines = metrics.read_bytes().splitlines(keepends=True)
    metrics.write_bytes(b"".join(lines[:-1]) + lines[-1][:7])
    work = start(only(trained, tmp_path / "c", 4))
    go_on(work)
    finish(work, LAST, metrics)
    assert untimed(metrics) == want


@pytest.mark.parametrize(
    ("kept", "told"), [(0, "reports up to step 4 are not in"), (2, "which ends at step 1"), (None, "")]
)
def test_a_log_that_lacks_reports_is_told(
    start: MakeWork, trained: Path, tmp_path: Path, kept: int | None, told: str
) -> None:
    metrics = tmp_path / "m.jsonl"
    finish(start(tmp_path / "whole", steps_per_report=1), LAST, metrics)
    metrics.write_bytes(b"".join(metrics.read_bytes().splitlines(keepends=True)[:kept]))
    work = start(only(trained, tmp_path / "c", 4), steps_per_report=1)
    go_on(work)
    words = [event.text for event in finish(work, LAST, metrics) if isinstance(event, Note)]
    assert [told in word for word in words if "m.jsonl" in word] == ([True] if told else [])


def test_a_spike_is_told_and_is_the_same_when_replayed(start: MakeWork, tmp_path: Path) -> None:
    def spiking(folder: Path) -> Work:
        work = start(folder, iters=26, schedule="constant", valid=())
        model: Any = work.module
        head = model.head
        at = lambda: work.training.progress.step + 1  # noqa: E731
        object.__setattr__(model, "head", lambda h: head(h) * (400.0 if at() == 24 else 1.0))
        return work

    work = spiking(tmp_path / "c")
    (spike,) = [e for e in finish(work, replace(LAST, save_every=10, keep=9)) if isinstance(e, SpikeReport)]
    assert spike.step == 24 and spike.loss > 10 * spike.median
    again = spiking(only(work.folder, tmp_path / "again", 10))
    go_on(again)
    assert [e for e in finish(again, LAST) if isinstance(e, SpikeReport)] == [spike]


def test_every_error_here_is_one_of_ours() -> None:
    assert issubclass(SettingsChanged, MlxloraError)
