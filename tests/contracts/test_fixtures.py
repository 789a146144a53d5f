"""What authors try their plugins on: it is small, the same every time, and what the verbs read."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import mlx.core as mx
import pytest
from tokenizers import Tokenizer

from mlxlora_core import plugins, python
from mlxlora_core.errors import MlxloraError, UsageError
from mlxlora_core.model import adapters
from mlxlora_core.model.loading import load
from mlxlora_core.testing import fixtures
from mlxlora_core.testing.tokenizer import Messages, TokenizerSuite

REGISTRY = plugins.load(environ={plugins.ALLOW_LIST: ""})
ARCHITECTURES = [component.spec.name for component in REGISTRY.of("architecture")]


def digests(folder: Path) -> dict[str, str]:
    """File name -> digest of its bytes."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_model_of_every_architecture_is_small_and_the_same_every_time(
    architecture: str, tmp_path: Path
) -> None:
    one, two = (fixtures.tiny_model(tmp_path / name, architecture) for name in ("one", "two"))
    assert digests(one) == digests(two)
    assert sum(path.stat().st_size for path in one.iterdir()) < 1 << 20
    opened = load(one, REGISTRY)
    assert opened.architecture.spec.name == architecture
    logits = opened.language_model(mx.array([opened.tokenizer.encode("What is one plus two?")]))
    assert logits.shape[-1] == fixtures.VOCAB_SIZE == opened.tokenizer.vocab_size
    # No random model is sure of a token, and none says the same whatever it is asked.
    assert float(mx.softmax(logits, axis=-1).max()) < 0.9
    assert float(mx.std(logits, axis=1).max()) > 0.1


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_an_adapter_fits_its_model_and_changes_what_it_says(architecture: str, tmp_path: Path) -> None:
    model = fixtures.tiny_model(tmp_path / "model", architecture)
    file = fixtures.tiny_adapter(tmp_path / "adapter", model)
    assert digests(fixtures.tiny_adapter(tmp_path / "again", model).parent) == digests(file.parent)
    base = load(model, REGISTRY)
    ids = mx.array([base.tokenizer.encode("What is one plus two?")])
    before = base.language_model(ids)
    adapters.load(file, base, REGISTRY)
    assert float(mx.abs(base.language_model(ids) - before).max()) > 0.01
    assert len({path.split(".")[1] for path in adapters.trainable(base.module)}) == 2, "both layers"


def test_other_arguments_are_taken_and_odd_ones_refused(tmp_path: Path) -> None:
    folder = fixtures.tiny_model(tmp_path / "one", args={"n_layers": 3, "tie_word_embeddings": True})
    assert len(load(folder, REGISTRY).language_model.layers) == 3
    with pytest.raises(UsageError, match="'llama' has no argument n_leyers"):
        fixtures.tiny_model(tmp_path / "two", args={"n_leyers": 3})
    with pytest.raises(UsageError, match="n_heads"):
        fixtures.tiny_model(tmp_path / "three", args={"n_heads": 0})
    with pytest.raises(MlxloraError, match="no architecture 'lama'"):
        fixtures.tiny_model(tmp_path / "four", "lama")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one"], "nothing was begun"


def test_no_row_stands_in_two_splits_and_a_model_learns_them(tmp_path: Path) -> None:
    rows = fixtures.tiny_rows(tmp_path / "rows")
    assert digests(fixtures.tiny_rows(tmp_path / "again")) == digests(rows)
    texts = {path.stem: path.read_text().splitlines() for path in rows.iterdir()}
    assert {split: len(lines) for split, lines in texts.items()} == fixtures.SPLITS
    everything = [line for lines in texts.values() for line in lines]
    assert len(set(everything)) == len(everything)
    numbers = {f" {word}": number for number, word in enumerate(fixtures.NUMBERS)}
    for row in map(json.loads, everything):
        first, second = row["prompt"].removeprefix("What is").removesuffix("?").split(" plus")
        assert numbers[first] + numbers[second] == numbers[row["completion"]]
    model = python.load(fixtures.tiny_model(tmp_path / "model"))
    before = python.evaluate(model, rows).mean
    model.attach("lora")
    list(python.train(model, rows, iters=20, learning_rate=1e-2))
    assert python.evaluate(model, rows).mean < before - 0.5


class TestTinyTokenizer(TokenizerSuite):
    """The tokenizer of every tiny model, by what core demands of one, and by the library alone."""

    spec = REGISTRY.find("tokenizer", "tokenizers").spec

    def write(self, folder: Path) -> Mapping[str, Path]:
        fixtures.tiny_tokenizer(folder)
        return {name: folder / name for name in ("tokenizer.json", "tokenizer_config.json")}

    def reference(self, messages: Messages) -> list[int]:
        library = Tokenizer.from_str(fixtures.tokenizer_json())
        library.encode_special_tokens = True  # what looks like one in a message is text
        ids: list[int] = []
        for message in messages:
            said = library.encode(f"{message['role']}\n{message['content']}", add_special_tokens=False).ids
            ids += [1, *said, 2, *library.encode("\n", add_special_tokens=False).ids]
        return ids[:-1]  # an answer ends with its end

    def test_each_word_of_the_rows_is_a_token(self) -> None:
        library = Tokenizer.from_str(fixtures.tokenizer_json())
        assert library.get_vocab_size() == fixtures.VOCAB_SIZE
        for word in fixtures.WORDS:
            assert len(library.encode(word, add_special_tokens=False).ids) == 1, word
        assert library.encode("one").ids[0] == 0
        assert library.token_to_id("<s>") == 0 and library.token_to_id("<|im_end|>") == 2


def test_an_author_has_them_as_fixtures(tmp_path: Path) -> None:
    """The test file on the page of the door passes as it stands there."""
    page = (Path(__file__).parents[2] / "docs" / "plugins.md").read_text("utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    (block,) = [block for block in blocks if "pytest_plugins" in block]
    (tmp_path / "test_mine.py").write_text(block)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_mine.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and "3 passed" in done.stdout, done.stdout + done.stderr
