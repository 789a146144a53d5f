"""What pytest collects when plugins are checked; :mod:`mlxlora_core.testing.findings` puts suites in it."""
