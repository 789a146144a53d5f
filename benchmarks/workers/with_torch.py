"""PyTorch: transformers' Llama with peft's LoRA, in float32 or bfloat16."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM
from transformers.generation.streamers import BaseStreamer

from workers.channel import Channel, Job, job, version
from workers.products import product_samples
from workers.shapes import RANK

METAL = "mps" if torch.backends.mps.is_available() else "cpu"
DEVICE = "cuda" if torch.cuda.is_available() else METAL
_LAST: list[float | None] = [None]  # losses of validations


def main() -> None:
    """Do the job."""
    channel, work = Channel(), job()
    torch.set_num_threads(work.threads)
    torch.manual_seed(0)
    facts = {"versions": version("torch", "transformers", "peft"), "runtime": [], "device": DEVICE}
    dtype = getattr(torch, work.dtype)
    if work.task == "matmul":
        samples, loss = _products(work, dtype), None
    else:
        model = AutoModelForCausalLM.from_pretrained(work.folder, dtype=dtype).to(DEVICE)
        if work.adapter or work.task in ("train", "epochs"):
            every = model.config.num_hidden_layers
            top = list(range(every - work.layers, every)) if work.layers else None
            targets = ["q_proj", "v_proj"]
            lora = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=targets, layers_to_transform=top)
            model = get_peft_model(model, lora)
        rows = work.read_rows()
        with torch.inference_mode():
            check = torch.tensor([rows[0][: work.check_tokens]], device=DEVICE)
            loss = _loss(model.eval(), check).item()
        samples = {"train": _train, "epochs": _epochs}.get(work.task, _generate)(work, model, rows)
    channel.say(loss=loss, **facts)
    channel.serve(samples, device_bytes=_device_bytes, loss=lambda: _LAST[-1])


def _device_bytes() -> int:
    if DEVICE == "mps":  # it tells no peak: what it keeps for reuse comes near
        return torch.mps.driver_allocated_memory()
    return torch.cuda.max_memory_allocated() if DEVICE == "cuda" else 0


def _wait() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    elif DEVICE == "mps":
        torch.mps.synchronize()


def _products(work: Job, dtype: Any) -> Iterator[float]:
    a, b = (torch.randn(work.side, work.side, device=DEVICE).to(dtype) for _ in range(2))

    def multiply() -> None:
        a @ b.T
        _wait()

    return product_samples(multiply)


def _loss(model: Any, rows: Any) -> Any:
    """Mean nats of each token after the first, in float32."""
    logits = model(input_ids=rows[:, :-1]).logits.float()
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())


def _train(work: Job, model: Any, given: list[list[int]]) -> Iterator[float]:
    model.train()
    rows = torch.tensor(given, device=DEVICE)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-5)
    start = 0
    while True:
        began = time.perf_counter()
        batch = rows[start : start + work.batch]
        start = (start + work.batch) % len(rows)
        loss = _loss(model, batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()
        _wait()
        yield time.perf_counter() - began


def _epochs(work: Job, model: Any, rows: list[list[int]]) -> Iterator[float]:
    """Seconds of each epoch, each batch padded to its longest row; then of a validation."""
    order = work.read_order()
    optimizer = torch.optim.Adam(
        [p for p in model.parameters() if p.requires_grad], lr=work.learning_rate, betas=(0.9, 0.999)
    )
    for epoch in range(work.epochs):
        began = time.perf_counter()
        model.train()
        for step in order[epoch]:
            total, count = _padded(model, [rows[i] for i in step])
            (total / count).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            total.item()
        _wait()
        yield time.perf_counter() - began
    began = time.perf_counter()
    valid = sorted(work.read_valid(), key=len)
    with torch.inference_mode():
        parts = (valid[i : i + work.batch] for i in range(0, len(valid), work.batch))
        found = [_padded(model.eval(), part) for part in parts]
        _LAST.append(float(sum(total for total, _ in found) / sum(count for _, count in found)))
    yield time.perf_counter() - began


def _padded(model: Any, rows: list[list[int]]) -> tuple[Any, int]:
    """Nats of rows side by side, as transformers' own collator lays them out, and how many tokens counted."""
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=DEVICE)
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=DEVICE)
    logits = model(input_ids=ids, attention_mask=mask).logits.float()
    targets = torch.where(mask.bool(), ids, -100)[:, 1:]
    total = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="sum"
    )
    return total, int((targets >= 0).sum())


class _Clock(BaseStreamer):
    """Notes when each token comes; the first thing it is given is the prompt."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Any) -> None:
        """Called by transformers with the prompt, then with each token."""
        _wait()
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Called by transformers after the last token."""


def _generate(work: Job, model: Any, _: list[list[int]]) -> Iterator[float]:
    """Of decode the time after the first token, of prefill the time up to it."""
    model.eval()
    prompt = torch.tensor([work.prompt], device=DEVICE)
    count = 1 + (work.new_tokens if work.task == "decode" else 0)
    length = {"min_new_tokens": count, "max_new_tokens": count, "do_sample": False, "pad_token_id": 0}
    while True:
        clock, began = _Clock(), time.perf_counter()
        with torch.inference_mode():
            model.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), streamer=clock, **length)
        times = clock.times[1:]
        assert len(times) == count
        yield times[-1] - times[0] if count > 1 else times[0] - began


if __name__ == "__main__":
    main()
