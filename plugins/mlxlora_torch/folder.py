"""The parts of a checkpoint folder: which files there are, and what params.json says."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from mlxlora_core.api import ModelError, listing
from mlxlora_core.files import read_json

PARAMS = "params.json"
TOKENIZER = "tokenizer.model"
_SHARD = re.compile(r"consolidated\.([0-9]{1,9})\.pth")
_VERSION = re.compile(r"tokenizer\.model\.v[0-9]{1,4}(m[0-9]{1,4})?")
_OTHER_TOKENIZERS = ("tekken.json", "tokenizer.json", "tokenizer_config.json")
_PARAMS_LIMIT_BYTES = 1 << 20


@dataclass(frozen=True)
class Parts:
    """The files of a checkpoint.

    Attributes:
        shards: the ``.pth`` files by their number, 0 first.
        params: ``params.json``.
        tokenizer: ``tokenizer.model``, or one with its version behind that name.
        notes: what was taken that is not called as usual, in words.
    """

    shards: tuple[Path, ...]
    params: Path
    tokenizer: Path
    notes: tuple[str, ...] = ()


def find_parts(folder: Path) -> Parts:
    """The files of the checkpoint in ``folder``.

    Raises:
        ModelError: a part is absent, a shard number is missing or there twice,
            or a ``consolidated.*.pth`` has no number (all listed).
    """
    try:
        names = sorted(os.listdir(folder))
    except OSError as fault:
        raise ModelError(f"cannot be read: {fault.strerror}", where=folder) from None
    numbered: dict[int, list[str]] = {}
    extra = []
    for name in names:
        if match := _SHARD.fullmatch(name):
            numbered.setdefault(int(match[1]), []).append(name)
        elif name.startswith("consolidated.") and name.endswith(".pth"):
            extra.append(name)
    faults = _number_faults(numbered)
    faults += [f"{name} is no numbered shard" for name in extra]
    tokenizer = _tokenizer(names)
    faults += [f"{name} is missing" for name in (PARAMS,) if name not in names]
    faults += [] if tokenizer else [_no_tokenizer(names)]
    if faults:
        raise ModelError(
            listing(faults),
            where=folder,
            fix=f"put all consolidated.NN.pth of one model there, from 00 on, with {PARAMS} and {TOKENIZER}",
        )
    shards = tuple(folder / numbered[number][0] for number in sorted(numbered))
    notes = (f"{tokenizer} is taken for {TOKENIZER}",) if tokenizer != TOKENIZER else ()
    return Parts(shards, folder / PARAMS, folder / tokenizer, notes)


def _tokenizer(names: Sequence[str]) -> str:
    """The file of the tokenizer, or nothing; Mistral's have their version behind the name."""
    if TOKENIZER in names:
        return TOKENIZER
    versions = [name for name in names if _VERSION.fullmatch(name)]
    return versions[0] if len(versions) == 1 else ""


def _no_tokenizer(names: Sequence[str]) -> str:
    """What to say where no tokenizer is found: which files look like one."""
    like = [name for name in names if name.startswith(TOKENIZER) or name in _OTHER_TOKENIZERS]
    there = f" (there is {listing(like)}, which is not read under that name)" if like else ""
    return f"{TOKENIZER} is missing{there}"


def shard_name(number: int) -> str:
    """The file name of a shard: ``consolidated.07.pth``."""
    return f"consolidated.{number:02d}.pth"


def read_params(path: Path) -> Mapping[str, Any]:
    """The object in params.json, as it stands there.

    Raises:
        ModelError: it is no JSON object (with line and column), or a key is there twice.
    """
    params = read_json(path, _PARAMS_LIMIT_BYTES)
    if not isinstance(params, dict):
        raise ModelError(f"holds a {type(params).__name__}, wanted an object", where=path)
    return params


def _number_faults(numbered: Mapping[int, list[str]]) -> list[str]:
    """What is wrong with the numbers of the shards; they must be 0, 1, 2 and so on."""
    if not numbered:
        return [f"{shard_name(0)} is missing"]
    faults = [f"{' and '.join(names)} have one number" for names in numbered.values() if len(names) > 1]
    gaps = max(numbered) + 1 - len(numbered)
    if gaps:
        # A stray number may be huge: only the first gaps are spelt out.
        absent = (shard_name(n) for n in range(max(numbered)) if n not in numbered)
        there = listing(names[0] for _, names in sorted(numbered.items()))
        rest = f" and {gaps - 10} more" if gaps > 10 else ""
        faults.append(f"{', '.join(islice(absent, 10))}{rest} missing beside {there}")
    return faults
