"""How a model was tuned, in lines of Markdown for the card beside it: no more than is known."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mlxlora_core.model.adapters import Adapted
from mlxlora_core.options import plain


def tuning_card(adapted: Adapted | None, base_fingerprint: str, facts: Sequence[str] = ()) -> str:
    """The section on how a model was tuned; nothing for a base by itself.

    Args:
        adapted: the adapter that is in it.
        base_fingerprint: of the base.
        facts: further lines, such as data, settings and losses of the training.
    """
    if adapted is None:
        return ""
    options = _listed(plain(adapted.choice.options))
    config = {key: value for key, value in plain(adapted.config).items() if value}
    lines = [
        f"adapter `{adapted.choice.component.id}` on {len(adapted.paths)} linears: {options}",
        *([f"where it goes: {_listed(config)}"] if config else []),
        f"fingerprint of the base: `{base_fingerprint}`",
        *facts,
    ]
    return "\n".join(["## How it was tuned", "", *(f"- {line}" for line in lines)])


def loss_facts(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """The losses of each set of rows before and after, as the stages of a run keep them."""
    return [
        f"{split} loss {before['losses'][split]['loss']:.4f} before, {held['loss']:.4f} after, "
        f"in nats a token over {held['tokens']} tokens"
        for split, held in after["losses"].items()
        if split in before["losses"]
    ]


def _listed(values: Mapping[str, Any]) -> str:
    """Values in a line, lists joined by spaces."""
    shown = {k: " ".join(map(str, v)) if isinstance(v, list | tuple) else v for k, v in values.items()}
    return ", ".join(f"{key} {value}" for key, value in shown.items())
