"""Adapters written for PEFT and mlx-lm are opened again before they get a name: planted faults are found."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlxlora_mlx_lm.writing
import mlxlora_peft.writing
import pytest
from mlx.utils import tree_flatten
from safetensors.numpy import load_file

import mlxlora_core as mlxlora
from mlxlora_core.errors import ModelError, UsageError
from mlxlora_core.model import foreign_updates

ALL = {"targets": ("all-linear",), "layers": -1}


@pytest.fixture
def make(tiny_model: Path, tmp_path: Path) -> Callable[..., Path]:
    """An adapter file of the tiny model, none of whose parameters is where it started."""

    def file(adapter: str = "lora", **options: Any) -> Path:
        model = mlxlora.load(tiny_model).attach(adapter, **{**ALL, **options})
        mx.random.seed(5)
        module: Any = model.base.module
        trained = tree_flatten(module.trainable_parameters())
        module.load_weights([(n, t + 0.1 * mx.random.normal(t.shape)) for n, t in trained], strict=False)
        model.save_adapter(tmp_path / "a.safetensors")
        return tmp_path / "a.safetensors"

    return file


def export(model: Path, to: str, target: Path, adapter: Path, **options: Any) -> Any:
    return mlxlora.export(model, to, target, adapter_file=adapter, **options)


KINDS: dict[str, tuple[str, dict[str, Any], tuple[str, ...]]] = {
    "lora": ("lora", {}, ("peft", "mlx-lm-adapter")),
    "several ranks": ("lora", {"overrides": ("wq: rank=2, scale=5.0",)}, ("peft",)),
    "rslora": ("rslora", {"rank": 3}, ("peft", "mlx-lm-adapter")),
    "dora": ("dora", {"overrides": ()}, ("peft", "mlx-lm-adapter")),
    "dora of several ranks": ("dora", {"overrides": ("wk: rank=2, scale=5.0",)}, ("peft",)),
    "pissa": ("pissa", {"rank": 3}, ("peft", "mlx-lm-adapter")),
    "ia3": ("ia3", {"targets": ("wk", "wv", "w2")}, ("peft",)),
    "ia3 elsewhere": ("ia3", {"targets": ("wk", "w1"), "overrides": ("w1: scales=inputs",)}, ("peft",)),
    "vera": ("vera", {"rank": 9}, ("peft", "mlx-lm-adapter")),
    "embedding and head": (
        "lora",
        {"targets": ("embed_tokens", "lm_head", "wq")},
        ("peft", "mlx-lm-adapter"),
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_written_is_the_adapter(
    tiny_model: Path, make: Callable[..., Path], tmp_path: Path, kind: str
) -> None:
    adapter, options, exporters = KINDS[kind]
    file = make(adapter, **options)
    for to in exporters:
        report = export(tiny_model, to, tmp_path / to, file)
        assert report.adapter and report.tensors == 0
        assert "adapter_config.json" in report.files
        again = mlxlora.load(tiny_model, adapter_file=tmp_path / to)
        want = mlxlora.load(tiny_model, adapter_file=file)
        ids = mx.array([[1, 5, 9, 33, 200]])
        got, wanted = (m.base.language_model(ids) for m in (again, want))
        assert mx.abs(got - wanted).max() < 1e-4 * mx.abs(wanted).max()


def test_what_is_written_twice_is_the_same(
    tiny_model: Path, make: Callable[..., Path], tmp_path: Path
) -> None:
    """Read as an adapter of PEFT or mlx-lm and written once more, not a bit differs."""
    file = make()
    for to, name in (("peft", "adapter_model.safetensors"), ("mlx-lm-adapter", "adapters.safetensors")):
        export(tiny_model, to, tmp_path / to, file)
        export(tiny_model, to, tmp_path / f"{to} again", tmp_path / to)
        one, two = (load_file(tmp_path / folder / name) for folder in (to, f"{to} again"))
        assert one.keys() == two.keys() and all((one[n] == two[n]).all() for n in one)
        one, two = (
            json.loads((tmp_path / folder / "adapter_config.json").read_text())
            for folder in (to, f"{to} again")
        )
        assert one == two


def rows_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        foreign_updates, "_rows", lambda place, outputs: [(place.start or 0) + i for i in range(outputs)]
    )


def alpha_without_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """The scale written as alpha, as if it were not divided by the rank there."""
    config = mlxlora_peft.writing._lora_config

    def wrong(adapter: Any, updates: Any, *, rooted: bool) -> Any:
        told = config(adapter, updates, rooted=rooted)
        return {**told, "lora_alpha": told["lora_alpha"] / told["r"]}

    monkeypatch.setattr(mlxlora_peft.writing, "_lora_config", wrong)


def root_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    config = mlxlora_peft.writing._lora_config
    monkeypatch.setattr(
        mlxlora_peft.writing,
        "_lora_config",
        lambda *given, **named: {**config(*given, **named), "use_rslora": False},
    )


def scale_of_mlx_lm(monkeypatch: pytest.MonkeyPatch) -> None:
    """The scale as alpha is elsewhere."""
    one_size = mlxlora_mlx_lm.writing._one_size

    def wrong(kind: str, updates: Any) -> tuple[int, float]:
        rank, scale = one_size(kind, updates)
        return rank, scale * rank

    monkeypatch.setattr(mlxlora_mlx_lm.writing, "_one_size", wrong)


def magnitudes_left_out_of_order(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = mlxlora_peft.writing.vectors_there
    monkeypatch.setattr(
        mlxlora_peft.writing,
        "vectors_there",
        lambda *given: {path: vector[::-1] for path, vector in vectors(*given).items()},
    )


def factors_on_the_other_side(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of inputs among those of outputs; the linear is square."""
    monkeypatch.setattr(mlxlora_peft.writing, "_scales_inputs", lambda adapter, path: path.endswith("wo"))


PLANTED: dict[str, tuple[Any, str, str, dict[str, Any]]] = {
    "no order of rows for PEFT": (rows_left_out, "peft", "lora", {}),
    "no order of rows for mlx-lm": (rows_left_out, "mlx-lm-adapter", "lora", {}),
    "no order of magnitudes": (magnitudes_left_out_of_order, "peft", "dora", {}),
    "alpha without the rank": (alpha_without_rank, "peft", "lora", {}),
    "no root of the rank": (root_forgotten, "peft", "rslora", {}),
    "alpha for a scale": (scale_of_mlx_lm, "mlx-lm-adapter", "lora", {}),
    "factors on the other side": (factors_on_the_other_side, "peft", "ia3", {"targets": ("wo", "wk")}),
}


@pytest.mark.parametrize("fault", PLANTED)
def test_planted_faults_are_found_before_anybody_sees_the_files(
    tiny_model: Path, make: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    plant, to, adapter, options = PLANTED[fault]
    file = make(adapter, **options)
    plant(monkeypatch)
    with pytest.raises(ModelError, match="has written another model, which was not kept"):
        export(tiny_model, to, tmp_path / "out", file)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.safetensors"]


def test_an_exporter_of_adapters_needs_one(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="writes an adapter alone, and none is named"):
        mlxlora.export(tiny_model, "peft", tmp_path / "out")
