"""A rank of a ring that sums a message again and again, and says when each sum began and ended.

``python summing.py RANK NUMBERS REPEATS``; each line of its input is the name of a host file, for which
a child joins the ring, and a line of JSON with the times is the answer. Times are those of the system's
monotonic clock, which all ranks on one machine share.
"""

from __future__ import annotations

import json
import os
import sys
import time
from contextlib import suppress
from typing import Any

import mlx.core as mx

#: for which nothing is said between two sums, as while a step is computed: TCP forgets then what it knew
IDLE_SECONDS = 2.5


def measure(numbers: int, repeats: int) -> dict[str, Any]:
    """When sums began and ended, and how many they were: after some time without any, and in a row."""
    mx.set_default_device(mx.cpu)
    mx.distributed.init(strict=True, backend="ring")
    message = mx.ones(numbers)

    def timed(times: int) -> tuple[float, float, int]:
        began = time.monotonic()
        for _ in range(times):
            mx.eval(mx.distributed.all_sum(message))
        return began, time.monotonic(), times

    def together() -> None:
        mx.eval(mx.distributed.all_sum(mx.ones(1)))

    timed(3)
    after_idle, in_a_row = [], []
    for _ in range(repeats):
        together()
        time.sleep(IDLE_SECONDS)
        after_idle.append(timed(1))
    for _ in range(repeats):
        together()
        in_a_row.append(timed(4))
    return {"after_idle": after_idle, "in_a_row": in_a_row}


def main() -> None:
    """Answer line after line."""
    rank, numbers, repeats = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    with suppress(PermissionError):
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(10))
    for line in sys.stdin:
        if os.fork() == 0:
            os.environ.update(MLX_HOSTFILE=line.strip(), MLX_RANK=rank)
            sys.stdout.write(json.dumps(measure(numbers, repeats)) + "\n")
            sys.stdout.flush()
            os._exit(0)
        os.wait()


if __name__ == "__main__":
    main()
