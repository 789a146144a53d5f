"""What lies in the repository: known names at its root, and nothing that a run of the tests has left."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from litter import untracked

ROOT = Path(__file__).parents[2]

AT_THE_ROOT = {
    ".ci", ".gitignore", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "README.md", "benchmarks",
    "constraints.txt", "docs", "examples", "hatch_build.py", "mlxlora_core", "plugins", "pyproject.toml",
    "tests", "tools",
}  # fmt: skip


def git(folder: Path, *arguments: str) -> str:
    """What git says; a test that asks it is skipped where there is none, or no checkout."""
    try:
        done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("needs git")
    if done.returncode:
        pytest.skip(f"no checkout: {done.stderr.strip()}")
    return done.stdout


def test_the_root_holds_known_names_only() -> None:
    if Path(git(ROOT, "rev-parse", "--show-toplevel").strip()) != ROOT:
        pytest.skip("the checkout around it is another project's")
    assert {name.partition("/")[0] for name in git(ROOT, "ls-files", "-z").split("\0") if name} == AT_THE_ROOT


def test_what_tests_leave_is_found(tmp_path: Path) -> None:
    assert untracked(tmp_path / "none") is None
    git(tmp_path, "init", "--quiet")
    (tmp_path / ".gitignore").write_text("build/\n")
    git(tmp_path, "add", ".gitignore")
    for name in ("build/object", "tests/out/adapter.safetensors", "a name with\ta tab"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert untracked(tmp_path) == {"tests/out/adapter.safetensors", "a name with\ta tab"}
    (tmp_path / ".gitignore").write_text("")
    assert "build/object" in (untracked(tmp_path) or ())
