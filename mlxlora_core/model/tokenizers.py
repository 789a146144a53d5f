"""The tokenizer of a model: which plugin opens its files, and what that plugin gives, checked."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from mlxlora_core.errors import ModelError, listing
from mlxlora_core.files.input_file import is_plain_name
from mlxlora_core.plugins import Component, Registry
from mlxlora_core.values import Piece, TokenizerFiles

FILES = "tokenizer_files"  # the key of config.json that names them
DEFAULT_FILES = ("tokenizer.model",)  # of a model folder that names none

_RANKS = re.compile(rb"[A-Za-z0-9+/]+=* [0-9]+\r?\n")


class CheckedTokenizer:
    """What a plugin has opened; whatever it gives is held against the contract.

    See :class:`mlxlora_core.values.Tokenizer` for the members.

    Attributes:
        component: who opened it.
        files: what it was opened from.

    Raises:
        PluginError: an attribute is not what the contract says.
    """

    def __init__(self, component: Component, files: TokenizerFiles, opened: Any) -> None:
        self.component, self.files, self._opened = component, dict(files), opened
        self.vocab_size: int = self._take("vocab_size", "a whole number above 0", _is_size)
        self.bos: int | None = self._take("bos", "an id or None", lambda v: v is None or self._is_id(v))
        self.stops: frozenset[int] = self._take("stops", "a frozenset of ids", self._are_stops)
        self.fingerprint: str = self._take("fingerprint", "a text", lambda v: isinstance(v, str) and v != "")
        self.chat_form: str = self._take("chat_form", "a text", lambda v: isinstance(v, str), "")
        self.chat_warning: str = self._take("chat_warning", "a text", lambda v: isinstance(v, str), "")
        self.special_texts: frozenset[str] = self._take(
            "special_texts", "a frozenset of texts", _are_texts, frozenset()
        )

    @property
    def specials(self) -> frozenset[int]:
        """The ids that begin or end a text and are no text themselves."""
        return self.stops if self.bos is None else self.stops | {self.bos}

    def encode(self, text: str, *, bos: bool = True, eos: bool = False) -> list[int]:
        """As :meth:`mlxlora_core.values.Tokenizer.encode`."""
        ids = self._opened.encode(text, bos=bos, eos=eos)
        if not isinstance(ids, list) or not all(map(self._is_id, ids)):
            self._refuse("encode", ids, f"a list of ids below {self.vocab_size}")
        if bos and self.bos is not None and ids[:1] != [self.bos]:
            self._refuse("encode", ids[:1], f"the begin id {self.bos} in front")
        if eos and not self.stops & set(ids[-1:]):
            self._refuse("encode", ids[-1:], f"one of the end ids {sorted(self.stops)} behind")
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """As :meth:`mlxlora_core.values.Tokenizer.decode`."""
        return self.component.checked("decode", self._opened.decode(ids), str)

    def stream(self, ids: Iterable[int], every: int = 1) -> Iterator[str]:
        """As :meth:`mlxlora_core.values.Tokenizer.stream`."""
        for segment in self._opened.stream(ids, every):
            yield self.component.checked("stream", segment, str)

    def render(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] = ()) -> list[Piece]:
        """As :meth:`mlxlora_core.values.Tokenizer.render`."""
        pieces = self._opened.render(messages, tools) if tools else self._opened.render(messages)
        if not isinstance(pieces, Sequence) or not pieces:
            self._refuse("render", pieces, "a sequence of pieces")
        for piece in pieces:
            self.component.checked("render", piece, Piece)
            if not isinstance(piece.ids, tuple) or not all(map(self._is_id, piece.ids)):
                self._refuse("render", piece.ids, f"a tuple of ids below {self.vocab_size}")
            if not isinstance(piece.answer, bool):
                self._refuse("render", piece.answer, "answer true or false")
        return list(pieces)

    def _take(self, name: str, wanted: str, good: Any, default: Any = None) -> Any:
        """An attribute of what was opened; ``default`` where it has none."""
        value = getattr(self._opened, name, default)
        if not good(value):
            self._refuse(name, value, wanted)
        return value

    def _is_id(self, value: Any) -> bool:
        return type(value) is int and 0 <= value < self.vocab_size

    def _are_stops(self, value: Any) -> bool:
        return isinstance(value, frozenset) and bool(value) and all(map(self._is_id, value))

    def _refuse(self, function: str, got: Any, wanted: str) -> NoReturn:
        text = repr(got)
        raise self.component.breach(function, text if len(text) <= 60 else text[:60] + "...", wanted)


def open_tokenizer(files: TokenizerFiles, registry: Registry, where: Path) -> CheckedTokenizer:
    """The tokenizer in files named as a checkpoint names them.

    Args:
        files: plain name -> path, or contents.
        registry: where tokenizers are looked up.
        where: the folder or file that they belong to, for messages.

    Raises:
        ModelError: a file is absent or damaged, or no plugin opens them, or several do.
        PluginError: what the plugin gives breaks the contract.
    """
    absent = [name for name, file in files.items() if isinstance(file, Path) and not file.exists()]
    if absent:
        raise ModelError(f"there is no tokenizer: it lacks {listing(absent)}", where=where)
    known = registry.of("tokenizer")
    found = [component for component in known if component.spec.detect(files)]
    if len(found) == 1:
        return CheckedTokenizer(found[0], files, found[0].spec.open(files, found[0].spec.options()))
    if found:
        ids = [component.id for component in found]
        raise ModelError(
            f"{listing(ids)} can open {listing(files)}",
            where=where,
            fix=f"leave one of the plugins out, such as -P no:{found[-1].plugin.name}",
        )
    failed = "".join(f"; plugin {p} failed to load: {p.reason}" for p in registry.failed)
    raise ModelError(
        f"no tokenizer opens {listing(map(_shown, files.items()))}; "
        f"there is {listing(c.spec.name for c in known)}{failed}",
        where=where,
        fix="install a plugin that opens it",
    )


def tokenizer_files(folder: Path, config: Mapping[str, Any]) -> dict[str, Path]:
    """The tokenizer's files of a model folder by name, whether they are there or not.

    Raises:
        ModelError: config.json names them in another way than by plain names.
    """
    names = config.get(FILES, DEFAULT_FILES)
    if not isinstance(names, (list, tuple)) or not names or not all(map(is_plain_name, names)):
        raise ModelError(f"{FILES} is {names!r}, wanted a list of file names", where=folder / "config.json")
    return {name: folder / name for name in names}


def check_vocabulary(tokenizer: CheckedTokenizer, vocab_size: int, where: Path) -> None:
    """Refuse a model that has no embedding for some of the tokenizer's ids; more of them are padding.

    Raises:
        ModelError: with both sizes.
    """
    if tokenizer.vocab_size > vocab_size:
        raise ModelError(
            f"the tokenizer has {tokenizer.vocab_size} pieces, the model a vocabulary of {vocab_size}",
            where=where,
            fix="use the tokenizer that the model was trained with",
        )


def _are_texts(value: Any) -> bool:
    return isinstance(value, frozenset) and all(isinstance(text, str) and text for text in value)


def _is_size(value: Any) -> bool:
    return type(value) is int and value > 0


def _shown(file: tuple[str, Path | bytes]) -> str:
    """The name of a file that nobody opens, and its format where that is one that many have."""
    name, source = file
    if isinstance(source, bytes) or not source.is_file():
        return name
    with source.open("rb") as opened:
        ranks = _RANKS.match(opened.read(4096))
    return f"{name} (a tiktoken vocabulary, as Llama 3 has it)" if ranks else name
