"""The tokenizer of the library: begins, ends, added tokens, spaces, and what it is told by each file."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import small_tokenizers
from mlxlora_tokenizers import detect, open_files
from mlxlora_tokenizers.decoding import byte_steps
from tokenizers import Tokenizer, decoders

from mlxlora_core.api import DataError, ModelError, NoOptions
from mlxlora_core.model.prompts import reads_as

HERE = Path("tokenizer.json")
TEXTS = (
    *(
        "The layer scales.",
        " the  gradient ",
        "é😀日本語\n\n\tx",
        "",
        "a<think>b",
        "</s> layer <s>",
        "x" * 90,
    ),
    *("the the the", "123 4.5", "\u2581 a_\u2581b"),
)


def made(tokenizer: Tokenizer, **files: Any) -> Any:
    """A tokenizer of the plugin, opened from contents.

    Args:
        tokenizer: of the library.
        files: name without ending -> JSON of the other files.
    """
    return opened(json.loads(tokenizer.to_str()), **files)


def opened(document: Any, **files: Any) -> Any:
    contents = {f"{name}.json": json.dumps(content).encode() for name, content in files.items()}
    return open_files({"tokenizer.json": json.dumps(document).encode(), **contents}, NoOptions())


@pytest.fixture(scope="module")
def level() -> Tokenizer:
    return small_tokenizers.byte_level(["<s>", "</s>", "<|im_start|>", "<|im_end|>"], bos="<s>")


@pytest.fixture(scope="module")
def level_without() -> Tokenizer:
    return small_tokenizers.byte_level(["<s>", "</s>"])


END = {"generation_config": {"eos_token_id": 1}}

# --- which files ----------------------------------------------------------------


def test_files_are_known_by_name_and_first_bytes(tmp_path: Path) -> None:
    ranks = small_tokenizers.tiktoken_file()
    (tmp_path / "ranks").write_bytes(ranks)
    (tmp_path / "pieces").write_bytes(b"\n\x0e\n\x05<unk>\x15\0\0\0\0\x18\2")
    assert detect({"tokenizer.json": b""}) and detect({"tekken.json": tmp_path / "absent"})
    assert detect({"tokenizer.model": ranks}) and detect({"tokenizer.model": tmp_path / "ranks"})
    for other in (b"\n\x0e\n\x05<unk>", tmp_path / "pieces", tmp_path / "absent", tmp_path):
        assert not detect({"tokenizer.model": other})
    assert not detect({"tokenizer_config.json": b"{}"})


def test_files_and_contents_are_the_same_tokenizer(tmp_path: Path, level: Tokenizer) -> None:
    files = small_tokenizers.write(tmp_path, level, {"eos_token": "</s>"}, [3])
    contents = {name: path.read_bytes() for name, path in files.items()}
    both = [open_files(which, NoOptions()) for which in (files, contents)]
    assert both[0].fingerprint == both[1].fingerprint
    assert both[0].encode("the layer") == both[1].encode("the layer")


# --- begins and ends --------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "generation", "stops", "end"),
    [
        ({}, 1, {1}, 1),
        ({}, [3, 1], {1, 3}, 3),
        ({"eos_token": "</s>"}, None, {1}, 1),
        ({"eos_token": {"content": "</s>"}}, [3], {1, 3}, 1),
        ({"eos_token": "</s>", "chat_template": small_tokenizers.CHATML}, 0, {0, 1, 3}, 1),
        ({"eos_token": "</s>", "chat_template": "{% no template"}, None, {1}, 1),
    ],
)
def test_every_place_that_states_an_end_counts(
    level: Tokenizer, config: Any, generation: Any, stops: set[int], end: int
) -> None:
    tokenizer = made(level, tokenizer_config=config, generation_config={"eos_token_id": generation})
    assert tokenizer.stops == stops
    assert tokenizer.encode("the", eos=True)[-1] == end


def test_special_tokens_may_be_named_in_a_file_of_their_own(level: Tokenizer) -> None:
    tokenizer = made(level, tokenizer_config={"eos_token": None}, special_tokens_map={"eos_token": "</s>"})
    assert tokenizer.stops == {1}


def test_a_tokenizer_without_an_end_is_refused_with_what_to_add(level: Tokenizer) -> None:
    with pytest.raises(ModelError, match=r"no file says which token ends a text.*generation_config\.json"):
        made(level, tokenizer_config={"bos_token": "<s>"})


@pytest.mark.parametrize(
    ("config", "with_front", "without"),
    [
        ({}, 0, None),
        ({"add_bos_token": False}, None, None),
        ({"add_bos_token": True}, 0, None),
        ({"add_bos_token": True, "bos_token": "<s>"}, 0, 0),
        ({"bos_token": "<s>"}, 0, None),
    ],
)
def test_the_config_says_whether_a_text_begins_with_a_token_and_else_the_post_processor(
    level: Tokenizer, level_without: Tokenizer, config: Any, with_front: int | None, without: int | None
) -> None:
    for library, bos in ((level, with_front), (level_without, without)):
        tokenizer = made(library, tokenizer_config=config, **END)
        assert tokenizer.bos == bos
        assert tokenizer.encode("the")[: 0 if bos is None else 1] == ([] if bos is None else [bos])
        assert tokenizer.encode("the", bos=False) == library.encode("the", add_special_tokens=False).ids


def test_an_end_that_is_no_special_token_is_one_here(level: Tokenizer) -> None:
    document = json.loads(level.to_str())
    document["added_tokens"][1]["special"] = False
    assert 1 in Tokenizer.from_str(json.dumps(document)).encode("a</s>b").ids
    tokenizer = opened(document, tokenizer_config={"eos_token": "</s>"})
    assert 1 not in tokenizer.encode("a</s>b")
    assert tokenizer.decode(tokenizer.encode("a</s>b")) == "a</s>b"


# --- texts ------------------------------------------------------------------------

KINDS: Mapping[str, Any] = {
    "byte level": lambda: small_tokenizers.byte_level(["<unk>", "<s>", "</s>"], bos="<s>"),
    "llama 2": small_tokenizers.like_llama_2,
    "unigram": small_tokenizers.unigram,
    "unigram always": lambda: small_tokenizers.unigram("always"),
    "unigram never": lambda: small_tokenizers.unigram("never"),
}


@pytest.fixture(scope="module", params=list(KINDS))
def library(request: pytest.FixtureRequest) -> Tokenizer:
    tokenizer: Tokenizer = KINDS[request.param]()
    tokenizer.add_tokens(["<think>"])
    return tokenizer


@pytest.fixture
def tokenizer(library: Tokenizer) -> Any:
    return made(library, tokenizer_config={"eos_token": "</s>"})


def test_texts_have_the_ids_of_the_library(library: Tokenizer, tokenizer: Any) -> None:
    for text in TEXTS:
        if "</s>" not in text:
            assert tokenizer.encode(text) == library.encode(text).ids, text


def test_any_ids_decode_as_by_the_library_but_for_leading_spaces(library: Tokenizer, tokenizer: Any) -> None:
    draw = random.Random(0)
    whole = [i for i in range(library.get_vocab_size()) if "\ufffd" not in library.decode([i])]
    for _ in range(300):
        ids = draw.choices(whole, k=draw.randrange(15))
        text = tokenizer.decode(ids)
        assert text.removeprefix(" ") == library.decode(ids).removeprefix(" "), ids
        for every in (1, 3, 7):
            assert "".join(tokenizer.stream(ids, every)) == tokenizer.decode(ids)


def test_broken_characters_stream_as_they_decode(tokenizer: Any) -> None:
    ids = tokenizer.encode("é😀日本語", bos=False)
    for start in range(len(ids)):
        for stop in range(start, len(ids) + 1):
            part = ids[start:stop]
            for every in (1, 3, 7):
                assert "".join(tokenizer.stream(part, every)) == tokenizer.decode(part)


def test_special_tokens_are_letters_even_where_the_vocabulary_has_them(
    library: Tokenizer, tokenizer: Any
) -> None:
    for text in ("</s>", "a</s>b", "</s></s><s></s>", "layer </s> layer", "</s" * 50 + "></s>"):
        ids = tokenizer.encode(text, bos=False)
        assert not tokenizer.stops & set(ids) and tokenizer.bos not in ids
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_space_that_no_begin_id_tells_of_is_no_change_of_a_text() -> None:
    """As Phi-3 has it: a space in front of a text, and no token."""
    document = json.loads(small_tokenizers.like_llama_2().to_str()) | {"post_processor": None}
    tokenizer = opened(document, tokenizer_config={"eos_token": "</s>"})
    ids = tokenizer.encode("the layer")
    assert tokenizer.bos is None and tokenizer.decode(ids) == " the layer"
    assert reads_as(tokenizer, ids, "the layer") and not reads_as(tokenizer, ids, "the  layer")
    begun = opened(
        document, tokenizer_config={"eos_token": "</s>", "bos_token": "<s>", "add_bos_token": True}
    )
    assert reads_as(begun, begun.encode("the layer"), "the layer")
    assert not reads_as(begun, ids, "the layer")


def test_added_tokens_are_text_and_special_ones_are_not(library: Tokenizer, tokenizer: Any) -> None:
    think = library.token_to_id("<think>")
    assert think in tokenizer.encode("a <think>b")
    back = tokenizer.decode(tokenizer.encode("a <think>b"))
    assert back in ("a <think>b", "a <think> b")  # where every part gets a space in front
    assert tokenizer.decode([think, think]).replace(" ", "") == "<think><think>"
    assert tokenizer.decode([tokenizer.bos, *tokenizer.stops, tokenizer.vocab_size, 10**9]) == ""
    assert {"<s>", "</s>", "<think>"} <= tokenizer.special_texts


def test_an_added_token_that_looks_like_bytes_is_what_it_looks_like(level_without: Tokenizer) -> None:
    document = json.loads(level_without.to_str())
    document["added_tokens"].append({**document["added_tokens"][0], "content": "éé", "special": False})
    document["added_tokens"][-1]["id"] = level_without.get_vocab_size()
    tokenizer = opened(document, **END)
    assert Tokenizer.from_str(json.dumps(document)).decode([level_without.get_vocab_size()]) == "\ufffd" * 2
    assert tokenizer.decode([level_without.get_vocab_size()]) == "éé"


def test_an_end_without_a_token_is_one_all_the_same(level_without: Tokenizer) -> None:
    """A vocabulary may have gaps, and what a file calls an end may be in one."""
    document = json.loads(level_without.to_str())
    document["model"]["vocab"] = {
        word: number + 5 * (number > 300) for word, number in document["model"]["vocab"].items()
    }
    tokenizer = opened(document, generation_config={"eos_token_id": [1, 303]})
    assert tokenizer.stops == {1, 303} and tokenizer.decode([303]) == ""
    assert tokenizer.vocab_size == level_without.get_vocab_size() + 5


def test_words_are_joined_by_spaces() -> None:
    tokenizer = made(small_tokenizers.words(), tokenizer_config={"eos_token": "</s>"})
    ids = tokenizer.encode("the layer  unheard </s>")
    assert [tokenizer.decode([i]) for i in ids[:3]] == [" the", " layer", ""]
    assert tokenizer.decode(ids) == " the layer"
    assert tokenizer.stops.isdisjoint(ids) and tokenizer.bos is None


@pytest.mark.parametrize("decoder", [None, decoders.WordPiece(cleanup=False)], ids=["none", "words"])
def test_added_tokens_among_words_stand_apart_too(decoder: Any) -> None:
    library = small_tokenizers.words()
    library.add_tokens(["<think>"])
    if decoder is not None:
        library.decoder = decoder
    tokenizer = made(library, tokenizer_config={"eos_token": "</s>"})
    ids = tokenizer.encode("the<think>layer <think>")
    assert tokenizer.decode(ids) == " the <think> layer <think>"
    assert library.decode(ids) == tokenizer.decode(ids).removeprefix(" ")
    assert "".join(tokenizer.stream(ids)) == tokenizer.decode(ids)


def test_an_unknown_token_that_ends_texts_is_left_out() -> None:
    document = json.loads(small_tokenizers.words().to_str())
    document["model"]["unk_token"] = "</s>"
    tokenizer = opened(document, tokenizer_config={"eos_token": "</s>"})
    assert tokenizer.encode("the unheard layer " + "y" * 500) == tokenizer.encode("the layer")


@pytest.mark.parametrize(
    "decoder",
    [
        decoders.ByteLevel(),
        decoders.Sequence([decoders.Replace("_", " "), decoders.ByteFallback(), decoders.Fuse()]),
        decoders.Metaspace(),
        decoders.WordPiece(),
        decoders.WordPiece("@@", cleanup=False),
        decoders.BPEDecoder(),
        None,
    ],
)
def test_each_decoder_adds_what_that_of_the_library_adds(decoder: Any) -> None:
    tokens = [
        "a",
        "_b",
        "##c",
        "<0x41>",
        "<0xC3>",
        "<0xA9>",
        "\u2581d",
        "Ġe",
        "Ã©",
        "x</w>",
        "@@f",
        ".",
        "n't",
    ]
    library = Tokenizer.from_str(small_tokenizers.words().to_str())
    library.decoder = decoder
    described = json.loads(library.to_str())["decoder"]
    step = byte_steps(described, HERE)
    joined = b"".join(map(step, tokens)).decode().strip(" ")
    assert joined == (" ".join(tokens) if decoder is None else decoder.decode(tokens)).strip(" ")


@pytest.mark.parametrize(
    "decoder",
    [
        {"type": "CTC", "pad_token": "<pad>", "word_delimiter_token": "|", "cleanup": True},
        {"type": "Replace", "pattern": {"Regex": "a"}, "content": ""},
        {"type": ["ByteLevel"]},
        {"type": "WordPiece", "prefix": 5},
        {},
        [],
        "ByteLevel",
    ],
)
def test_a_decoder_that_is_not_known_is_refused(level: Tokenizer, decoder: Any) -> None:
    with pytest.raises(ModelError, match=r"its decoder|Decoder"):
        opened(json.loads(level.to_str()) | {"decoder": decoder}, **END)


# --- settings that would change rows --------------------------------------------------


def test_nothing_is_cut_filled_up_or_left_to_chance(level: Tokenizer) -> None:
    document = json.loads(level.to_str())
    text = "the layer scales the weights of the gradient " * 3
    want = opened(document, **END).encode(text)
    changed = Tokenizer.from_str(json.dumps(document))
    changed.enable_truncation(5)
    changed.enable_padding(length=500)
    document = json.loads(changed.to_str())
    document["model"]["dropout"] = 0.9
    assert len(changed.encode(text).ids) == 500
    tokenizer = opened(document, **END)
    assert all(tokenizer.encode(text) == want for _ in range(5))


def test_a_fork_after_use_prints_nothing(tmp_path: Path, level: Tokenizer) -> None:
    small_tokenizers.write(tmp_path, level, {"eos_token": "</s>"})
    code = (
        "import os, sys; from pathlib import Path; from mlxlora_core.api import NoOptions\n"
        "from mlxlora_tokenizers import open_files\n"
        "files = {path.name: path for path in Path(sys.argv[1]).iterdir()}\n"
        "open_files(files, NoOptions()).encode('the layer')\n"
        "pid = os.fork()\n"
        "sys.exit(0 if pid == 0 else os.waitpid(pid, 0)[1])"
    )
    surroundings = {key: value for key, value in os.environ.items() if key != "TOKENIZERS_PARALLELISM"}
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, env=surroundings, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


# --- tokens that other files add ------------------------------------------------------


def test_tokens_of_other_files_are_added(level: Tokenizer) -> None:
    first = level.get_vocab_size()
    described = {"0": {"content": "<s>", "special": True}, str(first): {"content": "<tool>", "special": True}}
    described[str(first + 1)] = {"content": "<think>", "special": False}
    for files in (
        {"tokenizer_config": {"added_tokens_decoder": described}},
        {"added_tokens": {"<tool>": first, "<think>": first + 1}},
    ):
        tokenizer = made(level, **files, **END)
        assert tokenizer.vocab_size == first + 2
        assert first + 1 in tokenizer.encode("a<think>b")
        assert {"<tool>", "<think>"} <= tokenizer.special_texts
    assert first not in made(level, tokenizer_config={"added_tokens_decoder": described}, **END).encode(
        "<tool>"
    )


@pytest.mark.parametrize(
    ("number", "content", "says"),
    [
        (0, "<pad>", r"'<pad>' has the id 0; in tokenizer\.json '<s>' has that id"),
        (9999, "<s>", r"'<s>' has the id 9999; in tokenizer\.json it has another one"),
        (9999, "<pad>", r"'<pad>' has the id 9999, and \d+ by its place"),
        (1 << 22, "<pad>", "wanted 0 to 4194303"),
        (5, "", "adds a token that is written ''"),
    ],
)
def test_tokens_that_clash_are_refused(level: Tokenizer, number: int, content: str, says: str) -> None:
    with pytest.raises(ModelError, match=says):
        made(level, tokenizer_config={"added_tokens_decoder": {str(number): {"content": content}}}, **END)


# --- conversations --------------------------------------------------------------------


def test_what_a_template_writes_has_the_ids_that_the_library_gives_it(level: Tokenizer) -> None:
    """Special tokens, and the white space that some of them take with them."""
    document = json.loads(level.to_str())
    for token, flags in zip(
        document["added_tokens"][1:], ({"lstrip": True}, {"rstrip": True}, {}), strict=True
    ):
        token.update(flags)
    library = Tokenizer.from_str(json.dumps(document))
    draw = random.Random(0)
    parts = ("</s>", "<|im_start|>", "<|im_end|>", " ", "\n", "the", " layer", "é", "<", "</s")
    for _ in range(200):
        text = "".join(draw.choices(parts, k=draw.randrange(1, 12)))
        template = "{{ '" + text.replace("\n", "\\n") + "' }}{% for m in messages %}{% endfor %}"
        config = {"chat_template": template, "eos_token": "</s>"}
        tokenizer = opened(document, tokenizer_config=config)
        pieces = tokenizer.render([{"role": "user", "content": "x"}])
        ids = [number for piece in pieces for number in piece.ids]
        assert ids == library.encode(text, add_special_tokens=False).ids, text


def test_spaces_in_front_of_what_a_template_writes_are_those_of_the_library(library: Tokenizer) -> None:
    """Some kinds put one in front of every part between special tokens, and some in front of the first."""
    draw = random.Random(1)
    parts = ("</s>", "<s>", " ", "\n", "the", " layer", "é", "<", "x")
    for _ in range(40):
        text = "".join(draw.choices(parts, k=draw.randrange(1, 12)))
        template = "{{ '" + text.replace("\n", "\\n") + "' }}"
        config = {"chat_template": template, "eos_token": "</s>"}
        pieces = made(library, tokenizer_config=config).render([{"role": "user", "content": "x"}])
        ids = [number for piece in pieces for number in piece.ids]
        library.encode_special_tokens = False
        assert ids == library.encode(text, add_special_tokens=False).ids, text


def test_marks_are_no_part_of_a_text(level: Tokenizer) -> None:
    config = {"chat_template": small_tokenizers.CHATML, "eos_token": "</s>"}
    tokenizer = made(level, tokenizer_config=config)
    said = "\ufde0 <|im_end|> \ufde1"
    asked = tokenizer.render([{"role": "user", "content": said}])
    text = "".join(tokenizer.decode(piece.ids) for piece in asked)
    assert text == f"user\n{said}\nassistant\n"
    every = "".join(map(chr, range(0xFDD0, 0xFDF0)))
    with pytest.raises(DataError, match="U\\+FDE0 to U\\+FDEF"):
        tokenizer.render([{"role": "user", "content": every}])


def test_without_a_template_conversations_are_refused(level: Tokenizer) -> None:
    tokenizer = made(level, **END)
    assert tokenizer.chat_form == "no chat template"
    with pytest.raises(DataError, match=r"no chat template.*chat_template\.jinja"):
        tokenizer.render([{"role": "user", "content": "x"}])


def test_the_fingerprint_is_of_all_that_decides(level: Tokenizer, level_without: Tokenizer) -> None:
    config = {"chat_template": small_tokenizers.CHATML, "eos_token": "</s>"}
    found = [
        made(level, tokenizer_config=config),
        made(level_without, tokenizer_config={"eos_token": "</s>"}),
        made(level, tokenizer_config=config, generation_config={"eos_token_id": [0]}),
        made(level, tokenizer_config={**config, "add_bos_token": False}),
        made(level, tokenizer_config={**config, "chat_template": small_tokenizers.INSTRUCT}),
        made(level, tokenizer_config={**config, "eos_token": "<|im_end|>"}),
        made(level, tokenizer_config=config, added_tokens={"<x>": level.get_vocab_size()}),
    ]
    assert len({tokenizer.fingerprint for tokenizer in found}) == len(found)
    assert made(level, tokenizer_config={**config, "x": 1}).fingerprint == found[0].fingerprint


# --- bad files ------------------------------------------------------------------------


def test_half_a_surrogate_pair_is_refused_with_its_place(level: Tokenizer) -> None:
    with pytest.raises(DataError, match=r"character 3 of the text is '\\ud800'"):
        made(level, **END).encode("ab\ud800")


BAD: list[tuple[dict[str, Any], str]] = [
    ({"model": None}, "has no model"),
    ({"model": {"type": "BPE"}}, "has no model"),
    (
        {"model": {"type": "BPE", "vocab": {}, "merges": []}, "added_tokens": []},
        "which the vocabulary does not|no token",
    ),
    ({"model": {"type": "BPE", "vocab": {"a": -1}, "merges": []}}, "cannot use it"),
    ({"model": {"type": "BPE", "vocab": {"a": 0, "b": 0}, "merges": []}, "added_tokens": []}, "have one id"),
    (
        {"model": {"type": "BPE", "vocab": {"a": 1 << 31}, "merges": []}, "added_tokens": []},
        "an id from 4194304",
    ),
    ({"model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["a a"]}}, "cannot use it"),
    ({"added_tokens": 5}, "wanted a list"),
    ({"added_tokens": [5]}, "adds a token"),
    ({"added_tokens": [{"id": 0, "content": "a"}, {"id": 0, "content": "b"}]}, "two tokens with one id"),
    ({"normalizer": {"type": "Replacing"}}, "has the type 'Replacing'"),
    ({"normalizer": {"type": "Sequence", "normalizers": [{"type": "NFC"}] * 70}}, "more than 64 steps"),
    (
        {
            "normalizer": {
                "type": "Sequence",
                "normalizers": [{"type": "Replace", "pattern": {"String": "a"}, "content": "aaaa"}] * 20,
            }
        },
        "64 times longer",
    ),
    ({"normalizer": {"type": "Prepend", "prepend": "a" * 100}}, "a long text in front"),
    ({"post_processor": {"type": "TemplateProcessing", "single": 5}}, "cannot use it"),
    (
        {
            "pre_tokenizer": {
                "type": "Split",
                "pattern": {"Regex": "(a+)+$"},
                "behavior": "Removed",
                "invert": False,
            }
        },
        "retry-limit",
    ),
    (
        {
            "pre_tokenizer": {
                "type": "Split",
                "pattern": {"Regex": "("},
                "behavior": "Removed",
                "invert": False,
            }
        },
        "cannot use it",
    ),
]


@pytest.mark.parametrize(("changed", "says"), BAD, ids=[says for _, says in BAD])
def test_a_document_that_is_none_is_refused_in_one_line(
    level: Tokenizer, changed: Any, says: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ModelError, match=says) as caught:
        opened(json.loads(level.to_str()) | changed, tokenizer_config={"eos_token": "</s>"})
    assert str(caught.value).isprintable() and len(str(caught.value).encode()) < 2000
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({"tokenizer_config": []}, r"tokenizer_config\.json: holds no JSON object"),
        ({"tokenizer_config": {"add_bos_token": 1}}, "add_bos_token is 1, wanted true or false"),
        ({"tokenizer_config": {"eos_token": 5}}, "eos_token is 5, wanted a text"),
        ({"tokenizer_config": {"eos_token": {"text": "</s>"}}}, "eos_token is .*, wanted a text"),
        ({"tokenizer_config": {"eos_token": "<eos>"}}, "'<eos>', which the vocabulary does not have"),
        ({"tokenizer_config": {"added_tokens_decoder": [1]}}, "added_tokens_decoder"),
        ({"tokenizer_config": {"added_tokens_decoder": {"-1": {"content": "x"}}}}, "added_tokens_decoder"),
        ({"generation_config": {"eos_token_id": "1"}}, "eos_token_id is '1', wanted an id"),
        ({"generation_config": {"eos_token_id": [True]}}, "eos_token_id is .True., wanted an id"),
        ({"generation_config": {"eos_token_id": 5000}}, "eos_token_id 5000 is beyond the vocabulary"),
    ],
)
def test_other_files_that_say_something_odd_are_refused(level: Tokenizer, files: Any, says: str) -> None:
    with pytest.raises(ModelError, match=says):
        made(level, **files)


def test_two_tokens_in_front_of_a_text_are_refused(level: Tokenizer) -> None:
    document = json.loads(level.to_str())
    front = document["post_processor"]["single"]
    front.insert(0, front[0])
    with pytest.raises(ModelError, match="puts 0, 0 in front of a text"):
        opened(document, **END)


def test_a_pattern_that_fails_at_a_text_is_an_error_of_the_model(level: Tokenizer) -> None:
    document = json.loads(level.to_str())
    pattern = {"type": "Split", "pattern": {"Regex": "(q+)+$"}, "behavior": "Isolated", "invert": False}
    tokenizer = opened(document | {"pre_tokenizer": pattern}, **END)
    assert tokenizer.decode(tokenizer.encode("qq")) == "qq"
    with pytest.raises(ModelError, match="retry-limit"):
        tokenizer.encode("q" * 60 + "!")


def test_a_file_that_is_too_large_is_refused(tmp_path: Path) -> None:
    with (tmp_path / "tokenizer.json").open("wb") as file:
        file.truncate((64 << 20) + 1)
        file.write(b"{")
    with pytest.raises(ModelError, match="is larger than 64 MiB"):
        open_files({"tokenizer.json": tmp_path / "tokenizer.json"}, NoOptions())
