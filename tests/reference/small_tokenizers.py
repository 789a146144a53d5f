"""Small tokenizers of every kind that models have, trained by the libraries themselves on made-up lines."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

WORDS = ("layer", "scales", "weights", "the", "gradient", "of", "array", "token", "café", "user", "answer")
LINES = [" ".join(WORDS[(i * k) % len(WORDS)] for k in range(1, 9)) for i in range(200)]
#: as cl100k and its kin split texts
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' "
    "+ '\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
#: as Llama 2 and Mistral have it: what the user says stands between texts that are no tokens
INSTRUCT = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message.role == 'system' %}{{ message.content + '\\n\\n' }}"
    "{% elif message.role == 'user' %}{{ '[INST] ' + message.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + message.content + eos_token }}{% endif %}{% endfor %}"
)

BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def byte_level(specials: list[str], *, bos: str = "") -> Tokenizer:
    """Byte-level BPE, as GPT-2, Llama 3 and Qwen have it.

    Args:
        specials: special tokens, from id 0 on.
        bos: that of them which is put in front of a text, if one is.
    """
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(PATTERN), "isolated")
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, level])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=specials, initial_alphabet=sorted(alphabet), show_progress=False
    )
    tokenizer.train_from_iterator(LINES, trainer)
    if bos:
        tokenizer.post_processor = begins_with(tokenizer, bos)
    return tokenizer


def like_llama_2() -> Tokenizer:
    """BPE over characters with bytes for those it lacks, a space put in front, as Llama 2 has it."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<unk>", "<s>", "</s>", *BYTES], show_progress=False
    )
    tokenizer.train_from_iterator(LINES, trainer)
    document = json.loads(tokenizer.to_str())
    document["added_tokens"] = document["added_tokens"][:3]  # bytes are no special tokens
    tokenizer = Tokenizer.from_str(json.dumps(document))
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.post_processor = begins_with(tokenizer, "<s>")
    return tokenizer


def unigram(scheme: str = "first") -> Tokenizer:
    """A unigram model with bytes, whose control pieces are in the vocabulary, as conversions have them.

    Args:
        scheme: what gets a space in front: ``first``, ``always`` or ``never``.
    """
    pieces = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), *((byte, -20.0) for byte in BYTES)]
    letters = [*sorted(set("".join(LINES)) - {" "}), "\u2581", "<", ">", "/", "|"]
    pieces += [(letter, -8.0) for letter in letters]
    pieces += [(space + word, -5.0 - len(space)) for word in WORDS for space in ("", "\u2581")]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer.post_processor = begins_with(tokenizer, "<s>")
    return tokenizer


def words() -> Tokenizer:
    """Whole words and no decoder."""
    vocabulary = ["<unk>", "</s>", *WORDS]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["<unk>", "</s>"])
    return tokenizer


def tiny() -> list[bytes]:
    """Documents that say a little of everything."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    split = {"type": "Split", "pattern": {"Regex": " ?[a-z]+|."}, "behavior": "Isolated", "invert": False}
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
    metaspace = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "first", "split": False}
    front = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [0], "tokens": ["<s>"]}},
    }
    added = [{"id": i, "content": text, **flags} for i, text in enumerate(("<s>", "</s>"))]
    merges = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
        "vocab": {"<s>": 0, "</s>": 1, "t": 2, "h": 3, "e": 4, "th": 5, "the": 6, "\u0120": 7},
        "merges": [["t", "h"], ["th", "e"]],
    }
    pieces = [
        ["<s>", 0.0],
        ["</s>", 0.0],
        ["\u2581", -3.0],
        ["t", -2.5],
        ["h", -2.5],
        ["e", -2.0],
        ["the", -1.0],
    ]
    scores = {"type": "Unigram", "unk_id": 2, "vocab": pieces, "byte_fallback": False}
    shared = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "post_processor": front,
    }
    kinds = (
        {"normalizer": None, "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, level]}}
        | {"decoder": level, "model": merges},
        {"normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "_"}, replace]}}
        | {
            "pre_tokenizer": metaspace,
            "decoder": {"type": "Sequence", "decoders": [metaspace]},
            "model": scores,
        },
    )
    return [json.dumps({**shared, **kind}).encode() for kind in kinds]


def configs() -> list[bytes]:
    """Files called tokenizer_config.json for the first of the small tokenizers."""
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    end = {"content": "</s>", **flags}
    full = {
        "bos_token": "<s>",
        "eos_token": {"__type": "AddedToken", **end},
        "unk_token": None,
        "add_bos_token": False,
        "added_tokens_decoder": {"0": {**end, "special": True}, "311": {"content": "<think>", **flags}},
        "model_max_length": 2048,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    return [json.dumps(config).encode() for config in ({"eos_token": "</s>"}, full)]


def begins_with(tokenizer: Tokenizer, bos: str) -> Any:
    """A post-processor that puts one token in front of a text."""
    return processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, tokenizer.token_to_id(bos))]
    )


def write(
    folder: Path, tokenizer: Tokenizer, config: dict[str, Any], generation: Any = None
) -> dict[str, Path]:
    """The files of a tokenizer: name -> path.

    Args:
        folder: where to write them.
        tokenizer: its vocabulary.
        config: tokenizer_config.json.
        generation: the end ids of generation_config.json, if there is one.
    """
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    names = ["tokenizer.json", "tokenizer_config.json"]
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": generation}))
        names.append("generation_config.json")
    return {name: folder / name for name in names}


def rank_list() -> list[bytes]:
    """Byte strings by rank: all bytes, and the parts of some words."""
    tokens = [bytes([byte]) for byte in range(256)]
    for word in WORDS:
        for start in (word.encode(), b" " + word.encode()):
            tokens += [start[:end] for end in range(2, len(start) + 1)]
    return list(dict.fromkeys(tokens))


def tiktoken_file() -> bytes:
    """Those as Meta's ``tokenizer.model`` lists them."""
    lines = (b"%s %d\n" % (base64.b64encode(token), rank) for rank, token in enumerate(rank_list()))
    return b"".join(lines)


def tekken_file(**changed: Any) -> bytes:
    """Those as a ``tekken.json``, with 30 special tokens in front.

    Args:
        changed: keys of its config that are something else.
    """
    tokens = [
        {"rank": rank, "token_bytes": base64.b64encode(token).decode(), "token_str": None}
        for rank, token in enumerate(rank_list())
    ]
    config = {"pattern": PATTERN, "num_vocab_tokens": len(tokens), "default_vocab_size": len(tokens) + 30}
    config |= {"default_num_special_tokens": 30, "version": "v3"}
    return json.dumps({"config": config | changed, "vocab": tokens}).encode()
