"""``mlxlora convert``: a foreign model becomes a model folder."""

from __future__ import annotations

import time
from pathlib import Path

import click

from mlxlora_core.cli import declare, show
from mlxlora_core.cli.model import asked_quantization, located
from mlxlora_core.cli.session import JSON_OPTION, SETS_OPTION, hold, start, verb
from mlxlora_core.model.events import describe_conversion
from mlxlora_core.plugins import Registry
from mlxlora_core.runs.recipe import check_sections, choose, overrides


@verb(
    click.option(
        "--torch-path",
        "--model",
        "source",
        type=declare.NAME_OR_PATH,
        required=True,
        help=f"Model: a folder with consolidated.00.pth, or any other: {declare.SOURCES}.",
    ),
    click.option(
        "--mlx-path",
        type=declare.OUTPUT_FOLDER,
        default=Path("mlx_model"),
        show_default=True,
        help="Folder to write.",
    ),
    declare.quantize,
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
    click.option("--overwrite", is_flag=True, help="Replace a model folder that is there."),
    SETS_OPTION,
    JSON_OPTION,
)
def command(
    registry: Registry,
    source: str,
    mlx_path: Path,
    dtype: str | None,
    file_format: str,
    loader: str | None,
    overwrite: bool,
    sets: tuple[str, ...],
    as_json: bool,
    **quantize: str | None,
) -> None:
    """Turn a model of any kind into a model folder.

    The folder gets config.json, the weights and the tokenizer. A folder that
    holds something else is left alone.
    """
    given = overrides(sets)
    check_sections(given, ("loader", "quantize"))
    quantization = asked_quantization(registry, quantize, given)
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
        quantization=quantization,
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
