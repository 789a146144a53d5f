"""The core of mlxlora: the hook specs, the registry and the straight lines between plugins."""

__version__ = "0.1.0"
