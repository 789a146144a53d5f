"""The kinds of file that are fuzzed: good ones, how mlxlora parses them, and how another reader does."""

from __future__ import annotations

import hashlib
import json
import math
import re
import shutil
import struct
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from types import MappingProxyType
from typing import Any

from mlxlora_core.model.linears import linears, replace_modules
from mlxlora_core.plugins import Registry
from mlxlora_core.plugins import load as load_registry

sys.path.insert(0, str(Path(__file__).parents[1] / "reference"))  # children know nothing of pytest

_VOCAB = 300
_TEXTS = ("The quick brown fox.", "é😀日本語 ①ﬁ ½", "", "▁ x  y\n\t", "a" * 200)
_ROWS = (
    {"text": "A layer scales the weights.", "source": 3},
    {"prompt": "Q: é\u2028 ", "completion": "A: 1e5"},
    {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "\U0001f600"}]},
)
_RECIPE = """
[run]
seed = 3
[model]
torch_path = "llama"
dtype = "float32"
[data]
use = "docstrings"
options = { packages = ["mlx", "numpy"], seq_limit = 100 }
[adapter]
use = "lora"
options = { rank = 4, dropout = 0.1, targets = ["wq", "wv"] }
[train]
iters = 10
learning_rate = 1e-4
[generate]
prompts = ["What is it?", '''two
lines''']
"""


def prepare(folder: Path) -> None:
    """Write the good files of every kind into ``folder``."""
    import torch

    from mlxlora_core.model import adapters, loading
    from mlxlora_core.model.convert import convert
    from mlxlora_core.model.events import result_of
    from mlxlora_core.plugins.sections import configure

    checkpoint = folder / "checkpoint"
    checkpoint.mkdir()
    _train_tokenizers(folder)
    shutil.copy(folder / "bpe.model", checkpoint / "tokenizer.model")
    draw = torch.Generator().manual_seed(0)
    width, layers = 8, 1
    shapes = {f"layers.0.attention.{name}": (width, width) for name in ("wq", "wk", "wv", "wo")}
    shapes |= {f"layers.0.feed_forward.{name}": (2 * width, width) for name in ("w1", "w3")}
    shapes |= {"layers.0.feed_forward.w2": (width, 2 * width)}
    shapes |= {"tok_embeddings": (_VOCAB, width), "output": (_VOCAB, width)}
    tensors = {f"{name}.weight": torch.randn(shape, generator=draw).half() for name, shape in shapes.items()}
    norms = ("norm", "layers.0.attention_norm", "layers.0.ffn_norm")
    tensors |= {f"{name}.weight": torch.ones(width).half() for name in norms}
    torch.save(tensors, checkpoint / "consolidated.00.pth")
    params = {"dim": width, "n_layers": layers, "n_heads": 2, "n_kv_heads": 2, "norm_eps": 1e-5}
    (checkpoint / "params.json").write_text(json.dumps({**params, "vocab_size": -1, "multiple_of": 16}))
    registry = _registry()
    result_of(convert(checkpoint, folder / "model", registry, dtype="float32"))
    model = loading.load(folder / "model", registry)
    lora = registry.find("adapter", "lora")
    adapted = adapters.attach(model, *configure(lora, {"rank": 2}), seed=1)
    adapters.save(folder / "adapter.safetensors", model, adapted)
    adapters.save(folder / "adapter.npz", model, adapted)


def _train_tokenizers(folder: Path) -> None:
    import sentencepiece

    words = ("layer", "scales", "weights", "the", "gradient", "of", "array", "token", "café", "ﬁne")
    lines = [" ".join(words[(i * k) % len(words)] for k in range(1, 9)) for i in range(200)]
    kinds: dict[str, dict[str, Any]] = {
        "bpe": {"model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "identity"},
        "unigram": {"model_type": "unigram", "user_defined_symbols": ["<sep>"]},
    }
    for name, options in kinds.items():
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_prefix=str(folder / name),
            vocab_size=_VOCAB,
            hard_vocab_limit=False,
            character_coverage=1.0,
            num_threads=1,
            minloglevel=2,
            **options,
        )


def _registry() -> Registry:
    return load_registry(environ={"MLXLORA_PLUGINS": ""})


class Subject(ABC):
    """A kind of file, with good examples of it.

    Args:
        material: what :func:`prepare` has made; read only.
        folder: an empty one of this process.

    Attributes:
        path: where the file to parse is written.
        good: the bytes of good files.
        header_bytes: how many bytes at the start are damaged one after another.
        is_document: whether it is JSON, of which every other damage changes what it says.
    """

    path: Path
    good: list[bytes]
    header_bytes = 4096
    is_document = False

    def __init__(self, material: Path, folder: Path) -> None:
        self.material, self.folder = material, folder
        self.registry = _registry()
        self.prepare()

    @abstractmethod
    def prepare(self) -> None:
        """Set ``path`` and ``good``."""

    @abstractmethod
    def parse(self) -> Any:
        """What mlxlora makes of the file."""

    @abstractmethod
    def reference(self) -> Any:
        """What another reader makes of it."""


def _digest(data: bytes | memoryview) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def _tensors(tensors: Any) -> dict[str, Any]:
    """name -> type, shape and bytes of MLX arrays."""
    from mlxlora_core.files import tensor_file

    return {
        name: (tensor_file.TYPES[tensor.dtype], tuple(tensor.shape), _digest(tensor_file._bytes(tensor)))
        for name, tensor in tensors.items()
    }


def _safetensors(path: Path) -> dict[str, Any]:
    """The same by the safetensors package."""
    import safetensors

    return {
        name: (found["dtype"], tuple(found["shape"]), _digest(bytes(found["data"])))
        for name, found in safetensors.deserialize(path.read_bytes())
    }


