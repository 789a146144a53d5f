from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlxlora_core.errors import DataError
from mlxlora_core.files.jsonl import read_jsonl
from mlxlora_core.model.tokenizers import CheckedTokenizer
from mlxlora_core.plugins.sections import SplitConfig
from mlxlora_core.training.batches import epoch_order, fixed_rows, make_batch, steps_from
from mlxlora_core.training.dataset import SPLITS, write_dataset
from mlxlora_core.training.examples import Example, Examples, read_examples
from mlxlora_core.values import Piece, Row, Rows, Skipped

MakeExamples = Callable[..., tuple[Example, ...]]


def texts(count: int) -> list[Row]:
    return [Row({"text": f"row {i}"}) for i in range(count)]


def write(folder: Path, rows: Iterable[Row], **options: Any) -> dict[str, Any]:
    return write_dataset(Rows(list(rows)), folder, SplitConfig(**options), {"builder": "test"})


def contents(folder: Path) -> dict[str, list[Any]]:
    """The rows of each split, as a reader of JSON Lines finds them."""
    found = {}
    for split in SPLITS:
        lines = (folder / f"{split}.jsonl").read_bytes().split(b"\n")
        assert lines.pop() == b""
        found[split] = [json.loads(line) for line in lines]
    return found


# --- the dataset folder -------------------------------------------------------


def test_rows_are_split_once_in_the_order_they_came(tmp_path: Path) -> None:
    record = write(tmp_path, texts(200))
    found = contents(tmp_path)
    assert [len(found[split]) for split in SPLITS] == [180, 10, 10]
    every = [row["text"] for split in SPLITS for row in found[split]]
    assert sorted(every) == sorted(f"row {i}" for i in range(200))
    numbers = [int(row["text"][4:]) for row in found["train"]]
    assert numbers == sorted(numbers)
    assert record["rows"] == {"train": 180, "valid": 10, "test": 10}
    assert json.loads((tmp_path / "dataset.json").read_text()) == record
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "dataset.json",
        "test.jsonl",
        "train.jsonl",
        "valid.jsonl",
    ]


@pytest.mark.parametrize(
    ("count", "size", "want"),
    [
        (1, 0.1, [1, 0, 0]),
        (2, 0.1, [1, 1, 0]),
        (3, 0.1, [1, 1, 1]),
        (10, 0.1, [8, 1, 1]),
        (30, 0.1, [27, 2, 1]),
        (100, 0.1, [90, 5, 5]),
        (10, 0.9, [1, 5, 4]),
        (3, 0.99, [1, 1, 1]),
        (50, 0.0, [50, 0, 0]),
    ],
)
def test_sets_of_any_size_split_sensibly(tmp_path: Path, count: int, size: float, want: list[int]) -> None:
    write(tmp_path, texts(count), test_set_size=size)
    assert [len(rows) for rows in contents(tmp_path).values()] == want


def test_the_bytes_depend_on_rows_and_options_alone(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("a", "b", "c", "d")]
    write(folders[0], texts(100))
    write(folders[1], texts(100), write_batch_size=7)
    write(folders[2], texts(100), split_seed=1)
    write(folders[3], [*texts(100), Row({"text": "one more"})])

    def lines(folder: Path) -> list[set[bytes]]:
        return [set((folder / f"{split}.jsonl").read_bytes().split(b"\n")) for split in SPLITS]

    for split in SPLITS:
        assert (folders[0] / f"{split}.jsonl").read_bytes() == (folders[1] / f"{split}.jsonl").read_bytes()
    assert lines(folders[0]) != lines(folders[2])
    moved = sum(len(a - b) for a, b in zip(lines(folders[0]), lines(folders[3]), strict=True))
    assert moved <= 2


def test_no_group_stands_in_two_splits(tmp_path: Path) -> None:
    draw = random.Random(0)
    rows = [Row({"text": f"row {i}"}, group=f"g{draw.randrange(60)}") for i in range(400)]
    write(tmp_path, rows, test_set_size=0.4)
    group = {row.content["text"]: row.group for row in rows}
    seen = [{group[row["text"]] for row in found} for found in contents(tmp_path).values()]
    assert all(seen)
    assert sum(map(len, seen)) == len(set().union(*seen))


def test_groups_that_share_a_row_are_one(tmp_path: Path) -> None:
    # b's row 1 is a's row 1: were they drawn apart, row 1 would stand beside its own group's test rows.
    for seed in range(20):
        chain = [("a", 0), ("a", 1), ("b", 1), ("b", 2), ("c", 3), ("c", 2)]
        rows = [Row({"text": f"row {i}"}, group=name) for name, i in chain]
        record = write(tmp_path, [*rows, *texts(9)[5:]], test_set_size=0.5, split_seed=seed)
        where = {row["text"]: split for split, found in contents(tmp_path).items() for row in found}
        assert len({where[f"row {i}"] for i in range(4)}) == 1
        assert record["groups"] == 5


