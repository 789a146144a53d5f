"""The openblas runtime: what it does to MLX is looked at from child processes, with it and without."""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mlxlora_openblas.elf import imports
from mlxlora_openblas.slots import Slot

from mlxlora_core import plugins as registry

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the runtime is for Linux")

#: what a child does before it looks at MLX; it tells the note, whether MLX still calls what it
#: called before, the worst error of products against float64, and a digest of all their bytes
PROBE = """
import hashlib, json
import mlx.core as mx
import numpy as np
from mlxlora_openblas.runtime import start
from mlxlora_openblas.slots import mlx_slots

slots = mlx_slots()
before = [slot.target for slot in slots]
{library}
{prepare}
rng = np.random.default_rng(7)
digest, worst = hashlib.sha256(), 0.0
for m, k, n in ((1, 300, 70), (64, 256, 512), (203, 310, 199), (5, 1, 4)):
    a, b, c = (rng.standard_normal(s).astype(np.float32) for s in ((m, k), (n, k), (m, n)))
    x, y, z = mx.array(a), mx.array(b), mx.array(c)
    exact = a.astype(np.float64) @ b.T
    for got, want in ((x @ y.T, exact), (x @ mx.array(b.T.copy()), exact), (mx.addmm(z, x, y.T), exact + c)):
        digest.update(np.array(got).tobytes())
        worst = max(worst, float(np.abs(np.array(got) - want).max() / np.sqrt(k)))
print(json.dumps(dict(
    text=note.text if note else None, warning=note.warning if note else None, worst=worst,
    advice=note.advice if note else None, exp=bool(note and note.exp),
    kept=before == [slot.target for slot in slots], digest=digest.hexdigest(),
)))
"""
START = "note = start()"


def child(code: str, **environment: str) -> str:
    """What a fresh Python prints when it runs ``code``.

    No variable of mlxlora or OpenBLAS is set but those named.
    """
    ours = ("MLXLORA_", "OPENBLAS_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], env=kept | environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def with_library(path: Path) -> str:
    """What a child does to have this library between MLX and the BLAS."""
    return f"import mlxlora_openblas.sgemm as m, pathlib; m.LIBRARY = pathlib.Path({str(path)!r})"


def probe(prepare: str = START, *, sgemm: Path = Path("none"), **environment: str) -> dict[str, Any]:
    """The findings of PROBE, with the library of sgemm.c that is named; by default there is none."""
    code = PROBE.format(library=with_library(sgemm), prepare=prepare)
    found: dict[str, Any] = json.loads(child(code, **environment))
    assert found["worst"] < 1e-5  # whatever happens, products are right
    return found


def assert_stays(found: dict[str, Any], reason: str) -> None:
    """MLX calls what it called before, and the user is told why."""
    assert found["kept"] and found["warning"]
    assert found["text"].startswith("openblas: MLX's CPU backend stays as it was: ")
    assert reason in found["text"] and "\n" not in found["text"]


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory, compile_sgemm: Callable[..., Path]) -> Path:
    """The library of sgemm.c."""
    return compile_sgemm(tmp_path_factory.mktemp("built"))


# --- in force -------------------------------------------------------------------


def test_openblas_is_put_under_mlx_with_the_same_bytes_in_every_process(built: Path) -> None:
    first, second, stock = probe(sgemm=built), probe(sgemm=built), probe("note = None")
    assert first["text"].startswith("openblas: OpenBLAS 0.")
    assert first["text"].endswith("under MLX's CPU backend")
    assert not first["kept"] and not first["warning"]
    assert first["exp"] and first["advice"] == ""
    assert stock["kept"]
    assert first["digest"] == second["digest"]


def test_without_a_library_of_sgemm_c_openblas_is_put_under_mlx_all_the_same() -> None:
    found = probe()
    assert found["text"].startswith("openblas: OpenBLAS 0.")
    assert found["text"].endswith("under MLX's CPU backend, without sgemm.c")
    assert not found["kept"] and not found["warning"] and not found["exp"]
    assert found["advice"].startswith(
        "openblas: there was no working C compiler when mlxlora was installed: "
    )
    assert found["advice"].endswith("install a C compiler (gcc or clang), then mlxlora again")


def test_kernels_that_the_environment_chooses_are_told(built: Path) -> None:
    found = probe(sgemm=built, OPENBLAS_CORETYPE="Haswell")
    assert not found["kept"] and not found["warning"]
    assert found["advice"].startswith(
        "openblas: OPENBLAS_CORETYPE=Haswell holds it to the kernels of that processor"
    )


