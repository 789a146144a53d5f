"""``python -m mlxlora_core`` is ``mlxlora``."""

import sys

if __name__ == "__main__":
    if not sys.flags.safe_path:
        del sys.path[0]  # the working folder, whose modules are none of ours
    from mlxlora_core.machine.children import forget_working_folder

    forget_working_folder()
    from mlxlora_core.cli import main

    main()
