"""Fixtures that many tests share: a tiny checkpoint with a real tokenizer, and environments of their own."""

from __future__ import annotations

import json
import os
import random
import signal
import site
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from litter import untracked
from sharing import is_one_of_several
from sharing import pytest_cmdline_main as pytest_cmdline_main
from sharing import pytest_collection_modifyitems as pytest_collection_modifyitems
from sharing import pytest_xdist_make_scheduler as pytest_xdist_make_scheduler
from warm import Done, Warm

from mlxlora_core import plugins
from mlxlora_core.machine.device import prepare_cpu

VOCAB_SIZE = 320
_SUBJECTS = ("a layer", "the adapter", "this module", "an optimizer", "the tokenizer", "every plugin")
_VERBS = ("scales", "returns", "computes", "keeps", "applies", "reads")
_OBJECTS = ("the weights", "a gradient", "an array of floats", "its inputs", "the last token", "a mask")
_ENDS = ("in float32", "element by element", "along the last axis", "once a step", "without a copy")


# Started under nohup or as a shell's background job, all that the tests start would pass these over.
for _ignored in (signal.SIGHUP, signal.SIGTERM):
    signal.signal(_ignored, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a test that wants a Hub brings its own
# Whatever is started compiles what it imports, each time, where this is set; git ignores byte code.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

# As every verb does, before MLX computes anything. Whether a test ran after one that calls a verb would
# otherwise decide what multiplies, and how fast; at night MLX's own products begin.
prepare_cpu()
if os.environ.get("MLXLORA_TEST_ALL", "") in ("", "0"):
    plugins.start_runtimes(plugins.load(environ={plugins.ALLOW_LIST: ""}))


# --- what a run leaves --------------------------------------------------------

ROOT = Path(__file__).parents[1]
BEFORE = pytest.StashKey[set[str] | None]()


def pytest_sessionstart(session: pytest.Session) -> None:
    """Remember which files are in the working tree that do not belong to it."""
    if not is_one_of_several(session.config):
        session.stash[BEFORE] = untracked(ROOT)


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fail a run that leaves files in the working tree."""
    before = session.stash.get(BEFORE, None)
    after = untracked(ROOT) if before is not None else None
    if before is None or after is None or after <= before:
        return
    names = ", ".join(sorted(after - before)[:10])
    session.config.get_terminal_writer().line(f"\nfiles came into the working tree: {names}", red=True)
    session.exitstatus = session.exitstatus or pytest.ExitCode.TESTS_FAILED


# --- a model and its tokenizer ------------------------------------------------


def sentences(count: int = 400, seed: int = 0) -> list[str]:
    """English-like lines, the same for the same arguments on every machine."""
    draw = random.Random(seed)
    parts = (_SUBJECTS, _VERBS, _OBJECTS, _ENDS)
    return [" ".join(draw.choice(part) for part in parts).capitalize() + "." for _ in range(count)]


@pytest.fixture(scope="session")
def tiny_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SentencePiece model: byte-pair encoding with byte fallback, 320 pieces, BOS 1 and EOS 2.

    Trained on :func:`sentences`, so that any text round-trips. Read it, never write to it.
    """
    import sentencepiece

    folder = tmp_path_factory.mktemp("tokenizer")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences()),
        model_prefix=str(folder / "tokenizer"),
        model_type="bpe",
        vocab_size=VOCAB_SIZE,
        byte_fallback=True,
        character_coverage=1.0,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        num_threads=1,
        minloglevel=2,
    )
    return folder / "tokenizer.model"


@pytest.fixture
def tiny_data(tmp_path: Path) -> Path:
    """A dataset folder of text rows, 40 to train on and four each to validate and test."""
    folder = tmp_path / "data"
    folder.mkdir()
    texts = sentences(40)
    for name, part in (("train", texts), ("valid", texts[:4]), ("test", texts[4:8])):
        lines = (json.dumps({"text": text}) + "\n" for text in part)
        (folder / f"{name}.jsonl").write_text("".join(lines))
    return folder


