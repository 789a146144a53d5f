"""The names of tensors as a text model of Hugging Face has them, whatever stands in front of them.

A model that sees or hears has its text model inside it, under names such as
``language_model.model.layers.0...`` or ``model.language_model.layers.0...``; what
trains or compiles a model puts ``module.`` or ``_orig_mod.`` in front; and a model
saved without its head has not even ``model.``. The embedding tells which it is.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from mlxlora_core.api import ModelError, listing

_EMBEDDING = re.compile(r"(?P<before>(?:.*\.)?)embed_tokens\.weight")
_HEAD = re.compile(r"(?P<before>(?:.*\.)?)(?P<rest>lm_head\..+)")
_MODEL = "model."
#: computed from the config, or masks, whatever they hold
_COMPUTED = re.compile(
    r"(?:.*\.)?(?:rotary_emb\.(?:inv_freq|original_inv_freq|cos_cached|sin_cached)|"
    r"(?:self_)?attn\.(?:masked_bias|bias|causal_mask)|attention\.(?:masked_bias|bias))"
)
_WRAPPERS = ("module.", "_orig_mod.")


@dataclass(frozen=True)
class Names:
    """How the names of a checkpoint become those of a text model.

    Attributes:
        before: what stands in front of the layers and the embedding.
        inside: whether the text model is a part of a larger one, whose rest is left out.
    """

    before: str
    inside: bool

    def short(self, name: str) -> str | None:
        """The name in the text model, or None where it is no part of that."""
        if self.before == _MODEL:
            return name
        if name.startswith(self.before) and (self.before or not _HEAD.fullmatch(name)):
            return _MODEL + name.removeprefix(self.before)
        if match := _HEAD.fullmatch(name):
            return match["rest"]
        return None if self.inside else name

    def told(self) -> str:
        """What is done to the names, in words, or nothing."""
        if self.before == _MODEL:
            return ""
        return (
            f"taken off the names of the tensors: {self.before}"
            if self.before
            else f"put in front of the names: {_MODEL}"
        )


def find_names(names: Iterable[str]) -> Names:
    """How the names of a checkpoint are shortened; not at all where no embedding, or several, could tell."""
    found = sorted({match["before"] for name in names if (match := _EMBEDDING.fullmatch(name))})
    before = found[0] if len(found) == 1 else _MODEL
    bare = before
    while bare.startswith(_WRAPPERS):
        bare = bare.partition(".")[2]
    return Names(before, inside=bare not in ("", _MODEL))


def is_computed(name: str) -> bool:
    """Whether a tensor is a buffer that every model computes for itself."""
    return bool(_COMPUTED.fullmatch(name))


def short_names(all_names: Iterable[str], names: Names) -> tuple[dict[str, str], list[str]]:
    """Name -> name in the text model, of those that are part of it; and what was done, in words.

    Raises:
        ModelError: two have one name then.
    """
    kept = [name for name in all_names if not is_computed(name)]
    short = {name: names.short(name) for name in kept}
    taken = {name: text for name, text in short.items() if text is not None}
    twice = sorted(text for text, count in Counter(taken.values()).items() if count > 1)
    if twice:
        raise ModelError(f"has two tensors for each of {listing(twice)}, without {names.before}")
    notes = [told] if (told := names.told()) else []
    rest = [name for name, text in short.items() if text is None]
    if rest:
        counts = Counter(".".join(name.split(".")[: 2 if name.startswith(_MODEL) else 1]) for name in rest)
        parts = listing(f"{part} ({count})" for part, count in sorted(counts.items()))
        notes.append(f"left out, since only the text model is read: {len(rest)} tensors of {parts}")
    return taken, notes


def renamed(path: str, names: Names) -> str:
    """A module's path in the text model; one that is no part of it stays as it is."""
    short = names.short(f"{path}.weight")
    return short.removesuffix(".weight") if short is not None else path