class Safetensors(Subject):
    """Weights, as three writers write them."""

    def prepare(self) -> None:
        import mlx.core as mx
        import numpy as np
        from safetensors.numpy import save

        from mlxlora_core.files import tensor_file

        self.path = self.folder / "model.safetensors"
        arrays = {"a.weight": np.ones((3, 2), np.float32), "b": np.arange(5, dtype=np.int8)}
        arrays |= {"empty": np.zeros((0, 4), np.float16), "scalar": np.array(3, np.uint32)}
        tensors = {name: mx.array(array) for name, array in arrays.items()}
        tensor_file.save(self.path, tensors.items(), {"k": 'é"\\'}, most=4)
        ours = self.path.read_bytes()
        mx.save_safetensors(str(self.path), tensors | {"brain": mx.ones((2,), mx.bfloat16)})
        self.good = [save(arrays, {"format": "np"}), self.path.read_bytes(), ours]
        self.header_bytes = 400

    def parse(self) -> Any:
        from mlxlora_core.files import tensor_file

        tensors, metadata = tensor_file.load(self.path)
        return _tensors(tensors), metadata

    def reference(self) -> Any:
        from safetensors import safe_open

        with safe_open(self.path, framework="numpy") as file:
            metadata = file.metadata()
        return _safetensors(self.path), metadata or {}


