"""The version of mlxlora."""

__version__ = "0.1.0"
