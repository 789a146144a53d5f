"""Two names change places in one step, where the system can do that."""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path

_HERE = {"linux": -100, "darwin": -2}  # AT_FDCWD: names are relative to the working directory
_EXCHANGE = 2  # RENAME_EXCHANGE on Linux, RENAME_SWAP on macOS
_FUNCTIONS = {"linux": "renameat2", "darwin": "renameatx_np"}
_CANNOT = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EPERM)


def exchange(one: Path, other: Path) -> bool:
    """Let two files or folders of one file system change places, so that neither name is ever without one.

    Returns:
        Whether it was done; False where the system or the file system cannot do it.

    Raises:
        OSError: one of them is not there, or a folder cannot be written.
    """
    import ctypes  # needed once a run, and not for help

    function = getattr(ctypes.CDLL(None, use_errno=True), _FUNCTIONS.get(sys.platform, ""), None)
    if function is None:
        return False
    names = os.fsencode(one), os.fsencode(other)
    here = _HERE[sys.platform]
    function.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint)
    if function(here, names[0], here, names[1], _EXCHANGE) == 0:
        return True
    fault = ctypes.get_errno()
    if fault in _CANNOT:
        return False
    raise OSError(fault, os.strerror(fault), str(other))
