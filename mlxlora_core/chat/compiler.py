"""Templates to Python code in which every loop and every value that may be large is counted."""

from __future__ import annotations

from typing import Any, NoReturn

from jinja2 import nodes
from jinja2.compiler import CodeGenerator, Frame, operators

_MACRO_UNITS = 64
_CHARACTERS_PER_UNIT = 4


class CountingGenerator(CodeGenerator):
    """Jinja's generator of code, with calls of the environment's counters put in.

    Constants are not computed ahead: whatever a template computes, it computes while it is counted.
    """

    def visit_Template(self, node: nodes.Template, frame: Frame | None = None) -> None:
        """The whole template, which costs what its nodes cost once."""
        node.body.insert(0, _tick(node.body))
        super().visit_Template(node, frame)

    def visit_For(self, node: nodes.For, frame: Frame) -> None:
        """A loop: each turn costs what its body and its filter cost once."""
        if node.test is not None:
            count = nodes.Call(
                nodes.EnvironmentAttribute("tick"), [nodes.Const(_units([node.test]))], [], None, None
            )
            node.test = nodes.And(count, node.test).set_lineno(node.lineno)
        node.body.insert(0, _tick(node.body))
        super().visit_For(node, frame)

    def macro_body(self, node: Any, frame: Frame) -> Any:
        """What a macro or a call does each time."""
        node.body.insert(0, _tick(node.body))
        return super().macro_body(node, frame)

    def visit_ExprStmt(self, node: nodes.ExprStmt, frame: Frame) -> None:
        """A count; no template can say such a statement itself."""
        assert isinstance(node.node, nodes.Const)
        self.writeline(f"environment.tick({node.node.value})")

    def _output_child_to_const(self, node: nodes.Expr, frame: Frame, finalize: Any) -> str:
        if not isinstance(node, nodes.TemplateData):
            raise nodes.Impossible
        return super()._output_child_to_const(node, frame, finalize)

    def _output_child_pre(self, node: nodes.Expr, frame: Frame, finalize: Any) -> None:
        super()._output_child_pre(node, frame, finalize)
        self.write("environment.weighed(")

    def _output_child_post(self, node: nodes.Expr, frame: Frame, finalize: Any) -> None:
        self.write(")")
        super()._output_child_post(node, frame, finalize)

    def visit_List(self, node: nodes.List, frame: Frame) -> None:
        """A list that is made."""
        self.write("environment.made(")
        super().visit_List(node, frame)
        self.write(")")

    def visit_Tuple(self, node: nodes.Tuple, frame: Frame) -> None:
        """A tuple that is made, or names that values are given to."""
        if node.ctx == "store":
            super().visit_Tuple(node, frame)
        else:
            self.write("environment.made(")
            super().visit_Tuple(node, frame)
            self.write(")")

    def visit_Dict(self, node: nodes.Dict, frame: Frame) -> None:
        """An object that is made; its keys are hashed with all that they hold."""
        self.write("environment.made({")
        for place, pair in enumerate(node.items):
            self.write(", " if place else "")
            self._weighed(pair.key, frame)
            self.write(": ")
            self.visit(pair.value, frame)
        self.write("})")

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        """Values joined as text."""
        self.write("environment.joined((")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write("))")

    def visit_Compare(self, node: nodes.Compare, frame: Frame) -> None:
        """Values that are compared with all that they hold."""
        self.write("(")
        self._weighed(node.expr, frame)
        for operand in node.ops:
            self.visit(operand, frame)
        self.write(")")

    def visit_Operand(self, node: nodes.Operand, frame: Frame) -> None:
        """What a value is compared with."""
        self.write(f" {operators[node.op]} ")
        self._weighed(node.expr, frame)

    def visit_Getitem(self, node: nodes.Getitem, frame: Frame) -> None:
        """A value out of another one; a slice is a new value."""
        new = isinstance(node.arg, nodes.Slice)
        self.write("environment.made(" if new else "")
        super().visit_Getitem(node, frame)
        self.write(")" if new else "")

    def _weighed(self, node: nodes.Expr, frame: Frame) -> None:
        constant = isinstance(node, nodes.Const)
        self.write("" if constant else "environment.weighed(")
        self.visit(node, frame)
        self.write("" if constant else ")")

    def _refuse(self, node: nodes.Node, frame: Frame | None = None) -> NoReturn:
        self.fail(f"a chat template has no {type(node).__name__.lower()}", node.lineno)

    visit_Block = _refuse
    visit_Extends = _refuse
    visit_Include = _refuse
    visit_Import = _refuse
    visit_FromImport = _refuse
    visit_EvalContextModifier = _refuse
    visit_ScopedEvalContextModifier = _refuse


def _tick(body: list[nodes.Node]) -> nodes.Node:
    """The statement that counts what the others cost."""
    line = body[0].lineno if body else 1
    return nodes.ExprStmt(nodes.Const(_units(body))).set_lineno(line)


def _units(body: list[Any]) -> int:
    """What the nodes of a piece of a template cost once, at most."""
    units, waiting = 2, list(body)
    while waiting:
        node = waiting.pop()
        units += 1
        if isinstance(node, nodes.TemplateData):
            units += len(node.data) // _CHARACTERS_PER_UNIT
        elif isinstance(node, nodes.Macro | nodes.CallBlock):
            units += _MACRO_UNITS
        waiting += node.iter_child_nodes()
    return units
