"""Answers that are JSON: which tokens may come."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from mlxlora_core.model.tokenizers import CheckedTokenizer
from mlxlora_core.server.json_grammar import Grammar, Quoted, State, Way
from mlxlora_core.serving.request import Change

_NEVER = np.iinfo(np.int32).max
_KEPT = 64  # states of which it is known which tokens may come
_IDS = ""  # what the ids of a node's tokens stand under

_Node = dict[str, Any]  # letter -> node


class JsonTokens:
    """What each token of a vocabulary adds to a text.

    Args:
        tokenizer: whose tokens they are.

    Attributes:
        texts: of each id; nothing for what is no text.
        stops: ids that end a text.
        plain: (V,) whether a token is letters and nothing else between quotes.
        all: the tokens by their letters.
        not_plain: those that are not plain.
    """

    def __init__(self, tokenizer: CheckedTokenizer) -> None:
        found = ("".join(tokenizer.stream([token])) for token in range(tokenizer.vocab_size))
        none = tokenizer.special_texts
        self.texts = [
            "" if token in tokenizer.specials or text in none else text for token, text in enumerate(found)
        ]
        self.stops = sorted(tokenizer.stops)
        self.plain = np.array([_is_plain(text) for text in self.texts])
        self.all = _tree(enumerate(self.texts))
        self.not_plain = _tree(
            (token, text) for token, text in enumerate(self.texts) if not self.plain[token]
        )

    def lacks(self, letters: str) -> str:
        """Of some letters, those that are no token by themselves."""
        found = set(self.texts)
        return "".join(sorted(letter for letter in set(letters) if letter not in found))


class JsonAnswers:
    """Texts of a grammar, token by token.

    A token may come where the text can still be ended by as many tokens of one letter as are left:
    whatever a model would say, what it says is whole.

    Args:
        tokens: of the model.
        grammar: whose texts they are.
        way: which of them.
    """

    def __init__(self, tokens: JsonTokens, grammar: Grammar, way: Way) -> None:
        self._tokens, self._grammar = tokens, grammar
        self.begin = grammar.begin(way)
        self._costs: OrderedDict[State, np.ndarray] = OrderedDict()

    def change(self) -> Change:
        """A change that leaves the tokens of one text."""
        state, read = self.begin, 0

        def change(logits: mx.array, drawn: Sequence[int], left: int) -> mx.array:
            nonlocal state, read
            for token in drawn[read:]:
                state = self.after(state, token)
            read = len(drawn)
            return mx.where(mx.array(self.allowed(state, left)), logits, -mx.inf)

        return change

    def after(self, state: State, token: int) -> State:
        """The state after one more token that might come."""
        for letter in self._tokens.texts[token]:
            state = self._grammar.step(state, letter)
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
        costs = np.full(len(self._tokens.texts), _NEVER, np.int32)
        if () in state:
            costs[self._tokens.stops] = 0
        between = frozenset(way for way in state if way and way[0] == Quoted())
        if between:
            costs[self._tokens.plain] = self._grammar.least(between) + 1
            self._walk(self._tokens.not_plain, between, costs)
        self._walk(self._tokens.all, state - between, costs)
        return costs

    def _walk(self, tree: _Node, state: State, costs: np.ndarray) -> None:
        """Lower the costs of the tokens of a tree to what they are after a state."""
        left: list[tuple[_Node, State]] = [(tree, state)]
        while left:
            node, here = left.pop()
            for letter, following in node.items():
                if letter == _IDS:
                    costs[following] = np.minimum(costs[following], self._grammar.least(here) + 1)
                elif there := self._grammar.step(here, letter):
                    left.append((following, there))


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
