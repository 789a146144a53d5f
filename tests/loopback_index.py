"""A package index on the loopback address: pip installs from it, and twine uploads to it."""

from __future__ import annotations

import email
import email.policy
import html
import re
import zipfile
from base64 import b64encode
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from http.server import BaseHTTPRequestHandler
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

from loopback import listening
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

TOKEN = "pypi-a-token"
_OF_INSTALLERS = ("RECORD", "INSTALLER", "REQUESTED")


@dataclass
class Index:
    """Its files, and what was uploaded.

    Attributes:
        files: project -> file name -> contents.
        uploads: the fields of each upload.
        folder: where wheels are made.
        url: of the index.
    """

    folder: Path
    files: dict[str, dict[str, bytes]] = field(default_factory=dict)
    uploads: list[dict[str, str]] = field(default_factory=list)
    url: str = ""

    def put(self, name: str, content: bytes) -> None:
        """Add a file."""
        project = canonicalize_name(re.split(r"-\d", name)[0])
        self.files.setdefault(project, {})[name] = content

    def put_installed(self, requirement: str) -> None:
        """Add a wheel of what is installed here, and of all that it needs."""
        wanted = Requirement(requirement)
        if canonicalize_name(wanted.name) not in self.files:
            path = wheel_of_installed(wanted.name, self.folder)
            self.put(path.name, path.read_bytes())
            self.put_needed(requirement)
        elif wanted.extras:
            self.put_needed(requirement)

    def put_needed(self, requirement: str) -> None:
        """Add all that something needs, with its extras, which is installed here."""
        wanted = Requirement(requirement)
        for text in distribution(wanted.name).requires or ():
            marker = Requirement(text).marker
            if marker is None or any(marker.evaluate({"extra": extra}) for extra in wanted.extras or {""}):
                self.put_installed(text)


def wheel_of_installed(name: str, folder: Path) -> Path:
    """A wheel of an installed distribution, made of the files of its record but its programs."""
    found = distribution(name)
    tags = re.findall(r"^Tag: (.*?)-(.*?)-(.*)$", found.read_text("WHEEL") or "", re.MULTILINE)
    tag = "-".join(".".join(dict.fromkeys(parts)) for parts in zip(*tags, strict=True))
    wheel = f"{re.sub(r'[-_.]+', '_', found.name)}-{found.version}-{tag}.whl"
    (info,) = {file.parts[0] for file in found.files or () if file.parts[0].endswith(".dist-info")}
    with zipfile.ZipFile(folder / wheel, "w") as archive:
        record = ""
        for file in found.files or ():
            if ".." in file.parts or file.suffix == ".pyc" or file.name in _OF_INSTALLERS:
                continue
            content = Path(str(file.locate())).read_bytes()
            archive.writestr(str(file), content)
            digest = b64encode(sha256(content).digest(), b"-_").rstrip(b"=").decode()
            record += f"{file},sha256={digest},{len(content)}\n"
        archive.writestr(f"{info}/RECORD", f"{record}{info}/RECORD,,\n")
    return folder / wheel


@contextmanager
def serving(folder: Path) -> Iterator[Index]:
    """An index that answers until the block ends."""
    index = Index(folder)

    class Handler(_Handler):
        state = index

    with listening(Handler) as url:
        index.url = url
        yield index


class _Handler(BaseHTTPRequestHandler):
    state: Index

    def log_message(self, *_: Any) -> None:
        """Nothing."""

    def do_GET(self) -> None:
        """The page of a project (PEP 503), or a file of it."""
        kind, _, rest = self.path.strip("/").partition("/")
        project, _, name = rest.partition("/")
        files = self.state.files.get(canonicalize_name(project), {})
        if kind == "simple" and files:
            links = (
                f'<a href="/files/{project}/{html.escape(file)}">{html.escape(file)}</a>' for file in files
            )
            self._say(200, f"<!DOCTYPE html><html><body>{'<br>'.join(links)}</body></html>".encode())
        elif kind == "files" and name in files:
            self._say(200, files[name], "application/octet-stream")
        else:
            self._say(404, b"")

    def do_POST(self) -> None:
        """An upload, as PyPI takes it: a form with what the metadata says and the file."""
        body = self.rfile.read(int(self.headers["Content-Length"]))
        wanted = "Basic " + b64encode(f"__token__:{TOKEN}".encode()).decode()
        if self.headers["Authorization"] != wanted:
            self._say(403, b"Invalid or non-existent authentication information.")
            return
        head = f"Content-Type: {self.headers['Content-Type']}\r\n\r\n".encode()
        form = email.message_from_bytes(head + body, policy=email.policy.HTTP)
        given: dict[str, tuple[str, bytes]] = {}
        for part in form.iter_parts():
            content = part.get_payload(decode=True)
            assert isinstance(content, bytes)
            given[str(part.get_param("name", header="content-disposition"))] = part.get_filename(""), content
        name, content = given.pop("content")
        if any(name in files for files in self.state.files.values()):
            self._say(400, b"File already exists.")
            return
        self.state.put(name, content)
        self.state.uploads.append({key: value.decode() for key, (_, value) in given.items()})
        self._say(200, b"")

    def _say(self, code: int, content: bytes, kind: str = "text/html") -> None:
        self.send_response(code)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)
