"""reStructuredText -> parts, by docutils; nothing is read but the text itself, and nothing in it runs."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

from docutils import nodes
from docutils.core import publish_doctree
from docutils.parsers.rst import Directive, directives

from mlxlora_manuals.parts import Code, Heading, Left, Part, Text

_SETTINGS = {
    "_disable_config": True,  # no docutils.conf of the folder or of the user
    "file_insertion_enabled": False,
    "raw_enabled": False,
    "doctitle_xform": False,
    "docinfo_xform": False,
    "sectsubtitle_xform": False,
    "smart_quotes": False,
    "syntax_highlight": "none",
    "report_level": 5,  # what is wrong is in the tree, and nothing is printed
    "halt_level": 6,
    "input_encoding": "unicode",
}
_ERROR = 3  # the level of messages about what was not read
_TOO_LONG = "exceeds the line-length-limit."  # of a page, of which nothing is read then
_ROLE = re.compile(r":[\w.+:-]+:`(?:~|!)?([^`]*)`", re.DOTALL)  # of Sphinx, which docutils does not know
_TITLED = re.compile(r"(.*?)\s*<[^<>]*>\Z", re.DOTALL)
_DIRECTIVE = re.compile(r"\.\. ([\w:.+-]+)::")
#: what has no text to read, and loses none
_SILENT = (nodes.target, nodes.substitution_definition, nodes.pending, nodes.colspec, nodes.image)


class _Any(dict[str, Callable[[str], Any]]):
    """The options of a directive that takes all."""

    def __bool__(self) -> bool:
        return True

    def __getitem__(self, name: str) -> Callable[[str], Any]:
        return lambda value: value


class _CodeBlock(Directive):
    """A code block with any of the options that Sphinx has."""

    optional_arguments = 1
    option_spec: ClassVar[Any] = _Any()
    has_content = True

    def run(self) -> list[nodes.Node]:
        """The block, in the form of docutils."""
        block = nodes.literal_block("\n".join(self.content), "\n".join(self.content))
        block["classes"] = ["code", *self.arguments[:1]]
        block.line = self.lineno
        return [block]


class _Around(Directive):
    """What Sphinx puts around text: the text."""

    optional_arguments = 1
    final_argument_whitespace = True
    option_spec: ClassVar[Any] = _Any()
    has_content = True

    def run(self) -> list[nodes.Node]:
        """What is inside."""
        inside = nodes.container()
        self.state.nested_parse(self.content, self.content_offset, inside)
        return list(inside.children)


for _name in ("code", "code-block", "sourcecode", "code-cell"):
    directives.register_directive(_name, _CodeBlock)
for _name in ("only", "tabs", "tab", "tab-set", "tab-item", "seealso"):
    directives.register_directive(_name, _Around)


def parts(text: str) -> Iterator[Part]:
    """The parts of a page, in their order.

    Raises:
        RecursionError: it nests too deep.
    """
    tree = publish_doctree(text, settings_overrides=_SETTINGS)
    for problem in list(tree.findall(nodes.problematic)):
        problem.parent.replace(problem, nodes.Text(_ROLE.sub(_of_role, problem.astext())))
    return _Walk(text).parts(tree, 0)


def _of_role(match: re.Match[str]) -> str:
    """What a reader sees of a role that docutils does not know."""
    titled = _TITLED.match(match[1])
    return titled[1] if titled and titled[1] else match[1]


class _Walk:
    """Goes through a tree; a node without a line has that of the one before."""

    def __init__(self, text: str) -> None:
        self._lines, self.line = text.split("\n"), 1

    def parts(self, node: nodes.Element, level: int) -> Iterator[Part]:
        """The parts below a node, whose headings have this level."""
        for child in node.children:
            if isinstance(child, nodes.section):
                yield from self.parts(child, level + 1)
                continue
            self.line = self._begin(child)
            if isinstance(child, nodes.title):
                yield Heading(self.line, level, child.astext())
            elif isinstance(child, nodes.system_message):
                yield from self._left(child)
            elif isinstance(child, nodes.comment):
                yield Left(self.line, "a comment")
            elif isinstance(child, nodes.literal_block | nodes.doctest_block):
                yield Code(self.line, _language(child), child.astext().strip("\n"))
            elif isinstance(child, nodes.Element) and not isinstance(child, _SILENT):
                yield from self._prose(child, level)

    def _begin(self, node: nodes.Node) -> int:
        """The line of a node; docutils gives that below a title or a comment, or some line of it."""
        last: int = getattr(node, "line", None) or self.line
        if not isinstance(node, nodes.title | nodes.comment):
            return last
        first = node.rawsource.split("\n")[0].strip()
        above = range(min(last, len(self._lines)), self.line - 1, -1)
        return next((line for line in above if self._lines[line - 1].strip().endswith(first)), last)

    def _prose(self, node: nodes.Element, level: int) -> Iterator[Part]:
        """A paragraph, list or the like; its parts one by one where there is code in it."""
        if any(node.findall(_stands_alone)):
            yield from self.parts(node, level)
        elif text := shown(node).strip():
            yield Text(self.line, text)

    def _left(self, message: nodes.system_message) -> Iterator[Left]:
        """What docutils did not read."""
        said, source = message.children[0].astext(), next(message.findall(nodes.literal_block), None)
        name = _DIRECTIVE.match(source.astext()) if source else None
        if name or (message["level"] >= _ERROR and (source or said.endswith(_TOO_LONG))):
            reason = f"directive '{name[1]}' is not read" if name else f"is not read: {said}"
            yield Left(message.get("line", self.line), " ".join(reason.split()))


def _stands_alone(node: nodes.Node) -> bool:
    return isinstance(node, nodes.literal_block | nodes.doctest_block | nodes.system_message | nodes.comment)


def _language(block: nodes.Element) -> str:
    if isinstance(block, nodes.doctest_block):
        return "pycon"
    classes = block["classes"]
    return str(classes[1]).lower() if classes[:1] == ["code"] and len(classes) > 1 else ""


def shown(node: nodes.Node) -> str:
    """A node as plain text: items of lists behind a mark, cells of tables beside each other."""
    if isinstance(node, nodes.Text | nodes.TextElement):
        return node.astext()
    inner = [text for child in node.children if not isinstance(child, _SILENT) if (text := shown(child))]
    if isinstance(node, nodes.list_item):
        number = node.parent.index(node) + node.parent.get("start", 1)
        mark = f"{number}. " if isinstance(node.parent, nodes.enumerated_list) else "- "
        return mark + _indented("\n".join(inner), len(mark))
    if isinstance(node, nodes.definition):
        return "    " + _indented("\n".join(inner), 4)
    if isinstance(node, nodes.field):
        return ": ".join(inner)
    if isinstance(node, nodes.row):
        return " | ".join(inner)
    if isinstance(node, nodes.Admonition) and not isinstance(node, nodes.admonition):
        return f"{type(node).__name__.capitalize()}: " + "\n".join(inner)
    lists = nodes.bullet_list | nodes.enumerated_list | nodes.definition_list_item | nodes.field_list
    tight = lists | nodes.thead | nodes.tbody | nodes.tgroup | nodes.line_block
    return ("\n" if isinstance(node, tight) else "\n\n").join(inner)


def _indented(text: str, width: int) -> str:
    """Every line but the first that much further right."""
    return text.replace("\n", "\n" + " " * width)
