"""The keys of a checkpoint's config: those that are no argument of a model, and both spellings of the rope.

A key may change what a model computes. So a key that is known to have no
effect here passes, one that asks for something that is not built here is
refused unless it is off, and one that nobody knows is refused too.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from mlxlora_core.errors import listing

#: values of a key by which what it stands for is off
_OFF: tuple[Any, ...] = (False, 0, "none", "None", "off")
_DEFAULT_ROPE = {"rope_type": "default"}
_SHOWN_LETTERS, _SHOWN_KEYS = 60, 8

#: keys that say what is computed here anyway -> the values that say so
_AS_BUILT: Mapping[str, tuple[Any, ...]] = {
    **dict.fromkeys(("causal", "is_causal", "is_decoder", "use_rope", "rope", "rotary"), (True,)),
    **dict.fromkeys(("rope_interleaved", "rope_traditional", "interleaved", "traditional"), (True,)),
    **dict.fromkeys(("partial_rotary_factor", "rotary_pct", "rope_scaling_factor", "rope_factor"), (1,)),
    **dict.fromkeys(
        ("attention_multiplier", "embedding_multiplier", "logit_scale", "residual_multiplier"), (1,)
    ),
    **dict.fromkeys(("pre_norm", "use_rmsnorm", "use_rms_norm", "swiglu", "use_swiglu", "glu"), (True,)),
    **dict.fromkeys(("act_fn", "activation", "hidden_act", "hidden_activation"), ("silu", "swish", "swiglu")),
    **dict.fromkeys(("norm", "norm_type"), ("rmsnorm", "rms_norm", "RMSNorm")),
    **dict.fromkeys(("attn_type", "attention_type"), ("full", "gqa", "mha", "full_attention")),
    "rope_type": ("default",),
}

#: what a model can have that is not built here, by the words in the keys that ask for it
_FEATURES = tuple(
    (re.compile(pattern), what)
    for pattern, what in (
        (r"moe|expert|router", "a mixture of experts"),
        (r"scaled_rope|rope.*(scal|factor)|yarn|ntk|llama_4_scaling", "scaled rotary positions"),
        (
            r"window|chunk_size|no_?pe|no_rope|layer_types",
            "a window or rotary positions of its own for each layer",
        ),
        (r"(^|_)(bias|biases)$", "linears with a bias"),
        (r"qk_?norm|query_norm|key_norm|post.*norm|sandwich|ada_rms", "other norms than two a layer"),
        (r"quant", "a checkpoint that is quantized already"),
        (r"lora_(args|rank)|^lora$|adapter", "low-rank parts beside the weights"),
        (r"vision|image|audio|multimodal|mm_|cross_attention", "anything but text"),
        (r"soft_?cap|scal|floor|multiplier|temperature_tuning|alibi", "other scores or scales"),
        (r"rot(ary|_)|parallel_(residual|attn)", "another arrangement of its parts"),
        (r"mtp|nextn|(v|nope|rope)_head_dim|mamba|ssm|n_groups|conv", "parts that no Llama has"),
    )
)

#: keys that nothing here depends on, as a pattern of their lower case
_HARMLESS = (
    # what a person or a tool says of the model
    r"[_#/$].*comment.*|comments?|[#/$].*|_?(note|name|description|version|license|author|source|url|date)s?|"
    r"_name_or_path|model_name|architectures|transformers_version|model_parallel_size|world_size|"
    # sizes that the tensors tell, and the type that they are stored in
    r"multiple_of|ffn_dim_multiplier|(torch_|param_)?dtype|n_params|num_parameters|"
    # tokens
    r"(bos|eos|pad|unk|sep|mask)_(token|idx?|ids|token_ids?)|tokenizer.*|"
    # what counts in training alone, or in how something is computed and not in what
    r".*drop_?out.*|.*drop_?path.*|(depth_|weight_)?init(ializer)?(_.*)?|gradient_.*|learning_rate|"
    r"weight_decay|seed|pretraining_tp|(max_)?batch_size|.*flash.*|.*cache.*|.*kernel.*|.*compile.*|"
    r".*checkpoint.*|_?attn_implementation|use_sdpa|device|(use_)?fused_.*"
)

#: keys of a config.json that say what is computed here anyway -> the values that say so
_HF_AS_BUILT: Mapping[str, tuple[Any, ...]] = {
    **_AS_BUILT,
    **dict.fromkeys(("rope_interleaved", "rope_traditional", "interleaved", "traditional"), (False,)),
    **dict.fromkeys(("is_encoder_decoder", "add_cross_attention", "use_mrope"), (False,)),
    "is_decoder": (True, False),  # of a model that decodes and nothing else
}
#: what versions of transformers wrote into every config.json: of tasks, of drawing text, of tools
_HF_HARMLESS = (
    r"_.*|transformers\..*|unsloth_.*|"
    r"(id2|label2)(label|id)|problem_type|num_labels|return_dict.*|output_.*|torchscript|"
    r"use_bfloat16|tf_legacy_loss|chunk_size_feed_forward|tie_encoder_decoder|pruned_heads|"
    r"finetuning_task|task_specific_params|decoder_start_token_id|prefix|bad_words_ids|"
    r"(begin_)?suppress_tokens|forced_(bos|eos)_token_id|(min|max)_(new_tokens|length)|do_sample|"
    r"early_stopping|num_(beams|beam_groups|return_sequences)|temperature|(top|typical)_[kp]|"
    r"(repetition|length|diversity|exponential_decay_length)_penalty|(encoder_)?no_repeat_ngram_size|"
    r"remove_invalid_values"
)


@dataclass(frozen=True)
class KnownKeys:
    """The keys of a library's config that are no argument.

    Attributes:
        as_built: those that say what is computed here anyway -> the values that say so.
        harmless: those that nothing here depends on, in lower case, whatever they say.
        COMMON: of ``as_built``, what stands in configs of any family.
        COMMON_HARMLESS: of ``harmless`` likewise, a pattern.
    """

    COMMON: ClassVar[Mapping[str, tuple[Any, ...]]] = _AS_BUILT
    COMMON_HARMLESS: ClassVar[str] = _HARMLESS

    @classmethod
    def of_config_json(
        cls, as_built: Mapping[str, tuple[Any, ...]] | None = None, harmless: str = ""
    ) -> KnownKeys:
        """Those of a config.json of transformers: of any family and of this one."""
        parts = (_HARMLESS, _HF_HARMLESS, *((harmless,) if harmless else ()))
        return cls({**_HF_AS_BUILT, **(as_built or {})}, re.compile("|".join(parts)))

    as_built: Mapping[str, tuple[Any, ...]]
    harmless: re.Pattern[str]

    def faults(self, raw: Mapping[str, Any], arguments: Collection[str]) -> list[str]:
        """What is wrong with the keys beside the ``arguments``, a line each; all unknown ones in one.

        Args:
            raw: the config.
            arguments: the keys that are honoured.
        """
        told, unknown = [], []
        for key, value in raw.items():
            if key in arguments or value is None or value in ("", [], {}, {"type": "default"}, _DEFAULT_ROPE):
                continue
            if key in self.as_built:
                if not _is_one_of(value, self.as_built[key]):
                    wanted = listing(repr(good) for good in self.as_built[key])
                    told.append(f"{show_key(key)}: got {show_value(value)}, but only {wanted} is built here")
            elif self.harmless.fullmatch(key.lower()):
                continue
            elif what := _feature(key):
                if not _is_one_of(value, _OFF):
                    asked = f"which asks for {what}; that is not supported"
                    told.append(f"{show_key(key)}: got {show_value(value)}, {asked}")
            else:
                unknown.append(key)
        if unknown:
            # A hint takes its time, and a file may hold any number of keys.
            shown = [_hinted(key, raw[key], arguments) for key in unknown[:_SHOWN_KEYS]]
            words = listing([*shown, *unknown[_SHOWN_KEYS:]], _SHOWN_KEYS)
            advice = "a key may change what the model computes, so take out only what does not"
            return [*told[:_SHOWN_KEYS], f"unknown: {words}; {advice}"]
        return told[:_SHOWN_KEYS]


#: where a config.json states rotary positions: since transformers 5 in one table, before in two keys
_ROPE_KEYS = ("rope_parameters", "rope_scaling", "rope_theta", "original_max_position_embeddings")


def stated_rope(raw: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """All that a config.json says of rotary positions, in one table, and what is wrong with how it does.

    Args:
        raw: the config, in either of the spellings or in both, which must not differ. The kind of
            scaling is under ``rope_type`` in the result.
    """
    told = []
    tables: list[dict[str, Any]] = []
    for key in _ROPE_KEYS[:2]:
        table = raw.get(key)
        if table is None or table in ({}, False):
            continue
        if not isinstance(table, Mapping) or any(isinstance(value, Mapping) for value in table.values()):
            told.append(f"{key}: got {show_value(table)}, wanted one table for all layers")
            continue
        tables.append(dict(table))
    tables += [{key: raw[key]} for key in _ROPE_KEYS[2:] if raw.get(key) is not None]
    stated: dict[str, Any] = {}
    for table in tables:
        older = table.pop("type", None)  # what rope_type was called, and now stands beside it
        for name, value in (*table.items(), ("rope_type", older)):
            if value is None:
                continue
            if stated.setdefault(name, value) != value:
                both = f"got both {show_value(stated[name])} and {show_value(value)}"
                told.append(f"{show_key(str(name))}: {both}")
    return stated, told


def _hinted(key: str, value: Any, arguments: Collection[str]) -> str:
    """An unknown key with its value, and the argument that it may be a slip of."""
    near = difflib.get_close_matches(key.lower()[:_SHOWN_LETTERS], arguments, n=1, cutoff=0.8)
    return f"{show_key(key)} {show_value(value)}" + (f" (did you mean {near[0]!r}?)" if near else "")


def show_key(key: str) -> str:
    """A key for a message, cut where it is long."""
    return key if len(key) <= _SHOWN_LETTERS else key[:_SHOWN_LETTERS] + "..."


def show_value(value: Any) -> str:
    """A value for a message, in at most some 60 characters."""
    return show_key(repr(value))


def _feature(key: str) -> str:
    """What a key asks for that is not built here, or nothing."""
    return next((what for pattern, what in _FEATURES if pattern.search(key.lower())), "")


def _is_one_of(value: Any, wanted: Collection[Any]) -> bool:
    """Whether a value is among others; True is not taken for 1, nor 1 for True."""
    boolean = isinstance(value, bool)
    return any(value == other and boolean == isinstance(other, bool) for other in wanted)