class Npz(Subject):
    """Archives of arrays, plain and compressed."""

    def prepare(self) -> None:
        import mlx.core as mx
        import numpy as np

        self.path = self.folder / "weights.npz"
        arrays = {"a.weight": np.arange(6, dtype=np.float32).reshape(3, 2), "b": np.arange(5, dtype=np.int16)}
        arrays |= {"turned": np.asfortranarray(np.arange(6, dtype=np.float32).reshape(2, 3))}
        arrays |= {"empty": np.zeros((0, 4), np.float16), "scalar": np.array(3, np.uint32)}
        self.good = []
        for save in (np.savez, np.savez_compressed):
            save(self.path, **arrays)
            self.good.append(self.path.read_bytes())
        mx.savez(str(self.path), **{name: mx.array(array) for name, array in arrays.items()})
        self.good.append(self.path.read_bytes())

    def parse(self) -> Any:
        from mlxlora_core.files import tensor_file

        return _tensors(tensor_file.load(self.path)[0])

    def reference(self) -> Any:
        import mlx.core as mx
        import numpy as np

        with np.load(self.path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
        with np.errstate(all="ignore"):
            native = {
                n: a.astype(np.float32 if a.dtype.str[1:] == "f8" else a.dtype.newbyteorder("="))
                for n, a in arrays.items()
            }
        return {
            name: (
                _tensors({name: mx.zeros((), getattr(mx, str(array.dtype).replace("bool", "bool_")))})[name][
                    0
                ],
                array.shape,
                _digest(array.tobytes()),
            )
            for name, array in native.items()
        }


class Pth(Subject):
    """Checkpoints of torch."""

    def prepare(self) -> None:
        import torch

        for name in ("params.json", "tokenizer.model"):
            shutil.copy(self.material / "checkpoint" / name, self.folder / name)
        self.path = self.folder / "consolidated.00.pth"
        table = {"norm.weight": torch.arange(4.0), "output.weight": torch.arange(12.0).reshape(3, 4).half()}
        table |= {"turned": table["output.weight"].t(), "brain": torch.ones(3, dtype=torch.bfloat16)}
        self.good = []
        for saved in (table, {"norm.weight": table["norm.weight"]}):
            torch.save(saved, self.path)
            self.good.append(self.path.read_bytes())

    def parse(self) -> Any:
        from mlxlora_torch import open_folder

        from mlxlora_core.api import NoOptions

        tensors = open_folder(self.folder, NoOptions()).tensors
        return _tensors({name: tensor.read() for name, tensor in tensors.items()})

    def reference(self) -> Any:
        import torch

        codes = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
        return {
            name: (
                codes[tensor.dtype],
                tuple(tensor.shape),
                _digest(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()),
            )
            for name, tensor in torch.load(self.path, map_location="cpu", weights_only=True).items()
        }


class SentencePiece(Subject):
    """Tokenizers."""

    def prepare(self) -> None:
        self.path = self.folder / "tokenizer.model"
        self.good = [(self.material / f"{name}.model").read_bytes() for name in ("bpe", "unigram")]

    def parse(self) -> Any:
        from mlxlora_sentencepiece.tokenizer import SentencePieceTokenizer

        tokenizer = SentencePieceTokenizer(self.path)
        model = tokenizer._pieces.model
        for text in _TEXTS:
            ids = tokenizer.encode(text)
            tokenizer.decode(ids)
            list(tokenizer.stream(ids))
        kinds = (model.is_unknown, model.is_control, model.is_unused, model.is_byte)
        every = range(model.vocab_size())
        tokenizer.decode(every)
        return [(model.id_to_piece(i), _bits(model.get_score(i)), [kind(i) for kind in kinds]) for i in every]

    def reference(self) -> Any:
        found = []
        for number, value in _fields(self.path.read_bytes()):
            if number == 1:
                piece = {1: b"", 2: b"\0" * 4, 3: 1} | dict(_fields(value))
                kinds = [piece[3] == kind for kind in (2, 3, 5, 6)]
                found.append((piece[1].decode(), _bits(struct.unpack("<f", piece[2])[0]), kinds))
        return found


class TokenizerJson(Subject):
    """Vocabularies of the library tokenizers; the other reader is the library itself."""

    is_document = True
    name = "tokenizer.json"

    def prepare(self) -> None:
        import small_tokenizers as small

        self.path = self.folder / self.name
        kinds = [
            small.byte_level(["</s>", "<s>"], bos="<s>"),
            small.like_llama_2(),
            small.unigram(),
            small.words(),
        ]
        good = {
            "tokenizer.json": [*(kind.to_str().encode() for kind in kinds), *small.tiny()],
            "tokenizer_config.json": small.configs(),
            "generation_config.json": [
                b'{"eos_token_id": 1}',
                b'{"eos_token_id": [0, 3], "bos_token_id": 0}',
            ],
        }
        for name, contents in good.items():
            (self.folder / name).write_bytes(contents[0])
        self.good = good[self.name]

    def parse(self) -> Any:
        from mlxlora_tokenizers import open_files

        from mlxlora_core.api import NoOptions

        tokenizer = open_files({path.name: path for path in self.folder.iterdir()}, NoOptions())
        encoded = []
        for text in _TEXTS:
            ids = tokenizer.encode(text, bos=False)
            assert "".join(tokenizer.stream(ids)) == tokenizer.decode(ids)
            encoded.append(ids)
        tokenizer.decode(range(tokenizer.vocab_size + 2))
        return tokenizer.vocab_size, tokenizer.bos, sorted(tokenizer.stops), encoded

    def reference(self) -> Any:
        from tokenizers import Tokenizer

        document, config, generation = (
            json.loads((self.folder / f"{name}.json").read_bytes().decode("utf-8-sig"))
            for name in ("tokenizer", "tokenizer_config", "generation_config")
        )
        library = Tokenizer.from_str(json.dumps({**document, "truncation": None, "padding": None}))
        library.encode_special_tokens = True
        self._add(library, config.get("added_tokens_decoder") or {})
        vocabulary = library.get_vocab()
        bos, eos = (_written(config.get(f"{name}_token")) for name in ("bos", "eos"))
        ends = generation.get("eos_token_id")
        stops = {*(ends if isinstance(ends, list) else [] if ends is None else [ends])}
        stops |= {vocabulary[eos]} if eos else set()
        begin = vocabulary[bos] if bos and config.get("add_bos_token") else _front(library)
        begin = None if config.get("add_bos_token") is False else begin
        encoded = [library.encode(text, add_special_tokens=False).ids for text in _TEXTS]
        plain = [[number for number in ids if number not in {begin, *stops}] for ids in encoded]
        return max(vocabulary.values()) + 1, begin, sorted(stops), plain

    def _add(self, library: Any, decoder: dict[str, Any]) -> None:
        from tokenizers import AddedToken

        for number, token in sorted(decoder.items(), key=lambda pair: int(pair[0])):
            if library.id_to_token(int(number)) is None:
                flags = {key: value for key, value in token.items() if key in ("special", "lstrip", "rstrip")}
                library.add_tokens([AddedToken(token["content"], **flags)])


class TokenizerConfig(TokenizerJson):
    """What stands beside a vocabulary: names of tokens, and tokens that are added."""

    name = "tokenizer_config.json"


class GenerationConfig(TokenizerJson):
    """The ids that end texts."""

    name = "generation_config.json"


def _written(token: Any) -> str | None:
    return token["content"] if isinstance(token, dict) else token


def _front(library: Any) -> int | None:
    """The id that a library puts in front of a text."""
    bare, whole = (library.encode("the", add_special_tokens=special).ids for special in (False, True))
    at = next(at for at in range(len(whole)) if whole[at : at + len(bare)] == bare)
    return whole[0] if at or (whole and not bare) else None


def _bits(value: float) -> bytes:
    return struct.pack("<f", value)


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """(number, value) of the fields of a protocol buffer."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = data[at]
            at += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while at < len(data):
        tag = varint()
        if tag & 7 == 0:
            yield tag >> 3, varint()
        else:
            length = {1: 8, 5: 4}.get(tag & 7) or varint()
            yield tag >> 3, data[at : at + length]
            at += length


class Params(Subject):
    """params.json of a checkpoint."""

    def prepare(self) -> None:
        self.path = self.folder / "params.json"
        self.good = [(self.material / "checkpoint" / "params.json").read_bytes()]

    def parse(self) -> Any:
        from mlxlora_llama.params import read
        from mlxlora_torch.folder import read_params

        params = read_params(self.path)
        shapes = {"output.weight": (_VOCAB, 8), "layers.0.feed_forward.w1.weight": (16, 8)}
        read(params, shapes)
        return params

    def reference(self) -> Any:
        return json.loads(self.path.read_bytes().decode("utf-8-sig"))


class Config(Subject):
    """config.json of a model folder."""

    def prepare(self) -> None:
        self.path = self.folder / "config.json"
        self.good = [(self.material / "model" / "config.json").read_bytes()]

    def parse(self) -> Any:
        from mlxlora_core.model import architectures
        from mlxlora_core.model.folder import read_config
        from mlxlora_core.model.quantization import read_quantization
        from mlxlora_core.model.tokenizers import tokenizer_files

        config = read_config(self.folder)
        architecture = architectures.find_architecture(config, self.registry, self.path)
        architectures.folder_args(architecture.spec, config)
        tokenizer_files(self.folder, config)
        read_quantization(config, self.registry, self.path)
        return config

    def reference(self) -> Any:
        return json.loads(self.path.read_bytes().decode("utf-8-sig"))


class TheirConfig(Subject):
    """config.json of a Hugging Face folder, in both spellings of the rope."""

    def prepare(self) -> None:
        self.path = self.folder / "config.json"
        sizes = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 8}
        sizes |= {"num_key_value_heads": 2, "vocab_size": 60, "max_position_embeddings": 64}
        yarn = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "beta_fast": 8, "mscale": 1.0}
        yarn |= {"mscale_all_dim": 0.5, "original_max_position_embeddings": 16, "truncate": False}
        new = {"model_type": "qwen3", **sizes, "head_dim": 8, "rms_norm_eps": 1e-6, "rope_parameters": yarn}
        new |= {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 2}
        old = {"model_type": "smollm3", **sizes, "rms_norm_eps": 1e-5, "rope_theta": 5e5}
        old |= {"rope_scaling": {"type": "linear", "factor": 2.0}, "no_rope_layers": [1, 0, 1, 1]}
        old |= {"layer_types": ["full_attention"] * 4, "tie_word_embeddings": True, "head_dim": None}
        self.good = [json.dumps(config, indent=2).encode() for config in (new, old)]

    def parse(self) -> Any:
        from mlxlora_hf.config import read_config
        from mlxlora_hf.folder import read_table
        from mlxlora_llama import hf, tables

        config = read_config(self.folder).text
        args = hf.read(config, {})
        if args is not None:
            hf.notes(config, {})
            tables.hf(args)
        return read_table(self.path)

    def reference(self) -> Any:
        return json.loads(self.path.read_bytes().decode("utf-8-sig"))


class FamilyConfig(Subject):
    """config.json of one family as Hugging Face spells it; the other reader looks up its sizes.

    Attributes:
        family: the package that reads it.
        types: what ``model_type`` says of it.
        configs: good ones.
        sizes: argument -> its key and what it is where the file says nothing or null: a value, another
            key, or two keys to divide.
    """

    is_document = True
    family: str
    types: tuple[str, ...]
    configs: tuple[dict[str, Any], ...]
    sizes: dict[str, tuple[Any, ...]]

    def prepare(self) -> None:
        self.path = self.folder / "config.json"
        self.good = [json.dumps(config, indent=2).encode() for config in self.configs]

    def parse(self) -> Any:
        import importlib

        from mlxlora_hf.config import read_config
        from mlxlora_hf.folder import read_table

        hf, tables = (importlib.import_module(f"{self.family}.{name}") for name in ("hf", "tables"))
        config = read_config(self.folder).text
        args = hf.read(config, {})
        if args is None:
            return read_table(self.path), None
        hf.notes(config, {})
        tables.hf(args)
        return read_table(self.path), {name: getattr(args, name) for name in self.sizes}

    def reference(self) -> Any:
        whole = json.loads(self.path.read_bytes().decode("utf-8-sig"))
        text = whole.get("text_config")
        text = whole if text is None else text
        if text.get("model_type") not in self.types:
            return whole, None
        found = {}
        for name, (key, *other) in self.sizes.items():
            value = text.get(key)
            if value is None:
                stated = [text[o] if isinstance(o, str) else o for o in other]
                value = stated[0] // stated[1] if len(stated) == 2 else stated[0] if stated else None
            found[name] = value
        return whole, found


_FAMILY = {
    **{"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2},
    **{"intermediate_size": 48, "vocab_size": 60, "rms_norm_eps": 1e-6, "max_position_embeddings": 64},
}
_FAMILY_SIZES: dict[str, tuple[Any, ...]] = {
    "dim": ("hidden_size",),
    "n_layers": ("num_hidden_layers",),
    "n_heads": ("num_attention_heads",),
    "hidden_dim": ("intermediate_size",),
    "vocab_size": ("vocab_size",),
    "norm_eps": ("rms_norm_eps",),
    "max_seq_len": ("max_position_embeddings",),
    "tie_word_embeddings": ("tie_word_embeddings", True),
}
_DIVIDED_SIZES = {
    "n_kv_heads": ("num_key_value_heads", "num_attention_heads"),
    "head_dim": ("head_dim", "hidden_size", "num_attention_heads"),
}


def _gemma() -> tuple[dict[str, Any], ...]:
    old = {"model_type": "gemma2", **_FAMILY, "head_dim": 16, "query_pre_attn_scalar": 24}
    old |= {"sliding_window": 9, "attn_logit_softcapping": 50.0, "final_logit_softcapping": None}
    old |= {"hidden_activation": "gelu_pytorch_tanh", "rope_theta": 1e4, "tie_word_embeddings": False}
    new = {"model_type": "gemma3_text", **_FAMILY, "head_dim": 16, "query_pre_attn_scalar": 16}
    new |= {"sliding_window": 9, "layer_types": ["sliding_attention", "full_attention"] * 2}
    new["rope_parameters"] = {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }
    within = {"model_type": "gemma3_text", **_FAMILY, "sliding_window": 9, "sliding_window_pattern": 2}
    within |= {"rope_local_base_freq": 1e4, "rope_theta": 1e6, "attention_bias": False}
    within |= {"rope_scaling": {"rope_type": "linear", "factor": 8.0}}
    return old, new, {"model_type": "gemma3", "text_config": within, "vision_config": {"hidden_size": 3}}


def _phi3() -> tuple[dict[str, Any], ...]:
    family = {"model_type": "phi3", **_FAMILY}
    scaled = {"short_factor": [1.0, 1.25, 1.5], "long_factor": [1.0, 2.0, 4.0]}
    original = {"original_max_position_embeddings": 16}
    plain = {**family, **original, "rope_theta": 1e4, "sliding_window": 9, "resid_pdrop": 0.0}
    old = {**family, **original, "rope_theta": 1e4, "partial_rotary_factor": 0.75}
    old |= {"rope_scaling": {"type": "longrope", **scaled}, "interpolate_factor": 1}
    rope = {"rope_type": "longrope", "rope_theta": 1e4, **scaled, "partial_rotary_factor": 0.75}
    rope |= {**original, "attention_factor": 1.2, "factor": 4.0}
    return plain, old, {**family, "rope_parameters": rope, "tie_word_embeddings": False}


def _olmo2() -> tuple[dict[str, Any], ...]:
    old = {"model_type": "olmo2", **_FAMILY, "rope_theta": 5e5, "rope_scaling": None}
    old |= {"attention_bias": True, "tie_word_embeddings": False}
    rope = {"rope_type": "default", "rope_theta": 5e5}
    return old, {"model_type": "olmo2", **_FAMILY, "head_dim": 8, "rope_parameters": rope}


_GEMMA_SIZES: dict[str, tuple[Any, ...]] = {
    **{name: keys for name, keys in _FAMILY_SIZES.items() if name != "max_seq_len"},  # its default varies
    "norm_eps": ("rms_norm_eps", 1e-6),
    "n_kv_heads": ("num_key_value_heads",),
    "head_dim": ("head_dim", 256),
    "query_pre_attn_scalar": ("query_pre_attn_scalar", 256),
}
_PHI3_SIZES = {**_FAMILY_SIZES, **_DIVIDED_SIZES, "sliding_window": ("sliding_window",)}
_OLMO2_SIZES = {**_FAMILY_SIZES, **_DIVIDED_SIZES}


class GemmaConfig(FamilyConfig):
    """Gemma 2, and Gemma 3 in both spellings of the rope, one of them inside a model that sees."""

    family, types = "mlxlora_gemma", ("gemma2", "gemma3_text")
    configs, sizes = _gemma(), _GEMMA_SIZES


class Phi3Config(FamilyConfig):
    """Phi-3 with plain positions, and with two tables of divisors in either spelling of the rope."""

    family, types = "mlxlora_phi3", ("phi3",)
    configs, sizes = _phi3(), _PHI3_SIZES


class Olmo2Config(FamilyConfig):
    """OLMo 2 in both spellings of the rope."""

    family, types = "mlxlora_olmo2", ("olmo2",)
    configs, sizes = _olmo2(), _OLMO2_SIZES


class Index(Subject):
    """The index of a model in shards."""

    def prepare(self) -> None:
        self.path = self.folder / "model.safetensors.index.json"
        names = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
        weights = {f"layers.{i}.weight": names[i % 2] for i in range(6)}
        index = {"metadata": {"total_size": 1000}, "weight_map": weights}
        self.good = [json.dumps(index, indent=1).encode()]

    def parse(self) -> Any:
        from mlxlora_core.model.weights import weight_files

        shards = weight_files(self.folder)
        assert all(shard.resolve().parent == self.folder.resolve() for shard in shards)
        return [shard.name for shard in shards]

    def reference(self) -> Any:
        return sorted(set(json.loads(self.path.read_bytes().decode("utf-8-sig"))["weight_map"].values()))


class Jsonl(Subject):
    """Rows."""

    def prepare(self) -> None:
        self.path = self.folder / "train.jsonl"
        lines = "".join(json.dumps(row, ensure_ascii=i % 2 == 0) + "\n" for i, row in enumerate(_ROWS * 2))
        self.good = [lines.encode(), b"\xef\xbb\xbf" + lines.replace("\n", "\r\n\n").encode()]

    def parse(self) -> Any:
        from mlxlora_core.files.rows import read_rows

        return read_rows(self.path)

    def reference(self) -> Any:
        lines = enumerate(self.path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1)
        return [
            (number, _plain(json.loads(line.decode()))) for number, line in lines if line.strip(b" \t\r\n")
        ]


class JsonArray(Subject):
    """Rows in one array."""

    def prepare(self) -> None:
        self.path = self.folder / "train.json"
        self.good = [json.dumps(_ROWS).encode(), json.dumps(_ROWS, indent=1, ensure_ascii=False).encode()]

    def parse(self) -> Any:
        from mlxlora_core.files.rows import read_rows

        return [content for _, content in read_rows(self.path)]

    def reference(self) -> Any:
        return [_plain(row) for row in json.loads(self.path.read_bytes())]


def _plain(row: dict[str, Any]) -> dict[str, Any]:
    """A row of a plain shape without the keys that nobody reads."""
    shapes = (("text",), ("prompt", "completion"), ("messages",))
    (keys,) = (keys for keys in shapes if set(keys) <= set(row))
    kept = {key: row[key] for key in keys}
    if "messages" in kept:
        kept["messages"] = [
            {"role": said["role"].lower(), "content": said["content"]} for said in kept["messages"]
        ]
    return kept


class Recipe(Subject):
    """recipe.toml; the other reader is a second reading of what the first one would write down."""

    def prepare(self) -> None:
        self.path = self.folder / "recipe.toml"
        self.good = [_RECIPE.encode()]

    def parse(self) -> Any:
        from mlxlora_core.runs.recipe_source import read

        return repr(read(self.path, [], self.registry).values())

    def reference(self) -> Any:
        import tomli_w

        from mlxlora_core.runs.recipe_source import read

        again = self.folder / "again.toml"
        again.write_text(tomli_w.dumps(read(self.path, [], self.registry).values()), encoding="utf-8")
        return repr(read(again, [], self.registry).values())


class Adapter(Subject):
    """Adapter files, put on the model that they were made for."""

    def prepare(self) -> None:
        from mlxlora_core.model import adapters, loading

        self.model = loading.load(self.material / "model", self.registry)
        self.linears = dict(linears(self.model.module))
        self.path = self.folder / "adapter.safetensors"
        whole = (self.material / "adapter.safetensors").read_bytes()
        import mlx.core as mx

        from mlxlora_core.files import tensor_file

        shutil.copy(self.material / "adapter.safetensors", self.path)
        tensors, metadata = tensor_file.load(self.path)
        record = {adapters.METADATA: metadata[adapters.METADATA]}
        mx.save_safetensors(str(self.path), tensors, record)  # without a fingerprint
        self.good = [whole, self.path.read_bytes()]
        self.header_bytes = 1500

    def parse(self) -> Any:
        from mlxlora_core.model import adapters

        adapted = adapters.load(self.path, self.model, self.registry)
        try:
            return _tensors(adapters.adapter_parameters(self.model.module, adapted.paths))
        finally:
            replace_modules(self.model.module, {path: self.linears[path] for path in adapted.paths})

    def reference(self) -> Any:
        return _safetensors(self.path)


class Gguf(Subject):
    """Models of llama.cpp with tensors of every type, and vocabularies of both kinds without."""

    def prepare(self) -> None:
        import gguf_files as files

        self.path = self.folder / "model.gguf"
        keys: dict[str, Any] = {**files.ARCHITECTURE, "general.quantization_version": 2, "rope": [0.5, 2.0]}
        few = [
            *files.some_tensors(("Q4_1", "Q8_0"))[:2],
            files.Tensor("rope_freqs.weight", (2,), "F32", bytes(8)),
        ]
        self.good = [
            files.gguf({**keys, **files.BYTE_LEVEL}, files.some_tensors()),
            files.gguf({**keys, **files.PIECES}, few, version=2, alignment=64),
        ]
        self.header_bytes = 1200

    def parse(self) -> Any:
        from mlxlora_gguf import GgufOptions, open_path

        model = open_path(self.path, GgufOptions())
        tensors = {}
        for name, tensor in model.tensors.items():
            told = tensor.shape, _digest(_array_bytes(tensor.read()))
            packed = tensor.packed.parts if tensor.packed is not None else {}
            tensors[name] = told, {part: _digest(_array_bytes(lazy.read())) for part, lazy in packed.items()}
        return dict(model.config), tensors, _vocabulary(dict(model.tokenizer))

    def reference(self) -> Any:
        import gguf_files as files

        keys, tensors = files.read(self.path.read_bytes())
        config = {key: value for key, value in keys.items() if not key.startswith(("tokenizer.", "split."))}
        if "rope_freqs.weight" in tensors:
            config["rope_freqs.weight"] = files.weights("F32", tensors.pop("rope_freqs.weight")[2])
        found = {name: _foreign(*tensor) for name, tensor in tensors.items()}
        return config, found, _stated_vocabulary(keys)


def _array_bytes(array: Any) -> bytes:
    import mlx.core as mx
    import numpy as np

    array = array.view(mx.uint16) if array.dtype == mx.bfloat16 else array
    return np.array(array).tobytes()


def _foreign(kind: str, shape: tuple[int, ...], data: bytes) -> Any:
    """What the bytes of a tensor in a GGUF file stand for, and its parts where it is a packed weight."""
    import gguf_files as files
    import numpy as np

    _, _, size = files.TYPES[kind]
    if kind in ("F32", "F16", "BF16"):
        return (shape, _digest(data)), {}
    weights = np.array(files.weights(kind, data)).astype(np.float32)
    if kind not in files.PACKED or len(shape) == 1:
        return (shape, _digest(weights.tobytes())), {}
    blocks = [data[at : at + size] for at in range(0, len(data), size)]
    bits = {"4": 4, "5": 5, "8": 8}[kind[1]]
    stream, groups = b"", []
    for block in blocks:
        whole = sum(number << bits * n for n, number in enumerate(files.integers(kind, block)))
        stream += whole.to_bytes(len(files.integers(kind, block)) * bits // 8, "little")
        groups += files.groups(kind, block)
    scales = np.array(groups).astype(np.float32 if kind.endswith("K") else np.float16)
    parts = {"weight": stream, "scales": scales[:, 0].tobytes(), "biases": scales[:, 1].tobytes()}
    return (shape, _digest(weights.tobytes())), {name: _digest(part) for name, part in parts.items()}


def _vocabulary(files: dict[str, Any]) -> Any:
    """Tokens, what splits or scores them, and the template, in the files that a tokenizer is opened from."""
    config = json.loads(files["tokenizer_config.json"])
    ends = json.loads(files["generation_config.json"])["eos_token_id"]
    if "tokenizer.json" in files:
        model = json.loads(files["tokenizer.json"])
        tokens = list(model["model"]["vocab"])
        rest: Any = [p.split(" ") if isinstance(p, str) else p for p in model["model"]["merges"]]
    else:
        pieces = [dict(_fields(value)) for number, value in _fields(files["tokenizer.model"]) if number == 1]
        tokens, rest = [piece[1].decode() for piece in pieces], [piece[2].hex() for piece in pieces]
    return tokens, rest, ends[0], config.get("chat_template")


def _stated_vocabulary(keys: dict[str, Any]) -> Any:
    """The same in the keys of a GGUF file."""
    ggml = {key.removeprefix("tokenizer.ggml."): value for key, value in keys.items()}
    tokens = [token or f"[EMPTY_{number}]" for number, token in enumerate(ggml["tokens"])]
    if ggml["model"] == "gpt2":
        rest: Any = [
            [merge[: merge.index(" ", 1)], merge[merge.index(" ", 1) + 1 :]] for merge in ggml["merges"]
        ]
    else:
        rest = [_bits(score).hex() for score in ggml["scores"]]
    named = [
        key for key in keys if key == "tokenizer.chat_template" or key.startswith("tokenizer.chat_template.")
    ]
    templates: Any = [
        {
            "name": key.removeprefix("tokenizer.chat_template").removeprefix(".") or "default",
            "template": keys[key],
        }
        for key in named
    ]
    if [template["name"] for template in templates] == ["default"]:
        templates = templates[0]["template"]
    usual = {"gpt2": None, "llama": 2}[ggml["model"]]
    ids = [ggml.get(f"{name}_token_id", usual if name == "eos" else None) for name in ("eos", "eot", "eom")]
    ids = [number for number in ids if number is not None and number not in (-1, 2**32 - 1)]
    known = [n for n, token in enumerate(tokens) if token in ("<|im_end|>", "</s>")]
    return tokens, rest, (ids or known)[0], templates or None


_TEMPLATES = (
    """{% for message in messages %}
<|im_start|>{{ message.role }}
{{ message['content'] | trim }}<|im_end|>
{% endfor %}
{% if add_generation_prompt %}
<|im_start|>assistant
{% endif %}
""",
    """{%- set ns = namespace(count=0, text='') %}{{ bos_token }}
{%- if tools %}{{- 'Tools: ' ~ tools | tojson(indent=2) + '\\n' }}{% endif %}
{%- for m in messages if m.role != 'system' %}
{%- set ns.count = ns.count + 1 %}
{%- if m.role == 'user' %}{{ '[INST] %s [/INST]' % m.content }}
{%- elif m.role == 'assistant' %}{% generation %}{{ ' ' + m.content.split('</think>')[-1].strip() }}
{%- for call in m.tool_calls or [] %}{{ call | tojson }}{{ ', ' if not loop.last }}{% endfor %}
{{- eos_token }}{% endgeneration %}
{%- else %}{{ raise_exception('role ' ~ m.role) }}{% endif %}
{%- endfor %}
{%- if ns.count > 10 ** 2 or range(4) | sum > 9 %}{{ 'a' * 3 }}{% endif %}""",
    """{% macro turn(role, text, end=true) %}<{{ role }}>{{ text | replace('<', '&lt;') }}
{%- if end %}</{{ role }}>{% endif %}{% endmacro %}
{% for m in messages %}{% set role = {'user': 'u', 'assistant': 'a'}.get(m.role, m.role[:1] | upper) %}
{{ turn(role, [m.content, loop.index] | join(' #')) }}
{% if loop.last and m.content | length is divisibleby 2 %}{% break %}{% endif %}
{% endfor %}
{{ messages | map(attribute='role') | select('equalto', 'user') | list | length }}{{ '{:>4}'.format(5) }}""",
)


_BLOCKS = {"generation": r"{%\1 filter string \2%}", "endgeneration": r"{%\1 endfilter \2%}"}


class Template(Subject):
    """Chat templates; the other reader is Jinja as it is."""

    messages = (
        {"role": "user", "content": "What is é?"},
        {"role": "assistant", "content": " A <letter>.\n"},
        {"role": "user", "content": "And?"},
        {"role": "assistant", "content": "No more."},
    )
    specials = MappingProxyType({"bos_token": "<s>", "eos_token": "</s>"})

    def prepare(self) -> None:
        self.path = self.folder / "chat_template.jinja"
        self.good = [template.encode() for template in _TEMPLATES]
        self.header_bytes = 700

    def parse(self) -> Any:
        from mlxlora_core.chat import ChatTemplate, find_template
        from mlxlora_core.errors import MlxloraError

        found = find_template({self.path.name: self.path})
        assert found is not None
        template = ChatTemplate(found.source, self.specials, where=found.where)
        texts = [template.render(self.messages[:count], (), waits) for count, waits in self.cases()]
        try:
            turns = template.turns(self.messages)
        except MlxloraError as fault:  # which part the assistant says may have become unclear
            assert str(fault).isprintable()
        else:
            assert texts[0].startswith("".join(turn.text for turn in turns))
        return texts

    def cases(self) -> tuple[tuple[int, bool], ...]:
        """How many of the messages are rendered, and whether an answer is waited for."""
        return (4, False), (3, True), (1, True)

    def reference(self) -> Any:
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        def refuse(message: str) -> None:
            raise ValueError(message)

        source = self.path.read_bytes().decode("utf-8-sig")
        for mark in ("generation", "endgeneration"):  # a block of nothing else: it says what stands in it
            source = re.sub(rf"{{%(-?)\s*{mark}\s*(-?)%}}", _BLOCKS[mark], source)
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = lambda value, **more: json.dumps(value, ensure_ascii=False, **more)
        environment.globals |= {"raise_exception": refuse}
        template = environment.from_string(source)
        return [
            template.render(
                messages=list(self.messages[:count]), tools=None, add_generation_prompt=waits, **self.specials
            )
            for count, waits in self.cases()
        ]


class HfConfig(Subject):
    """config.json of Hugging Face: dense, with packed weights, and of a model around a text model."""

    def prepare(self) -> None:
        self.path = self.folder / "config.json"
        write_hugging_face(self.folder)
        table = {
            "group_size": 32,
            "bits": 4,
            "mode": "affine",
            "model.norm": False,
            "lm_head": {"bits": 4, "group_size": 32},
        }
        inner = {**_HUGGING_FACE, "rope_scaling": {"rope_type": "linear", "factor": 2.0}}
        outer = {"model_type": "llava", "text_config": inner, "vision_config": {"hidden_size": 3}}
        configs = (_HUGGING_FACE | {"quantization": table}, outer | {"quantization_config": table})
        self.good = [json.dumps(config, indent=1).encode() for config in configs]

    def parse(self) -> Any:
        from mlxlora_hf import open_folder

        from mlxlora_core.api import NoOptions
        from mlxlora_core.model import architectures

        model = open_folder(self.folder, NoOptions())
        architectures.read_foreign(model, self.registry, self.path)
        packed = model.tensors["lm_head.weight"].packed
        ends = model.tokenizer.get("generation_config.json")
        ids = json.loads(ends)["eos_token_id"] if isinstance(ends, bytes) else []
        return dict(model.config), dict(packed.options) if packed else {}, ids

    def reference(self) -> Any:
        whole = json.loads(self.path.read_bytes().decode("utf-8-sig"))
        text = whole.get("text_config")
        tied = {"tie_word_embeddings": whole.get("tie_word_embeddings")}
        text = whole if text is None else ({**tied, **text} if "tie_word_embeddings" in whole else text)
        table = next(
            found
            for key in ("quantization", "quantization_config")
            for c in (whole, text)
            if (found := c.get(key))
        )
        own = next((v for k, v in table.items() if k == "lm_head" and isinstance(v, dict)), table)
        options = {k: own.get(k) or default for k, default in (("group_size", 64), ("bits", 4))}
        apart = ("auto_map", "quantization", "quantization_config")
        ends: list[int] = []
        for stated in (whole.get("eos_token_id"), text.get("eos_token_id")):
            ends += stated if isinstance(stated, list) else [] if stated is None else [stated]
        return {k: v for k, v in text.items() if k not in apart}, options, list(dict.fromkeys(ends))


class HfIndex(Subject):
    """The index of a Hugging Face folder in shards."""

    def prepare(self) -> None:
        self.path = self.folder / "model.safetensors.index.json"
        names = write_hugging_face(self.folder, shards=2)
        (self.folder / "config.json").write_text(
            json.dumps(_HUGGING_FACE | {"quantization": {"group_size": 32, "bits": 4}})
        )
        index = {"metadata": {"total_size": 1000}, "weight_map": names}
        self.good = [json.dumps(index, indent=1).encode()]

    def parse(self) -> Any:
        from mlxlora_hf.folder import HUGGING_FACE
        from mlxlora_hf.shards import find_tensors

        found = find_tensors(self.folder, HUGGING_FACE)
        for tensor in found.tensors.values():
            tensor.read()
        return sorted(found.tensors)

    def reference(self) -> Any:
        return sorted(json.loads(self.path.read_bytes().decode("utf-8-sig"))["weight_map"])


_HUGGING_FACE: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 40,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": [2, 5],
}


_ADAPTER_RANK = 2
_ADAPTED = ("model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj")
_ADAPTED_SIZES = {_ADAPTED[0]: (8, 8), _ADAPTED[1]: (16, 8)}


def _update_pairs(peft: bool) -> dict[str, Any]:
    """Two updates, as a tool names and turns them."""
    import mlx.core as mx

    mx.random.seed(0)
    tensors = {}
    for path, (inputs, outputs) in _ADAPTED_SIZES.items():
        a, b = mx.random.normal((inputs, _ADAPTER_RANK)), mx.random.normal((_ADAPTER_RANK, outputs))
        if peft:
            tensors[f"base_model.model.{path}.lora_A.weight"] = mx.contiguous(a.T)
            tensors[f"base_model.model.{path}.lora_B.weight"] = mx.contiguous(b.T)
        else:
            tensors |= {f"{path}.lora_a": a, f"{path}.lora_b": b}
    return tensors


def _adapter_said(opened: Any) -> Any:
    """Which adapter, and its options at each module."""
    at = {path: {**opened.options, **opened.overrides.get(path, {})} for path in sorted(opened.linears)}
    return opened.adapter, at, sorted(opened.unstated)


class PeftConfig(Subject):
    """adapter_config.json of PEFT beside good tensors."""

    is_document = True

    def prepare(self) -> None:
        import mlx.core as mx

        self.path = self.folder / "adapter_config.json"
        mx.save_safetensors(str(self.folder / "adapter_model.safetensors"), _update_pairs(peft=True))
        plain = {
            "peft_type": "LORA",
            "r": _ADAPTER_RANK,
            "lora_alpha": 5,
            "lora_dropout": 0.25,
            "bias": "none",
        }
        patterns = {
            "rank_pattern": {"q_proj": 2},
            "alpha_pattern": {"model.layers.0.mlp.down_proj": 3, r"layers\.\d+\.q": 1},
            "use_rslora": True,
            "target_modules": ["q_proj", "down_proj"],
            "modules_to_save": None,
        }
        self.good = [json.dumps(config, indent=2).encode() for config in (plain, {**plain, **patterns})]

    def parse(self) -> Any:
        from mlxlora_peft.opening import open_adapter

        return _adapter_said(open_adapter(self.folder))

    def reference(self) -> Any:
        held = json.loads(self.path.read_text())
        patterns = held.get("alpha_pattern") or {}
        options = {}
        for path in _ADAPTED:
            hit = (alpha for key, alpha in patterns.items() if re.match(rf"(.*\.)?({key})$", path))
            given = held.get("lora_alpha")
            alpha = next(hit, 8.0 if given is None else given)
            dropout = float(held.get("lora_dropout") or 0.0)
            scale = {"alpha": float(alpha)} if held.get("use_rslora") else {"scale": alpha / _ADAPTER_RANK}
            options[path] = {"rank": _ADAPTER_RANK, **scale, "dropout": dropout}
        assert all(math.isfinite(value) for at in options.values() for value in at.values())
        return "rslora" if held.get("use_rslora") else "lora", dict(sorted(options.items())), []


class MlxLmConfig(Subject):
    """adapter_config.json of mlx-lm beside good tensors."""

    is_document = True

    def prepare(self) -> None:
        import mlx.core as mx

        self.path = self.folder / "adapter_config.json"
        mx.save_safetensors(str(self.folder / "adapters.safetensors"), _update_pairs(peft=False))
        config = {
            "fine_tune_type": "lora",
            "num_layers": 1,
            "lora_parameters": {"rank": _ADAPTER_RANK, "scale": 5.5, "dropout": 0.25},
        }
        self.good = [json.dumps(config, indent=1).encode()]

    def parse(self) -> Any:
        from mlxlora_mlx_lm.opening import open_adapter

        return _adapter_said(open_adapter(self.folder))

    def reference(self) -> Any:
        held = json.loads(self.path.read_text())
        parameters = held.get("lora_parameters", {}) if isinstance(held, dict) else {}
        told = {
            key: float(parameters[key]) for key in ("scale", "dropout") if parameters.get(key) is not None
        }
        options = {"rank": _ADAPTER_RANK, **told}
        return "lora", dict.fromkeys(sorted(_ADAPTED), options), [] if "scale" in told else ["scale"]


class PeftTensors(Subject):
    """adapter_model.safetensors beside a good config."""

    header_bytes = 500

    def prepare(self) -> None:
        import mlx.core as mx

        self.path = self.folder / "adapter_model.safetensors"
        config = {"peft_type": "LORA", "r": _ADAPTER_RANK, "lora_alpha": 4}
        (self.folder / "adapter_config.json").write_text(json.dumps(config))
        mx.save_safetensors(str(self.path), _update_pairs(peft=True), {"format": "pt"})
        self.good = [self.path.read_bytes()]

    def parse(self) -> Any:
        from mlxlora_peft.opening import open_adapter

        opened = open_adapter(self.folder)
        held = {f"{path}.{n}": t.read() for path, at in opened.linears.items() for n, t in at.items()}
        return _tensors({name: tensor.T for name, tensor in held.items()})

    def reference(self) -> Any:
        turned = {"A.weight": "a", "B.weight": "b"}
        found = {}
        for name, tensor in _safetensors(self.path).items():
            path, _, part = name.removeprefix("base_model.model.").rpartition(".lora_")
            found[f"{path}.lora_{turned[part]}"] = tensor
        return found


def write_hugging_face(folder: Path, shards: int = 1) -> dict[str, str]:
    """Write a folder of one layer whose head is packed, without a config; name -> file of each tensor."""
    import mlx.core as mx

    at = "model.layers.0"
    shapes = {f"{at}.self_attn.{letter}_proj.weight": (64, 64) for letter in "qkvo"}
    shapes |= {f"{at}.mlp.{name}_proj.weight": (32, 64) for name in ("gate", "up")}
    shapes |= {f"{at}.mlp.down_proj.weight": (64, 32), "model.embed_tokens.weight": (40, 64)}
    shapes |= {f"{at}.{name}_layernorm.weight": (64,) for name in ("input", "post_attention")}
    tensors = {name: mx.ones(shape) for name, shape in {**shapes, "model.norm.weight": (64,)}.items()}
    parts = mx.quantize(mx.ones((40, 64)), 32, 4)
    tensors |= {f"lm_head.{part}": a for part, a in zip(("weight", "scales", "biases"), parts, strict=True)}
    files = [
        f"model-{n + 1:05d}-of-{shards:05d}.safetensors" if shards > 1 else "model.safetensors"
        for n in range(shards)
    ]
    placed = {name: files[number % shards] for number, name in enumerate(tensors)}
    for file in files:
        mx.save_safetensors(str(folder / file), {n: t for n, t in tensors.items() if placed[n] == file})
    (folder / "tokenizer.json").write_text("{}")
    return placed


KINDS: dict[str, type[Subject]] = {
    "safetensors": Safetensors,
    "npz": Npz,
    "pth": Pth,
    "tokenizer": SentencePiece,
    "tokenizer_json": TokenizerJson,
    "tokenizer_config": TokenizerConfig,
    "generation_config": GenerationConfig,
    "params": Params,
    "config": Config,
    "hf_arguments": TheirConfig,
    "gemma_config": GemmaConfig,
    "phi3_config": Phi3Config,
    "olmo2_config": Olmo2Config,
    "index": Index,
    "jsonl": Jsonl,
    "json_array": JsonArray,
    "recipe": Recipe,
    "adapter": Adapter,
    "gguf": Gguf,
    "template": Template,
    "hf_config": HfConfig,
    "hf_index": HfIndex,
    "peft_config": PeftConfig,
    "peft_tensors": PeftTensors,
    "mlx_lm_config": MlxLmConfig,
}
