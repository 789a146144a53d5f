"""The Python interface: what it checks, what it leaves behind, and what a type checker says to it."""

from __future__ import annotations

import gc
import inspect
import os
import re
import signal
import subprocess
import sys
import typing
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import files
from pathlib import Path
from typing import Any

import pytest

import mlxlora_core as mlxlora
from mlxlora_core import python
from mlxlora_core.errors import (
    DataError,
    LockedError,
    MlxloraError,
    ModelError,
    PluginError,
    ResourceError,
    UsageError,
)
from mlxlora_core.options import explain
from mlxlora_core.training import settings
from mlxlora_core.training.events import Note, TrainReport, TrainResult

PAIRS = [{"prompt": "A layer", "completion": " scales."}]
ROWS = [{"text": text} for text in ("A layer scales the weights.", "The adapter keeps its inputs.")] * 4
ENDING = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
BASIC: dict[str, Any] = {"iters": 6, "batch_size": 2, "learning_rate": 0.02, "steps_per_report": 1}


@pytest.fixture
def bare(model_folder: Callable[..., Path]) -> mlxlora.Model:
    return mlxlora.load(model_folder())


@pytest.fixture
def model(bare: mlxlora.Model) -> mlxlora.Model:
    return bare.attach("lora", rank=2, layers=1)


def handlers() -> list[Any]:
    return [signal.getsignal(number) for number in ENDING]


# --- options ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("written", "configs"),
    [
        (settings.BatchOptions, [settings.BatchConfig]),
        (settings.TrainOptions, [settings.TrainConfig, settings.SaveConfig]),
    ],
)
def test_what_a_type_checker_is_told_is_what_there_is(written: Any, configs: list[Any]) -> None:
    known = {option.name: option.type for config in configs for option in explain(config)}
    assert typing.get_type_hints(written) == known
    assert written.__required_keys__ == frozenset()


