"""What a model of the Phi-3 family is: the arguments that its config.json holds."""

from __future__ import annotations

from dataclasses import dataclass

from mlxlora_core.api import option

MODEL_TYPES = ("phi3",)

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
    head_dim: int = option(help="width of a head, E", minimum=2, maximum=_WIDEST)
    hidden_dim: int = option(help="width of the feed-forward, F", minimum=1, maximum=_WIDEST)
    n_heads: int = option(help="query heads, H; a multiple of n_kv_heads", minimum=1, maximum=_WIDEST)
    n_kv_heads: int = option(help="key and value heads, K", minimum=1, maximum=_WIDEST)
    norm_eps: float = option(help="what RMSNorm adds to the mean square", minimum=1e-12, maximum=0.1)
    vocab_size: int = option(help="vocabulary, V", minimum=1, maximum=1 << 24)
    rope_theta: float = option(help="base of the rotary wavelengths", minimum=1.0, maximum=1e12)
    sliding_window: int | None = option(
        None, help="tokens that a token sees, itself included", minimum=1, maximum=_LONGEST
    )
    max_seq_len: int | None = option(
        None, help="longest sequence it was made for", unit="tokens", minimum=1, maximum=_LONGEST
    )
    tie_word_embeddings: bool = option(False, help="whether the embedding is the output head too")
    rotary_dim: int | None = option(
        None,
        help="first features of a head that are turned, an even number; all where it is left out",
        minimum=2,
        maximum=_WIDEST,
    )
    # All of what follows, or none of it.
    rope_original_len: int | None = option(
        None,
        help="longest text whose positions turn by the short divisors",
        unit="tokens",
        minimum=1,
        maximum=_LONGEST,
    )
    rope_short_divisors: tuple[float, ...] | None = option(
        None, help="what the frequency of each pair is divided by in a short text", minimum=1e-3, maximum=1e6
    )
    rope_long_divisors: tuple[float, ...] | None = option(
        None, help="what it is divided by in a longer one", minimum=1e-3, maximum=1e6
    )
    rope_attention_factor: float | None = option(
        None, help="what turned queries and keys are multiplied by", above=0, maximum=1e3
    )

    def __post_init__(self) -> None:
        faults = []
        if self.n_heads % self.n_kv_heads:
            faults.append(f"n_kv_heads: got {self.n_kv_heads}, wanted a divisor of n_heads {self.n_heads}")
        if self.turned % 2 or self.turned > self.head_dim:
            name = "head_dim" if self.rotary_dim is None else "rotary_dim"
            faults.append(f"{name}: got {self.turned}, wanted an even number of at most {self.head_dim}")
        if (self.n_heads + 2 * self.n_kv_heads) * self.head_dim > _WIDEST:
            got = f"n_heads: got {self.n_heads}, n_kv_heads {self.n_kv_heads}, head_dim {self.head_dim}"
            faults.append(f"{got}, wanted no more than {_WIDEST} rows of queries, keys and values")
        faults += self._rope_faults()
        if faults:
            raise ValueError("; ".join(faults))

    def _rope_faults(self) -> list[str]:
        """What is wrong with the arguments of the scaling."""
        names = ("rope_original_len", "rope_short_divisors", "rope_long_divisors", "rope_attention_factor")
        absent = [name for name in names if getattr(self, name) is None]
        if absent:
            return [f"{name}: the other rope_ values need it" for name in absent if len(absent) < len(names)]
        return [
            f"{name}: got {len(getattr(self, name))}, wanted {self.turned // 2}, one for each turned pair"
            for name in names[1:3]
            if len(getattr(self, name)) != self.turned // 2
        ]

    @property
    def turned(self) -> int:
        """How many features of a head rotary positions turn."""
        return self.head_dim if self.rotary_dim is None else self.rotary_dim