def write_checkpoint(
    folder: Path,
    tokenizer: Path,
    *,
    seed: int = 0,
    dim: int = 32,
    n_layers: int = 2,
    params: Mapping[str, Any] | None = None,
) -> Path:
    """Write a random Llama checkpoint in the Meta layout.

    Args:
        folder: made if absent; gets consolidated.00.pth (float16), params.json
            and tokenizer.model.
        tokenizer: the tokenizer file to copy.
        seed: of the weights.
        dim: D; 4 heads of D / 4, 2 kv heads, F = 2 D.
        n_layers: L.
        params: put over params.json.

    Returns:
        The folder.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)

    def weight(*shape: int) -> torch.Tensor:
        return (torch.randn(shape, generator=generator) * shape[-1] ** -0.5).half()

    tensors = {
        "tok_embeddings.weight": weight(VOCAB_SIZE, dim),
        "norm.weight": torch.ones(dim).half(),
        "output.weight": weight(VOCAB_SIZE, dim),
    }
    shapes = {
        "attention.wq": (dim, dim),
        "attention.wk": (dim // 2, dim),
        "attention.wv": (dim // 2, dim),
        "attention.wo": (dim, dim),
        "feed_forward.w1": (2 * dim, dim),
        "feed_forward.w2": (dim, 2 * dim),
        "feed_forward.w3": (2 * dim, dim),
    }
    for layer in range(n_layers):
        tensors |= {f"layers.{layer}.{name}.weight": weight(*shape) for name, shape in shapes.items()}
        tensors |= {
            f"layers.{layer}.{name}.weight": torch.ones(dim).half() for name in ("attention_norm", "ffn_norm")
        }
    stated = {"dim": dim, "n_layers": n_layers, "n_heads": 4, "n_kv_heads": 2, "norm_eps": 1e-5}
    stated |= {"multiple_of": 32, "vocab_size": -1} | dict(params or {})
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(tensors, folder / "consolidated.00.pth")
    (folder / "params.json").write_text(json.dumps(stated))
    (folder / "tokenizer.model").write_bytes(tokenizer.read_bytes())
    return folder


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Path) -> Path:
    """The folder of a random Llama checkpoint in the Meta layout; 27 thousand parameters, 60 kB.

    Shared by the whole session: read it, never write to it. A test that needs
    another one calls ``make_checkpoint``.
    """
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint"), tiny_tokenizer)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path) -> Path:
    """The tiny checkpoint as a model folder in float32; read it, never write to it."""
    from mlxlora_core import cli

    folder = tmp_path_factory.mktemp("tiny") / "model"
    files = ["--torch-path", str(tiny_checkpoint), "--mlx-path", str(folder)]
    assert cli.execute(["convert", *files, "--dtype", "float32"]) == 0
    return folder


@pytest.fixture(scope="session")
def make_checkpoint(tiny_tokenizer: Path) -> Callable[..., Path]:
    """:func:`write_checkpoint` with the tiny tokenizer: ``make_checkpoint(folder, seed=1, params={...})``."""

    def make(folder: Path, **arguments: Any) -> Path:
        return write_checkpoint(folder, tiny_tokenizer, **arguments)

    return make


@pytest.fixture(scope="session")
def warm() -> Iterator[Warm]:
    """Starts ``mlxlora`` in processes that have imported everything already."""
    server = Warm(more=["torch"])
    yield server
    server.close()


# --- environments -------------------------------------------------------------


@dataclass(frozen=True)
class Environment:
    """A virtual environment that sees all that is installed here, and what is installed into it alone.

    Attributes:
        folder: of the environment.
        warm: starts its ``mlxlora`` without the time that imports take; plugins are looked for each time.
        variables: the environment variables that its programs get.
    """

    folder: Path
    warm: Warm
    variables: Mapping[str, str] = field(default_factory=dict)

    @property
    def python(self) -> Path:
        """Its interpreter."""
        return self.folder / "bin" / "python"

    def run(self, *command: str | Path, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
        """Run a program of it; the result has ``returncode``, ``stdout`` and ``stderr``."""
        return subprocess.run(
            list(map(str, command)),
            cwd=cwd,
            env={**self.variables, **variables},
            capture_output=True,
            text=True,
            timeout=300,
        )

    def pip(self, *arguments: str | Path, cwd: Path) -> None:
        """Run its pip, which finds everything on this machine and nothing on a network."""
        done = self.run(self.python, "-m", "pip", *arguments, cwd=cwd)
        assert done.returncode == 0, done.stdout + done.stderr

    def mlxlora(
        self, *arguments: str | Path, cwd: Path, **variables: str
    ) -> subprocess.CompletedProcess[str]:
        """Run its ``mlxlora``."""
        return self.run(self.folder / "bin" / "mlxlora", *arguments, cwd=cwd, **variables)

    def forked(self, *arguments: str | Path, cwd: Path, **variables: str) -> Done:
        """As :meth:`mlxlora`, in a process that has imported everything but plugins from outside."""
        return self.warm.run(*arguments, cwd=cwd, environ={**self.variables, **variables})


@pytest.fixture(scope="session")
def make_environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Environment]]:
    """A function that makes a fresh :class:`Environment`; takes a tenth of a second and no network."""

    def make(name: str) -> Environment:
        folder = tmp_path_factory.mktemp(name) / "venv"
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
        (packages,) = folder.glob("lib/python*/site-packages")
        seen = [path for path in (*site.getsitepackages(), site.getusersitepackages()) if os.path.isdir(path)]
        # site.addsitedir reads the .pth files there as well, editable installs among them.
        (packages / "overlay.pth").write_text("".join(f"import site; site.addsitedir({p!r})\n" for p in seen))
        script = folder / "bin" / "mlxlora"
        script.write_text(f"#!{folder}/bin/python\nfrom mlxlora_core.cli import main\nmain()\n")
        script.chmod(0o755)
        # Without build isolation: setuptools is here already, and a test needs no network.
        pip = {"PIP_NO_INDEX": "1", "PIP_NO_BUILD_ISOLATION": "0", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("MLXLORA_", "PYTHON", "PIP_"))}
        path = f"{folder}/bin{os.pathsep}{kept.get('PATH', '')}"
        variables = {**kept, **pip, "PATH": path, "VIRTUAL_ENV": str(folder)}
        servers.append(Warm(folder / "bin" / "python", variables))
        return Environment(folder, servers[-1], variables)

    servers: list[Warm] = []
    yield make
    for server in servers:
        server.close()


@pytest.fixture
def one_torch_thread() -> Iterator[None]:
    """Products of a few numbers gain nothing from threads, and wait long for them on a busy machine."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def servers_stop_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let ``mlxlora serve`` stop without a signal as soon as it is ready."""
    server = pytest.importorskip("mlxlora_core.server.run")
    monkeypatch.setattr(server, "serve", lambda *given, stop, **more: stop())
