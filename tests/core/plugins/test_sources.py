from __future__ import annotations

import os
from pathlib import Path

import pytest

from mlxlora_core.plugins import load
from mlxlora_core.plugins.plugin import Plugin
from mlxlora_core.plugins.sources import source_digest


def of_file(path: Path) -> Plugin:
    return Plugin(path.stem, "file", "", "file", str(path))


def test_an_edited_file_is_another_one_whatever_its_time(tmp_path: Path) -> None:
    path = tmp_path / "plugin.py"
    path.write_text("FACTOR = 1")
    state, first = path.stat(), source_digest(of_file(path))
    path.write_text("FACTOR = 2")
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert source_digest(of_file(path)) != first
    path.write_text("FACTOR = 1")
    assert source_digest(of_file(path)) == first


def test_every_file_of_a_package_counts_and_its_byte_code_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    package = tmp_path / "acme_sources"
    (package / "below" / "__pycache__").mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "below" / "part.py").write_text("x = 1")
    plugin = Plugin("acme", "acme", "1.0", "installed", "acme_sources.below:plugin")
    first = source_digest(plugin)
    (package / "below" / "__pycache__" / "part.pyc").write_bytes(b"1")
    assert source_digest(plugin) == first
    (package / "below" / "part.py").write_text("x = 2")
    second = source_digest(plugin)
    (package / "table.json").write_text("{}")
    assert len({first, second, source_digest(plugin)}) == 3


def test_what_has_no_source_has_no_digest(tmp_path: Path) -> None:
    assert source_digest(of_file(tmp_path / "absent.py")) == ""
    assert source_digest(Plugin("x", "x", "1", "installed", "no_such_module_here:x")) == ""
    assert source_digest(Plugin("x", "x", "1", "installed", "")) == ""


def test_the_plugins_in_the_box_have_sources() -> None:
    digests = [source_digest(plugin) for plugin in load().plugins]
    assert all(digests) and len(set(digests)) > 5
