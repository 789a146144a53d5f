"""The model of the message of a step: the ring's packets, the wire, how TCP begins, what was measured."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

from workers import cables  # noqa: E402  # from where it stands
from workers.message_time import Network, Overhead, message_seconds, packets_of  # noqa: E402  # from where it stands

FIGURES = json.loads((BENCHMARKS / "results" / "network-amd-epyc-2.json").read_text("utf-8"))
NONE = Overhead(0.0, 0.0)
WIRE = (1448 + 132) / 1448  # with its headers
QUICK = 1e15
PROGRAM = BENCHMARKS / "network.py"
ALL = os.environ.get("MLXLORA_TEST_ALL", "") not in ("", "0")


def seconds(numbers: int, ranks: int, delay: float, rate: float, after_idle: bool = False) -> float:
    return message_seconds(numbers, ranks, Network("", delay, rate), NONE, after_idle)


@pytest.mark.parametrize("ranks", [2, 3, 4, 7, 10, 64])
@pytest.mark.parametrize("numbers", [1000, 300_000, 3_000_000, 100_000_000])
def test_packets_are_a_segment_for_each_rank_and_direction(numbers: int, ranks: int) -> None:
    packets, directions = packets_of(numbers, ranks)
    assert sum(packets) == 4 * math.ceil(math.ceil(numbers / directions) / ranks)
    assert directions == (2 if 4 * numbers >= 2 * 262144 * ranks else 1)
    assert max(packets) <= 8 << 20 and (len(packets) == 1 or max(packets) >= 4 * 32768)


@pytest.mark.parametrize("ranks", [10, 16, 64])
def test_in_one_packet_each_round_takes_the_delay_and_a_segment(ranks: int) -> None:
    packets, _ = packets_of(300_000, ranks)
    want = 2 * (ranks - 1) * (0.003 + 8 * packets[0] * WIRE / 1e9)
    assert len(packets) == 1
    assert seconds(300_000, ranks, 0.003, 1e9) == pytest.approx(want, rel=1e-9)


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_the_wire_or_the_delay_decides_where_one_of_them_is_all(ranks: int) -> None:
    """With two packets under way the delay of one hides behind the other."""
    all_bytes = 4 * 300_000 * 2 * (ranks - 1) / ranks
    assert seconds(300_000, ranks, 0.0, 1e8) == pytest.approx(8 * all_bytes * WIRE / 1e8, rel=1e-3)
    assert seconds(300_000, ranks, 0.02, QUICK) == pytest.approx(2 * (ranks - 1) * 0.02, rel=1e-3)


def test_a_number_too_many_makes_a_third_packet_whose_delay_nothing_hides() -> None:
    even, odd = 4 * 75_000, 4 * 75_001
    assert [len(packets_of(numbers, 4)[0]) for numbers in (even, odd)] == [2, 3]
    assert seconds(odd, 4, 0.02, QUICK) == pytest.approx(1.5 * seconds(even, 4, 0.02, QUICK), rel=1e-3)


@pytest.mark.parametrize(("segments", "trips"), [(1, 0), (5, 0), (11, 1), (30, 1), (31, 2), (70, 2), (71, 3)])
def test_after_idle_a_message_waits_for_windows_that_double(segments: int, trips: int) -> None:
    """10 segments of TCP at once, then 20, 40, ...; in the first of two rounds the window has grown."""
    numbers = 2 * segments * 1448 // 4  # two ranks, of which each sends one packet in each of two rounds
    assert len(packets_of(numbers, 2)[0]) == 1
    in_a_row, idle = (seconds(numbers, 2, 0.01, QUICK, after_idle) for after_idle in (False, True))
    assert in_a_row == pytest.approx(0.02, rel=1e-6)
    first_round = 0.01 + trips * 0.02
    assert first_round + 0.01 - 1e-6 <= idle <= first_round + 0.01 + 0.02 * (trips > 0) + 1e-6


def test_overheads_count_for_each_packet_and_each_byte() -> None:
    network = Network("", 0.0, QUICK)
    packet, byte = (
        message_seconds(300_000, 16, network, overhead, False)
        for overhead in (Overhead(1e-3, 0.0), Overhead(0.0, 1e-6))
    )
    assert packet == pytest.approx(30e-3, rel=1e-6) and byte == pytest.approx(30 * 75e-3, rel=1e-6)


@pytest.mark.parametrize(
    "point", FIGURES["points"], ids=lambda p: f"{p['ranks']}-{p['delay_ms']}-{p['rate_gbit']}"
)
def test_the_model_gives_what_was_measured(point: dict[str, Any]) -> None:
    """After some idle time, as steps are, and in a row."""
    rate = point["rate_gbit"] * 1e9
    network = Network("", point["delay_ms"] / 1e3 + FIGURES["least_delay"], rate, cables.headers(rate))
    overhead = Overhead(**FIGURES["overhead"])
    for way in ("after_idle", "in_a_row"):
        got = 1e3 * message_seconds(
            FIGURES["numbers"], int(point["ranks"]), network, overhead, way == "after_idle"
        )
        assert got == pytest.approx(point["reckoned_ms"][way], rel=0.01)
        assert got == pytest.approx(point["measured_ms"][way], rel=0.2, abs=1.5)


# --- the program that measures ------------------------------------------------


def test_help_of_the_program() -> None:
    done = subprocess.run([sys.executable, PROGRAM, "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and "--delays" in done.stdout


@pytest.mark.skipif(not ALL, reason="takes ten seconds of waiting; MLXLORA_TEST_ALL=1 does it")
@pytest.mark.skipif(os.geteuid() != 0 or not Path("/dev/net/tun").exists(), reason="needs root and tun")
def test_it_measures_and_leaves_no_namespace(tmp_path: Path) -> None:
    out = tmp_path / "figures.json"
    few = ["--ranks", "2", "--delays", "1", "--rates", "1", "--numbers", "10000", "--repeats", "1"]
    done = subprocess.run([sys.executable, PROGRAM, *few, "--out", out], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (point,) = json.loads(out.read_text("utf-8"))["points"]
    assert set(point["measured_ms"]) == set(point["reckoned_ms"]) == {"after_idle", "in_a_row"}
    left = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True).stdout
    assert "mlxlora" not in left
