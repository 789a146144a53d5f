"""The guard: a process without memory ends with a line and 6, and one that has some computes as before."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the runtime is for Linux")

LINE = (
    "mlxlora: there is not enough memory: this process may take no more. "
    "Fix: allow it more, or use a smaller model, smaller batches or shorter rows\n"
)

#: what every child begins with; ``allocate`` has MLX take this many bytes at once
BEGIN = """
import ctypes, resource, threading
from pathlib import Path
import mlx.core as mx
from mlxlora_openblas import guard
from mlxlora_openblas.slots import mlx_slots

def allocate(count):
    mx.eval(mx.ones((count // 4,)))

def bytes_of(column):
    return int(Path("/proc/self/statm").read_text().split()[column]) * resource.getpagesize()

def limit_addresses(more):
    most = bytes_of(0) + more
    resource.setrlimit(resource.RLIMIT_AS, (most, most))

mx.eval(mx.ones(4) + 1)  # threads and buffers of MLX are there
slots = mlx_slots("malloc")
before = [slot.target for slot in slots]
"""


def child(code: str) -> subprocess.CompletedProcess[str]:
    """A fresh Python that runs BEGIN and ``code``, with two threads to compute."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("MLXLORA_")}
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", BEGIN + code],
        env=kept | {"MLXLORA_THREADS": "2"},
        capture_output=True,
        text=True,
        timeout=120,
    )


def passes(code: str) -> str:
    """What a child prints that ends well."""
    done = child(code)
    assert done.returncode == 0, done.stderr
    return done.stdout


def ends_with_the_line(code: str) -> None:
    """The child says its line, and nothing more, and ends with 6."""
    done = child(code)
    assert (done.returncode, done.stderr) == (6, LINE)


# --- the allocator ------------------------------------------------------------


def test_mlx_takes_its_memory_from_operator_new() -> None:
    passes("""
assert len(before) >= 1
assert guard.start() is None
new = ctypes.cast(ctypes.CDLL("libstdc++.so.6")._Znwm, ctypes.c_void_p).value
assert {slot.target for slot in slots} == {new} and new not in before
assert guard.start() is None
assert {slot.target for slot in slots} == {new}
""")


def test_what_is_computed_is_the_same() -> None:
    code = """
mx.random.seed(3)
x = mx.random.normal((300, 200)) @ mx.random.normal((200, 100))
import hashlib, numpy
print(hashlib.sha256(numpy.array(x).tobytes()).hexdigest())
"""
    assert passes("guard.start()" + code) == passes(code)


def test_without_memory_the_process_ends_with_the_line() -> None:
    ends_with_the_line("guard.start(); limit_addresses(300 << 20); allocate(2 << 30)")


def test_so_it_does_in_a_thread() -> None:
    ends_with_the_line("""
guard.start()
limit_addresses(300 << 20)
def work():
    mx.eval(mx.ones((1 << 29,), stream=mx.new_stream(mx.cpu)))
thread = threading.Thread(target=work)
thread.start()
thread.join()
""")


def test_what_the_guard_is_for_happens_without_it() -> None:
    """When this fails, MLX sees to it itself, and the guard can go."""
    done = child("limit_addresses(300 << 20); allocate(2 << 30)")
    assert done.returncode < 0, done.stderr


def test_with_memory_nothing_ends() -> None:
    passes("guard.start(); limit_addresses(1 << 30); allocate(300 << 20)")


# --- where it is not set ------------------------------------------------------


def test_where_mlx_computes_on_a_gpu_nothing_is_changed() -> None:
    passes("""
limits = resource.getrlimit(resource.RLIMIT_DATA)
guard.computes_on_cpu = lambda: False
guard.free_in_groups_bytes = lambda: 100 << 20
assert guard.start() is None
assert [slot.target for slot in slots] == before
assert resource.getrlimit(resource.RLIMIT_DATA) == limits
""")


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        ("guard._NEW = 'no_such_function'", "undefined symbol: no_such_function"),
        ("guard._SET_HANDLER = 'no_such_function'", "undefined symbol: no_such_function"),
        ("guard.mlx_slots = lambda names: []", "libmlx.so takes no malloc from another library"),
        (
            "slots_of._holds_function = lambda *_: False",
            "is not what the file says",
        ),
        ("slots_of.imports = lambda _: open('/none')", "/none"),
    ],
    ids=["no operator new", "no handler", "no slot", "another memory", "no file"],
)
def test_a_guard_that_cannot_be_set_is_a_warning_and_changes_nothing(broken: str, reason: str) -> None:
    said = passes(f"""
import mlxlora_openblas.slots as slots_of
look = slots_of._holds_function, slots_of.imports
{broken}
note = guard.start()
slots_of._holds_function, slots_of.imports = look
assert note.warning and [slot.target for slot in slots] == before
print(note.text)
""")
    assert said.startswith("guard: too little memory would end in a crash: ") and reason in said
    assert said.count("\n") == 1


# --- control groups -----------------------------------------------------------


def test_what_control_groups_leave_becomes_a_limit_that_ends_with_the_line() -> None:
    code = "guard.free_in_groups_bytes = lambda: 200 << 20; guard.start(); allocate({} << 20)"
    ends_with_the_line(code.format(1000))
    passes(code.format(100))


def test_without_control_groups_there_is_no_limit() -> None:
    passes("""
guard.free_in_groups_bytes = lambda: None
limits = resource.getrlimit(resource.RLIMIT_DATA)
guard.start()
assert resource.getrlimit(resource.RLIMIT_DATA) == limits
""")


def test_the_limit_leaves_a_share_for_what_else_counts() -> None:
    """98 % of what is free but 16 MiB, and a stack of 9 MiB for each of two threads."""
    passes("""
free = 1 << 30
held = bytes_of(5)
guard._limit(free)
soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
assert abs(soft - held - (free * 98 // 100 - (16 << 20) + 2 * (9 << 20))) < 4 << 20
assert hard == resource.RLIM_INFINITY
""")


def test_a_lower_limit_of_the_user_stays_and_a_higher_one_does_not() -> None:
    passes("""
resource.setrlimit(resource.RLIMIT_DATA, (6 << 30, resource.RLIM_INFINITY))
guard._limit(32 << 30)
assert resource.getrlimit(resource.RLIMIT_DATA)[0] == 6 << 30
guard._limit(1 << 30)
assert resource.getrlimit(resource.RLIMIT_DATA)[0] < 6 << 30
""")


def test_a_group_with_nothing_left_takes_back_nothing_that_is_held() -> None:
    passes("""
guard._limit(0)
held = bytes_of(5)
assert resource.getrlimit(resource.RLIMIT_DATA)[0] >= held
threading.Thread(target=len, args=("",)).start()
""")


@pytest.mark.parametrize(
    "limited", ["guard.free_in_groups_bytes = lambda: 8 << 30", "limit_addresses(8 << 30)"]
)
def test_where_memory_is_limited_blas_has_its_buffers_before(limited: str) -> None:
    passes(f"""
taken = []
guard._take_buffers = lambda: taken.append(resource.getrlimit(resource.RLIMIT_DATA)[0])
guard.free_in_groups_bytes = lambda: None
{limited}
guard.start()
assert taken == [resource.RLIM_INFINITY], taken
""")
