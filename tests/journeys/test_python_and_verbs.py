"""Python and the command line do the same work: to the bit, to the letter, and in silence."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

import mlxlora_core
from mlxlora_core.errors import DataError, LockedError, ModelError, SafetyError, SettingsChanged, UsageError
from mlxlora_core.files import tensor_file
from mlxlora_core.training.events import CheckpointSaved, Note
from mlxlora_core.training.settings import SaveConfig

Command = Callable[..., Any]

TRAINING: dict[str, Any] = {
    "iters": 8,
    "batch_size": 4,
    "learning_rate": 1e-2,
    "steps_per_report": 2,
    "steps_per_eval": 4,
    "save_every": 3,
}
PROMPT = "A layer"


@pytest.fixture
def model(tmp_path: Path, tiny_model: Path) -> Path:
    """A model folder of one's own."""
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


def attached(folder: Path, seed: int = 7) -> mlxlora_core.Model:
    return mlxlora_core.load(folder).attach("lora", rank=4, layers=1, seed=seed)


def by_verb(mlxlora: Command, model: Path, data: Path, adapter: Path, *more: object) -> dict[str, Any]:
    """Train with these options on the command line; its result."""
    files = ("--model", model, "--data", data, "--adapter-file", adapter)
    chosen = ("--lora-layers", 1, "--set", "adapter.rank=4", "--seed", 7)
    flags = (part for name, value in TRAINING.items() for part in ("--" + name.replace("_", "-"), value))
    done = mlxlora("train", *files, *chosen, *flags, "--json", *more)
    assert done.code == 0, done.err
    result: dict[str, Any] = json.loads(done.out)
    return result


def by_python(model: mlxlora_core.Model, data: Any, adapter: Path, **more: Any) -> list[Any]:
    """Train with these options in Python; its events."""
    return list(mlxlora_core.train(model, data, seed=7, adapter_file=adapter, **TRAINING | more))


def rows(data: Path, split: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (data / f"{split}.jsonl").read_text().splitlines()]


def manifests(folder: Path) -> list[Any]:
    """What the checkpoints of a training say of it, without the times."""
    return [json.loads(path.read_text()) for path in sorted(folder.glob("step-*/*.json"))]


# --- training -----------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["safetensors", "npz"])
def test_training_leaves_the_same_files(
    mlxlora: Command, model: Path, tiny_data: Path, tmp_path: Path, suffix: str
) -> None:
    verb, python = tmp_path / f"verb.{suffix}", tmp_path / f"python.{suffix}"
    result = by_verb(mlxlora, model, tiny_data, verb, "--metrics-file", tmp_path / "verb.jsonl")
    events = by_python(attached(model), tiny_data, python, metrics_file=tmp_path / "python.jsonl")
    assert python.read_bytes() == verb.read_bytes(), "tensors and what is said of them"
    assert json.loads(json.dumps(asdict(events[-1]))).items() <= result.items()
    logs = [
        [
            [line[key] for key in ("kind", "step", "loss")]
            for line in map(json.loads, path.read_text().splitlines())
        ]
        for path in (tmp_path / "verb.jsonl", tmp_path / "python.jsonl")
    ]
    assert logs[0] == logs[1] and len(logs[0]) == 7
    held = manifests(tmp_path / "verb.checkpoints")
    assert [state["seed"] for state in held if "seed" in state] == [7, 7]
    kept = [
        [m["data"] for m in manifests(tmp_path / f"{n}.checkpoints") if "data" in m]
        for n in ("verb", "python")
    ]
    assert kept[0] == kept[1] and kept[0][0].keys() == {"train", "valid"}, (
        "the test rows are nobody's business"
    )


