"""The three components against mlxlora's conformance suites, and what those cannot know."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlxlora_example
import numpy as np

from mlxlora_core.api import NoOptions, Place
from mlxlora_core.testing.adapter import AdapterSuite
from mlxlora_core.testing.dataset_builder import DatasetBuilderSuite
from mlxlora_core.testing.sampler import SamplerSuite


class TestMarkdown(DatasetBuilderSuite):
    """Dataset builder ``markdown``."""

    spec = next(iter(mlxlora_example.mlxlora_dataset_builders()))

    def sources(self, folder: Path) -> Mapping[str, Any]:
        """Two files; two headings have one text."""
        (folder / "a.md").write_text("# A\nsame\n# B\nsame\n# C\nother\n")
        (folder / "b.md").write_text("".join(f"# Heading {i}\ntext {i}\n" for i in range(20)))
        return {"path": str(folder)}

    def poor_sources(self, folder: Path) -> Mapping[str, Any]:
        """A file that is no text, and a heading without any."""
        values = self.sources(folder)
        (folder / "c.md").write_bytes(b"\xff")
        (folder / "d.md").write_text("# Empty\n")
        return values

    def empty_sources(self, folder: Path) -> Mapping[str, Any]:
        """A heading without text, and nothing else."""
        (folder / "a.md").write_text("# Empty\n")
        return {"path": str(folder)}

    def change(self, folder: Path) -> None:
        """Another text below the last heading."""
        with (folder / "b.md").open("a") as file:
            file.write("more\n")


class TestScaling(AdapterSuite):
    """Adapter ``scaling``."""

    spec = next(iter(mlxlora_example.mlxlora_adapters()))

    def test_one_factor_for_each_input(self) -> None:
        """As many parameters as inputs, and each scales its own input."""
        module = self.spec.wrap(nn.Linear(3, 2, bias=False), Place("layers.0.w", 0, (2, 3)), NoOptions())
        assert module.scale.shape == (3,)
        module.scale = mx.array([0.0, 1.0, -1.0])
        x = mx.array([[1.0, 1.0, 1.0]])
        assert mx.allclose(module(x), module.linear(mx.array([[1.0, 2.0, 0.0]])), atol=1e-6)


class TestTypical(SamplerSuite):
    """Sampler ``typical``."""

    spec = next(iter(mlxlora_example.mlxlora_samplers()))
    option_sets = ({}, {"mass": 0.3}, {"mass": 1}, {"temp": 0.5, "mass": 0.7})
    bad_options: Sequence[dict[str, Any]] = ({"temp": -1}, {"mass": 0}, {"mass": 1.1})

    def probabilities(self, logits: np.ndarray, tokens: Sequence[int], options: Any) -> np.ndarray:
        """The formula of the paper in numpy, token by token."""
        scaled = logits / options.temp
        p = np.exp(scaled - scaled.max())
        p /= p.sum()
        surprise = -np.log(p, where=p > 0, out=np.full_like(p, -np.inf))
        entropy = sum(a * b for a, b in zip(p, surprise, strict=True) if a > 0)
        apart = np.round(np.abs(surprise - entropy), 5)
        kept, total = np.zeros_like(p), 0.0
        for distance in sorted(set(apart[p > 0])):
            if total >= options.mass:
                break
            kept[apart == distance] = p[apart == distance]
            total = kept.sum()
        return kept / kept.sum()

    def test_a_likely_token_may_be_left_out(self) -> None:
        """That is what tells it from top-p: of one likely and many rare tokens, the rare ones are typical."""
        logits = np.log([0.4] + [0.6 / 12] * 12)
        assert self.probabilities(logits, (), self.options({"mass": 0.5}))[0] == 0
        assert self.change({"mass": 0.5}, [logits], (1,))[0, 0] == -np.inf
