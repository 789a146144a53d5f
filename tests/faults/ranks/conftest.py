"""What the tests of ranks take from those of saving and going on."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "resume"))
