"""``mlxlora fuse``: an adapter's change goes into the weights."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mlxlora_core.cli import declare, show
from mlxlora_core.cli.model import asked_quantization, located
from mlxlora_core.cli.session import JSON_OPTION, SETS_OPTION, hold, start, verb
from mlxlora_core.plugins import Registry
from mlxlora_core.runs.recipe import check_sections, overrides

if TYPE_CHECKING:
    from mlxlora_core.model.fuse import FuseReport

#: Above this share of what the adapter changes, the fused model is not the tuned one any more.
ROUNDED_AWAY = 0.5


@verb(
    declare.MODEL,
    declare.quantize,
    click.option("--adapter-file", type=declare.INPUT, required=True, help="Adapter file made for it."),
    declare.ADAPTER,
    declare.BASE_MISMATCH,
    click.option("--save-path", type=declare.OUTPUT_FOLDER, required=True, help="Model folder to write."),
    click.option(
        "--dequantize",
        "--de-quantize",
        is_flag=True,
        help="Write a dense model where the base is quantized.",
    ),
    click.option("--overwrite", is_flag=True, help="Replace a model folder that is there."),
    SETS_OPTION,
    JSON_OPTION,
)
def command(
    registry: Registry,
    model: str,
    adapter_file: Path,
    adapter: str | None,
    base_mismatch: str,
    save_path: Path,
    dequantize: bool,
    overwrite: bool,
    sets: tuple[str, ...],
    as_json: bool,
    **quantize: str | None,
) -> None:
    """Write a model folder with an adapter's change in its weights.

    Tells how far the logits of the fused model are from those of base and
    adapter together. A quantized base is quantized again, which rounds the
    adapter's change too; --dequantize writes a dense model instead.
    """
    given = overrides(sets)
    check_sections(given, ("adapter", "quantize"))
    quantization = asked_quantization(registry, quantize, given)
    hold(save_path)
    start(registry)
    from mlxlora_core.model.adapters import AdapterFile
    from mlxlora_core.model.fuse import FuseReport, fuse

    file = AdapterFile(adapter_file, adapter, given.get("adapter", {}), base_mismatch == "allow")
    events = fuse(
        located(model).path,
        file,
        save_path,
        registry,
        quantization=quantization,
        dequantize=dequantize,
        overwrite=overwrite,
    )
    _show(show.writing("fusing", events, FuseReport), save_path, as_json)


def _show(report: FuseReport, save_path: Path, as_json: bool) -> None:
    if as_json:
        show.as_json(asdict(report))
        return
    show.result(
        f"{save_path}: {report.linears} linears fused; logits are {report.distance:.2e} from the adapted "
        f"ones (largest difference {report.largest_difference:.2e}, same most likely token at "
        f"{report.same_argmax:.1%} of positions); the base is {report.base_distance:.2e} from them"
    )
    for note in report.notes:
        show.progress(note)
    if report.base_distance == 0:
        show.progress("warning: the adapter changes nothing; the logits are those of the base")
    elif report.rounded and report.distance > ROUNDED_AWAY * report.base_distance:
        show.progress(
            "warning: quantizing again rounded much of the adapter's change away; "
            "use more bits, or --dequantize"
        )
