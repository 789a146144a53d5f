"""``mlxlora chat`` on a real terminal and in a pipe, on a small model with a chat template."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
import small_models
from mlx.utils import tree_map
from terminals import ALT_ENTER, BACKSPACE, CTRL_A, CTRL_C, CTRL_D, CTRL_Z, LEFT, TAB, UP, Terminal

import mlxlora_core
from mlxlora_core.cli.chat_history import KEPT, HistoryFile, place_of
from mlxlora_core.cli.model import adapter_names
from mlxlora_core.errors import UsageError

Command = Callable[..., Any]

#: says one letter for good: four a second, or as fast as it goes
SLOW = """
import time

from mlxlora_core.api import Sampler, hookimpl


def build(seconds):
    import mlx.core as mx

    def transform(logits, tokens):
        time.sleep(seconds)
        return mx.where(mx.arange(logits.shape[-1]) == 50, 0.0, mx.full(logits.shape, -mx.inf))

    return transform


@hookimpl
def mlxlora_samplers():
    return [
        Sampler(name="slow", summary="says one letter for good", build=lambda options: build(0.25)),
        Sampler(name="fast", summary="says one letter for good", build=lambda options: build(0)),
    ]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model and two adapters that change it."""
    folder = tmp_path_factory.mktemp("chat")
    small_models.write(folder / "model", "llama")
    for seed, name in enumerate(("first", "second")):
        model = mlxlora_core.load(folder / "model").attach("lora", rank=2, scale=8.0, seed=seed)
        mx.random.seed(seed)
        made = model.base.module.trainable_parameters()
        model.base.module.update(tree_map(lambda x: 0.3 * mx.random.normal(x.shape), made))
        model.save_adapter(folder / f"{name}.safetensors")
    (folder / "slow.py").write_text(SLOW)
    return folder


@pytest.fixture
def chat(folder: Path, tmp_path: Path) -> Iterator[Callable[..., Terminal]]:
    """Begins a conversation on a terminal, with a history of its own; ends those that go on."""
    begun: list[Terminal] = []

    def begin(*more: object, ready: bool = True, **variables: str) -> Terminal:
        # On the working folder's own adapters nothing here depends.
        model = ("--model", folder / "model", "-n", 6, "--temp", 0)
        state = str(tmp_path / "state")
        begun.append(Terminal("chat", *model, *more, cwd=tmp_path, XDG_STATE_HOME=state, **variables))
        if ready:
            begun[-1].ready()
        return begun[-1]

    yield begin
    for terminal in begun:
        if terminal.process.poll() is None:
            terminal.process.kill()
            terminal.process.wait()


def said(terminal: Terminal, path: Path) -> list[dict[str, str]]:
    """What was said so far, as /save writes it."""
    terminal.say(f"/save {path}")
    terminal.until("written: ")
    terminal.ready()
    (row,) = path.read_text("utf-8").splitlines()
    messages: list[dict[str, str]] = json.loads(row)["messages"]
    return messages


def asked(terminal: Terminal, path: Path) -> list[str]:
    """The questions so far."""
    return [message["content"] for message in said(terminal, path) if message["role"] == "user"]


# --- on a terminal ------------------------------------------------------------


def test_lines_are_edited_and_come_back(chat: Callable[..., Terminal], tmp_path: Path) -> None:
    terminal = chat()
    terminal.press("he weighs" + BACKSPACE + "ts" + CTRL_A + "T")
    terminal.until_shown("> The weights")
    terminal.press("\r")
    assert "tokens in" in terminal.until("tokens/s")
    terminal.ready()
    terminal.press(UP + " of a layer" + LEFT * 5 + "tiny ")
    terminal.until_shown("The weights of a tiny layer")
    terminal.press("\r")
    terminal.until("tokens/s")
    terminal.ready()
    assert asked(terminal, tmp_path / "talk.jsonl") == ["The weights", "The weights of a tiny layer"]
    terminal.press(CTRL_D)
    assert terminal.end() == 0
    again = chat()
    again.press(UP + UP)  # beyond /save
    again.until_shown("> The weights of a tiny layer")
    again.press(CTRL_C + CTRL_D)
    assert again.end() == 0
    (history,) = (tmp_path / "state").rglob("*history")
    assert history.stat().st_mode & 0o777 == 0o600 and history.parent.stat().st_mode & 0o777 == 0o700


def test_no_history_is_kept_where_none_is_wanted(chat: Callable[..., Terminal], tmp_path: Path) -> None:
    terminal = chat("--no-history")
    terminal.say("a secret")
    terminal.until("tokens/s")
    terminal.ready()
    terminal.say("/quit")
    assert terminal.end() == 0
    assert not (tmp_path / "state").exists()


def test_a_history_that_cannot_be_kept_is_told_and_no_more(
    chat: Callable[..., Terminal], tmp_path: Path
) -> None:
    (tmp_path / "state").write_text("no folder")
    terminal = chat()
    assert "warning: no history is kept: " in terminal.written
    terminal.say("Hello")
    terminal.until("tokens/s")
    terminal.ready()
    terminal.press(UP)
    terminal.until_shown("> Hello")
    terminal.press(CTRL_C + CTRL_D)
    assert terminal.end() == 0


def test_wide_letters_emoji_and_a_window_of_another_size(
    chat: Callable[..., Terminal], tmp_path: Path
) -> None:
    terminal = chat()
    terminal.press("漢字かな 한국어 🙂 " * 6)
    terminal.until_shown("漢字かな 한국어 🙂 漢字かな")
    terminal.resize(30, 12)
    terminal.press("語x" + BACKSPACE + "é👩\u200d🔬")
    terminal.until_shown("語é")
    lines = [line for line in terminal.shown.splitlines() if "漢" in line]
    assert len(lines) > 3, "the line is broken anew for the narrow window"
    terminal.resize(100, 30)
    terminal.press(BACKSPACE * 3 + "!\r")
    terminal.until("tokens/s")
    terminal.ready()
    assert asked(terminal, tmp_path / "talk.jsonl") == ["漢字かな 한국어 🙂 " * 6 + "語é!"]


def test_what_is_pasted_in_several_lines_is_one_question(
    chat: Callable[..., Terminal], tmp_path: Path
) -> None:
    terminal = chat()
    terminal.paste("def f(x):\n    return x\n\n# 漢字")
    terminal.until_shown("# 漢字")
    terminal.say(" why?")
    terminal.until("tokens/s")
    terminal.ready()
    terminal.press("one" + ALT_ENTER + "two\r")
    terminal.until("tokens/s")
    terminal.ready()
    questions = asked(terminal, tmp_path / "talk.jsonl")
    assert questions == ["def f(x):\n    return x\n\n# 漢字 why?", "one\ntwo"]


def test_ctrl_c_stops_an_answer_and_not_the_program(
    chat: Callable[..., Terminal], folder: Path, tmp_path: Path
) -> None:
    terminal = chat("-P", folder / "slow.py", "--sampler", "repetition-penalty,slow,temperature", "-n", 200)
    terminal.say("Hello")
    terminal.until("OOO")
    terminal.press(CTRL_C)
    terminal.until("stopped")
    terminal.ready()
    (question, answer) = said(terminal, tmp_path / "talk.jsonl")
    assert question["content"] == "Hello" and 0 < len(answer["content"]) < 200, "what had come is kept"
    terminal.press("some text" + CTRL_C)
    terminal.press(CTRL_C)
    assert "Ctrl-C again" in terminal.until("ends")
    terminal.ready()
    terminal.press(CTRL_C)
    assert terminal.end() == 0


def test_a_second_ctrl_c_at_once_after_an_answer_ends_it(chat: Callable[..., Terminal], folder: Path) -> None:
    terminal = chat("-P", folder / "slow.py", "--sampler", "slow,temperature")
    terminal.say("Hello")
    terminal.until("O")
    terminal.press(CTRL_C)
    terminal.until("stopped")
    terminal.ready()
    terminal.press(CTRL_C)
    assert terminal.end() == 0


def test_ctrl_z_puts_it_aside_and_the_shell_brings_it_back(
    chat: Callable[..., Terminal], tmp_path: Path
) -> None:
    terminal = chat(shell="set -m; {}; echo as''ide $?; fg")
    terminal.press("The wei")
    terminal.until_shown("> The wei")
    terminal.press(CTRL_Z)
    terminal.until("aside 148")  # 128 + SIGTSTP
    terminal.until_shown("> The wei")
    terminal.press("ghts\r")
    terminal.until("tokens/s")
    terminal.ready()
    assert asked(terminal, tmp_path / "talk.jsonl") == ["The weights"]
    terminal.press(CTRL_D)
    assert terminal.end() == 0


def test_bytes_of_another_encoding_are_told_and_it_goes_on(chat: Callable[..., Terminal]) -> None:
    terminal = chat()
    terminal.press_bytes(b"caf\xe9\r")
    terminal.until("what was typed is not UTF-8")
    terminal.ready()
    terminal.say("Hello")
    terminal.until("tokens/s")
    terminal.ready()
    terminal.press(CTRL_D)
    assert terminal.end() == 0


def test_a_terminal_that_can_only_show_text_gets_nothing_else(chat: Callable[..., Terminal]) -> None:
    terminal = chat(ready=False, TERM="dumb")
    terminal.until("> ")
    assert terminal.echoes(), "it edits its lines itself"
    terminal.press("Hello\r")
    terminal.until("tokens/s")
    terminal.until("> ")
    terminal.press("never mi" + CTRL_C)
    terminal.until("Ctrl-C again, or Ctrl-D, ends")
    terminal.until("> ")
    terminal.press("Hello\r")
    terminal.until("tokens/s")
    terminal.until("> ")
    terminal.press(CTRL_C)
    terminal.until("Ctrl-C again")
    terminal.press(CTRL_D)
    assert terminal.end() == 0 and "\x1b" not in terminal.written
    terminal = chat(ready=False, TERM="dumb")
    terminal.until("> ")
    terminal.press(CTRL_C)
    terminal.until("Ctrl-C again")
    terminal.press(CTRL_C)
    assert terminal.end() == 0


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_a_signal_ends_it_and_leaves_the_terminal_as_it_was(chat: Callable[..., Terminal], name: str) -> None:
    terminal = chat()
    number = signal.Signals[name]
    assert not terminal.echoes(), "a line is edited key by key"
    os.kill(terminal.process.pid, number)
    assert terminal.end() == 128 + number and terminal.echoed
    assert terminal.written.rindex("\x1b[?2004l") > terminal.written.rindex("\x1b[?2004h")
    assert "Traceback" not in terminal.written


def test_adapters_are_switched_by_name(chat: Callable[..., Terminal], folder: Path, tmp_path: Path) -> None:
    files = ("--adapter-file", folder / "first.safetensors", "--adapter-file", folder / "second.safetensors")
    terminal = chat(*files)
    terminal.until_shown("first> ")
    answers = []
    for line in ("/adapter second", "/base", "/adapter first"):
        terminal.say(line)
        terminal.ready()
        terminal.say("The weights?")
        terminal.until("tokens/s")
        terminal.ready()
        terminal.until_shown(f"{line.split()[-1].strip('/')}> ")
        answers.append(said(terminal, tmp_path / f"{len(answers)}.jsonl")[-1]["content"])
        terminal.say("/reset")
        terminal.ready()
    assert len(set(answers)) == 3
    terminal.press("/ad" + TAB)
    terminal.until_shown("/adapter")
    terminal.press(CTRL_C)
    terminal.say("/adapter secnd")
    terminal.until_shown("no adapter 'secnd' is on the model (did you mean 'second'?")
    terminal.ready()
    for line, words in (
        ("/helo", "there is no command /helo (did you mean 'help'?"),
        ("/set tmp 1", "there is no setting 'tmp' (did you mean 'temp'?"),
        ("/set top-p 7", "must be more than 0 and at most 1"),
        ("/set", "temperature temp=0.0; num-tokens 6, seed 0"),
        ("/save", "/save needs the name of a file"),
        ("/save 0.jsonl", "nothing has been said"),
        ("/adapter", "adapters: first, second"),
        ("/help", "/system TEXT"),
    ):
        terminal.say(line)
        terminal.until_shown(words)
        terminal.ready()
    terminal.say("Hello")
    terminal.until("tokens/s")
    terminal.ready()
    terminal.say("/save 0.jsonl")  # saved by this conversation before
    terminal.until("written: ")
    (tmp_path / "mine").write_text("mine")
    terminal.say("/save mine")
    terminal.until_shown("is there already")
    terminal.ready()
    assert (tmp_path / "mine").read_text() == "mine"


# --- in a pipe ----------------------------------------------------------------


def piped(folder: Path, cwd: Path, text: str | bytes, *more: object) -> subprocess.CompletedProcess[bytes]:
    """What a conversation with these lines leaves."""
    return subprocess.run(
        [
            *(sys.executable, "-m", "mlxlora_core", "chat", "--model", str(folder / "model")),
            *("--temp", "0", "-n", "6", *map(str, more)),
        ],
        input=text.encode() if isinstance(text, str) else text,
        capture_output=True,
        cwd=cwd,
        env={**os.environ, "MLXLORA_PLUGINS": "", "XDG_STATE_HOME": str(cwd / "state")},
        timeout=300,
    )


def test_each_line_of_a_pipe_is_a_question(folder: Path, tmp_path: Path, mlxlora: Command) -> None:
    lines = "The weights\r\n\n//slash 漢字\n/system Be short.\nAgain\n/save talk.jsonl\nlast"
    done = piped(folder, tmp_path, lines)
    assert done.returncode == 0, done.stderr
    messages = json.loads((tmp_path / "talk.jsonl").read_text("utf-8"))["messages"]
    assert [m["role"] for m in messages] == ["system", *["user", "assistant"] * 3]
    assert [m["content"] for m in messages[1::2]] == ["The weights", "/slash 漢字", "Again"]
    assert done.stderr.decode().count("tokens/s") == 4
    answers = [m["content"].removesuffix("\n") + "\n" for m in messages[2::2]]
    assert done.stdout.decode("utf-8", "replace").startswith("".join(answers))
    assert not (tmp_path / "state").exists() and b"\x1b[" not in done.stdout + done.stderr
    one = mlxlora(
        "generate", "--model", folder / "model", "--chat", "-p", "The weights", "--temp", 0, "-n", 6
    )
    assert one.out == answers[0], "it answers what generate --chat does"


def test_what_is_saved_is_trained_on(folder: Path, tmp_path: Path, mlxlora: Command) -> None:
    assert piped(folder, tmp_path, "The weights\nAnd now?\n/save talk.jsonl\n").returncode == 0
    data = tmp_path / "data"
    data.mkdir()
    for name in ("train", "valid"):
        (data / f"{name}.jsonl").write_bytes((tmp_path / "talk.jsonl").read_bytes())
    adapter = ("--adapter-file", tmp_path / "a.safetensors")
    done = mlxlora(
        "train", "--model", folder / "model", "--data", data, "--iters", 1, "--batch-size", 1, *adapter
    )
    assert done.code == 0 and "1 train row of messages" in done.err, done.err


def test_compare_answers_with_base_and_adapter(folder: Path, tmp_path: Path) -> None:
    files = ("--adapter-file", folder / "first.safetensors")
    lines = "The weights\nAnd now?\n/save talk.jsonl\n"
    done = piped(folder, tmp_path, lines, *files, "--compare")
    assert done.returncode == 0, done.stderr
    talks = [
        json.loads(line)["messages"] for line in (tmp_path / "talk.jsonl").read_text("utf-8").splitlines()
    ]
    assert len(talks) == 2 and talks[0][1] != talks[1][1]
    blocks = [
        f"{name}:\n" + talk[turn]["content"].removesuffix("\n") + "\n"
        for turn in (1, 3)
        for name, talk in zip(("base", "first"), talks, strict=True)
    ]
    assert done.stdout.decode("utf-8", "replace") == "".join(blocks)
    for name, more in (("base", ()), ("first", files)):  # each goes on with what it has said itself
        alone = piped(folder, tmp_path, f"The weights\nAnd now?\n/save {name}.jsonl\n", *more)
        assert alone.returncode == 0, alone.stderr
        (row,) = (tmp_path / f"{name}.jsonl").read_text("utf-8").splitlines()
        assert json.loads(row)["messages"] == talks[name == "first"]


@pytest.mark.parametrize(
    ("text", "more", "code", "words"),
    [
        ("/adapter nobody\nHello\n", (), 2, "no adapter 'nobody' is on the model (there is none)"),
        ("Hello " * 200, (), 2, "holds 256. Fix: the context is full: /reset begins anew"),
        (b"\xff\xfe\n", (), 2, "stdin is not UTF-8"),
        ("", ("--compare",), 2, "--compare needs an adapter"),
        ("", ("--top-k", "0"), 2, "must be at least 1"),
        ("", ("--adapter-file", "a", "--adapter-file", "a"), 2, "a is named twice"),
        ("", ("--adapter-file", "a", "--no-adapter"), 2, "give one of them"),
    ],
)
def test_a_fault_in_a_pipe_is_one_line_and_ends_it(
    folder: Path, tmp_path: Path, text: str | bytes, more: tuple[str, ...], code: int, words: str
) -> None:
    done = piped(folder, tmp_path, text, *more)
    assert done.returncode == code
    assert done.stderr.decode().splitlines()[-1].startswith("mlxlora: ") and words in done.stderr.decode()
    assert done.stdout == b""


def test_a_full_context_says_what_to_do(folder: Path, tmp_path: Path) -> None:
    plugin = ("-P", folder / "slow.py", "--sampler", "fast,temperature")
    done = piped(folder, tmp_path, "Hello\n/reset\nHello\n", *plugin, "-n", 400)
    assert done.returncode == 0, done.stderr
    told = done.stderr.decode()
    assert (
        told.count("the model's context is full, at 256 tokens\nthe context is full: /reset begins anew") == 2
    )
    first, second = done.stdout.decode().split()
    assert first == second and 200 < len(first) < 256


def test_a_stop_text_ends_an_answer(folder: Path, tmp_path: Path) -> None:
    plugin = ("-P", folder / "slow.py", "--sampler", "fast,temperature")
    done = piped(folder, tmp_path, "Hello\n", *plugin, "-n", 40, "--stop", "OOOO", "--stop", "x")
    assert (done.returncode, done.stdout) == (0, b""), "it begins with it"
    assert "ended before 'OOOO'" in done.stderr.decode()


def test_a_model_that_does_not_chat_says_what_to_do(folder: Path, tmp_path: Path) -> None:
    small_models.write(tmp_path / "model", "llama")
    config = tmp_path / "model" / "tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"chat_template": None}))
    done = piped(tmp_path, tmp_path, "Hello\n")
    assert done.returncode == 4
    assert (
        "the model has no chat template" in done.stderr.decode()
        and "mlxlora generate" in done.stderr.decode()
    )


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["numpy.safetensors"], ["numpy"]),
        (["a.b.npz", "folder.v1", "/x/y/last.gguf"], ["a.b", "folder.v1", "last"]),
        (["one/adapters.npz", "two/adapters.npz"], ["one/adapters", "two/adapters"]),
        (["x.npz", "x.safetensors", "y/x.npz"], ["x.npz", "x.safetensors", "x"]),
        (["/a", "/b/a"], ["/a", "b/a"]),
        ([], []),
    ],
)
def test_adapters_are_called_by_the_ends_of_their_paths(
    paths: list[str], names: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.v1").mkdir()
    assert adapter_names([Path(path) for path in paths]) == names
    if paths:
        with pytest.raises(UsageError, match="is named twice"):
            adapter_names([Path(paths[0]), Path(".", paths[0])])


# --- history ------------------------------------------------------------------


def test_history_holds_any_text_and_passes_over_what_is_none(tmp_path: Path) -> None:
    history = HistoryFile(tmp_path / "deep" / "history")
    assert history.load() == []
    texts = ["a\nb", "漢字 🙂", "\ud800 half", "/set temp 1"]
    for text in texts:
        history.add(text)
    with history.path.open("ab") as file:
        file.write(b'\xff\n3\n{"a": 1}\n"half\n')
    os.chmod(history.path, 0o644)
    history.add("last")
    assert history.load() == [*texts, "last"]
    assert history.path.stat().st_mode & 0o777 == 0o600


def test_history_does_not_grow_for_good(tmp_path: Path) -> None:
    path = tmp_path / "history"
    path.write_text("".join(json.dumps(f"{i} {'x' * 600}") + "\n" for i in range(2 * KEPT)))
    assert [text.split()[0] for text in HistoryFile(path).load()] == [str(i) for i in range(KEPT, 2 * KEPT)]
    assert len(path.read_bytes()) < 700 * KEPT


def test_history_stands_where_the_specification_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ann")
    usual = Path("/home/ann/.local/state/mlxlora/chat_history")
    assert place_of({}) == place_of({"XDG_STATE_HOME": "state"}) == usual
    assert place_of({"XDG_STATE_HOME": "/s"}) == Path("/s/mlxlora/chat_history")
