"""A rank that is killed, stopped or cut off: the others end in time and say so, and a resume works.

By day a sample; ``MLXLORA_TEST_ALL=1`` takes every rank at every phase, and fifty random trials.
"""

from __future__ import annotations

import os
import random
import re
import subprocess
import time
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
import rank_trials
import small_models
from bench import write_rows
from rank_trials import END_SECONDS, PHASES, Network, Ranks, happen, started, train, variables

from mlxlora_core.errors import ExitCode
from mlxlora_core.files import leftovers, tensor_file

ALL = os.environ.get("MLXLORA_TEST_ALL", "") not in ("", "0")
NO_NETWORKS = rank_trials.can_have_networks()
COUNT = 3
WAYS = ("kill", "stop", "cut")
EVERY = [(way, rank, phase) for way in WAYS for rank in range(COUNT) for phase in PHASES]
SAMPLE = [("kill", 1, "step"), ("kill", 0, "save"), ("cut", 2, "evaluation")]
TRIALS = 50
JOINING = "did not join within"


@pytest.fixture(scope="session")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small model and rows, and with what one undisturbed process makes of them."""
    folder = tmp_path_factory.mktemp("parts")
    small_models.write(folder / "model", "llama")
    write_rows(folder / "data")
    (folder / "alone").mkdir()
    done = run(train(folder / "model", folder / "data", folder / "alone"), variables(folder))
    assert done.returncode == 0, done.stderr
    return folder


def run(command: list[str], environ: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, env=environ, capture_output=True, text=True, timeout=300)


def goes_on(parts: Path, folder: Path) -> None:
    """Whatever is left of a training, another one goes on from it to its end and leaves nothing beside."""
    finished = (folder / "a.safetensors").exists()
    how = () if finished else ("--resume",) if list(folder.glob("a.checkpoints/step-*")) else ()
    if not finished:
        done = run(train(parts / "model", parts / "data", folder, *how), variables(folder))
        assert done.returncode == 0, done.stderr
    wanted, found = (tensor_file.load(place / "a.safetensors")[0] for place in (parts / "alone", folder))
    for name, tensor in wanted.items():
        np.testing.assert_allclose(np.array(found[name]), np.array(tensor), atol=1e-5, err_msg=name)
    left = [path for path in folder.rglob(".*") if path.name.endswith((leftovers.NEW, leftovers.OLD))]
    assert left == []


def check(ranks: Ranks, way: str) -> None:
    """Every other rank has ended in time, with the exit code and the line that are documented."""
    lost = ranks.lost
    waited = [rank for rank in range(len(ranks.processes)) if rank != lost or way == "cut"]
    ranks.follow(waited)
    # A process that MLX holds fast as it joins is ended from outside, and knows less of why.
    held = any(JOINING in line for line in ranks.said())
    for rank in waited:
        code, said = ranks.processes[rank].poll(), ranks.said(rank)
        assert code is not None, f"rank {rank} goes on; {ranks.said()}"
        assert ranks.ended[rank] < END_SECONDS, ranks.ended
        if code == 0 and (ranks.folder / "a.safetensors").exists():
            continue  # it had come to its end, and needed nothing of the one that was lost
        assert code == ExitCode.RANK, (rank, code, said)
        assert len(said) == 1, said
        named = "rank" if rank == lost or held else rf"ranks? {lost}\b"
        assert JOINING in said[0] or re.match(rf"mlxlora: {named}.*\. Fix: ", said[0]), said


def trial(
    parts: Path,
    folder: Path,
    way: str,
    lost: int,
    phase: str,
    seconds: float | None = None,
    count: int = COUNT,
) -> None:
    """Let one thing happen to one rank, at a phase or some seconds after the start."""
    command = train(parts / "model", parts / "data", folder)
    with ExitStack() as stack:
        network = stack.enter_context(Network(count)) if way == "cut" else None
        environ = variables(folder, phase if seconds is None else "none", lost)
        ranks = stack.enter_context(started(command, count, folder, environ, network))
        if seconds is None:
            ranks.wait_for("reached")
        else:
            ranks.pid(lost)
            time.sleep(seconds)
        if ranks.processes[lost].poll() is None:  # else it was quicker
            happen(way, ranks, lost, network)
        (folder / "go").touch()
        check(ranks, way)
    goes_on(parts, folder)


@pytest.mark.parametrize(("way", "lost", "phase"), EVERY if ALL else SAMPLE)
def test_a_lost_rank_ends_all(parts: Path, tmp_path: Path, way: str, lost: int, phase: str) -> None:
    if way == "cut" and NO_NETWORKS:
        pytest.skip(NO_NETWORKS)
    trial(parts, tmp_path / "run", way, lost, phase)


@pytest.mark.skipif(not ALL, reason="takes a quarter of an hour; MLXLORA_TEST_ALL=1")
@pytest.mark.parametrize("seed", range(TRIALS))
def test_a_rank_lost_at_any_time_ends_all(parts: Path, tmp_path: Path, seed: int) -> None:
    draw = random.Random(seed)
    count, way, seconds = draw.randint(2, 4), draw.choice(WAYS), draw.uniform(0, 6)
    lost = draw.randrange(count)
    if way == "cut" and NO_NETWORKS:
        pytest.skip(NO_NETWORKS)
    trial(parts, tmp_path / "run", way, lost, "none", seconds, count)
