"""Who may ask: keys, hosts, pages of other sites; and what every response says to browsers."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from served_models import ServerProcess

from mlxlora_core.cli import execute
from mlxlora_core.errors import UsageError
from mlxlora_core.server import guard
from mlxlora_core.server.guard import Policy, is_loopback
from mlxlora_core.server.keys import read_keys

KEYS = ("0123456789abcdef0123", "fedcba9876543210fedc")
ASKED = {"model": "model", "prompt": "the layer", "max_tokens": 2}


@pytest.fixture(scope="module")
def locked(
    begin: Callable[..., ServerProcess], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ServerProcess]:
    """A server that wants a key, and answers to any host."""
    file = tmp_path_factory.mktemp("keys") / "keys.txt"
    file.write_text(f"# of the lab\n{KEYS[0]}\n\n{KEYS[1]}\n")
    with begin("--api-key-file", file, "--host", "0.0.0.0") as process:
        yield process


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


@pytest.mark.parametrize("key", KEYS)
def test_a_key_opens(locked: ServerProcess, key: str) -> None:
    assert locked.request("POST", "/v1/completions", ASKED, bearer(key))[0] == 200
    assert locked.request("GET", "/metrics", headers=bearer(key))[0] == 200


@pytest.mark.parametrize(
    "headers",
    [
        {},
        bearer(""),
        bearer(KEYS[0][:-1]),
        bearer(KEYS[0] + "0"),
        bearer("# of the lab"),
        bearer("\u00e9" * 20),
        {"Authorization": KEYS[0]},
        {"Authorization": f"Basic {KEYS[0]}"},
    ],
    ids=str,
)
def test_without_one_nothing_is_told(locked: ServerProcess, headers: dict[str, str]) -> None:
    for method, path in (
        ("GET", "/v1/models"),
        ("GET", "/metrics"),
        ("POST", "/v1/completions"),
        ("GET", "/x"),
    ):
        status, told, body = locked.request(method, path, b"not even JSON", headers)
        assert status == 401, path
        assert told["www-authenticate"] == "Bearer"
        assert json.loads(body)["error"]["code"] == "invalid_api_key"
        assert b'model"' not in body
    assert locked.request("GET", "/health", headers=headers)[0] == 200


def test_keys_are_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each with each, by the function made for it, whatever came out of those before."""
    seen = []

    def compare(given: bytes, known: bytes) -> bool:
        seen.append((len(given), len(known)))
        return given == known

    monkeypatch.setattr(guard.hmac, "compare_digest", compare)
    from starlette.datastructures import Headers

    held = guard.Guard(lambda *_: None, Policy(KEYS))  # type: ignore[arg-type, return-value]  # no application
    assert held._knows(Headers({"authorization": f"Bearer {KEYS[0]}"}))
    assert not held._knows(Headers({"authorization": "Bearer x"}))
    assert seen == [(32, 32)] * 4


def test_a_loopback_server_answers_to_loopback_names_alone(server: ServerProcess) -> None:
    for host in ("localhost", "127.0.0.1:80", "[::1]:8080", "LOCALHOST.:1", "127.9.9.9"):
        assert server.request("GET", "/v1/models", headers={"Host": host})[0] == 200, host
    for host in (
        "evil.example",
        "localhost.evil.example",
        "127.0.0.1.evil.example",
        "0.0.0.0",
        "",
        "[::2]",
        "[x",
    ):
        status, _, body = server.request("GET", "/v1/models", headers={"Host": host})
        assert status == 421, host
        assert json.loads(body)["error"]["code"] == "wrong_host"


def test_another_address_answers_to_any_name(locked: ServerProcess) -> None:
    headers = {**bearer(KEYS[0]), "Host": "gpu.example"}
    assert locked.request("GET", "/v1/models", headers=headers)[0] == 200


def test_pages_of_other_sites_change_nothing(server: ServerProcess) -> None:
    own = f"http://127.0.0.1:{server.port}"
    path = "/v1/completions"
    assert server.request("POST", path, ASKED, {"Origin": own})[0] == 200
    for headers in (
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Origin": own.replace(str(server.port), "1")},
        {"Origin": f"{own}.evil.example"},
        {"Sec-Fetch-Site": "cross-site"},
    ):
        status, told, body = server.request("POST", path, ASKED, headers)
        assert status == 403, headers
        assert json.loads(body)["error"]["code"] == "foreign_origin"
        assert not [name for name in told if name.startswith("access-control")]
    status, told, _ = server.request("OPTIONS", path, headers={"Origin": "http://evil.example"})
    assert status == 405
    assert not [name for name in told if name.startswith("access-control")]


@pytest.mark.parametrize("path", ["/v1/models", "/nothing", "/health", "/metrics"])
def test_every_response_says_what_browsers_may_do(server: ServerProcess, path: str) -> None:
    _, headers, _ = server.request("GET", path)
    assert "default-src 'none'" in headers["content-security-policy"]
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["referrer-policy"] == "no-referrer"
    assert "server" not in headers


@pytest.mark.parametrize("host", ["0.0.0.0", "192.0.2.1", "::"])
def test_another_address_needs_a_key(host: str, models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert execute(["serve", "--model", str(models / "model"), "--host", host, "--port", "0"]) == 2
    assert "--api-key-file" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["", "# only this\n", "short\n", "0123456789abcdef 123\n", "\u00e9" * 20])
def test_files_that_hold_no_key(tmp_path: Path, text: str) -> None:
    (tmp_path / "keys").write_text(text)
    with pytest.raises(UsageError):
        read_keys(tmp_path / "keys")
    with pytest.raises(UsageError):
        read_keys(tmp_path / "nothing")


def test_what_is_a_loopback_name() -> None:
    assert all(map(is_loopback, ("localhost", "127.0.0.1", "127.1.2.3", "::1")))
    assert not any(
        map(is_loopback, ("", "0.0.0.0", "localhost.example", "1.2.3.4", "::", "127.0.0.1.example"))
    )


def test_paths_that_need_no_key() -> None:
    policy = Policy(KEYS, open_paths=("/", "/page/", "/health"))
    assert all(map(policy.is_open, ("/", "/page/x.js", "/health")))
    assert not any(map(policy.is_open, ("/v1/models", "/page", "/healthy", "/metrics", "")))
