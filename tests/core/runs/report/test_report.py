"""What a report is made of, and that nothing in it can do more than be read."""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import threading
import time
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_run import write_run

import mlxlora_core.runs.report
from mlxlora_core.errors import DataError
from mlxlora_core.runs.grading import summarize
from mlxlora_core.runs.report import length_counts, write_report
from mlxlora_core.runs.report.facts import read_facts
from mlxlora_core.runs.report.html import data, element, escaped

FOLDER = Path(mlxlora_core.runs.report.__file__).parent
HOSTILE = [
    "<script>pwned=1</script>",
    "</script><script>pwned=1</script>",
    '"><img src=x onerror="pwned=1">',
    "javascript:pwned=1",
    "<!-- -->]]>&amp;",
    "\x1b[31mred\x07",
    "\u202egnp.exe",
    "</title></style></textarea>",
    "half \ud800 a pair",
]


class Reader(HTMLParser):
    """The tags of a page, and its text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def report(folder: Path) -> str:
    return write_report(folder).read_text("utf-8")


# --- the libraries in it ------------------------------------------------------


def test_the_vendored_files_are_those_that_their_note_names() -> None:
    note = (FOLDER / "vendor" / "README.md").read_text("utf-8")
    stated = dict(re.findall(r"^\| `([\w.]+)` .*`([0-9a-f]{64})` \|$", note, re.MULTILINE))
    scripts = {path.name: path for path in (FOLDER / "vendor").glob("*.js")}
    assert stated == {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in scripts.items()}
    for name in re.findall(r"`(\w+\.LICENSE)`", note):
        assert "Permission to use, copy" in (FOLDER / "vendor" / name).read_text("utf-8")


def test_a_report_holds_the_licences_of_what_it_holds(tmp_path: Path) -> None:
    page = report(write_run(tmp_path / "run"))
    for licence in (FOLDER / "vendor").glob("*.LICENSE"):
        assert licence.read_text("utf-8") in page


# --- escaping -----------------------------------------------------------------


@pytest.mark.parametrize("text", HOSTILE)
def test_text_stays_text(text: str) -> None:
    read = Reader(f"<p>{element('b', text, title=text)}</p>")
    assert [tag for tag, _ in read.tags] == ["p", "b"]
    assert read.text == read.tags[1][1]["title"]
    assert read.text.isprintable()
    if text.isprintable():
        assert read.text == text


def test_control_characters_are_seen() -> None:
    assert escaped("\x1b[0m \u202e \x00\n\t") == "\\x1b[0m \\u202e \\x00\n\t"
    assert escaped("naïve 日本 שלום 👩\u200d🔬") == "naïve 日本 שלום 👩\u200d🔬"


@pytest.mark.parametrize("text", HOSTILE)
def test_data_in_a_script_element_is_json_without_markup(text: str) -> None:
    made = data({"key": [text + "\u2028\u2029"]})
    assert json.loads(made) == {"key": [text + "\u2028\u2029"]}
    assert not set("<>&\u2028\u2029") & set(made)


def test_nothing_from_a_run_becomes_markup(tmp_path: Path) -> None:
    plain = Reader(report(write_run(tmp_path / "plain", questions=2, steps=3)))
    for i, text in enumerate(HOSTILE):
        folder = write_run(
            tmp_path / str(i),
            name=text,
            plugins={text: text},
            prompt=text.replace("{", "") + "{}",
            said=text.replace("{", "") + "{}",
            questions=2,
            steps=3,
        )
        page = Reader(report(folder))
        shown = escaped(text)
        assert [tag for tag, _ in page.tags if tag in ("script", "img", "a", "iframe", "style")] == [
            tag for tag, _ in plain.tags if tag in ("script", "img", "a", "iframe", "style")
        ]
        assert not any(name.startswith("on") for _, given in page.tags for name in given)
        assert Reader(shown).text.strip() in page.text


def test_no_address_is_in_a_page_outside_of_its_scripts(tmp_path: Path) -> None:
    page = Reader(report(write_run(tmp_path / "run")))
    given = [pair for _, attributes in page.tags for pair in attributes.items()]
    assert [value for name, value in given if name in ("src", "href", "srcset", "action")] == ["data:,"]


# --- a run that is not at its end ---------------------------------------------


@pytest.mark.parametrize("done", range(5))
def test_a_report_can_be_made_at_every_stage(tmp_path: Path, done: int) -> None:
    folder = write_run(tmp_path / "run", done=done, steps=10)
    if done < 3:
        (folder / "metrics.jsonl").unlink()
    text = Reader(report(folder)).text
    assert "has not come to its end" in text
    assert ("(step 10 of 10)" in text) == (done == 3)
    assert ("Not asked yet" in text) == (done in (3, 4))
    assert "of 15" not in text  # no count of answers before there are both


def test_a_torn_last_line_is_passed_over(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", done=3, steps=20)
    metrics = folder / "metrics.jsonl"
    whole = read_facts(folder)
    lines = metrics.read_bytes()
    for cut in range(1, 60, 7):
        metrics.write_bytes(lines + lines[: len(lines) - 1].split(b"\n")[0][:-cut])
        assert read_facts(folder) == whole
        write_report(folder)


def test_odd_lines_of_metrics_are_passed_over(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", done=3, steps=2)
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('7\n[]\n\n{"kind": "train"}\n{"kind": "train", "step": "<b>", "loss": 1}\n')
        file.write(
            '{"kind": "train", "step": 3, "loss": NaN}\n{"kind": "train", "step": 4, "loss": 1, "x": "<"}\n'
        )
    assert [line["step"] for line in read_facts(folder).train] == [1, 2, 4]
    assert "x" not in read_facts(folder).train[-1]


def test_a_step_that_was_reported_twice_counts_as_it_was_last(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", done=3, steps=3)
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"kind": "train", "step": 2, "loss": 0.5}\n')
    assert [(line["step"], line["loss"] == 0.5) for line in read_facts(folder).train] == [
        (1, False),
        (2, True),
        (3, False),
    ]


def test_what_belongs_to_another_recipe_is_left_out(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", steps=10)
    record: dict[str, Any] = json.loads((folder / "run.json").read_text())
    record["inputs"] |= {"train": "another one", "after": "another one"}
    del record["summary"]
    (folder / "run.json").write_text(json.dumps(record))
    facts = read_facts(folder)
    assert facts.results.keys() == {"model", "data", "before"}
    assert facts.train == facts.valid == ()


# --- errors -------------------------------------------------------------------


def test_a_folder_that_is_no_run_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is no run folder"):
        write_report(tmp_path)
    with pytest.raises(DataError, match="is no run folder"):
        write_report(tmp_path / "absent")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"{", r"run.json:1:2: is no JSON"),
        (b'{"stages": {}}', "is not what mlxlora writes: lacks mlxlora"),
        (b"[1]", "is not what mlxlora writes: wanted an object, got a list of 1"),
        (b"[" * 200_000, "is no usable JSON: more than 64"),
        (b'{"mlxlora": "1", "mlxlora": "2"}', "is no usable JSON: mlxlora there twice"),
        (b'{"mlxlora": "1", "seed": NaN}', "is no usable JSON: NaN is no number"),
        (b'{"mlxlora": "1", "seed": 1e999}', "is no usable JSON: it has a number that is larger"),
        (b'{"mlxlora": 5}', "mlxlora: wanted a text, got 5"),
        (b'"\xff"', r"run.json:1: is not UTF-8"),
        (b"", "run.json:1:1: is no JSON"),
    ],
)
def test_a_record_that_cannot_be_read_is_one_clear_line(tmp_path: Path, content: bytes, told: str) -> None:
    folder = write_run(tmp_path / "run", steps=1)
    (folder / "run.json").write_bytes(content)
    age(folder / "run.json")
    with pytest.raises(DataError, match=told) as caught:
        write_report(folder)
    assert str(caught.value).isprintable() and "Fix: move the folder away" in str(caught.value)


def age(path: Path) -> None:
    """Let a file be one that nobody is just writing, for which nothing waits."""
    os.utime(path, (1e9, 1e9))


@pytest.mark.parametrize("file", ["run.json", "recipe.toml", "metrics.jsonl"])
@pytest.mark.parametrize("kind", ["a pipe", "a folder", "a device", "a loop of links"])
def test_what_is_no_file_is_told_at_once(tmp_path: Path, file: str, kind: str) -> None:
    folder = write_run(tmp_path / "run", steps=1)
    path = folder / file
    path.unlink()
    makers: dict[str, Callable[[], object]] = {
        "a pipe": lambda: os.mkfifo(path),
        "a folder": path.mkdir,
        "a device": lambda: path.symlink_to("/dev/zero"),
        "a loop of links": lambda: path.symlink_to(path),
    }
    makers[kind]()
    if not path.is_symlink():
        age(path)
    with pytest.raises(DataError, match=file):
        write_report(folder)


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("stages", "before", "result"), 5),
        (("stages", "before", "result", "losses", "valid", "loss"), "x"),
        (("stages", "before", "result", "losses", "valid", "loss"), True),
        (("stages", "before", "result", "answers"), 5),
        (("stages", "before", "result", "answers", 0, "prompt"), None),
        (("stages", "before", "result", "answers", 0, "split"), "\x1b[31m"),
        (("stages", "train", "result", "lengths", "rows"), "x"),
        (("stages", "train", "result", "lengths", "bin_tokens"), 0),
        (("stages", "train", "result", "rows_cut"), -1),
        (("stages", "train", "result", "max_seq_length"), 2.0),
        (("stages", "data", "result", "rows"), {"train": 1}),
        (("stages", "data", "result", "groups"), 2**63),
        (("stages", "data", "files"), {"a": [1]}),
        (("stages", "data", "inputs"), 7),
        (("stages",), 5),
        (("summary",), 5),
        (("summary", "questions", "memory"), {"questions": 1}),
        (("origins",), 5),
        (("origins", "run.seed"), []),
        (("machine",), None),
        (("plugins", "lora"), 1.5),
        (("runtime",), "text"),
        (("started",), []),
        (("inputs",), "x"),
        (("recipe",), {}),
        (("seed",), 10**30),
    ],
)
def test_a_report_is_made_of_what_is_sound(tmp_path: Path, place: tuple[Any, ...], value: object) -> None:
    folder = write_run(tmp_path / "run", steps=3)
    record: Any = json.loads((folder / "run.json").read_text())
    part = record
    for key in place[:-1]:
        part = part[key]
    part[place[-1]] = value
    (folder / "run.json").write_text(json.dumps(record))
    facts = read_facts(folder)
    assert facts.faults and all(place[0] in fault for fault in facts.faults)
    text = Reader(report(folder)).text
    assert "could not be read and is not on this page" in text and facts.faults[0] in text


@pytest.mark.parametrize("key", ["recipe", "seed", "plugins", "runtime", "machine", "origins", "inputs"])
def test_a_record_without_a_key_still_makes_a_report(tmp_path: Path, key: str) -> None:
    folder = write_run(tmp_path / "run", steps=3)
    record = json.loads((folder / "run.json").read_text())
    del record[key]
    (folder / "run.json").write_text(json.dumps(record))
    assert read_facts(folder).faults == (f"run.json: lacks {key}",)
    assert f"lacks {key}" in report(folder)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"[", "recipe.toml: is no TOML"),
        (b"a = " + b"[" * 100_000, "is no usable TOML: more than 64"),
        (b".".join([b"a"] * 100_000) + b" = 1", "is no usable TOML: more than 64"),
        (b"train = 5\ndata = 5\n", "train: wanted an object, got 5"),
        (b"[train]\niters = 1979-05-27\n", "train.iters: wanted a plain value"),
        (b"[train]\nlearning_rate = inf\n", "train.learning_rate: wanted a finite number, got inf"),
        (b"\xff", "is not UTF-8"),
        (None, "recipe.toml: there is no such file"),
    ],
)
def test_a_report_without_a_sound_recipe(tmp_path: Path, content: bytes | None, told: str) -> None:
    folder = write_run(tmp_path / "run", steps=3)
    (folder / "recipe.toml").unlink()
    if content is not None:
        (folder / "recipe.toml").write_bytes(content)
    facts = read_facts(folder)
    assert told in facts.faults[0] and facts.steps == 3
    assert "The figures as a table" in report(folder)


@pytest.mark.parametrize(
    "recipe", ["[run]\n", "[train]\niters = -4\n", "[train]\niters = 2.0\n", "[train]\nwarmup = []\n"]
)
def test_a_recipe_that_says_little_is_no_fault(tmp_path: Path, recipe: str) -> None:
    folder = write_run(tmp_path / "run", steps=3)
    (folder / "recipe.toml").write_text(recipe)
    assert read_facts(folder).faults == () and read_facts(folder).steps == 3
    report(folder)


@pytest.mark.parametrize("loss", [0, 1e-320, 1e308, -1e-7])
def test_a_change_beyond_measure_is_told_as_such(tmp_path: Path, loss: float) -> None:
    folder = write_run(tmp_path / "run", steps=3)
    record = json.loads((folder / "run.json").read_text())
    results = {name: record["stages"][name]["result"] for name in ("before", "after")}
    results["before"]["losses"]["test"]["loss"] = loss
    record["summary"] = summarize(results["before"], results["after"])
    json.dumps(record, allow_nan=False)
    (folder / "run.json").write_text(json.dumps(record))
    assert "test" in Reader(report(folder)).text and read_facts(folder).faults == ()


@pytest.mark.parametrize("answers", [0, 1, 19])
def test_answers_are_held_against_those_of_the_same_prompt(tmp_path: Path, answers: int) -> None:
    folder = write_run(tmp_path / "run", steps=3)
    record = json.loads((folder / "run.json").read_text())
    del record["stages"]["after"]["result"]["answers"][answers:]
    (folder / "run.json").write_text(json.dumps(record))
    assert report(folder).count("Not asked yet.") == 20 - answers


def test_files_that_are_replaced_at_speed_make_whole_reports(tmp_path: Path) -> None:
    """Each file is now there, now half written, now gone, as where another program copies a run folder."""
    folder = write_run(tmp_path / "run", steps=50)
    good = {name: (folder / name).read_bytes() for name in ("run.json", "recipe.toml", "metrics.jsonl")}
    whole, stop = read_facts(folder), threading.Event()

    def replace() -> None:
        draw = random.Random(0)
        while not stop.is_set():
            name = draw.choice(list(good))
            if draw.random() < 0.5:
                (folder / name).unlink(missing_ok=True)
                time.sleep(0.002)
            half = len(good[name]) // 2
            with open(folder / name, "wb") as file:
                file.write(good[name][:half])
                file.flush()
                time.sleep(0.002)
                file.write(good[name][half:])
            time.sleep(0.005)

    writer = threading.Thread(target=replace)
    writer.start()
    try:
        for _ in range(100):
            facts = read_facts(folder)
            assert facts.record == whole.record
            assert all(report in whole.train for report in facts.train)
    finally:
        stop.set()
        writer.join()


# --- figures ------------------------------------------------------------------


@pytest.mark.parametrize("longest", [1, 5, 39, 40, 79, 80, 2048, 123_457])
def test_length_counts_are_a_histogram(longest: int) -> None:
    lengths = [longest, *np.random.default_rng(longest).integers(1, longest + 1, 300).tolist()]
    made = length_counts(lengths)
    edges = np.arange(len(made["rows"]) + 1) * made["bin_tokens"]
    # numpy puts the last edge into the last bin, of which there is nothing.
    assert made["rows"] == np.histogram(lengths, edges)[0].tolist() and sum(made["rows"]) == 301
    assert 1 <= len(made["rows"]) <= 40
    assert (made["median"], made["longest"]) == (np.median(lengths), max(lengths))


def test_the_page_says_which_figures_are_memory(tmp_path: Path) -> None:
    text = Reader(report(write_run(tmp_path / "run", steps=10))).text
    assert "Held-out loss (test) fell by 44%" in text
    assert "answers 10 of 15 with the exact first sentence; the base answered none" in text
    assert "memory, not understanding" in text and "never trained on" in text
    assert "13 training rows cut at 256 tokens, 529 tokens lost" in text
    assert "90 sources skipped" in text and "17 repeated rows" in text


def test_the_page_says_how_long_it_took_and_how_the_learning_rate_moves(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", steps=300)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    wanted = sum(1 / line["steps_per_second"] for line in lines if line["kind"] == "train")
    wanted += sum(line["seconds"] for line in lines if line["kind"] == "valid")
    minutes, seconds = divmod(round(wanted), 60)
    text = Reader(report(folder)).text
    assert f"Training took {minutes} min {seconds} s." in text
    assert "The learning rate rises over 30 steps (warm-up) to 0.005, then falls as a cosine." in text
    norms = [f"{line['grad_norm']:.3g}" for line in lines if line["kind"] == "train"]
    assert "gradient norm" in text and norms[-1] in text


def test_rows_in_two_splits_are_not_called_held_out(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", steps=1)
    record = json.loads((folder / "run.json").read_text())
    record["stages"]["data"]["result"]["rows_in_two_splits"] = 3
    (folder / "run.json").write_text(json.dumps(record))
    text = Reader(report(folder)).text
    assert "never trained on" not in text and "but for 3 rows that the source has in two splits" in text
