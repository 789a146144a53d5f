"""``mlxlora fuse``: the change of adapters goes into the weights."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mlxlora_core.cli import declare, show
from mlxlora_core.cli.model import asked_quantization, located
from mlxlora_core.cli.session import JSON_OPTION, SETS_OPTION, hold, start, verb
from mlxlora_core.errors import UsageError
from mlxlora_core.plugins import Registry
from mlxlora_core.runs.recipe import check_sections, overrides

if TYPE_CHECKING:
    from mlxlora_core.model.fuse import FuseReport

#: Above this share of what the adapter changes, the fused model is not the tuned one any more.
ROUNDED_AWAY = 0.5


@verb(
    declare.MODEL,
    declare.quantize,
    click.option(
        "--adapter-file",
        type=declare.INPUT,
        required=True,
        multiple=True,
        help="Adapter file made for it. May be repeated: the changes are added.",
    ),
    click.option(
        "--adapter-weight",
        type=float,
        multiple=True,
        metavar="FACTOR",
        help="Factor on the change of each adapter file, in their order. [default: 1 each]",
    ),
    declare.ADAPTER,
    declare.BASE_MISMATCH,
    click.option("--save-path", type=declare.OUTPUT_FOLDER, required=True, help="Model folder to write."),
    click.option(
        "--dequantize",
        "--de-quantize",
        is_flag=True,
        help="Write a dense model where the base is quantized.",
    ),
    click.option(
        "--search-group-size",
        is_flag=True,
        help="Quantize what changes again in the group size that rounds the least of it away.",
    ),
    click.option("--overwrite", is_flag=True, help="Replace a model folder that is there."),
    SETS_OPTION,
    JSON_OPTION,
)
def command(
    registry: Registry,
    model: str,
    adapter_file: tuple[Path, ...],
    adapter_weight: tuple[float, ...],
    adapter: str | None,
    base_mismatch: str,
    save_path: Path,
    dequantize: bool,
    search_group_size: bool,
    overwrite: bool,
    sets: tuple[str, ...],
    as_json: bool,
    **quantize: str | None,
) -> None:
    """Write a model folder with the change of one or more adapters in its weights.

    Tells how far the logits of the fused model are from those of base and
    adapters together. A quantized base is quantized again, which rounds the
    change too: --search-group-size finds the groups that keep most of it, and
    --dequantize writes a dense model instead.
    """
    given = overrides(sets)
    if dequantize and search_group_size:
        raise UsageError("--dequantize and --search-group-size are both given", fix="give one of them")
    check_sections(given, ("adapter", "quantize"))
    quantization = asked_quantization(registry, quantize, given)
    hold(save_path)
    start(registry)
    from mlxlora_core.model.adapters import AdapterFile
    from mlxlora_core.model.fuse import FuseReport, fuse
    from mlxlora_core.model.several import shares_of

    asked, any_base = given.get("adapter", {}), base_mismatch == "allow"
    files = [AdapterFile(path, adapter, asked, any_base) for path in adapter_file]
    events = fuse(
        located(model).path,
        shares_of(files, adapter_weight),
        save_path,
        registry,
        quantization=quantization,
        dequantize=dequantize,
        search_group_size=search_group_size,
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
    for one in report.tried:
        show.progress(
            f"group size {one.group_size}: logits are {one.distance:.2e} from the adapted ones, "
            f"{one.bytes / 1e6:.1f} MB"
        )
    for note in report.notes:
        show.progress(note)
    if report.base_distance == 0:
        show.progress("warning: the adapter changes nothing; the logits are those of the base")
    elif report.rounded and report.distance > ROUNDED_AWAY * report.base_distance:
        show.progress(
            "warning: quantizing again rounded much of the adapter's change away; "
            "use --search-group-size, more bits, or --dequantize"
        )
