"""Who may stop a run, and what is told to whom."""

from __future__ import annotations

import json
import re
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from made_run import write_run

PATHS = ("/api/run", "/api/run/samples", "/api/run/rows", "/api/run/beside", "/api/run/curves?name=a")


def ask(url: str, method: str = "GET", **headers: str) -> tuple[int, str, dict[str, str]]:
    named = {key.replace("_", "-"): value for key, value in headers.items()}
    request = urllib.request.Request(url, method=method, headers=named)
    try:
        with urllib.request.urlopen(request, timeout=20) as answer:
            return answer.status, answer.read().decode(), _lower(answer.headers)
    except urllib.error.HTTPError as fault:
        with fault:
            return fault.code, fault.read().decode(), _lower(fault.headers)


def _lower(headers: Any) -> dict[str, str]:
    return {name.lower(): value for name, value in headers.items()}


def token_of(url: str) -> str:
    found = re.search('name="mlxlora-run" content="([^"]*)"', ask(f"{url}/run")[1])
    assert found
    return found[1]


def test_a_run_is_stopped_once_and_by_its_page_alone(tmp_path: Path, serving: Any) -> None:
    stopped: list[int] = []
    folder = write_run(tmp_path / "a", steps=20, done=3)
    with serving(folder, lambda: stopped.append(1)) as url:
        token, place = token_of(url), f"{url}/api/run/stop"
        assert len(token) >= 32
        refused: list[dict[str, str]] = [
            {},
            {"X_Mlxlora_Run": "wrong"},
            {"X_Mlxlora_Run": ""},
            {"X_Mlxlora_Run": token, "Origin": "https://example.com"},
            {"X_Mlxlora_Run": token, "Sec_Fetch_Site": "cross-site"},
        ]
        assert [ask(place, "POST", **headers)[0] for headers in refused] == [403] * 5
        assert ask(place, "POST", X_Mlxlora_Run=token, Host="evil.example")[0] == 421
        assert ask(place, X_Mlxlora_Run=token)[0] == 405 and not stopped, "reading stops nothing"
        assert ask(place, "POST", X_Mlxlora_Run=token, Origin=url)[0] == 202
        assert ask(place, "POST", X_Mlxlora_Run=token)[0] == 202
        assert stopped == [1], "a second signal would end it without saving"


def test_without_a_run_of_its_own_there_is_no_button(tmp_path: Path, serving: Any) -> None:
    with serving(write_run(tmp_path / "a", steps=20, done=3)) as url:
        assert token_of(url) == ""
        assert 'href="/"' not in ask(f"{url}/run")[1], "nor a link to a chat that is not served"
        assert ask(f"{url}/api/run/stop", "POST", X_Mlxlora_Run="")[0] == 404


def test_everything_is_answered_guarded_and_fresh(tmp_path: Path, serving: Any) -> None:
    with serving(write_run(tmp_path / "a", steps=20)) as url:
        for path in (*PATHS, "/run"):
            status, text, headers = ask(url + path)
            assert status == 200 and headers["cache-control"] == "no-store", path
            assert "default-src 'none'" in headers["content-security-policy"]
            assert path == "/run" or json.loads(text) is not None
        status, text, _ = ask(f"{url}/api/run/curves?name=..%2Fb")
        assert status == 404 and "no such run" in json.loads(text)["error"]["message"]


def test_a_folder_that_is_not_there_yet_is_one_line(tmp_path: Path, serving: Any) -> None:
    with serving(tmp_path / "later") as url:
        status, text, _ = ask(f"{url}/api/run")
        assert status == 404 and "no run folder" in json.loads(text)["error"]["message"]
        write_run(tmp_path / "later", steps=20)
        assert ask(f"{url}/api/run")[0] == 200


def test_what_tells_of_a_run_needs_a_key_where_there_is_one(tmp_path: Path, serving: Any) -> None:
    with serving(write_run(tmp_path / "a", steps=20), None, ("secret",)) as url:
        assert [ask(url + path)[0] for path in PATHS] == [401] * len(PATHS)
        assert ask(f"{url}/run")[0] == ask(f"{url}/run/live.js")[0] == 200
        assert ask(f"{url}/api/run", Authorization="Bearer secret")[0] == 200
