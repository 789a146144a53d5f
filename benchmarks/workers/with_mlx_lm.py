"""mlx-lm, through its own trainer and its own generator; on request with mlxlora's BLAS under MLX."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optimizers
from mlx_lm import load
from mlx_lm.convert import convert
from mlx_lm.generate import generate_step
from mlx_lm.tuner.callbacks import TrainingCallback
from mlx_lm.tuner.trainer import TrainingArgs, default_loss, train
from mlx_lm.tuner.utils import linear_to_lora_layers

from workers.channel import Channel, Job, job, version
from workers.products import product_samples
from workers.shapes import RANK

MORE_STEPS = 1_000_000  # than anybody asks for
LORA = {"rank": RANK, "scale": 2.0, "dropout": 0.0, "keys": ["self_attn.q_proj", "self_attn.v_proj"]}


def main() -> None:
    """Do the job."""
    channel, work = Channel(), job()
    if work.task == "prepare":
        _prepare(work)
        return
    notes = []
    if work.fast_blas:
        from mlxlora_openblas.runtime import start

        notes = [start().text]
    facts = {"versions": version("mlx-lm", "mlx"), "runtime": notes, "device": str(mx.default_device())}
    if work.task == "matmul":
        a, b = (mx.random.normal((work.side, work.side)) for _ in range(2))
        channel.say(loss=None, **facts)
        channel.serve(product_samples(lambda: mx.eval(a @ b.T)))
    model, _ = load(work.folder)
    if work.adapter or work.task == "train":
        model.freeze()
        linear_to_lora_layers(model, len(model.layers), LORA)
    check = mx.array([work.read_rows()[0][: work.check_tokens]])
    loss = nn.losses.cross_entropy(model(check[:, :-1]).astype(mx.float32), check[:, 1:]).mean().item()
    channel.say(loss=loss, **facts)
    if work.task == "train":
        _train(work, model, channel)
    else:
        channel.serve(_generate(work, model), device_bytes=mx.get_peak_memory)


def _prepare(work: Job) -> None:
    """A folder in another type, or with the linears but the head in few bits, as mlxlora quantizes."""
    convert(
        work.folder,
        work.target,
        dtype=work.dtype,
        quantize=work.bits > 0,
        q_group_size=64,
        q_bits=work.bits or None,
        quant_predicate=lambda path, module: "embed_tokens" not in path and "lm_head" not in path,
    )


class _OneByOne(TrainingCallback):
    """Reports a step, and holds the trainer until the next one is asked for."""

    def __init__(self, channel: Channel) -> None:
        self.channel = channel
        self.compiles = 0
        channel.wait()
        self.began = time.perf_counter()

    def loss(self, *arguments: Any) -> Any:
        """The trainer's loss, which is called as often as its step is compiled."""
        self.compiles += 1
        return default_loss(*arguments)

    def on_train_loss_report(self, train_info: dict[str, Any]) -> None:
        """Called by the trainer after every step."""
        seconds = time.perf_counter() - self.began
        self.channel.say(seconds=seconds, device_bytes=mx.get_peak_memory(), compiles=self.compiles)
        self.channel.wait()
        self.began = time.perf_counter()


def _train(work: Job, model: Any, channel: Channel) -> None:
    rows = [(row, 0) for row in work.read_rows()]
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArgs(
            batch_size=work.batch,
            iters=MORE_STEPS,
            steps_per_report=1,
            steps_per_save=MORE_STEPS,
            max_seq_length=len(rows[0][0]),  # or rows are padded to a multiple of 32, plus one
            adapter_file=str(Path(folder) / "adapters.safetensors"),
        )
        optimizer = optimizers.Adam(learning_rate=1e-5)
        steps = _OneByOne(channel)
        train(model, optimizer, rows, args=args, loss=steps.loss, training_callback=steps)


def _generate(work: Job, model: Any) -> Iterator[float]:
    """Of decode the time after the first token, of prefill the time up to it."""
    count = 1 + (work.new_tokens if work.task == "decode" else 0)
    while True:
        began = time.perf_counter()
        tokens = generate_step(mx.array(work.prompt), model, max_tokens=count)
        next(tokens)
        first = time.perf_counter()
        made = sum(1 for _ in tokens)
        last = time.perf_counter()
        mx.synchronize()
        assert made == count - 1
        yield last - first if made else first - began


if __name__ == "__main__":
    main()
