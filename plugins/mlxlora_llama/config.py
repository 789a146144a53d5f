"""What a model of the Llama family is: the arguments that its config.json holds."""

from __future__ import annotations

from dataclasses import dataclass

from mlxlora_core.api import option

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3", "smollm3")

#: the linears of a layer, by the module that they are in
LINEARS = dict.fromkeys(("wq", "wk", "wv", "wo"), "attention") | dict.fromkeys(
    ("w1", "w2", "w3"), "feed_forward"
)

#: scaling -> the arguments that it needs, beside those that it may have
SCALINGS: dict[str, tuple[str, ...]] = {
    "linear": ("rope_factor",),
    "llama3": ("rope_factor", "rope_original_len", "rope_low_freq_factor", "rope_high_freq_factor"),
    "yarn": ("rope_factor", "rope_original_len", "rope_beta_fast", "rope_beta_slow", "rope_attention_factor"),
    "divisors": ("rope_divisors",),
}
_MAY: dict[str, tuple[str, ...]] = {"yarn": ("rope_truncate",)}

HEAD = "output.weight"
MLP = "layers.0.feed_forward.w1.weight"

# Far beyond any model there is, and small enough that nothing overflows or is
# built at length because a file claims a large number.
_WIDEST = 1 << 20  # of a matrix in a layer; 64 times that of the largest Llama
_LONGEST = 2**31 - 1
_LAYERS = 1024


@dataclass(frozen=True)
class ModelArgs:
    """The arguments of a model: what its config.json holds."""

    model_type: str = option(help="the family within the family", choices=MODEL_TYPES)
    dim: int = option(help="width, D", minimum=1, maximum=_WIDEST)
    n_layers: int = option(help="layers, L", minimum=1, maximum=_LAYERS)
    head_dim: int = option(help="even width of a head, E, or dim / n_heads", minimum=2, maximum=_WIDEST)
    hidden_dim: int = option(
        help=f"width of the feed-forward, F, or the rows of {MLP}", minimum=1, maximum=_WIDEST
    )
    n_heads: int = option(help="query heads, H; a multiple of n_kv_heads", minimum=1, maximum=_WIDEST)
    n_kv_heads: int = option(help="key and value heads, K", minimum=1, maximum=_WIDEST)
    norm_eps: float = option(help="what RMSNorm adds to the mean square", minimum=1e-12, maximum=0.1)
    vocab_size: int = option(help=f"vocabulary, V, or the rows of {HEAD}", minimum=1, maximum=1 << 24)
    rope_theta: float = option(1e4, help="base of the rotary wavelengths", minimum=1.0, maximum=1e12)
    sliding_window: int | None = option(
        None, help="tokens that a token sees, itself included", minimum=1, maximum=_LONGEST
    )
    max_seq_len: int | None = option(
        None, help="longest sequence it was made for", unit="tokens", minimum=1, maximum=_LONGEST
    )
    tie_word_embeddings: bool = option(False, help="whether the embedding is the output head too")
    # What follows is None where a model does without it, so that config.json says nothing of it.
    window_layers: tuple[int, ...] | None = option(
        None,
        help="layers that the sliding window bounds, counted from 0; all where it is left out",
        minimum=0,
        maximum=_LAYERS - 1,
    )
    unrotated_layers: tuple[int, ...] | None = option(
        None, help="layers without rotary positions, counted from 0", minimum=0, maximum=_LAYERS - 1
    )
    biases: tuple[str, ...] | None = option(
        None, help="linears of a layer that have a bias", choices=tuple(LINEARS)
    )
    head_norms: bool | None = option(None, help="whether each head of queries and keys is normalised")
    rope_scaling: str | None = option(
        None, help="how the rotary frequencies are scaled", choices=tuple(SCALINGS)
    )
    rope_factor: float | None = option(
        None, help="what a scaling divides low frequencies by", minimum=1e-3, maximum=1e6
    )
    rope_original_len: int | None = option(
        None, help="longest sequence before the scaling", unit="tokens", minimum=1, maximum=_LONGEST
    )
    rope_low_freq_factor: float | None = option(
        None, help="llama3: turns in the original length, up to which all is scaled", above=0, maximum=1e6
    )
    rope_high_freq_factor: float | None = option(
        None, help="llama3: turns in the original length, from which nothing is", above=0, maximum=1e6
    )
    rope_beta_fast: float | None = option(
        None, help="yarn: turns in the original length, from which nothing is scaled", above=0, maximum=1e6
    )
    rope_beta_slow: float | None = option(
        None, help="yarn: turns in the original length, up to which all is scaled", above=0, maximum=1e6
    )
    rope_truncate: bool | None = option(
        None, help="yarn: whether the scaled features begin and end at a whole pair; true if left out"
    )
    rope_attention_factor: float | None = option(
        None, help="what turned queries and keys are multiplied by", above=0, maximum=1e3
    )
    rope_divisors: tuple[float, ...] | None = option(
        None, help="divisors: what the frequency of each pair is divided by", minimum=1e-3, maximum=1e6
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
        faults += self._layer_faults() + self._rope_faults()
        if faults:
            raise ValueError("; ".join(faults))

    def _layer_faults(self) -> list[str]:
        """What is wrong with the lists of layers and of linears."""
        told = []
        for name in ("window_layers", "unrotated_layers"):
            layers = getattr(self, name) or ()
            if len(set(layers)) != len(layers) or any(layer >= self.n_layers for layer in layers):
                told.append(f"{name}: wanted different numbers below n_layers {self.n_layers}")
        if len(set(self.biases or ())) != len(self.biases or ()):
            told.append("biases: wanted different names")
        if self.window_layers is not None and self.sliding_window is None:
            told.append("window_layers: there is no sliding_window")
        return told

    def _rope_faults(self) -> list[str]:
        """What is wrong with the arguments of the scaling: it lacks some, or does not take some."""
        kind = self.rope_scaling
        needs = SCALINGS[kind] if kind else ()
        stated = [
            name
            for name in dict.fromkeys((*sum(SCALINGS.values(), ()), *sum(_MAY.values(), ())))
            if getattr(self, name) is not None
        ]
        allowed = (*needs, *_MAY.get(kind or "", ()))
        told = [f"{name}: rope_scaling {kind} has no use for it" for name in stated if name not in allowed]
        told += [f"{name}: rope_scaling {kind} needs it" for name in needs if name not in stated]
        if told or not kind:
            return told
        if kind == "llama3" and (self.rope_high_freq_factor or 0) <= (self.rope_low_freq_factor or 0):
            told.append(f"rope_high_freq_factor: wanted more than {self.rope_low_freq_factor}")
        if kind == "yarn" and (self.rope_beta_fast or 0) <= (self.rope_beta_slow or 0):
            told.append(f"rope_beta_fast: wanted more than {self.rope_beta_slow}")
        if kind == "yarn" and self.rope_theta <= 1:
            told.append(f"rope_theta: got {self.rope_theta}, rope_scaling yarn needs more than 1")
        if self.rope_divisors is not None and len(self.rope_divisors) != self.head_dim // 2:
            told.append(f"rope_divisors: got {len(self.rope_divisors)}, wanted head_dim / 2")
        return told

    def window(self, layer: int) -> int | None:
        """How many tokens a token sees in a layer, itself included; None is all before it."""
        bound = self.window_layers is None or layer in self.window_layers
        return self.sliding_window if bound else None
