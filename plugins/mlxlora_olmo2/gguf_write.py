"""The metadata of a GGUF file: what the arguments are there, where llama.cpp can say them."""

from __future__ import annotations

from typing import Any

from mlxlora_core.api import ModelError
from mlxlora_olmo2.config import ModelArgs
from mlxlora_olmo2.gguf import ARCHITECTURE, NAMES, PREFIX, WIDTHS


def write(args: ModelArgs) -> dict[str, Any]:
    """The metadata of a model, of which :func:`mlxlora_olmo2.gguf.read` makes the same arguments.

    Raises:
        ModelError: llama.cpp would refuse the tensors, with all reasons.
    """
    told = []
    if args.n_heads * args.head_dim != args.dim:
        told.append(f"{args.n_heads} heads of {args.head_dim} are not {args.dim} wide")
    if args.attention_bias:
        told.append("the linears of attention have a bias")
    if args.tie_word_embeddings:
        told.append("its head is the embedding")
    if told:
        raise ModelError(f"llama.cpp cannot compute this model as an olmo2: {'; '.join(told)}")
    keys = {key: getattr(args, name) for name, key in NAMES.items()}
    keys |= dict.fromkeys(WIDTHS, args.head_dim)
    written = {PREFIX + key: value for key, value in keys.items() if value is not None}
    return {ARCHITECTURE: "olmo2", **written}
