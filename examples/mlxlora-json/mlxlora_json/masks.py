"""Which tokens of a vocabulary may come."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Iterable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, cast

import mlx.core as mx
import numpy as np

from mlxlora_core.api import Tokenizer, Transform, UsageError
from mlxlora_json.grammar import Grammar, State

if TYPE_CHECKING:
    from mlxlora_json import JsonOptions

_NEVER = np.iinfo(np.int32).max
_KEPT = 256  # states of which it is known what each token costs
_IDS = ""  # what the ids of a node's tokens stand under
#: letters of the shortest texts, of which each has to be a token of its own
_NEEDED = '{}[]":,0truefalsn'

_Node = dict[str, Any]  # letter -> node


class Vocabulary:
    """What each token adds to a text.

    Args:
        tokenizer: whose tokens they are.

    Attributes:
        texts: of each id; nothing for one that never comes: it begins or ends a text, or is no whole letter.
        stops: ids that end a text.
        plain: (V,) whether a token may stand between quotes as it is, and ends nothing there.
        tree: all tokens by their letters.
        other: those that are not plain.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        special: frozenset[str] = getattr(tokenizer, "special_texts", frozenset())
        silent = tokenizer.stops | {tokenizer.bos}
        found = ("".join(tokenizer.stream([token])) for token in range(tokenizer.vocab_size))
        self.texts = [
            "" if token in silent or text in special or "\ufffd" in text else text
            for token, text in enumerate(found)
        ]
        self.stops = sorted(tokenizer.stops)
        self.plain = np.array([_is_plain(text) for text in self.texts])
        self.tree = _tree(enumerate(self.texts))
        self.other = _tree((i, text) for i, text in enumerate(self.texts) if not self.plain[i])


class Masks:
    """Which tokens go on with a text.

    A token may come where the text can still be ended by as many tokens of one
    letter as are left: whatever a model would say, what it says is whole.

    Args:
        options: of the sampler.
        tokenizer: of the model.

    Raises:
        UsageError: the vocabulary lacks a letter, or there are too few tokens for any text.
    """

    def __init__(self, options: JsonOptions, tokenizer: Tokenizer) -> None:
        self._words, self._within = _vocabulary(cast(Hashable, tokenizer)), options.within
        self._grammar = Grammar(options.form, options.typed(), options.depth)
        self.begin = self._grammar.begin
        self._costs: OrderedDict[State, np.ndarray] = OrderedDict()
        names = "".join(what for symbol, what in self.begin if symbol == "text")
        lacks = sorted({*_NEEDED, *names}.difference(self._words.texts))
        if lacks:
            raise UsageError(
                f"sampler json: the tokenizer has no token for {''.join(lacks)} alone",
                fix="use another model, or fields with other names",
            )
        least = self._grammar.least(self.begin) + 1
        if least > self._within:
            raise UsageError(
                f"sampler json: the shortest text takes {least} tokens, within is {self._within}",
                fix=f"set within={least} or more",
            )

    def after(self, state: State, token: int) -> State:
        """The state after a token that might come; nothing comes behind one that ends a text."""
        if token in self._words.stops:
            return ()
        for letter in self._words.texts[token]:
            state = self._grammar.step(state, letter) or ()
        return state

    def allowed(self, state: State, drawn: int) -> np.ndarray:
        """Which tokens (V,) may come behind so many."""
        costs = self._costs.get(state)
        if costs is None:
            costs = self._costs[state] = self._computed(state)
            if len(self._costs) > _KEPT:
                self._costs.popitem(last=False)
        self._costs.move_to_end(state)
        return costs <= max(self._within - drawn - 1, int(costs.min()))

    def _computed(self, state: State) -> np.ndarray:
        """How many tokens (V,) each needs behind it, the one that ends the text among them."""
        costs = np.full(len(self._words.texts), _NEVER, np.int32)
        if self._grammar.may_end(state):
            costs[self._words.stops] = 0
        quoted = state[:1] == (("string", ""),)
        if quoted:
            costs[self._words.plain] = self._grammar.least(state) + 1
        left = [(self._words.other if quoted else self._words.tree, state)]
        while left:
            node, here = left.pop()
            for letter, below in node.items():
                if letter == _IDS:
                    costs[below] = self._grammar.least(here) + 1
                elif (there := self._grammar.step(here, letter)) is not None:
                    left.append((below, there))
        return costs


def transform(options: JsonOptions, tokenizer: Tokenizer) -> Transform:
    """A transform for one text, which begins where it is first asked.

    Raises:
        UsageError: as :class:`Masks`.
    """
    masks = _masks(options, cast(Hashable, tokenizer))
    state, begin, read = masks.begin, -1, 0

    def change(logits: mx.array, tokens: Sequence[int]) -> mx.array:
        """Logits (B, V) with -inf for the tokens that may not come."""
        nonlocal state, begin, read
        if begin < 0:
            begin = read = len(tokens)
        for token in tokens[read:]:
            state = masks.after(state, token)
        read = len(tokens)
        return mx.where(mx.array(masks.allowed(state, read - begin)), logits, -mx.inf)

    return change


@lru_cache(maxsize=4)
def _masks(options: JsonOptions, tokenizer: Any) -> Masks:
    """They depend on these alone, and outlive a text."""
    return Masks(options, tokenizer)


@lru_cache(maxsize=2)
def _vocabulary(tokenizer: Any) -> Vocabulary:
    return Vocabulary(tokenizer)


def _is_plain(text: str) -> bool:
    return bool(text) and '"' not in text and "\\" not in text and min(text) >= " "


def _tree(texts: Iterable[tuple[int, str]]) -> _Node:
    """Tokens by their letters."""
    root: _Node = {}
    for token, text in texts:
        if text:
            node = root
            for letter in text:
                node = node.setdefault(letter, {})
            node.setdefault(_IDS, []).append(token)
    return root
