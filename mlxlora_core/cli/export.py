"""``mlxlora export``: a model in the form of another tool."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path

import click

from mlxlora_core.cli import declare, show
from mlxlora_core.cli.model import asked_quantization, located
from mlxlora_core.cli.session import JSON_OPTION, SETS_OPTION, hold, start, verb
from mlxlora_core.errors import UsageError
from mlxlora_core.plugins import Registry
from mlxlora_core.runs.recipe import check_sections, choose, overrides
from mlxlora_core.runs.stages.export import describe_export


@verb(
    click.option(
        "--to", required=True, metavar="EXPORTER", help="Exporter (see: mlxlora components exporter)."
    ),
    declare.MODEL,
    declare.quantize,
    click.option(
        "--adapter-file", type=declare.INPUT, help="Adapter file to put into the weights, or to write alone."
    ),
    declare.ADAPTER,
    declare.BASE_MISMATCH,
    click.option(
        "--out",
        type=declare.OUTPUT_FOLDER,
        required=True,
        help="Folder to write, or the file where EXPORTER writes one.",
    ),
    click.option("--overwrite", is_flag=True, help="Replace an export that is there."),
    SETS_OPTION,
    JSON_OPTION,
)
def command(
    registry: Registry,
    to: str,
    model: str,
    adapter_file: Path | None,
    adapter: str | None,
    base_mismatch: str,
    out: Path,
    overwrite: bool,
    sets: tuple[str, ...],
    as_json: bool,
    **quantize: str | None,
) -> None:
    """Write a model, with or without an adapter, in the form of another tool.

    The adapter's change is in the weights, which are dense where the exporter
    takes no quantized ones. Tensors are read and written one after another.
    What was written is opened again and compared with the model before it
    gets its name. `--set export.KEY=VALUE` sets an option of the exporter.
    """
    given = overrides(sets)
    check_sections(given, ("export", "adapter", "quantize"))
    quantization = asked_quantization(registry, quantize, given)
    if adapter_file is None and (adapter is not None or "adapter" in given):
        raise UsageError("an adapter is described, but no file is named", fix="add --adapter-file")
    exporter, _ = choose("exporter", to, given.get("export", {}), registry)
    hold(out)
    start(registry)
    from mlxlora_core.model.adapters import AdapterFile
    from mlxlora_core.model.export import ExportReport, export

    started = time.perf_counter()
    values, any_base = given.get("adapter", {}), base_mismatch == "allow"
    fused = AdapterFile(adapter_file, adapter, values, any_base) if adapter_file else None
    base = located(model)
    with show.Bar() as bar:
        for event in export(
            base.path,
            out,
            exporter,
            registry,
            fused=fused,
            quantization=quantization,
            overwrite=overwrite,
            base=base.name,
            told=bar.move,
        ):
            if isinstance(event, ExportReport):
                report = event
            else:
                show.progress(event.text)
    for note in report.notes:
        show.progress(note)
    if as_json:
        show.as_json(asdict(report))
    else:
        show.result(f"{describe_export(asdict(report))}; {time.perf_counter() - started:.1f} s")
