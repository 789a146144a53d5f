"""Which rank a process is, by the variables of each that starts ranks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mlxlora_core.distributed import environment
from mlxlora_core.errors import UsageError

NAMES = (
    *("MLX_RANK", "MLX_HOSTFILE", "MLX_WORLD_SIZE", "MLX_IBV_DEVICES", "MLX_JACCL_COORDINATOR"),
    *("NCCL_HOST_IP", "NCCL_PORT", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "PMI_RANK", "PMI_SIZE"),
    "MLXLORA_LAUNCHER",
)


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)


def given(monkeypatch: pytest.MonkeyPatch, **variables: object) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, str(value))


def hostfile(folder: Path, text: str) -> Path:
    path = folder / "hosts.json"
    path.write_text(text)
    return path


def place() -> tuple[bool, int, int]:
    return environment.is_rank(), environment.rank(), environment.size()


def test_a_process_by_itself() -> None:
    assert place() == (False, 0, 1)
    assert environment.meeting() is None
    assert environment.launcher() == 0


def test_a_ring(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = hostfile(tmp_path, '[["10.0.0.1:5000", "10.0.1.1:5009"], ["10.0.0.2:5002"], ["[fd00::1]:5001"]]')
    given(monkeypatch, MLX_RANK=2, MLX_HOSTFILE=path, MLXLORA_LAUNCHER=17)
    assert place() == (True, 2, 3)
    meeting = environment.meeting()
    assert meeting is not None
    assert (meeting.hosts, meeting.port) == (("10.0.0.1",), 5010)  # no port of the ring, whichever is highest
    assert environment.launcher() == 17


def test_rings_of_other_addresses_do_not_know_each_other(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    proofs = set()
    for port in (5000, 6000):
        path = hostfile(tmp_path, json.dumps([[f"10.0.0.1:{port}"], [f"10.0.0.2:{port}"]]))
        given(monkeypatch, MLX_RANK=0, MLX_HOSTFILE=path)
        meeting = environment.meeting()
        assert meeting is not None
        proofs.add(meeting.proof)
    assert len(proofs) == 2


def test_a_ring_of_one_as_mlx_launch_starts_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    given(monkeypatch, MLX_RANK=0, MLX_HOSTFILE=hostfile(tmp_path, "\n"))
    assert place() == (False, 0, 1)


def test_nccl(monkeypatch: pytest.MonkeyPatch) -> None:
    given(monkeypatch, MLX_RANK=1, MLX_WORLD_SIZE=4, NCCL_HOST_IP="10.0.0.9", NCCL_PORT=12345)
    assert place() == (True, 1, 4)
    meeting = environment.meeting()
    assert meeting is not None
    assert (meeting.hosts, meeting.port) == (("10.0.0.9",), 12346)


def test_jaccl(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    devices = hostfile(tmp_path, '[[null, "rdma_en2"], ["rdma_en2", null]]')
    given(monkeypatch, MLX_RANK=1, MLX_IBV_DEVICES=devices, MLX_JACCL_COORDINATOR="10.0.0.1:32323")
    assert place() == (True, 1, 2)
    meeting = environment.meeting()
    assert meeting is not None
    assert (meeting.hosts, meeting.port) == (("10.0.0.1",), 32324)


@pytest.mark.parametrize("prefix", ["OMPI_COMM_WORLD", "PMI"])
def test_mpi_which_has_no_place_to_meet_at(monkeypatch: pytest.MonkeyPatch, prefix: str) -> None:
    given(monkeypatch, **{f"{prefix}_RANK": 3, f"{prefix}_SIZE": 8})
    assert place() == (True, 3, 8)
    assert environment.meeting() is None


def test_mlx_is_asked_before_mpi(monkeypatch: pytest.MonkeyPatch) -> None:
    given(monkeypatch, MLX_RANK=1, MLX_WORLD_SIZE=2, OMPI_COMM_WORLD_RANK=3, OMPI_COMM_WORLD_SIZE=8)
    assert place() == (True, 1, 2)


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"MLX_RANK": "2", "MLX_WORLD_SIZE": "2"}, "MLX_RANK is 2, and there are 2 ranks"),
        ({"MLX_RANK": "-1", "MLX_WORLD_SIZE": "2"}, "MLX_RANK is '-1', and a whole number is wanted"),
        ({"MLX_RANK": "0", "MLX_WORLD_SIZE": "many"}, "MLX_WORLD_SIZE is 'many'"),
        ({"MLX_RANK": "0", "MLX_HOSTFILE": "/no/such/file"}, "MLX_HOSTFILE=/no/such/file: cannot be read"),
        ({"OMPI_COMM_WORLD_RANK": "x", "OMPI_COMM_WORLD_SIZE": "2"}, "OMPI_COMM_WORLD_RANK is 'x'"),
    ],
)
def test_what_contradicts_itself(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], said: str
) -> None:
    given(monkeypatch, **variables)
    with pytest.raises(UsageError) as fault:
        environment.is_rank()
    assert said in str(fault.value)
    assert "Fix: " in str(fault.value)


@pytest.mark.parametrize("text", ["{}", "[", "[[]]", "[[1]]", '["10.0.0.1:5000"]', '"x"'])
def test_a_file_of_hosts_that_is_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: str) -> None:
    given(monkeypatch, MLX_RANK=0, MLX_HOSTFILE=hostfile(tmp_path, text))
    with pytest.raises(UsageError, match=r"hosts\.json: "):
        environment.size()


@pytest.mark.parametrize("address", ["10.0.0.1", "10.0.0.1:x", ":5000"])
def test_an_address_that_is_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, address: str) -> None:
    text = json.dumps([[address], ["10.0.0.2:5001"]])
    given(monkeypatch, MLX_RANK=0, MLX_HOSTFILE=hostfile(tmp_path, text))
    with pytest.raises(UsageError, match="is no address of a rank"):
        environment.meeting()
