"""The conformance suite over builder ``manuals``, and what it makes of pages."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlxlora_manuals
import pytest
from mlxlora_manuals import markdown, rows, rst
from mlxlora_manuals.parts import Code, Heading, Left, Part, Text

from mlxlora_core.api import DataError, UsageError
from mlxlora_core.testing.dataset_builder import DatasetBuilderSuite

MANUAL = Path(__file__).parents[1] / "manual"

MARKDOWN = """\
# Guide

Before *all*.

## Start

Run this:

```python
print(1)
```

- one
- two:

  ```sh
  ls
  ```

## Stop

Press a key.
"""
RST = """\
Guide
=====

Before *all*.

Start
-----

Run this:

.. code-block:: python
   :linenos:

   print(1)

- one
- two:

  .. code-block:: sh

     ls

Stop
----

Press a key.
"""


class TestManuals(DatasetBuilderSuite):
    """Dataset builder ``manuals``."""

    spec = next(iter(mlxlora_manuals.mlxlora_dataset_builders()))

    def sources(self, folder: Path) -> Mapping[str, Any]:
        """A page of each kind; two sections have one text."""
        (folder / "a.md").write_text("# A\n\nsame\n\n# B\n\nsame\n\n# C\n\n```sh\nls\n```\n")
        (folder / "b.rst").write_text("".join(f"Title {i}\n========\n\ntext {i}\n\n" for i in range(9)))
        return {"path": str(folder)}

    def poor_sources(self, folder: Path) -> Mapping[str, Any]:
        """A file that is no text, and a heading without any."""
        values = self.sources(folder)
        (folder / "c.md").write_bytes(b"\xff")
        (folder / "d.rst").write_text("Empty\n=====\n")
        return values

    def empty_sources(self, folder: Path) -> Mapping[str, Any]:
        """A heading without text, and nothing else."""
        (folder / "a.md").write_text("# Empty\n")
        return {"path": str(folder)}

    def change(self, folder: Path) -> None:
        """Another text in the last section."""
        with (folder / "b.rst").open("a") as file:
            file.write("more\n")


def made(folder: Path, name: str, text: str, form: str = "prompt", *languages: str, limit: int = 4000) -> Any:
    """The rows of one page, and what was skipped: place -> reason."""
    (folder / name).write_text(text, encoding="utf-8")
    found = rows.rows(folder / name, form, languages, limit)
    return [row.content for row in found.rows], {s.source: s.reason for s in found.skipped}


# --- both kinds of pages ------------------------------------------------------


def test_one_page_in_both_spellings_gives_the_same_code(tmp_path: Path) -> None:
    """Titles, what leads to the block, the block; lists do not matter to it."""
    want = [
        {"prompt": "Guide > Start\n\nRun this:\n\n```python\n", "completion": "print(1)\n```"},
        {"prompt": "Guide > Start\n\n- one\n- two:\n\n```sh\n", "completion": "ls\n```"},
    ]
    assert made(tmp_path, "a.md", MARKDOWN, "code") == (want, {})
    got, skipped = made(tmp_path, "a.rst", RST, "code")
    want[1]["prompt"] = "Guide > Start\n\ntwo:\n\n```sh\n"  # docutils knows each item by itself
    assert (got, skipped) == (want, {})


@pytest.mark.parametrize(("name", "text"), [("a.md", MARKDOWN), ("a.rst", RST)])
def test_sections_of_both(tmp_path: Path, name: str, text: str) -> None:
    """In order, with the titles above; a text row is the two together."""
    got, skipped = made(tmp_path, name, text)
    assert skipped == {}
    assert [row["prompt"] for row in got] == ["Guide\n\n", "Guide > Start\n\n", "Guide > Stop\n\n"]
    assert got[0]["completion"] == ("Before *all*." if name.endswith("md") else "Before all.")
    assert got[1]["completion"].startswith("Run this:\n\n```python\nprint(1)\n```\n\n")
    assert got[1]["completion"].endswith("\n\n```sh\nls\n```")
    texts, _ = made(tmp_path, name, text, "text")
    assert texts == [{"text": row["prompt"] + row["completion"]} for row in got]


@pytest.mark.parametrize("form", ["text", "prompt", "code"])
def test_what_is_said_twice_is_one_group(tmp_path: Path, form: str) -> None:
    """So that it stands in one split."""
    page = "# A\n\n```\nx\n```\n\n# B\n\n```\nx\n```\n\n# C\n\n```\ny\n```\n"
    (tmp_path / "a.md").write_text(page)
    groups = [row.group for row in rows.rows(tmp_path, form, (), 99).rows]
    assert groups[0] == groups[1] != groups[2] and all(groups)


def test_other_languages_and_long_blocks_are_skipped(tmp_path: Path) -> None:
    """With their line and the reason."""
    got, skipped = made(tmp_path, "a.md", MARKDOWN, "code", "Python")
    assert len(got) == 1 and skipped == {"a.md:16": "code in sh, wanted python"}
    _, skipped = made(tmp_path, "a.rst", RST, "code", limit=5)
    assert skipped == {"a.rst:11": "8 characters of code, the limit is 5"}
    with pytest.raises(UsageError, match="languages are those of code blocks"):
        rows.rows(tmp_path, "text", ["python"], 99)


def test_a_fence_is_longer_than_those_in_the_code(tmp_path: Path) -> None:
    """A block that shows Markdown."""
    (row,), _ = made(tmp_path, "a.md", "# A\n\n~~~md\n```\nx\n```\n~~~\n", "code")
    assert row == {"prompt": "A\n\n````md\n", "completion": "```\nx\n```\n````"}


def test_what_is_skipped_is_told_with_its_line(tmp_path: Path) -> None:
    """Of files and of parts of pages."""
    (tmp_path / "a.md").write_text("lead\n\n# A\n\nx\n\n# Empty\n\n<!-- note -->\n")
    (tmp_path / "b.md").write_bytes(b"# D\n\xff\n")
    (tmp_path / "c.rst").write_text(".. comment\n\nLong\n====\n\n0123456789\n")
    os.mkfifo(tmp_path / "d.md")
    (tmp_path / "e.md").write_bytes(b"x" * (5 << 20))
    (tmp_path / ".hidden").mkdir()
    (tmp_path / ".hidden" / "f.md").write_text("# F\n\nx\n")
    (tmp_path / "other.txt").write_text("# no manual\nx")
    found = rows.rows(tmp_path, "prompt", (), 8)
    assert [row.content for row in found.rows] == [{"prompt": "A\n\n", "completion": "x"}]
    reasons = {skip.source: skip.reason for skip in found.skipped}
    assert reasons.pop("d.md").startswith("is a ")
    assert reasons == {
        "a.md:1": "text without a heading",
        "a.md:7": "a heading without text",
        "a.md:9": "a comment",
        "b.md": "is not UTF-8: invalid start byte at byte 4",
        "c.rst:1": "a comment",
        "c.rst:3": "10 characters, the limit is 8",
        "e.md": "has more than 4 MiB",
    }
    assert list(found.versions) == ["a.md", "b.md", "c.rst"], "what was read"


@pytest.mark.parametrize("name", ["docs", "docs.txt"])
def test_nothing_to_read(tmp_path: Path, name: str) -> None:
    """An absent path, and a file of another kind, are errors that say where."""
    if name.endswith("txt"):
        (tmp_path / name).write_text("x")
    with pytest.raises(DataError, match=f"{name}: (there|is) (is )?no "):
        rows.rows(tmp_path / name, "text", (), 99)


def test_the_manual_of_this_distribution() -> None:
    """Enough rows for the recipe, and all that was left out is what was meant to be."""
    found = rows.rows(MANUAL, "prompt", (), 4000)
    assert len(found.rows) == 16
    assert {skip.source: skip.reason for skip in found.skipped} == {
        "install.md:1": "front matter",
        "install.md:5": "a comment",
        "install.md:7": "a heading without text",
        "reference/commands.rst:4": "directive 'toctree' is not read",
        "reference/commands.rst:1": "a heading without text",
    }
    assert len(rows.rows(MANUAL, "code", (), 4000).rows) == 14


# --- Markdown -----------------------------------------------------------------


def test_markdown_as_commonmark_says() -> None:
    """Both kinds of headings and code, marks in headings, and what only looks like them."""
    page = "Two *lines*\nof `it`\n===\n\n    code\n\n#no heading\n\n"
    page += "> ```c\n> int x;\n> ```\n\n***\n\n``` {code-block} PY\nx\n"
    want: list[Part] = [
        Heading(1, 1, "Two lines of it"),
        Code(5, "", "code"),
        Text(7, "#no heading"),
        Code(9, "c", "int x;"),
        Code(15, "py", "x"),
    ]
    assert list(markdown.parts(page)) == want


def test_tables_and_definitions_of_links() -> None:
    """A table is text as it stands; where a link leads to is none."""
    page = "| a | b |\n|---|---|\n| 1 | 2 |\n\n[x]: http://example.org\n"
    assert list(markdown.parts(page)) == [Text(1, "| a | b |\n|---|---|\n| 1 | 2 |")]


# --- reStructuredText ---------------------------------------------------------


def test_roles_of_sphinx_are_their_text() -> None:
    """As a reader of the page sees them, but for links that only Sphinx can follow."""
    page = "See :func:`~a.b`, :py:meth:`!c`, :ref:`there <place>`, ``:d:x`` and *e*."
    assert list(rst.parts(page)) == [Text(1, "See a.b, c, there, :d:x and e.")]


def test_lists_tables_and_notes_are_plain_text() -> None:
    """Marks, indentation, cells."""
    page = """\
