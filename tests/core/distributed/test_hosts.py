"""Files of hosts as MLX has them, and the addresses of the ring that come of them."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import pytest

from mlxlora_core.distributed.hosts import PORT, Host, here, read_hosts
from mlxlora_core.errors import UsageError

HERE = {"ssh": "localhost", "ips": ["127.0.0.1"]}
TWICE = {"ssh": "localhost", "ips": ["127.0.0.1", "127.0.0.2"]}
OTHER = {"ssh": "mac2.local", "ips": ["10.0.0.2", "10.0.1.2"], "rdma": []}


def written(folder: Path, value: Any) -> Path:
    path = folder / "hosts.json"
    path.write_text(json.dumps(value))
    return path


def test_a_list_of_machines(tmp_path: Path) -> None:
    hosts = read_hosts(written(tmp_path, [TWICE, OTHER]))
    assert [host.name for host in hosts.ranks] == ["localhost", "mac2.local"]
    assert [host.is_here for host in hosts.ranks] == [True, False]
    assert hosts.environment == {}
    # The port after those of the ring is free for the meeting.
    ports = iter(range(PORT, PORT + 4))
    assert hosts.ring() == [[f"{a}:{next(ports)}" for a in host["ips"]] for host in (TWICE, OTHER)]


def test_what_mlx_distributed_config_writes(tmp_path: Path) -> None:
    whole = {"backend": "ring", "envs": ["A=1=2\n ", "_B2="], "hosts": [HERE, {"ssh": "10.0.0.3"}]}
    hosts = read_hosts(written(tmp_path, whole))
    assert hosts.environment == {"A": "1=2\n ", "_B2": ""}
    assert hosts.ranks[1] == Host("10.0.0.3", ("10.0.0.3",))


def test_this_machine_by_its_name() -> None:
    assert Host(socket.gethostname(), ("10.0.0.1",)).is_here


def test_another_machine_is_not_this_one_for_a_loopback_address() -> None:
    assert not Host("far-away", ("127.0.0.1",)).is_here


def test_ranks_on_this_machine_get_free_ports() -> None:
    ring = here(3).ring()
    ports = [int(address.rpartition(":")[2]) for (address,) in ring]
    assert ports == [ports[0], ports[0] + 1, ports[0] + 2]
    for port in (*ports, ports[-1] + 1):
        with socket.socket() as free:
            free.bind(("127.0.0.1", port))


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ([], "holds no list of machines"),
        ({"hosts": {}}, "holds no list of machines"),
        ("x", "holds no list of machines"),
        ([HERE, "b"], "machine 2: has no name for ssh"),
        ([HERE, {"ips": ["10.0.0.2"]}], "machine 2: has no name for ssh"),
        ([HERE, {"ssh": "-oProxyCommand=x", "ips": ["10.0.0.2"]}], "machine 2: has no name for ssh"),
        ([HERE, {"ssh": "b"}], "machine 2: ips is no list of IPv4 addresses"),
        ([HERE, {"ssh": "b", "ips": ["b.local"]}], "machine 2: ips is no list of IPv4 addresses"),
        ([HERE, {"ssh": "b", "ips": ["2001:db8::2"]}], "machine 2: ips is no list of IPv4 addresses"),
        ([HERE, OTHER], "machine 2: has 2 in ips, and machine 1 has 1"),
        ([OTHER, TWICE], "the first machine is mac2.local, and not this one"),
        *(
            ([HERE, {"ssh": name, "ips": ["10.0.0.2"]}], "machine 2: has no name for ssh")
            for name in ("", "a\0b", "a\ud800b", "a b", "a\n")
        ),
        *(
            ({"hosts": [HERE], "envs": [text]}, "envs is no list of texts NAME=VALUE")
            for text in ("A", "=x", "A-B=1", "1=1", "A; touch x;=1", "A=b\0c", "A=\ud800", "\u00e4=1")
        ),
        ({"hosts": [HERE], "backend": "jaccl"}, "asks for jaccl, and --hosts starts rings"),
    ],
)
def test_files_that_are_refused(tmp_path: Path, value: Any, said: str) -> None:
    with pytest.raises(UsageError) as fault:
        read_hosts(written(tmp_path, value))
    assert said in str(fault.value)
