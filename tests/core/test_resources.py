"""How much is needed and how much is free, against what is measured and what the system says."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlxlora_core import adapter_file, model_folder, resources
from mlxlora_core.convert import convert
from mlxlora_core.data import Example, Examples
from mlxlora_core.errors import ExitCode, ResourceError
from mlxlora_core.model_folder import Quantization
from mlxlora_core.registry import Registry
from mlxlora_core.resources import exhausted, free_memory, require_disk, require_memory, training_bytes
from mlxlora_core.train import train
from mlxlora_core.train_config import TrainConfig

# --- what running out looks like ----------------------------------------------


@pytest.mark.parametrize("name", ["ENOSPC", "EDQUOT", "EFBIG", "EROFS", "EMFILE", "ENFILE", "EACCES", "EIO"])
def test_a_limit_of_the_system_is_6_and_names_the_file(name: str) -> None:
    number = getattr(errno, name)
    found = exhausted(OSError(number, os.strerror(number), "some/file"))
    assert found is not None and found.exit_code == ExitCode.RESOURCE == 6
    assert str(found).startswith(f"some/file: {os.strerror(number)}. Fix: ")


@pytest.mark.parametrize(
    "fault",
    [
        MemoryError(),
        RuntimeError("[malloc] Unable to allocate 17179869184 bytes."),
        RuntimeError(
            "[METAL] Command buffer execution failed: Insufficient Memory "
            "(00000008:kIOGPUCommandBufferCallbackErrorOutOfMemory)"
        ),
        RuntimeError("cudaMallocAsync(&data, size, stream) failed: out of memory"),
        RuntimeError(
            "[metal::malloc] Attempting to allocate 99 bytes which is greater than "
            "the maximum allowed buffer size of 9 bytes."
        ),
    ],
)
def test_no_memory_is_6_however_it_is_said(fault: Exception) -> None:
    assert "there is not enough memory" in str(exhausted(fault))


def test_a_gpu_that_gives_up_is_6() -> None:
    fault = RuntimeError("[METAL] Command buffer execution failed: Caused GPU Timeout Error (00000002:...)")
    assert str(exhausted(fault)).startswith("the GPU gave up: [METAL] Command buffer")


@pytest.mark.parametrize(
    "fault", [RuntimeError("shapes differ"), FileNotFoundError(errno.ENOENT, "none"), ValueError("no memory")]
)
def test_other_faults_are_what_they_are(fault: Exception) -> None:
    assert exhausted(fault) is None


# --- disk ---------------------------------------------------------------------


def test_a_disk_is_asked_where_the_target_will_be(tmp_path: Path) -> None:
    free = shutil.disk_usage(tmp_path).free
    said = require_disk(10**6, tmp_path / "not" / "yet" / "there")
    assert said.startswith(f"{tmp_path / 'not' / 'yet' / 'there'} needs 1.00 MB of disk, ")
    with pytest.raises(ResourceError, match=r"GB of disk are needed, .* are free. Fix: free some space"):
        require_disk(free + 10**10, tmp_path / "there")


# --- memory -------------------------------------------------------------------


def fake(root: Path, **files: str) -> Path:
    """A root with files; the name of one has ``__`` for ``/``."""
    for name, text in files.items():
        path = root / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


MEMINFO = "MemTotal: 9000 kB\nMemFree: 100 kB\nMemAvailable: 8000 kB\n"


def test_what_the_machine_has_is_the_most(tmp_path: Path) -> None:
    assert free_memory(fake(tmp_path, proc__meminfo=MEMINFO)) == 8000 * 1024


def test_the_tightest_of_all_control_groups_counts(tmp_path: Path) -> None:
    root = fake(
        tmp_path,
        proc__meminfo=MEMINFO,
        proc__self__cgroup="1:cpu,cpuacct:/x\n0::/job/step\n",
        sys__fs__cgroup__job__memory="",
    )
    top = root / "sys/fs/cgroup/job"
    shutil.rmtree(top)
    (top / "step").mkdir(parents=True)
    (top / "step" / "memory.max").write_text("max\n")
    (top / "step" / "memory.current").write_text("1000000\n")
    assert free_memory(root) == 8000 * 1024, "a group without a limit"
    (top / "memory.max").write_text("5000000\n")
    (top / "memory.current").write_text("4000000\n")
    assert free_memory(root) == 1000000
    (top / "memory.stat").write_text("anon 5\ninactive_file 300000\nactive_file 7\n")
    assert free_memory(root) == 1300000, "pages of files are given away"
    (top / "step" / "memory.max").write_text("1000010\n")
    assert free_memory(root) == 10
    (top / "step" / "memory.current").write_text("2000000\n")
    assert free_memory(root) == 0


def test_groups_of_the_old_kind(tmp_path: Path) -> None:
    root = fake(tmp_path, proc__meminfo=MEMINFO, proc__self__cgroup="4:memory,hugetlb:/job\n0::/\n")
    folder = root / "sys/fs/cgroup/memory/job"
    folder.mkdir(parents=True)
    (folder / "memory.limit_in_bytes").write_text("9223372036854771712\n")
    (folder / "memory.usage_in_bytes").write_text("7\n")
    assert free_memory(root) == 8000 * 1024
    (folder / "memory.limit_in_bytes").write_text("5007\n")
    assert free_memory(root) == 5000


def test_a_limit_of_addresses_counts() -> None:
    code = "from mlxlora_core.resources import free_memory; print(free_memory())"
    done = subprocess.run(
        ["prlimit", f"--as={600 << 20}", sys.executable, "-c", code], capture_output=True, text=True
    )
    assert 400 << 20 < int(done.stdout) < 600 << 20


def test_where_nothing_is_told_it_is_the_memory_of_the_machine(tmp_path: Path) -> None:
    assert free_memory(tmp_path) == os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def test_more_than_there_is_is_refused_with_both_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resources, "free_memory", lambda: 2_000_000_000)
    assert require_memory(1_999_999_999, "it", "") == "it needs about 2.00 GB of memory, 2.00 GB are free"
    with pytest.raises(
        ResourceError, match=r"^it needs about 3\.00 GB of memory, 2\.00 GB are free. Fix: rest$"
    ):
        require_memory(3_000_000_000, "it", "rest")
    monkeypatch.setattr(resources, "free_memory", lambda: None)
    assert require_memory(10**15, "it", "") == "it needs about 1000000.00 GB of memory"


def examples(rows: int, tokens: int) -> Examples:
    draw = np.random.default_rng(0)
    mask = np.arange(tokens) > 0
    return Examples(
        tuple(Example(draw.integers(3, 300, tokens).astype(np.uint32), mask) for _ in range(rows))
    )


@pytest.mark.parametrize(
    ("dim", "layers", "adapted", "rows", "tokens", "bits", "targets"),
    [
        (64, 2, -1, 4, 64, None, ("all-linear",)),
        (128, 4, -1, 4, 128, None, ("wq", "wv")),
        (128, 12, 1, 4, 64, None, ("all-linear",)),
        (128, 4, -1, 4, 128, 4, ("all-linear",)),
        (128, 4, -1, 2, 512, None, ("all-linear",)),
        (128, 2, -1, 24, 32, None, ("all-linear",)),
        (256, 4, -1, 2, 64, 8, ("all-linear",)),
    ],
)
def test_training_takes_what_was_estimated_within_a_factor_of_two(
    tmp_path: Path,
    make_checkpoint: Callable[..., Path],
    registry: Registry,
    dim: int,
    layers: int,
    adapted: int,
    rows: int,
    tokens: int,
    bits: int | None,
    targets: tuple[str, ...],
) -> None:
    """Measured by MLX's own count of the most that it held."""
    affine = registry.find("quantizer", "affine")
    quantization = Quantization(affine, affine.spec.options(group_size=32, bits=bits)) if bits else None
    checkpoint = make_checkpoint(tmp_path / "checkpoint", dim=dim, n_layers=layers)
    convert(checkpoint, tmp_path / "model", registry, dtype="float32", quantization=quantization)
    model = model_folder.load(tmp_path / "model", registry)
    lora = registry.find("adapter", "lora")
    adapter_file.attach(model, lora, lora.spec.options(layers=adapted, targets=targets), 0)
    data = examples(rows, tokens)
    estimate = training_bytes(model, data, batch_size=rows)
    mx.clear_cache()
    held = mx.get_active_memory()
    mx.reset_peak_memory()
    config: Any = TrainConfig(iters=2, batch_size=rows)
    for _ in train(model.language_model, data.examples, (), config, 0):
        pass
    taken = mx.get_peak_memory() - held
    assert estimate / 2 < taken < estimate * 2, f"estimated {estimate}, taken {taken}"
