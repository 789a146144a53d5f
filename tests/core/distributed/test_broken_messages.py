"""A message that fails because a rank is gone is an error, and never numbers that nobody has sent."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

#: rank 1 goes away in the middle of the messages of rank 0
PROGRAM = """
import os, sys
import mlx.core as mx

mx.set_default_device(mx.cpu)
from mlxlora_core.distributed.group import Group

group = mx.distributed.init(strict=True, backend="ring")
group = Group(group.rank(), group.size())
for number in range(100):
    if number == 5 and group.rank == 1:
        os._exit(0)
    said = b"a" * (group.rank + 1)
    found = getattr(group, sys.argv[1])(said)
    assert found in (b"a", [b"a", b"aa"]), found
"""


@pytest.mark.parametrize("function", ["share", "broadcast"])
def test_a_message_that_failed_raises(tmp_path: Path, function: str) -> None:
    port = random.randrange(12_000, 20_000)
    hosts = tmp_path / "hosts.json"
    hosts.write_text(json.dumps([[f"127.0.0.1:{port}"], [f"127.0.0.1:{port + 1}"]]))
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, function],
            env={**os.environ, "MLX_RANK": str(rank), "MLX_HOSTFILE": str(hosts)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    _, said = processes[0].communicate(timeout=60)
    processes[1].communicate(timeout=60)
    assert "RuntimeError: [ring] connection to a peer was lost" in said
