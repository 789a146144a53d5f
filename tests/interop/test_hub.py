"""Models on the Hub: fetched, from the cache, refused, broken off; against a Hub on the loopback address."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from loopback_hub import Hub, serving

from mlxlora_core.machine.children import safe_python

pytest.importorskip("huggingface_hub", reason="the extra hub is not installed")

SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
INDEX = {"weight_map": {"a": SHARDS[0], "b": SHARDS[1]}}
FILES = {
    "config.json": b'{"model_type": "llama", "hidden_size": 8}',
    "generation_config.json": b"{}",
    "tokenizer.json": b'{"version": "1.0"}',
    "additional_chat_templates/tool_use.jinja": b"{{ messages }}",
    "tokenizer.model": b"left out, since tokenizer.json is there",
    "model.safetensors.index.json": json.dumps(INDEX).encode(),
    SHARDS[0]: b"1" * 300_000,
    SHARDS[1]: b"2" * 400_000,
}
USELESS = {
    "pytorch_model.bin": b"x",
    "consolidated.safetensors": b"x",
    "model-00001-of-00009.safetensors": b"of another model",
    "onnx/model.onnx": b"x",
    "original/consolidated.00.pth": b"x",
    "modeling.py": b"x",
    "README.md": b"x",
}
WANTED = FILES.keys() - {"tokenizer.model"}


@pytest.fixture
def hub() -> Iterator[Hub]:
    with serving() as served:
        served.put("org/model", FILES | USELESS)
        yield served


class Located:
    """What ``locate_model`` gives or raises, in a process of its own with a cache of its own."""

    def __init__(self, hub: Hub, home: Path) -> None:
        self.hub, self.home = hub, home

    def __call__(self, name: str, **variables: str) -> dict[str, Any]:
        program = (
            "import json, sys\n"
            "from mlxlora_core.errors import MlxloraError\n"
            "from mlxlora_core.model.located import locate_model\n"
            "try:\n"
            "    found = locate_model(sys.argv[1])\n"
            "    told = {'path': str(found.path), 'name': found.name, 'notes': found.notes}\n"
            "    told |= {'revision': found.revision}\n"
            "except MlxloraError as fault:\n"
            "    told = {'error': str(fault), 'code': fault.exit_code}\n"
            "heavy = {'mlx', 'torch', 'numpy'} & {name.partition('.')[0] for name in sys.modules}\n"
            "print(json.dumps(told | {'heavy': sorted(heavy)}))\n"
        )
        plain = {
            key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING_FACE"))
        }
        env = (
            plain
            | {"HF_ENDPOINT": self.hub.url, "HF_HOME": str(self.home), "HF_HUB_DISABLE_XET": "1"}
            | variables
        )
        self.hub.asked.clear()
        command = safe_python("-c", program, name)
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=env, cwd=self.home)
        assert done.returncode == 0, done.stderr
        told: dict[str, Any] = json.loads(done.stdout)
        assert told.pop("heavy") == []
        return told


@pytest.fixture
def located(hub: Hub, tmp_path: Path) -> Located:
    return Located(hub, tmp_path)


def contents(folder: str) -> dict[str, bytes]:
    files = (path for path in Path(folder).rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def files_of(hub: Hub) -> set[str]:
    """What was fetched."""
    return {line.removeprefix("GET ") for line in hub.asked if line.startswith("GET ")} - {"info", "tree"}


def test_what_is_needed_is_fetched_and_the_revision_pinned(hub: Hub, located: Located) -> None:
    found = located("org/model")
    commit = next(iter(hub.repos["org/model"]))
    assert (found["revision"], found["name"]) == (commit, f"org/model@{commit}")
    assert contents(found["path"]) == {name: FILES[name] for name in WANTED}
    assert files_of(hub) == WANTED
    asked = [line for line in hub.asked if line.startswith("GET ") and line != "GET tree"]
    assert asked[-1] == "GET config.json", "it comes last"


def test_the_second_time_nothing_is_fetched_and_offline_nobody_is_asked(hub: Hub, located: Located) -> None:
    first = located("org/model")
    assert located("org/model") == first
    assert files_of(hub) == set()
    for name in ("org/model", first["name"]):
        assert located(name, HF_HUB_OFFLINE="1") == first
        assert hub.asked == []
    assert located(first["name"]) == first
    assert hub.asked == [], "a commit is what it is"


def test_a_new_commit_is_fetched_unless_another_is_named(hub: Hub, located: Located) -> None:
    first = located("org/model")
    hub.put("org/model", FILES | {"config.json": b'{"hidden_size": 16}'})
    second = located("org/model")
    assert second["revision"] != first["revision"]
    assert contents(second["path"])["config.json"] == b'{"hidden_size": 16}'
    assert files_of(hub) == {"config.json"}, "what is the same is there already"
    assert located(first["name"])["path"] == first["path"]


def test_offline_without_the_model(located: Located) -> None:
    told = located("org/model", HF_HUB_OFFLINE="1")
    assert told["code"] == 4
    assert "HF_HUB_OFFLINE forbids to fetch it" in told["error"] and "fetch it once" in told["error"]


def test_a_hub_that_does_not_answer(hub: Hub, located: Located) -> None:
    nowhere = "http://127.0.0.1:9"
    told = located("org/model", HF_ENDPOINT=nowhere)
    assert told["code"] == 4 and "the Hub cannot be reached" in told["error"]
    first = located("org/model")
    told = located("org/model", HF_ENDPOINT=nowhere)
    assert (told["path"], told["revision"]) == (first["path"], first["revision"])
    assert "cannot be reached" in told["notes"][0] and first["revision"] in told["notes"][0]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("org/absent", "the Hub has no model of this name"),
        ("org/gated", "only to those whom its owners let"),
        ("org/model@dev", "no revision 'dev'"),
        (
            "org/bins",
            "has pytorch_model.bin, which are pickles and can hold code, and no weights that are read: ",
        ),
        ("org/empty", "has no weights that are read"),
        (
            "org/ggufs",
            "has GGUF files, of which one is read: a.Q4_0.gguf, b.gguf. Fix: name one: org/ggufs/a.Q4_0.gguf",
        ),
        ("org/ggufs/c.gguf", "has no such file (it has a.Q4_0.gguf, b.gguf)"),
    ],
)
def test_what_is_not_to_be_had(hub: Hub, located: Located, name: str, words: str) -> None:
    hub.gated.add("org/gated")
    hub.put("org/bins", {"config.json": b"{}", "pytorch_model.bin": b"x", "tokenizer.json": b"{}"})
    hub.put("org/empty", {"README.md": b"x"})
    hub.put("org/ggufs", {"a.Q4_0.gguf": b"GGUF", "b.gguf": b"GGUF", "config.json": b"{}"})
    told = located(name)
    assert told["code"] == 4 and words in told["error"] and name in told["error"]
    assert "\n" not in told["error"] and files_of(hub) == set()


def test_a_gguf_file(hub: Hub, located: Located) -> None:
    commit = hub.put("org/ggufs", {"a.gguf": b"GGUF a", "b.gguf": b"GGUF b", "README.md": b"x"})
    found = located("org/ggufs/b.gguf")
    assert Path(found["path"]).read_bytes() == b"GGUF b" and found["name"] == f"org/ggufs/b.gguf@{commit}"
    assert files_of(hub) == {"b.gguf"}
    assert located(found["name"], HF_HUB_OFFLINE="1") == found
    parts = {f"c-0000{n}-of-00003.gguf": b"part %d" % n for n in (1, 2, 3)}
    hub.put("org/parts", parts | {"c-00001-of-00002.gguf": b"of another"})
    found = located("org/parts/c-00001-of-00003.gguf")
    assert contents(str(Path(found["path"]).parent)) == parts


@pytest.mark.parametrize("name", [SHARDS[1], "config.json", "model.safetensors.index.json"])
def test_a_fetch_that_breaks_off_is_gone_on_with_or_leaves_no_model(
    hub: Hub, located: Located, name: str
) -> None:
    """The library tries again; where every try breaks off, what has come is no model."""
    hub.breaks[name] = len(FILES[name]) // 2
    found = located("org/model")
    if "error" in found:
        assert found["code"] == 4
        offline = located("org/model", HF_HUB_OFFLINE="1")
        assert "nor is all of it in the cache" in offline["error"]
        found = located("org/model")
    assert contents(found["path"]) == {file: FILES[file] for file in WANTED}


def test_what_another_program_has_fetched_in_part_is_no_model(hub: Hub, located: Located) -> None:
    first = located("org/model")
    (Path(first["path"]) / SHARDS[0]).unlink()
    for name in ("org/model", first["name"]):
        assert "nor is all of it in the cache" in located(name, HF_HUB_OFFLINE="1")["error"]
    assert located(first["name"]) == first
    assert contents(first["path"]) == {name: FILES[name] for name in WANTED}


def test_without_the_library_it_is_said_what_to_install(tmp_path: Path) -> None:
    program = "import sys; sys.modules['huggingface_hub'] = None\n"
    program += "from mlxlora_core.cli import execute\n"
    program += "sys.exit(execute(['generate', '--model', 'org/model', '-p', 'a']))"
    done = subprocess.run(
        safe_python("-c", program), capture_output=True, text=True, cwd=tmp_path, timeout=120
    )
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 4 and last.startswith("mlxlora: org/model: there is no such folder or file")
    assert "pip install 'mlxlora[hub]'" in last and sys.executable not in last
