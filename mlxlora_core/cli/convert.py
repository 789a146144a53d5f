"""``mlxlora convert``: a foreign model becomes a model folder."""

from __future__ import annotations

import time
from pathlib import Path

import click

from mlxlora_core.cli import declare, show
from mlxlora_core.cli.model import located
from mlxlora_core.cli.session import JSON_OPTION, SETS_OPTION, hold, start, verb
from mlxlora_core.errors import UsageError, listing
from mlxlora_core.model.events import describe_conversion
from mlxlora_core.plugins import Registry
from mlxlora_core.plugins.defaults import DEFAULT_QUANTIZER
from mlxlora_core.plugins.sections import QuantizeConfig
from mlxlora_core.runs.recipe import check_sections, choose, overrides


@verb(
    click.option(
        "--torch-path",
        "--model",
        "source",
        type=declare.NAME_OR_PATH,
        required=True,
        help=f"Checkpoint: a folder with consolidated.00.pth, or any other: {declare.SOURCES}.",
    ),
    click.option(
        "--mlx-path",
        type=declare.OUTPUT_FOLDER,
        default=Path("mlx_model"),
        show_default=True,
        help="Folder to write.",
    ),
    click.option("-q", "--quantize", is_flag=True, help="Quantize the linear layers."),
    click.option(
        "--q-group-size", metavar="WEIGHTS", help="Weights that share one scale and bias. [default: 64]"
    ),
    click.option("--q-bits", metavar="BITS", help="Bits a weight. [default: 4]"),
    click.option(
        "--dtype",
        type=click.Choice(["stored", "float16", "bfloat16", "float32"]),
        help="Type of the weights; stored keeps each as it is. [default: float16 of a .pth, else stored]",
    ),
    click.option(
        "--format",
        "file_format",
        type=click.Choice(["safetensors", "npz"]),
        default="safetensors",
        show_default=True,
        help="Format of the weight file.",
    ),
    click.option("--loader", help="Weight loader. [default: the one that knows the folder]"),
    click.option("--quantizer", default=DEFAULT_QUANTIZER, show_default=True, help="Quantizer for -q."),
    click.option("--overwrite", is_flag=True, help="Replace a model folder that is there."),
    SETS_OPTION,
    JSON_OPTION,
)
def command(
    registry: Registry,
    source: str,
    mlx_path: Path,
    quantize: bool,
    q_group_size: str | None,
    q_bits: str | None,
    dtype: str | None,
    file_format: str,
    loader: str | None,
    quantizer: str,
    overwrite: bool,
    sets: tuple[str, ...],
    as_json: bool,
) -> None:
    """Turn a foreign checkpoint into a model folder.

    The folder gets config.json, the weights and the tokenizer. A folder that
    holds something else is left alone.
    """
    given = overrides(sets)
    check_sections(given, ("loader", "quantize"))
    bits = {"group_size": q_group_size, "bits": q_bits}
    values = given.get("quantize", {}) | {key: value for key, value in bits.items() if value is not None}
    if values and not quantize:
        raise UsageError(f"{listing(values)} given without -q", fix="add -q")
    none = (None, QuantizeConfig())
    chosen, which = choose("quantizer", quantizer, values, registry) if quantize else none
    read = choose("loader", loader, given.get("loader", {}), registry)[0] if loader else None
    hold(mlx_path)
    start(registry)
    from mlxlora_core.model.convert import ConvertReport, convert

    started = time.perf_counter()
    found = located(source)
    events = convert(
        found.path,
        mlx_path,
        registry,
        loader=loader,
        loader_options=read.options if read else None,
        dtype=dtype,
        file_format=file_format,
        quantization=chosen,
        quantize_config=which,
        overwrite=overwrite,
        name=found.name if found.revision else "",
    )
    result = show.writing("converting", events, ConvertReport).values()
    if as_json:
        show.as_json(result)
        return
    for line in describe_conversion(result):
        show.result(line)
    show.result(f"{mlx_path} written in {time.perf_counter() - started:.1f} s")
