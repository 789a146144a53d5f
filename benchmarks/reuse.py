"""What it saves to compute frozen layers once a row: epochs of a small tuning, beside the peers.

    python benchmarks/reuse.py --python PEERS/bin/python [--quick] [--json]

LoRA on q and v of the top 3 of 12 layers of the 90 M shape, random weights, batches of 4 rows of
real lengths: the docstrings of mlx in the demo's tokens. The environment of the peers is made as
for ``peers.py``.

mlxlora trains twice, with reuse and without. PyTorch with PEFT, in float32, takes the same rows in the same
batches, drawn at random, and pads each to its longest row; the losses are to be the same. They take turns,
an epoch each, so that what else the machine does falls on all. Their times include reading the frozen
layers, and a validation at the end; mlxlora's validation before the first step too. mlx-lm as installed
makes a few steps, and its whole run is worked out of their tokens a second: it would take an hour.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import click
import numpy as np
from peers import check_environment
from workers import commands, contest
from workers.channel import Job
from workers.environment import own_kernels
from workers.process import Failed, Worker
from workers.weights import HUGGING_FACE, META

from mlxlora_core.machine import doctor
from mlxlora_core.model.tokenizers import open_tokenizer
from mlxlora_core.plugins import load
from mlxlora_core.training.batches import epoch_order
from mlxlora_core.training.examples import Example, make_examples

BASE = Path(__file__).parents[1] / "plugins" / "mlxlora_demo" / "base"
LAYERS, BATCH, RATE, LONGEST = 3, 4, 3e-4, 512
SEED = 0  # of the order of rows
TRAINED = ("mlxlora", "mlxlora, no reuse", "torch + peft")
SAME = 0.005  # how far losses of validation may be apart


@click.command(help=(__doc__ or "").split("\n\n")[0])
@click.option("--python", "peers", default=sys.executable, help="Python of the peers' environment.")
@click.option("--quick", is_flag=True, help="16 rows, 3 epochs, and no mlx-lm.")
@click.option("--rows", default=60, show_default=True, help="Rows to train on.")
@click.option("--epochs", default=10, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def main(peers: str, quick: bool, rows: int, epochs: int, as_json: bool) -> None:
    """Measure and print."""
    own_kernels()
    check_environment(peers)
    rows, epochs = (16, 3) if quick else (rows, epochs)
    run = contest.Run(
        peers, contest.Pace(1, 0.0, BATCH, 0, 0), doctor.device().kind == "cpu", {"versions": {}}
    )
    with tempfile.TemporaryDirectory(prefix="mlxlora-reuse-") as name:
        folder = Path(name)
        tokens = _write_rows(folder, rows)
        run.worker_once(peers, "workers.weights", {"shape": "90m", "folder": name})
        commands.check(commands.convert(folder / META, folder / "model", run.base, []))
        result = _measure(run, folder, epochs)
        if not quick:
            result["mlx-lm as installed"] = _steps_of_mlx_lm(run, folder, tokens * epochs)
    _compare(result)
    result |= {"rows": rows, "epochs": epochs, "tokens": tokens, "versions": run.result["versions"]}
    click.echo(json.dumps(result, indent=2) if as_json else _text(result))


def _write_rows(folder: Path, count: int) -> int:
    """Rows at even distances, a fifth as many to validate on; the tokens of an epoch that count."""
    registry = load(environ={"MLXLORA_PLUGINS": ""})
    builder = registry.find("builder", "docstrings").spec
    made = builder.build(builder.options(packages=["mlx"])).rows
    tokenizer = open_tokenizer({"tokenizer.model": BASE / "tokenizer.model"}, registry, BASE)
    named = ((str(i), dict(row.content)) for i, row in enumerate(made))
    examples = make_examples(named, "mlx", tokenizer, max_seq_length=LONGEST, mask_prompt=False).examples
    every = [[int(token) for token in example.tokens] for example in examples]
    chosen = [every[i * len(every) // (count + count // 5)] for i in range(count + count // 5)]
    valid = chosen[3::6]
    train = [row for i, row in enumerate(chosen) if i % 6 != 3]
    (folder / "train.json").write_text(json.dumps(train))
    (folder / "valid.json").write_text(json.dumps(valid))
    return sum(len(row) - 1 for row in train)


def _job(run: contest.Run, folder: Path, model: str, **more: Any) -> Job:
    rows, valid = str(folder / "train.json"), str(folder / "valid.json")
    return Job(
        "epochs",
        folder=str(folder / model),
        dtype=run.base,
        rows=rows,
        valid=valid,
        batch=BATCH,
        threads=run.threads,
        layers=LAYERS,
        learning_rate=RATE,
        check_tokens=24,
        **more,
    )


def _measure(run: contest.Run, folder: Path, epochs: int) -> dict[str, Any]:
    """Tool -> seconds of its epochs, and its loss on the rows to validate on."""
    ours, theirs, order = "with_mlxlora", "with_torch", str(_write_order(folder, epochs))
    entries = {
        "mlxlora": (sys.executable, ours, _job(run, folder, "model", epochs=epochs, reuse="auto")),
        "mlxlora, no reuse": (sys.executable, ours, _job(run, folder, "model", epochs=epochs)),
        "torch + peft": (run.peers, theirs, _job(run, folder, HUGGING_FACE, epochs=epochs, order=order)),
    }
    workers: dict[str, Worker] = {}
    try:
        for tool, (python, module, job) in entries.items():
            workers[tool] = Worker(python, module, job, run.environment(tool))
            _ready(run, workers[tool], tool)
        first = workers["mlxlora"].ready["loss"]
        for tool, worker in workers.items():
            if abs(worker.ready["loss"] - first) > 1e-3 * first:
                raise click.ClickException(f"{tool} has a loss of {worker.ready['loss']}, mlxlora {first}")
        samples: dict[str, list[dict[str, Any]]] = {tool: [] for tool in workers}
        for epoch in range(epochs + 1):
            for tool, worker in workers.items():
                samples[tool].append(worker.sample())
                seconds = samples[tool][-1]["seconds"]
                click.echo(f"epoch {epoch + 1} of {epochs}: {tool} {seconds:.1f} s", err=True)
    except Failed as fault:
        raise click.ClickException(str(fault)) from fault
    finally:
        for worker in workers.values():
            worker.close()
    return {
        tool: {
            "epochs": [sample["seconds"] for sample in found[:-1]],
            "later epochs": statistics.median(sample["seconds"] for sample in found[1:-1]),
            "whole": sum(sample["seconds"] for sample in found),
            "loss": found[-1]["loss"],
        }
        for tool, found in samples.items()
    }


def _write_order(folder: Path, epochs: int) -> Path:
    """The rows of each step of mlxlora, epoch by epoch."""
    rows = json.loads((folder / "train.json").read_text())
    examples = [Example(np.array(row, np.uint32), np.arange(len(row)) > 0) for row in rows]
    path = folder / "order.json"
    path.write_text(json.dumps([epoch_order(examples, BATCH, SEED, epoch) for epoch in range(epochs)]))
    return path


def _ready(run: contest.Run, worker: Worker, tool: str) -> None:
    worker.ready = worker.read()
    run.result["versions"] |= worker.ready["versions"]
    click.echo(f"{tool} is ready", err=True)


def _steps_of_mlx_lm(run: contest.Run, folder: Path, tokens: int) -> dict[str, Any]:
    """What mlx-lm would take for so many tokens that count, worked out of two steps."""
    worker = Worker(run.peers, "with_mlx_lm", _job(run, folder, HUGGING_FACE), run.environment("mlx-lm"))
    try:
        _ready(run, worker, "mlx-lm")
        steps = [worker.sample() for _ in range(2)]
    except Failed as fault:
        raise click.ClickException(str(fault)) from fault
    finally:
        worker.close()
    rate = sum(step["tokens"] for step in steps) / sum(step["seconds"] for step in steps)
    return {"whole": tokens / rate, "worked out of tokens/s": rate}


def _compare(result: dict[str, Any]) -> None:
    """Add the ratios, and hold the losses against each other."""
    ours, plain, torch = (result[tool] for tool in TRAINED)
    losses = [tool["loss"] for tool in (ours, plain, torch)]
    result["ratios"] = {
        "epochs after the first, of no reuse": plain["later epochs"] / ours["later epochs"],
        "whole run, of no reuse": plain["whole"] / ours["whole"],
        "whole run, of torch + peft": torch["whole"] / ours["whole"],
        "losses apart": (max(losses) - min(losses)) / min(losses),
    }
    if "mlx-lm as installed" in result:
        result["ratios"]["whole run, of mlx-lm"] = result["mlx-lm as installed"]["whole"] / ours["whole"]
    if result["ratios"]["losses apart"] > SAME:
        click.echo(f"the losses differ by more than {SAME:.1%}: {losses}", err=True)


def _text(result: dict[str, Any]) -> str:
    lines = [f"{result['rows']} rows, {result['tokens']} tokens an epoch, {result['epochs']} epochs"]
    for tool in TRAINED:
        row = result[tool]
        lines.append(
            f"{tool:28} first epoch {row['epochs'][0]:7.1f} s, later {row['later epochs']:7.1f} s, "
            f"whole {row['whole']:7.1f} s, loss {row['loss']:.4f}"
        )
    if "mlx-lm as installed" in result:
        row = result["mlx-lm as installed"]
        rate = row["worked out of tokens/s"]
        lines.append(
            f"{'mlx-lm as installed':28} whole {row['whole']:.0f} s, worked out of {rate:.1f} tokens/s"
        )
    lines += [f"{name}: {value:.4g}" for name, value in result["ratios"].items()]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
