"""What the suite of architectures asks of the arguments of a model, and of how they are read."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import pytest

from mlxlora_core.errors import ModelError
from mlxlora_core.model.architectures import folder_args
from mlxlora_core.options import explain, plain
from mlxlora_core.specs import Architecture, Layout

#: what a whole number in a config may be instead
IMPOSSIBLE = (10**18, 2.5, "7", True, [3], float("nan"))


class ArgumentTests:
    """The part of :class:`mlxlora_core.testing.architecture.ArchitectureSuite` that is about arguments."""

    spec: Architecture
    raw: Mapping[str, Any]
    checkpoint: Mapping[str, tuple[int, ...]]
    sizes: tuple[str, ...]

    def reader(self) -> Architecture | Layout:
        """What reads ``raw``."""
        raise NotImplementedError  # LayoutTests has it

    def read(self, raw: Mapping[str, Any]) -> Any:
        """The arguments that the architecture reads out of a foreign config."""
        raise NotImplementedError  # LayoutTests has it

    def test_args_are_read_back(self) -> None:
        """What config.json holds gives the same arguments, and no key that they do not have is let pass."""
        args = self.read(self.raw)
        assert isinstance(args, self.spec.args)
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(args, dataclasses.fields(args)[0].name, None)
        written = json.loads(json.dumps(plain(args)))
        assert folder_args(self.spec, written) == args
        without_nulls = {key: value for key, value in written.items() if value is not None}
        assert folder_args(self.spec, without_nulls) == args
        cores_own = {"model_type": self.spec.model_types[0], "quantization": {}, "tokenizer_files": ["a"]}
        assert folder_args(self.spec, {**cores_own, **written}) == args
        with pytest.raises(ModelError, match="no_such_key"):
            folder_args(self.spec, {**written, "no_such_key": 1})

    def test_every_number_is_bounded(self) -> None:
        """A whole number in config.json is one, and not so large that building it would never end."""
        written = plain(self.read(self.raw))
        for option in explain(self.spec.args):
            if option.type_name.startswith("integer"):
                for value in IMPOSSIBLE:
                    with pytest.raises(ModelError, match=option.name):
                        folder_args(self.spec, {**written, option.name: value})

    def test_impossible_sizes_are_refused(self) -> None:
        """A size of a foreign config that makes no sense is an error that names it, whatever it is."""
        for key in self.sizes:
            for value in (0, *IMPOSSIBLE):
                with pytest.raises(ModelError, match=key):
                    self.read({**self.raw, key: value})

    def test_a_key_that_is_missing_is_no_crash(self) -> None:
        """A foreign config without one of its sizes is read, by a default, or is a ModelError."""
        for key in self.sizes:
            with suppress(ModelError):
                self.read({name: value for name, value in self.raw.items() if name != key})

    def test_all_faults_are_told_at_once(self) -> None:
        """Every impossible size is named in one error."""
        with pytest.raises(ModelError) as fault:
            self.read({**self.raw, **dict.fromkeys(self.sizes, "x")})
        assert [key for key in self.sizes if key not in str(fault.value)] == []

    def test_knows_its_own_configs_alone(self) -> None:
        """The config of something else is not taken for its own."""
        for raw in ({}, {"architectures": ["Other"]}, {"model_type": "no-such-type"}):
            assert self.reader().read(raw, {}) is None
            assert self.reader().read(raw, self.checkpoint) is None
        assert all(self.spec.model_types)
