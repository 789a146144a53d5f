from __future__ import annotations

import ctypes
import os
import resource
from pathlib import Path

import mlx.core as mx
import pytest

from mlxlora_core.errors import UsageError
from mlxlora_core.machine import device
from mlxlora_core.machine.device import compute_dtype


def test_compute_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    for dtype in (mx.float16, mx.bfloat16, mx.float32):
        monkeypatch.setattr(device, "on_cpu", lambda: True)
        assert compute_dtype(dtype) == mx.float32
        monkeypatch.setattr(device, "on_cpu", lambda: False)
        assert compute_dtype(dtype) == dtype


def test_streams_are_ordered_fairly_on_a_cpu_unless_the_user_has_said_how(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = mx.set_cache_limit(0)
    mx.set_cache_limit(before)
    try:
        for cpu, given, wanted in ((False, None, None), (True, "20", "20"), (True, None, str(2**20))):
            monkeypatch.setattr(device, "on_cpu", lambda cpu=cpu: cpu)
            monkeypatch.delenv(device.ORDER_WIDTH, raising=False)
            if given:
                monkeypatch.setenv(device.ORDER_WIDTH, given)
            device.prepare_cpu()
            assert os.environ.get(device.ORDER_WIDTH) == wanted
    finally:
        mx.set_cache_limit(before)
    library = next(Path(mx.__file__).parent.glob("lib/libmlx.*"))
    assert device.ORDER_WIDTH.encode() in library.read_bytes(), "MLX knows no such variable any more"


def test_freed_buffers_are_kept_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    large_bytes = 48 * 2**20
    before = mx.set_cache_limit(0)
    try:
        for cpu, kept in ((False, False), (True, True)):
            monkeypatch.setattr(device, "on_cpu", lambda cpu=cpu: cpu)
            device.prepare_cpu()
            mx.eval(mx.zeros((large_bytes // 4,)) + 1)
            assert (mx.get_cache_memory() >= large_bytes) == kept
    finally:
        mx.set_cache_limit(before)


def test_metal_keeps_as_much_in_memory_as_the_system_recommends(monkeypatch: pytest.MonkeyPatch) -> None:
    set_to: list[int] = []
    monkeypatch.setattr(mx, "set_wired_limit", set_to.append)
    monkeypatch.setattr(mx, "device_info", lambda: {"max_recommended_working_set_size": 12 << 30})
    for cpu, metal, wanted in ((True, True, []), (False, False, []), (False, True, [12 << 30])):
        monkeypatch.setattr(device, "on_cpu", lambda cpu=cpu: cpu)
        monkeypatch.setattr(mx.metal, "is_available", lambda metal=metal: metal)
        device.prepare_device()
        assert set_to == wanted

    def refused(limit: int) -> int:
        raise ValueError("[metal::set_wired_limit] this system has none")

    monkeypatch.setattr(mx, "set_wired_limit", refused)
    device.prepare_device()


def test_products_are_made_of_what_is_asked_for_and_of_float32_again(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.setattr(device, "_precisions", [told.append])
    with device.product_precision("float32"):
        assert told == []
    with pytest.raises(ValueError, match="mine"), device.product_precision("bfloat16x3"):
        assert told == ["bfloat16x3"]
        raise ValueError("mine")
    assert told == ["bfloat16x3", "float32"]


def test_what_no_runtime_can_is_refused_in_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "_precisions", [])
    with device.product_precision("float32"):
        pass
    said = r"compute is bfloat16, .*AMX.*leave compute at float32"
    with pytest.raises(UsageError, match=said) as caught, device.product_precision("bfloat16"):
        pytest.fail("went on")
    assert "\n" not in str(caught.value)


def _new_pages(numbers: range) -> int:
    """Pages fresh from the system that sums of so many numbers take, each of another size."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for count in numbers:
        mx.eval(mx.ones((count,)) + 1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="the C library is not glibc")
def test_memory_is_reused_for_other_sizes_where_work_has_ever_new_ones(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sizes = range(3 << 20, 4 << 20, 1 << 17)
    before = mx.set_cache_limit(0)
    try:
        monkeypatch.setattr(device, "on_cpu", lambda: True)
        with device.memory_for_any_size(256 << 20):
            _new_pages(sizes)
            inside = _new_pages(sizes)
        outside = _new_pages(sizes)
        assert inside * 8 < outside
        assert mx.set_cache_limit(0) == 0
    finally:
        mx.set_cache_limit(before)
