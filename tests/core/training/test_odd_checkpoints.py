"""A checkpoint whose sums are right and whose JSON is odd is passed over, in words."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mlxlora_core.errors import ModelError
from mlxlora_core.training.checkpoints import digest, find
from mlxlora_core.training.progress import Progress, Window, read_progress

STATE: dict[str, Any] = {
    "step": 5,
    "trained_tokens": 700,
    "skipped": 0,
    "recent": [2.5, 2.25],
    "best_loss": None,
    "best_step": None,
    "worse": 0,
    "window": {"nats": 1.5, "tokens": 3, "steps": 1, "seconds": 0.5, "clipped": 0, "skipped": 0},
    "seed": 0,
    "resumed": [{"step": 2, "versions": {"mlx": "0.32"}}],
}
MANIFEST: dict[str, Any] = {
    "schema": 1,
    "step": 5,
    "finished": False,
    "base": "b",
    "tokenizer": "t",
    "data": {"train": "d"},
    "settings": {"patience": None, "targets": ["wq"], "learning_rate": 1e-3},
    "plugins": {"lora": {"distribution": "mlxlora", "version": "0.1.0"}},
    "versions": {"mlx": "0.32"},
}


def write(folder: Path, state: Any = STATE, manifest: Any = MANIFEST, raw: bytes | None = None) -> Path:
    """A checkpoint of step 5 whose sums are those of its files; ``raw`` is put in the place of its state."""
    place = folder / "step-0000005"
    place.mkdir(parents=True)
    contents = {"adapter.safetensors": b"a", "optimizer.safetensors": b"o"}
    contents["state.json"] = json.dumps(state).encode() if raw is None else raw
    files = {n: {"bytes": len(c), "sha256": hashlib.sha256(c).hexdigest()} for n, c in contents.items()}
    for name, content in contents.items():
        (place / name).write_bytes(content)
    whole = {"files": files, **manifest}
    (place / "MANIFEST.json").write_text(json.dumps({**whole, "sha256": digest(whole)}))
    return folder


def test_a_sound_one_is_read(tmp_path: Path) -> None:
    (found,) = find(write(tmp_path)).valid
    window = Window(1.5, 3, 1, 0.5, 0, 0)
    told = Progress(step=5, trained_tokens=700, recent=(2.5, 2.25), window=window)
    assert read_progress(found.state) == told  # and a state of before, without the first loss, as well
    losses = {"first_loss": 3.5, "train_loss": 2.5, "valid_loss": None}
    (found,) = find(write(tmp_path / "new", STATE | losses)).valid
    assert read_progress(found.state) == replace(told, **losses)


def test_keys_of_another_version_are_no_fault(tmp_path: Path) -> None:
    state = STATE | {"more": 1, "window": STATE["window"] | {"more": 2}}
    (found,) = find(write(tmp_path, state, MANIFEST | {"more": [1]})).valid
    assert read_progress(found.state).step == 5


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("recent", ["a"] * 20),
        ("recent", 5),
        ("recent", [1.0] * 21),
        ("recent", [None]),
        ("window", []),
        ("window", {"nats": 1.0}),
        ("window", STATE["window"] | {"nats": "x"}),
        ("window", STATE["window"] | {"tokens": 1.0}),
        ("window", STATE["window"] | {"clipped": -1}),
        ("best_loss", "abc"),
        ("best_step", 2.0),
        ("best_step", True),
        ("worse", -(10**9)),
        ("worse", "x"),
        ("trained_tokens", 2**63),
        ("skipped", [1]),
        ("resumed", "abc"),
        ("resumed", [5]),
        ("resumed", [{"step": 1, "versions": {"mlx": 5}}]),
        ("step", 5.0),
        ("step", True),
        ("step", 4),
        ("seed", None),
    ],
)
def test_an_odd_state(tmp_path: Path, key: str, value: object) -> None:
    found = find(write(tmp_path, STATE | {key: value}))
    ((_, reason),) = found.damaged.items()
    assert found.valid == () and "state.json is" in reason and reason.isprintable() and len(reason) < 400


@pytest.mark.parametrize("key", sorted(STATE))
def test_a_state_that_lacks_a_key(tmp_path: Path, key: str) -> None:
    state = {name: value for name, value in STATE.items() if name != key}
    assert list(find(write(tmp_path, state)).damaged.values()) == [
        f"state.json is not what mlxlora writes: lacks {key}"
    ]


@pytest.mark.parametrize(
    "raw",
    [
        b"[" * 200_000,
        b'{"a":' * 100 + b"1" + b"}" * 100,
        json.dumps(STATE).replace("700", "NaN").encode(),
        json.dumps(STATE).replace("2.25", "1e999").encode(),
        json.dumps(STATE).replace('"skipped": 0', '"skipped": 0, "skipped": 0').encode(),
        json.dumps(STATE).replace("700", "7" * 5000).encode(),
        b"\xff",
        b"null",
        b"5",
        b"",
        b" " * (17 << 20),
    ],
)
def test_a_state_that_is_no_json(tmp_path: Path, raw: bytes) -> None:
    found = find(write(tmp_path, raw=raw))
    assert found.valid == () and "state.json" in next(iter(found.damaged.values()))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("schema", -5),
        ("schema", 0),
        ("schema", 1.5),
        ("schema", True),
        ("schema", "1"),
        ("step", 5.0),
        ("step", -5),
        ("finished", 0),
        ("files", {}),
        ("files", {"state.json": 5}),
        ("base", None),
        ("tokenizer", 5),
        ("data", {"train": 5}),
        ("settings", []),
        ("settings", {"patience": 10**30}),
        ("plugins", {"x": 5}),
        ("plugins", {"x": {}}),
        ("plugins", {"x": {"distribution": "d", "version": None}}),
        ("versions", {"mlx": {"a": [1]}}),
    ],
)
def test_an_odd_manifest(tmp_path: Path, key: str, value: object) -> None:
    found = find(write(tmp_path, manifest=MANIFEST | {key: value}))
    assert found.valid == () and "MANIFEST.json is" in next(iter(found.damaged.values()))


@pytest.mark.parametrize("key", sorted(MANIFEST.keys() - {"tokenizer"}))
def test_a_manifest_that_lacks_a_key(tmp_path: Path, key: str) -> None:
    manifest = {name: value for name, value in MANIFEST.items() if name != key}
    assert find(write(tmp_path, manifest=manifest)).valid == ()


def test_a_schema_of_any_size_asks_for_an_upgrade(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"newer mlxlora .* a whole number of 3322 bits|newer mlxlora"):
        find(write(tmp_path, manifest=MANIFEST | {"schema": 10**1000}))


@pytest.mark.parametrize("file", ["MANIFEST.json", "state.json", "adapter.safetensors"])
@pytest.mark.parametrize("kind", ["pipe", "folder", "link", "nothing"])
def test_what_is_no_file_is_passed_over_at_once(tmp_path: Path, file: str, kind: str) -> None:
    path = write(tmp_path / "c") / "step-0000005" / file
    path.rename(tmp_path / "elsewhere")
    makers: dict[str, Callable[[], object]] = {
        "pipe": lambda: os.mkfifo(path),
        "folder": path.mkdir,
        "link": lambda: path.symlink_to(tmp_path / "elsewhere"),
        "nothing": lambda: None,
    }
    makers[kind]()
    found = find(tmp_path / "c")
    assert found.valid == () and file in next(iter(found.damaged.values()))
