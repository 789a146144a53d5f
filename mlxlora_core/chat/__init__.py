"""Chat templates: conversations as text by the program that a model brings for it, run in a sandbox."""

from mlxlora_core.chat.template import DATE, ChatTemplate
from mlxlora_core.chat.template_files import find_template
from mlxlora_core.chat.turns import Turn

__all__ = ["DATE", "ChatTemplate", "Turn", "find_template"]
