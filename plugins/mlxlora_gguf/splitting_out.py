"""By which name of GGUF a ``tokenizer.json`` splits a text, read off its steps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from mlxlora_gguf.splitting import RULES, Rule

_ALL = r"|\s+"  # what a pattern ends with that leaves nothing of a text over


def find_name(document: Mapping[str, Any], known: str = "") -> str | None:
    """The name of the rule, or None where no rule is like it.

    Args:
        document: a ``tokenizer.json``.
        known: the name that the model's own GGUF file had, which is taken if it fits.
    """
    steps = _steps(document)
    if steps is None or not _is_plain(document.get("normalizer")):
        return None
    ignores = bool(document["model"].get("ignore_merges"))
    names = [name for name, rule in RULES.items() if _key(rule) == steps and rule.ignore_merges == ignores]
    return known if known in names else next(iter(names), None)


def _key(rule: Rule) -> tuple[tuple[str, ...], bool, bool]:
    return tuple(rule.patterns), rule.digits, rule.gpt2


def _is_plain(normalizer: Any) -> bool:
    """Whether texts are taken as they are. NFC is passed over, as llama.cpp does with Qwen's."""
    return normalizer is None or (isinstance(normalizer, dict) and normalizer.get("type") == "NFC")


def _steps(document: Mapping[str, Any]) -> tuple[tuple[str, ...], bool, bool] | None:
    """(patterns, whether digits are single, whether GPT-2's pattern comes last), or None for others."""
    patterns: list[str] = []
    digits = gpt2 = ended = False
    for step in flat(document.get("pre_tokenizer"), "pretokenizers"):
        kind = step.get("type")
        if ended:
            return None
        if kind == "Split" and not digits and (pattern := _pattern(step)):
            patterns.append(pattern)
        elif kind == "Digits" and step.get("individual_digits") is True and not digits:
            digits = True
        elif kind == "ByteLevel" and not step.get("add_prefix_space"):
            gpt2, ended = step.get("use_regex", True) is True, True
        else:
            return None
    return (tuple(patterns), digits, gpt2) if ended else None


def _pattern(step: Mapping[str, Any]) -> str:
    """The regular expression of a split that keeps all of a text, or nothing."""
    pattern = step.get("pattern")
    source = pattern.get("Regex") if isinstance(pattern, dict) else None
    behaviour, inverted = step.get("behavior"), bool(step.get("invert"))
    kept = behaviour == "Isolated" and not inverted
    if isinstance(source, str) and (kept or (behaviour == "Removed" and inverted and source.endswith(_ALL))):
        return source
    return ""


def flat(section: Any, key: str) -> Iterator[Mapping[str, Any]]:
    """The steps of a section, those of sequences among them one after another."""
    left = [section]
    while left:
        step = left.pop()
        if not isinstance(step, dict):
            continue
        inner = step.get(key) if step.get("type") == "Sequence" else None
        if isinstance(inner, list):
            left += reversed(inner)
        else:
            yield step
