"""The conformance suite over SentencePiece models with a chat template and with added tokens."""

from __future__ import annotations

import functools
import io
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import sentencepiece
import small_tokenizers

from mlxlora_core import plugins as registry
from mlxlora_core.testing.tokenizer import Messages, TokenizerSuite

SPEC = next(
    component.spec
    for component in registry.load(environ={registry.ALLOW_LIST: ""}).of("tokenizer")
    if component.spec.name == "sentencepiece"
)
GEMMA = (
    "{{ bos_token }}{% for message in messages %}<start_of_turn>"
    "{{ 'model' if message.role == 'assistant' else message.role }}\n{{ message.content }}<end_of_turn>\n"
    "{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)


@functools.cache
def trained(*defined: str, dummy: bool = True) -> bytes:
    """A small model that keeps white space, with user-defined pieces."""
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(small_tokenizers.LINES),
        model_writer=out,
        model_type="bpe",
        vocab_size=330,
        byte_fallback=True,
        hard_vocab_limit=False,
        num_threads=1,
        minloglevel=2,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=dummy,
        user_defined_symbols=list(defined),
    )
    return out.getvalue()


class TestSentencePieceWithTemplate(TokenizerSuite):
    """As a folder of Llama 2 without a tokenizer.json: the template writes control pieces."""

    spec = SPEC
    defined: tuple[str, ...] = ()
    dummy = True
    config: Mapping[str, Any] = {
        "chat_template": small_tokenizers.INSTRUCT,
        "bos_token": "<s>",
        "eos_token": {"content": "</s>"},
        "add_bos_token": True,
    }
    generation: Any = 2

    def model(self) -> sentencepiece.SentencePieceProcessor:
        return sentencepiece.SentencePieceProcessor(model_proto=trained(*self.defined, dummy=self.dummy))

    def write(self, folder: Path) -> Mapping[str, Path]:
        (folder / "tokenizer.model").write_bytes(trained(*self.defined, dummy=self.dummy))
        (folder / "tokenizer_config.json").write_text(json.dumps(self.config))
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": self.generation}))
        names = ("tokenizer.model", "tokenizer_config.json", "generation_config.json")
        return {name: folder / name for name in names}

    def damage(self) -> Mapping[str, Callable[[Path], object]]:
        def config(**changed: Any) -> Callable[[Path], object]:
            content = json.dumps({**self.config, **changed})
            return lambda folder: (folder / "tokenizer_config.json").write_text(content)

        def token(number: object, content: str) -> Callable[[Path], object]:
            return config(added_tokens_decoder={str(number): {"content": content, "special": True}})

        return {
            "no such begin token": config(bos_token="<bos>"),
            "no such end token": config(eos_token="<eos>"),
            "a config that is none": lambda folder: (folder / "tokenizer_config.json").write_text("{"),
            "ends beyond it": lambda folder: (folder / "generation_config.json").write_text(
                '{"eos_token_id": 5000}'
            ),
            "a piece with another text": token(7, "<pad>"),
            "a piece with another id": token(5000, "<s>"),
            "the unknown piece with another id": token(5000, "<unk>"),
            "an id that is too large": token(1 << 22, "<pad>"),
            "an id that is none": token("x", "<pad>"),
        }

    def reference(self, messages: Messages) -> list[int]:
        model, rest = self.model(), list(messages)
        system = rest.pop(0)["content"] + "\n\n" if rest[0]["role"] == "system" else ""
        ids = [1]
        for asked, answered in zip(rest[::2], rest[1::2], strict=True):
            turn = f"{system}[INST] {asked['content']} [/INST] {answered['content']}"
            ids += [*model.encode(turn), 2]
            system = ""
        return ids


class TestTokensThatAreAdded(TestSentencePieceWithTemplate):
    """Turns between tokens that stand behind the pieces, as tuned versions of Llama 2 have them."""

    @property
    def first(self) -> int:
        """The id of the first of them."""
        return int(self.model().vocab_size())

    def write(self, folder: Path) -> Mapping[str, Path]:
        added = [("<|im_start|>", True), ("<|im_end|>", True), ("<think>", False)]
        self.config = {
            "chat_template": small_tokenizers.CHATML,
            "eos_token": "<|im_end|>",
            "add_bos_token": True,
            "added_tokens_decoder": {
                "1": {"content": "<s>", "special": True},
                **{str(self.first + i): {"content": t, "special": s} for i, (t, s) in enumerate(added)},
            },
        }
        return super().write(folder)

    def test_words_that_are_added_are_tokens_in_every_text(self, tmp_path: Path) -> None:
        tokenizer = self.open(tmp_path)
        assert tokenizer.vocab_size == self.first + 3
        assert tokenizer.stops == {2, self.first + 1}
        ids = tokenizer.encode("a <think>layer</think>")
        assert self.first + 2 in ids and tokenizer.decode(ids) == "a <think> layer</think>"

    def test_what_stands_behind_a_token_gets_no_space_where_the_config_says_so(self, tmp_path: Path) -> None:
        files = self.write(tmp_path)
        files["tokenizer_config.json"].write_text(json.dumps({**self.config, "legacy": False}))
        tokenizer = self.opened(files)
        text = "a <think>layer</think>"
        assert tokenizer.decode(tokenizer.encode(text)) == text
        asked = tokenizer.render([{"role": "user", "content": "layer"}])[0]
        assert tokenizer.decode(asked.ids) == "user\nlayer\nassistant\n"

    def reference(self, messages: Messages) -> list[int]:
        model = self.model()
        ids = []
        for message in messages:
            ids += [self.first, *model.encode(f"{message['role']}\n{message['content']}")]
            ids += [self.first + 1, *model.encode("\n")]
        return ids[: len(ids) - len(model.encode("\n"))]


class TestUserDefinedPieces(TestSentencePieceWithTemplate):
    """As Gemma has it: what begins and ends a turn are pieces that SentencePiece would find in any text."""

    defined = ("<start_of_turn>", "<end_of_turn>")
    dummy = False
    generation: Any = (2, 4)
    config: Mapping[str, Any] = {
        "chat_template": GEMMA,
        "bos_token": "<s>",
        "eos_token": "</s>",
        "added_tokens_decoder": {
            str(3 + i): {"content": text, "special": True}
            for i, text in enumerate(("<start_of_turn>", "<end_of_turn>"))
        },
    }

    def reference(self, messages: Messages) -> list[int]:
        model, ids = self.model(), [1]
        for message in messages:
            role = "model" if message["role"] == "assistant" else message["role"]
            ids += [3, *model.encode(f"{role}\n{message['content']}"), 4, *model.encode("\n")]
        return ids[: len(ids) - len(model.encode("\n"))]
