"""llama.cpp itself, in this process: what it makes of token ids, and of conversations."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest


class LlamaCpp:
    """A model in llama.cpp, its cache in float32.

    Args:
        path: GGUF file of the model.
        lora: of an adapter, if one is put on it.
        force: an ordinary token. It is drawn wherever log-probabilities are asked for: of a drawn token
            that is half a letter the server tells none. What it tells is of the logits before that.
    """

    def __init__(self, path: Path, lora: Path | None = None, force: int = 300) -> None:
        module: Any = pytest.importorskip("xllamacpp", reason="needs llama.cpp: pip install xllamacpp")
        params = module.CommonParams()
        params.model.path = str(path)
        params.n_ctx, params.n_parallel, params.n_gpu_layers, params.warmup = 512, 1, 0, False
        params.cache_type_k = params.cache_type_v = module.ggml_type.GGML_TYPE_F32
        params.flash_attn_type = module.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        if lora is not None:
            params.lora_adapters = [module.CommonAdapterLoraInfo(str(lora), 1.0)]
        self._server, self._force = module.Server(params), force

    def log_probabilities(self, ids: Sequence[int], most: int = 200) -> Mapping[int, float]:
        """token -> log-probability of coming next, of the most likely ones."""
        asked = {"prompt": list(ids), "max_tokens": 1, "temperature": 0, "logprobs": most}
        out = self._server.handle_completions({**asked, "logit_bias": [[self._force, 1000.0]]})
        (told,) = out["choices"][0]["logprobs"]["content"]
        return {token["id"]: token["logprob"] for token in told["top_logprobs"]}

    def greedy(self, ids: Sequence[int], count: int) -> tuple[str, int]:
        """The text that follows, and how many tokens it has."""
        out = self._server.handle_completions({"prompt": list(ids), "max_tokens": count, "temperature": 0})
        return out["choices"][0]["text"], out["usage"]["completion_tokens"]

    def answer(self, question: str, count: int = 32) -> tuple[str, str]:
        """What it says to a question by its own chat template, and why it ends."""
        messages = [{"role": "user", "content": question}]
        out = self._server.handle_chat_completions(
            {"messages": messages, "max_tokens": count, "temperature": 0}
        )
        return out["choices"][0]["message"]["content"], out["choices"][0]["finish_reason"]


def with_blas(path: Path, ids: Sequence[int]) -> np.ndarray:
    """Log-probabilities (T, V) of a model in a llama.cpp that multiplies in float32, all of ``ids`` at once.

    That is one with a BLAS, for batches of 32 tokens and more; CONTRIBUTING.md says how to build it.
    """
    module: Any = pytest.importorskip("llama_cpp", reason="needs llama.cpp with a BLAS: see CONTRIBUTING.md")
    libraries = os.environ.get("LLAMA_CPP_LIB_PATH") or Path(module.__file__).parent / "lib"
    if not Path(libraries, "libggml-blas.so").exists():
        pytest.skip("this llama.cpp has no BLAS: see CONTRIBUTING.md")
    model = module.Llama(
        str(path),
        **{"n_ctx": 512, "n_batch": 512, "n_ubatch": 512, "logits_all": True, "verbose": False},
        **{"type_k": module.GGML_TYPE_F32, "type_v": module.GGML_TYPE_F32, "flash_attn": False},
    )
    model.eval(ids)
    logits = np.array(model.scores[: len(ids)], np.float64)
    highest = logits.max(axis=-1, keepdims=True)
    return logits - highest - np.log(np.exp(logits - highest).sum(axis=-1, keepdims=True))
