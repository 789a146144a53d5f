"""The conformance suite over every dataset builder that is registered."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from mlxlora_core import plugins as registry
from mlxlora_core.testing.dataset_builder import DatasetBuilderSuite

BUILDERS = {c.spec.name: c.spec for c in registry.load(environ={registry.ALLOW_LIST: ""}).of("builder")}

MODULE = '''"""A package to be read."""

def alpha():
    """First."""

def beta():
    """First."""

class Gamma:
    """Second."""

    def delta(self):
        """Third."""
'''


class TestDocstrings(DatasetBuilderSuite):
    spec = BUILDERS["docstrings"]
    mode = "import"

    @pytest.fixture(autouse=True)
    def importable(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.syspath_prepend(str(tmp_path))

    def sources(self, folder: Path) -> Mapping[str, Any]:
        (folder / "contract_package.py").write_text(MODULE)
        return {"packages": ["contract_package"], "mode": self.mode}

    def poor_sources(self, folder: Path) -> Mapping[str, Any]:
        (folder / "contract_broken.py").write_text("this is no python\n")
        return {**self.sources(folder), "packages": ["contract_package", "contract_broken", "not_there"]}

    def empty_sources(self, folder: Path) -> Mapping[str, Any]:
        return {"packages": ["not_there"], "mode": self.mode}

    def change(self, folder: Path) -> None:
        (folder / "contract_package.py").write_text(MODULE + 'def eps():\n    """Fourth."""\n')


class TestDocstringsStatic(TestDocstrings):
    mode = "static"


class TestJsonl(DatasetBuilderSuite):
    spec = BUILDERS["jsonl"]

    def sources(self, folder: Path) -> Mapping[str, Any]:
        rows: list[dict[str, Any]] = [{"text": f"row {i}"} for i in range(20)]
        rows.append({"prompt": "a", "completion": "b"})
        asked, said = {"role": "user", "content": "é"}, {"role": "assistant", "content": "è"}
        rows.append({"messages": [asked, said], "source": "elsewhere"})
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return {"path": folder / "rows.jsonl"}

    def poor_sources(self, folder: Path) -> Mapping[str, Any]:
        (folder / "blank.jsonl").write_text("\n\n")
        return {**self.sources(folder), "files": [folder / "blank.jsonl"]}

    def empty_sources(self, folder: Path) -> Mapping[str, Any]:
        (folder / "empty.jsonl").touch()
        return {"path": folder / "empty.jsonl"}

    def change(self, folder: Path) -> None:
        with open(folder / "rows.jsonl", "a") as file:
            file.write('{"text": "another"}\n')


class TestJsonlSplits(TestJsonl):
    def sources(self, folder: Path) -> Mapping[str, Any]:
        super().sources(folder)
        (folder / "train.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n')
        (folder / "test.jsonl").write_text('{"text": "c"}\n')
        return {"path": folder}

    def change(self, folder: Path) -> None:
        (folder / "valid.jsonl").write_text('{"text": "d"}\n')


def test_every_builder_is_covered() -> None:
    assert {suite.spec.name for suite in (TestDocstrings, TestJsonl)} == set(BUILDERS)


@pytest.mark.parametrize("suite", [TestDocstrings, TestJsonl])
def test_a_builder_is_still_there_after_it_was_used(
    suite: type[DatasetBuilderSuite], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    suite().build(suite().sources(tmp_path))
    again = registry.load(environ={registry.ALLOW_LIST: ""}).find("builder", suite.spec.name)
    assert again.spec == suite.spec
