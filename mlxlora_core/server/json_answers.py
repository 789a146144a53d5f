"""Answers that are JSON: which tokens may come."""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from mlxlora_core.model.tokenizers import CheckedTokenizer
from mlxlora_core.server.json_grammar import OTHER, Grammar, State, Way
from mlxlora_core.serving.request import Change

_NEVER = np.iinfo(np.int32).max
_KEPT = 64  # states of which it is known which tokens may come
_IDS = ""  # what the ids of a node's tokens stand under
_OTHERS = re.compile(f"[^\0-{OTHER}]")
_PLAIN = re.compile(r'[^"\\\0-\x1f]*')  # what a text between quotes may have as it is

_Node = dict[str, Any]  # letter -> node


class JsonTokens:
    """What each token of a vocabulary adds to a text.

    Args:
        tokenizer: whose tokens they are.

    Attributes:
        texts: of each id; nothing for what is no text.
        stops: ids that end a text.
        plain: ids of tokens that are letters and nothing else between quotes.
        all: the tokens by their letters.
        closing: those that are not plain by their letters from the first that is not: those before it
            change nothing between quotes.
    """

    def __init__(self, tokenizer: CheckedTokenizer) -> None:
        found = ("".join(tokenizer.stream([token])) for token in range(tokenizer.vocab_size))
        none = tokenizer.special_texts
        self.texts = [
            "" if token in tokenizer.specials or text in none else text for token, text in enumerate(found)
        ]
        self.stops = sorted(tokenizer.stops)
        starts = [_PLAIN.match(text).end() for text in self.texts]  # type: ignore[union-attr]  # it may be empty
        known = [token for token, text in enumerate(self.texts) if text]
        closing = [token for token in known if starts[token] < len(self.texts[token])]
        self.plain = np.array(sorted(set(known).difference(closing)), np.int64)
        self.all = _tree((token, self.texts[token]) for token in known)
        self.closing = _tree((token, self.texts[token][starts[token] :]) for token in closing)

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
        if state.may_end:
            costs[self._tokens.stops] = 0
        between, others = self._grammar.halves(state)
        if between:
            costs[self._tokens.plain] = between.least + 1
            self._walk(self._tokens.closing, between, costs)
        self._walk(self._tokens.all, others, costs)
        return costs

    def _walk(self, tree: _Node, state: State, costs: np.ndarray) -> None:
        """Lower the costs of the tokens of a tree to what they are after a state."""
        found = list(self._reached(tree, state))
        if found:
            tokens = np.concatenate([ids for ids, _ in found])
            values = np.repeat([cost for _, cost in found], [len(ids) for ids, _ in found])
            costs[tokens] = np.minimum(costs[tokens], values)

    def _reached(self, tree: _Node, state: State) -> Iterator[tuple[np.ndarray, int]]:
        """Ids of tokens that may come, and how many tokens each needs behind it."""
        left: list[tuple[_Node, State]] = [(tree, state)]
        while left:
            node, here = left.pop()
            for letter, following in node.items():
                if letter == _IDS:
                    yield following, here.least + 1
                elif there := self._grammar.step(here, letter):
                    left.append((following, there))


def _tree(texts: Iterable[tuple[int, str]]) -> _Node:
    """Tokens by their letters, of which all from the last of ASCII on are one."""
    found: dict[str, list[int]] = {}
    for token, text in texts:
        found.setdefault(_OTHERS.sub(OTHER, text), []).append(token)
    root: _Node = {}
    for text, ids in found.items():
        node = root
        for letter in text:
            node = node.setdefault(letter, {})
        node[_IDS] = np.array(ids)
    return root
