"""The base of a run by every way to name it: what a recipe keeps of the name, and where it leads."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from mlxlora_core import plugins
from mlxlora_core.errors import ModelError
from mlxlora_core.runs.base import base_of, pinned, source
from mlxlora_core.runs.recipe import ModelConfig, Recipe
from mlxlora_core.runs.recipe_source import read

REGISTRY = plugins.load(environ={plugins.ALLOW_LIST: ""})
REST = '[data]\nuse = "jsonl"\noptions = { path = "rows" }\n[adapter]\nuse = "lora"\n'


@pytest.fixture
def acme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A distribution that ships a model."""
    site = tmp_path / "site"
    (site / "acme_models-1.2.dist-info").mkdir(parents=True)
    (site / "acme_models-1.2.dist-info" / "METADATA").write_text("Name: acme-models\nVersion: 1.2\n")
    (site / "acme_models-1.2.dist-info" / "RECORD").write_text("acme/small.gguf,,\n")
    (site / "acme").mkdir()
    (site / "acme" / "small.gguf").write_bytes(b"GGUF")
    monkeypatch.syspath_prepend(str(site))
    return site / "acme" / "small.gguf"


def recipe(folder: Path, model: str, *sets: str) -> Recipe:
    path = folder / "mine.toml"
    path.write_text(f"[model]\n{model}\n{REST}")
    return read(path, sets, REGISTRY)


@pytest.mark.parametrize(
    ("written", "kept"),
    [
        ("package:acme-models/small.gguf", "package:acme-models/small.gguf"),
        ("org/name", "org/name"),
        ("org/name@c0ffee", "org/name@c0ffee"),
        ("./org/name", "{folder}/org/name"),
        ("here/model", "{folder}/here/model"),
        ("model", "{folder}/model"),
        ("../model", "{above}/model"),
    ],
)
@pytest.mark.parametrize("key", ["mlx_path", "torch_path"])
def test_paths_are_rooted_and_names_are_kept(tmp_path: Path, key: str, written: str, kept: str) -> None:
    (tmp_path / "here").mkdir()
    got = recipe(tmp_path, f'{key} = "{written}"')
    assert source(got.model) == kept.format(folder=tmp_path, above=tmp_path.parent)
    other = "torch_path" if key == "mlx_path" else "mlx_path"
    assert getattr(got.model, other) is None


def test_other_paths_are_rooted_whatever_they_look_like(tmp_path: Path) -> None:
    got = recipe(tmp_path, 'mlx_path = "m"', "data.path=org/name")
    assert got.data.options.path == Path("org/name").absolute()


def test_a_shipped_model_is_found_and_named_exactly(acme: Path, tmp_path: Path) -> None:
    got = recipe(tmp_path, 'mlx_path = "package:acme-models/.gguf"')
    exact, notes = pinned(got)
    assert source(exact.model) == "package:acme-models/acme/small.gguf" and notes == []
    assert base_of(exact, tmp_path / "converted") == (acme, None)
    assert exact.values()["model"]["mlx_path"] == "package:acme-models/acme/small.gguf"
    model = ModelConfig(torch_path=Path("package:acme-models/small.gguf"))
    quantized = recipe(tmp_path, 'mlx_path = "package:acme-models/.gguf"', "quantize.use=affine")
    assert base_of(quantized, tmp_path / "converted") == (acme, quantized.quantization)
    assert quantized.quantization is not None
    converted = replace(quantized, model=model)  # in which the bits are already
    assert base_of(converted, tmp_path / "converted") == (tmp_path / "converted", None)
    with pytest.raises(ModelError, match="no such file"):
        pinned(recipe(tmp_path, 'mlx_path = "package:acme-models/other.gguf"'))
