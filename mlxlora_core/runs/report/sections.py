"""How a run was made: training, rows, recipe, plugins and machine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mlxlora_core.errors import listing
from mlxlora_core.runs.recipe import DEFAULT
from mlxlora_core.runs.report.curves import Curves
from mlxlora_core.runs.report.facts import Facts
from mlxlora_core.runs.report.html import Html, element
from mlxlora_core.runs.report.parts import counted, duration, figure, note, shown, table

ROWS_SHOWN = 40  # of a table that only samples a longer list

# --- training -----------------------------------------------------------------


def training(facts: Facts) -> Html | None:
    """What was reported on the way: charts, and the same as a table."""
    if facts.curves == Curves():
        return None
    result = facts.results.get("train")
    series = [("train", "training rows")]
    if facts.valid:
        series.append(("valid", "validation rows (held out)"))
    if "test" in facts.results.get("before", {"losses": {}})["losses"]:
        series.append(("test", "test rows (held out), before and after"))
    said = [_rate_in_words(facts.train_settings), f"Training took {duration(facts.seconds)}."]
    if result:
        share = result["trainable_parameters"] / max(result["parameters"], 1)
        said.insert(
            0,
            f"{result['trainable_parameters']:,} of {result['parameters']:,} parameters trained "
            f"({share:.2%}), on {len(result['adapted'])} linears.",
        )
    odd = facts.curves.not_finite
    if odd:
        said.append(f"Not drawn: {counted(odd, 'report')} with a loss that is not finite.")
    return element(
        "section",
        element("h2", "Training"),
        note(" ".join(said)),
        figure("loss", "Loss", "nats a counted token, over steps", *series),
        element(
            "div",
            figure("rate", "Learning rate", "at each report"),
            figure("norm", "Gradient norm", "before clipping, at each report"),
            figure("speed", "Speed", "counted tokens a second"),
            figure("memory", "Peak memory", "GB held by MLX"),
            class_="grid",
        ),
        element("noscript", note("The charts need JavaScript; the figures below do not.")),
        element("details", element("summary", "The figures as a table"), _steps_table(facts), class_="more"),
    )


def _rate_in_words(train: Mapping[str, Any]) -> str:
    """How the learning rate moves."""
    rise = f"rises over {train['warmup']:,} steps (warm-up) to" if train.get("warmup") else "is"
    after = ", then falls as a cosine" if train.get("schedule") == "cosine" else ""
    return f"The learning rate {rise} {train.get('learning_rate')}{after}."


def _steps_table(facts: Facts) -> Html:
    by_step: dict[int, dict[str, str]] = {}
    columns = (
        ("loss", "{:.4f}", 1),
        ("learning_rate", "{:.2e}", 1),
        ("grad_norm", "{:.3g}", 1),
        ("tokens_per_second", "{:,.0f}", 1),
        ("padding", "{:.1f}", 100),
        ("peak_memory_bytes", "{:.2f}", 1e-9),
    )
    for report in facts.train:
        row = by_step.setdefault(report["step"], {})
        row |= {key: form.format(report[key] * scale) for key, form, scale in columns if key in report}
    for report in facts.valid:
        if "loss" in report:
            by_step.setdefault(report["step"], {})["valid"] = f"{report['loss']:.4f}"
    steps = sorted(by_step)
    count = min(len(steps), ROWS_SHOWN)
    chosen = [steps[i * (len(steps) - 1) // max(count - 1, 1)] for i in range(count)]
    keys = ("loss", "valid", *(key for key, *_ in columns if key != "loss"))
    caption = "Every report of training"
    if len(chosen) < len(steps):
        caption = f"{len(chosen)} of {len(steps)} reports, at even distances; metrics.jsonl has them all"
    heads = (
        "step",
        "train loss",
        "valid loss",
        "learning rate",
        "gradient norm",
        "tokens/s",
        "padding %",
        "peak GB",
    )
    return table(
        caption,
        heads,
        [(step, *(by_step[step].get(key, "") for key in keys)) for step in chosen],
        numbers=range(len(heads)),
    )


# --- the rows -----------------------------------------------------------------


def dataset(facts: Facts) -> Html | None:
    """The rows: how many, how long, and what narrowed them."""
    result = facts.results.get("data")
    if result is None:
        return None
    rows = result["rows"]
    names = {"train": "to train on", "valid": "to validate", "test": "to test"}
    counts = [(names[split], f"{number:,}") for split, number in rows.items()]
    return element(
        "section",
        element("h2", "Rows"),
        element(
            "div",
            element(
                "div",
                table("Rows by split", ("split", "rows"), counts, numbers=(1,)),
                element("h3", "What narrowed them"),
                element("ul", *(element("li", line) for line in _narrowed(facts, result))),
            ),
            figure("lengths", "Length", "rows to train on, by tokens") if "train" in facts.results else None,
            class_="pair plain",
        ),
        _skipped(result["skipped"]),
    )


def _narrowed(facts: Facts, result: Mapping[str, Any]) -> list[str]:
    section = facts.recipe.get("data", {})
    given = {key: value for key, value in section.items() if key not in ("use", "options")}
    given |= _options(section)
    chosen = {key: given[key] for key in given if facts.record["origins"].get(f"data.{key}") != DEFAULT}
    lines = [f"Asked for: {listing(f'{key} = {shown(value)}' for key, value in chosen.items())}."]
    lines.append(
        f"{counted(result['groups'], 'group')} of rows that belong together; each is in one split, "
        f"and {counted(result['repeated_rows'], 'repeated row')} left out."
    )
    if result["rows_in_two_splits"]:
        lines.append(
            f"{counted(result['rows_in_two_splits'], 'row')} in more than one split, as the source has them: "
            "held-out figures are not wholly held out."
        )
    lines.append(f"{counted(len(result['skipped']), 'source')} skipped.")
    train = facts.results.get("train")
    if train:
        lines.append(
            f"{counted(train['rows_cut'], 'training row')} cut at {train['max_seq_length']:,} tokens"
            + (f", {counted(train['tokens_cut'], 'token')} lost." if train["rows_cut"] else ".")
        )
        if train["rows_empty"]:
            lines.append(f"{counted(train['rows_empty'], 'training row')} left out: no token counts.")
        lengths = train["lengths"]
        lines.append(
            f"Half of the rows have up to {lengths['median']:g} tokens, the longest {lengths['longest']:,}."
        )
    return lines


def _options(section: Mapping[str, Any]) -> Mapping[str, Any]:
    """The options of a component in a section of a recipe."""
    options = section.get("options", {})
    return options if isinstance(options, dict) else {}


def _skipped(skipped: Sequence[Mapping[str, str]]) -> Html | None:
    if not skipped:
        return None
    caption = "What was left out, and why"
    if len(skipped) > ROWS_SHOWN:
        caption += f" (the first {ROWS_SHOWN} of {len(skipped)}; run.json has them all)"
    rows = [(one["source"], one["reason"]) for one in skipped[:ROWS_SHOWN]]
    return element(
        "details",
        element("summary", f"{counted(len(skipped), 'source')} skipped"),
        table(caption, ("source", "reason"), rows),
        class_="more",
    )


# --- the recipe and the machine -----------------------------------------------


def values(facts: Facts) -> Html:
    """Every value and where it came from: those that somebody chose, and the defaults apart."""
    chosen: list[tuple[str, str, str]] = []
    left: list[tuple[str, str, str]] = []
    for name, origin in sorted(facts.record["origins"].items()):
        section, _, key = name.partition(".")
        given = facts.recipe.get(section, {})
        value = given.get(key, _options(given).get(key))
        (left if origin == DEFAULT else chosen).append((name, shown(value), origin))
    heads = ("value", "", "from")
    return element(
        "section",
        element("h2", "Recipe"),
        table("Values that were chosen", heads, chosen, kind="values"),
        element(
            "details",
            element("summary", counted(len(left), "default")),
            table("Values left as they are", heads, left, kind="values"),
            class_="more",
        ),
    )


def origins(facts: Facts) -> Html:
    """What the run was made with: plugins, machine, versions of the sources."""
    record = facts.record
    machine = record["machine"]
    about = [
        ("mlxlora", record["mlxlora"]),
        ("seed", record["seed"]),
        *((name, machine.get(name, "not known")) for name in ("system", "python", "cores")),
        *(("runtime", note) for note in record["runtime"]),
    ]
    sources = facts.results.get("data", {"versions": {}})["versions"]
    return element(
        "section",
        element("h2", "Plugins and machine"),
        element(
            "div",
            table("Plugins", ("plugin", "distribution"), record["plugins"].items(), kind="values"),
            element(
                "div",
                table("Machine", ("", ""), about, kind="values"),
                table("Sources of the rows", ("source", "version"), sources.items(), kind="values")
                if sources
                else None,
            ),
            class_="pair plain",
        ),
    )
