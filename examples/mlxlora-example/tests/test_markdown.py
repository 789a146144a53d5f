"""What dataset builder ``markdown`` makes of headings, blocks and bad files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlxlora_example
import pytest
from mlxlora_example import markdown

from mlxlora_core.api import DataError

PAGE = """\
before

# One #
first
second

## Two
```
# no heading
~~~
```
after

#no heading either
###
#\tThree ##\t
"""


def test_sections() -> None:
    """ATX headings of CommonMark, outside of fenced blocks."""
    assert list(markdown.sections(PAGE)) == [
        (1, "", "before"),
        (3, "One", "first\nsecond"),
        (7, "Two", "```\n# no heading\n~~~\n```\nafter\n\n#no heading either"),
        (16, "Three", ""),
    ]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_line_ends(tmp_path: Path, end: str) -> None:
    """Rows do not depend on them, nor on a byte order mark."""
    (tmp_path / "a.md").write_bytes(b"\xef\xbb\xbf" + end.join(["# T", "x", "y"]).encode())
    assert [row.content for row in markdown.rows(tmp_path, "text", 99).rows] == [{"text": "Q: T\nA: x\ny"}]


def test_rows_and_what_is_skipped(tmp_path: Path) -> None:
    """Files in the order of their names, each skipped part with its reason."""
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "c.MD").write_text("# C\nlong text")
    (tmp_path / "a.md").write_text("lead\n# A\nx\n# Empty\n")
    (tmp_path / "d.md").write_bytes(b"# D\n\xff\n")
    (tmp_path / "other.txt").write_text("# no Markdown\nx")
    made = markdown.rows(tmp_path, "prompt", 8)
    assert [row.content for row in made.rows] == [{"prompt": "Q: A\nA:", "completion": " x"}]
    assert {skipped.source: skipped.reason for skipped in made.skipped} == {
        "a.md:1": "text without a heading",
        "a.md:4": "a heading without text",
        "b/c.MD:1": "9 characters, the limit is 8",
        "d.md": "is not UTF-8: invalid start byte at byte 4",
    }
    assert list(made.versions) == ["a.md", "b/c.MD", "d.md"]


def test_one_text_under_two_headings_is_one_group(tmp_path: Path) -> None:
    """So that it stands in one split."""
    (tmp_path / "a.md").write_text("# A\nsame\n# B\nsame\n# C\nother\n")
    groups = [row.group for row in markdown.rows(tmp_path, "text", 99).rows]
    assert groups[0] == groups[1] != groups[2]


def test_inputs_change_when_a_file_does(tmp_path: Path) -> None:
    """``mlxlora run`` builds again when they do."""
    file = tmp_path / "a.md"
    file.write_text("# A\nx\n")
    options = mlxlora_example.MarkdownOptions(path=tmp_path)
    before = mlxlora_example.inputs(options)
    assert mlxlora_example.inputs(options) == before
    file.write_text("# A\nxy\n")
    assert mlxlora_example.inputs(options) != before


@pytest.mark.parametrize("make", [lambda path: None, lambda path: path.mkdir()])
def test_nothing_to_read(tmp_path: Path, make: Any) -> None:
    """An absent path and a folder without Markdown are errors that say where."""
    make(tmp_path / "docs")
    with pytest.raises(DataError, match="docs: there is no "):
        markdown.rows(tmp_path / "docs", "text", 99)
