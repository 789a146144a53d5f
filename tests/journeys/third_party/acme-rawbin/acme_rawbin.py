"""Each tensor as a file of raw little-endian numbers, and one JSON index."""

from collections.abc import Iterable
from pathlib import Path

from mlxlora_core.api import Exporter, ExportSource, NoOptions, hookimpl
from mlxlora_core.files import copy_file, new_file, write_json


def export(source: ExportSource, target: Path, options: NoOptions) -> None:
    """Write ``index.json``, ``tensors/N.bin`` and the tokenizer."""
    import mlx.core as mx
    import numpy as np

    (target / "tensors").mkdir()
    index = {}
    for number, (name, tensor) in enumerate(source.tensors.items()):
        file = f"tensors/{number}.bin"
        array = tensor.read()
        index[name] = {"file": file, "dtype": tensor.dtype, "shape": list(tensor.shape)}
        if array.dtype == mx.bfloat16:
            array = array.view(mx.uint16)
        with new_file(target / file) as out:
            out.write(np.array(array).tobytes())
    for name, path in source.tokenizer.items():
        copy_file(path, target / name)
    adapter = {"name": source.adapter.name, "paths": list(source.adapter.paths)} if source.adapter else None
    write_json(target / "index.json", {"config": dict(source.config), "adapter": adapter, "tensors": index})


@hookimpl
def mlxlora_exporters() -> Iterable[Exporter]:
    """The exporter."""
    return [Exporter(name="rawbin", summary="raw numbers and a JSON index", export=export)]
