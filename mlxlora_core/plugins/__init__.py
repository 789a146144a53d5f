"""Plugins: found, loaded in isolation, checked, and looked up by kind and name."""

from mlxlora_core.plugins.checks import asks_for, transform_of
from mlxlora_core.plugins.discovery import ALLOW_LIST, GROUP, load
from mlxlora_core.plugins.lookup import Registry
from mlxlora_core.plugins.plugin import KINDS, Choice, Component, Plugin
from mlxlora_core.plugins.runtimes import start_runtimes

__all__ = [
    "ALLOW_LIST",
    "GROUP",
    "KINDS",
    "Choice",
    "Component",
    "Plugin",
    "Registry",
    "asks_for",
    "load",
    "start_runtimes",
    "transform_of",
]
