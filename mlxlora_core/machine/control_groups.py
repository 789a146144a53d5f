"""The control groups that this process is in, and the limits in them.

A container or a batch system gives a process less than the machine has. Linux
keeps such limits in control groups: the group of the process and every group
above it may set one, and the tightest counts. Version 1 mounts a hierarchy for
each kind of limit, version 2 one for all; a machine may have both.

Sources: Linux, Documentation/admin-guide/cgroup-v2.rst ("CPU Interface Files",
"Memory Interface Files"), cgroup-v1/memory.rst and scheduler/sched-bwc.rst;
cgroups(7) for ``/proc/self/cgroup``.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

ROOT = Path("/")  # of the file system; another one in tests


def control_groups(controller: str, root: Path, process: int | None = None) -> Iterator[Path]:
    """The folders of the groups that a process is in for ``controller``, and of those above them.

    Without a number it is this process.

    A container may show the path of its group as the host sees it, while the
    group itself is mounted as the root: the folders above cover that too.
    """
    hierarchy = root / "sys/fs/cgroup"
    try:
        text = (root / f"proc/{process or 'self'}/cgroup").read_text()
    except OSError:
        return
    for line in (line.split(":", 2) for line in text.splitlines()):
        if len(line) != 3 or (line[1] and controller not in line[1].split(",")):
            continue
        # Version 2 stands at the top, or beside version 1 in a folder of its own.
        names = (line[1], controller) if line[1] else ("", "unified")
        for mount in dict.fromkeys(hierarchy / name for name in names):
            group = mount / line[2].lstrip("/")
            yield from (folder for folder in (group, *group.parents) if folder.is_relative_to(mount))


def read_number(file: Path) -> int | None:
    """The number in a file; None when there is no file, or it says that there is no limit."""
    words = read_words(file)
    return int(words[0]) if len(words) == 1 and words[0].isdecimal() else None


def read_words(file: Path) -> list[str]:
    """The words in a file; none when it is not there."""
    try:
        return file.read_text().split()
    except OSError:
        return []
