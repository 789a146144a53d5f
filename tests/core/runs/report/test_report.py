"""What a report is made of, and that nothing in it can do more than be read."""

from __future__ import annotations

import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_run import write_run

import mlxlora_core.runs.report
from mlxlora_core.errors import DataError
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
    ("file", "content", "told"),
    [
        ("run.json", "{", "cannot be read"),
        ("run.json", '{"stages": {}}', "is no record of a run of this version"),
        ("recipe.toml", "[", "cannot be read"),
    ],
)
def test_a_damaged_record_is_one_clear_line(tmp_path: Path, file: str, content: str, told: str) -> None:
    folder = write_run(tmp_path / "run", steps=1)
    (folder / file).write_text(content)
    with pytest.raises(DataError, match=rf"{file}: {told}"):
        write_report(folder)


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
