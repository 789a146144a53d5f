"""The metadata of a GGUF file: what the arguments are there, where llama.cpp can say them."""

from __future__ import annotations

from typing import Any

from mlxlora_core.api import ModelError
from mlxlora_gemma.config import GEMMA2, GEMMA3, ModelArgs
from mlxlora_gemma.gguf import ARCHITECTURE, EVERY, NAMES, PLAIN, SCALED_BY_WIDTH, SCALING, TYPES, WIDTHS


def write(args: ModelArgs) -> dict[str, Any]:
    """The metadata of a model, of which :func:`mlxlora_gemma.gguf.read` makes the same computation.

    Raises:
        ModelError: llama.cpp would compute something else, with all reasons.
    """
    family = next(name for name, kind in TYPES.items() if kind == args.model_type)
    if told := _faults(args):
        raise ModelError(f"llama.cpp cannot compute this model as a {family}: {'; '.join(told)}")
    stated = (*PLAIN, "vocab_size", "rope_theta", "final_logit_softcapping", "attn_logit_softcapping")
    keys = {NAMES[name]: getattr(args, name) for name in stated}
    keys |= dict.fromkeys(WIDTHS, args.head_dim)
    if args.rope_factor is not None:
        keys |= {SCALING: "linear", NAMES["rope_factor"]: args.rope_factor}
    if args.sliding_window is not None:
        keys |= _window(args)
    written = {f"{family}.{key}": value for key, value in keys.items() if value is not None}
    return {ARCHITECTURE: family, **written}


def _window(args: ModelArgs) -> dict[str, Any]:
    """The keys of the window: its layers only where they are not those of the family."""
    bounded = [args.window(layer) is not None for layer in range(args.n_layers)]
    keys: dict[str, Any] = {NAMES["sliding_window"]: args.sliding_window}
    if bounded != [bool((layer + 1) % EVERY[args.model_type]) for layer in range(args.n_layers)]:
        keys[NAMES["window_layers"]] = bounded
    if args.model_type == GEMMA3 or args.sliding_rope_theta is not None:
        keys[NAMES["sliding_rope_theta"]] = args.sliding_rope_theta or args.rope_theta
    return keys


def _faults(args: ModelArgs) -> list[str]:
    """What llama.cpp does not compute in this family."""
    told = []
    gemma2 = args.model_type == GEMMA2
    by_width = args.n_layers == SCALED_BY_WIDTH[args.model_type]
    scale = args.dim // args.n_heads if by_width else args.head_dim
    if args.query_pre_attn_scalar != scale:
        told.append(f"query_pre_attn_scalar is {args.query_pre_attn_scalar:g}, there {scale}")
    if bool(args.head_norms) == gemma2:
        told.append(f"heads of queries and keys are {'not ' if not args.head_norms else ''}normalised")
    if gemma2 and None in (args.attn_logit_softcapping, args.final_logit_softcapping):
        told.append("scores or logits are not capped")
    if not gemma2 and args.attn_logit_softcapping is not None:
        told.append("scores are capped (attn_logit_softcapping)")
    if gemma2 and not args.tie_word_embeddings:
        told.append("its head is not the embedding")
    if gemma2 and args.sliding_window is None:
        told.append("no layer has a window")
    if args.sliding_window is not None and args.rope_factor is not None:
        scaled = args.sliding_rope_theta is None
        if scaled != gemma2:
            which = "too" if scaled else "not"
            told.append(f"positions are scaled, in layers with a window {which}")
    return told
