"""Products with one row or one column, passed on to ``cblas_sgemv``.

MLX has one function for all products, and on x86-64 OpenBLAS's gemm copies a
matrix into panels before it multiplies, even where a single row needs each
number once: decoding then runs at half of what the memory gives. The code here
takes the place of ``cblas_sgemm``, calls ``cblas_sgemv`` for one row or one
column, and is gemm for all else. Builds for other processors pass such
products on themselves.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping

from mlxlora_openblas.machine_code import executable

_GEMM, _GEMV = "cblas_sgemm", "cblas_sgemv"

# Row-major C (M, N) = alpha op(A) op(B) + beta C comes as edi order, esi transA, edx transB, ecx M, r8d N,
# r9d K, xmm0 alpha, xmm1 beta and, from rsp+8, A, lda, B, ldb, C, ldc. cblas_sgemv wants edi order,
# esi trans, edx rows, ecx columns, r8 matrix, r9d its step, xmm0, xmm1 and, from rsp+8, x, step, y, step:
# the arguments change places, and a jump leaves the return address where it is. The bytes are those that
# GNU as makes of the text beside them. 101 is row-major, 111 plain, 112 transposed. Sources: System V ABI
# AMD64, section 3.2.3; the CBLAS standard, BLAST Forum, appendix B.
_LISTING = """
f3 0f 1e fa                  endbr64
83 ff 65                     cmp edi, 101
0f 85 b2 00 00 00            jne gemm
45 85 c9                     test r9d, r9d              without terms gemv would leave C as it is
0f 8e a9 00 00 00            jle gemm
83 f9 01                     cmp ecx, 1
75 48                        jne column
b8 01 00 00 00               mov eax, 1                 row: x is A, its step 1, or lda where A is a column
83 fe 6f                     cmp esi, 111
0f 45 44 24 10               cmovne eax, [rsp+16]
be 70 00 00 00               mov esi, 112               y = B' x of a plain B (K, N)
44 89 c1                     mov ecx, r8d
83 fa 6f                     cmp edx, 111
44 89 ca                     mov edx, r9d
74 07                        je 1f
be 6f 00 00 00               mov esi, 111               y = B x of B (N, K)
87 ca                        xchg edx, ecx
4c 8b 44 24 18            1: mov r8, [rsp+24]           the matrix is B
44 8b 4c 24 20               mov r9d, [rsp+32]
48 89 44 24 10               mov [rsp+16], rax
48 8b 44 24 28               mov rax, [rsp+40]          y is C
48 89 44 24 18               mov [rsp+24], rax
48 c7 44 24 20 01 00 00 00   mov qword ptr [rsp+32], 1
eb 50                        jmp gemv
41 83 f8 01          column: cmp r8d, 1
75 56                        jne gemm
b8 01 00 00 00               mov eax, 1                 x is B, its step ldb, or 1 where B is a row
83 fa 6f                     cmp edx, 111
0f 44 44 24 20               cmove eax, [rsp+32]
89 ca                        mov edx, ecx               y = A x of a plain A (M, K)
44 89 c9                     mov ecx, r9d
83 fe 6f                     cmp esi, 111
74 07                        je 2f
be 70 00 00 00               mov esi, 112               y = A' x of A (K, M)
87 ca                        xchg edx, ecx
4c 8b 44 24 08            2: mov r8, [rsp+8]            the matrix is A
44 8b 4c 24 10               mov r9d, [rsp+16]
48 89 44 24 10               mov [rsp+16], rax
48 8b 44 24 18               mov rax, [rsp+24]
48 89 44 24 08               mov [rsp+8], rax
48 8b 44 24 28               mov rax, [rsp+40]          y is C, its step ldc
48 89 44 24 18               mov [rsp+24], rax
8b 44 24 30                  mov eax, [rsp+48]
48 89 44 24 20               mov [rsp+32], rax
48 b8 <cblas_sgemv>    gemv: movabs rax, cblas_sgemv
ff e0                        jmp rax
48 b8 <cblas_sgemm>    gemm: movabs rax, cblas_sgemm
ff e0                        jmp rax
"""


def forwarding(functions: Mapping[str, int]) -> dict[str, int]:
    """The functions of a BLAS, name -> address, with ``cblas_sgemm`` passing vectors on where that is faster.

    Where there is no ``cblas_sgemv``, or the system lets nobody make code, they stay as they are.
    """
    if platform.machine() != "x86_64" or not {_GEMM, _GEMV} <= functions.keys():
        return dict(functions)
    try:
        return {**functions, _GEMM: executable(_LISTING, functions)}
    except OSError:  # such as SELinux without execmem, or PR_SET_MDWE
        return dict(functions)
