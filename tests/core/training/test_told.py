"""What training is told of a prompt is what generation is told, under many tokenizers; or it is warned of."""

from __future__ import annotations

import io
import random
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import sentencepiece

from mlxlora_core.errors import DataError
from mlxlora_core.model.prompts import continued, prompt_ids
from mlxlora_core.model.tokenizers import CheckedTokenizer, open_tokenizer
from mlxlora_core.plugins import Registry
from mlxlora_core.training.examples import Examples, examples_in_memory
from mlxlora_core.training.findings import Finding

ROWS = 1000
LINES = [
    f"Q: What is widget {i}?\nA: It is {i * 7} of café, naïve as The Quick brown fox." for i in range(300)
]

KINDS: dict[str, dict[str, Any]] = {
    "as Llama": {"normalization_rule_name": "identity", "remove_extra_whitespaces": False},
    "unigram": {
        "model_type": "unigram",
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
    },
    "no space in front": {
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "add_dummy_prefix": False,
    },
    "pieces over spaces": {
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "split_by_whitespace": False,
        "split_by_unicode_script": False,
        "vocab_size": 700,
    },
    "normalised": {"normalization_rule_name": "nmt_nfkc"},
    "no bytes": {"byte_fallback": False, "vocab_size": 100, "normalization_rule_name": "identity"},
    "spaces behind": {
        "treat_whitespace_as_suffix": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
    },
}
FAITHFUL = {"as Llama", "unigram", "no space in front", "pieces over spaces"}

_PARTS = (
    *("Q:", "A:", "What is", "widget", "fox", "The", "0", "42", "7.5", "it", "x", "(", ")", "def f(x):", "#"),
    *(" ", "  ", "\n", "\n\n", "\t", "\r\n", "\u00a0", "\u3000", "\u2028", "\u200b", "\ufeff", "\0"),
    *("é", "e\u0301", "ﬁ", "①", "日本", "한국", "😀", "👩‍👩‍👧", "العربية", "\u2581", "ñ", "\u0301"),
    *("<s>", "</s>", "[INST]", "<|eot_id|>", "<0x0A>", "<unk>"),
)


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory, registry: Registry) -> Callable[..., CheckedTokenizer]:
    """A function that trains a tokenizer and opens it."""

    def make(**options: Any) -> CheckedTokenizer:
        model = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(LINES),
            model_writer=model,
            hard_vocab_limit=False,
            num_threads=1,
            minloglevel=2,
            **{"model_type": "bpe", "vocab_size": 420, "byte_fallback": True, **options},
        )
        path = tmp_path_factory.mktemp("told") / "tokenizer.model"
        path.write_bytes(model.getvalue())
        return open_tokenizer({"tokenizer.model": path}, registry, path)

    return make


@pytest.fixture(scope="module", params=list(KINDS))
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def tokenizer(kind: str, opened: Callable[..., CheckedTokenizer]) -> CheckedTokenizer:
    return opened(**KINDS[kind])


def text(draw: random.Random, parts: int) -> str:
    return "".join(draw.choice(_PARTS) + draw.choice(("", "", " ")) for _ in range(draw.randrange(parts)))


def random_rows() -> list[dict[str, Any]]:
    """Prompts that end in anything, completions that begin with anything or are empty."""
    draw = random.Random(0)
    rows: list[dict[str, Any]] = []
    for _ in range(ROWS):
        prompt = text(draw, 12) + draw.choice(("", " ", "\n", ": ", "  "))
        completion = draw.choice(("", " ", "\n", "")) + text(draw, 6)
        if draw.random() < 0.3:
            said = [prompt, completion, *([text(draw, 5), text(draw, 5)] if draw.random() < 0.5 else [])]
            roles = ("user", "assistant", "user", "assistant")
            messages = [{"role": role, "content": c} for role, c in zip(roles, said, strict=False)]
            if draw.random() < 0.3:
                messages.insert(0, {"role": "system", "content": text(draw, 5)})
            rows.append({"messages": messages})
        else:
            rows.append({"prompt": prompt, "completion": completion})
    return rows


def asked(row: dict[str, Any]) -> Any:
    return row["prompt"] if "prompt" in row else row["messages"][:-1]


def read(tokenizer: CheckedTokenizer, rows: Sequence[dict[str, Any]]) -> Examples:
    return examples_in_memory(rows, "train", tokenizer, max_seq_length=100_000)


def test_training_is_told_of_a_prompt_what_generation_is_told(kind: str, tokenizer: CheckedTokenizer) -> None:
    """And where the text cannot be kept, the row is warned of."""
    warned = Counter[Finding]()
    for row in random_rows():
        try:
            rows = read(tokenizer, [row])
        except DataError as fault:
            assert "none of 1 rows" in fault.what
            continue
        told, ids, found = (
            rows.examples[0].tokens.tolist(),
            prompt_ids(tokenizer, asked(row)),
            rows.findings.rows,
        )
        assert told[: len(ids)] == ids, row
        if "prompt" in row and tokenizer.decode(told) != row["prompt"] + row["completion"]:
            assert found[Finding.CHANGED], row
        warned.update(found.keys())
    assert not warned[Finding.ASKED_OTHERWISE]
    assert warned[Finding.SPECIAL] and warned[Finding.NO_ANSWER] and warned[Finding.CHANGED]
    assert warned[Finding.APART] or kind not in FAITHFUL


def test_a_tokenizer_that_keeps_texts_keeps_them_over_boundaries(
    kind: str, tokenizer: CheckedTokenizer
) -> None:
    """Prompt and completion apart, the row still says what it said."""
    if kind not in FAITHFUL:
        pytest.skip("it changes texts, which is told")
    apart = 0
    for row in random_rows():
        if "prompt" in row and "\u2581" not in row["prompt"] + row["completion"]:
            found = continued(tokenizer, row["prompt"], row["completion"])
            assert tokenizer.decode([*found.asked, *found.answered]) == row["prompt"] + row["completion"]
            apart += found.apart
    assert apart