def test_an_adapter_that_is_kept_by_hand_is_the_same_but_for_its_training(
    mlxlora: Command, model: Path, tiny_data: Path, tmp_path: Path
) -> None:
    by_verb(mlxlora, model, tiny_data, tmp_path / "verb.safetensors")
    ours = attached(model)
    unsaved = {name: value for name, value in TRAINING.items() if name != "save_every"}
    list(mlxlora_core.train(ours, tiny_data, seed=7, **unsaved))
    ours.save_adapter(tmp_path / "hand.safetensors")
    hand, verb = (tensor_file.load(tmp_path / f"{name}.safetensors")[1] for name in ("hand", "verb"))
    assert hand[tensor_file.FINGERPRINT] == verb[tensor_file.FINGERPRINT]
    said = json.loads(verb["mlxlora"])
    assert said.pop("training")["step"] == TRAINING["iters"]
    assert json.loads(hand["mlxlora"]) == said
    assert not (tmp_path / "hand.checkpoints").exists()


@pytest.mark.parametrize("which", ["attach", "train"])
def test_another_seed_is_another_adapter(model: Path, tiny_data: Path, tmp_path: Path, which: str) -> None:
    """The one of the values that it begins with, and the one of the order of rows, both count."""
    by_python(attached(model), tiny_data, tmp_path / "a.npz")
    other = attached(model, seed=8 if which == "attach" else 7)
    seed = 8 if which == "train" else 7
    list(mlxlora_core.train(other, tiny_data, seed=seed, adapter_file=tmp_path / "b.npz", **TRAINING))
    assert (tmp_path / "a.npz").read_bytes() != (tmp_path / "b.npz").read_bytes()


def test_rows_in_lists_train_as_their_folder_does(model: Path, tiny_data: Path, tmp_path: Path) -> None:
    by_python(attached(model), tiny_data, tmp_path / "folder.npz")
    splits = {split: rows(tiny_data, split) for split in ("train", "valid", "test")}
    by_python(attached(model), splits, tmp_path / "lists.npz")
    assert (tmp_path / "lists.npz").read_bytes() == (tmp_path / "folder.npz").read_bytes()
    events = by_python(attached(model), (row for row in splits["train"]), tmp_path / "rows.npz")
    assert events[-1].valid_loss is None and events[-1].rows == 40
    held = [tensor_file.load(tmp_path / f"{name}.npz")[1] for name in ("rows", "folder")]
    assert held[0][tensor_file.FINGERPRINT] == held[1][tensor_file.FINGERPRINT], (
        "validation changes no tensor"
    )


def test_an_adapter_file_is_trained_on_as_the_verb_does(
    mlxlora: Command, model: Path, tiny_data: Path, tmp_path: Path
) -> None:
    first = tmp_path / "first.safetensors"
    by_verb(mlxlora, model, tiny_data, first)
    by_verb(mlxlora, model, tiny_data, tmp_path / "verb.npz", "--resume-adapter-file", first)
    by_python(mlxlora_core.load(model).load_adapter(first), tiny_data, tmp_path / "python.npz")
    assert (tmp_path / "python.npz").read_bytes() == (tmp_path / "verb.npz").read_bytes()


def test_a_second_training_goes_on_from_the_first(model: Path, tiny_data: Path, tmp_path: Path) -> None:
    twice = attached(model)
    by_python(twice, tiny_data, tmp_path / "a.safetensors")
    by_python(twice, tiny_data, tmp_path / "b.npz")
    again = mlxlora_core.load(model, adapter_file=tmp_path / "a.safetensors")
    by_python(again, tiny_data, tmp_path / "c.npz")
    assert (tmp_path / "b.npz").read_bytes() == (tmp_path / "c.npz").read_bytes()


def test_text_between_two_steps_changes_nothing(model: Path, tiny_data: Path, tmp_path: Path) -> None:
    by_python(attached(model), tiny_data, tmp_path / "quiet.npz")
    ours = attached(model)
    said = [
        (mlxlora_core.generate(ours, PROMPT, num_tokens=4, temp=1.0), mlxlora_core.evaluate(ours, tiny_data))
        for _ in mlxlora_core.train(ours, tiny_data, seed=7, adapter_file=tmp_path / "talks.npz", **TRAINING)
    ]
    assert len({loss.nats for _, loss in said}) > 3, "the model changes as it is trained"
    assert (tmp_path / "talks.npz").read_bytes() == (tmp_path / "quiet.npz").read_bytes()


