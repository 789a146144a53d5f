"""What a verb says that it needs of memory, against what its process takes and under real limits.

The suite takes two of ten shapes, some verbs and some limits; ``MLXLORA_TEST_ALL=1`` takes all.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="limits and /proc of Linux")

ALL = os.environ.get("MLXLORA_TEST_ALL", "") not in ("", "0")
VERBS = ["train", "evaluate", "generate", "convert", "export"]

#: a verb, and after it the most memory that its process has held
CHILD = """
import sys
from mlxlora_core import cli
code = cli.execute(sys.argv[1:])
held = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
print("held", int(held.split()[1]) * 1024)
raise SystemExit(code)
"""

_NAMES = ("wq", "wk", "wv", "wo", "w1", "w2", "w3")


@dataclass(frozen=True)
class Shape:
    """Of a model, and of what is done with it; bits 0 is a dense model."""

    dim: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    vocab: int
    batch: int
    tokens: int
    rank: int = 8
    adapted: int = -1
    targets: str = '["wq","wv"]'
    bits: int = 0

    def linears(self) -> dict[str, tuple[int, int]]:
        """(outputs, inputs) of the linears of a layer."""
        wide, narrow = self.heads * self.head_dim, self.kv_heads * self.head_dim
        shapes = [(wide, self.dim), (narrow, self.dim), (narrow, self.dim), (self.dim, wide)]
        shapes += [(self.hidden, self.dim), (self.dim, self.hidden), (self.hidden, self.dim)]
        places = [f"{'feed_forward' if name[1].isdigit() else 'attention'}.{name}" for name in _NAMES]
        return dict(zip(places, shapes, strict=True))


def weight(*size: int) -> mx.array:
    """Random weights, float16."""
    return (mx.random.normal(size) * size[-1] ** -0.5).astype(mx.float16)


def write_model(folder: Path, shape: Shape, tokenizer: Path) -> Path:
    """A random model folder of a shape."""
    mx.random.seed(0)
    tensors = {"norm.weight": mx.ones((shape.dim,), mx.float16)}
    tensors |= {f"{name}.weight": weight(shape.vocab, shape.dim) for name in ("tok_embeddings", "output")}
    packed = {}
    for layer in range(shape.layers):
        for name in ("attention_norm", "ffn_norm"):
            tensors[f"layers.{layer}.{name}.weight"] = mx.ones((shape.dim,), mx.float16)
        for name, size in shape.linears().items():
            path, value = f"layers.{layer}.{name}", weight(*size)
            if shape.bits:
                parts = mx.quantize(value, 64, shape.bits)
                tensors |= {
                    f"{path}.{k}": p for k, p in zip(("weight", "scales", "biases"), parts, strict=True)
                }
                packed[path] = {}
            else:
                tensors[f"{path}.weight"] = value
    config = {
        **{"model_type": "llama", "dim": shape.dim, "n_layers": shape.layers, "n_heads": shape.heads},
        **{"n_kv_heads": shape.kv_heads, "head_dim": shape.head_dim, "hidden_dim": shape.hidden},
        **{"norm_eps": 1e-5, "vocab_size": shape.vocab, "tie_word_embeddings": False},
    }
    if shape.bits:
        config["quantization"] = {"group_size": 64, "bits": shape.bits}
    folder.mkdir()
    mx.save_safetensors(str(folder / "model.safetensors"), tensors)
    (folder / "config.json").write_text(json.dumps(config))
    shutil.copy(tokenizer, folder / "tokenizer.model")
    return folder


def write_rows(folder: Path, rows: int, words: int) -> Path:
    """A dataset folder in which all rows are alike."""
    folder.mkdir()
    row = json.dumps({"text": "the adapter keeps the weights " * (words // 5)}) + "\n"
    for name in ("train", "valid", "test"):
        (folder / f"{name}.jsonl").write_text(row * rows)
    return folder


def done(prefix: list[str], *arguments: object) -> tuple[int, int, subprocess.CompletedProcess[str]]:
    """A verb in a child: bytes that it said and that it took, and the child."""
    command = [*prefix, sys.executable, "-c", CHILD, *map(str, arguments)]
    child = subprocess.run(command, capture_output=True, text=True, timeout=300)
    said = re.findall(r"needs about ([\d.]+) (GB|MB) of (?:memory|addresses)", child.stderr)
    held = re.search(r"^held (\d+)$", child.stdout, re.MULTILINE)
    number, unit = said[-1] if said else ("0", "MB")
    return int(float(number) * (10**9 if unit == "GB" else 10**6)), int(held[1]) if held else 0, child


SHAPES = [
    Shape(256, 4, 4, 4, 64, 704, 2048, batch=4, tokens=512),
    Shape(128, 8, 16, 4, 16, 256, 320, batch=4, tokens=512, targets="all-linear"),
    Shape(512, 2, 4, 1, 128, 1376, 16000, batch=8, tokens=128, rank=64),
    Shape(512, 12, 4, 4, 128, 1376, 320, batch=8, tokens=256, adapted=2),
    Shape(64, 16, 4, 2, 16, 128, 320, batch=16, tokens=256, targets="all-linear"),
    Shape(384, 6, 6, 2, 64, 1024, 4096, batch=4, tokens=300, rank=16, targets="all-linear", bits=4),
    Shape(384, 6, 6, 2, 64, 1024, 4096, batch=1, tokens=1000),
    Shape(256, 2, 32, 8, 8, 512, 320, batch=4, tokens=512),
    Shape(256, 3, 4, 4, 64, 704, 32000, batch=16, tokens=64, adapted=1),
    Shape(768, 4, 6, 2, 128, 2048, 4096, batch=4, tokens=256, bits=8),
]


@pytest.mark.parametrize(
    "shape",
    SHAPES if ALL else SHAPES[::5],
    ids=lambda s: f"{s.dim}x{s.layers}-{s.heads}x{s.head_dim}-{s.vocab}",
)
def test_what_is_said_is_taken_within_a_factor_of_one_and_a_half(
    tmp_path: Path, tiny_tokenizer: Path, shape: Shape
) -> None:
    """By the process as the system counts it, not by MLX's own count."""
    model = write_model(tmp_path / "model", shape, tiny_tokenizer)
    data = write_rows(tmp_path / "data", shape.batch, 2 * shape.tokens)
    reading = ["--model", model, "--data", data, "--batch-size", shape.batch]
    reading += ["--max-seq-length", shape.tokens]
    training = ["train", *reading, "--iters", 2, "--lora-layers", shape.adapted]
    training += ["--set", f"adapter.rank={shape.rank}", "--set", f"adapter.targets={shape.targets}"]
    adapter, dense = ["--adapter-file", tmp_path / "a.safetensors"], tmp_path / "dense"
    training += adapter
    prompt = "the adapter keeps the weights " * (shape.tokens // 10)
    reading_only = [["evaluate", *reading], ["generate", "--model", model, "-p", prompt, "-n", 3]]
    written = [
        ["export", "--model", model, "--to", "npz", "--out", tmp_path / "exported"],
        ["export", "--model", model, "--to", "npz", *adapter, "--out", tmp_path / "exported with it"],
        ["fuse", "--model", model, *adapter, "--save-path", tmp_path / "fused"],
        *([["fuse", "--model", model, *adapter, "--dequantize", "--save-path", dense]] if shape.bits else []),
    ]
    if ALL:
        verbs = [training, *reading_only, *written]
    else:
        verbs = reading_only if shape.bits else [training, *written]
    for verb in verbs:
        said, taken, child = done([], *verb)
        assert child.returncode == 0, child.stderr
        assert said / 1.5 < taken < said * 1.5, (verb[0], said / 1e6, taken / 1e6)


@pytest.mark.skipif(not ALL, reason="takes 5 GB of memory and of the disk: MLXLORA_TEST_ALL=1")
def test_a_tensor_above_two_gib_is_exported(tmp_path: Path, tiny_tokenizer: Path) -> None:
    """2.3 GB of an embedding in float16, whose last number is looked for."""
    shape = Shape(1100, 1, 4, 1, 276, 320, 320, batch=1, tokens=8)
    model, rows = write_model(tmp_path / "model", shape, tiny_tokenizer), 2**20
    tensors = dict(mx.load(str(model / "model.safetensors"), return_metadata=True)[0])
    mx.eval(list(tensors.values()))
    del tensors["output.weight"]
    tensors["tok_embeddings.weight"] = mx.zeros((rows, shape.dim), mx.float16)
    tensors["tok_embeddings.weight"][-1, -1] = 3.0
    assert tensors["tok_embeddings.weight"].nbytes > 2**31
    mx.save_safetensors(str(model / "model.safetensors"), tensors)
    del tensors
    mx.clear_cache()
    config = json.loads((model / "config.json").read_text())
    config |= {"vocab_size": rows, "tie_word_embeddings": True}
    (model / "config.json").write_text(json.dumps(config))
    said, taken, child = done([], "export", "--model", model, "--to", "npz", "--out", tmp_path / "out")
    assert child.returncode == 0, child.stderr
    assert said / 1.5 < taken < said * 1.5, (said / 1e6, taken / 1e6)
    embedding = mx.load(str(tmp_path / "out/weights.npz"))["tok_embeddings.weight"]
    assert embedding.shape == (rows, shape.dim) and embedding[-1, -1].item() == 3.0


@pytest.fixture
def verbs(tmp_path: Path, tiny_checkpoint: Path, tiny_model: Path) -> dict[str, list[object]]:
    """A small piece of work for each verb, with rows and prompts that are long for what is allowed."""
    data = write_rows(tmp_path / "data", 8, 800)
    reading = ["--model", tiny_model, "--data", data, "--batch-size", 8]
    long = "the adapter keeps the weights " * 120
    return {
        "train": ["train", *reading, "--iters", 1, "--adapter-file", tmp_path / "a.safetensors"],
        "evaluate": ["evaluate", *reading],
        "generate": ["generate", "--model", tiny_model, "-p", long, "-n", 2],
        "convert": ["convert", "--torch-path", tiny_checkpoint, "--mlx-path", tmp_path / "converted"],
        "export": ["export", "--model", tiny_model, "--to", "npz", "--out", tmp_path / "exported"],
    }


def assert_ends_well(child: subprocess.CompletedProcess[str]) -> None:
    """With its work done, or with one line and 6; not by a signal, nor by a line of a library."""
    assert child.returncode in (0, 6), (child.returncode, child.stderr[-500:])
    if child.returncode:
        assert child.stderr.splitlines()[-1].startswith("mlxlora: ") and "Fix: " in child.stderr
    assert "OpenBLAS error" not in child.stderr + child.stdout


@pytest.mark.parametrize("verb", VERBS if ALL else ["train", "convert"])
def test_under_few_addresses_a_verb_ends_well_or_with_6(verbs: dict[str, list[object]], verb: str) -> None:
    codes = []
    for megabytes in (100, 250, 690, 760, 2500) if ALL else (100, 690, 2500):
        _, _, child = done(["prlimit", f"--as={megabytes * 10**6}"], *verbs[verb])
        assert_ends_well(child)
        codes.append(child.returncode)
        for left in ("a.safetensors", "a.checkpoints", "converted", "exported"):
            shutil.rmtree(Path(str(verbs["train"][-1])).with_name(left), ignore_errors=True)
        Path(str(verbs["train"][-1])).unlink(missing_ok=True)
    assert codes[0] == 6 and codes[-1] == 0, codes


@pytest.fixture
def group() -> Iterator[Path]:
    """A control group for memory; a test that needs one is skipped where none can be made."""
    folder = Path("/sys/fs/cgroup/memory" if Path("/sys/fs/cgroup/memory").is_dir() else "/sys/fs/cgroup")
    folder /= f"mlxlora-test-{os.getpid()}"
    try:
        folder.mkdir()
    except OSError as fault:
        pytest.skip(f"no control group can be made: {fault}")
    try:
        if not (folder / "memory.limit_in_bytes").exists() and not (folder / "memory.max").exists():
            pytest.skip("control groups here have no limit of memory")
        yield folder
    finally:
        folder.rmdir()


@pytest.mark.parametrize("verb", VERBS if ALL else ["generate"])
def test_in_a_control_group_of_little_more_than_is_said_a_verb_ends_well_or_with_6(
    verbs: dict[str, list[object]], verb: str, group: Path
) -> None:
    """And in one of less; the kernel kills a process that takes more."""
    said, _, first = done([], *verbs[verb])
    assert said and first.returncode == 0, first.stderr
    limit = next(p for n in ("memory.limit_in_bytes", "memory.max") if (p := group / n).exists())
    enter = ["sh", "-c", f'echo $$ > {group}/cgroup.procs; exec "$@"', "sh"]
    for share in (1.2, 0.6):
        limit.write_text(str(int(said * share)))
        _, _, child = done(
            enter, *verbs[verb], *(["--overwrite"] if verb not in ("evaluate", "generate") else [])
        )
        assert_ends_well(child)


def test_ranks_that_do_not_fit_side_by_side_are_refused(
    tmp_path: Path, tiny_tokenizer: Path, group: Path
) -> None:
    """Where each of them would alone: in a group that has room for one and a half."""
    shape = Shape(128, 2, 32, 8, 4, 128, 320, batch=1, tokens=1000)
    model = write_model(tmp_path / "model", shape, tiny_tokenizer)
    adapter, data = tmp_path / "a.safetensors", write_rows(tmp_path / "data", 2, 2 * shape.tokens)
    training = ["train", "--model", model, "--data", data, "--batch-size", 1, "--iters", 1]
    training += ["--max-seq-length", shape.tokens, "--adapter-file", adapter, "--grad-checkpoint", "off"]
    said, _, first = done([], *training)
    assert first.returncode == 0, first.stderr
    before = adapter.read_bytes()
    limit = next(p for n in ("memory.limit_in_bytes", "memory.max") if (p := group / n).exists())
    enter = ["sh", "-c", f'echo $$ > {group}/cgroup.procs; exec "$@"', "sh"]
    codes = []
    for share, count in ((1.5, 1), (1.5, 2), (3, 2)) if ALL else ((1.5, 1), (1.5, 2)):
        limit.write_text(str(int(said * share)))
        _, _, child = done(enter, *training, "--overwrite", "-n", count)
        codes.append(child.returncode)
        if codes[-1]:
            (line,) = [line for line in child.stderr.splitlines() if line.startswith("mlxlora: ")]
            assert "by each of the 2 ranks of this machine. Fix: " in line
            assert adapter.read_bytes() == before
    assert codes == ([0, 6, 0] if ALL else [0, 6])
