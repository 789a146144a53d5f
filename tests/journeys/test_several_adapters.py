"""Several adapters, as a user has them: listed, switched, mixed, by row, and fused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

import mlxlora_core
from mlxlora_core.errors import UsageError

Command = Callable[..., Any]
IDS = [[1, 5, 7, 9], [1, 8, 8, 2]]


@pytest.fixture
def folder(tmp_path: Path, tiny_model: Path, tiny_data: Path) -> Path:
    """A folder with a model and two adapters that were trained on it."""
    shutil.copytree(tiny_model, tmp_path / "model")
    for seed, rank in ((1, 2), (2, 4)):
        model = mlxlora_core.load(tmp_path / "model").attach("lora", rank=rank, scale=8.0, seed=seed)
        options: dict[str, Any] = {"iters": 6, "learning_rate": 1e-2, "steps_per_eval": 3}
        for _ in mlxlora_core.train(
            model, tiny_data, adapter_file=tmp_path / f"rank{rank}.safetensors", **options
        ):
            pass
    return tmp_path


def test_they_are_listed_with_what_they_are_and_fit(mlxlora: Command, folder: Path, tiny_model: Path) -> None:
    other = shutil.copytree(folder / "model", folder / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "rope_theta": 20000.0}))
    (folder / "broken.safetensors").write_bytes((folder / "rank4.safetensors").read_bytes()[:700])
    done = mlxlora("adapters", folder, "--model", folder / "model", "--model", other, "--json")
    assert done.code == 0, done.err
    found = {Path(one["path"]).relative_to(folder).as_posix(): one for one in json.loads(done.out)}
    assert {"rank2.safetensors", "rank4.safetensors"} <= found.keys()
    assert not any(name.startswith(("model/", "other/")) for name in found), (
        "weights of a model are no adapter"
    )
    one = found["rank4.safetensors"]
    assert (one["adapter"], one["rank"], one["step"], one["fault"]) == ("lora:lora", 4, 6, "")
    assert one["loss"] > 0 and one["linears"] > 0
    assert one["fits"] == {str(folder / "model"): "yes", str(other): "same linears"}
    checkpoints = [one for name, one in found.items() if name.startswith("rank4.checkpoints/")]
    assert checkpoints and all(one["step"] <= 6 for one in checkpoints)
    shown = mlxlora("adapters", folder / "rank2.safetensors").out.splitlines()
    assert len(shown) == 2 and "lora:lora" in shown[1]
    told = mlxlora("adapters", folder / "model" / "model.safetensors").out
    assert "is no adapter that is known here" in told
    nothing = mlxlora("adapters", folder / "absent")
    assert nothing.code == 4 and "there is no such file or folder" in nothing.err
    assert mlxlora("adapters", folder / "model").out == ""


def test_python_switches_mixes_and_takes_them_by_row(folder: Path) -> None:
    model = mlxlora_core.load(folder / "model")
    base = model.logits(IDS)
    for name in ("rank2", "rank4"):
        model.load_adapter(folder / f"{name}.safetensors", name=name)
    assert model.adapters == ("rank2", "rank4") and "rank2, rank4" in repr(model)
    assert mx.array_equal(model.logits(IDS), base), "none is in use before it is selected"
    alone = {}
    for name in model.adapters:
        alone[name] = mlxlora_core.load(folder / "model", adapter_file=folder / f"{name}.safetensors").logits(
            IDS
        )
        assert mx.array_equal(model.select(name).logits(IDS), alone[name])
    mixed = model.select(["rank4", "rank2"]).logits(IDS)
    for row, name in enumerate(("rank4", "rank2")):
        assert float(mx.abs(mixed[row] - alone[name][row]).max()) <= 1e-5
        assert float(mx.abs(mixed[row] - base[row]).max()) > 1e-3
    assert mlxlora_core.generate(
        model.select("rank2"), "A layer", num_tokens=5, temp=0
    ) == mlxlora_core.generate(
        mlxlora_core.load(folder / "model", adapter_file=folder / "rank2.safetensors"),
        "A layer",
        num_tokens=5,
        temp=0,
    )
    mlxlora_core.fuse(
        folder / "model",
        [folder / "rank2.safetensors", folder / "rank4.safetensors"],
        folder / "fused",
        adapter_weights=[0.5, 2],
    )
    want = model.select({"rank2": 0.5, "rank4": 2}).logits(IDS)
    assert float(mx.abs(mlxlora_core.load(folder / "fused").logits(IDS) - want).max()) <= 1e-4
    asked = [{"prompt": f"A layer {n}", "completion": "x"} for n in range(4)]
    said = [
        answer.text for answer, _ in mlxlora_core.score(model, asked, "exact-match", num_tokens=5).answers
    ]
    assert said == [mlxlora_core.generate(model, row["prompt"], num_tokens=5, temp=0) for row in asked]
    assert mx.array_equal(model.select(None).logits(IDS), base)


def test_the_verb_fuses_several(mlxlora: Command, folder: Path) -> None:
    files = ("--adapter-file", folder / "rank2.safetensors", "--adapter-file", folder / "rank4.safetensors")
    done = mlxlora(
        "fuse", "--model", folder / "model", *files, "--adapter-weight", 0.5, "--adapter-weight", 2,
        "--save-path", folder / "verb",
    )  # fmt: skip
    assert done.code == 0, done.err
    paths = [folder / "rank2.safetensors", folder / "rank4.safetensors"]
    mlxlora_core.fuse(folder / "model", paths, folder / "python", adapter_weights=[0.5, 2])
    names = [path.name for path in (folder / "verb").iterdir()]
    assert all((folder / "verb" / n).read_bytes() == (folder / "python" / n).read_bytes() for n in names)
    wrong = mlxlora(
        "fuse", "--model", folder / "model", *files, "--adapter-weight", 1, "--save-path", folder / "w"
    )
    assert wrong.code == 2 and "1 weights are given for 2 adapter files" in wrong.err
    both = mlxlora(
        "fuse",
        "--model",
        folder / "model",
        *files,
        "--dequantize",
        "--search-group-size",
        "--save-path",
        folder / "w",
    )
    assert both.code == 2 and not (folder / "w").exists()


def test_what_python_refuses(folder: Path) -> None:
    model = mlxlora_core.load(folder / "model")
    with pytest.raises(UsageError, match="no named adapter is on the model"):
        model.select("rank2")
    model.load_adapter(folder / "rank2.safetensors", name="rank2")
    with pytest.raises(UsageError, match=r"named adapters are on the model already \(rank2\)"):
        model.load_adapter(folder / "rank4.safetensors")
    with pytest.raises(UsageError, match="adapters with a name do not train"):
        list(mlxlora_core.train(model, [{"text": "a"}]))
    with pytest.raises(UsageError, match="rows of one length"):
        model.logits([[1, 2], [1]])
    with pytest.raises(UsageError, match="token id -1"):
        model.logits([[-1]])
    with pytest.raises(UsageError, match="selected for 3 rows, this batch has 2"):
        model.select(["rank2", None, None]).logits(IDS)
    with pytest.raises(UsageError, match="adapters are selected for each row of a batch"):
        mlxlora_core.score(model, [{"prompt": "A", "completion": "b"}], "exact-match")