def test_a_second_start_changes_nothing(built: Path) -> None:
    found = probe(
        """
note = start()
once = [slot.target for slot in slots]
assert start() is note
assert [slot.target for slot in slots] == once
assert mlx_slots() == slots
""",
        sgemm=built,
    )
    assert not found["kept"]


def test_products_on_two_streams_at_once_are_those_of_one(built: Path) -> None:
    child(f"""
import mlx.core as mx
import numpy as np
from mlxlora_openblas.runtime import start
{with_library(built)}
note = start()
assert note.exp and not note.warning
sizes = [(257, 129, 190), (64, 512, 300), (1, 512, 700), (1, 1000, 700), (900, 1000, 1)] * 10
pairs = [(mx.random.normal((m, k)), mx.random.normal((n, k))) for m, k, n in sizes]
mx.eval(pairs)
alone = [np.array(a @ b.T) for a, b in pairs]
streams = [mx.new_stream(mx.cpu) for _ in range(2)]
both = [[mx.matmul(a, b.T, stream=stream) for a, b in pairs] for stream in streams]
mx.eval(both)
for results in both:
    for got, want in zip(results, alone, strict=True):
        assert np.array_equal(np.array(got), want)
""")


def test_core_finds_the_runtime() -> None:
    assert [c.id for c in registry.load().of("runtime") if c.spec.name == "openblas"] == ["openblas:openblas"]


# --- which library --------------------------------------------------------------


def test_the_system_library_is_used_when_the_package_is_missing() -> None:
    found = probe("import sys; sys.modules['scipy_openblas32'] = None; " + START)
    if found["warning"]:
        assert_stays(found, "no OpenBLAS found, matrix products are slow. Fix: pip install 'mlxlora[cpu]'")
    else:
        assert found["text"].startswith("openblas: OpenBLAS 0.") and not found["kept"]


def test_a_library_named_by_path_is_used() -> None:
    import scipy_openblas32

    path = next(Path(scipy_openblas32.get_lib_dir()).glob("libscipy_openblas*.so"))
    assert not probe(MLXLORA_BLAS=str(path))["kept"]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("there-is-none.so", "No such file"),
        ("text.so", "invalid ELF header"),
        ("folder.so", "MLXLORA_BLAS: "),
        ("libm.so.6", "it has no cblas_sgemm"),
    ],
)
def test_a_named_library_that_cannot_be_used_leaves_mlx_as_it_was(
    tmp_path: Path, name: str, reason: str
) -> None:
    (tmp_path / "text.so").write_text("this is not a library\n" * 9)
    (tmp_path / "folder.so").mkdir()
    path = name if name.startswith("lib") else str(tmp_path / name)
    assert_stays(probe(MLXLORA_BLAS=path), reason)


# --- the exponential ---------------------------------------------------------------

EXPONENTIAL = """
import math
import mlx.core as mx
import numpy as np
from mlxlora_openblas.runtime import start
{library}
note = start()
assert not note.warning
a, b = (mx.array(np.random.default_rng(i).standard_normal((65, 33)).astype(np.float32)) for i in (0, 1))
assert np.allclose(np.array(a @ b.T), np.array(a, dtype=float) @ np.array(b, dtype=float).T, atol=1e-4)
{then}
"""


def test_the_exponential_is_that_of_the_c_library_for_every_size_and_layout(built: Path) -> None:
    child(
        EXPONENTIAL.format(
            library=with_library(built),
            then="""
def check(x):
    got = np.array(note.exp(x))
    numbers = np.array(x, dtype=float)
    assert got.shape == numbers.shape
    exact = np.array([math.exp(v) if v < 88.7228 else math.inf for v in numbers.ravel()]).reshape(got.shape)
    # Below the smallest normal number of float32 its steps are coarser than any bound.
    assert np.allclose(got, exact, rtol=2.5e-7, atol=1e-38)

rng = np.random.default_rng(3)
for size in [*range(1, 40), 255, 256, 257, 100_001]:
    for low, high in ((-5, 5), (-110, 0), (-1e5, 1e5)):
        check(mx.array(rng.uniform(low, high, size).astype(np.float32)))
whole = mx.array(rng.uniform(-9, 9, (6, 20, 30)).astype(np.float32))
for view in (whole.swapaxes(0, 2), whole[:, 3:7], whole[::2, :, 1::3], whole[0, 0, :1]):
    check(view)
check(mx.array([math.inf, -math.inf, 0.0, -0.0]))
assert np.isnan(np.array(note.exp(mx.array([math.nan])))).all()
ones = mx.ones((50, 1)) @ mx.ones((1, 1))  # not the one array that stands for it
assert np.array_equal(np.array(ones), np.ones((50, 1)))
""",
        )
    )


