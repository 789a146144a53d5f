"""One writer at a time: a lock that the kernel takes back when its holder dies.

The lock of ``NAME`` is the file ``.NAME.lock`` beside it, locked with
:manpage:`flock(2)`; it tells who holds it. A holder that ends removes the file;
one that was killed leaves it behind, free for the next, so that there is never
more than one of it and nothing to clear away by hand.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from mlxlora_core.errors import LockedError, MlxloraError, ModelError, ResourceError, SafetyError
from mlxlora_core.files.documents import parse_form
from mlxlora_core.files.forms import Map, Text
from mlxlora_core.files.input_file import open_regular
from mlxlora_core.files.writable import place_of
from mlxlora_core.path_text import too_long

_BOOT = Path("/proc/sys/kernel/random/boot_id")  # the same in every container of a machine
_HEAD = b'{"process": "'  # how each lock file begins
_HOLDER_FORM = Map(Text())
_LOCK_BYTES = 4096
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP)
_NO_WRITING = (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.ENOSPC, errno.EDQUOT)


@contextmanager
def hold(target: Path) -> Iterator[None]:
    """Hold the lock of a file or folder that is going to be written, there already or not.

    Readers need no lock, since what they read appears whole.

    Raises:
        LockedError: another process holds it, or one on another machine may;
            the message names it.
        SafetyError: the name of the lock is that of a file which is none.
        ResourceError: the lock cannot be written, or the file system has none.
    """
    place = place_of(target)
    path = place.with_name(f".{place.name}.lock")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        descriptor = _lock(path, target)
    except OSError as fault:
        fixes = dict.fromkeys(_NO_LOCKS, "name a place on a local disk")
        fixes |= dict.fromkeys(_NO_WRITING, "name a place that can be written")
        raise too_long(fault, target) or ResourceError(
            f"cannot be locked against a second run: {fault.strerror or fault}",
            where=target,
            fix=fixes.get(fault.errno or 0, ""),
        ) from fault
    try:
        yield
    finally:
        if _is_at(descriptor, path):
            path.unlink()
        os.close(descriptor)


def is_held(target: Path) -> bool:
    """Whether a process that is alive says that it holds the lock of a file or folder.

    Nothing is locked for it, so that whoever begins meanwhile is not kept from it.
    """
    place = place_of(target)
    try:
        with open_regular(place.with_name(f".{place.name}.lock"), ModelError) as file:
            holder: dict[str, str] = parse_form(file.read(_LOCK_BYTES), _HOLDER_FORM, "")
        here = _myself()
        if holder["host"] != here["host"] and holder["boot"] != here["boot"]:
            return True  # on another machine, of which nobody here knows better
        os.kill(int(holder["process"]), 0)
    except PermissionError:  # it is somebody else's, and alive
        return True
    except (OSError, MlxloraError, ValueError, KeyError, OverflowError):
        return False
    return True


def _lock(path: Path, target: Path) -> int:
    """The descriptor of the lock file, locked, with this process's name in it."""
    myself = _myself()
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not _is_at(descriptor, path):  # its holder ended, and removed it, just now
                os.close(descriptor)
                continue
            _refuse_stranger(descriptor, path)
            _check_machine(_holder(descriptor), myself, path, target)
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, json.dumps(myself).encode(), 0)
            return descriptor
        except BlockingIOError:
            who = _name(_holder(descriptor))
            os.close(descriptor)
            raise LockedError(
                f"is in use by {who}", where=target, fix="wait until it ends, or name another place"
            ) from None
        except BaseException:
            os.close(descriptor)
            raise


def _refuse_stranger(descriptor: int, path: Path) -> None:
    """Refuse to write into a file that has the name of a lock and is none.

    Raises:
        SafetyError: it holds what no lock tells.
    """
    head = os.pread(descriptor, len(_HEAD), 0).rstrip(b"\0")  # of what a machine that lost power left too
    if not _HEAD.startswith(head):
        raise SafetyError(
            "has the name of a lock, is none, and was left alone", where=path, fix="move it away"
        )


def _check_machine(holder: dict[str, str], here: dict[str, str], path: Path, target: Path) -> None:
    """Refuse a lock that another machine left, since locks may not reach over a network drive.

    Raises:
        LockedError: its holder may be alive there.
    """
    if holder and holder.get("host") != here["host"] and holder.get("boot") != here["boot"]:
        raise LockedError(
            f"was in use by {_name(holder)}, another machine, and was not released",
            where=target,
            fix=f"if nothing runs there any more, remove {path}",
        )


def _myself() -> dict[str, str]:
    """Process, machine and time, as the lock file tells them."""
    return {
        "process": str(os.getpid()),
        "host": os.uname().nodename,
        "boot": _BOOT.read_text().strip() if _BOOT.is_file() else "",
        "since": datetime.now().astimezone().isoformat(timespec="seconds"),
    }


def _holder(descriptor: int) -> dict[str, str]:
    """What a lock file tells; nothing when its holder has not written it yet."""
    try:
        holder: dict[str, str] = parse_form(os.pread(descriptor, _LOCK_BYTES, 0), _HOLDER_FORM, "")
    except ModelError:
        return {}
    return holder


def _name(holder: dict[str, str]) -> str:
    if not holder:
        return "another process"
    return f"process {holder.get('process')} on {holder.get('host')} since {holder.get('since')}"


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether an open file is the one that has this name now."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path, follow_symlinks=False))
    except FileNotFoundError:
        return False
