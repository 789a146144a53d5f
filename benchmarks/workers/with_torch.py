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
        if work.adapter or work.task == "train":
            lora = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=["q_proj", "v_proj"])
            model = get_peft_model(model, lora)
        rows = torch.tensor(work.read_rows(), device=DEVICE)
        with torch.inference_mode():
            loss = _loss(model.eval(), rows[:1, : work.check_tokens]).item()
        samples = _train(work, model, rows) if work.task == "train" else _generate(work, model)
    channel.say(loss=loss, **facts)
    channel.serve(samples, device_bytes=_device_bytes)


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


def _train(work: Job, model: Any, rows: Any) -> Iterator[float]:
    model.train()
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


def _generate(work: Job, model: Any) -> Iterator[float]:
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
