"""A tokenizer whose ids are bytes, without a begin id and with two end ids: of a turn and of a text."""

import codecs
import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mlxlora_core.api import DataError, ModelError, NoOptions, Piece, TokenizerLoader, hookimpl
from mlxlora_core.files import read_json

NAME = "bytes.json"


class ByteTokenizer:
    """One id a byte; ``path`` says which ids end a turn and a text."""

    bos = None

    def __init__(self, path: Path) -> None:
        said = read_json(path, 1 << 16)
        ends = [said.get(key) for key in ("end_of_turn", "end_of_text")] if isinstance(said, dict) else []
        if sorted(map(str, ends)) != ["256", "257"]:
            raise ModelError("end_of_turn and end_of_text are not 256 and 257", where=path)
        self.vocab_size = 258
        self.turn, self.text = ends
        self.stops = frozenset(ends)
        self.fingerprint = hashlib.sha256(path.read_bytes()).hexdigest()

    def encode(self, text: str, *, bos: bool = True, eos: bool = False) -> list[int]:
        """The bytes of a text, and the end id of a text if asked."""
        try:
            return [*text.encode(), *([self.text] if eos else [])]
        except UnicodeEncodeError:
            raise DataError("the text has half a surrogate pair") from None

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids; those of no byte have none."""
        return bytes(i for i in ids if i < 256).decode("utf-8", "replace")

    def stream(self, ids: Iterable[int], every: int = 1) -> Iterator[str]:
        """Segments of the text, each of whole characters."""
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        held = ""
        for count, i in enumerate(ids, 1):
            held += decoder.decode(bytes([i]) if i < 256 else b"")
            if held and count % every == 0:
                yield held
                held = ""
        held += decoder.decode(b"", final=True)
        if held:
            yield held

    def render(self, messages: Sequence[Mapping[str, Any]]) -> list[Piece]:
        """``? question`` and ``! answer``, a system message in front as ``# system``."""
        talk = list(messages)
        pieces = []
        if talk and talk[0]["role"] == "system":
            pieces.append(Piece((*self.encode("# " + talk.pop(0)["content"] + "\n"),), False))
        if not talk or any(m["role"] != ("user", "assistant")[i % 2] for i, m in enumerate(talk)):
            raise DataError("user and assistant do not take turns, the user first")
        for message in talk:
            if message["role"] == "user":
                pieces.append(Piece((*self.encode("? " + message["content"] + "\n! "),), False))
            else:
                pieces.append(Piece((*self.encode(message["content"]), self.turn), True))
        return pieces


def open_files(files: Mapping[str, Path], options: NoOptions) -> ByteTokenizer:
    """The tokenizer of ``bytes.json``."""
    return ByteTokenizer(files[NAME])


@hookimpl
def mlxlora_tokenizers() -> Iterable[TokenizerLoader]:
    """The tokenizer."""
    summary = "one id a byte, and nothing in front of a text"
    return [
        TokenizerLoader(name="bytes", summary=summary, detect=lambda files: NAME in files, open=open_files)
    ]
