"""A Hugging Face hub on this machine: the routes that its clients call, and ways to misbehave."""

from __future__ import annotations

import hashlib
import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit


class Refusal(NamedTuple):
    """How every request for a repository is answered, where it does not bring the right token."""

    status: int
    code: str = ""
    message: str = ""
    token: str = ""


TOKEN = "hf_right"
# As the hub words them: public reports of errors show code and message.
REFUSALS = {
    "gated": Refusal(401, "GatedRepo", "Access to {} is restricted. Please log in.", TOKEN),
    "unlisted": Refusal(403, "GatedRepo", "Access to {} is restricted."),
    "private": Refusal(401, "RepoNotFound", "Repository not found", TOKEN),
    "missing": Refusal(404, "RepoNotFound", "Repository not found"),
    "revoked": Refusal(401, "", "Invalid credentials in Authorization header"),
    "forbidden": Refusal(403, "", "Forbidden"),
    "disabled": Refusal(403, "", "Access to this resource is disabled."),
    "busy": Refusal(429, "", "Too Many Requests"),
    "failing": Refusal(503, "", "Service Unavailable"),
}
NO_ENTRY = Refusal(404, "EntryNotFound", "Entry not found")

Files = dict[str, bytes]


class Request(NamedTuple):
    """What a client asked for; `range` is its Range header."""

    method: str
    path: str
    range: str | None


@dataclass
class Hub:
    """Repositories by what stands before /resolve in a URL.

    `cut` holds, by file, after how many bytes each of the next downloads breaks off; before that,
    one of `silent` sends nothing more until the client gives up.
    """

    port: int = 0
    repositories: dict[str, Files] = field(default_factory=dict)
    refusals: dict[str, Refusal] = field(default_factory=dict)
    cut: dict[str, list[int]] = field(default_factory=dict)
    silent: set[str] = field(default_factory=set)
    requests: list[Request] = field(default_factory=list)
    _server: ThreadingHTTPServer | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Serve, at a free port or again at the one before."""
        handler = type("HubHandler", (Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", self.port), handler)
        self._server.daemon_threads = True
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def stop(self) -> None:
        """Refuse every connection."""
        assert self._server is not None
        self._server.shutdown()
        self._server.server_close()

    def asked(self, method: str, end: str) -> list[Request]:
        """List the requests for paths that end so."""
        return [one for one in self.requests if one.method == method and one.path.endswith(end)]


def commit(repository: str) -> str:
    return hashlib.sha1(repository.encode()).hexdigest()


def _entry(path: str, data: bytes) -> dict[str, Any]:
    return {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}


def _tree(files: Files, folder: str) -> list[dict[str, Any]]:
    """List what lies in a folder: its files, and the folders in it."""
    start = f"{folder}/" if folder else ""
    inside = {path.removeprefix(start) for path in files if path.startswith(start)}
    folders = {path.partition("/")[0] for path in inside if "/" in path}
    return [
        *({"type": "directory", "path": start + name, "oid": commit(name)} for name in folders),
        *(_entry(start + name, files[start + name]) for name in inside if "/" not in name),
    ]


class Handler(BaseHTTPRequestHandler):
    """Answers from `hub`, which a subclass sets."""

    hub: Hub

    def log_message(self, *arguments: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def _answer(self) -> None:
        sent = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = unquote(urlsplit(self.path).path).lstrip("/")
        self.hub.requests.append(Request(self.command, path, self.headers.get("Range")))
        is_api = path.startswith("api/")
        parts = path.removeprefix("api/").removeprefix("models/").split("/")
        size = 3 if parts[0] == "datasets" else 2
        repository, rest = "/".join(parts[:size]), parts[size:]
        refusal = self.hub.refusals.get(repository)
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if refusal and not (token and token == refusal.token):
            self._refuse(refusal, repository)
        elif repository not in self.hub.repositories:
            self._refuse(REFUSALS["missing"], repository)
        elif is_api:
            self._api(repository, self.hub.repositories[repository], rest, sent)
        elif rest[:1] == ["resolve"]:
            self._file(repository, self.hub.repositories[repository], "/".join(rest[2:]))
        else:
            self._refuse(NO_ENTRY, repository)

    def _api(self, repository: str, files: Files, rest: list[str], sent: bytes) -> None:
        if not rest or rest[0] == "revision":
            name = repository.removeprefix("datasets/")
            siblings = [{"rfilename": path} for path in files]
            self._json({"id": name, "sha": commit(repository), "siblings": siblings})
        elif rest[0] == "tree":
            folder = "/".join(rest[2:])
            found = _tree(files, folder)
            self._json(found) if found else self._refuse(NO_ENTRY, repository)
        elif rest[0] == "paths-info":
            wanted = json.loads(sent)["paths"]
            self._json([_entry(path, files[path]) for path in wanted if path in files])
        else:
            self._refuse(NO_ENTRY, repository)

    def _file(self, repository: str, files: Files, path: str) -> None:
        if path not in files:
            return self._refuse(NO_ENTRY, repository)
        data = files[path]
        asked = self.headers.get("Range")
        start = int(asked.removeprefix("bytes=").partition("-")[0]) if asked else 0
        headers = {
            "ETag": f'"{hashlib.sha1(data).hexdigest()}"',
            "X-Repo-Commit": commit(repository),
            "Accept-Ranges": "bytes",
        }
        if asked:
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        body = data[start:]
        status = 206 if asked else 200
        if self.command == "GET" and self.hub.cut.get(path):
            self._head(status, headers, len(body))
            self.wfile.write(body[: self.hub.cut[path].pop(0)])
            if path in self.hub.silent:
                self.connection.recv(1)
        else:
            self._send(status, headers, body)

    def _refuse(self, refusal: Refusal, repository: str) -> None:
        said = refusal.message.format(repository)
        headers = {"X-Error-Code": refusal.code, "X-Error-Message": said}
        body = json.dumps({"error": said}).encode()
        self._send(refusal.status, {name: text for name, text in headers.items() if text}, body)

    def _json(self, content: Any) -> None:
        self._send(200, {"Content-Type": "application/json"}, json.dumps(content).encode())

    def _send(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self._head(status, headers, len(body))
        if self.command != "HEAD":
            self.wfile.write(body)

    def _head(self, status: int, headers: dict[str, str], length: int) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(length)}.items():
            self.send_header(name, value)
        self.end_headers()
