"""The conformance suite over every tokenizer that is registered, and over the one that the page shows."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import sentencepiece

from mlxlora_core import plugins as registry
from mlxlora_core.api import Piece
from mlxlora_core.errors import PluginError
from mlxlora_core.testing.tokenizer import Messages, TokenizerSuite, said

TOKENIZERS = {c.spec.name: c.spec for c in registry.load(environ={registry.ALLOW_LIST: ""}).of("tokenizer")}
PAGE = Path(__file__).parents[2] / "docs" / "kinds" / "tokenizers.md"


def documented() -> dict[str, Any]:
    """The module that the page shows."""
    names: dict[str, Any] = {"__name__": "byte_tokenizer"}
    code = next(c for c in PAGE.read_text().split("```python\n")[1:] if "class ByteTokenizer" in c)
    exec(code.split("```")[0], names)
    return names


SHOWN = documented()


class TestSentencePiece(TokenizerSuite):
    """Byte-pair encoding with byte fallback that keeps white space, as Llama 2 has it."""

    spec = TOKENIZERS["sentencepiece"]
    kind: Mapping[str, Any] = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
    refused = (
        [{"role": "assistant", "content": "x"}],
        [{"role": "system", "content": "x"}],
        said("a", "b") + said("c", system="late"),
        said("a") + said("b", "c"),
        [{"role": "tool", "content": "x"}],
    )

    @pytest.fixture(autouse=True)
    def _shared(self, tmp_path_factory: pytest.TempPathFactory) -> None:
        name = hashlib.sha256(repr(sorted(self.kind.items())).encode()).hexdigest()
        self.model = trained(tmp_path_factory.getbasetemp() / f"suite {name}", self.kind)

    def write(self, folder: Path) -> Mapping[str, Path]:
        (folder / "tokenizer.model").write_bytes(self.model)
        return {"tokenizer.model": folder / "tokenizer.model"}

    def damage(self) -> Mapping[str, Callable[[Path], object]]:
        def cut(folder: Path) -> None:
            path = folder / "tokenizer.model"
            os.truncate(path, path.stat().st_size // 2 + 1)

        return {
            "cut": cut,
            "empty": lambda folder: os.truncate(folder / "tokenizer.model", 0),
            "absent": lambda folder: (folder / "tokenizer.model").unlink(),
            "a web page": lambda folder: (folder / "tokenizer.model").write_text("<!DOCTYPE html>"),
        }

    def reference(self, messages: Messages) -> list[int]:
        """Each turn by SentencePiece itself, in the words of Meta's release of Llama 2."""
        model = sentencepiece.SentencePieceProcessor(model_proto=self.model)
        rest = list(messages)
        if rest[0]["role"] == "system":
            system = "<<SYS>>\n" + rest[0]["content"] + "\n<</SYS>>\n\n"
            rest = [{"role": "user", "content": system + rest[1]["content"]}, *rest[2:]]
        ids: list[int] = []
        for prompt, answer in zip(rest[::2], rest[1::2], strict=True):
            turn = f"[INST] {prompt['content']} [/INST] {answer['content']}"
            ids += [model.bos_id(), *model.encode(turn), model.eos_id()]
        return ids


class TestSentencePieceThatAddsNoSpace(TestSentencePiece):
    """No space is put in front of a text."""

    kind: Mapping[str, Any] = {**TestSentencePiece.kind, "add_dummy_prefix": False}


class TestSentencePieceOverBoundaries(TestSentencePiece):
    """Pieces may hold spaces, and so join the end of a prompt and the beginning of an answer."""

    kind: Mapping[str, Any] = {
        **TestSentencePiece.kind,
        "split_by_whitespace": False,
        "split_by_unicode_script": False,
        "vocab_size": 800,
    }
    conversations = (*TokenizerSuite.conversations, said("x", "It is 5."))

    def reference(self, messages: Messages) -> list[int]:
        raise NotImplementedError

    def test_a_piece_joins_them(self) -> None:
        """Or this class would show nothing."""
        model = sentencepiece.SentencePieceProcessor(model_proto=self.model)
        apart = model.encode("[INST] x [/INST]")
        assert model.encode("[INST] x [/INST] It is 5.")[: len(apart)] != apart


class TestUnigram(TestSentencePiece):
    """The other algorithm."""

    kind: Mapping[str, Any] = {**TestSentencePiece.kind, "model_type": "unigram"}


