"""``mlxlora evaluate``: loss and perplexity on held-out rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mlxlora_core.cli import declare, show
from mlxlora_core.cli.model import asked_adapter, asked_quantization, load_adapted, measure, read_test
from mlxlora_core.cli.session import JSON_OPTION, SETS_OPTION, start, verb
from mlxlora_core.plugins import Registry
from mlxlora_core.runs.recipe import check_sections, overrides
from mlxlora_core.training.settings import BatchConfig, EvaluateConfig
from mlxlora_core.training.sources import read_data


@verb(
    declare.MODEL,
    declare.quantize,
    declare.data("test.jsonl"),
    declare.COLUMNS,
    declare.ADAPTER_FILE,
    declare.NO_ADAPTER,
    declare.ADAPTER,
    declare.BASE_MISMATCH,
    declare.flags(BatchConfig),
    declare.flags(EvaluateConfig),
    SETS_OPTION,
    JSON_OPTION,
)
def command(
    registry: Registry,
    model: str,
    data: Path,
    columns: tuple[str, ...],
    adapter_file: Path | None,
    no_adapter: bool,
    adapter: str | None,
    base_mismatch: str,
    sets: tuple[str, ...],
    as_json: bool,
    **arguments: Any,
) -> None:
    """Measure loss and perplexity on the test set.

    The loss is the sum of nats over the sum of counted tokens, whatever the
    batch size.
    """
    batches = declare.config_from(BatchConfig, arguments)
    config = declare.config_from(EvaluateConfig, arguments)
    given = overrides(sets)
    any_base = base_mismatch == "allow"
    asked = asked_adapter(adapter_file, no_adapter, adapter, given.get("adapter", {}), any_base)
    check_sections(given, ("adapter", "quantize"))
    quantization = asked_quantization(registry, arguments, given)
    rows = read_data(data, ("test",), columns=declare.columns_from(columns))["test"]
    start(registry)
    base, said = load_adapted(model, asked, registry, quantization)
    result = measure(base, read_test(base, rows, batches), batches, config, quiet=as_json)
    show.progress(said)
    if as_json:
        show.as_json({"adapter_file": asked and str(asked.path), **result})
