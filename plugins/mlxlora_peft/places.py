"""Which modules an adapter is on, and which numbers differ by module, as a config of PEFT says them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from mlxlora_peft.patterns import most_common

_LAYER = re.compile(r"(?:.*\.)?layers\.(\d+)\.(.+)")
_EMBEDDING = "embed_tokens"


def is_embedding(path: str) -> bool:
    """Whether a module, or its weight, is the embedding."""
    return path.removesuffix(".weight").rpartition(".")[2] == _EMBEDDING


def targets(paths: Sequence[str], layers: int, *, can_choose_layers: bool = True) -> dict[str, Any]:
    """``target_modules``, and the layers where they are not all.

    Short names where those say it; else the whole path of each.

    Args:
        paths: of the modules.
        layers: how many the model has.
        can_choose_layers: whether this kind of adapter has ``layers_to_transform``.
    """
    matches = {path: _LAYER.fullmatch(path) for path in paths}
    by_layer: dict[int, set[str]] = {}
    outside = sorted(path for path, match in matches.items() if match is None)
    for match in filter(None, matches.values()):
        by_layer.setdefault(int(match[1]), set()).add(match[2].rpartition(".")[2])
    each = set().union(*by_layer.values())
    is_even = all(names == each for names in by_layer.values()) and sum(map(len, by_layer.values())) == len(
        paths
    ) - len(outside)
    every = sorted(by_layer) == list(range(layers))
    if is_even and (every or not by_layer):
        told = sorted({*each, *(path.rpartition(".")[2] for path in outside)})
        return {"target_modules": told, **({"layers_to_transform": None} if can_choose_layers else {})}
    if is_even and not outside and can_choose_layers:
        return {
            "target_modules": sorted(each),
            "layers_to_transform": sorted(by_layer),
            "layers_pattern": "layers",
        }
    return {"target_modules": sorted(paths), **({"layers_to_transform": None} if can_choose_layers else {})}


def number_patterns(numbers: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The number that most modules have, and pattern -> number of those that have another one.

    Args:
        numbers: path of a module -> its number.
    """
    common = most_common(numbers)
    of_name: dict[str, set[Any]] = {}
    for path, number in numbers.items():
        of_name.setdefault(path.rpartition(".")[2], set()).add(number)
    patterns = {}
    for path, number in numbers.items():
        if number != common:
            name = path.rpartition(".")[2]
            patterns[name if len(of_name[name]) == 1 else re.escape(path)] = number
    return common, dict(sorted(patterns.items()))
