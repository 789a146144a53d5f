"""A product with a 4-bit weight: by MLX's packed kernel, with the weight expanded first, and dense.

    python benchmarks/quantized.py [--outputs 11008] [--inputs 4096]

Milliseconds of ``x @ w.T`` and of its gradient ``dy @ w`` in bfloat16, for more
and more rows. It is what ``CUDA_ROWS`` in ``plugins/mlxlora_affine/packing.py`` was read off.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import click
import mlx.core as mx
from workers.environment import own_kernels

ROWS = (1, 8, 64, 512, 1024, 2048)
REPEATS = 20
GROUP, BITS = 64, 4


def milliseconds(compute: Callable[[], mx.array]) -> float:
    """Mean time of one call, after two that are not counted."""
    for _ in range(2):
        mx.eval(compute())
    began = time.perf_counter()
    for _ in range(REPEATS):
        mx.eval(compute())
    return 1e3 * (time.perf_counter() - began) / REPEATS


@click.command(help=(__doc__ or "").split("\n\n")[0])
@click.option("--outputs", default=11008, show_default=True)
@click.option("--inputs", default=4096, show_default=True)
def main(outputs: int, inputs: int) -> None:
    """Measure and print, a line for each number of rows."""
    own_kernels()
    dense = (mx.random.normal((outputs, inputs)) * inputs**-0.5).astype(mx.bfloat16)
    packed = mx.quantize(dense, group_size=GROUP, bits=BITS)
    mx.eval(dense, packed)

    def expanded() -> mx.array:
        return mx.dequantize(*packed, group_size=GROUP, bits=BITS)

    def by_kernel(x: mx.array, transpose: bool) -> mx.array:
        return mx.quantized_matmul(x, *packed, transpose=transpose, group_size=GROUP, bits=BITS)

    for rows in ROWS:
        x, dy = (mx.random.normal((rows, width)).astype(mx.bfloat16) for width in (inputs, outputs))
        mx.eval(x, dy)
        ways: dict[str, tuple[Callable[[], mx.array], Callable[[], mx.array]]] = {
            "dense": (lambda x=x: x @ dense.T, lambda dy=dy: dy @ dense),
            "packed": (lambda x=x: by_kernel(x, True), lambda dy=dy: by_kernel(dy, False)),
            "expanded": (lambda x=x: x @ expanded().T, lambda dy=dy: dy @ expanded()),
        }
        found = {name: tuple(map(milliseconds, pair)) for name, pair in ways.items()}
        for i, what in enumerate(("forward", "gradient")):
            told = "  ".join(f"{name} {times[i]:.3f} ms" for name, times in found.items())
            click.echo(f"{rows:5d} rows  {what:8s}  {told}")


if __name__ == "__main__":
    main()
