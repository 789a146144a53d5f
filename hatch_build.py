"""Compiles the C files of the openblas plugin when mlxlora is built or installed, if there is a C compiler.

Where there is none, or it fails, a line in pip's log says so (``pip install -v``), mlxlora is installed
without the library, and ``mlxlora doctor`` says what that costs.
"""

from __future__ import annotations

import hashlib
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

PACKAGE = "mlxlora_openblas"
LIBRARY = "libmlxlora_sgemm.so"

#: contraction and no traps are what lets compilers make fast vectors of a loop in C11
FLAGS = (
    "-std=c11",
    "-O3",
    "-ffp-contract=fast",
    "-fno-trapping-math",
    "-fPIC",
    "-shared",
    "-pthread",
    "-fvisibility=hidden",
)

_SECONDS = 120


class SgemmBuildHook(BuildHookInterface[Any]):
    """Puts the library beside its sources: into the wheel, or for an editable install into the folder."""

    _folder: tempfile.TemporaryDirectory[str] | None = None

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile; called before the files of a wheel are collected."""
        if sys.platform != "linux":
            return
        package = Path(self.root, "plugins", PACKAGE)
        if version == "editable":
            library = package / LIBRARY
        else:
            self._folder = tempfile.TemporaryDirectory()
            library = Path(self._folder.name, LIBRARY)
        try:
            compile_library(package, library)
        except (OSError, ValueError, subprocess.SubprocessError) as fault:
            self.app.display_warning(f"mlxlora is installed without {LIBRARY}: {fault}")
            return
        if version != "editable":
            build_data["force_include"][str(library)] = f"{PACKAGE}/{LIBRARY}"
            build_data["pure_python"] = False
            platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
            build_data["tag"] = f"py3-none-{platform}"

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """Remove the library that is in the wheel now."""
        if self._folder is not None:
            self._folder.cleanup()


def compile_library(folder: Path, library: Path, *flags: str) -> None:
    """Compile all C files in ``folder`` into the shared library ``library``, which is replaced in one step.

    Args:
        folder: with the sources.
        library: what to make.
        flags: further ones for the compiler.

    Raises:
        OSError: there is no compiler, or the library cannot be written.
        ValueError: ``CC`` is no command.
        SubprocessError: the compiler fails, or takes two minutes.
    """
    sources = sorted(folder.glob("*.c"))
    made = library.with_name(f"{library.name}.{os.getpid()}")
    command = [*compiler(), *FLAGS, *flags, f'-DSOURCE="{digest(folder)}"']
    try:
        subprocess.run([*command, "-o", str(made), *map(str, sources)], check=True, timeout=_SECONDS)
        made.replace(library)
    finally:
        made.unlink(missing_ok=True)


def digest(folder: Path) -> str:
    """Of all C files and headers in ``folder``; sgemm.py of the plugin makes the same."""
    found = hashlib.sha256()
    for path in sorted([*folder.glob("*.c"), *folder.glob("*.h")]):
        found.update(path.read_bytes())
    return found.hexdigest()


def compiler() -> list[str]:
    """The command that compiles C: what ``CC`` says, else the first of cc, gcc and clang.

    Raises:
        OSError: there is none.
        ValueError: ``CC`` is no command.
    """
    named = shlex.split(os.environ.get("CC", ""))
    if named:
        return named
    for name in ("cc", "gcc", "clang"):
        if shutil.which(name):
            return [name]
    raise FileNotFoundError("no C compiler (cc, gcc, clang)")
