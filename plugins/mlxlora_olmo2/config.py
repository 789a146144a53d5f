"""What a model of the OLMo 2 family is: the arguments that its config.json holds."""

from __future__ import annotations

from dataclasses import dataclass

from mlxlora_core.api import option

MODEL_TYPES = ("olmo2",)

# Far beyond any model there is, and small enough that nothing overflows or is
# built at length because a file claims a large number.
_WIDEST = 1 << 20  # of a matrix in a layer
_LONGEST = 2**31 - 1
_LAYERS = 1024


@dataclass(frozen=True)
class ModelArgs:
    """The arguments of a model: what its config.json holds."""

    model_type: str = option(help="the family", choices=MODEL_TYPES)
    dim: int = option(help="width, D", minimum=1, maximum=_WIDEST)
    n_layers: int = option(help="layers, L", minimum=1, maximum=_LAYERS)
    head_dim: int = option(help="even width of a head, E", minimum=2, maximum=_WIDEST)
    hidden_dim: int = option(help="width of the feed-forward, F", minimum=1, maximum=_WIDEST)
    n_heads: int = option(help="query heads, H; a multiple of n_kv_heads", minimum=1, maximum=_WIDEST)
    n_kv_heads: int = option(help="key and value heads, K", minimum=1, maximum=_WIDEST)
    norm_eps: float = option(help="what RMSNorm adds to the mean square", minimum=1e-12, maximum=0.1)
    vocab_size: int = option(help="vocabulary, V", minimum=1, maximum=1 << 24)
    rope_theta: float = option(help="base of the rotary wavelengths", minimum=1.0, maximum=1e12)
    max_seq_len: int | None = option(
        None, help="longest sequence it was made for", unit="tokens", minimum=1, maximum=_LONGEST
    )
    tie_word_embeddings: bool = option(False, help="whether the embedding is the output head too")
    attention_bias: bool | None = option(None, help="whether the linears of attention have a bias")

    def __post_init__(self) -> None:
        faults = []
        if self.n_heads % self.n_kv_heads:
            faults.append(f"n_kv_heads: got {self.n_kv_heads}, wanted a divisor of n_heads {self.n_heads}")
        if self.head_dim % 2:
            faults.append(f"head_dim: got {self.head_dim}, wanted an even number")
        if self.n_heads * self.head_dim > _WIDEST:
            got = f"n_heads: got {self.n_heads} of head_dim {self.head_dim}"
            faults.append(f"{got}, wanted a product of at most {_WIDEST}")
        if faults:
            raise ValueError("; ".join(faults))
