"""How much of what training computes on the docstrings of mlx is padding, as its reports tell it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import mlxlora_demo
import numpy as np
import pytest

from mlxlora_core import plugins
from mlxlora_core.model.tokenizers import open_tokenizer
from mlxlora_core.training.batches import Batch, Collator, epoch_order
from mlxlora_core.training.dealing import deal
from mlxlora_core.training.examples import Examples, make_examples

TOKENIZER = Path(mlxlora_demo.__file__).parent / "base" / "tokenizer.model"


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Examples:
    """The rows to train on that the docstrings of mlx give, by the tokenizer of the demo."""
    from mlxlora_core import cli

    folder = tmp_path_factory.mktemp("rows") / "data"
    assert cli.execute(["data", "--builder", "docstrings", "--package", "mlx", "--out", str(folder)]) == 0
    registry = plugins.load(environ={plugins.ALLOW_LIST: ""})
    tokenizer = open_tokenizer({"tokenizer.model": TOKENIZER}, registry, TOKENIZER)
    lines = (json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines())
    numbered = ((f"row {number}", row) for number, row in enumerate(lines))
    return make_examples(numbered, "train.jsonl", tokenizer, max_seq_length=2048, mask_prompt=False)


def share(batches: Iterator[Batch]) -> float:
    """The share of the positions of some batches that are padding."""
    counted = np.sum([(batch.padding, batch.inputs.size) for batch in batches], axis=0)
    return float(counted[0] / counted[1])


@pytest.mark.parametrize("cores", [1, 2])
def test_an_epoch_has_little_padding_and_a_packed_one_none(rows: Examples, cores: int) -> None:
    """At most 3 % with the rows of a batch side by side, also where a batch is dealt to no cores."""
    examples = rows.examples
    assert len(examples) > 500
    for seed, epoch in ((0, 0), (0, 1), (7, 5)):
        steps = epoch_order(examples, 4, seed, epoch, by_length=True)
        parts = [
            part
            for step in steps
            for part in deal(step, [len(examples[row].tokens) for row in step], min(cores, len(step)))
        ]
        padded, packed = (share(map(Collator(examples, packing), parts)) for packing in (False, True))
        assert 0 < padded <= (0.03 if cores == 1 else 0.02)
        assert packed == 0
