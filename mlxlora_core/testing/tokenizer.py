"""The conformance suite of tokenizers.

Subclass :class:`TokenizerSuite` in a test file and run it with pytest::

    class TestMyTokenizer(TokenizerSuite):
        spec = my_plugin.TOKENIZER

        def write(self, folder): ...
        def reference(self, messages): ...
"""

from __future__ import annotations

import copy
import random
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from mlxlora_core.errors import DataError, MlxloraError
from mlxlora_core.files.input_file import is_plain_name
from mlxlora_core.model.tokenizers import CheckedTokenizer
from mlxlora_core.plugins import Component, Plugin
from mlxlora_core.specs import TokenizerLoader
from mlxlora_core.values import Piece

Messages = Sequence[Mapping[str, Any]]

TEXTS = (
    "The quick brown fox.",
    " a space in front",
    "two  spaces,   and more ",
    "tab\tline\nreturn\r\n\n",
    "naïve café",
    "日本語 한국어 العربية",
    "😀 👩‍👩‍👧 🇫🇷",
    "e\u0301 \u00a0 \u2028 \ufeff",
    "a\0b",
    "0123456789 3.14 1e-5",
    "def f(x):\n    return x ** 2\n",
    "x" * 300,
    " ",
    "\n",
)
#: how models write what begins and ends a text
SPECIAL_TEXTS = (
    *("<s>", "</s>", "<bos>", "<eos>", "<pad>", "<unk>", "<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    *("<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>", "<start_of_turn>", "<end_of_turn>", "[INST]"),
)


def said(*contents: str, system: str = "") -> list[dict[str, str]]:
    """A conversation in which user and assistant take turns, the user first."""
    first = [{"role": "system", "content": system}] if system else []
    roles = ("user", "assistant")
    return first + [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]


CONVERSATIONS = (
    said("What scales the weights?", "A layer."),
    said("One?", "Two.", "Three?", "Four."),
    said("Who?", "Me.", system="Be brief."),
    said("naïve 日本語 😀?", "é 😀!"),
    said("<s>odd</s> <|im_end|> [/INST]", "</s><|im_end|>"),
    said("a", "b", "c", "d", "e", "f"),
)


class TokenizerSuite:
    """What every tokenizer must do.

    Attributes:
        spec: the tokenizer.
        texts: what must come back as it was; leave out what the tokenizer normalises.
        special_texts: what must stay text, though it is spelt as a special token.
        conversations: what can be rendered; each ends with an answer.
        refused: conversations that this form cannot say.
    """

    spec: TokenizerLoader
    texts: Sequence[str] = TEXTS
    special_texts: Sequence[str] = SPECIAL_TEXTS
    conversations: Sequence[Messages] = CONVERSATIONS
    refused: Sequence[Messages] = ()

    def write(self, folder: Path) -> Mapping[str, Path]:
        """Write the files of a small tokenizer into ``folder``: plain name -> path."""
        raise NotImplementedError

    def write_other(self, folder: Path) -> Mapping[str, Path]:
        """As ``write``, but of a tokenizer by which some text, or the end of one, has other ids."""
        pytest.skip("the suite has no second tokenizer")

    def damage(self) -> Mapping[str, Callable[[Path], object]]:
        """Name -> a function that damages the files in a folder so that they must be refused."""
        return {}

    def reference(self, messages: Messages) -> list[int]:
        """The ids of a conversation by an implementation that is independent of the tokenizer."""
        raise NotImplementedError

    # --- what the tests are made of ---

    def open(self, folder: Path) -> CheckedTokenizer:
        """The tokenizer that :meth:`write` writes, held against the contract as core does."""
        return self.opened(self.write(folder))

    def opened(self, files: Mapping[str, Path]) -> CheckedTokenizer:
        """The tokenizer in those files."""
        component = Component("tokenizer", self.spec, Plugin("suite", "", "", "file", ""))
        return CheckedTokenizer(component, files, self.spec.open(files, self.spec.options()))

    def talks(self) -> list[Messages]:
        """The conversations, anew each time: what a tokenizer changes in them is seen by one test alone."""
        return copy.deepcopy(list(self.conversations))

    # --- files ---

    def test_knows_its_files_alone(self, tmp_path: Path) -> None:
        """``detect`` says yes to its own files and no, without an error, to others."""
        files = self.write(tmp_path)
        assert files and all(map(is_plain_name, files))
        assert self.spec.detect(files) is True
        (tmp_path / "other").write_text("something else")
        assert self.spec.detect({}) is False
        for name in ("other", "other.json", "other.txt", "other.model"):
            assert self.spec.detect({name: tmp_path / "other"}) is False, name
        assert isinstance(self.spec.detect(dict.fromkeys(files, tmp_path / "absent")), bool)

    def test_damage_is_an_error(self, tmp_path: Path) -> None:
        """Each kind of damage is one line with the place."""
        for number, (name, spoil) in enumerate(self.damage().items()):
            folder = tmp_path / str(number)
            folder.mkdir()
            files = self.write(folder)
            spoil(folder)
            with pytest.raises(MlxloraError) as caught:
                self.opened(files)
            assert str(folder) in caught.value.where, f"{name}: the error does not say where"

    def test_the_fingerprint_is_that_of_the_contents(self, tmp_path: Path) -> None:
        """The same files have the same fingerprint wherever they lie, opened once or twice."""
        (tmp_path / "a").mkdir()
        files = self.write(tmp_path / "a")
        shutil.copytree(tmp_path / "a", tmp_path / "b")
        moved = {name: tmp_path / "b" / path.relative_to(tmp_path / "a") for name, path in files.items()}
        assert self.opened(files).fingerprint == self.opened(files).fingerprint
        assert self.opened(moved).fingerprint == self.opened(files).fingerprint

    def test_another_tokenizer_has_another_fingerprint(self, tmp_path: Path) -> None:
        """By it mlxlora knows whether a text has the same ids."""
        (tmp_path / "a").mkdir()
        (tmp_path / "b").mkdir()
        other = self.opened(self.write_other(tmp_path / "b"))
        assert self.open(tmp_path / "a").fingerprint != other.fingerprint

    # --- text to ids and back ---

    def test_a_text_comes_back_as_it_was(self, tmp_path: Path) -> None:
        """Encoded and decoded, a text is itself; begin and end ids are no text."""
        tokenizer = self.open(tmp_path)
        for text in self.texts:
            assert tokenizer.decode(tokenizer.encode(text)) == text
            assert tokenizer.decode(tokenizer.encode(text, eos=True)) == text
        for special in tokenizer.specials:
            assert tokenizer.decode([special]) == ""

    def test_begin_and_end_ids_are_put_where_asked(self, tmp_path: Path) -> None:
        """In front and behind, and nowhere else; the ids between depend on the text alone."""
        tokenizer = self.open(tmp_path)
        begin = [] if tokenizer.bos is None else [tokenizer.bos]
        for text in (*self.texts, ""):
            bare = tokenizer.encode(text, bos=False)
            assert not tokenizer.specials & set(bare)
            assert tokenizer.encode(text) == begin + bare
            *front, last = tokenizer.encode(text, eos=True)
            assert front == begin + bare
            assert last in tokenizer.stops

    def test_what_looks_like_a_special_token_is_text(self, tmp_path: Path) -> None:
        """No text makes a begin or end id: rows could else end where they like."""
        tokenizer = self.open(tmp_path)
        for special in self.special_texts:
            for text in (special, f"a{special}b", f"a {special} b"):
                assert not tokenizer.specials & set(tokenizer.encode(text, bos=False)), text

    def test_ids_beyond_the_vocabulary_are_no_text(self, tmp_path: Path) -> None:
        """A model whose vocabulary is padded may draw one."""
        tokenizer = self.open(tmp_path)
        beyond = [tokenizer.vocab_size, tokenizer.vocab_size + 100]
        ids = tokenizer.encode(self.texts[0], bos=False)
        assert tokenizer.decode([*ids, *beyond]) == tokenizer.decode(ids)
        assert "".join(tokenizer.stream([*beyond, *ids])) == tokenizer.decode(ids)

    def test_half_a_surrogate_pair_is_refused(self, tmp_path: Path) -> None:
        """It is no text, wherever it stands."""
        tokenizer = self.open(tmp_path)
        for text in ("\ud800", "ab\udfffc"):
            with pytest.raises(DataError):
                tokenizer.encode(text)
            with pytest.raises(DataError):
                tokenizer.render(said(text, "x"))

    # --- streaming ---

    def test_segments_joined_are_the_text(self, tmp_path: Path) -> None:
        """Behind any ids, in segments of any length: none empty, no character in parts."""
        tokenizer = self.open(tmp_path)
        for text in self.texts:
            ids = tokenizer.encode(text, bos=False)
            whole = tokenizer.decode(ids)
            for every in (1, 2, 3, 7, 1000):
                segments = list(tokenizer.stream(iter(ids), every))
                assert "".join(segments) == whole
                assert all(segments)
                assert not any("\ufffd" in segment for segment in segments)
            for cut in range(1, len(ids)):
                front = tokenizer.decode(ids[:cut])
                if whole.startswith(front):  # else the cut goes through a character
                    assert front + "".join(tokenizer.stream(ids[cut:])) == whole, (text, cut)
        assert list(tokenizer.stream([])) == []

    def test_any_ids_stream_as_they_decode(self, tmp_path: Path) -> None:
        """Also those that no text has."""
        tokenizer = self.open(tmp_path)
        draw = random.Random(0)
        for _ in range(200):
            ids = [draw.randrange(tokenizer.vocab_size) for _ in range(draw.randrange(20))]
            if tokenizer.bos not in ids[:1]:
                assert "".join(tokenizer.stream(ids)) == tokenizer.decode(ids), ids

    # --- conversations ---

    def test_answers_are_what_the_assistant_says(self, tmp_path: Path) -> None:
        """One answer piece a turn, its text and an end id; nothing of the others is in it."""
        tokenizer = self.open(tmp_path)
        for messages in self.talks():
            pieces = tokenizer.render(messages)
            answers = [piece for piece in pieces if piece.answer]
            want = [message["content"] for message in messages if message["role"] == "assistant"]
            assert [tokenizer.decode(piece.ids).strip() for piece in answers] == [w.strip() for w in want]
            assert all(piece.ids[-1] in tokenizer.stops for piece in answers)
            assert all(not tokenizer.specials & set(piece.ids[:-1]) for piece in answers)

    def test_pieces_joined_are_the_conversation(self, tmp_path: Path) -> None:
        """Their ids in a row are those of the form's reference."""
        tokenizer = self.open(tmp_path)
        for messages in self.talks():
            try:
                want = self.reference(messages)
            except NotImplementedError:
                pytest.skip("the suite gives no reference")
            assert _joined(tokenizer.render(messages)) == want

    def test_generation_is_told_what_training_was(self, tmp_path: Path) -> None:
        """Without its last answer a conversation ends where that answer begins, and is the same before."""
        tokenizer = self.open(tmp_path)
        for messages in self.talks():
            asked = tokenizer.render(messages[:-1])
            assert not asked[-1].answer
            *before, answer = tokenizer.render(messages)
            assert answer.answer
            assert _joined(asked) == _joined(before)
            assert [p.answer for p in asked if p.ids] == [p.answer for p in before if p.ids]

    def test_messages_are_left_as_they_are(self, tmp_path: Path) -> None:
        """It changes nothing of a conversation, which is a row of somebody's."""
        tokenizer = self.open(tmp_path)
        for messages in self.talks():
            given = copy.deepcopy(list(messages))
            tokenizer.render(given)
            assert given == list(messages)

    def test_conversations_without_a_form_are_refused(self, tmp_path: Path) -> None:
        """What the form cannot say is an error of the data; so is no message at all."""
        tokenizer = self.open(tmp_path)
        for messages in ([], *self.refused):
            with pytest.raises(DataError):
                tokenizer.render(messages)


def _joined(pieces: Sequence[Piece]) -> list[int]:
    return [token for piece in pieces for token in piece.ids]