- a

  - b
- c

3. d
4. e

term
   What it is.

:field: f

== ==
1  2
3  4
== ==

.. note:: g

.. warning::

   h

| i
| j
"""
    got = [part.text for part in rst.parts(page) if isinstance(part, Text)]
    want = ["- a\n  - b\n- c", "3. d\n4. e", "term\n    What it is.", "field: f", "1 | 2\n3 | 4"]
    assert got == [*want, "Note: g", "Warning: h", "i\nj"]


def test_code_of_all_kinds() -> None:
    """With and without a language, in a doctest, and with options of Sphinx."""
    page = """\
So::

    a

>>> 1
1

.. sourcecode:: C
   :emphasize-lines: 1
   :caption: c

   b

.. code::

   c

.. tabs::

   .. tab:: one

      .. code-block:: sh

         d
"""
    got = [part for part in rst.parts(page) if not isinstance(part, Text)]
    want = [("", "a"), ("pycon", ">>> 1\n1"), ("c", "b"), ("", "c"), ("sh", "d")]
    assert [(part.language, part.text) for part in got if isinstance(part, Code)] == want
    assert len(got) == len(want)


def test_what_is_not_read_is_told(tmp_path: Path) -> None:
    """No other file is opened, and no directive is passed over in silence."""
    secret = tmp_path / "secret"
    secret.write_text("the secret")
    page = f"""\
