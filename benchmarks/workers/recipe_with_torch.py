"""PyTorch with PEFT: the training that benchmarks/recipe.py asks for."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

#: mlxlora's linears in transformers
LINEARS = {
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w3": "mlp.up_proj",
    "feed_forward.w2": "mlp.down_proj",
}
Row = tuple[list[int], list[bool]]


def main() -> None:
    """Train, validate, and print what it took."""
    work = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(work["threads"])
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(work["folder"], dtype=torch.float32)
    count = base.config.num_hidden_layers
    lora = LoraConfig(
        r=work["rank"],
        lora_alpha=work["scale"] * work["rank"],
        target_modules=[name.partition(".")[2] for name in LINEARS.values()],
        layers_to_transform=list(range(count - work["layers"], count)) if work["layers"] > 0 else None,
    )
    began = time.perf_counter()
    model = get_peft_model(base, lora)
    _begin_alike(model, work["first"])
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=1e-3)
    for _ in range(work["validations"] - 1):  # all but the last, before the steps: they take as long there
        _validated(model, work)
    model.train()
    for rows, rate in zip(work["steps"], work["rates"], strict=True):
        total, counted = _nats(model, [work["train"][row] for row in rows])
        (total / counted).backward()
        if work["clip"] is not None:
            torch.nn.utils.clip_grad_norm_(trained, work["clip"])
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        total.item()
    loss = _validated(model, work)
    sys.stdout.write(json.dumps({"seconds": time.perf_counter() - began, "loss": loss}) + "\n")


def _begin_alike(model: Any, path: str) -> None:
    """Let the adapter begin with mlxlora's values: lora_a (inputs, R) of each linear, and 0."""
    first = {name: torch.from_numpy(lora_a) for name, lora_a in np.load(path).items()}
    for name, lora_a in first.items():
        _, layer, linear = name.removesuffix(".lora_a").split(".", 2)
        module = model.get_submodule(f"base_model.model.model.layers.{layer}.{LINEARS[linear]}")
        module.lora_A["default"].weight.data.copy_(lora_a.T)
    assert len(first) == sum("lora_A" in name for name, _ in model.named_parameters())


def _validated(model: Any, work: dict[str, Any]) -> float:
    """Nats of a token on the rows to validate on."""
    rows: list[Row] = sorted(work["valid"], key=lambda row: len(row[0]))
    with torch.inference_mode():
        parts = (rows[i : i + work["batch"]] for i in range(0, len(rows), work["batch"]))
        found = [_nats(model.eval(), part) for part in parts]
    return float(sum(total for total, _ in found) / sum(counted for _, counted in found))


def _nats(model: Any, rows: Sequence[Row]) -> tuple[Any, int]:
    """Nats of rows side by side, summed over the tokens that count, and how many these are."""
    width = max(len(tokens) for tokens, _ in rows)
    spare = [width - len(tokens) for tokens, _ in rows]
    ids = torch.tensor([tokens + [0] * more for (tokens, _), more in zip(rows, spare, strict=True)])
    seen = torch.tensor([[1] * (width - more) + [0] * more for more in spare])
    counts = torch.tensor([mask + [False] * more for (_, mask), more in zip(rows, spare, strict=True)])
    targets = torch.where(counts, ids, -100)[:, 1:]
    logits = model(input_ids=ids, attention_mask=seen).logits.float()
    total = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="sum"
    )
    return total, int((targets >= 0).sum())


if __name__ == "__main__":
    main()
