"""A run folder as ``mlxlora run`` leaves it, with whatever somebody could put into it."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import tomli_w

from mlxlora_core.runs import stages
from mlxlora_core.runs.grading import Expected, grade, summarize
from mlxlora_core.runs.report import length_counts

STAGES = [stage.name for stage in stages.STAGES if stage.name != "export"]

ROW = " mlx.nn.{} Applies the {} function.\n\nSimply ``mx.maximum(x, 0)``."
LONG = "a_name_that_goes_on_" * 12


def write_run(
    folder: Path,
    *,
    name: str = "demo",
    plugins: dict[str, str] | None = None,
    prompt: str = "Q: What is {} in mlx?\nA:",
    said: str = " A layer that does {}",
    questions: int = 20,
    steps: int = 2000,
    done: int = 5,
) -> Path:
    """Write a run folder.

    Args:
        folder: made if absent.
        name: of the recipe.
        plugins: name -> distribution.
        prompt: of each question, ``{}`` its number in words.
        said: what the base answers.
        questions: how many; three out of four are about training rows.
        steps: of training, each of them reported.
        done: how many of the stages.

    Returns:
        The folder.
    """
    draw = random.Random(0)
    names = [f"Layer{i}" for i in range(questions)]
    wanted = [Expected("test" if i % 4 == 3 else "train", ROW.format(n, n)) for i, n in enumerate(names)]
    before = [grade(prompt.format(n), said.format(n), False, w) for n, w in zip(names, wanted, strict=True)]
    after = [
        grade(prompt.format(n), w.text if i % 4 < 2 else w.text[: len(w.text) // 2], i % 4 < 2, w)
        for i, (n, w) in enumerate(zip(names, wanted, strict=True))
    ]
    lengths = [min(int(draw.lognormvariate(4.2, 0.7)) + 4, 700) for _ in range(500)]
    results: dict[str, Any] = {
        "model": {"folder": "/somewhere/a-model"},
        "data": {
            "rows": {"train": 500, "valid": 30, "test": 31},
            "groups": 420,
            "repeated_rows": 17,
            "rows_in_two_splits": 0,
            "versions": {"mlx": "0.32.1", LONG: "1.0"},
            "skipped": [{"source": f"{LONG}.{i}", "reason": "no docstring"} for i in range(90)],
        },
        "before": {"losses": _losses(3.9, 4.1), "answers": before},
        "train": {
            "parameters": 6_000_000,
            "trainable_parameters": 860_000,
            "adapted": ["layers.0.attention.wq"] * 42,
            "rows": 500,
            "rows_cut": sum(length > 256 for length in lengths),
            "tokens_cut": sum(max(length - 256, 0) for length in lengths),
            "rows_empty": 0,
            "max_seq_length": 256,
            "lengths": length_counts(lengths),
        },
        "after": {"losses": _losses(2.1, 2.3), "answers": after},
    }
    inputs = {stage: f"fingerprint of {stage}" for stage in STAGES}
    record = {
        "mlxlora": "0.1.0",
        "recipe": name,
        "seed": 0,
        "plugins": plugins or {"lora": "mlxlora 0.1.0", LONG: f"{LONG} 1.0"},
        "runtime": ["openblas 0.3.30"],
        "machine": {"system": "Linux", "python": "3.11.2", "cores": 2},
        "origins": {"run.seed": "default", "train.iters": "recipe.toml", "data.packages": "command line"},
        "inputs": inputs,
        "started": {stage: inputs[stage] for stage in STAGES[: done + 1]},
        "stages": {
            stage: {"inputs": inputs[stage], "files": {}, "result": results[stage]} for stage in STAGES[:done]
        },
    }
    if done == len(STAGES):
        record["summary"] = summarize(results["before"], results["after"])
    recipe = {
        "run": {"seed": 0},
        "train": {"iters": steps, "warmup": steps // 10, "schedule": "cosine", "learning_rate": 5e-3},
        "data": {"use": "docstrings", "options": {"packages": ["mlx.nn"]}},
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run.json").write_text(json.dumps(record))
    (folder / "recipe.toml").write_text(tomli_w.dumps(recipe))
    lines = [line for step in range(1, steps + 1) for line in _reports(step, steps, draw)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def _losses(valid: float, test: float) -> dict[str, Any]:
    return {
        split: {"loss": loss, "perplexity": math.exp(loss), "tokens": 2345}
        for split, loss in (("valid", valid), ("test", test))
    }


def _reports(step: int, steps: int, draw: random.Random) -> list[dict[str, Any]]:
    done = step / steps
    lines: list[dict[str, Any]] = [
        {
            "kind": "train",
            "step": step,
            "loss": 0.1 + 3.8 * math.exp(-4 * done) * draw.uniform(0.7, 1.3),
            "learning_rate": 5e-3 * 0.5 * (1 + math.cos(math.pi * done)),
            "grad_norm": draw.uniform(0.5, 2.0),
            "steps_per_second": 3.0,
            "tokens_per_second": draw.uniform(900, 1300),
            "trained_tokens": 400 * step,
            "peak_memory_bytes": 900_000_000 + 200_000_000 * (done > 0.3),
        }
    ]
    if step % max(steps // 10, 1) == 0:
        lines.append(
            {
                "kind": "valid",
                "step": step,
                "loss": 2.1 + 1.8 * math.exp(-4 * done),
                "tokens": 99,
                "seconds": 1.0,
            }
        )
    return lines
