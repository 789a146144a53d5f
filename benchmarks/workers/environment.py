"""The environment that every contestant is measured in."""

from __future__ import annotations

import os

import click

# It holds OpenBLAS, which MLX and numpy multiply with, to the kernels of one kind of processor.
# PyTorch brings MKL, which it does not reach.
_HELD = "OPENBLAS_CORETYPE"


def own_kernels() -> None:
    """Let each library choose its kernels for this processor, in this process and in its children."""
    value = os.environ.pop(_HELD, None)
    if value is not None:
        click.echo(f"{_HELD}={value} is set aside: each library chooses its own kernels", err=True)
