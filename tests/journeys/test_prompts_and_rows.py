"""What somebody is told of rows and prompts by each verb, and what a prompt is answered with."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import sentencepiece

import mlxlora_core

Command = Callable[..., Any]

PROMPTS = ("Q: a\nA: ", "Q: b\nA: ", "Q: c\nA: ")
ANSWERS = ("the mask", "a layer", "the weights")
CHAT = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "the mask"},
]

RECIPE = """
[run]
folder = "{folder}"
seed = 3

[model]
mlx_path = "{model}"

[data]
use = "jsonl"
options = {{ path = "{data}" }}

[adapter]
targets = ["all-linear"]
layers = -1
options = {{ rank = 16 }}

[train]
iters = {iters}
batch_size = 4
learning_rate = 1e-2
steps_per_eval = 1000
{more}
num_tokens = 12
"""


@pytest.fixture
def model(tmp_path: Path, tiny_checkpoint: Path, mlxlora: Command) -> Path:
    return converted(mlxlora, tiny_checkpoint, tmp_path / "model")


@pytest.fixture
def mistral(tmp_path: Path, make_checkpoint: Callable[..., Path], mlxlora: Command) -> Path:
    """A model whose vocabulary has control tokens for conversations."""
    checkpoint = make_checkpoint(tmp_path / "mistral")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(
            [f"{question}{answer}" for question, answer in zip(PROMPTS, ANSWERS, strict=True)]
        ),
        model_prefix=str(tmp_path / "mistral"),
        vocab_size=320,
        model_type="bpe",
        hard_vocab_limit=False,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        control_symbols=["[INST]", "[/INST]"],
        minloglevel=2,
    )
    (checkpoint / "tokenizer.model").write_bytes((tmp_path / "mistral.model").read_bytes())
    return converted(mlxlora, checkpoint, tmp_path / "mistral-model")


def converted(mlxlora: Command, checkpoint: Path, folder: Path) -> Path:
    done = mlxlora("convert", "--torch-path", checkpoint, "--mlx-path", folder, "--dtype", "float32")
    assert done.code == 0, done.err
    return folder


def write(folder: Path, rows: Sequence[dict[str, Any]]) -> Path:
    folder.mkdir()
    for split in ("train", "valid", "test"):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def recipe(tmp_path: Path, model: Path, rows: Sequence[dict[str, Any]], iters: int, *more: str) -> Path:
    path = tmp_path / "r.toml"
    data = write(tmp_path / "rows", rows)
    lines = "\n".join(more)
    path.write_text(RECIPE.format(folder=tmp_path / "run", model=model, data=data, iters=iters, more=lines))
    return path


def test_prompts_that_end_in_a_space_are_remembered_to_the_letter(
    mlxlora: Command, model: Path, tmp_path: Path
) -> None:
    """Training was told what the question tells; and that the two are kept apart is said."""
    rows = [{"prompt": p, "completion": c} for p, c in zip(PROMPTS, ANSWERS, strict=True)]
    asked = f"prompts = {json.dumps(PROMPTS)}"
    path = recipe(tmp_path, model, rows, 250, "[sampler]", 'use = "greedy"', "[generate]", asked)
    done = mlxlora("run", path)
    assert done.code == 0, done.err
    told = json.loads((tmp_path / "run" / "run.json").read_text())
    assert told["summary"]["questions"]["memory"]["exact"] == {"before": 0, "after": 3}
    assert "warning: 3 train rows with a prompt and a completion that the tokenizer would join" in done.err


def test_a_prompt_that_ends_inside_a_token_of_its_text_is_told(
    mlxlora: Command, model: Path, tmp_path: Path
) -> None:
    rows = [{"text": p + c} for p, c in zip(PROMPTS, ANSWERS, strict=True)]
    asked = f"prompts = {json.dumps([PROMPTS[0], PROMPTS[1].rstrip()])}"
    done = mlxlora("run", recipe(tmp_path, model, rows, 1, "[generate]", asked))
    assert done.code == 0, done.err
    lines = [line for line in done.err.splitlines() if "inside a token of its row" in line]
    assert len(lines) == 1 and lines[0].endswith(r"('Q: a\nA: ')")


def test_a_run_asks_in_the_form_that_it_was_trained_in_and_so_does_its_command(
    mlxlora: Command, mistral: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = ('prompts = ["Hello"]', "chat = true", 'system = "Be short."')
    path = recipe(
        tmp_path, mistral, [{"messages": CHAT}], 120, "[sampler]", 'use = "greedy"', "[generate]", *asked
    )
    done = mlxlora("run", path)
    assert done.code == 0, done.err
    assert "1 train row of messages in the form of Mistral's second and third version" in done.err
    (answer,) = json.loads((tmp_path / "run" / "run.json").read_text())["stages"]["after"]["result"][
        "answers"
    ]
    assert answer["text"] == " the mask" and answer["exact"] is True
    command = next(line for line in (done.out + done.err).splitlines() if "mlxlora generate" in line)
    words = shlex.split(command.strip())
    assert words[words.index("--chat") :][:3] == ["--chat", "--system", "Be short."]
    assert words[words.index("--seed") + 1] == "3"
    again = mlxlora(*words[1:])
    assert again.out == " the mask\n"
    messages = CHAT[:2]
    ours = mlxlora_core.load(mistral, adapter_file=tmp_path / "run" / "adapter" / "adapter.safetensors")
    assert mlxlora_core.generate(ours, messages, temp=0, num_tokens=12) == " the mask"
    assert mlxlora_core.generate(ours, "[INST] Hello [/INST]", temp=0, num_tokens=12) != " the mask"


ODD = [
    {"text": "<s>[INST] a layer [/INST] the mask </s>"},
    {"text": " \n"},
    {"prompt": "a", "completion": ""},
    {"messages": [{"role": "user", "content": " a"}, {"role": "assistant", "content": "\n"}]},
    {"text": "a \u2581 b"},
]
TOLD = (
    "row with </s>, <s>, [/INST], [INST] as text",
    "row of nothing but white space",
    "rows with an answer without content",
    "row with white space at the ends of messages, which is kept",
)


def test_every_verb_tells_of_odd_rows(mlxlora: Command, model: Path, tmp_path: Path) -> None:
    data = write(tmp_path / "odd", ODD)
    adapter, flags = tmp_path / "a.safetensors", ("--iters", 1, "--lora-layers", -1)
    done = mlxlora("train", "--model", model, "--data", data, "--adapter-file", adapter, *flags)
    changed = "row with characters that the tokenizer lacks or changes"
    assert done.code == 0, done.err
    for words in (*TOLD, changed):
        assert f" train {words}" in done.err and f" valid {words}" in done.err
    done = mlxlora("evaluate", "--model", model, "--data", data)
    assert done.code == 0 and all(f" test {words}" in done.err for words in (*TOLD, changed))
    path = f"path={data}"
    done = mlxlora("data", "--builder", "jsonl", "--out", tmp_path / "out", "--set", path)
    assert done.code == 0 and all(f" train {words}" in done.err for words in TOLD) and changed not in done.err
    record = json.loads((tmp_path / "out" / "dataset.json").read_text())
    assert len(record["findings"]) == 3 * len(TOLD)


def test_a_sound_data_folder_is_told_nothing_of(mlxlora: Command, model: Path, tmp_path: Path) -> None:
    data = write(tmp_path / "sound", [{"text": "A layer."}, {"prompt": "a", "completion": " mask"}])
    adapter, flags = tmp_path / "a.safetensors", ("--iters", 1, "--lora-layers", -1)
    done = mlxlora("train", "--model", model, "--data", data, "--adapter-file", adapter, *flags)
    assert done.code == 0 and "warning" not in done.err, done.err


def test_a_prompt_with_special_texts_is_told_of(mlxlora: Command, mistral: Path) -> None:
    done = mlxlora("generate", "--model", mistral, "-p", "<s>[INST] Hello [/INST]", "-n", 2)
    assert done.code == 0
    assert "<s>, [/INST], [INST] in the prompt is text: letters, and no token; --chat asks" in done.err
    done = mlxlora("generate", "--model", mistral, "-p", "Hello", "-n", 2)
    assert done.code == 0 and "warning" not in done.err


def test_a_system_message_needs_a_chat(mlxlora: Command, model: Path) -> None:
    done = mlxlora("generate", "--model", model, "-p", "Hello", "--system", "Be short.")
    assert done.code == 2 and "system needs chat" in done.error


SAMPLERS = ("temperature", "top-k", "top-p", "min-p", "repetition-penalty,top-p", "greedy")


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_token_is_a_function_of_seed_and_position(mlxlora: Command, model: Path, sampler: str) -> None:
    """Not of how many are asked for, nor of who asks, nor of how they are shown."""
    ours = mlxlora_core.load(model)
    long = mlxlora_core.generate(ours, "A layer", sampler=sampler, num_tokens=100, seed=7)
    for count in (1, 2, 50, 99):
        more = ("--sampler", sampler, "--seed", 7, "-n", count, "--write-every", 7)
        done = mlxlora("generate", "--model", model, "-p", "A layer", *more, "--json")
        assert done.code == 0, done.err
        said = json.loads(done.out)["text"].rstrip("\ufffd")  # of a character that was cut
        assert long.startswith(said)
        assert said or count < 3
