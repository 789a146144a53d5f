"""Plugins: found, loaded in isolation, checked, and looked up by kind and name."""

from mlxlora_core.registry.discovery import ALLOW_LIST, GROUP, load
from mlxlora_core.registry.lookup import Registry
from mlxlora_core.registry.plugin import KINDS, Choice, Component, Plugin
from mlxlora_core.registry.runtimes import start_runtimes

__all__ = [
    "ALLOW_LIST",
    "GROUP",
    "KINDS",
    "Choice",
    "Component",
    "Plugin",
    "Registry",
    "load",
    "start_runtimes",
]
