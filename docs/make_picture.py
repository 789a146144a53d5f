"""Draw ``demo.svg``, the picture in the README: what ``mlxlora run`` prints when it is done.

    python docs/make_picture.py

Run it where ``mlxlora run`` has ended: what is done already is only told again.
"""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.text import Text

COLUMNS = 110


def main() -> None:
    """Write the picture beside this file."""
    run = [sys.executable, "-m", "mlxlora_core", "run"]
    said = subprocess.run(run, stdout=subprocess.PIPE, text=True, check=True).stdout
    console = Console(record=True, width=COLUMNS, file=io.StringIO())
    console.print(Text("$ mlxlora run", style="bold"))
    console.print(Text("…", style="dim"))
    console.print(Text(said.rstrip()))
    target = Path(__file__).with_name("demo.svg")
    target.write_text(console.export_svg(title="mlxlora run", unique_id="demo"))


if __name__ == "__main__":
    main()
