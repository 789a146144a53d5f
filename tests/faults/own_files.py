"""Files of our own, damaged by seed and read back by the command line, in one process.

::

    python tests/faults/own_files.py [--count 10000] [--file run.json] [--way structure]

Each mutation changes what a file says (a key dropped, a value of another type,
negative, huge, deep, twice, not finite) or its bytes. Whatever comes of it,
the verb ends with a documented exit code and says why in one short line. The
same number gives the same file on every machine.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import random
import shutil
import sys
import tempfile
import time
import tomllib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import file_kinds
from mutations import mutation, summary
from structures import as_json, as_toml, changed

from mlxlora_core import cli
from mlxlora_core.cli import session

WAYS = ("structure", "bytes")
SECONDS = 20.0  # that a verb may take
_LINE_BYTES = 2000
_LONG_AGO = 1_000_000_000  # a file that old is nobody's who is just writing it


@dataclass
class Bench:
    """A folder with a run that ended, a training that was stopped, and the dataset of both.

    Attributes:
        folder: where it is.
        good: file -> its bytes as mlxlora has written them.
    """

    folder: Path
    good: dict[str, bytes] = field(default_factory=dict)

    def path(self, file: str) -> Path:
        """Where a file is damaged."""
        place = {"dataset.json": "made", "state.json": self.newest, "MANIFEST.json": self.newest}
        return self.folder / place.get(file, "run") / file

    @property
    def newest(self) -> str:
        """The newest checkpoint of the training that was stopped."""
        return "a.checkpoints/step-0000003"

    def commands(self, file: str, number: int) -> list[list[str]]:
        """The verbs that read it; what takes long not every time."""
        run, recipe = str(self.folder / "run"), str(self.folder / "run" / "recipe.toml")
        if file == "recipe.toml":
            return [["report", run], ["run", recipe, "--dry-run"]]
        if file == "metrics.jsonl":
            return [["report", run], *([self.resume] if number % 20 == 0 else [])]
        if file == "run.json":
            again = ["run", str(self.folder / "tiny.toml"), "--set", f"run.folder={run}"]
            full = number % 40 == 0
            return [
                ["report", run],
                [*again, *([] if full else ["--dry-run"])],
                *([["report", run]] if full else []),
            ]
        if file == "dataset.json":
            made, options = str(self.folder / "made"), f"path={self.folder / 'data'}"
            return [["data", "--builder", "jsonl", "--out", made, "--set", options, "--overwrite"]]
        return [self.resume]

    @property
    def resume(self) -> list[str]:
        """The command that goes on with the training that was stopped."""
        return [*self.train(4), "--resume"]

    def train(self, iters: int) -> list[str]:
        """The command of the training, of so many steps."""
        at = {"--model": "run/model", "--data": "data", "--adapter-file": "a.safetensors"}
        at |= {"--metrics-file": "run/metrics.jsonl"}
        values = {"--iters": iters, "--save-every": 1, "--batch-size": 1, "--val-batches": 1}
        paths = {option: self.folder / place for option, place in at.items()}
        return ["train", *(str(part) for pair in (paths | values).items() for part in pair)]


def make_bench(folder: Path, checkpoint: Path, data: Path) -> Bench:
    """A run, a training and a dataset in ``folder``, made by the verbs."""
    shutil.copytree(data, folder / "data")
    (folder / "tiny.toml").write_text(
        f"""
        [run]
        seed = 3
        [model]
        torch_path = "{checkpoint}"
        [data]
        use = "jsonl"
        options = {{ path = "{folder / "data"}" }}
        [adapter]
        use = "lora"
        options = {{ rank = 2 }}
        [train]
        iters = 4
        batch_size = 2
        steps_per_report = 1
        steps_per_eval = 2
        [generate]
        prompts = ["A layer scales", "Every plugin"]
        num_tokens = 2
        """
    )
    bench = Bench(folder)
    for arguments in (
        ["run", str(folder / "tiny.toml"), "--set", f"run.folder={folder / 'run'}"],
        ["data", *("--builder", "jsonl", "--out", str(folder / "made")), *_from_data(folder)],
        bench.train(3),
    ):
        code, told = _told(arguments)
        assert code == 0, told
    bench.good = {file: bench.path(file).read_bytes() for file in FILES}
    shutil.copytree(folder, folder.with_name(f"{folder.name}.good"))
    return bench


def _from_data(folder: Path) -> list[str]:
    return ["--set", f"path={folder / 'data'}"]


def put_back(bench: Bench) -> None:
    """Make every folder again what it was."""
    good = bench.folder.with_name(f"{bench.folder.name}.good")
    for name in ("run", "made", "a.checkpoints"):
        shutil.rmtree(bench.folder / name, ignore_errors=True)
        shutil.copytree(
            good / name, bench.folder / name, copy_function=os.link if name == "model" else shutil.copy2
        )


FILES = ("run.json", "metrics.jsonl", "recipe.toml", "state.json", "MANIFEST.json", "dataset.json")


def damaged(bench: Bench, file: str, way: str, number: int) -> bytes:
    """The bytes of one mutation of a file."""
    good, draw = bench.good[file], random.Random(f"{file}/{way}/{number}")
    if way == "bytes":
        return mutation(good, list(bench.good.values()), min(len(good), 400), file, number)
    if file == "recipe.toml":
        return as_toml(changed(tomllib.loads(good.decode()), draw))
    if file == "metrics.jsonl":
        lines = good.split(b"\n")[:-1]
        for _ in range(draw.choice((1, 2, 5))):
            at = draw.randrange(len(lines))
            lines[at] = as_json(changed(json.loads(good.split(b"\n")[0]), draw))
        return b"\n".join(lines) + draw.choice((b"\n", b""))
    return as_json(changed(json.loads(good), draw))


def _put(bench: Bench, file: str, content: bytes, number: int) -> None:
    """Write a damaged file; most of those in a checkpoint get the sums that vouch for them."""
    path = bench.path(file)
    path.write_bytes(content)
    manifest = bench.path("MANIFEST.json")
    if number % 8 and file in ("state.json", "MANIFEST.json"):
        try:
            held = json.loads(manifest.read_bytes())
            if file == "state.json":
                held["files"][file] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
            held.pop("sha256", None)
            held["sha256"] = hashlib.sha256(json.dumps(held, sort_keys=True).encode()).hexdigest()
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            return
        manifest.write_text(json.dumps(held))
    os.utime(path, (_LONG_AGO, _LONG_AGO))


@contextmanager
def plugins_loaded_once() -> Iterator[None]:
    """Inside, every verb gets the same registry: finding plugins takes longer than all the rest."""
    registry = session.load(())
    load, session.load = session.load, lambda *_, **__: registry
    try:
        yield
    finally:
        session.load = load


def _told(arguments: list[str]) -> tuple[int, str]:
    """Exit code of a command line, and what stands on stderr."""
    error = io.StringIO()
    with redirect_stderr(error), redirect_stdout(io.StringIO()):
        code = int(cli.execute(arguments))
    return code, error.getvalue()


def fault_of(arguments: list[str]) -> tuple[int, str]:
    """The exit code of a verb, and what is wrong with how it ended, or nothing."""
    began = time.perf_counter()
    try:
        code, told = _told(arguments)
    except BaseException as fault:
        return 1, f"{arguments[0]} raised {type(fault).__name__}: {fault}"[:300]
    seconds = time.perf_counter() - began
    last = (told.splitlines() or [""])[-1]
    if code not in (0, 2, 3, 4, 5, 8):
        return code, f"{arguments[0]} ended with {code}: {last}"[:300]
    if code and not (last.startswith("mlxlora: ") and last.isprintable()):
        return code, f"{arguments[0]} told {last!r}"[:300]
    if max(len(line.encode()) for line in (*told.splitlines(), "")) > _LINE_BYTES:
        return code, f"{arguments[0]} told a line that is too long"
    if "Traceback" in told:
        return code, f"{arguments[0]} printed a traceback"
    return code, f"{arguments[0]} took {seconds:.1f} s" if seconds > SECONDS else ""


@dataclass
class Tally:
    """What became of mutations: exit code -> how many, and number -> fault."""

    codes: Counter[int] = field(default_factory=Counter)
    faults: dict[int, str] = field(default_factory=dict)


def fuzz(bench: Bench, file: str, way: str, numbers: range) -> Tally:
    """Damage a file in each of these ways, and let the verbs read it."""
    tally = Tally()
    with plugins_loaded_once():
        for number in numbers:
            put_back(bench)
            _put(bench, file, damaged(bench, file, way, number), number)
            for arguments in bench.commands(file, number):
                code, fault = fault_of(arguments)
                tally.codes[code] += 1
                if fault:
                    tally.faults.setdefault(number, fault)
    put_back(bench)
    return tally


def prepare(folder: Path) -> Bench:
    """A bench of the smallest model that there is."""
    (folder / "material").mkdir(parents=True)
    file_kinds.prepare(folder / "material")
    (folder / "rows").mkdir()
    for name in ("train", "valid", "test"):
        rows = ({"text": f"the layer scales {name} {i}"} for i in range(4))
        (folder / "rows" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "bench").mkdir()
    return make_bench(folder / "bench", folder / "material" / "checkpoint", folder / "rows")


def main() -> int:
    """Run from the command line; 1 when a mutation went wrong."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--count", type=int, default=10_000, help="mutations of each kind")
    parser.add_argument("--start", type=int, default=0, help="the first of them")
    parser.add_argument("--file", action="append", choices=FILES, help="these files only")
    parser.add_argument("--way", action="append", choices=WAYS, help="in this way only")
    options = parser.parse_args()
    bad = 0
    with tempfile.TemporaryDirectory(prefix="mlxlora-own-files-") as name:
        bench = prepare(Path(name))
        for file in options.file or FILES:
            for way in options.way or WAYS:
                began = time.perf_counter()
                tally = fuzz(bench, file, way, range(options.start, options.start + options.count))
                seconds = time.perf_counter() - began
                codes = {int(code): count for code, count in sorted(tally.codes.items())}
                sys.stdout.write(f"{file} by {way}: {options.count} in {seconds:.0f} s, exit codes {codes}\n")
                sys.stdout.writelines(summary(tally.faults))
                bad += len(tally.faults)
                sys.stdout.flush()
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