class TestMistralWithControlTokens(TestSentencePiece):
    """The form of Mistral's second and third version."""

    kind: Mapping[str, Any] = {**TestSentencePiece.kind, "control_symbols": ["[INST]", "[/INST]", "[IMG]"]}

    def reference(self, messages: Messages) -> list[int]:
        """Parts by SentencePiece itself, control tokens between, in the order of Mistral's guide."""
        model = sentencepiece.SentencePieceProcessor(model_proto=self.model)
        rest, ids = list(messages), [model.bos_id()]
        if rest[0]["role"] == "system":
            first = rest.pop(0)["content"] + "\n\n" + rest[0]["content"]
            rest[0] = {"role": "user", "content": first}
        for message in rest:
            said = model.encode(message["content"])
            user = message["role"] == "user"
            ids += (
                [model.piece_to_id("[INST]"), *said, model.piece_to_id("[/INST]")]
                if user
                else [*said, model.eos_id()]
            )
        return ids

    def test_there_is_one_begin_id_and_no_marker_is_spelt(self, tmp_path: Path) -> None:
        """Whatever stands in the texts."""
        tokenizer = self.open(tmp_path)
        inside = said("[INST] <s> [/INST]", "</s>", "b", "c", system="[/INST]")
        ids = [token for piece in tokenizer.render(inside) for token in piece.ids]
        model = sentencepiece.SentencePieceProcessor(model_proto=self.model)
        assert ids.count(model.bos_id()) == 1 and ids.count(model.eos_id()) == 2
        assert [ids.count(model.piece_to_id(marker)) for marker in ("[INST]", "[/INST]")] == [2, 2]


class TestMistralWithDefinedPieces(TestMistralWithControlTokens):
    """The markers as user-defined pieces, which a text may hold: here none does."""

    kind: Mapping[str, Any] = {**TestSentencePiece.kind, "user_defined_symbols": ["[INST]", "[/INST]"]}
    conversations = tuple(c for c in TokenizerSuite.conversations if "[/INST]" not in str(c))

    def test_there_is_one_begin_id_and_no_marker_is_spelt(self, tmp_path: Path) -> None:
        """It would be: rows that hold one are told."""
        assert {"[INST]", "[/INST]"} <= self.open(tmp_path).special_texts


class TestMistralWithSystemTokens(TestMistralWithControlTokens):
    """The form of Mistral's seventh version."""

    kind: Mapping[str, Any] = {
        **TestSentencePiece.kind,
        "control_symbols": ["[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"],
    }

    def reference(self, messages: Messages) -> list[int]:
        """As before, a system message between markers of its own."""
        if messages[0]["role"] != "system":
            return super().reference(messages)
        model = sentencepiece.SentencePieceProcessor(model_proto=self.model)
        begin, *rest = super().reference(messages[1:])
        markers = [model.piece_to_id(piece) for piece in ("[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]")]
        return [begin, markers[0], *model.encode(messages[0]["content"]), markers[1], *rest]


class TestMistralWithoutControlTokens(TestSentencePiece):
    """The form of Mistral's first version, with a vocabulary that is taken for its."""

    @pytest.fixture(autouse=True)
    def _taken_for_it(self, _shared: None, monkeypatch: pytest.MonkeyPatch) -> None:
        model = sentencepiece.SentencePieceProcessor(model_proto=self.model)
        texts = "".join(model.id_to_piece(token) + "\n" for token in range(300))
        monkeypatch.setattr(
            "mlxlora_sentencepiece.tokenizer.MISTRAL_1", (300, hashlib.sha256(texts.encode()).hexdigest())
        )

    def reference(self, messages: Messages) -> list[int]:
        """One begin id, each part encoded by itself."""
        model = sentencepiece.SentencePieceProcessor(model_proto=self.model)
        rest, ids = list(messages), [model.bos_id()]
        system = rest.pop(0)["content"] + "\n\n" if rest[0]["role"] == "system" else ""
        for prompt, answer in zip(rest[::2], rest[1::2], strict=True):
            ids += model.encode(f"[INST] {system}{prompt['content']} [/INST]")
            ids += [*model.encode(answer["content"]), model.eos_id()]
            system = ""
        return ids


class TestShown(TokenizerSuite):
    """The tokenizer on the page."""

    spec = SHOWN["mlxlora_tokenizers"]()[0]

    def write(self, folder: Path) -> Mapping[str, Path]:
        (folder / "bytes.txt").write_text("ids are bytes")
        return {"bytes.txt": folder / "bytes.txt"}


def trained(path: Path, kind: Mapping[str, Any]) -> bytes:
    """A small SentencePiece model, trained once."""
    if not path.exists():
        turns = [f"[INST] What is {i}? [/INST] It is {i}." for i in range(99)]
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(turns + ["The quick brown fox jumps over the lazy dog."] * 50),
            model_prefix=str(path),
            byte_fallback=True,
            hard_vocab_limit=False,
            num_threads=1,
            minloglevel=2,
            **{"model_type": "bpe", "vocab_size": 340, **kind},
        )
        path.with_name(f"{path.name}.model").rename(path)
    return path.read_bytes()


def test_every_tokenizer_is_covered() -> None:
    others = {"tokenizers"}  # by test_tokenizer_json_suite.py
    assert {TestSentencePiece.spec.name, *others} == set(TOKENIZERS)


# --- the suite fails what is broken ---------------------------------------------


class Broken(SHOWN["ByteTokenizer"]):
    """The one on the page, to be spoilt."""


def spoilt(**members: Any) -> TokenizerSuite:
    """The suite over the tokenizer on the page with other members."""
    kind = type("Spoilt", (Broken,), members)
    suite = TestShown()
    suite.spec = type(TestShown.spec)(
        name="bytes",
        summary="spoilt",
        detect=members.pop("detect", TestShown.spec.detect),
        open=lambda files, options: kind(files["bytes.txt"]),
    )
    return suite


