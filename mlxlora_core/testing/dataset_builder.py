"""The conformance suite of dataset builders.

Subclass :class:`DatasetBuilderSuite` in a test file and run it with pytest::

    class TestMyBuilder(DatasetBuilderSuite):
        spec = my_plugin.BUILDER

        def sources(self, folder):
            (folder / "notes.md").write_text("# Heading\\n\\nText.")
            return {"path": folder}
"""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from mlxlora_core.errors import DataError, MlxloraError, one_line
from mlxlora_core.files.data_path import SPLITS
from mlxlora_core.files.row_shapes import check_content
from mlxlora_core.machine.children import safe_python
from mlxlora_core.options import explain, parse
from mlxlora_core.plugins.sections import SplitConfig
from mlxlora_core.specs import DatasetBuilder
from mlxlora_core.training.dataset import write_dataset
from mlxlora_core.values import Rows

# Builds in a process of its own and prints what came out.
_BUILD = """
import importlib, pickle, sys
module, name, given, out = sys.argv[1:]
build = getattr(importlib.import_module(module), name)
with open(given, "rb") as file:
    options = pickle.load(file)
with open(out, "wb") as file:
    pickle.dump(build(options), file)
"""


class DatasetBuilderSuite:
    """What every dataset builder must do.

    Attributes:
        spec: the dataset builder.
    """

    spec: DatasetBuilder

    def sources(self, folder: Path) -> Mapping[str, Any]:
        """Write something to build from into an empty folder; return the option values that name it.

        It should give several rows, some of them with one group, if the builder makes groups.
        """
        raise NotImplementedError

    def poor_sources(self, folder: Path) -> Mapping[str, Any]:
        """As ``sources``, with some that give no row; the builder must say why and build the rest."""
        pytest.skip("this builder leaves nothing out")

    def empty_sources(self, folder: Path) -> Mapping[str, Any]:
        """As ``sources``, but nothing gives a row."""
        raise NotImplementedError

    def change(self, folder: Path) -> None:
        """Change what ``sources`` has written, so that other rows would come out."""
        raise NotImplementedError

    # --- what the tests are made of ---

    def options(self, values: Mapping[str, Any]) -> Any:
        """The options that a recipe with these values gives."""
        return parse(self.spec.options, values, owner=self.spec.name)

    def build(self, values: Mapping[str, Any]) -> Rows:
        """What the builder makes of these option values."""
        return self.spec.build(self.options(values))

    # --- the tests ---

    def test_options_explain_themselves(self) -> None:
        """Each has a sentence of help."""
        assert all(option.help for option in explain(self.spec.options))

    def test_rows_are_rows(self, tmp_path: Path) -> None:
        """Each content is one of the three shapes and nothing else; splits and groups are known."""
        rows = self.build(self.sources(tmp_path)).rows
        assert rows
        for row in rows:
            content = dict(row.content)
            assert check_content(content) is None
            assert content.keys() - {"tools"} in ({"text"}, {"prompt", "completion"}, {"messages"})
            assert json.loads(json.dumps(content)) == content
            assert isinstance(row.group, str)
            assert row.split is None or row.split in SPLITS

    def test_no_group_has_two_splits(self, tmp_path: Path) -> None:
        """A builder that settles splits keeps its groups together."""
        splits: dict[str, set[str | None]] = {}
        for row in self.build(self.sources(tmp_path)).rows:
            if row.group:
                splits.setdefault(row.group, set()).add(row.split)
        assert all(len(found) == 1 for found in splits.values())

    def test_two_builds_are_the_same(self, tmp_path: Path) -> None:
        """Rows, what was left out, versions and the files written, byte for byte."""
        values = self.sources(tmp_path)
        assert self.build(values) == self.build(values)
        written = [self._written(values, tmp_path / name) for name in ("first", "second")]
        assert written[0] == written[1]

    @pytest.mark.parametrize("hash_seed", ["1", "2", "3", "4"])
    def test_another_process_builds_the_same(self, tmp_path: Path, hash_seed: str) -> None:
        """Nothing hangs on the order of a set, an address or the working folder."""
        values = self.sources(tmp_path)
        given, out, elsewhere = tmp_path / "options", tmp_path / "rows", tmp_path / "elsewhere"
        given.write_bytes(pickle.dumps(self.options(values)))
        elsewhere.mkdir()
        build: Any = self.spec.build
        path = os.pathsep.join(os.path.abspath(entry) for entry in sys.path)
        done = subprocess.run(
            safe_python("-c", _BUILD, build.__module__, build.__qualname__, str(given), str(out)),
            env={**os.environ, "PYTHONPATH": path, "PYTHONHASHSEED": hash_seed},
            cwd=elsewhere,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        assert pickle.loads(out.read_bytes()) == self.build(values)

    def test_rows_do_not_hang_on_the_order_of_the_disk(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A folder that lists its files in another order, as one on another disk does, gives the same."""
        values = self.sources(tmp_path)
        built = []
        for backwards in (False, True):
            with monkeypatch.context() as patch:
                _order_folders(patch, backwards)
                built.append(self.build(values))
        assert built[0].rows == built[1].rows

    def test_sources_are_left_alone(self, tmp_path: Path) -> None:
        """Building changes no file and adds none."""
        values = self.sources(tmp_path)
        before = _contents(tmp_path)
        self.build(values)
        dict(self.spec.inputs(self.options(values)))
        assert _contents(tmp_path) == before

    def test_a_source_that_is_not_there_is_an_error(self, tmp_path: Path) -> None:
        """A path that leads nowhere is one line, before anything is built."""
        values, absent = self.sources(tmp_path), str(tmp_path / "absent")
        paths = [o.name for o in explain(self.spec.options) if "path" in o.type_name and o.name in values]
        for name in paths:
            several = isinstance(values[name], list | tuple)
            options = self.options({**values, name: [absent] if several else absent})
            for call in (self.spec.build, self.spec.inputs):
                with pytest.raises(MlxloraError):
                    call(options)

    def test_prints_nothing_and_stays_in_place(
        self, tmp_path: Path, capfd: pytest.CaptureFixture[str]
    ) -> None:
        """Standard output belongs to the verb; the working folder and the environment to the user."""
        values, before = self.sources(tmp_path), (os.getcwd(), dict(os.environ))
        self.build(values)
        assert capfd.readouterr().out == ""
        assert (os.getcwd(), dict(os.environ)) == before

    def test_tells_its_inputs(self, tmp_path: Path) -> None:
        """The same while nothing changes, and others when a source changes."""
        options = self.options(self.sources(tmp_path))
        told = dict(self.spec.inputs(options))
        assert told and all(isinstance(text, str) for pair in told.items() for text in pair)
        assert dict(self.spec.inputs(options)) == told
        self.change(tmp_path)
        assert dict(self.spec.inputs(options)) != told

    def test_tells_what_it_leaves_out(self, tmp_path: Path) -> None:
        """A source that gives nothing is named with a reason, on one line, and the others go on."""
        rows = self.build(self.poor_sources(tmp_path))
        assert rows.rows and rows.skipped
        for skip in rows.skipped:
            assert skip.source and skip.reason
            assert one_line(skip.reason) == skip.reason

    def test_no_row_is_an_error(self, tmp_path: Path) -> None:
        """There is nothing to train on, and the reason is told."""
        with pytest.raises(DataError):
            self.build(self.empty_sources(tmp_path))

    def _written(self, values: Mapping[str, Any], folder: Path) -> dict[str, bytes]:
        write_dataset(self.build(values), folder, SplitConfig(), {"builder": self.spec.name})
        return {path.name: path.read_bytes() for path in folder.iterdir()}


def _contents(folder: Path) -> dict[str, bytes]:
    """File -> its bytes, but for what Python keeps of modules that it has imported."""
    files = (path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def _order_folders(patch: pytest.MonkeyPatch, backwards: bool) -> None:
    """Let folders list their files by name, or backwards, whatever the disk does."""
    scan, names = os.scandir, os.listdir

    def scandir(*given: Any) -> _Entries:
        with scan(*given) as entries:
            return _Entries(sorted(entries, key=lambda entry: str(entry.name), reverse=backwards))

    patch.setattr(os, "scandir", scandir)
    patch.setattr(os, "listdir", lambda *given: sorted(names(*given), reverse=backwards))


class _Entries:
    """What ``os.scandir`` gives: an iterator that is a context, and can be closed."""

    def __init__(self, entries: Sequence[os.DirEntry[Any]]) -> None:
        self._left = iter(entries)

    def __iter__(self) -> Iterator[os.DirEntry[Any]]:
        return self

    def __next__(self) -> os.DirEntry[Any]:
        return next(self._left)

    def __enter__(self) -> _Entries:
        return self

    def __exit__(self, *fault: object) -> None:
        self.close()

    def close(self) -> None:
        """Nothing is open."""