@pytest.mark.parametrize(
    ("function", "config", "names"),
    [
        (python.evaluate, settings.EvaluateConfig, ["test_batches"]),
        (python.score, settings.AnswerConfig, ["score_rows", "num_tokens"]),
        (python.stream, settings.GenerateConfig, ["chat", "system", "num_tokens", "write_every"]),
    ],
)
def test_defaults_are_those_of_the_verbs(function: Any, config: Any, names: list[str]) -> None:
    known = {option.name: option.default for option in explain(config)}
    assert list(known) == names
    assert {name: inspect.signature(function).parameters[name].default for name in names} == known


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"iter": 3}, "train has no option 'iter' (did you mean 'iters'? it has batch_size, "),
        ({"save_ever": 3}, "did you mean 'save_every'?"),
        ({"iters": 0}, "train: iters: must be at least 1, got 0"),
        ({"iters": "many"}, "train: iters: wanted a whole number, got 'many'"),
        ({"iters": 5, "warmup": 5}, "train: warmup must be less than iters (5), got 5"),
        ({"keep": 0}, "train: keep: must be at least 1, got 0"),
        ({"seed": -1}, "train: seed: must be at least 0 and at most 4294967295, got -1"),
        ({"seed": 2**32}, "got 4294967296"),
        ({"seed": 1.5}, "train: seed: wanted a whole number, got 1.5"),
        ({"resume": True, "overwrite": True}, "give one of them"),
        ({"patience": 2}, "patience needs rows to validate on"),
    ],
)
def test_what_is_wrong_with_a_training_is_told(model: mlxlora.Model, options: Any, words: str) -> None:
    with pytest.raises(UsageError) as caught:
        list(mlxlora.train(model, ROWS, **options))
    assert words in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda m: m.attach("lora", seed=-1), UsageError, "attach: seed: must be at least 0"),
        (lambda m: m.attach("lora", ranks=4), UsageError, "did you mean 'rank'?"),
        (lambda m: m.attach("lora", layers=0), UsageError, "layers must be -1 or at least 1"),
        (lambda m: m.attach("lora", targets=["wx"]), UsageError, "matches no linear"),
        (lambda m: m.attach("lara"), PluginError, "did you mean 'lora'?"),
        (
            lambda m: m.save_adapter("a.npz"),
            UsageError,
            "no adapter is on the model. Fix: put one on it: model.",
        ),
        (lambda m: mlxlora.train(m, ROWS), UsageError, "no adapter is on the model"),
        (
            lambda m: mlxlora.evaluate(m, ROWS, test_batches=0),
            UsageError,
            "evaluate: test_batches must be -1",
        ),
        (lambda m: mlxlora.evaluate(m, ROWS, batchsize=2), UsageError, "did you mean 'batch_size'?"),
        (lambda m: mlxlora.evaluate(m, ROWS, split="tset"), UsageError, "did you mean 'test'?"),
        (
            lambda m: mlxlora.evaluate(m, Path("nowhere")),
            DataError,
            "nowhere: there is no such file or folder",
        ),
        (lambda m: mlxlora.evaluate(m, [{"txt": "x"}]), DataError, "test row 1: needs text"),
        (lambda m: mlxlora.evaluate(m, "x", split="valid"), DataError, "x: there is no such file"),
        (
            lambda m: mlxlora.generate(m, ["A", "B"]),
            UsageError,
            "prompt: wanted text, or messages of role and content, got list",
        ),
        (lambda m: mlxlora.generate(m, "A", seed=-1), UsageError, "generate: seed: must be at least 0"),
        (
            lambda m: mlxlora.generate(m, "A", num_tokens=0),
            UsageError,
            "generate: num_tokens: must be at least 1",
        ),
        (lambda m: mlxlora.generate(m, "A", num_token=3), UsageError, "has no option 'num_token'"),
        (lambda m: mlxlora.generate(m, "A", sampler="top-q"), PluginError, "did you mean 'top-p'?"),
        (
            lambda m: mlxlora.generate(m, "A" * 5000, num_tokens=1, max_seq=2),
            UsageError,
            "no option 'max_seq'",
        ),
        (lambda m: mlxlora.score(m, PAIRS, "exact"), PluginError, "did you mean 'exact-match'?"),
        (lambda m: mlxlora.score(m, PAIRS, ["regex", "command"]), UsageError, "regex has no pattern"),
        (
            lambda m: mlxlora.score(m, PAIRS, {"use": "exact-match", "from": "words"}),
            UsageError,
            "did you mean 'form'?",
        ),
        (lambda m: mlxlora.score(m, PAIRS, []), UsageError, "score: evaluator: wanted a name, several"),
        (lambda m: mlxlora.score(m, PAIRS, {"form": "words"}), UsageError, "with use, got {'form'"),
        (lambda m: mlxlora.score(m, PAIRS, 7), UsageError, "got 7. Fix: name one: score("),
        (lambda m: mlxlora.score(m, PAIRS, "exact-match", score_rows=0), UsageError, "score: score_rows: "),
        (lambda m: mlxlora.score(m, PAIRS, "exact-match", seed=-1), UsageError, "score: seed: must be"),
        (lambda m: mlxlora.score(m, PAIRS, "exact-match", top_p=0.9), UsageError, "but sampler names greedy"),
        (lambda m: mlxlora.score(m, ROWS, "exact-match"), DataError, "asks anything"),
        (lambda m: mlxlora.load("nowhere"), ModelError, "nowhere"),
        (
            lambda m: mlxlora.load(m.folder, plugins="demo"),
            UsageError,
            "plugins: wanted a list of texts, got 'demo'",
        ),
        (lambda m: mlxlora.load(m.folder, plugins=["no-such"]), UsageError, "no-such"),
        (lambda m: mlxlora.load(m.folder, adapter_file="no.npz"), ModelError, "no.npz"),
        (lambda m: mlxlora.fuse(m.folder, "no.npz", "out"), ModelError, "no.npz"),
        (lambda m: mlxlora.export(m.folder, "nzp", "new/out"), PluginError, "did you mean 'npz'?"),
        (lambda m: mlxlora.export(m.folder, "npz", "new/out", bits=4), UsageError, "has no option 'bits'"),
    ],
)
def test_what_is_wrong_is_one_line_of_the_documented_tree(
    bare: mlxlora.Model,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    call: Callable[[mlxlora.Model], Any],
    error: type[MlxloraError],
    words: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error) as caught:
        call(bare)
    assert words in str(caught.value) and "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == [], "nothing is left behind"


# --- a model ------------------------------------------------------------------


def test_a_model_says_what_it_is(bare: mlxlora.Model) -> None:
    assert bare.adapter is None and repr(bare).endswith("adapter none>")
    assert bare.attach("lora", rank=2) is bare
    assert bare.adapter == "lora" and repr(bare) == f"<mlxlora model {str(bare.folder)!r}, adapter lora>"
    assert bare.config["vocab_size"] == 320 and bare.note == ""


