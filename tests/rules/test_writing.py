"""Every file that mlxlora makes goes through the durable writer."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = sorted([*(ROOT / "mlxlora_core").rglob("*.py"), *(ROOT / "plugins").rglob("*.py")])

#: what may write by itself, and why
EXCEPT = {
    "mlxlora_core/files/durable.py": "is the writer",
    "mlxlora_core/files/leftovers.py": "clears away what the writer of a process that was killed has left",
    "mlxlora_core/files/lock.py": "a lock is no product; it is taken and left in place",
    "mlxlora_core/training/row_store.py": "numbers in a temporary folder, which are checked as they are read",
    "mlxlora_core/cli/streams.py": "writes to the standard streams",
    "mlxlora_core/plugins/surroundings.py": "opens nowhere in the place of a stream that is closed",
    "mlxlora_core/files/input_file.py": "opens to read; its flags stand in a variable",
    "plugins/mlxlora_openblas/guard.py": "a last line on stderr, from a thread that may take no memory",
    "plugins/mlxlora_docstrings/attempt.py": "a request in a temporary folder, for a child",
    "plugins/mlxlora_docstrings/warden.py": "the temporary folder goes when mlxlora is gone",
    "plugins/mlxlora_docstrings/child.py": "its answer to a pipe, and a setting of the kernel's",
}
#: suites that test plugins, in folders of pytest's
TESTING = "mlxlora_core/testing/"
#: functions of modules that write a file or move one
WRITERS = {
    *(f"mx.{n}" for n in ("save", "savez", "savez_compressed", "save_safetensors", "save_gguf")),
    *(f"np.{n}" for n in ("save", "savez", "savez_compressed", "savetxt")),
    *(f"shutil.{n}" for n in ("copy", "copy2", "copyfile", "copytree", "move", "rmtree")),
    *(f"os.{n}" for n in ("replace", "rename", "renames", "link", "symlink", "truncate", "mkfifo", "write")),
    *("torch.save", "json.dump", "pickle.dump", "pickle.dumps", "tomli_w.dump", "marshal.dump"),
    *("tempfile.NamedTemporaryFile", "tempfile.mkstemp", "zipfile.Path"),
}
#: methods that write, whatever the object
METHODS = {"write_text", "write_bytes", "save_weights", "tofile", "symlink_to", "hardlink_to"}


def writes(path: Path) -> Iterator[str]:
    """``file:line: call`` of each call that writes a file."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        method = name.rpartition(".")[2]
        if _opens_to_write(node, name) or name in WRITERS or method in METHODS - _of_durable(name):
            yield f"{path.relative_to(ROOT).as_posix()}:{node.lineno}: {name}"


def _of_durable(name: str) -> set[str]:
    """The method that is the durable writer's own: of the module, or taken from the door of plugins."""
    return {"write_text"} if name in ("durable.write_text", "write_text") else set()


def _opens_to_write(node: ast.Call, name: str) -> bool:
    """Whether a call of ``open`` or ``.open`` has a mode that writes, or one that cannot be read here."""
    if name.rpartition(".")[2] not in ("open", "fdopen"):
        return False
    if name == "os.open":
        return "O_RDONLY" not in ast.unparse(node)
    modes = [keyword.value for keyword in node.keywords if keyword.arg == "mode"]
    modes += node.args[1:2] if name in ("open", "os.fdopen") else node.args[:1] if "Path" in name else []
    return any(not isinstance(m, ast.Constant) or set(str(m.value)) & set("wxa+") for m in modes)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_nothing_but_the_durable_writer_writes(path: Path) -> None:
    name = path.relative_to(ROOT).as_posix()
    if name in EXCEPT or name.startswith(TESTING):
        return
    assert list(writes(path)) == []


def test_what_is_excepted_is_there_and_writes() -> None:
    for name in EXCEPT:
        if (ROOT / name).exists():
            assert list(writes(ROOT / name)), name


@pytest.mark.parametrize(
    "line",
    [
        "open(p, 'w')",
        "open(p, mode='ab')",
        "open(p, mode)",
        "Path(p).open('w')",
        "path.write_text('x')",
        "mx.save_safetensors(p, t)",
        "np.savez(p)",
        "json.dump(x, f)",
        "shutil.copy(a, b)",
        "os.replace(a, b)",
        "os.open(p, os.O_WRONLY)",
    ],
)
def test_the_rule_sees_what_writes(tmp_path: Path, line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    (tmp_path / "module.py").write_text(line)
    assert len(list(writes(tmp_path / "module.py"))) == 1


@pytest.mark.parametrize(
    "line",
    [
        "open(p)",
        "open(p, 'rb')",
        "durable.write_text(p, t)",
        "write_text(p, t)",
        "os.open(p, os.O_RDONLY)",
        "loader.open(p)",
    ],
)
def test_the_rule_lets_reading_pass(tmp_path: Path, line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    (tmp_path / "module.py").write_text(line)
    assert list(writes(tmp_path / "module.py")) == []
