"""Answers that are a JSON object: which tokens may come."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from mlxlora_core.model.tokenizers import CheckedTokenizer
from mlxlora_core.server.json_text import BEGIN, DONE, IN_KEY, IN_TEXT, State, ending, step
from mlxlora_core.serving.request import Change

_NEVER = np.iinfo(np.int16).max
_KEPT = 64  # places in a text of which it is known which tokens may come
_NEEDED = '{}[]":0\\rualsenl'  # letters that end a text of any kind
_IDS = ""  # the key of a node that the ids of its tokens stand under

_Node = dict[str, Any]  # letter -> node


class JsonTokens:
    """What each token of a vocabulary adds to a text.

    A token may come where the text can still be ended by as many tokens of one letter as are left:
    whatever a model would say, what it says is whole.

    Args:
        tokenizer: whose tokens they are.
    """

    def __init__(self, tokenizer: CheckedTokenizer) -> None:
        left_out = tokenizer.specials
        self._texts = [
            "" if token in left_out else "".join(tokenizer.stream([token]))
            for token in range(tokenizer.vocab_size)
        ]
        self._texts = ["" if text in tokenizer.special_texts else text for text in self._texts]
        self._plain = np.array([_is_plain(text) for text in self._texts])
        self._all = _tree(enumerate(self._texts))
        self._not_plain = _tree((n, text) for n, text in enumerate(self._texts) if not self._plain[n])
        self._stops = sorted(tokenizer.stops)
        self._costs: OrderedDict[State, np.ndarray] = OrderedDict()

    @property
    def lacks(self) -> str:
        """Letters that a text may need to end, and that no token is."""
        found = set(self._texts)
        return "".join(letter for letter in _NEEDED if letter not in found)

    def after(self, state: State, token: int) -> State:
        """The state after one more token that might come."""
        if token in self._stops:
            return state
        for letter in self._texts[token]:
            following = step(state, letter)
            assert following is not None, "it could not come"
            state = following
        return state

    def allowed(self, state: State, left: int) -> np.ndarray:
        """Which tokens (V,) may come, if so many are left, this one among them."""
        costs = self._costs.get(state)
        if costs is None:
            costs = self._costs[state] = self._computed(state)
            if len(self._costs) > _KEPT:
                self._costs.popitem(last=False)
        self._costs.move_to_end(state)
        return costs <= max(left - 1, int(costs.min()))

    def _computed(self, state: State) -> np.ndarray:
        """How many tokens (V,) each needs behind it, an end token among them."""
        costs = np.full(len(self._texts), _NEVER, np.int16)
        if state.place == DONE:
            costs[self._stops] = 0
            return costs
        tree = self._all
        if state.place in (IN_KEY, IN_TEXT) and not state.rest:
            costs[self._plain] = len(ending(state)) + 1
            tree = self._not_plain
        left: list[tuple[_Node, State]] = [(tree, state)]
        while left:
            node, here = left.pop()
            for letter, following in node.items():
                if letter == _IDS:
                    costs[following] = len(ending(here)) + 1
                elif (there := step(here, letter)) is not None:
                    left.append((following, there))
        return costs


def as_json(tokens: JsonTokens) -> Change:
    """A change, for one text, that leaves the tokens of a JSON object.

    Args:
        tokens: of the model.
    """
    state, read = BEGIN, 0

    def change(logits: mx.array, drawn: Sequence[int], left: int) -> mx.array:
        nonlocal state, read
        for token in drawn[read:]:
            state = tokens.after(state, token)
        read = len(drawn)
        return mx.where(mx.array(tokens.allowed(state, left)), logits, -mx.inf)

    return change


def _is_plain(text: str) -> bool:
    """Whether a token is letters and nothing else between quotes."""
    return bool(text) and '"' not in text and "\\" not in text and min(text) >= " "


def _tree(texts: Iterator[tuple[int, str]] | enumerate[str]) -> _Node:
    """Tokens by their letters."""
    root: _Node = {}
    for token, text in texts:
        if text:
            node = root
            for letter in text:
                node = node.setdefault(letter, {})
            node.setdefault(_IDS, []).append(token)
    return root