def test_a_second_adapter_is_refused(model: mlxlora.Model, tmp_path: Path) -> None:
    model.save_adapter(tmp_path / "a.npz")
    with pytest.raises(UsageError, match=r"'lora' is on the model already\. Fix: load the model anew"):
        model.attach("lora")
    with pytest.raises(UsageError, match="on the model already"):
        model.load_adapter(tmp_path / "a.npz")


def test_a_refused_adapter_leaves_the_model_bare(bare: mlxlora.Model, tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        bare.attach("lora", targets=["wx"])
    assert bare.adapter is None and bare.attach("lora").adapter == "lora"


def test_an_adapter_is_saved_where_its_name_says_a_format(model: mlxlora.Model, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"wanted \.safetensors or \.npz"):
        model.save_adapter(tmp_path / "new" / "a.bin")
    assert not (tmp_path / "new").exists()


def test_another_adapter_than_the_one_in_a_file_is_refused(model: mlxlora.Model, tmp_path: Path) -> None:
    model.save_adapter(tmp_path / "a.npz")
    other = mlxlora.load(model.folder)
    with pytest.raises(ModelError, match="rank is 2, wanted 3"):
        other.load_adapter(tmp_path / "a.npz", rank=3)
    assert other.adapter is None
    assert other.load_adapter(tmp_path / "a.npz", "lora", rank=2).adapter == "lora"


# --- a training that is left, stopped, or elsewhere ---------------------------


def begun(model: mlxlora.Model, folder: Path) -> Any:
    """A training that has made two steps, and holds its lock and the signals."""
    events = mlxlora.train(model, ROWS, adapter_file=folder / "a.npz", **BASIC)
    next(event for event in events if isinstance(event, TrainReport) and event.step == 2)
    assert (folder / ".a.npz.lock").exists()
    return events


def test_nothing_happens_before_the_first_event(model: mlxlora.Model, tmp_path: Path) -> None:
    before = handlers()
    events = mlxlora.train(model, ROWS, adapter_file=tmp_path / "new" / "a.npz", **BASIC)
    assert handlers() == before and not (tmp_path / "new").exists()
    events.close()


@pytest.mark.parametrize("how", ["close", "forget", "break"])
def test_a_training_that_is_left_gives_everything_back(
    model: mlxlora.Model, tmp_path: Path, how: str
) -> None:
    before = handlers()
    events = begun(model, tmp_path)
    assert all(now is not then for now, then in zip(handlers(), before, strict=True))
    with pytest.raises(LockedError):
        model.save_adapter(tmp_path / "a.npz")
    if how == "close":
        events.close()
    elif how == "break":
        loop = events
        del events
        for _ in loop:
            break
        del loop
    else:
        del events
        gc.collect()
    assert handlers() == before
    model.save_adapter(tmp_path / "a.npz")
    assert not (tmp_path / ".a.npz.lock").exists()
    assert isinstance(list(mlxlora.train(model, ROWS, **BASIC))[-1], TrainResult)


def test_an_error_in_the_loop_is_the_users_own(model: mlxlora.Model, tmp_path: Path) -> None:
    before = handlers()
    with pytest.raises(MemoryError, match="mine"):
        for _ in mlxlora.train(model, ROWS, adapter_file=tmp_path / "a.npz", **BASIC):
            raise MemoryError("mine")
    gc.collect()
    assert handlers() == before


@pytest.mark.parametrize(
    ("number", "raised", "words"),
    [
        (signal.SIGINT, KeyboardInterrupt, "interrupted; step 1 is saved. Go on with: train(…, resume=True)"),
        (signal.SIGTERM, SystemExit, "143"),
        (signal.SIGHUP, SystemExit, "129"),
    ],
)
def test_a_signal_ends_the_step_saves_and_raises(
    model: mlxlora.Model, tmp_path: Path, number: int, raised: type[BaseException], words: str
) -> None:
    before, after = handlers(), []
    with pytest.raises(raised) as caught:
        for event in mlxlora.train(model, ROWS, adapter_file=tmp_path / "a.npz", **BASIC):
            after.append(event)
            if isinstance(event, TrainReport) and event.step == 1:
                os.kill(os.getpid(), number)
    assert str(caught.value) == words
    assert handlers() == before
    assert [event.step for event in after if isinstance(event, TrainReport)] == [1]
    again = mlxlora.load(model.folder).attach("lora", rank=2, layers=1)
    events = list(mlxlora.train(again, ROWS, adapter_file=tmp_path / "a.npz", resume=True, **BASIC))
    assert "resumed at step 1 of 6" in [event.text for event in events if isinstance(event, Note)]


def test_a_second_ctrl_c_raises_at_once(model: mlxlora.Model, tmp_path: Path) -> None:
    """A notebook lives on."""
    before, seen = handlers(), []
    with pytest.raises(KeyboardInterrupt):
        for event in mlxlora.train(model, ROWS, adapter_file=tmp_path / "a.npz", **BASIC):
            if isinstance(event, TrainReport):
                os.kill(os.getpid(), signal.SIGINT)
                seen.append("first")
                os.kill(os.getpid(), signal.SIGINT)
                seen.append("second")
    gc.collect()
    assert seen == ["first"] and handlers() == before
    model.save_adapter(tmp_path / "a.npz")


def test_without_a_file_ctrl_c_says_that_nothing_is_saved(model: mlxlora.Model) -> None:
    with pytest.raises(KeyboardInterrupt, match="interrupted at step 1; nothing was saved"):
        for event in mlxlora.train(model, ROWS, **BASIC):
            if isinstance(event, TrainReport):
                os.kill(os.getpid(), signal.SIGINT)


def elsewhere(work: Callable[[], Any]) -> Any:
    """What ``work`` gives, done in another thread."""
    with ThreadPoolExecutor(1) as threads:
        return threads.submit(work).result()


@pytest.mark.parametrize("made", ["here", "there"])
@pytest.mark.parametrize(
    "kind", [{}, {"bits": 4}, {"dtype": "float16"}], ids=["float32", "4 bits", "float16"]
)
def test_a_training_in_another_thread_is_the_same(
    model_folder: Callable[..., Path], tmp_path: Path, made: str, kind: dict[str, Any]
) -> None:
    folder = model_folder(**kind)

    def make() -> mlxlora.Model:
        return mlxlora.load(folder).attach("lora", rank=2, layers=1)

    def work(model: mlxlora.Model, name: str) -> tuple[Any, float, str]:
        last = list(mlxlora.train(model, ROWS, adapter_file=tmp_path / name, **BASIC | {"batch_size": 4}))[-1]
        loss = mlxlora.evaluate(model, ROWS).mean
        return last, loss, mlxlora.generate(model, "A layer", num_tokens=3, temp=0)

    main, other = make(), make() if made == "here" else elsewhere(make)
    expected = work(main, "main.npz")
    assert elsewhere(lambda: work(other, "thread.npz")) == expected
    assert (tmp_path / "thread.npz").read_bytes() == (tmp_path / "main.npz").read_bytes()
    assert mlxlora.evaluate(other, ROWS).mean == expected[1]


# --- faults of the machine and of plugins -------------------------------------


def test_too_little_memory_is_a_resource_error(model: mlxlora.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlxlora_core.training import evaluation

    def full(*_: object) -> None:
        raise RuntimeError("[malloc] Unable to allocate 8 bytes.")

    monkeypatch.setattr(evaluation, "evaluate", full)
    with pytest.raises(ResourceError, match="there is not enough memory"):
        mlxlora.evaluate(model, ROWS)


PLUGIN = """
from mlxlora_core.api import Sampler, hookimpl

def _build(options):
    return lambda logits, tokens: 1 / 0

@hookimpl
def mlxlora_samplers():
    return [Sampler(name="broken", summary="divides by zero", build=_build)]
"""


def test_a_fault_of_a_plugin_names_it(model_folder: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text(PLUGIN)
    model = mlxlora.load(model_folder(), plugins=[str(tmp_path / "broken.py")])
    with pytest.raises(PluginError, match=r"plugin broken .* failed: ZeroDivisionError"):
        mlxlora.generate(model, "A", sampler="broken")


def test_a_plugin_in_a_file_is_read_anew(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(PLUGIN)
    named = [str(tmp_path / "mine.py")]
    assert python.registry(named).find("sampler", "broken").spec.summary == "divides by zero"
    (tmp_path / "mine.py").write_text(PLUGIN.replace("divides", "still divides"))
    assert python.registry(named).find("sampler", "broken").spec.summary == "still divides by zero"


def test_registry_tells_what_there_is() -> None:
    found = mlxlora.registry()
    assert {"lora", "torch", "samplers"} <= {plugin.name for plugin in found.plugins}
    assert "greedy" in {component.spec.name for component in found.of("sampler")}


# --- types and imports --------------------------------------------------------

SCRIPT = """
import mlxlora_core as mlxlora

model = mlxlora.load("model-folder")
model.attach("lora", rank=16, layers=8)
for report in mlxlora.train(model, "data-folder", iters=200, learning_rate=1e-4):
    print(report)
    if isinstance(report, mlxlora.TrainReport | mlxlora.ValidReport):
        loss: float = report.loss
print(mlxlora.evaluate(model, "data-folder", split="test").perplexity)
text: str = mlxlora.generate(model, "Q: What is ReLU in mlx?\\nA:", temp=0, num_tokens=60)
model.save_adapter("relu.safetensors")

rows = [{"text": "a row"}]
training = mlxlora.train(model, rows, adapter_file="a.npz", resume=True, grad_clip=None)
training.close()
list(mlxlora.train(model, {"train": rows, "valid": rows}, patience=3))
print(mlxlora.evaluate(model, rows, batch_size=2).mean)
mean: float = mlxlora.score(model, rows, {"use": "regex", "pattern": "x"}, num_tokens=3).means["regex"]
for answer, scores in mlxlora.score(model, rows, "exact-match", sampler="top-p", p=0.9).answers:
    print(answer.text, scores["exact-match"])
for segment in mlxlora.stream(model, "Q", sampler="top-p", p=0.9):
    print(segment.text, segment.finish)
again = mlxlora.load("model-folder", adapter_file="a.npz", plugins=["no:demo"]).adapter
distance: float = mlxlora.fuse("model-folder", "a.npz", "fused", overwrite=True).distance
for event in mlxlora.run("recipe.toml", sets=["train.iters=10"]):
    print(event)
print([component.spec.name for component in mlxlora.registry().of("sampler")])
try:
    mlxlora.load("nowhere")
except mlxlora.errors.MlxloraError as fault:
    print(fault, fault.exit_code)
"""

WRONG = """
import mlxlora_core as mlxlora

model = mlxlora.load(7)
list(mlxlora.train(model, "data", iter=3))
list(mlxlora.train(model, "data", iters="many"))
mlxlora.trian(model)
"""


def checked(tmp_path: Path, source: str) -> str:
    """What mypy says to a user's script, outside of this project."""
    (tmp_path / "script.py").write_text(source)
    (tmp_path / "mypy.ini").write_text("[mypy]\n")
    command = [sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent", "script.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.stderr == ""
    return done.stdout


def test_a_users_script_passes_the_type_checker(tmp_path: Path) -> None:
    assert checked(tmp_path, SCRIPT) == "Success: no issues found in 1 source file\n"
    page = (Path(__file__).parents[2] / "docs" / "python.md").read_text("utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    assert checked(tmp_path, "\n".join(blocks)) == "Success: no issues found in 1 source file\n"
    lines = checked(tmp_path, WRONG).splitlines()
    assert [line.split(":")[1] for line in lines if ": error: " in line] == ["4", "5", "6", "7"]


def test_the_mark_of_a_typed_package_is_shipped() -> None:
    marker = Path(mlxlora.__file__).with_name("py.typed")
    assert marker.is_file()
    listed = [str(file) for file in files("mlxlora") or []]
    editable = any(name.endswith(".pth") for name in listed)
    assert editable or "mlxlora_core/py.typed" in listed


def run(program: str) -> Iterator[str]:
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    yield from done.stdout.split()


def test_importing_it_imports_nothing_else() -> None:
    program = "import sys; before = set(sys.modules); import mlxlora_core; print(*set(sys.modules) - before)"
    assert set(run(program)) <= {"mlxlora_core", "mlxlora_core.version", "__future__"}


def test_no_public_name_is_that_of_a_module() -> None:
    """Python would put the module in its place as soon as somebody imports it."""
    inside = {path.stem for path in Path(mlxlora.__file__).parent.iterdir()}
    assert inside & set(mlxlora.__all__) == {"errors"}


def test_every_public_name_is_there_when_it_is_asked_for() -> None:
    for name in mlxlora.__all__:
        (kind,) = run(f"import mlxlora_core as m; print(type(m.{name}).__name__)")
        assert kind == ("module" if name == "errors" else kind) and kind in {
            "function",
            "type",
            "module",
            "str",
        }
    assert mlxlora.__all__ == sorted(mlxlora.__all__) and set(mlxlora.__all__) <= set(dir(mlxlora))
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        mlxlora.trian  # noqa: B018 - looking at it is the test
