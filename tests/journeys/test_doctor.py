"""``mlxlora doctor``: what it says is true, and it says it also where parts are missing."""

from __future__ import annotations

import importlib.metadata
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mlxlora_core.machine import doctor as doctor_module
from mlxlora_core.machine.doctor import Device, Threads, advice
from mlxlora_core.version import __version__

Command = Callable[..., Any]


def doctor(*flags: str, before: str = "", **environment: str) -> tuple[str, str]:
    """stdout and stderr of ``mlxlora doctor`` in a fresh process, which first runs ``before``."""
    call = "from mlxlora_core.cli import execute\nsys.exit(execute(['doctor', *sys.argv[1:]]))"
    code = f"import sys\n{before}\n{call}"
    kept = {name: value for name, value in os.environ.items() if not name.startswith("MLXLORA_")}
    done = subprocess.run(
        [sys.executable, "-c", code, *flags], env=kept | environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


CHOICE = """
import mlxlora_core.cli.doctor as page
from mlxlora_core.runtime_started import RuntimeStarted
kept = []
def prefer(variables):
    kept.append(dict(variables))
    if {full}:
        raise OSError("the disk is full")
rates = {{"slow": 5.0, "none": None, "fast": 7.0}}
note = RuntimeStarted("mine", alternatives=lambda: [{{"LIB": name}} for name in rates], prefer=prefer)
page.start_runtimes = lambda registry: [note]
page.doctor.runtime_matmul_gflops = lambda variables: rates[variables["LIB"]]
import atexit
atexit.register(lambda: print("kept", kept, file=sys.stderr))
"""


@pytest.mark.parametrize("full", [False, True])
def test_the_fastest_of_several_libraries_is_kept_and_told(full: bool) -> None:
    out, err = doctor(before=CHOICE.format(full=full))
    assert "libraries GFLOP/s: slow 5, none cannot, fast 7; from now on fast\n" in out
    assert "kept [{'LIB': 'fast'}]" in err
    assert ("fast is the fastest, and that cannot be remembered: the disk is full" in out) == full


@pytest.mark.skipif(sys.platform != "linux", reason="the runtime is for Linux")
def test_a_process_with_a_library_is_measured_and_one_that_cannot_have_it_is_not() -> None:
    import scipy_openblas32

    path = next(Path(scipy_openblas32.get_lib_dir()).glob("libscipy_openblas*.so"))
    rate = doctor_module.runtime_matmul_gflops({"MLXLORA_BLAS": str(path)})
    assert rate is not None and rate > 0
    assert doctor_module.runtime_matmul_gflops({"MLXLORA_BLAS": "/there-is-none.so"}) is None


@pytest.fixture(scope="module")
def facts() -> Any:
    """What it finds here, with one thread."""
    return json.loads(doctor("--json", MLXLORA_THREADS="1")[0])


def test_versions_and_plugins_are_those_that_are_installed(facts: Any) -> None:
    assert facts["versions"]["mlxlora"] == __version__
    for name in ("mlx", "numpy", "sentencepiece"):
        assert facts["versions"][name] == importlib.metadata.version(name)
    status = {plugin["name"]: plugin["status"] for plugin in facts["plugins"]}
    built_in = importlib.metadata.distribution("mlxlora").entry_points.select(group="mlxlora")
    assert {entry.name for entry in built_in} <= status.keys()
    assert status["llama"] == "active"


def test_the_device_is_the_one_that_mlx_names(facts: Any) -> None:
    import mlx.core as mx

    assert facts["device"]["kind"] == mx.default_device().type.name
    assert facts["products"]["gflops"] > 0


@pytest.mark.skipif(sys.platform != "linux", reason="looks at Linux's files")
def test_threads_memory_and_disk_are_what_the_system_says(facts: Any) -> None:
    meminfo = Path("/proc/meminfo").read_text().split()
    assert facts["memory"]["total_bytes"] == int(meminfo[meminfo.index("MemTotal:") + 1]) * 1024
    assert 0 < facts["memory"]["available_bytes"] < facts["memory"]["total_bytes"]
    assert facts["threads"]["allowed"] == len(os.sched_getaffinity(0))
    assert (facts["threads"]["count"], facts["threads"]["variable"]) == (1, "1")
    assert facts["disk"]["total_bytes"] == os.statvfs(".").f_blocks * os.statvfs(".").f_frsize


@pytest.mark.skipif(sys.platform != "linux", reason="a GPU multiplies larger matrices")
def test_a_rate_is_operations_by_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    readings = itertools.count(0.0, 0.25)
    monkeypatch.setattr("mlxlora_core.machine.doctor.time.perf_counter", lambda: next(readings))
    assert doctor_module.matmul_gflops() == pytest.approx(2 * 512**3 / 0.25 / 1e9)


def test_a_person_gets_a_line_each(mlxlora: Command) -> None:
    done = mlxlora("doctor", "-P", "no:samplers")
    assert done.code == 0
    for word in ("system", "device", "products", "blas", "threads", "memory", "disk", "versions", "advice"):
        assert [line for line in done.out.splitlines() if line.startswith(word + " ")], word
    assert "samplers: disabled: -P no:samplers" in done.out.splitlines()


def test_without_mlx_it_says_what_to_install() -> None:
    hide = "sys.modules['mlx'] = sys.modules['mlx.core'] = None"
    told = json.loads(doctor("--json", before=hide)[0])
    assert "mlx" in told["device"]["error"] and told["products"] is None
    assert any("pip install 'mlxlora[c" in line for line in told["advice"])
    assert "none: " in doctor(before=hide)[0]


def test_without_torch_it_says_what_to_install() -> None:
    out, err = doctor(before="sys.modules['torch'] = sys.modules['mlx.core'] = sys.modules['mlx'] = None")
    assert "advice    PyTorch checkpoints cannot be read without torch: pip install 'mlxlora[torch]'" in out
    assert err == ""


@pytest.mark.skipif(sys.platform != "linux", reason="the runtime is for Linux")
def test_what_a_runtime_warns_of_is_advice() -> None:
    out, _ = doctor(MLXLORA_BLAS="/no/such/library.so")
    assert "advice    openblas: MLX's CPU backend stays as it was: MLXLORA_BLAS: " in out
    assert "blas      MLX's own: no runtime has changed it" in out


@pytest.mark.skipif(sys.platform != "linux", reason="the runtime is for Linux")
def test_what_a_runtime_would_be_faster_with_is_advice() -> None:
    hide = "import pathlib, mlxlora_openblas.sgemm as sgemm; sgemm.LIBRARY = pathlib.Path('none')"
    out, err = doctor(before=hide)
    (blas,) = [line for line in out.splitlines() if line.startswith("blas ")]
    assert blas.endswith("under MLX's CPU backend, without sgemm.c")
    (advice,) = [line for line in out.splitlines() if "C compiler" in line]
    assert advice.startswith(
        "advice    openblas: there was no working C compiler when mlxlora was installed: a token "
    )
    assert err == ""


def test_a_senseless_number_of_threads_does_not_stop_it() -> None:
    told = json.loads(doctor("--json", MLXLORA_THREADS="many")[0])
    assert told["threads"]["count"] is None
    assert "MLXLORA_THREADS is 'many': set it to a whole number, or unset it" in told["advice"]


CPU = Device("cpu", "cpu", "any")


@pytest.mark.parametrize(
    ("spread", "complains"),
    [
        (Threads(8, 8, None, "", 8), False),
        (Threads(8, 2, None, "8", 8), True),
        (Threads(8, 8, 1.5, "2", 2), True),
        (Threads(8, 8, 0.5, "", 1), False),
        (Threads(8, 8, 0.5, "1", 1), False),
        (Threads(8, 8, None, "8", 8), False),
    ],
)
def test_more_threads_than_processors_is_said(spread: Threads, complains: bool) -> None:
    assert any("more than the processors" in line for line in advice(CPU, [], spread)) == complains


def test_an_unused_nvidia_gpu_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    spread = Threads(2, 2, None, "", 2)
    monkeypatch.setattr(doctor_module, "nvidia_present", lambda: True)
    assert "pip install 'mlxlora[cuda13]'" in advice(CPU, ["a warning"], spread)[0]
    assert "pip install 'mlxlora[cuda13]'" in advice(None, [], spread)[0]
    assert not any("NVIDIA" in line for line in advice(Device("gpu", "cuda", "H"), [], spread))