# --- saving and going on ------------------------------------------------------


def test_a_training_that_is_left_goes_on_exactly(model: Path, tiny_data: Path, tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole.safetensors", tmp_path / "broken.safetensors"
    by_python(attached(model), tiny_data, whole)
    for event in mlxlora_core.train(attached(model), tiny_data, seed=7, adapter_file=broken, **TRAINING):
        if isinstance(event, CheckpointSaved):
            break
    assert not broken.exists()
    with pytest.raises(SafetyError, match="has not ended"):
        by_python(attached(model), tiny_data, broken)
    with pytest.raises(SettingsChanged, match="batch_size 4 -> 2"):
        by_python(attached(model), tiny_data, broken, resume=True, batch_size=2)
    events = by_python(attached(model), tiny_data, broken, resume=True)
    assert "resumed at step 3 of 8" in [event.text for event in events if isinstance(event, Note)]
    assert broken.read_bytes() == whole.read_bytes()


def test_the_verb_goes_on_with_what_python_began(
    mlxlora: Command, model: Path, tiny_data: Path, tmp_path: Path
) -> None:
    by_verb(mlxlora, model, tiny_data, tmp_path / "whole.npz")
    begun = mlxlora_core.train(
        attached(model), tiny_data, seed=7, adapter_file=tmp_path / "begun.npz", **TRAINING
    )
    next(event for event in begun if isinstance(event, CheckpointSaved))
    with pytest.raises(LockedError, match="is in use by process"):
        by_python(attached(model), tiny_data, tmp_path / "begun.npz")
    begun.close()
    by_verb(mlxlora, model, tiny_data, tmp_path / "begun.npz", "--resume")
    assert (tmp_path / "begun.npz").read_bytes() == (tmp_path / "whole.npz").read_bytes()


def test_overwrite_begins_anew(model: Path, tiny_data: Path, tmp_path: Path) -> None:
    by_python(attached(model), tiny_data, tmp_path / "whole.npz")
    begun = mlxlora_core.train(attached(model), tiny_data, adapter_file=tmp_path / "a.npz", **TRAINING)
    next(event for event in begun if isinstance(event, CheckpointSaved))
    del begun  # forgotten is as good as closed
    by_python(attached(model), tiny_data, tmp_path / "a.npz", overwrite=True)
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "whole.npz").read_bytes()


@pytest.mark.parametrize("needless", [{"save_every": 2}, {"keep": 1}, {"save_minutes": 1}, {"resume": True}])
def test_what_is_said_of_saving_needs_a_file(model: Path, tiny_data: Path, needless: Any) -> None:
    with pytest.raises(
        UsageError, match=f"without adapter_file nothing is saved, and {next(iter(needless))}"
    ):
        mlxlora_core.train(attached(model), tiny_data, **needless)
    assert SaveConfig.__dataclass_fields__.keys() == {"save_every", "save_minutes", "keep"}


# --- measuring and generating -------------------------------------------------


@pytest.fixture
def tuned(mlxlora: Command, model: Path, tiny_data: Path, tmp_path: Path) -> Path:
    by_verb(mlxlora, model, tiny_data, tmp_path / "tuned.safetensors")
    return tmp_path / "tuned.safetensors"


def test_losses_are_those_of_evaluate(mlxlora: Command, model: Path, tiny_data: Path, tuned: Path) -> None:
    on_base = ("--model", model, "--data", tiny_data, "--batch-size", 3)
    verb = json.loads(mlxlora("evaluate", *on_base, "--adapter-file", tuned, "--json").out)
    with_adapter = mlxlora_core.load(model, adapter_file=tuned)
    loss = mlxlora_core.evaluate(with_adapter, tiny_data, batch_size=3)
    assert (loss.mean, loss.perplexity, loss.tokens) == (verb["loss"], verb["perplexity"], verb["tokens"])
    assert mlxlora_core.evaluate(with_adapter, rows(tiny_data, "test"), batch_size=3) == loss
    some = json.loads(mlxlora("evaluate", *on_base, "--test-batches", 1, "--json").out)
    bare = mlxlora_core.evaluate(mlxlora_core.load(model), tiny_data, batch_size=3, test_batches=1)
    assert (bare.mean, bare.tokens) == (some["loss"], some["tokens"])
    assert mlxlora_core.evaluate(with_adapter, tiny_data, split="valid") != loss


