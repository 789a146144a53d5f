"""Text in Python: a prompt is continued."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mlxlora_core.plugins.blame import told
from mlxlora_core.python.model import Model, checked_seed, parsed
from mlxlora_core.training.settings import GenerateConfig

if TYPE_CHECKING:
    from mlxlora_core.model.generate import Segment
    from mlxlora_core.plugins import Choice


def stream(
    model: Model,
    prompt: str | Sequence[Mapping[str, Any]],
    *,
    sampler: str | None = None,
    stop: str | Sequence[str] = (),
    chat: bool = GenerateConfig().chat,
    system: str = GenerateConfig().system,
    num_tokens: int = GenerateConfig().num_tokens,
    write_every: int = GenerateConfig().write_every,
    seed: int = 0,
    **options: Any,
) -> Generator[Segment, None, None]:
    """Continue a prompt, segment by segment; the last one says what ended the text.

    Args:
        model: with or without an adapter on it.
        prompt: text to continue, or messages in the form of the model's tokenizer.
        sampler: one, or several in a row: ``"repetition-penalty,top-p"``; or those of ``options``.
        stop: a text, or several, before which the text ends.
        chat: whether a text is asked as a user's message, in that form.
        system: message in front of it.
        num_tokens: how many at most.
        write_every: tokens a segment.
        seed: of what is drawn.
        options: of the samplers, such as ``temp``; and settings that ask for one: ``top_k``, ``top_p``,
            ``min_p``, ``repetition_penalty``, ``presence_penalty``, ``frequency_penalty``.

    Yields:
        Segments with their ``text``; ``finish`` of the last one is ``stop``, ``length`` or ``context``,
        ``stop`` the stop text that ended it, and ``spent`` the tokens and the time that it took.

    Raises:
        UsageError: an option that there is not or that is out of range; a setting of a sampler that
            is not among those named; a prompt that does not fit.
        PluginError: no such sampler, or one that breaks its contract.
        DivergedError: the model's logits are not finite.
        ResourceError: too little memory.
    """
    given = {"chat": chat, "system": system, "num_tokens": num_tokens, "write_every": write_every}
    config, number = parsed(GenerateConfig, given, "generate"), checked_seed(seed, "generate")
    from mlxlora_core.model.generate import generate as segments
    from mlxlora_core.model.prompts import checked
    from mlxlora_core.model.stop_texts import checked_stops

    asked, chosen = checked(prompt, config), samplers_of(model, sampler, options)
    stops = checked_stops([stop] if isinstance(stop, str) else stop)

    def events() -> Generator[Segment, None, None]:
        base = model.base
        with told(model.registry.plugins):
            yield from segments(
                *(base.language_model, base.tokenizer, asked, [(c.component, c.options) for c in chosen]),
                num_tokens=config.num_tokens,
                seed=number,
                write_every=config.write_every,
                stop=stops,
            )

    return events()


def samplers_of(model: Model, named: str | None, options: Mapping[str, Any]) -> tuple[Choice, ...]:
    """The samplers that are asked for by name or by settings among ``options``, with their options."""
    from mlxlora_core.runs import samplers
    from mlxlora_core.runs.recipe import choose_samplers

    use, dealt = samplers.chain(named, options)
    others = {name: value for name, value in options.items() if name not in samplers.SETTINGS}
    return choose_samplers(use, {**others, **dealt}, model.registry)


def generate(model: Model, prompt: str | Sequence[Mapping[str, Any]], **options: Any) -> str:
    """The continuation of a prompt; see :func:`stream`, which has the same arguments."""
    return "".join(segment.text for segment in stream(model, prompt, **options))
