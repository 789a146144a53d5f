"""The metadata of a GGUF file: what the arguments are there, where llama.cpp can say them."""

from __future__ import annotations

from typing import Any

from mlxlora_core.api import ModelError
from mlxlora_phi3.config import ModelArgs
from mlxlora_phi3.gguf import ARCHITECTURE, LONG, NAMES, PREFIX, SHORT, VALUE_WIDTH


def write(args: ModelArgs) -> dict[str, Any]:
    """The metadata of a model, of which :func:`mlxlora_phi3.gguf.read` makes the same arguments.

    A window is stated, as llama.cpp's own files do: llama.cpp does not use it.

    Raises:
        ModelError: llama.cpp would refuse the tensors.
    """
    if args.n_heads * args.head_dim != args.dim:
        raise ModelError(
            f"llama.cpp cannot compute this model as a phi3: {args.n_heads} heads of {args.head_dim} "
            f"are not {args.dim} wide"
        )
    found = {name: getattr(args, name) for name in NAMES} | {"rotary_dim": args.turned}
    keys = {PREFIX + NAMES[name]: value for name, value in found.items() if value is not None}
    written: dict[str, Any] = {ARCHITECTURE: "phi3", **keys, PREFIX + VALUE_WIDTH: args.head_dim}
    if args.rope_short_divisors is not None and args.rope_long_divisors is not None:
        written |= {SHORT: list(args.rope_short_divisors), LONG: list(args.rope_long_divisors)}
    return written