def test_the_exponential_on_two_streams_at_once_is_that_of_one(built: Path) -> None:
    child(
        EXPONENTIAL.format(
            library=with_library(built),
            then="""
arrays = [mx.random.normal((40, 500 + i)) for i in range(40)]
alone = [np.array(note.exp(x)) for x in arrays]
both = []
for stream in [mx.new_stream(mx.cpu) for _ in range(2)]:
    with mx.stream(stream):
        both.append([note.exp(x) for x in arrays])
mx.eval(both)
for results in both:
    for got, want in zip(results, alone, strict=True):
        assert np.array_equal(np.array(got), want)
""",
        )
    )


def test_an_exponential_that_does_not_work_is_not_handed_over(built: Path) -> None:
    """The library is told of another token than products come with."""
    found = probe(
        """
told, held = m.put_before, m._token()
def put_before(*arguments, **named):
    functions = told(*arguments, **named)
    m._token.cache_clear()
    return functions
m.put_before = put_before
note = start()
""",
        sgemm=built,
    )
    assert not found["exp"] and not found["kept"] and not found["warning"]
    assert "; exponentials stay with MLX, whose products are not what sgemm.c expects" in found["text"]


def test_an_array_of_too_many_numbers_for_a_product_is_left_to_mlx(built: Path) -> None:
    child(
        EXPONENTIAL.format(
            library=with_library(built),
            then="""
import mlxlora_openblas.sgemm as sgemm
x = mx.arange(12.0)
sgemm.MOST, sgemm._token = 11, None
assert np.allclose(np.array(note.exp(x)), np.exp(np.arange(12.0)))
""",
        )
    )


@pytest.mark.parametrize("alone", [False, True])
def test_training_takes_what_the_runtime_lends(built: Path, alone: bool) -> None:
    """The attention, the activation and the loss of a step, against torch in double precision.

    ``alone``: of a runtime that lends an exponential and nothing else.
    """
    child(f"""
{with_library(built)}
import mlx.core as mx
import numpy as np
import torch
from mlxlora_core.machine import device
from mlxlora_core.model import ops
from mlxlora_core.api import LayerOperations
from mlxlora_core.plugins import load, start_runtimes
start_runtimes(load(environ={{"MLXLORA_PLUGINS": ""}}))
LAYERS = {{}} if {alone} else vars(device._lent["layers"])
used = {{"exp"}} if {alone} else {{"exp_rows", "log_softmax", "scaled_exp", *LAYERS}}
calls = set()

def counted(name, function):
    return lambda *given: calls.add(name) or function(*given)

lent = {{name: device._lent[name] for name in used - LAYERS.keys()}}
device._lent.clear()
device._lent.update({{name: counted(name, function) for name, function in lent.items()}})
if LAYERS:
    device._lent["layers"] = LayerOperations(**{{name: counted(name, f) for name, f in LAYERS.items()}})
rng = np.random.default_rng(0)
q, k, v, up = (rng.standard_normal((2, 4, 90, 24)).astype(np.float32) for _ in range(4))
targets, weight = rng.integers(0, 24, 720), rng.standard_normal(24).astype(np.float32)
turned = np.arange(90)[:, None] * 100.0 ** (-np.arange(0, 24, 2) / 24)
cosine, sine = torch.tensor(np.cos(turned)), torch.tensor(np.sin(turned))

def rotated(x):
    a, b = x[..., ::2], x[..., 1::2]
    return torch.stack([a * cosine - b * sine, a * sine + b * cosine], -1).flatten(-2)

def ours(q, k, v, up):
    q, k = (ops.rotate(x, 0, 100.0) for x in (q, k))
    out = ops.silu_times(ops.attention(q, k, v, 0.2, "causal"), up)
    out = ops.rms_norm(out, mx.array(weight), 1e-5)
    return ops.cross_entropy(out.reshape(-1, 24), mx.array(targets))

def theirs(q, k, v, up):
    q, k = rotated(q), rotated(k)
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.2)
    out = torch.nn.functional.silu(out) * up
    out = torch.nn.functional.rms_norm(out, (24,), torch.tensor(weight, dtype=torch.float64), 1e-5)
    return torch.nn.functional.cross_entropy(out.reshape(-1, 24), torch.tensor(targets), reduction="sum")

value, gradients = mx.value_and_grad(ours, argnums=(0, 1, 2, 3))(*map(mx.array, (q, k, v, up)))
tensors = [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (q, k, v, up)]
want = theirs(*tensors)
want.backward()
assert calls == used, calls
assert abs(value.item() - want.item()) < 1e-5 * want.item()
for got, tensor in zip(gradients, tensors):
    exact = tensor.grad.numpy()
    assert np.abs(np.array(got) - exact).max() < 1e-5 * np.abs(exact).max()
""")


