from __future__ import annotations

import os
from pathlib import Path

import pytest
from fake_machine import machine

from mlxlora_core.errors import UsageError
from mlxlora_core.machine.processors import cpu_quota, processors, thread_count


def test_threads_are_what_affinity_and_quota_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLXLORA_THREADS", raising=False)
    assert 1 <= thread_count() <= processors() <= (os.cpu_count() or 1)


@pytest.mark.parametrize(
    ("quota", "threads"), [("50000 100000", 1), ("250000 100000", 2), ("900000 100000", 4)]
)
def test_a_quota_is_rounded_down_and_never_to_nothing(
    quota: str, threads: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLXLORA_THREADS", raising=False)
    monkeypatch.setattr("mlxlora_core.machine.processors.processors", lambda: 4)
    files = machine(tmp_path, "0::/a\n", {"a/cpu.max": quota})
    monkeypatch.setattr("mlxlora_core.machine.processors.cpu_quota", lambda: cpu_quota(files))
    assert thread_count() == threads


def test_the_environment_has_the_last_word(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLXLORA_THREADS", "37")
    assert thread_count() == 37


@pytest.mark.parametrize("given", ["0", "-1", "two", "1.5", "99999"])
def test_a_senseless_number_of_threads_is_refused(given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLXLORA_THREADS", given)
    with pytest.raises(UsageError, match=f"wanted a whole number from 1 to 4096, got '{given}'"):
        thread_count()
