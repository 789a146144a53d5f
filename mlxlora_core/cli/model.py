"""What verbs do with a model: load it with its adapter, measure it, let it go on with a prompt."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from mlxlora_core.cli import show
from mlxlora_core.cli.declare import DEFAULT_ADAPTER_FILE, flag_name
from mlxlora_core.distributed.group import ALONE, Group
from mlxlora_core.errors import ModelError, UsageError, listing
from mlxlora_core.model.located import LocatedModel, is_path, locate_model
from mlxlora_core.options import explain
from mlxlora_core.plugins import Choice, Registry
from mlxlora_core.plugins.sections import Quantization
from mlxlora_core.runs.recipe import choose, choose_samplers
from mlxlora_core.runs.samplers import TEMPERATURE, chain, names
from mlxlora_core.training.settings import BatchConfig, EvaluateConfig, GenerateConfig
from mlxlora_core.training.sources import SplitRows

if TYPE_CHECKING:
    from mlxlora_core.model.generate import Segment
    from mlxlora_core.model.loading import Model
    from mlxlora_core.model.several import AdapterSet
    from mlxlora_core.training.examples import Examples


def located(model: str) -> LocatedModel:
    """Where the model is that a command line names; fetched, and told, where it is on the Hub."""
    if not is_path(model):
        show.progress(f"looking for {model}")
    found = locate_model(model)
    for note in found.notes:
        show.progress(note)
    if found.revision:
        show.progress(f"{found.name} is {found.path}")
    return found


def asked_quantization(
    registry: Registry, arguments: Mapping[str, Any], sets: Mapping[str, Mapping[str, Any]]
) -> Quantization | None:
    """How a command line asks for dense linears to be quantized, or None.

    Args:
        registry: where quantizers are looked up.
        arguments: what the options of :func:`~mlxlora_core.cli.declare.quantize` were given.
        sets: what ``--set`` was given.

    Raises:
        PluginError: no such quantizer.
        UsageError: options of a quantizer, and none is asked for; or out of range.
    """
    bits = {"group_size": arguments["q_group_size"], "bits": arguments["q_bits"]}
    values = {**sets.get("quantize", {}), **{key: value for key, value in bits.items() if value is not None}}
    if arguments["quantize"] is not None:
        return Quantization(*choose("quantizer", arguments["quantize"], values, registry))
    if values:
        raise UsageError(f"{listing(values)} given without -q", fix="add -q")
    return None


def load_base(model: LocatedModel, registry: Registry, quantization: Quantization | None) -> Model:
    """A model that was found; what there is to tell of it is told."""
    from mlxlora_core.model.loading import load

    base = load(model.path, registry, quantization)
    for note in (*base.notes, *([base.note] if base.note else [])):
        show.progress(note)
    return replace(base, name=model.name if model.revision else "")


@dataclass(frozen=True)
class AskedAdapter:
    """The adapter file to put on a model, and what the user insists on.

    Attributes:
        path: the file.
        name: the adapter that must be in it, or None for whatever is.
        values: options of it that must be.
        named: whether the user has named the file, or it is the one that train writes.
        any_base: whether it may be one of another base.
    """

    path: Path
    name: str | None
    values: Mapping[str, Any]
    named: bool
    any_base: bool


#: what to do where train's own adapter, which nobody named, does not fit
ANOTHER_ADAPTER = "name another with --adapter-file, or take the model as it is: --no-adapter"


def adapter_paths(given: Sequence[Path], bare: bool) -> list[Path]:
    """The adapter files that a command line asks for: those that it names, train's own where it is, or none.

    Raises:
        UsageError: files are named, and none is wanted.
    """
    if given and bare:
        raise UsageError("--adapter-file and --no-adapter are both given; give one of them")
    return list(given) if given or bare or not DEFAULT_ADAPTER_FILE.is_file() else [DEFAULT_ADAPTER_FILE]


def asked_adapter(
    path: Path | None, bare: bool, name: str | None, values: Mapping[str, Any], any_base: bool
) -> AskedAdapter | None:
    """The adapter that a command line asks for: that of a file, of train's own where it is, or none.

    Raises:
        UsageError: a file is named or described, and none is wanted; one is described that is not there.
    """
    for found in adapter_paths([] if path is None else [path], bare):
        return AskedAdapter(found, name, values, path is not None, any_base)
    if name is not None or values:
        raise UsageError("an adapter is described, but no file is named", fix="add --adapter-file")
    return None


def load_adapted(
    name: str, asked: AskedAdapter | None, registry: Registry, quantization: Quantization | None
) -> tuple[Model, str]:
    """A model with the adapter that is asked for, and which one that is in words."""
    from mlxlora_core.model import adapters

    model = load_base(located(name), registry, quantization)
    if asked is None:
        return model, "without an adapter: this was the model itself"
    try:
        file = adapters.AdapterFile(asked.path, asked.name, asked.values, asked.any_base)
        adapted = adapters.load_file(file, model, registry)
    except ModelError as fault:
        if not asked.named:
            fault.fix = ANOTHER_ADAPTER
        raise
    for note in adapted.notes:
        show.progress(note)
    return model, f"with the {adapted.choice.component.id} adapter of {asked.path}"


def adapter_names(paths: Sequence[Path]) -> list[str]:
    """What adapters are called: each by the end of its path, as short as tells it from the others.

    Raises:
        UsageError: one is named twice.
    """
    whole = [Path(os.path.abspath(path)) for path in paths]
    twice = [path for path in whole if whole.count(path) > 1]
    if twice:
        raise UsageError(f"the adapter {twice[0]} is named twice", fix="name it once")
    bare = [path if os.path.isdir(path) else path.with_suffix("") for path in whole]
    ends = [(w if bare.count(b) > 1 else b).parts for w, b in zip(whole, bare, strict=True)]
    found = []
    for end in ends:
        size = next(n for n in range(1, len(end) + 1) if [e[-n:] for e in ends].count(end[-n:]) == 1)
        found.append("/".join(end[-size:]).replace("//", "/"))
    return found


def put_on(adapters: AdapterSet, files: Mapping[str, Path], registry: Registry, any_base: bool) -> None:
    """Put adapters on a model, each under its name; what there is to tell of them is told."""
    from mlxlora_core.model.adapters import AdapterFile

    for name, path in files.items():
        adapted = adapters.load(name, AdapterFile(path, any_base=any_base), registry)
        for note in adapted.notes:
            show.progress(note)
        show.progress(f"{name}: the {adapted.choice.component.id} adapter of {path}")


def read_test(model: Model, rows: SplitRows, batches: BatchConfig) -> Examples:
    """The test set as examples; what there is to tell of it is told."""
    from mlxlora_core.training.examples import examples_of

    examples = examples_of(rows, model, batches)
    for text in examples.words("test"):
        show.progress(text)
    return examples


def measure(
    model: Model,
    rows: Examples,
    batches: BatchConfig,
    config: EvaluateConfig,
    group: Group = ALONE,
    *,
    quiet: bool,
) -> dict[str, Any]:
    """Loss on the test set, measured by the ranks of a group; printed unless ``quiet``."""
    from mlxlora_core.training.evaluation import evaluating, room_for

    language_model = model.language_model
    most, said = room_for(language_model, rows.examples, batches.batch_size, group)
    show.progress(said)
    size, count = batches.batch_size, config.test_batches
    events = evaluating("test loss", language_model, rows.examples, size, count, most, group=group)
    loss = show.to_its_end(events)
    if not quiet:
        perplexity = f"{loss.perplexity:.3f}" if math.isfinite(loss.perplexity) else "infinite"
        show.result(f"test loss {loss.mean:.4f}, perplexity {perplexity}, {loss.tokens} tokens")
    return {"loss": loss.mean, "perplexity": loss.perplexity, "tokens": loss.tokens, "rows": len(rows)}


def chosen_samplers(
    registry: Registry,
    named: str | None,
    temp: str | None,
    values: Mapping[str, Any],
    settings: Mapping[str, Any] = MappingProxyType({}),
) -> tuple[Choice, ...]:
    """Samplers with their options; ``temp`` goes to the first that has it.

    Args:
        registry: where samplers are looked up.
        named: what ``--sampler`` names, if it is given.
        temp: what ``--temp`` says, if it is given.
        values: what ``--set`` was given.
        settings: what the options of :func:`~mlxlora_core.cli.declare.settings` were given.

    Raises:
        UsageError: a temperature for samplers that have none; a setting of a sampler that is not named.
    """
    use, dealt = chain(named, settings, flag_name)
    values = {**values, **dealt}
    if temp is not None:
        found = [registry.find("sampler", name) for name in names(use)]
        known = {option.name for component in found for option in explain(component.spec.options)}
        if TEMPERATURE not in known:
            raise UsageError(f"--temp: sampler '{use}' has no temperature", fix="leave --temp out")
        values = {**values, TEMPERATURE: temp}
    return choose_samplers(use, values, registry)


def given_text(argument: str) -> str:
    """A text of the command line: bytes that the encoding of the locale does not have are UTF-8."""
    try:
        return argument if argument.isprintable() else os.fsencode(argument).decode("utf-8")
    except UnicodeError:  # told where it is encoded
        return argument


def continue_prompt(
    model: Model,
    prompt: str,
    samplers: Sequence[Choice],
    config: GenerateConfig,
    seed: int,
    stop: Sequence[str] = (),
    *,
    quiet: bool,
) -> Segment:
    """Continue a prompt; segments are printed as they come unless ``quiet``."""
    from mlxlora_core.model.generate import generate, whole
    from mlxlora_core.model.prompts import words_on

    question = config.asked(prompt)
    segments = generate(
        model.language_model,
        model.tokenizer,
        question,
        [(sampler.component, sampler.options) for sampler in samplers],
        num_tokens=config.num_tokens,
        seed=seed,
        write_every=config.write_every,
        stop=stop,
        told=show.progress,
    )
    for words in words_on(model.tokenizer, question):
        show.progress(words)
    text = whole(segments if quiet else _shown(segments))
    show.progress(how_it_ended(text, model.language_model.context_tokens))
    return text


def how_it_ended(last: Segment, context_tokens: int | None) -> str:
    """What a text took, and what ended it, in words."""
    from mlxlora_core.model import generate

    spent = last.spent
    assert spent is not None, "the last segment tells it"
    why = {
        generate.STOP: "ended by itself" if last.stop is None else f"ended before {last.stop!r}",
        generate.LENGTH: "stopped at the limit on its tokens",
        generate.CONTEXT: f"the model's context is full, at {context_tokens} tokens",
    }[last.finish or generate.STOP]
    count = f"{spent.tokens} token{'s' if spent.tokens != 1 else ''}"
    pace = f"the first after {spent.first_seconds:.2f} s, {spent.rate:.1f} tokens/s"
    return f"{count} in {spent.seconds:.2f} s, {pace}; {why}"


def as_spent(last: Segment) -> dict[str, Any]:
    """What ended a text and what it took, as --json shows it."""
    assert last.spent is not None
    return {
        "finish": last.finish,
        "stop": last.stop,
        "prompt_tokens": last.spent.prompt_tokens,
        "tokens": last.spent.tokens,
        "first_seconds": round(last.spent.first_seconds, 4),
        "seconds": round(last.spent.seconds, 4),
        "tokens_per_second": round(last.spent.rate, 2),
    }


def _shown(segments: Iterable[Segment]) -> Iterator[Segment]:
    """The segments, each printed as it comes; the last ends the line."""
    for segment in segments:
        show.result(segment.text, end="" if segment.finish is None else "\n")
        yield segment
