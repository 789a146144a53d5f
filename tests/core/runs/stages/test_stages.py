"""What each stage says of itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from mlxlora_core.plugins import Registry
from mlxlora_core.runs.recipe import Recipe
from mlxlora_core.runs.recipe_source import read
from mlxlora_core.runs.stages import STAGES
from mlxlora_core.runs.stages.after import AfterStage
from mlxlora_core.runs.stages.before import BeforeStage
from mlxlora_core.runs.stages.data import DataStage
from mlxlora_core.runs.stages.export import ExportStage
from mlxlora_core.runs.stages.model import ModelStage
from mlxlora_core.runs.stages.train import TrainStage

FOLDER = Path(__file__).parents[4] / "mlxlora_core" / "runs" / "stages"


@pytest.fixture
def recipe(tmp_path: Path, tiny_checkpoint: Path, tiny_data: Path, registry: Registry) -> Recipe:
    values: dict[str, Any] = {
        "model": {"torch_path": str(tiny_checkpoint)},
        "data": {"use": "jsonl", "options": {"path": str(tiny_data)}},
    }
    (tmp_path / "recipe.toml").write_text(tomli_w.dumps(values))
    return read(tmp_path / "recipe.toml", (), registry)


def test_each_stage_has_a_file_of_its_name_and_builds_on_those_before() -> None:
    known: list[str] = []
    for stage in STAGES:
        assert (FOLDER / f"{stage.name}.py").is_file()
        assert type(stage).__module__.endswith(f".stages.{stage.name}")
        assert set(stage.builds_on) <= set(known)
        known.append(stage.name)
    assert known == ["model", "data", "before", "train", "after", "export"]


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.name)
def test_inputs_are_values_that_a_fingerprint_can_be_made_of(stage: Any, recipe: Recipe) -> None:
    inputs = stage.inputs(recipe)
    assert inputs and json.dumps(inputs, default=str) == json.dumps(stage.inputs(recipe), default=str)


def test_a_model_folder_that_is_there_is_named() -> None:
    assert ModelStage().words({"folder": "llama"}) == ["uses llama"]


def test_the_words_of_the_rows_tell_what_was_skipped() -> None:
    rows = {"train": 3, "valid": 1, "test": 2}
    assert DataStage().words({"rows": rows, "skipped": []}) == ["3 train, 1 valid, 2 test rows"]
    assert DataStage().words({"rows": rows, "skipped": [{}]}) == ["3 train, 1 valid, 2 test rows, 1 skipped"]


def test_the_words_of_training_tell_the_best_step() -> None:
    assert TrainStage().words({"steps": 9, "adapter_step": 9}) == ["9 steps"]
    assert TrainStage().words({"steps": 9, "adapter_step": 6}) == [
        "9 steps; the adapter is that of step 6, the best"
    ]


def test_an_export_is_wanted_where_an_exporter_is_named(
    recipe: Recipe, registry: Registry, tmp_path: Path
) -> None:
    path = tmp_path / "named.toml"
    path.write_text(tomli_w.dumps(recipe.values() | {"export": {"use": "npz"}}))
    named = read(path, (), registry)
    assert [ExportStage().wanted(r) for r in (recipe, named)] == [False, True]
    assert ExportStage().inputs(named) != ExportStage().inputs(read(path, ["export.dtype=float32"], registry))


def test_every_file_of_an_export_is_its_output(tmp_path: Path) -> None:
    assert ExportStage().outputs(tmp_path) == []
    (tmp_path / "export" / "deep").mkdir(parents=True)
    for name in ("export.json", "deep/model"):
        (tmp_path / "export" / name).touch()
    assert ExportStage().outputs(tmp_path) == ["export/deep/model", "export/export.json"]


def test_the_words_of_an_export_tell_what_is_in_it_and_what_the_check_found() -> None:
    result = {"path": "out", "parameters": 2_000_000, "exporter": "npz:npz", "files": {"a": 1500000}}
    assert ExportStage().words({**result, "adapter": "", "check": None}) == [
        "out: 2.000 M parameters, by npz:npz, 1 file of 1.5 MB; not checked, for no plugin reads this form"
    ]
    check = {"exact": 9, "rounded": 0, "largest_rounding": 0.0, "tokens": 43, "distance": 1.23e-6}
    check |= {"largest_difference": 2e-5, "same_argmax": 1.0}
    fused = {**result, "adapter": "lora:lora", "files": {"a": 1, "b": 2}}
    assert ExportStage().words({**fused, "check": check}) == [
        "out: 2.000 M parameters, with lora:lora fused in, by npz:npz, 2 files of 0.0 MB; "
        "opened again: all 9 tensors as they were; logits of 43 tokens are 1.2e-06 of their size "
        "from those of the model in memory, the largest difference is 2e-05"
    ]
    rounded = check | {"rounded": 3, "largest_rounding": 0.0031}
    (words,) = ExportStage().words({**fused, "parameters": 0, "check": rounded})
    assert "out: lora:lora alone, by npz:npz" in words
    assert "3 of 12 updates rounded, by 0.0031 of their size at most" in words


@pytest.mark.parametrize("stage", [BeforeStage(), AfterStage()])
def test_the_words_of_measuring_are_the_losses(stage: Any) -> None:
    assert stage.words({"losses": {"test": {"loss": 1.25}}, "answers": []}) == ["test loss 1.2500"]


def test_what_was_written_is_what_the_folder_holds(tmp_path: Path) -> None:
    assert ModelStage().outputs(tmp_path) == DataStage().outputs(tmp_path) == []
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").touch()
    assert ModelStage().outputs(tmp_path) == ["model/config.json"]
    assert TrainStage().outputs(tmp_path) == ["adapter/adapter.safetensors", "metrics.jsonl"]
