"""A rank that MLX holds as it joins it ends in time, with the exit code and a line, though no Python runs."""

from __future__ import annotations

import json
import signal
import socket
import sys
from pathlib import Path

import pytest
import rank_work

from mlxlora_core.errors import ExitCode

#: rank 1 meets the others, and then does not join
WORK = """
import os, signal, sys, time
from mlxlora_core.distributed import environment, starting
from mlxlora_core.distributed.group import join

starting.JOIN_SECONDS = 2.0
if environment.rank() == 1:
    starting.met_before()
    open(sys.argv[1], "w").close()
    while os.path.exists(sys.argv[1]):
        time.sleep(0.01)
    sys.exit()
if sys.argv[2:]:
    signal.pthread_sigmask(signal.SIG_BLOCK, [10])
join()
"""


@pytest.mark.parametrize("more", [(), ("deaf",)], ids=["as it is", "deaf to the signal"])
def test_a_rank_that_mlx_holds_ends_with_the_code_of_ranks(tmp_path: Path, more: tuple[str, ...]) -> None:
    mark = tmp_path / "mark"
    ranks = rank_work.start(2, [sys.executable, "-c", WORK, str(mark), *more], tmp_path)
    code = ranks[0].wait(rank_work.SECONDS)
    mark.unlink()
    (_, told), (other, _) = rank_work.finish(ranks)
    assert code == (-signal.SIGKILL if more else ExitCode.RANK) and other == 0
    assert "mlxlora: the ranks did not join within 2 s. Fix: " in told


def test_the_signal_means_afterwards_what_it_did_before(tmp_path: Path) -> None:
    program = """
import signal, sys
from mlxlora_core.distributed.group import join
heard = []
signal.signal(10, lambda *_: heard.append(1))
join()
signal.raise_signal(10)
sys.exit(heard != [1])
"""
    ranks = rank_work.start(2, [sys.executable, "-c", program], tmp_path)
    assert [code for code, _ in rank_work.finish(ranks)] == [0, 0]


def test_a_rank_that_cannot_join_is_told_of_by_the_others(tmp_path: Path) -> None:
    """Here for the port that MLX takes for it is taken."""
    program = """
from mlxlora_core.cli.session import joined
from mlxlora_core.distributed import watch
watch.GRACE_SECONDS = 0.5
with joined():
    pass
"""
    ranks = rank_work.start(2, [sys.executable, "-c", program], tmp_path)
    host, port = json.loads((tmp_path / "hosts-2.json").read_text())[1][0].rsplit(":", 1)
    with socket.create_server((host, int(port))):
        (first, told), (second, why) = rank_work.finish(ranks)
    assert first == ExitCode.RANK and second == 1  # of a traceback, for no verb shows it here
    assert "RankError: the ranks cannot join: [ring] Couldn't bind socket" in why
    assert "mlxlora: rank 1 on " in told
    assert "has ended at the start: the ranks cannot join: [ring] Couldn't bind socket" in told
