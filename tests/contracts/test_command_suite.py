"""The conformance suite of commands over one that is sound, and what it must find."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import click
import pytest

from mlxlora_core.errors import UsageError
from mlxlora_core.specs import Command
from mlxlora_core.testing.command import CommandSuite


@click.group()
def words() -> None:
    """Count words."""


@words.command()
@click.argument("text", nargs=-1)
@click.option("--least", type=int, default=0, help="Leave out shorter ones.")
def count(text: Sequence[str], least: int) -> None:
    """Print how many there are."""
    if least > 99:
        raise UsageError("no word is so long")
    click.echo(sum(len(word) >= least for word in text))


class TestWords(CommandSuite):
    spec = Command(name="words", summary="counts words", command=lambda: words)
    lines = (["count", "a", "bb"], ["count", "a", "bb", "--least", "2"])
    bad_lines = (["count", "--least", "many"], ["count", "--least", "100"], ["sum"])

    def check(self, words: Sequence[str], printed: str) -> None:
        assert printed == ("1\n" if "--least" in words else "2\n")


class Suite(TestWords):
    """The suite as a tool, for commands that are broken on purpose."""

    __test__ = False


def suite(make: Callable[[], click.Command], name: str = "bad") -> Suite:
    made = Suite()
    made.spec = Command(name=name, summary="s", command=make)
    return made


def callback(plugin: str = "", depth: int = 0) -> None:
    """Do something."""


def test_faults_are_found(capfd: pytest.CaptureFixture[str]) -> None:
    plain = click.Command("bad", callback=callback)
    with pytest.raises(AssertionError):
        suite(lambda: "bad").test_it_makes_a_click_command()  # type: ignore[arg-type,return-value]  # the fault
    with pytest.raises(AssertionError):
        suite(lambda: plain, "train").test_mlxlora_has_no_verb_of_that_name()
    with pytest.raises(AssertionError, match="bad has no help"):
        suite(lambda: plain).test_it_says_what_it_does()
    unsaid = click.Command("bad", callback=callback, help="h", params=[click.Option(["--depth"])])
    with pytest.raises(AssertionError, match="--depth has no help"):
        suite(lambda: unsaid).test_it_says_what_it_does()
    taking = click.Command("bad", callback=callback, params=[click.Option(["-P", "--plugin"])])
    with pytest.raises(AssertionError, match="-P"):
        suite(lambda: taking).test_it_leaves_the_flags_of_mlxlora_alone()
    loud = click.Command("bad", add_help_option=False, context_settings={"ignore_unknown_options": True})
    with pytest.raises((AssertionError, click.UsageError)):
        suite(lambda: loud).test_help_is_printed_and_nothing_done(capfd)
    lax = click.Command("bad", context_settings={"ignore_unknown_options": True, "allow_extra_args": True})
    with pytest.raises(pytest.fail.Exception):
        suite(lambda: lax).test_an_unknown_option_is_refused(capfd)
    with pytest.raises(pytest.fail.Exception):
        suite(lambda: lax).test_lines_that_it_refuses(["--no"], capfd)