def fails(test: Callable[[Path], None], folder: Path, error: type[BaseException] = AssertionError) -> None:
    with pytest.raises(error):
        test(folder)


def test_attributes_out_of_range_fail(tmp_path: Path) -> None:
    for bad in (
        {"vocab_size": 0},
        {"vocab_size": "258"},
        {"vocab_size": True},
        {"bos": 258},
        {"bos": -1},
        {"bos": "1"},
        {"stops": frozenset()},
        {"stops": {257}},
        {"stops": frozenset([258])},
        {"stops": None},
        {"chat_form": 3},
        {"chat_warning": None},
        {"special_texts": {"<s>"}},
        {"special_texts": frozenset([""])},
    ):
        fails(spoilt(**bad).test_a_text_comes_back_as_it_was, tmp_path, PluginError)


def test_what_breaks_the_contract_fails(tmp_path: Path) -> None:
    plain = SHOWN["ByteTokenizer"]

    def lower(self: Any, ids: Any) -> str:
        return str(plain.decode(self, ids)).lower()

    fails(spoilt(decode=lower).test_a_text_comes_back_as_it_was, tmp_path)

    def numpy_ids(self: Any, text: str, **options: Any) -> Any:
        return tuple(plain.encode(self, text, **options))

    fails(spoilt(encode=numpy_ids).test_a_text_comes_back_as_it_was, tmp_path, PluginError)

    def no_end(self: Any, text: str, *, bos: bool = True, eos: bool = False) -> Any:
        return plain.encode(self, text, bos=bos)

    fails(spoilt(encode=no_end).test_begin_and_end_ids_are_put_where_asked, tmp_path, PluginError)

    def special(self: Any, text: str, *, bos: bool = True, eos: bool = False) -> Any:
        parts = [plain.encode(self, part, bos=False) for part in text.split("</s>")]
        ids = parts[0] + [i for part in parts[1:] for i in (257, *part)]
        return [256] * bos + ids + [257] * eos

    fails(spoilt(encode=special).test_what_looks_like_a_special_token_is_text, tmp_path)

    def careless(self: Any, text: str, *, bos: bool = True, eos: bool = False) -> Any:
        return [256] * bos + list(text.encode("utf-8", "replace")) + [257] * eos

    fails(spoilt(encode=careless).test_half_a_surrogate_pair_is_refused, tmp_path, BaseException)
    fails(spoilt(detect=lambda files: True).test_knows_its_files_alone, tmp_path)
    fails(
        spoilt(
            fingerprint=property(lambda self: str(id(self)), lambda self, value: None)
        ).test_the_fingerprint_is_that_of_the_contents,
        tmp_path,
    )


def test_streaming_that_is_not_decoding_fails(tmp_path: Path) -> None:
    def one_by_one(self: Any, ids: Any, every: int = 1) -> Any:
        for i in ids:
            yield self.decode([i])

    fails(spoilt(stream=one_by_one).test_segments_joined_are_the_text, tmp_path)

    def held_for_ever(self: Any, ids: Any, every: int = 1) -> Any:
        text = self.decode(list(ids))
        yield text[:-1]

    fails(spoilt(stream=held_for_ever).test_segments_joined_are_the_text, tmp_path)
    fails(spoilt(stream=held_for_ever).test_any_ids_stream_as_they_decode, tmp_path)


def test_rendering_that_misleads_fails(tmp_path: Path) -> None:
    plain = SHOWN["ByteTokenizer"]

    def changed(change: Callable[[list[Piece]], list[Piece]]) -> TokenizerSuite:
        return spoilt(render=lambda self, messages: change(plain.render(self, messages)))

    no_end = changed(lambda pieces: [Piece(p.ids[:-1] if p.answer else p.ids, p.answer) for p in pieces])
    fails(no_end.test_answers_are_what_the_assistant_says, tmp_path)
    all_count = changed(lambda pieces: [Piece(p.ids, True) for p in pieces])
    fails(all_count.test_answers_are_what_the_assistant_says, tmp_path)
    fails(all_count.test_generation_is_told_what_training_was, tmp_path)
    none_count = changed(lambda pieces: [Piece(p.ids, False) for p in pieces])
    fails(none_count.test_answers_are_what_the_assistant_says, tmp_path)
    name = tuple(b"assistant: ")
    asked_otherwise = changed(lambda ps: ps if ps[-1].answer else [*ps, Piece(name, False)])
    fails(asked_otherwise.test_generation_is_told_what_training_was, tmp_path)
    for odd in ([], None, [("ids", True)], [Piece([1], True)], [Piece((999,), True)], [Piece((1,), 1)]):
        fails(
            changed(lambda pieces, odd=odd: odd).test_answers_are_what_the_assistant_says,
            tmp_path,
            PluginError,
        )
    with pytest.raises(BaseException, match="DID NOT RAISE"):
        spoilt(
            render=lambda self, messages: [Piece((256,), False)]
        ).test_conversations_without_a_form_are_refused(tmp_path)
