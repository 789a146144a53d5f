"""The observers ``tensorboard``, ``wandb`` and ``trackio``, beside what the suite says of all."""

from __future__ import annotations

import errno
import importlib.util
import os
import struct
from pathlib import Path
from typing import Any

import pytest

from mlxlora_core import plugins as registry
from mlxlora_core.errors import PluginError, UsageError
from mlxlora_core.options import parse
from mlxlora_core.runs.recipe import choose_beside
from mlxlora_core.series import RunInfo, Series, figures, flat_settings

SETTINGS = {"train": {"iters": 40, "rate": 0.5, "packed": True, "patience": None}, "adapter": {"on": ["a"]}}
FLAT = {"train.iters": 40, "train.rate": 0.5, "train.packed": True, "adapter.on": '["a"]'}
TRAIN = {"kind": "train", "step": 10, "loss": 2.5, "learning_rate": 1e-4, "padding": 0.25}


def start(name: str, folder: Path, **options: Any) -> Any:
    spec = registry.load(environ={registry.ALLOW_LIST: ""}).find("observer", name).spec
    return spec.start(RunInfo(folder, "a run", SETTINGS), parse(spec.options, options, owner=name))


@pytest.mark.parametrize(
    ("name", "module"), [("tensorboard", "tensorboardX"), ("wandb", "wandb"), ("trackio", "trackio")]
)
def test_without_its_library_one_line_says_what_to_install(
    name: str, module: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda asked: None if asked == module else True)
    with pytest.raises(PluginError) as told:
        choose_beside("observer", [name], {}, registry.load(environ={registry.ALLOW_LIST: ""}))
    assert "\n" not in str(told.value)
    assert f"needs {module}" in str(told.value) and f"pip install 'mlxlora[{name}]'" in str(told.value)


def test_settings_are_flat_and_numbers_are_numbers() -> None:
    assert flat_settings(SETTINGS) == FLAT
    assert figures({**TRAIN, "loss": None, "loss_is": "nan", "clipped": True}) == {
        "train/learning_rate": 1e-4,
        "train/padding": 0.25,
    }
    assert figures({"kind": "checkpoint_saved", "step": 3, "seconds": 0.1}) == {}


def test_a_series_goes_on_where_it_was(tmp_path: Path) -> None:
    first = Series(tmp_path / "s.json")
    first.begin(0)
    for step in (10, 20, 30):
        first.told({"kind": "train", "step": step})
    again = Series(tmp_path / "s.json")
    again.begin(20)
    assert again.resumed and again.run == first.run
    asked = [("train", 30), ("valid", 30), ("train", 40)]
    assert [again.is_new({"kind": kind, "step": step}) for kind, step in asked] == [False, True, True]
    anew = Series(tmp_path / "s.json")
    anew.begin(0)
    assert not anew.resumed and anew.run != first.run and anew.is_new({"kind": "train", "step": 10})
    (tmp_path / "s.json").write_text("[1]")
    with pytest.raises(UsageError, match="left alone"):
        Series(tmp_path / "s.json")


def test_tensorboard_has_the_settings(tmp_path: Path) -> None:
    pytest.importorskip("tensorboardX")
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    metadata = pytest.importorskip("tensorboard.plugins.hparams.metadata")
    watcher = start("tensorboard", tmp_path)
    watcher.event({"kind": "training_started", "step": 0})
    watcher.event(TRAIN)
    watcher.end("done")
    read = reader.EventAccumulator(str(tmp_path / "metrics.tensorboard")).Reload()
    content = read.summary_metadata[metadata.SESSION_START_INFO_TAG].plugin_data.content
    told = metadata.parse_session_start_info_plugin_data(content).hparams
    assert {key: getattr(v, v.WhichOneof("kind")) for key, v in told.items()} == FLAT
    assert [(e.step, e.value) for e in read.Scalars("train/loss")] == [(10, 2.5)]


def test_tensorboard_keeps_what_a_kill_has_torn_out_of_the_curve(tmp_path: Path) -> None:
    pytest.importorskip("tensorboardX")
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    first = start("tensorboard", tmp_path)
    first.event({"kind": "training_started", "step": 0})
    for step in (10, 20, 30):
        first.event({**TRAIN, "step": step})
    first.end("killed, for all that the file tells")
    (file,) = (tmp_path / "metrics.tensorboard").iterdir()
    with open(file, "ab") as torn:
        torn.write(struct.pack("<Q", 400) + b"half")
    again = start("tensorboard", tmp_path)
    again.event({"kind": "training_started", "step": 20})
    again.event({**TRAIN, "step": 30, "loss": 1.5})
    again.end("done")
    read = reader.EventAccumulator(str(tmp_path / "metrics.tensorboard")).Reload()
    assert [(e.step, e.value) for e in read.Scalars("train/loss")] == [(10, 2.5), (20, 2.5), (30, 1.5)]


def test_a_full_disk_is_raised_and_not_waited_for(tmp_path: Path) -> None:
    pytest.importorskip("tensorboardX")
    if not os.path.exists("/dev/full"):
        pytest.skip("needs /dev/full")
    watcher = start("tensorboard", tmp_path)
    watcher.event({"kind": "training_started", "step": 0})
    watcher._writer.close()
    with open("/dev/full", "wb", buffering=0) as full:
        watcher._writer._py_recordio_writer._writer = full
        with pytest.raises(OSError) as told:
            watcher.event(TRAIN)
    assert told.value.errno == errno.ENOSPC


def test_wandb_does_not_ask_who_one_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "config"))
    with pytest.raises(UsageError, match="nobody is logged in"):
        start("wandb", tmp_path, mode="online")
