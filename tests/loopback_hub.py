"""A Hub on the loopback address: what huggingface_hub asks of the real one, and faults to order."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from typing import Any
from urllib.parse import unquote, urlsplit

from loopback import listening

_RESOLVE = re.compile(r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<file>.+)")
_INFO = re.compile(r"/api/models/(?P<repo>[^/]+/[^/]+)(?:/revision/(?P<revision>.+))?")
_TREE = re.compile(r"/api/models/(?P<repo>[^/]+/[^/]+)/tree/(?P<revision>[^/]+)(?:/.*)?")


@dataclass
class Hub:
    """Its models, and how it misbehaves.

    Attributes:
        repos: ``org/name`` -> commit -> file -> contents; the last commit is the main branch.
        gated: repositories that say 403.
        breaks: file -> after how many bytes the connection ends, once.
        asked: what was asked for, a line each, such as ``GET config.json``.
    """

    repos: dict[str, dict[str, dict[str, bytes]]] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)
    breaks: dict[str, int] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    url: str = ""

    def put(self, repo: str, files: dict[str, bytes]) -> str:
        """A new commit of a repository; its name."""
        commits = self.repos.setdefault(repo, {})
        commit = hashlib.sha1(f"{repo}{len(commits)}".encode()).hexdigest()
        commits[commit] = files
        return commit

    def find(self, repo: str, revision: str | None) -> tuple[str, dict[str, bytes]] | None:
        """The commit that a revision stands for, and its files."""
        commits = self.repos.get(repo, {})
        commit = list(commits)[-1] if commits and revision in (None, "main") else revision
        return (commit, commits[commit]) if commit in commits else None


@contextmanager
def serving() -> Iterator[Hub]:
    """A Hub that answers until the block ends."""
    hub = Hub()

    class Handler(_Handler):
        state = hub

    with listening(Handler) as url:
        hub.url = url
        yield hub


class _Handler(BaseHTTPRequestHandler):
    state: Hub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def log_message(self, *_: Any) -> None:
        """Nothing."""

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        if match := _RESOLVE.fullmatch(path):
            self._file(match["repo"], match["revision"], match["file"])
        elif match := _TREE.fullmatch(path) or _INFO.fullmatch(path):
            self._listing(match["repo"], match["revision"], tree=bool(_TREE.fullmatch(path)))
        else:
            self._say(404, {}, b"")

    def _found(self, repo: str, revision: str | None) -> tuple[str, dict[str, bytes]] | None:
        """What is asked for, or an error."""
        if repo in self.state.gated:
            self._fault(403, "GatedRepo")
        elif repo not in self.state.repos:
            self._fault(401, "RepoNotFound")
        elif (found := self.state.find(repo, revision)) is None:
            self._fault(404, "RevisionNotFound")
        else:
            return found
        return None

    def _listing(self, repo: str, revision: str | None, *, tree: bool) -> None:
        self.state.asked.append(f"{self.command} {'tree' if tree else 'info'}")
        found = self._found(repo, revision)
        if found is None:
            return
        commit, files = found
        names = [{"rfilename": name} for name in files]
        entries = [
            {"type": "file", "path": name, "size": len(data), "oid": _digest(data)}
            for name, data in files.items()
        ]
        info = {"id": repo, "modelId": repo, "sha": commit, "siblings": names, "private": False, "tags": []}
        self._say(200, {"Content-Type": "application/json"}, json.dumps(entries if tree else info).encode())

    def _file(self, repo: str, revision: str, name: str) -> None:
        self.state.asked.append(f"{self.command} {name}")
        found = self._found(repo, revision)
        if found is None:
            return
        commit, files = found
        if name not in files:
            self._fault(404, "EntryNotFound")
            return
        data = files[name]
        headers = {"ETag": f'"{_digest(data)}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        start = 0
        if asked := self.headers.get("Range"):
            start = int(asked.removeprefix("bytes=").split("-")[0])
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        self._say(
            206 if asked else 200,
            headers,
            data[start:],
            self.state.breaks.pop(name, None) if self.command == "GET" else None,
        )

    def _fault(self, status: int, code: str) -> None:
        self._say(status, {"X-Error-Code": code, "X-Error-Message": code}, b"{}")

    def _say(self, status: int, headers: dict[str, str], data: bytes, cut: int | None = None) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data if cut is None else data[:cut])
            if cut is not None:
                self.wfile.flush()
                self.close_connection = True


def _digest(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()
