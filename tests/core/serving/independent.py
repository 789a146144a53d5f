"""A program that serves requests alone and among others, with the runtimes of this machine::

python independent.py MODEL_FOLDER NAME=ADAPTER_FILE ...
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from serving_steps import Served, Steps, alone, among, ids_of, requests, same

from mlxlora_core.machine.device import prepare_cpu
from mlxlora_core.model import loading
from mlxlora_core.model.adapters import AdapterFile
from mlxlora_core.model.several import AdapterSet
from mlxlora_core.plugins import load, start_runtimes


def main(folder: str, *files: str) -> None:
    """Print as JSON which requests got something else among others, and how many texts differ."""
    prepare_cpu()
    registry = load(environ={"MLXLORA_PLUGINS": ""})
    started = [runtime.text for runtime in start_runtimes(registry)]
    model = loading.load(Path(folder), registry)
    several = AdapterSet(model)
    for file in files:
        name, _, path = file.partition("=")
        several.load(name, AdapterFile(Path(path)), registry)
    served = Served(model.language_model, model.tokenizer, several)
    asked = [
        request for request in requests(registry, 17, seed=5) if request.adapter in (None, *several.adapted)
    ]
    got = among(served, asked, seed=6)
    found = {
        "runtimes": started,
        "widths": Steps(served).scheduler.widths,
        "differ": [n for n, request in enumerate(asked) if not same(got[n], alone(served, request))],
        "texts": len({tuple(ids_of(parts)) for parts in got}),
    }
    sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
