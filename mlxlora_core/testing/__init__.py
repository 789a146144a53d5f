"""Conformance suites for plugin authors: subclass the one of your kind in a test file of your own."""

import pkgutil

import pytest

# Assertions in the suites explain themselves as those in a test file do.
pytest.register_assert_rewrite(*(f"{__name__}.{module.name}" for module in pkgutil.iter_modules(__path__)))
