"""The exponential of an array by numpy's loop, which works on several numbers at once.

MLX computes it a number at a time, 7 ns each as a power of e on an AVX2
machine; numpy's loop takes 1.8 ns. The one function of MLX's that can be
pointed elsewhere and sees whole arrays is the matrix product. So here a column
times one certain array, the token, is no product: the code that takes the place
of ``cblas_sgemm`` knows the token by its address and calls numpy's loop.
"""

from __future__ import annotations

import ctypes
import math
import platform
from collections.abc import Mapping
from functools import cache

import mlx.core as mx
import numpy as np

from mlxlora_openblas.machine_code import executable

_GEMM = "cblas_sgemm"

# C (n, 1) = A (n, 1) B (1, 1), row-major, comes as ecx n and, from rsp+8, A, lda, B, ldb, C. The loop of a
# ufunc wants rdi {A, C}, rsi {n}, rdx {steps in bytes} and rcx what the ufunc keeps for it; all but the last
# are put on the stack. The bytes are those that GNU as makes of the text beside them. Sources: System V ABI
# AMD64, section 3.2.3; NumPy's C API, PyUFuncGenericFunction.
_LISTING = """
f3 0f 1e fa                  endbr64
48 b8 <token>                movabs rax, token
48 39 44 24 18               cmp [rsp+24], rax
75 59                        jne gemm
48 83 ec 38                  sub rsp, 56
48 8b 44 24 40               mov rax, [rsp+64]
48 89 04 24                  mov [rsp], rax             A
48 8b 44 24 60               mov rax, [rsp+96]
48 89 44 24 08               mov [rsp+8], rax           C
48 63 c9                     movsxd rcx, ecx
48 89 4c 24 10               mov [rsp+16], rcx          n
48 c7 44 24 18 04 00 00 00   mov qword ptr [rsp+24], 4
48 c7 44 24 20 04 00 00 00   mov qword ptr [rsp+32], 4
48 89 e7                     mov rdi, rsp
48 8d 74 24 10               lea rsi, [rsp+16]
48 8d 54 24 18               lea rdx, [rsp+24]
48 b9 <data>                 movabs rcx, data
48 b8 <loop>                 movabs rax, loop
ff d0                        call rax
48 83 c4 38                  add rsp, 56
c3                           ret
48 b8 <cblas_sgemm>    gemm: movabs rax, cblas_sgemm
ff e0                        jmp rax
"""


class _UFunc(ctypes.Structure):
    """The first members of ``PyUFuncObject``. Source: numpy/ufuncobject.h, a part of its C API."""

    _fields_ = (
        ("object", ctypes.c_byte * object.__basicsize__),
        ("inputs", ctypes.c_int),
        ("outputs", ctypes.c_int),
        ("arguments", ctypes.c_int),
        ("identity", ctypes.c_int),
        ("loops", ctypes.POINTER(ctypes.c_void_p)),
        ("data", ctypes.POINTER(ctypes.c_void_p)),
        ("types", ctypes.c_int),
    )


def with_exponential(functions: Mapping[str, int]) -> dict[str, int]:
    """The functions of a BLAS, name -> address, with a ``cblas_sgemm`` under which :func:`exp` works.

    Where that cannot be, they stay as they are.
    """
    loop = _loop()
    if platform.machine() != "x86_64" or _GEMM not in functions or loop is None:
        return dict(functions)
    token = np.array(_token(), copy=False).ctypes.data
    addresses = {"token": token, **loop, _GEMM: functions[_GEMM]}
    try:
        return {**functions, _GEMM: executable(_LISTING, addresses)}
    except OSError:  # such as SELinux without execmem, or PR_SET_MDWE
        return dict(functions)


def exp(x: mx.array) -> mx.array:
    """``exp(x)`` of float32 of any shape, to 2 units in the last place; without a gradient."""
    return (x.reshape(-1, 1) @ _token()).reshape(x.shape)


def exponential_works() -> bool:
    """Whether :func:`exp`, as MLX is now, agrees with the C library in double precision."""
    numbers = np.concatenate(
        [np.linspace(-110, 88, 4099), [0.0, -0.0, -np.inf, -1e30, 1e-30]], dtype=np.float32
    )
    exact = np.array([math.exp(x) for x in numbers])
    for count in (1, 7, 8, 9, 65, numbers.size):
        got = np.array(exp(mx.array(numbers[-count:])))
        if not np.allclose(got, exact[-count:], rtol=4e-7, atol=1e-38):
            return False
    return True


def _loop() -> dict[str, int] | None:
    """Addresses of the loop that ``numpy.exp`` has for float32, and of its data; None where it has none."""
    if not isinstance(np.exp, np.ufunc) or "f->f" not in np.exp.types:
        return None
    ufunc, place = _UFunc.from_address(id(np.exp)), np.exp.types.index("f->f")
    if (ufunc.inputs, ufunc.outputs, ufunc.types) != (1, 1, len(np.exp.types)):
        return None
    return {"loop": ufunc.loops[place] or 0, "data": ufunc.data[place] or 0}


@cache
def _token() -> mx.array:
    """The array that stands for the exponential; a product with it would change nothing."""
    token = mx.ones((1, 1))
    mx.eval(token)
    return token
