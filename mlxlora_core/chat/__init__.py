"""Conversations as text by the template that a model brings, and as ids; what a tokenizer's files say."""

from mlxlora_core.chat.rendering import Behind, Renderer, refuse_halves, template_warning, turn_end_ids
from mlxlora_core.chat.special_tokens import SpecialTexts, SpecialToken
from mlxlora_core.chat.template import ChatTemplate
from mlxlora_core.chat.template_files import find_template
from mlxlora_core.chat.tokenizer_settings import (
    TokenizerSettings,
    check_added,
    file_place,
    read_tokenizer_settings,
)
from mlxlora_core.chat.turns import Turn

__all__ = [
    "Behind",
    "ChatTemplate",
    "Renderer",
    "SpecialTexts",
    "SpecialToken",
    "TokenizerSettings",
    "Turn",
    "check_added",
    "file_place",
    "find_template",
    "read_tokenizer_settings",
    "refuse_halves",
    "template_warning",
    "turn_end_ids",
]
