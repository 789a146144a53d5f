"""What a Gemma is: the arguments that its config.json holds."""

from __future__ import annotations

from dataclasses import dataclass

from mlxlora_core.api import option

GEMMA2, GEMMA3 = "gemma2", "gemma3_text"
MODEL_TYPES = (GEMMA2, GEMMA3)

# Far beyond any model there is, and small enough that nothing overflows or is
# built at length because a file claims a large number.
_WIDEST = 1 << 20  # of a matrix in a layer
_LONGEST = 2**31 - 1
MOST_LAYERS = 1024


@dataclass(frozen=True)
class ModelArgs:
    """The arguments of a model: what its config.json holds."""

    model_type: str = option(help="the family within the family", choices=MODEL_TYPES)
    dim: int = option(help="width, D", minimum=1, maximum=_WIDEST)
    n_layers: int = option(help="layers, L", minimum=1, maximum=MOST_LAYERS)
    head_dim: int = option(help="even width of a head, E", minimum=2, maximum=_WIDEST)
    hidden_dim: int = option(help="width of the feed-forward, F", minimum=1, maximum=_WIDEST)
    n_heads: int = option(help="query heads, H; a multiple of n_kv_heads", minimum=1, maximum=_WIDEST)
    n_kv_heads: int = option(help="key and value heads, K", minimum=1, maximum=_WIDEST)
    norm_eps: float = option(help="what RMSNorm adds to the mean square", minimum=1e-12, maximum=0.1)
    vocab_size: int = option(help="vocabulary, V", minimum=1, maximum=1 << 24)
    query_pre_attn_scalar: float = option(
        help="what scores are divided by the square root of", above=0, maximum=1e9
    )
    rope_theta: float = option(help="base of the rotary wavelengths", minimum=1.0, maximum=1e12)
    tie_word_embeddings: bool = option(True, help="whether the embedding is the output head too")
    # What follows is None where a model does without it, so that config.json says nothing of it.
    rope_factor: float | None = option(
        None, help="what all rotary frequencies of rope_theta are divided by", minimum=1e-3, maximum=1e6
    )
    sliding_rope_theta: float | None = option(
        None,
        help="base in layers with a window, unscaled; rope_theta, and scaled as it is, where it is left out",
        minimum=1.0,
        maximum=1e12,
    )
    sliding_window: int | None = option(
        None, help="tokens that a token sees, itself included", minimum=1, maximum=_LONGEST
    )
    window_layers: tuple[int, ...] | None = option(
        None,
        help="layers that the sliding window bounds, counted from 0; all where it is left out",
        minimum=0,
        maximum=MOST_LAYERS - 1,
    )
    max_seq_len: int | None = option(
        None, help="longest sequence it was made for", unit="tokens", minimum=1, maximum=_LONGEST
    )
    head_norms: bool | None = option(None, help="whether each head of queries and keys is normalised")
    attn_logit_softcapping: float | None = option(
        None, help="what the scores of attention stay below", above=0, maximum=1e6
    )
    final_logit_softcapping: float | None = option(
        None, help="what the logits stay below", above=0, maximum=1e6
    )

    def __post_init__(self) -> None:
        faults = []
        if self.n_heads % self.n_kv_heads:
            faults.append(f"n_kv_heads: got {self.n_kv_heads}, wanted a divisor of n_heads {self.n_heads}")
        if self.head_dim % 2:
            faults.append(f"head_dim: got {self.head_dim}, wanted an even number")
        if self.n_heads * self.head_dim > _WIDEST:
            got = f"n_heads: got {self.n_heads} of head_dim {self.head_dim}"
            faults.append(f"{got}, wanted a product of at most {_WIDEST}")
        layers = self.window_layers or ()
        if len(set(layers)) != len(layers) or any(layer >= self.n_layers for layer in layers):
            faults.append(f"window_layers: wanted different numbers below n_layers {self.n_layers}")
        if self.sliding_window is None:
            stated = ("window_layers", "sliding_rope_theta")
            faults += [
                f"{name}: there is no sliding_window" for name in stated if getattr(self, name) is not None
            ]
        if faults:
            raise ValueError("; ".join(faults))

    def window(self, layer: int) -> int | None:
        """How many tokens a token sees in a layer, itself included; None is all before it."""
        bound = self.window_layers is None or layer in self.window_layers
        return self.sliding_window if bound else None

    def turning(self, layer: int) -> float | tuple[float, ...]:
        """The base of a layer's rotary wavelengths, or where they are scaled the angle of each pair."""
        if self.window(layer) is not None and self.sliding_rope_theta is not None:
            return self.sliding_rope_theta
        if self.rope_factor is None:
            return self.rope_theta
        pairs = range(self.head_dim // 2)
        return tuple(self.rope_theta ** (-2 * i / self.head_dim) / self.rope_factor for i in pairs)