@pytest.mark.parametrize(
    ("options", "more"),
    [
        ({}, ()),
        ({"temp": 0}, ("--temp", 0)),
        ({"temp": 1.5, "seed": 3}, ("--temp", 1.5, "--seed", 3)),
        (
            {"sampler": "repetition-penalty,top-p", "p": 0.9, "penalty": 1.5},
            (
                "--sampler",
                "repetition-penalty,top-p",
                "--set",
                "sampler.p=0.9",
                "--set",
                "sampler.penalty=1.5",
            ),
        ),
    ],
)
def test_text_is_that_of_generate(
    mlxlora: Command, model: Path, tuned: Path, options: dict[str, Any], more: tuple[object, ...]
) -> None:
    on_base = ("--model", model, "--adapter-file", tuned, "-p", PROMPT, "-n", 12)
    verb = json.loads(mlxlora("generate", *on_base, *more, "--json").out)
    ours = mlxlora_core.load(model, adapter_file=tuned)
    assert mlxlora_core.generate(ours, PROMPT, num_tokens=12, **options) == verb["text"]
    segments = list(mlxlora_core.stream(ours, PROMPT, num_tokens=12, write_every=5, **options))
    assert "".join(segment.text for segment in segments) == verb["text"]
    assert [segment.finish for segment in segments][-1] == verb["finish"]
    assert len(segments) > 2


@pytest.mark.parametrize(
    ("evaluator", "options", "more"),
    [
        ("exact-match", {}, ("--evaluator", "exact-match")),
        (
            {"use": ["regex", "token-f1"], "pattern": "e", "form": "space"},
            {"sampler": "top-k", "k": 20, "temp": 1.5, "seed": 5, "score_rows": 3},
            (
                *("--evaluator", "regex", "--evaluator", "token-f1", "--set", "evaluator.pattern=e"),
                *("--set", "evaluator.form=space", "--sampler", "top-k", "--set", "sampler.k=20"),
                *("--set", "sampler.temp=1.5", "--seed", 5, "--score-rows", 3),
            ),
        ),
    ],
)
def test_scores_are_those_of_evaluate(
    mlxlora: Command, model: Path, tuned: Path, tmp_path: Path, evaluator: Any, options: Any, more: Any
) -> None:
    pairs = [{"prompt": f"A layer {n}", "completion": " scales."} for n in range(7)]
    data = tmp_path / "test.jsonl"
    data.write_text("".join(f"{json.dumps(row)}\n" for row in (*pairs, {"text": "asks nothing"})))
    on_base = ("--model", model, "--adapter-file", tuned, "--data", data, "-n", 9)
    verb = json.loads(mlxlora("evaluate", *on_base, *more, "--json").out)
    ours = mlxlora_core.load(model, adapter_file=tuned)
    found = mlxlora_core.score(ours, data, evaluator, num_tokens=9, **options)
    assert found.means == {name: score["score"] for name, score in verb["scores"].items()}
    said = [(answer.prompt, answer.text, answer.ended, scores) for answer, scores in found.answers]
    assert said == [
        tuple(one[key] for key in ("prompt", "text", "ended", "scores")) for one in verb["answers"]
    ]
    assert found.notes == ("warning: 1 of 8 test rows ask nothing and are not scored",)
    how = {"sampler": "greedy", **options}
    how.pop("score_rows", None)
    for prompt, text, *_ in said[:3]:
        assert mlxlora_core.generate(ours, prompt, num_tokens=9, **how) == text


