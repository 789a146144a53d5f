"""``python -m mlxlora_core`` is ``mlxlora``."""

from mlxlora_core.cli import main

if __name__ == "__main__":
    main()