# --- the check ------------------------------------------------------------------

#: a plain BLAS, and what may be wrong with one
SOURCE = """
#include <math.h>
#include <stdint.h>
#include <string.h>
#ifdef WIDE
char *openblas_get_config(void) { return "OpenBLAS 0.3.99 USE64BITINT"; }
#endif
static float cut(float x) {
#ifdef ROUGH
  uint32_t bits; memcpy(&bits, &x, 4); bits &= 0xfffffff0u; memcpy(&x, &bits, 4);
#endif
  return x;
}
void cblas_sgemm(int order, int ta, int tb, int m, int n, int k, float alpha, const float *a, int lda,
                 const float *b, int ldb, float beta, float *c, int ldc) {
#ifdef NO_TRANSPOSE_A
  if (ta == 112) { ta = 111; lda = k; }
#endif
#ifdef NO_TRANSPOSE_B
  if (tb == 112) { tb = 111; ldb = n; }
#endif
#ifdef NO_LAST_ROW
  if (m > 100 && m % 2) m--;
#endif
#ifdef NO_BETA
  beta = 0;
#endif
  for (int i = 0; i < m; i++)
    for (int j = 0; j < n; j++) {
      double sum = 0;
      for (int p = 0; p < k; p++)
        sum += (double)cut(ta == 112 ? a[p * lda + i] : a[i * lda + p])
             * cut(tb == 112 ? b[j * ldb + p] : b[p * ldb + j]);
      float *out = c + i * ldc + j;
      *out = alpha * sum + (beta ? beta * *out : 0);
#ifdef GARBAGE
      *out = i + j;
#endif
#ifdef NOT_A_NUMBER
      if (i == 3) *out = NAN;
#endif
    }
}
#ifdef VECTOR
void cblas_sgemv(int order, int ta, int m, int n, float alpha, const float *a, int lda,
                 const float *x, int incx, float beta, float *y, int incy) {
  cblas_sgemm(order, ta, 111, ta == 112 ? n : m, 1, (ta == 112 ? m : n) - (VECTOR == 1), alpha, a, lda,
              x, incx, VECTOR == 2 ? 0 : beta, y, incy);
#if VECTOR > 9
  if (m * n >= VECTOR) y[0] += 0.5f;
#endif
}
#endif
"""


def compiled(folder: Path, define: str) -> str:
    """Path of the BLAS above with one macro defined."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("needs a C compiler")
    (folder / "blas.c").write_text(SOURCE)
    library = folder / "libwrong.so"
    flags = ["-O2", "-shared", "-fPIC", f"-D{define}"]
    subprocess.run([compiler, *flags, "-o", library, folder / "blas.c", "-lm"], check=True)
    return str(library)


@pytest.mark.parametrize(
    "define",
    [
        *("GARBAGE", "NOT_A_NUMBER", "NO_TRANSPOSE_A", "NO_TRANSPOSE_B", "NO_LAST_ROW", "NO_BETA", "ROUGH"),
    ],
)
def test_a_wrong_library_is_found_out_and_taken_back(tmp_path: Path, define: str) -> None:
    assert_stays(probe(MLXLORA_BLAS=compiled(tmp_path, define)), "products wrong, such as ")


def test_a_right_library_of_any_make_is_kept(tmp_path: Path) -> None:
    found = probe(MLXLORA_BLAS=compiled(tmp_path, "RIGHT"))
    assert found["text"].startswith("openblas: libwrong.so under MLX's CPU backend") and not found["kept"]


@pytest.mark.parametrize("define", ["RIGHT", "VECTOR=0"])
def test_a_right_library_with_vectors_or_without_is_kept_under_sgemm_c(
    tmp_path: Path, built: Path, define: str
) -> None:
    found = probe(sgemm=built, MLXLORA_BLAS=compiled(tmp_path, define))
    assert found["text"] == "openblas: libwrong.so under MLX's CPU backend"
    assert found["exp"] and not found["kept"]


@pytest.mark.parametrize("define", ["VECTOR=1", "VECTOR=2", "VECTOR=9216", "VECTOR=460800"])
def test_products_of_vectors_that_are_wrong_are_not_passed_on(
    tmp_path: Path, built: Path, define: str
) -> None:
    """VECTOR=9216 is right below 9,216 elements alone, from where threads share them."""
    found = probe(sgemm=built, MLXLORA_BLAS=compiled(tmp_path, define))
    assert "under MLX's CPU backend; its cblas_sgemv is left alone: " in found["text"]
    assert "products wrong, such as one " in found["text"]
    assert found["exp"] and not found["kept"] and not found["warning"]


def test_a_library_with_wide_integers_is_refused(tmp_path: Path) -> None:
    assert_stays(probe(MLXLORA_BLAS=compiled(tmp_path, "WIDE")), "(ILP64)")
    assert_stays(probe(MLXLORA_BLAS=compiled(tmp_path, "cblas_sgemm=cblas_sgemm64_")), "(ILP64)")


# --- where it has no business ---------------------------------------------------


@pytest.mark.parametrize(
    "elsewhere",
    [
        "import sys; sys.platform = 'darwin'",
        "mx.cuda.is_available = lambda: True",
        "mx.metal.is_available = lambda: True",
        "mx.default_device = lambda: mx.Device(mx.gpu, 0)",
    ],
)
def test_elsewhere_it_keeps_silent_and_touches_nothing(elsewhere: str) -> None:
    assert (
        child(f"""