def test_repeated_rows_are_left_out_and_counted(tmp_path: Path) -> None:
    rows = [Row({"prompt": "p", "completion": "c"}), Row({"completion": "c", "prompt": "p"}), *texts(5)]
    record = write(tmp_path, [*rows, *texts(5)])
    assert record["repeated_rows"] == 6
    assert sum(record["rows"].values()) == 6


def test_splits_of_the_source_are_kept_and_overlap_is_told(tmp_path: Path) -> None:
    rows = [
        Row({"text": "a"}, split="train"),
        Row({"text": "b"}, split="train"),
        Row({"text": "c"}),
        Row({"text": "a"}),
        Row({"text": "a"}, split="valid"),
        Row({"text": "d"}, split="test"),
    ]
    record = write(tmp_path, rows)
    found = {split: [row["text"] for row in rows] for split, rows in contents(tmp_path).items()}
    assert found == {"train": ["a", "b", "c"], "valid": ["a"], "test": ["d"]}
    assert (record["rows_in_two_splits"], record["repeated_rows"]) == (1, 1)


def test_a_split_that_there_is_not_is_an_error_and_no_row_is_lost(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no split 'validation' \(there is train, valid, test\)"):
        write(tmp_path, [Row({"text": "a"}, split="train"), Row({"text": "b"}, split="validation")])
    with pytest.raises(DataError, match="none of 1 rows is in the train split"):
        write(tmp_path, [Row({"text": "a"}, split="test")])
    assert list(tmp_path.iterdir()) == []


def test_odd_characters_come_back(tmp_path: Path) -> None:
    odd = ["a\u2028b\u2029c\x85d", "\r\n\t\0", "\ufeffx", "é😀", '"\\', "\x1b[2J"]
    write(tmp_path, [Row({"text": text}) for text in odd], test_set_size=0.0)
    assert [content["text"] for _, content in read_jsonl(tmp_path / "train.jsonl")] == odd


def test_rows_that_could_not_be_read_back_are_skipped_with_the_reason(tmp_path: Path) -> None:
    rows = [Row({"text": "\ud800"}), Row({"text": 5}), Row({"txt": "a"}), *texts(3)]
    made = Rows(rows, skipped=[Skipped("a.module", "it\ud800 hangs")], versions={"mlx": "1"})
    record = write_dataset(made, tmp_path, SplitConfig(), {"builder": "b", "options": {}})
    assert record["skipped"][0] == {"source": "a.module", "reason": "it\ud800 hangs"}
    assert [skipped["source"] for skipped in record["skipped"][1:]] == ["row 1", "row 2", "row 3"]
    assert json.loads((tmp_path / "dataset.json").read_text("utf-8")) == record
    assert record["split"] == {"test_set_size": 0.1, "split_seed": 0, "write_batch_size": 1000}
    assert (record["builder"], record["versions"], record["groups"]) == ("b", {"mlx": "1"}, 3)


def test_no_rows_is_an_error_that_tells_why(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no rows were made \(skipped: mlx: no such package\)"):
        write_dataset(Rows([], skipped=[Skipped("mlx", "no such package")]), tmp_path, SplitConfig(), {})
    with pytest.raises(DataError, match=r"no rows were made \(skipped: none\)"):
        write(tmp_path, [])


# --- examples -----------------------------------------------------------------


def read(tmp_path: Path, tokenizer: CheckedTokenizer, *rows: dict[str, Any], **options: Any) -> Examples:
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_examples(tmp_path / "train.jsonl", tokenizer, **{"max_seq_length": 512, **options})


def counted(example: Example, tokenizer: CheckedTokenizer) -> str:
    """The text of the tokens that count, with what is not text by name."""
    names = {tokenizer.bos: "<BOS>", 2: "<EOS>"}
    ids = example.tokens[example.mask].tolist()
    return "".join(names[id] if id in names else tokenizer.decode([id]) for id in ids)


def test_a_text_row_counts_whole_but_for_its_begin_token(tmp_path: Path, tokenizer: CheckedTokenizer) -> None:
    (example,) = read(tmp_path, tokenizer, {"text": "The adapter scales."}).examples
    assert example.tokens.tolist() == tokenizer.encode("The adapter scales.", eos=True)
    assert example.mask.tolist() == [False] + [True] * (len(example.tokens) - 1)
    assert counted(example, tokenizer) == " The adapter scales.<EOS>"


@pytest.mark.parametrize(
    ("prompt", "completion", "answer"),
    [
        ("Q: what?\nA:", " a layer", " a layer"),
        ("Q: what?\nA: ", "a layer", " a layer"),  # the space belongs to the piece of the answer
        ("th", "e", " the"),  # one piece over the boundary is the answer's
        ("Q", "", ""),
        ("", "the weights", " the weights"),
        ("é", "😀", "😀"),
    ],
)
def test_a_prompt_ends_where_the_answer_begins(
    tmp_path: Path, tokenizer: CheckedTokenizer, prompt: str, completion: str, answer: str
) -> None:
    row = {"prompt": prompt, "completion": completion}
    (masked,) = read(tmp_path, tokenizer, row, {"prompt": "x", "completion": "y"}, mask_prompt=True).examples[
        :1
    ]
    (whole,) = read(tmp_path, tokenizer, row, {"text": "x"}).examples[:1]
    assert masked.tokens.tolist() == whole.tokens.tolist()
    assert masked.tokens.tolist() == tokenizer.encode(prompt + completion, eos=True)
    ids = masked.tokens[masked.mask].tolist()
    assert ids.pop() == 2
    assert tokenizer.decode(ids) == answer
    assert whole.mask.tolist() == [False] + [True] * (len(whole.tokens) - 1)


def test_every_assistant_turn_counts_and_no_begin_token_does(
    tmp_path: Path, tokenizer: CheckedTokenizer
) -> None:
    roles = ("system", "user", "assistant", "user", "assistant")
    said = ("be brief", "what?", "a layer", "why?", "the weights")
    row = {"messages": [{"role": r, "content": c} for r, c in zip(roles, said, strict=True)]}
    (example,) = read(tmp_path, tokenizer, row, mask_prompt=True).examples
    first = "[INST] <<SYS>>\nbe brief\n<</SYS>>\n\nwhat? [/INST] a layer"
    second = "[INST] why? [/INST] the weights"
    assert example.tokens.tolist() == tokenizer.encode(first, eos=True) + tokenizer.encode(second, eos=True)
    assert counted(example, tokenizer) == " a layer<EOS> the weights<EOS>"
    (whole,) = read(tmp_path, tokenizer, row).examples
    assert whole.mask.tolist() == (whole.tokens != tokenizer.bos).tolist()
    assert (whole.tokens == tokenizer.bos).sum() == 2


@pytest.mark.parametrize("roles", [("assistant",), ("user", "user"), ("system",), ("a", "b")])
def test_messages_that_make_no_turns_are_refused(
    tmp_path: Path, tokenizer: CheckedTokenizer, roles: tuple[str, ...]
) -> None:
    row = {"messages": [{"role": role, "content": "x"} for role in roles]}
    with pytest.raises(DataError, match=r"train.jsonl:2: messages must alternate user, assistant"):
        read(tmp_path, tokenizer, {"text": "a"}, row)


def test_a_conversation_without_a_last_answer_is_refused(tmp_path: Path, tokenizer: CheckedTokenizer) -> None:
    row = {"messages": [{"role": role, "content": "x"} for role in ("user", "assistant", "user")]}
    with pytest.raises(DataError, match=r"train.jsonl:2: messages must end with an answer of the assistant"):
        read(tmp_path, tokenizer, {"text": "a"}, row)


class NoBegin:
    """Words with ids of their own, no begin id, and two ids that end a text."""

    words = ("a", "b", "c", "user:", "</s>", "<end>")
    vocab_size, bos, stops, fingerprint = 6, None, frozenset([4, 5]), "words"

    def encode(self, text: str, *, bos: bool = True, eos: bool = False) -> list[int]:
        return [self.words.index(word) for word in text.split()] + [4] * eos

    def decode(self, ids: Iterable[int]) -> str:
        return " ".join(self.words[i] for i in ids if i not in self.stops)

    def stream(self, ids: Iterable[int], every: int = 1) -> Iterable[str]:
        return map(self.decode, ([i] for i in ids))

    def render(self, messages: Any) -> list[Piece]:
        said = [(m["role"] == "assistant", tuple(self.encode(m["content"]))) for m in messages]
        return [Piece((*ids, 5), True) if answer else Piece((3, *ids), False) for answer, ids in said]


@pytest.fixture
def no_begin(tokenizer: CheckedTokenizer) -> CheckedTokenizer:
    return CheckedTokenizer(tokenizer.component, {}, NoBegin())


def test_without_a_begin_id_the_first_token_is_foretold_by_nothing(
    tmp_path: Path, no_begin: CheckedTokenizer
) -> None:
    rows = {"text": "a b"}, {"prompt": "a", "completion": " b c"}, {"text": ""}
    examples = read(tmp_path, no_begin, *rows)
    assert [e.tokens.tolist() for e in examples.examples] == [[0, 1, 4], [0, 1, 2, 4]]
    assert [e.mask.tolist() for e in examples.examples] == [[False, True, True], [False, True, True, True]]
    assert examples.empty == 1


def test_a_conversation_counts_as_its_pieces_say(tmp_path: Path, no_begin: CheckedTokenizer) -> None:
    roles = ("user", "assistant", "user", "assistant")
    row = {"messages": [{"role": r, "content": c} for r, c in zip(roles, ("a", "b", "a", "c"), strict=True)]}
    (masked,) = read(tmp_path, no_begin, row, mask_prompt=True).examples
    assert masked.tokens.tolist() == [3, 0, 1, 5, 3, 0, 2, 5]
    assert masked.mask.tolist() == [False, False, True, True, False, False, True, True]
    (whole,) = read(tmp_path, no_begin, row).examples
    assert whole.mask.tolist() == [False] + [True] * 7


def test_long_rows_are_cut_and_counted(tmp_path: Path, tokenizer: CheckedTokenizer) -> None:
    long = "the weights " * 30
    length = len(tokenizer.encode(long, eos=True))
    examples = read(tmp_path, tokenizer, {"text": long}, {"text": "x"}, max_seq_length=10)
    assert (examples.cut, examples.cut_tokens, examples.empty) == (1, length - 10, 0)
    assert length in examples.lengths and len(examples.lengths) == len(examples)
    assert examples.examples[0].tokens.tolist() == tokenizer.encode(long)[:10]
    assert examples.tokens == 10 + len(examples.examples[1].tokens)
    exact = read(tmp_path, tokenizer, {"text": long}, max_seq_length=length)
    assert (exact.cut, exact.cut_tokens) == (0, 0)


def test_a_row_whose_answer_is_cut_away_is_left_out_and_counted(
    tmp_path: Path, tokenizer: CheckedTokenizer
) -> None:
    row = {"prompt": "the weights " * 30, "completion": "x"}
    examples = read(tmp_path, tokenizer, row, {"prompt": "a", "completion": "b"}, max_seq_length=10)
    assert len(examples) == 2
    masked = {"max_seq_length": 10, "mask_prompt": True}
    examples = read(tmp_path, tokenizer, row, {"prompt": "a", "completion": "b"}, **masked)
    assert (len(examples), examples.empty, examples.cut) == (1, 1, 1)
    with pytest.raises(DataError, match=r"train.jsonl: none of 1 rows has a token that counts"):
        read(tmp_path, tokenizer, row, **masked)


def test_rows_that_say_nothing_are_left_out_and_counted(tmp_path: Path, tokenizer: CheckedTokenizer) -> None:
    examples = read(tmp_path, tokenizer, {"text": ""}, {"text": "x"}, {"prompt": "", "completion": ""})
    assert (len(examples), examples.empty) == (1, 2)
    with pytest.raises(DataError, match="none of 1 rows"):
        read(tmp_path, tokenizer, {"text": ""})


def test_text_rows_have_no_prompt_to_mask(tmp_path: Path, tokenizer: CheckedTokenizer) -> None:
    rows = {"prompt": "a", "completion": "b"}, {"text": "x"}
    with pytest.raises(DataError, match=r"train.jsonl:2: a \{text\} row has no prompt to mask. Fix: leave"):
        read(tmp_path, tokenizer, *rows, mask_prompt=True)
    assert len(read(tmp_path, tokenizer, *rows)) == 2


# --- batches ------------------------------------------------------------------


def test_a_batch_asks_for_the_next_token_wherever_it_counts(make_examples: MakeExamples) -> None:
    examples = make_examples([5, 9, 2, 7])
    rows = (3, 1, 2)
    batch = make_batch(examples, rows)
    assert batch.inputs.shape == (3, 8)
    flat = batch.inputs.reshape(-1).tolist()
    asked = [
        (i, t)
        for i, row in enumerate(rows)
        for t in range(1, len(examples[row].tokens))
        if examples[row].mask[t]
    ]
    assert batch.counted_tokens == len(asked)
    got = zip(batch.positions.tolist(), batch.targets.tolist(), strict=True)
    for (i, t), (position, target) in zip(asked, got, strict=True):
        tokens = examples[rows[i]].tokens
        assert position == i * 8 + t - 1
        assert flat[position] == tokens[t - 1]
        assert target == tokens[t]


def test_the_last_token_is_a_target_and_padding_never_is(make_examples: MakeExamples) -> None:
    examples = make_examples([3, 40, 11])
    batch = make_batch(examples, [0, 1, 2])
    targets = batch.targets.tolist()
    assert 0 not in targets  # no example holds the id that pads
    assert len(targets) == sum(int(example.mask.sum()) for example in examples)
    for example in examples:
        assert int(example.tokens[-1]) in targets


# --- order --------------------------------------------------------------------


def skewed(count: int = 1000) -> list[int]:
    draw = random.Random(0)
    return [min(2000, 3 + int(draw.lognormvariate(4, 1))) for _ in range(count)]


def flat_examples(lengths: Iterable[int]) -> list[Example]:
    return [Example(np.zeros(length, np.uint32), np.ones(length, bool)) for length in lengths]


def waste(examples: list[Example], steps: Iterable[list[int]]) -> float:
    """Padding as a share of the tokens themselves."""
    padded = sum(len(rows) * max(len(examples[row].tokens) for row in rows) for rows in steps)
    return padded / sum(len(example.tokens) for example in examples) - 1


def test_an_epoch_has_every_row_once_also_when_the_last_step_is_short() -> None:
    for count, rows_a_step in ((1, 4), (3, 4), (4, 4), (1001, 8)):
        steps = epoch_order(flat_examples(skewed(count)), rows_a_step, seed=0, epoch=0)
        assert sorted(row for step in steps for row in step) == list(range(count))
        assert len(steps) == -(-count // rows_a_step)
        assert max(map(len, steps)) <= rows_a_step


def test_the_order_is_a_function_of_seed_and_epoch_alone() -> None:
    examples = flat_examples(skewed(200))
    orders = {}
    for seed in (0, 1, 2**32 - 1):
        for epoch in (0, 1, 1000):
            np.random.seed(epoch)
            mx.random.seed(epoch)
            orders[seed, epoch] = epoch_order(examples, 8, seed, epoch)
            np.random.random(7)
            assert epoch_order(examples, 8, seed, epoch) == orders[seed, epoch]
    assert len({json.dumps(order) for order in orders.values()}) == len(orders)


def test_rows_of_like_length_go_together_in_changing_company() -> None:
    lengths = skewed()
    examples = flat_examples(lengths)
    order = epoch_order(examples, 8, seed=0, epoch=0)
    draw = random.Random(0)
    shuffled = draw.sample(range(len(examples)), len(examples))
    in_steps = [shuffled[i : i + 8] for i in range(0, len(shuffled), 8)]
    assert waste(examples, in_steps) > 1.0
    assert waste(examples, order) < 0.12
    company = [
        {frozenset(step) for step in epoch_order(examples, 8, seed=0, epoch=epoch)} for epoch in (0, 1)
    ]
    assert len(company[0] & company[1]) < len(order) / 10
    # Short and long steps come in no order.
    widths = [max(lengths[row] for row in step) for step in order]
    assert 0.3 < sum(a < b for a, b in pairwise(widths)) / len(widths) < 0.7


def test_any_cursor_goes_on_where_the_whole_would_be() -> None:
    examples = flat_examples(skewed(50))
    whole = list(islice(steps_from(examples, 8, seed=3), 30))  # 7 steps an epoch
    for cursor in range(23):
        assert list(islice(steps_from(examples, 8, seed=3, cursor=cursor), 7)) == whole[cursor : cursor + 7]


def test_a_dataset_smaller_than_a_batch_makes_smaller_batches() -> None:
    examples = flat_examples([3, 5])
    assert [sorted(step) for step in islice(steps_from(examples, 8, seed=0), 3)] == [[0, 1]] * 3


# --- fixed rows ---------------------------------------------------------------


def test_fixed_rows_are_the_same_each_time_and_have_the_tail(make_examples: MakeExamples) -> None:
    examples = make_examples([9, 3, 7, 5, 2, 8, 4])
    for batch_size in (1, 2, 3, 7, 100):
        rows = list(fixed_rows(examples, batch_size, -1))
        assert sorted(row for part in rows for row in part) == list(range(7))
        assert rows == list(fixed_rows(examples, batch_size, -1))


def test_a_part_of_the_rows_is_taken_from_all_over_the_file(make_examples: MakeExamples) -> None:
    examples = make_examples([5] * 100)
    rows = sorted(row for part in fixed_rows(examples, 5, 2) for row in part)
    assert rows == list(range(0, 100, 10))
    assert sum(map(len, fixed_rows(examples, 5, 21))) == 100
    assert len(list(fixed_rows(examples[:3], 5, 2))) == 1
