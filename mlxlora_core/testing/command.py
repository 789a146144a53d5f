"""The conformance suite of commands.

Subclass :class:`CommandSuite` in a test file and run it with pytest::

    class TestMyCommand(CommandSuite):
        spec = my_plugin.COMMAND
        lines = (["--count", "3"],)

        def check(self, words, printed): ...
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import click
import pytest

from mlxlora_core.cli.verbs import VERBS
from mlxlora_core.errors import MlxloraError
from mlxlora_core.specs import Command

#: what mlxlora reads itself from the words of every verb
OWN_FLAGS = {"-P", "--plugin", "--debug"}


class CommandSuite:
    """What every command must do.

    Attributes:
        spec: the command.
        lines: words behind the name of the verb that it must take, and do what they say.
        bad_lines: words that it must refuse.
    """

    spec: Command
    lines: Sequence[Sequence[str]] = ()
    bad_lines: Sequence[Sequence[str]] = ()

    def check(self, words: Sequence[str], printed: str) -> None:
        """Look at what came of one of ``lines``, and what was printed on stdout; nothing by default."""

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Try every line."""
        for name, lines in (("words", self.lines), ("bad_words", self.bad_lines)):
            if name in metafunc.fixturenames:
                metafunc.parametrize(name, lines, ids=[" ".join(line) or "alone" for line in lines])

    # --- what the tests are made of ---

    def call(self, words: Sequence[str]) -> int:
        """Run the command as ``mlxlora NAME WORDS`` does; its exit code."""
        parent = click.Context(
            click.Group("mlxlora"), info_name="mlxlora", help_option_names=["-h", "--help"]
        )
        command = self.spec.command()
        try:
            with command.make_context(self.spec.name, [*words], parent=parent) as ctx:
                command.invoke(ctx)
        except click.exceptions.Exit as end:
            return end.exit_code
        return 0

    def commands(self) -> Iterator[tuple[str, click.Command]]:
        """The command and all below it, each with the words that call it."""
        left: list[tuple[str, click.Command]] = [(self.spec.name, self.spec.command())]
        while left:
            name, command = left.pop()
            yield name, command
            if isinstance(command, click.Group):
                ctx = click.Context(command, info_name=name)
                found: Mapping[str, Any] = {
                    inner: command.get_command(ctx, inner) for inner in command.list_commands(ctx)
                }
                left += [(f"{name} {inner}", one) for inner, one in found.items() if one is not None]

    # --- the tests ---

    def test_it_makes_a_click_command(self) -> None:
        """A command, or a group of them; made as often as it is asked for."""
        assert isinstance(self.spec.command(), click.Command)
        assert isinstance(self.spec.command(), click.Command)

    def test_mlxlora_has_no_verb_of_that_name(self) -> None:
        """One of mlxlora's own comes first; this one would be called by its full id alone."""
        assert self.spec.name not in VERBS

    def test_it_says_what_it_does(self) -> None:
        """It has a help text, and so have its options."""
        for name, command in self.commands():
            assert inspect.cleandoc(command.help or "").strip(), f"{name} has no help"
            for parameter in command.params:
                if isinstance(parameter, click.Option) and not parameter.hidden:
                    assert parameter.help, f"{name}: {parameter.opts[0]} has no help"

    def test_it_leaves_the_flags_of_mlxlora_alone(self) -> None:
        """``-P`` and ``--debug`` never come to it."""
        for name, command in self.commands():
            for parameter in command.params:
                taken = OWN_FLAGS & {*parameter.opts, *parameter.secondary_opts}
                assert not taken, f"{name} has {sorted(taken)}, which mlxlora reads itself"

    def test_help_is_printed_and_nothing_done(self, capfd: pytest.CaptureFixture[str]) -> None:
        """``--help`` prints how it is called, on stdout, and ends well."""
        for name, _ in self.commands():
            words = name.split()[1:]
            assert self.call([*words, "--help"]) == 0
            printed = capfd.readouterr()
            assert printed.out.startswith(f"Usage: mlxlora {name}")
            assert printed.err == ""

    def test_an_unknown_option_is_refused(self, capfd: pytest.CaptureFixture[str]) -> None:
        """As in every verb."""
        with pytest.raises(click.UsageError):
            self.call(["--no-such-option-of-this-verb"])
        assert capfd.readouterr().out == ""

    def test_lines_that_it_takes(self, words: Sequence[str], capfd: pytest.CaptureFixture[str]) -> None:
        """It does what they say, and ends well."""
        assert self.call(words) == 0
        self.check(words, capfd.readouterr().out)

    def test_lines_that_it_refuses(self, bad_words: Sequence[str], capfd: pytest.CaptureFixture[str]) -> None:
        """By an error of click or of mlxlora's, and with nothing on stdout."""
        with pytest.raises((click.ClickException, MlxloraError)):
            self.call(bad_words)
        assert capfd.readouterr().out == ""
