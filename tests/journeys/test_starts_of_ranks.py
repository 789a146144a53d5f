"""Every way to start ranks on one machine that docs/several-machines.md names trains the same adapter."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlxlora_core.machine.processors import thread_count

HOSTS = [{"ssh": "localhost", "ips": ["127.0.0.1"]}] * 2
#: as the script that MLX installs does
LAUNCH = [sys.executable, "-c", "from mlx._distributed_utils.launch import main; main()"]
MLXLORA = [sys.executable, "-m", "mlxlora_core"]
MPI = ["mpirun", "--allow-run-as-root", "--oversubscribe", "--bind-to", "none", "-np", "2"]
#: what comes before and after ``mlxlora train``
STARTS: Mapping[str, tuple[list[str], list[str]]] = {
    "alone": ([], []),
    "-n": ([], ["-n", "2"]),
    "--hosts": ([], ["--hosts", "hosts.json"]),
    "mlx.launch": ([*LAUNCH, "-n", "2", "-p", str(random.randrange(15000, 19990)), "--"], []),
    "mpirun": (MPI, []),
}


@pytest.fixture
def train(tmp_path: Path, tiny_model: Path, tiny_data: Path) -> Callable[[str], dict[str, Any]]:
    """Trains as one of the starts says; what was trained, by name."""
    (tmp_path / "hosts.json").write_text(json.dumps(HOSTS))
    given = f"""--model {tiny_model} --data {tiny_data} --iters 6 --batch-size 4 --learning-rate 0.01
        --lora-layers 1 --set adapter.rank=2 --set adapter.dropout=0.1 --steps-per-eval 3""".split()
    variables = {k: v for k, v in os.environ.items() if not k.startswith(("MLX_", "OMPI_", "PMI_"))}

    def run(start: str) -> dict[str, Any]:
        before, after = STARTS[start]
        file = tmp_path / f"{start.strip('-')}.safetensors"
        command = [*before, *MLXLORA, "train", *given, "--adapter-file", str(file), *after]
        done = subprocess.run(
            command,
            cwd=tmp_path,
            env={**variables, "MLXLORA_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        said = done.stdout + done.stderr  # mlx.launch shows both as one
        assert said.count("step 6/6  valid loss") == 1, "one rank alone shows what is done"
        return {name: np.array(tensor) for name, tensor in mx.load(str(file)).items()}

    return run


def test_all_come_to_what_one_process_comes_to(train: Callable[[str], dict[str, Any]]) -> None:
    """And those with two ranks to the same bits."""
    alone = train("alone")
    found = {s: train(s) for s in STARTS if s != "alone" and (s != "mpirun" or shutil.which(s))}
    for start, tensors in found.items():
        assert tensors.keys() == alone.keys()
        for name, tensor in tensors.items():
            np.testing.assert_allclose(tensor, alone[name], atol=1e-5, rtol=0, err_msg=f"{start} {name}")
            assert np.array_equal(tensor, found["-n"][name]), f"{start} {name}"


def test_ranks_of_a_machine_share_its_cores(tmp_path: Path, tiny_model: Path, tiny_data: Path) -> None:
    """Each takes its part of them, unless somebody says how many."""
    cores = {}
    for said in ({}, {"MLXLORA_THREADS": "3"}):
        file = tmp_path / f"adapter{len(said)}.safetensors"
        given = (
            f"--model {tiny_model} --data {tiny_data} --iters 1 --lora-layers 1 --adapter-file {file} -n 2"
        )
        variables = {name: value for name, value in os.environ.items() if name != "MLXLORA_THREADS"}
        command = [*MLXLORA, "train", *given.split()]
        subprocess.run(command, env=variables | said, check=True, capture_output=True, timeout=300)
        (manifest,) = file.with_suffix(".checkpoints").glob("step-*/MANIFEST.json")
        cores[len(said)] = json.loads(manifest.read_text())["versions"]["cores"]
    assert cores == {0: str(max(1, thread_count() // 2)), 1: "3"}