.. include:: {secret}

.. raw:: html
   :file: {secret}

.. csv-table:: t
   :file: {secret}

.. literalinclude:: {secret}

.. autofunction:: f

   More.

== ==
1  2
==
"""
    got = list(rst.parts(page))
    assert "the secret" not in str(got)
    reasons = [part.reason for part in got if isinstance(part, Left)]
    names = ("include", "raw", "csv-table", "literalinclude", "autofunction")
    assert reasons[:5] == [f"directive '{name}' is not read" for name in names]
    assert reasons[5].startswith("is not read: Malformed table.")
    assert [part.line for part in got if isinstance(part, Left)] == [1, 3, 6, 9, 11, 17]


def test_pages_that_are_not_read_at_all(tmp_path: Path) -> None:
    """Lines that are too long for docutils, and lists that nest without end."""
    (tmp_path / "a.rst").write_text("Title\n=====\n\n" + "x" * 20_000)
    deep = "".join("  " * depth + "- x\n\n" for depth in range(400))
    (tmp_path / "b.rst").write_text(deep)
    (tmp_path / "c.md").write_text("# A\n\nx\n")
    found = rows.rows(tmp_path, "prompt", (), 99)
    reasons = {skip.source: skip.reason for skip in found.skipped}
    assert len(found.rows) == 1
    assert reasons["a.rst:1"] == "is not read: Line 4 exceeds the line-length-limit."
    assert reasons["b.rst"] == "blocks nest too deep in each other"


def test_a_configuration_of_docutils_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are a function of files and options."""
    (tmp_path / "docutils.conf").write_text("[general]\nsmart_quotes: yes\nhalt_level: 1\n")
    monkeypatch.chdir(tmp_path)
    assert list(rst.parts('"quoted" *text')) == [Text(1, '"quoted" *text')]
