"""Text in Python: a prompt is continued."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mlxlora_core.plugins.blame import told
from mlxlora_core.plugins.defaults import DEFAULT_SAMPLER
from mlxlora_core.python.model import Model, checked_seed, parsed
from mlxlora_core.training.settings import GenerateConfig

if TYPE_CHECKING:
    from mlxlora_core.model.generate import Segment


def stream(
    model: Model,
    prompt: str | Sequence[Mapping[str, Any]],
    *,
    sampler: str = DEFAULT_SAMPLER,
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
        sampler: one, or several in a row: ``"repetition-penalty,top-p"``.
        chat: whether a text is asked as a user's message, in that form.
        system: message in front of it.
        num_tokens: how many at most.
        write_every: tokens a segment.
        seed: of what is drawn.
        options: of the samplers, such as ``temp``.

    Yields:
        Segments with their ``text``; ``finish`` of the last one is ``stop``, ``length`` or ``context``.

    Raises:
        UsageError: an option that there is not or that is out of range; a prompt that does not fit.
        PluginError: no such sampler, or one that breaks its contract.
        DivergedError: the model's logits are not finite.
        ResourceError: too little memory.
    """
    given = {"chat": chat, "system": system, "num_tokens": num_tokens, "write_every": write_every}
    config, number = parsed(GenerateConfig, given, "generate"), checked_seed(seed, "generate")
    from mlxlora_core.model.generate import generate as segments
    from mlxlora_core.model.prompts import checked
    from mlxlora_core.runs.recipe import choose_samplers

    asked, chosen = checked(prompt, config), choose_samplers(sampler, options, model.registry)

    def events() -> Generator[Segment, None, None]:
        with told(model.registry.plugins):
            yield from segments(
                model.base.language_model,
                model.base.tokenizer,
                asked,
                [(choice.component, choice.options) for choice in chosen],
                num_tokens=config.num_tokens,
                seed=number,
                write_every=config.write_every,
            )

    return events()


def generate(model: Model, prompt: str | Sequence[Mapping[str, Any]], **options: Any) -> str:
    """The continuation of a prompt; see :func:`stream`, which has the same arguments."""
    return "".join(segment.text for segment in stream(model, prompt, **options))
