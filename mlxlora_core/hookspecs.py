"""The hooks: the only door into mlxlora. Each gives an iterable of specs.

A plugin is a module that an entry point of group ``mlxlora`` names and that
implements any of these functions, marked ``@hookimpl``. All of them are
collected, none takes an argument, and none may import mlx, numpy or torch.
"""

from __future__ import annotations

from collections.abc import Iterable

import pluggy

from mlxlora_core.specs import (
    Adapter,
    AdapterLoader,
    Architecture,
    Command,
    DatasetBuilder,
    Evaluator,
    Exporter,
    Observer,
    Quantizer,
    RecipeFile,
    Runtime,
    Sampler,
    TokenizerLoader,
    WeightLoader,
)

PROJECT = "mlxlora"
API_VERSION = 2

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec
def mlxlora_weight_loaders() -> Iterable[WeightLoader]:  # type: ignore[empty-body]  # a hook
    """Readers of foreign checkpoints: a path -> config, tokenizer files, tensors one at a time."""


@hookspec
def mlxlora_tokenizers() -> Iterable[TokenizerLoader]:  # type: ignore[empty-body]  # a hook
    """Tokenizers: files -> text to ids and back, and conversations in a model's own form."""


@hookspec
def mlxlora_architectures() -> Iterable[Architecture]:  # type: ignore[empty-body]  # a hook
    """Model families: a config -> a language model with named parameters."""


@hookspec
def mlxlora_adapters() -> Iterable[Adapter]:  # type: ignore[empty-body]  # a hook
    """Trainable changes to frozen linears: wrap one, and fuse it back into a weight."""


@hookspec
def mlxlora_adapter_loaders() -> Iterable[AdapterLoader]:  # type: ignore[empty-body]  # a hook
    """Readers of adapters of other tools: a path -> which adapter, its options, tensors by linear."""


@hookspec
def mlxlora_quantizers() -> Iterable[Quantizer]:  # type: ignore[empty-body]  # a hook
    """Linears in fewer bits: quantize one, and restore one from a model folder."""


@hookspec
def mlxlora_dataset_builders() -> Iterable[DatasetBuilder]:  # type: ignore[empty-body]  # a hook
    """Makers of training rows: options -> rows, what was skipped, and versions."""


@hookspec
def mlxlora_samplers() -> Iterable[Sampler]:  # type: ignore[empty-body]  # a hook
    """Choosers of the next token: options -> a function from logits and the ids so far to logits."""


@hookspec
def mlxlora_exporters() -> Iterable[Exporter]:  # type: ignore[empty-body]  # a hook
    """Writers for other tools: a model, with or without an adapter -> a folder that they read."""


@hookspec
def mlxlora_observers() -> Iterable[Observer]:  # type: ignore[empty-body]  # a hook
    """Watchers of a training: told of its reports, stages and checkpoints as they happen."""


@hookspec
def mlxlora_evaluators() -> Iterable[Evaluator]:  # type: ignore[empty-body]  # a hook
    """Measures of answers to the test rows: an answer, and what the row says -> a number from 0 to 1."""


@hookspec
def mlxlora_commands() -> Iterable[Command]:  # type: ignore[empty-body]  # a hook
    """Verbs of the command line: a name -> a click command that is made when it is called."""


@hookspec
def mlxlora_runtimes() -> Iterable[Runtime]:  # type: ignore[empty-body]  # a hook
    """Preparations of the machine, started once a process before MLX is first used."""


@hookspec
def mlxlora_recipes() -> Iterable[RecipeFile]:  # type: ignore[empty-body]  # a hook
    """Recipes that ship with a plugin and run by their name: ``mlxlora run NAME``."""
