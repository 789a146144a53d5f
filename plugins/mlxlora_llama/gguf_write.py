"""The metadata of a GGUF file: what the arguments are there, where llama.cpp can say them."""

from __future__ import annotations

from typing import Any

from mlxlora_core.api import ModelError, listing
from mlxlora_llama.config import ModelArgs
from mlxlora_llama.gguf import ARCHITECTURE, DIVISORS, EVERY, NAMES, ROTATED, SCALED, VALUE_WIDTH
from mlxlora_llama.rope import turning, yarn_attention

_LLAMA = "llama"
#: families that llama.cpp has of their own; the others are a ``llama`` to it
_FAMILIES = ("qwen2", "qwen3", "smollm3")
_INPUTS = ("wq", "wk", "wv")  # the linears whose bias every family may have
_PLAIN = ("dim", "n_layers", "n_heads", "n_kv_heads", "head_dim", "hidden_dim", "vocab_size", "norm_eps")


def write(args: ModelArgs) -> dict[str, Any]:
    """The metadata of a model, of which :func:`mlxlora_llama.gguf.read` makes the same computation.

    A Mistral is a ``llama`` there, and a window that no text fills is left out. Frequencies
    scaled as Llama 3.1 has them are divisors.

    Raises:
        ModelError: llama.cpp would compute something else, with all reasons.
    """
    family = args.model_type if args.model_type in _FAMILIES else _LLAMA
    if told := _faults(args, family):
        raise ModelError(f"llama.cpp cannot compute this model as a {family}: {'; '.join(told)}")
    found: dict[str, Any] = {name: getattr(args, name) for name in _PLAIN}
    found |= {"max_seq_len": args.max_seq_len, "rope_theta": args.rope_theta}
    keys = {NAMES[name]: value for name, value in found.items()}
    keys |= {VALUE_WIDTH: args.head_dim, ROTATED: args.head_dim, **_scaling(args)}
    divisors = keys.pop(DIVISORS, None)
    written = {f"{family}.{key}": value for key, value in keys.items() if value is not None}
    return {ARCHITECTURE: family, **written, **({} if divisors is None else {DIVISORS: list(divisors)})}


def _scaling(args: ModelArgs) -> dict[str, Any]:
    """The keys of the scaling."""
    kind = args.rope_scaling
    if kind in ("llama3", "divisors"):
        return {DIVISORS: args.rope_divisors or _divisors(args)}
    if kind is None:
        return {}
    found: dict[str, Any] = {"rope_scaling": kind, "rope_factor": args.rope_factor}
    if kind == "yarn":
        for name in ("rope_original_len", "rope_beta_fast", "rope_beta_slow"):
            found[name] = getattr(args, name)
    keys = {NAMES[name]: value for name, value in found.items()}
    if kind == "yarn" and args.rope_factor and args.rope_attention_factor:
        share = args.rope_attention_factor / yarn_attention(args.rope_factor)
        keys |= {SCALED: share} if share != 1 else {}
    return keys


def _divisors(args: ModelArgs) -> list[float]:
    """What each frequency is divided by."""
    turned = turning(args)
    assert isinstance(turned, tuple), "it is scaled"
    return [args.rope_theta ** (-2 * pair / args.head_dim) / angle for pair, angle in enumerate(turned)]


def _faults(args: ModelArgs, family: str) -> list[str]:
    """What llama.cpp does not compute in this family."""
    told = []
    window, longest = args.sliding_window, args.max_seq_len
    bounded = window is not None and args.window_layers != ()
    if bounded and window is not None and (longest is None or window < longest):
        upto = "whatever its length" if longest is None else f"of up to {longest}"
        told.append(f"a token sees {window} tokens (sliding_window), and there it sees all, in texts {upto}")
    skipped = args.unrotated_layers or ()
    if sorted(skipped) != (list(range(EVERY - 1, args.n_layers, EVERY)) if family == "smollm3" else []):
        told.append(f"layers {listing(map(str, skipped), 4) or 'none'} are without positions")
    if bool(args.head_norms) != (family == "qwen3"):
        told.append(f"heads of queries and keys are {'' if args.head_norms else 'not '}normalised")
    other = [name for name in args.biases or () if name not in _INPUTS]
    if other and family != _LLAMA:
        told.append(f"{listing(other)} have a bias")
    if family == "qwen2" and args.n_heads * args.head_dim != args.dim:
        told.append(f"{args.n_heads} heads of {args.head_dim} are not {args.dim} wide")
    if args.rope_scaling in ("llama3", "divisors") and family != _LLAMA:
        told.append(f"its frequencies have divisors (rope_scaling {args.rope_scaling})")
    if args.rope_truncate is False:
        told.append("the scaled features of its yarn do not begin at a whole pair (rope_truncate)")
    return told
