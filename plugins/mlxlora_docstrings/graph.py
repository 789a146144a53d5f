"""Names: which are public, which of an object's many is the shortest, and each object once."""

from __future__ import annotations

import heapq
import itertools
import re
from collections.abc import Callable, Hashable, Iterable, Iterator
from typing import Generic, NamedTuple, TypeVar

T = TypeVar("T")

NAME_CHARACTERS = 255  # of a name; a longer one is made, and asked for by nobody
NO_DOCSTRING = "it has no docstring of its own"

PARTS_LIMIT = 12  # parts of a path; deeper than this only a graph without an end goes
PATHS_LIMIT = 2_000_000  # several times what the largest packages have

_TESTS = re.compile(r"^(.*_)?tests?$|^conftest$")
_FOREIGN = {"_vendor", "_vendored"}


class Child(NamedTuple, Generic[T]):
    """Something found in a module or a class.

    Attributes:
        name: what it is called there.
        inherited: whether it is defined in a base class.
        thing: a live object, or what stands for one in a source.
    """

    name: str
    inherited: bool
    thing: T


def is_public(name: str) -> bool:
    """Whether a name, not a path, is one that somebody would write, without a leading underscore."""
    return not name.startswith("_") and len(name) <= NAME_CHARACTERS and name.isidentifier()


def is_public_path(path: str) -> bool:
    """Whether no part of a path has a leading underscore."""
    return all(map(is_public, path.split(".")))


def is_read(module: str, package: str) -> bool:
    """Whether a module of a package is worth reading: tests, scripts and vendored libraries are not.

    Private modules are: much of what a large package documents lives in them
    alone, and what is re-exported gets its public path anyway. Those inside a
    ``testing`` package are test suites and need test libraries. What was asked
    for by name is read, whatever it is called.
    """
    if module == package:
        return True
    parts = module.removeprefix(package + ".").split(".")
    if any(part in _FOREIGN or part.startswith("__") or _TESTS.search(part) for part in parts):
        return False
    return not any(a == "testing" and not is_public(b) for a, b in itertools.pairwise(module.split(".")))


def rank(path: str, inherited: bool) -> tuple[int, bool, int, int, str]:
    """Sorts the best path first: public, where it is defined, few parts, few letters, alphabet."""
    parts = path.split(".")
    return sum(not is_public(part) for part in parts), inherited, len(parts), len(path), path


class Names:
    """Which names things have where they have their row, and which others where they stand.

    What a module imports is no other name of a thing; a second name in the module or class of
    its row is, and one that stands in the body of another class.
    """

    def __init__(self) -> None:
        self._best: dict[Hashable, str] = {}
        self._places: list[tuple[str, str, bool, Hashable]] = []

    def tell(self, path: str, thing: Hashable) -> None:
        """A thing has its row under ``path``."""
        self._best[thing] = path

    def stand(self, place: str, name: str, is_class: bool, thing: Hashable) -> None:
        """A thing is called ``name`` in a module or in the body of a class."""
        if is_public_path(place):
            self._places.append((place, name, is_class, thing))

    def others(self) -> Iterator[tuple[str, str]]:
        """Another name of a thing, or a class that has things of others, and the reason for no row."""
        for place, name, is_class, thing in self._places:
            best = self._best.get(thing, "")
            home = best.rpartition(".")[0]
            if home == place and best != f"{place}.{name}":
                yield f"{place}.{name}", f"it is another name of {best}"
            elif is_class and best and home != place:
                yield f"{place}.*", f"it has members that are those of another class, as {name} of {home}"


def shortest_paths(
    starts: Iterable[tuple[str, T]],
    children: Callable[[str, T], Iterable[Child[T]]],
    identity: Callable[[T], Hashable],
) -> Iterator[tuple[str, T]]:
    """Each thing that can be reached, once, under its best path, best paths first.

    Dijkstra's search: a child ranks after its parent, so the first path under
    which a thing is met is its best. Of two things with one path, such as a
    function and the module that it hides, the child has it; the other is
    searched but not given.

    Args:
        starts: path -> thing, for the modules.
        children: what is in a module or a class; the search follows a path for
            no more than :data:`PARTS_LIMIT` parts.
        identity: what two paths to one thing have in common.

    Raises:
        OverflowError: there are more than :data:`PATHS_LIMIT` paths.
    """
    numbers = itertools.count()  # keep the heap from comparing things; those of children are lower
    heap = [(rank(path, False), PATHS_LIMIT + i, path, thing) for i, (path, thing) in enumerate(starts)]
    heapq.heapify(heap)
    seen: set[Hashable] = set()
    taken: set[str] = set()
    while heap:
        order, _, path, thing = heapq.heappop(heap)
        if identity(thing) in seen:
            continue
        seen.add(identity(thing))
        if path not in taken:
            taken.add(path)
            yield path, thing
        if order[2] >= PARTS_LIMIT:
            continue
        for name, inherited, child in children(path, thing):
            if identity(child) in seen:
                continue
            number = next(numbers)
            if number >= PATHS_LIMIT:
                raise OverflowError(f"it has more than {PATHS_LIMIT} names; the rest was left out")
            longer = f"{path}.{name}"
            heapq.heappush(heap, (rank(longer, order[1] or inherited), number, longer, child))