def test_fuse_writes_the_folder_of_the_verb(
    mlxlora: Command, model: Path, tuned: Path, tmp_path: Path
) -> None:
    on_base = ("--model", model, "--adapter-file", tuned, "--save-path", tmp_path / "verb")
    verb = json.loads(mlxlora("fuse", *on_base, "--json").out)
    report = mlxlora_core.fuse(model, tuned, tmp_path / "python", adapter="lora", rank=4)
    assert json.loads(json.dumps(asdict(report))) | {"folder": None} == verb | {"folder": None}
    folders = [{p.name: p.read_bytes() for p in (tmp_path / n).iterdir()} for n in ("verb", "python")]
    assert folders[0] == folders[1]
    with pytest.raises(SafetyError):
        mlxlora_core.fuse(model, tuned, tmp_path / "python")
    with pytest.raises(ModelError, match="rank is 4, wanted 8"):
        mlxlora_core.fuse(model, tuned, tmp_path / "other", rank=8)


def test_export_writes_the_folder_of_the_verb(
    mlxlora: Command, model: Path, tuned: Path, tmp_path: Path
) -> None:
    on_base = ("--model", model, "--adapter-file", tuned, "--to", "npz", "--out", tmp_path / "verb")
    verb = json.loads(mlxlora("export", *on_base, "--json").out)
    report = mlxlora_core.export(model, "npz", tmp_path / "python", adapter_file=tuned)
    assert asdict(report).keys() == verb.keys()
    folders = [{p.name: p.read_bytes() for p in (tmp_path / n).iterdir()} for n in ("verb", "python")]
    assert folders[0] == folders[1]
    with pytest.raises(UsageError, match="has no option 'bits'"):
        mlxlora_core.export(model, "npz", tmp_path / "other", bits=4)


# --- a whole recipe -----------------------------------------------------------

RECIPE = """
[run]
folder = "{folder}"

[model]
mlx_path = "{model}"

[data]
use = "jsonl"
options = {{ path = "{data}" }}

[train]
iters = 4
batch_size = 4

[generate]
prompts = ["A layer"]
num_tokens = 4
"""


def test_run_does_what_the_verb_does_and_once_only(
    mlxlora: Command, model: Path, tiny_data: Path, tmp_path: Path
) -> None:
    made = {}
    for name in ("verb", "python"):
        recipe = tmp_path / f"{name}.toml"
        recipe.write_text(RECIPE.format(folder=tmp_path / name, model=model, data=tiny_data))
        if name == "verb":
            assert mlxlora("run", recipe, "--set", "train.iters=3").code == 0
        else:
            events = list(mlxlora_core.run(recipe, sets=["train.iters=3"]))
        made[name] = (tmp_path / name / "adapter" / "adapter.safetensors").read_bytes()
    assert made["python"] == made["verb"]
    done = [event.stage for event in events if type(event).__name__ == "StageDone"]
    again = list(mlxlora_core.run(tmp_path / "python.toml", sets=["train.iters=3"]))
    skipped = [event.stage for event in again if getattr(event, "skipped", False)]
    assert done == skipped and "train" in done


# --- silence ------------------------------------------------------------------


def test_nothing_is_printed(
    model: Path, tiny_data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(RECIPE.format(folder=tmp_path / "run", model=model, data=tiny_data))
    capfd.readouterr()
    ours = attached(model)
    by_python(ours, tiny_data, tmp_path / "a.npz", metrics_file=tmp_path / "m.jsonl")
    mlxlora_core.evaluate(ours, tiny_data)
    mlxlora_core.generate(ours, PROMPT, num_tokens=4)
    mlxlora_core.score(ours, [{"prompt": PROMPT, "completion": "x"}, {"text": "y"}], "token-f1", num_tokens=4)
    mlxlora_core.fuse(model, tmp_path / "a.npz", tmp_path / "fused")
    list(mlxlora_core.run(recipe, sets=["train.iters=2"]))
    for wrong in ([], [{"text": ""}], tmp_path / "nowhere"):
        with pytest.raises(DataError):
            list(mlxlora_core.train(ours, wrong, iters=1))
    assert mlxlora_core.registry().find("sampler", "top-p")
    assert capfd.readouterr() == ("", "")
