"""Commands to type next: the one that goes on with what was interrupted, the one that asks a tuned model."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import fields
from typing import Any

from mlxlora_core.options import plain
from mlxlora_core.plugins import Choice
from mlxlora_core.plugins.sections import Quantization
from mlxlora_core.runs.folder import ADAPTER, MODEL
from mlxlora_core.runs.recipe import Recipe
from mlxlora_core.runs.samplers import labels
from mlxlora_core.training.settings import GenerateConfig


def resume_command(*, resume: bool) -> str:
    """The command line that was given, ready to be given again to go on."""
    arguments = [argument for argument in sys.argv[1:] if argument not in ("--resume", "--overwrite")]
    return shlex.join(["mlxlora", *arguments, *(["--resume"] if resume else [])])


def question_command(recipe: Recipe, plugins: Sequence[str]) -> str:
    """The command that asks the tuned model of a run as the run did.

    Args:
        recipe: of the run.
        plugins: what ``-P`` was told.
    """
    model = recipe.model.mlx_path or recipe.folder / MODEL
    words = ["mlxlora", "generate", *(word for name in plugins for word in ("-P", name))]
    words += ["--model", str(model), "--adapter-file", str(recipe.folder / ADAPTER)]
    if recipe.model.mlx_path is not None and recipe.quantization is not None:
        words += _quantize(recipe.quantization)
    words += ["--sampler", ",".join(sampler.component.spec.name for sampler in recipe.sampler)]
    words += _sampler_options(recipe.sampler)
    if recipe.generate.num_tokens != GenerateConfig().num_tokens:
        words += ["-n", str(recipe.generate.num_tokens)]
    if recipe.run.seed:
        words += ["--seed", str(recipe.run.seed)]
    if recipe.generate.chat:
        words += ["--chat", *(["--system", recipe.generate.system] if recipe.generate.system else [])]
    return shlex.join([*words, "-p", (*recipe.generate.prompts, "…")[0]])


def _quantize(asked: Quantization) -> Iterator[str]:
    """What makes a verb quantize a base as a run did when it opened it."""
    yield from ("--quantize", asked.choice.component.id)
    yield from _changed("quantize", asked.choice.options)
    yield from _changed("quantize", asked.config)


def _changed(prefix: str, options: Any) -> Iterator[str]:
    """``--set`` for each option that is not at its default."""
    defaults = {field.name: field.default for field in fields(options)}
    for name, value in plain(options).items():
        if value != defaults[name]:
            yield from ("--set", f"{prefix}.{name}={value}")


def _sampler_options(samplers: Sequence[Choice]) -> Iterator[str]:
    """``--set`` for each option of a sampler that is not at its default."""
    for label, choice in zip(labels([c.component for c in samplers]), samplers, strict=True):
        yield from _changed(f"sampler.{label}", choice.options)
