"""Whether two tokenizers are the same: the ids of texts that tell them apart, conversations, ends."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mlxlora_core.errors import DataError, ModelError
from mlxlora_core.model.tokenizers import CheckedTokenizer
from mlxlora_core.values import Piece

#: what tokenizers cut in different places
TEXTS = (
    "Hello, world!",
    "  two spaces,   three, and a tab\tin it ",
    "1234567890 and 12 345.67, 3rd of 2024-05-06",
    "one line\nanother\n\n  indented\r\nWindows\n",
    "don't you'll WE'VE I'm o'clock",
    "def f(x):\n    return x ** 2  # a comment\n",
    "naïve café, Straße, русский, 日本語, العربية, हिन्दी",
    "\U0001f600 \U0001f468\u200d\U0001f469\u200d\U0001f467 e\u0301 \ufeff\u00a0",
    "<s> </s> [INST] <|im_end|> <|eot_id|> <|endoftext|> <unk> <pad>",
    "http://example.org/a_b?c=d&e=%20#f",
    "",
)
_SPECIALS = 32  # texts of special tokens that are tried, at most

_CONVERSATIONS: tuple[tuple[Mapping[str, Any], ...], ...] = (
    ({"role": "user", "content": "Who are you?"},),
    (
        {"role": "user", "content": "Name a colour."},
        {"role": "assistant", "content": "Red."},
        {"role": "user", "content": "Another  one?"},
        {"role": "assistant", "content": "Blue.\nOr green."},
    ),
    (
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Say hello."},
        {"role": "assistant", "content": "Hello!"},
    ),
)


def require_same_tokens(here: CheckedTokenizer, there: CheckedTokenizer, *, more_ends: bool) -> None:
    """Refuse a tokenizer that does not do what another one does.

    Args:
        here: that of the model.
        there: that of its export; it may have more ids, which stand for nothing.
        more_ends: whether it may have more ends that are no text.

    Raises:
        ModelError: with what differs.
    """
    if here.bos != there.bos:
        raise ModelError(f"texts begin with {_shown(there.bos)}, wanted {_shown(here.bos)}")
    more = there.stops - here.stops
    allowed = more_ends and not any(here.decode([token]) for token in more)
    if not here.stops <= there.stops or (more and not allowed):
        raise ModelError(f"texts end with {sorted(there.stops)}, wanted {sorted(here.stops)}")
    for text in (*TEXTS, *(f"a {special} b" for special in sorted(here.special_texts)[:_SPECIALS])):
        wanted, found = here.encode(text), there.encode(text)
        if wanted != found:
            place = next(
                (i for i, pair in enumerate(zip(wanted, found, strict=False)) if pair[0] != pair[1]), 0
            )
            ids = f"{found[place : place + 4]}, wanted {wanted[place : place + 4]}"
            raise ModelError(f"its tokenizer has other ids for {text[:40]!r}: from token {place} {ids}")
    for messages in _CONVERSATIONS:
        if _rendered(here, messages) != _rendered(there, messages):
            what = f"a conversation of {len(messages)} messages has other ids"
            raise ModelError(f"{what}: its chat template is another, or there is none")


def _rendered(
    tokenizer: CheckedTokenizer, messages: Sequence[Mapping[str, Any]]
) -> tuple[tuple[tuple[int, ...], bool], ...] | None:
    """The ids of a conversation, and which the assistant says; None where this form has none for it."""
    try:
        pieces: list[Piece] = tokenizer.render(messages)
    except DataError:
        return None
    return tuple((piece.ids, piece.answer) for piece in pieces if piece.ids)


def _shown(bos: int | None) -> str:
    return "no id" if bos is None else str(bos)
