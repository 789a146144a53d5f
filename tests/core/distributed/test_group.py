"""What goes round between ranks comes to all of them as it was given."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest
import rank_work

from mlxlora_core.distributed.group import ALONE, join

WORK = """
import json, pathlib, sys
import mlx.core as mx
from mlxlora_core.distributed.group import join
from mlxlora_core.machine.memory import free_memory_bytes

group = join()
rank = group.rank
mark = pathlib.Path(f"{sys.argv[1]}.first")
with group.first_of_machine():
    second = mark.exists()
    mark.touch()
with group.sharing_memory():
    part = free_memory_bytes()
sums = group.sum([mx.full((2, 3), rank + 1, mx.float16), mx.arange(4) * rank, mx.array(2.0**-20)])
found = {
    "size": group.size,
    "shared": [part.hex() for part in group.share(bytes(range(rank * 7)))],
    "empty": [part.hex() for part in group.share(b"")],
    "broadcast": [group.broadcast(text).hex() for text in (b"\\x80\\xff\\x00", b"", b"abcd")],
    "sums": [x.tolist() for x in sums],
    "types": sorted({str(x.dtype) for x in sums}),
    "machines": len(set(group.machines)),
    "sharing": group.sharing_processors(),
    "second": second == (rank > 0),
    "part of the memory": part < 0.6 * free_memory_bytes(),
}
open(f"{sys.argv[1]}.{rank}", "w").write(json.dumps(found))
"""


@pytest.mark.parametrize("count", [3])
def test_every_rank_gets_what_each_has_given(tmp_path: Path, count: int) -> None:
    command = [sys.executable, "-c", WORK, str(tmp_path / "found")]
    for code, told in rank_work.finish(rank_work.start(count, command, tmp_path)):
        assert code == 0, told
    want = {
        "size": count,
        "shared": [bytes(range(rank * 7)).hex() for rank in range(count)],
        "empty": [""] * count,
        "broadcast": ["80ff00", "", b"abcd".hex()],
        "sums": [[[6.0] * 3] * 2, [0.0, 3.0, 6.0, 9.0], 3 * 2.0**-20],
        "types": ["mlx.core.float32"],
        "machines": 1,
        "sharing": count,
        "second": True,
        "part of the memory": True,
    }
    assert [json.loads((tmp_path / f"found.{rank}").read_text()) for rank in range(count)] == [want] * count


def test_a_process_by_itself_is_a_group_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    assert join() is ALONE and ALONE.leads
    assert ALONE.share(b"x") == [b"x"] and ALONE.broadcast(b"x") == b"x"
    (total,) = ALONE.sum([mx.array([1, 2], mx.bfloat16)])
    assert total.dtype == mx.float32 and total.tolist() == [1, 2]
    with ALONE.first_of_machine():
        ALONE.wait()


def test_a_group_of_one_loads_no_mlx() -> None:
    program = (
        "import sys; from mlxlora_core.distributed.group import join; join().wait(); "
        "sys.exit('mlx' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
