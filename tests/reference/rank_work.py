"""Trainings over ranks for tests: starts the ranks, and is what each of them runs.

::

    python tests/reference/rank_work.py JOB.json

A job holds a model folder, rows, and cases: one training after the other, each by all ranks. What a
rank finds of a case goes into ``CASE.RANK.json``, and what it has trained into ``CASE.RANK.npz``.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

#: after which a test gives up; ranks that are well take a few seconds
SECONDS = 120


def work_on(job: Path) -> list[str]:
    """The command of a rank that is at work on a job."""
    return [sys.executable, __file__, str(job)]


def start(count: int, command: Sequence[str], folder: Path) -> list[subprocess.Popen[bytes]]:
    """So many ranks on the loopback address; what they need is written into a folder."""
    hosts = folder / f"hosts-{count}.json"
    hosts.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in _ports(count)]))
    here = {k: v for k, v in os.environ.items() if not k.startswith(("MLX_", "OMPI_", "PMI_"))}
    return [
        subprocess.Popen(
            command,
            env={**here, "MLX_HOSTFILE": str(hosts), "MLX_RANK": str(rank), "MLXLORA_THREADS": "1"},
            stderr=subprocess.PIPE,
        )
        for rank in range(count)
    ]


def finish(ranks: Sequence[subprocess.Popen[bytes]]) -> list[tuple[int, str]]:
    """Exit code and stderr of each rank, when all have ended."""
    try:
        return [
            (rank.wait(), told.decode()) for rank in ranks for _, told in [rank.communicate(timeout=SECONDS)]
        ]
    finally:
        for rank in ranks:
            rank.kill()


def _ports(count: int) -> list[int]:
    """Ports that are free, and one after them, at which the ranks meet."""
    while True:
        with ExitStack() as stack:
            sockets = [stack.enter_context(socket.socket()) for _ in range(count + 1)]
            try:
                sockets[0].bind(("127.0.0.1", 0))
                first = sockets[0].getsockname()[1]
                for place, other in enumerate(sockets[1:], start=1):
                    other.bind(("127.0.0.1", first + place))
            except (OSError, OverflowError):
                continue
            return list(range(first, first + count))


class _Work:
    """What one rank does."""

    def __init__(self, job: Mapping[str, Any]) -> None:
        from mlxlora_core import plugins
        from mlxlora_core.distributed.group import join

        self.job, self.registry, self.group = job, plugins.load(environ={"MLXLORA_PLUGINS": ""}), join()
        self.messages: list[int] = []  # bytes of each
        self._count_messages()

    def _count_messages(self) -> None:
        """Note what goes round."""
        import mlx.core as mx

        for name in ("all_sum", "all_gather"):
            plain = getattr(mx.distributed, name)

            def counted(x: Any, plain: Any = plain) -> Any:
                self.messages.append(x.nbytes)
                return plain(x)

            setattr(mx.distributed, name, counted)

    def case(self, name: str, case: Mapping[str, Any]) -> None:
        """One training; what comes of it is written."""
        from mlxlora_core.errors import MlxloraError
        from mlxlora_core.machine.signals import Interrupted

        found: dict[str, Any] = {"losses": [], "messages": []}
        session = None
        plain = [
            (m, m.on_cpu) for n, m in sys.modules.items() if n.startswith("mlxlora") and hasattr(m, "on_cpu")
        ]
        for module, on_cpu in plain:  # MLX computes on the CPU what is done on a GPU all the same
            module.on_cpu = (lambda: False) if case.get("as_on_a_gpu") else on_cpu
        try:
            session = self._open({**case, **case.get("of_rank", {}).get(str(self.group.rank), {})})
            self._follow(session, case, found)
        except (MlxloraError, Interrupted) as fault:
            found |= {"fault": str(fault), "code": int(fault.exit_code)}
        finally:
            for module, on_cpu in plain:
                module.on_cpu = on_cpu
        if session is not None:
            found |= self._state(name, session)
        self._path(f"{name}.{self.group.rank}.json").write_text(json.dumps(found))

    def _path(self, name: str) -> Path:
        return Path(self.job["folder"]) / name

    def _open(self, case: Mapping[str, Any]) -> Any:
        from mlxlora_core.model import loading
        from mlxlora_core.plugins.sections import configure
        from mlxlora_core.training.outputs import Outputs
        from mlxlora_core.training.session import NewAdapter, open_training
        from mlxlora_core.training.settings import SaveConfig, TrainConfig
        from mlxlora_core.training.sources import read_data

        adapter = self.registry.find("adapter", case.get("adapter", "lora"))
        outputs = None
        if "checkpoints" in case:
            saving = SaveConfig(save_every=case.get("save_every", 1000))
            outputs = Outputs(checkpoints=Path(case["checkpoints"]), saving=saving)
        return open_training(
            loading.load(Path(case.get("model", self.job["model"])), self.registry),
            NewAdapter(*configure(adapter, case.get("options", {}))),
            read_data(case.get("rows", self.job["rows"]), ("train",), ("valid",)),
            TrainConfig(**{**self.job["settings"], **case.get("settings", {})}),
            self.registry,
            seed=case.get("seed", 3),
            outputs=outputs,
            group=self.group,
        )

    def _follow(self, session: Any, case: Mapping[str, Any], found: dict[str, Any]) -> None:
        """Train, and do at some step what the case says that this rank does there."""
        from mlxlora_core.training.checkpoints import Start
        from mlxlora_core.training.events import TrainReport, TrainResult, ValidReport

        self.messages.clear()
        for event in session.start(Start.CONTINUE):
            if isinstance(event, TrainReport | ValidReport):
                found["losses"].append(event.loss)
            if isinstance(event, TrainResult):
                found["adapter_step"] = event.adapter_step
            if isinstance(event, TrainReport):
                found["messages"].append(list(self.messages))
                self.messages.clear()
                self._act(session, case.get("at", {}).get(f"{event.step} {self.group.rank}"))

    def _act(self, session: Any, what: str | None) -> None:
        import mlx.core as mx
        from mlx.utils import tree_map

        if what == "change":
            module = session.model.module
            module.update(tree_map(lambda x: x + mx.array(1e-6), module.trainable_parameters()))
        elif what is not None:
            os.kill(os.getpid(), getattr(signal, what))

    def _state(self, name: str, session: Any) -> dict[str, Any]:
        import numpy as np

        from mlxlora_core.model import adapters

        arrays = {n: np.array(x) for n, x in adapters.trainable(session.model.module).items()}
        np.savez(self._path(f"{name}.{self.group.rank}.npz"), **arrays)
        return {"step": session.training.progress.step, "tokens": session.training.progress.trained_tokens}


def main() -> None:
    """Do the cases of a job, as one of the ranks or alone."""
    from mlxlora_core.machine.device import prepare_cpu

    prepare_cpu()
    job = json.loads(Path(sys.argv[1]).read_text())
    work = _Work(job)
    for name, case in job["cases"].items():
        work.case(name, case)


if __name__ == "__main__":
    main()
