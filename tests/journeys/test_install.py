"""What is installed where there is a C compiler, where there is none, and where it fails."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
LIBRARY, SOURCE = "mlxlora_openblas/libmlxlora_sgemm.so", "mlxlora_openblas/sgemm.c"

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the library is for Linux")

needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("cc", "gcc", "clang"))), reason="needs a C compiler: install gcc or clang"
)


def build(target: str, folder: Path, root: Path = ROOT, **variables: str) -> tuple[Path, str]:
    """What hatchling makes of the project, and what it says on the way."""
    kept = {name: value for name, value in os.environ.items() if name != "CC"}
    done = subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", target, "-d", str(folder)],
        cwd=root,
        env=kept | variables,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    (made,) = folder.iterdir()
    return made, done.stdout + done.stderr


def names(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def doctor(environment: Any, wheel: Path, folder: Path) -> list[str]:
    """The lines of ``mlxlora doctor`` where the wheel is installed."""
    environment.pip("install", "--no-deps", "--ignore-installed", wheel, cwd=folder)
    code = "import mlxlora_openblas; print(mlxlora_openblas.__file__)"
    where = environment.run(environment.python, "-c", code, cwd=folder).stdout
    assert Path(where).is_relative_to(environment.folder), "or this test shows nothing"
    told = environment.mlxlora("doctor", cwd=folder)
    assert told.returncode == 0, told.stderr
    return list(told.stdout.splitlines())


def test_without_a_compiler_mlxlora_is_installed_and_doctor_says_what_is_missing(
    tmp_path: Path, make_environment: Callable[[str], Any], tiny_checkpoint: Path
) -> None:
    (tmp_path / "empty").mkdir()
    wheel, said = build("wheel", tmp_path / "dist", PATH=str(tmp_path / "empty"))
    assert wheel.name.endswith("-py3-none-any.whl")
    assert SOURCE in names(wheel) and LIBRARY not in names(wheel)
    lines = [line for line in said.splitlines() if "installed without libmlxlora_sgemm.so" in line]
    assert len(lines) == 1 and "no C compiler (cc, gcc, clang)" in lines[0]

    environment = make_environment("no-compiler")
    (advice,) = [line for line in doctor(environment, wheel, tmp_path) if "C compiler" in line]
    assert advice.startswith(
        "advice    openblas: there was no working C compiler when mlxlora was installed: "
    )
    assert "times" in advice and advice.endswith("install a C compiler (gcc or clang), then mlxlora again")
    for command in (
        ("convert", "--torch-path", tiny_checkpoint, "--mlx-path", "model"),
        ("generate", "--model", "model", "--prompt", "A layer", "-n", "3"),
    ):
        done = environment.mlxlora(*command, cwd=tmp_path)
        assert done.returncode == 0, done.stderr


@needs_compiler
def test_with_a_compiler_the_library_is_in_the_wheel_and_in_use(
    tmp_path: Path, make_environment: Callable[[str], Any]
) -> None:
    wheel, said = build("wheel", tmp_path / "dist")
    assert "-py3-none-linux_" in wheel.name and "without" not in said
    assert {SOURCE, LIBRARY} <= names(wheel)
    lines = doctor(make_environment("compiler"), wheel, tmp_path)
    (blas,) = [line for line in lines if line.startswith("blas ")]
    assert blas.endswith("under MLX's CPU backend")
    assert not [line for line in lines if line.startswith("advice ") and "compiler" in line]


@pytest.mark.parametrize("command", ["false", "/no/such/compiler", "'unclosed"])
def test_a_compiler_that_fails_is_a_line_and_no_more(tmp_path: Path, command: str) -> None:
    wheel, said = build("wheel", tmp_path / "dist", CC=command)
    assert wheel.name.endswith("-py3-none-any.whl") and LIBRARY not in names(wheel)
    assert len([line for line in said.splitlines() if "installed without libmlxlora_sgemm.so" in line]) == 1


@needs_compiler
def test_an_editable_install_has_the_library_beside_the_source(tmp_path: Path) -> None:
    root = tmp_path / "clone"
    for name in ("pyproject.toml", "README.md", "LICENSE", "hatch_build.py", "mlxlora_core/version.py"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, root / name)
    package = root / "plugins" / "mlxlora_openblas"
    package.mkdir(parents=True)
    sources = [p for p in (ROOT / "plugins" / SOURCE).parent.iterdir() if p.suffix in (".c", ".h")]
    for path in sources:
        shutil.copy(path, package)
    wheel, _ = build("wheel:editable", tmp_path / "dist", root, CC="cc -DPORTABLE")  # a third of the time
    assert LIBRARY not in names(wheel)
    found = {path.name for path in package.iterdir()}
    assert found == {"libmlxlora_sgemm.so", *(path.name for path in sources)} and len(sources) > 1


def test_the_source_distribution_has_what_it_is_built_from_and_nothing_built(tmp_path: Path) -> None:
    made, _ = build("sdist", tmp_path / "dist")
    with tarfile.open(made) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    assert {"hatch_build.py", "pyproject.toml", f"plugins/{SOURCE}"} <= held
    assert f"plugins/{LIBRARY}" not in held