import mlx.core as mx
from mlxlora_openblas.runtime import start
from mlxlora_openblas.slots import mlx_slots
slots = mlx_slots()
before = [slot.target for slot in slots]
{elsewhere}
assert start() is None
assert before == [slot.target for slot in slots]
with open("/proc/self/maps") as maps:
    assert "openblas" not in maps.read().replace("libscipy_openblas64_", "")  # numpy has its own
""")
        == ""
    )


def test_without_mlx_it_keeps_silent() -> None:
    child("""
import sys
sys.modules["mlx.core"] = None
from mlxlora_openblas.runtime import start
assert start() is None
""")


# --- threads --------------------------------------------------------------------


def test_threads_follow_affinity_and_the_environment() -> None:
    one = "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}); " + START
    assert ", 1 thread)" in probe(one)["text"]
    assert ", 2 threads)" in probe(one, MLXLORA_THREADS="2")["text"]


def test_a_senseless_number_of_threads_leaves_mlx_as_it_was() -> None:
    assert_stays(probe(MLXLORA_THREADS="many"), "MLXLORA_THREADS: wanted a whole number")


# --- the slots ------------------------------------------------------------------


def test_imports_are_those_that_pyelftools_reads() -> None:
    elffile = pytest.importorskip("elftools.elf.elffile")
    import mlx.core as mx
    import scipy_openblas32

    libraries = [
        *Path(mx.__file__).parent.glob("lib/libmlx.so"),
        *Path(scipy_openblas32.get_lib_dir()).glob("*.so"),
    ]
    assert libraries
    for path in libraries:
        with path.open("rb") as file:
            image = elffile.ELFFile(file)
            symbols = image.get_section_by_name(".dynsym")
            kinds = {"EM_X86_64": (6, 7), "EM_AARCH64": (1025, 1026)}[image["e_machine"]]
            want = [
                (symbols.get_symbol(relocation["r_info_sym"]).name, relocation["r_offset"])
                for section in (".rela.plt", ".rela.dyn")
                for relocation in image.get_section_by_name(section).iter_relocations()
                if relocation["r_info_type"] in kinds
            ]
        assert sorted(imports(path)) == sorted(want)


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"\x7fELF" + bytes(200))
    with pytest.raises(ValueError, match="no shared library for x86-64 or AArch64"):
        list(imports(tmp_path / "file"))


def test_a_write_protected_slot_is_written_and_protected_again() -> None:
    page = mmap.mmap(-1, mmap.PAGESIZE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(page))
    libc = ctypes.CDLL(None)
    assert libc.mprotect(ctypes.c_void_p(address), ctypes.c_size_t(mmap.PAGESIZE), mmap.PROT_READ) == 0
    slot = Slot("f", address + 64, mmap.PROT_READ)
    slot.point_at(0x1234)
    assert slot.target == 0x1234
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    spans = [([int(end, 16) for end in line[0].split("-")], line[1]) for line in lines]
    assert [letters[:2] for (start, stop), letters in spans if start <= address < stop] == ["r-"]


def test_a_slot_that_cannot_be_unprotected_is_an_error() -> None:
    with pytest.raises(OSError, match="mprotect of the slot of f"):
        Slot("f", np.iinfo(np.int64).max & -8, mmap.PROT_READ).point_at(1)
