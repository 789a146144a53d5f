"""Dataset builder ``docstrings``: the docstrings of packages as questions and answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from mlxlora_core.api import DatasetBuilder, Rows, hookimpl, option


@dataclass(frozen=True)
class DocstringOptions:
    """Which packages are read, and how."""

    packages: tuple[str, ...] = option(("mlx",), help="packages to read, by the name that import takes")
    seq_limit: int = option(
        2048, help="longest docstring; longer ones are left out", unit="characters", minimum=1
    )
    rows: str = option(
        "text",
        help="text: question and answer as one text; prompt: the two apart; messages: a conversation",
        choices=("text", "prompt", "messages"),
    )
    preprocess: bool = option(
        False, help="lower case, no punctuation, no stop words and crude lemmas in the docstring"
    )
    workers: int | None = option(
        None, help="packages read side by side; none or 0 is one for each cpu that may be used", minimum=0
    )
    mode: str = option(
        "import",
        help="import: look at live objects in a child process; static: read the sources, run nothing",
        choices=("import", "static"),
    )
    time_limit: float = option(
        120.0,
        help="longest that reading one package may take, all attempts together",
        unit="seconds",
        above=0,
        maximum=10_000_000,
    )

    def __post_init__(self) -> None:
        if not self.packages:
            raise ValueError("packages is empty: there is nothing to read")


def build(options: DocstringOptions) -> Rows:
    """The rows of ``options.packages``, sorted by path.

    Raises:
        DataError: no package gave a row.
    """
    from mlxlora_docstrings.packages import build_rows

    return build_rows(options)


def inputs(options: DocstringOptions) -> Mapping[str, str]:
    """Package -> version, or the state of its sources when no distribution brought it."""
    from mlxlora_docstrings.versions import states

    return states(options.packages)


@hookimpl
def mlxlora_dataset_builders() -> list[DatasetBuilder]:
    """Docstrings."""
    return [
        DatasetBuilder(
            name="docstrings",
            summary="Docstrings of installed packages as questions and answers",
            options=DocstringOptions,
            build=build,
            inputs=inputs,
        )
    ]
