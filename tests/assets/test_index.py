"""The address of a file comes from the index that pip is configured for."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from furina.assets import index
from furina.errors import AssetError

NAME = "sample_pkg-1.0-py3-none-any.whl"


def _pip_says(monkeypatch, text):
    index._pip_configuration.cache_clear()
    answer = subprocess.CompletedProcess([], 0, stdout=text)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: answer)


@pytest.fixture(autouse=True)
def _fresh_configuration(monkeypatch):
    for name in ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "PIP_CERT"):
        monkeypatch.delenv(name, raising=False)
    yield
    monkeypatch.undo()
    index._pip_configuration.cache_clear()


@pytest.mark.parametrize("style", ["json", "html"])
def test_a_file_is_found_on_json_and_html_pages(package_index, publish, style):
    publish(b"data")
    package_index.style = style
    url = index.file_url(index.session(), "sample-pkg", NAME, [package_index.url])
    assert url.partition("#")[0] == f"{package_index.url[:-7]}/files/sample-pkg/{NAME}"


def test_pypi_is_the_default_index(monkeypatch):
    _pip_says(monkeypatch, "")
    assert index.indexes() == ["https://pypi.org/simple"]


def test_indexes_come_from_the_configuration_of_pip(monkeypatch):
    _pip_says(
        monkeypatch,
        "global.extra-index-url='\\nhttps://b.example/simple\\nhttps://c.example/simple'\n"
        "global.index-url='https://a.example/simple'\nglobal.cert='/some/ca.pem'\n",
    )
    expected = [f"https://{letter}.example/simple" for letter in "abc"]
    assert index.indexes() == expected
    assert index.session().verify == "/some/ca.pem"


def test_the_environment_is_stronger_than_the_configuration(monkeypatch):
    _pip_says(monkeypatch, "global.index-url='https://a.example/simple'\n")
    monkeypatch.setenv("PIP_INDEX_URL", "https://b.example/simple")
    assert index.indexes() == ["https://b.example/simple"]


def test_the_next_index_is_asked_when_the_first_lacks_the_file(package_index, publish):
    publish(b"data")
    empty = package_index.url.replace("/simple", "/none")
    assert index.file_url(index.session(), "sample-pkg", NAME, [empty, package_index.url])


def test_a_folder_serves_as_an_index(tmp_path: Path):
    folder = tmp_path / "simple" / "sample-pkg"
    folder.mkdir(parents=True)
    (folder / "index.html").write_text(f'<a href="../../files/{NAME}">{NAME}</a>')
    base = (tmp_path / "simple").as_uri()
    url = index.file_url(index.session(), "sample-pkg", NAME, [base])
    assert index.local_path(url) == tmp_path / "files" / NAME


def test_an_unlisted_file_is_named_with_the_index_but_without_its_password(package_index, publish):
    publish(b"data")
    base = package_index.url.replace("http://", "http://user:secret@")
    with pytest.raises(AssetError, match=r"other\.whl: it is not listed at http://127") as error:
        index.file_url(index.session(), "sample-pkg", "other.whl", [base])
    assert "secret" not in str(error.value)


def test_an_unreachable_index_is_one_sentence():
    with pytest.raises(AssetError, match=r"the package index cannot be read.*ConnectionError"):
        index.file_url(index.session(), "sample-pkg", NAME, ["http://127.0.0.1:9/simple"])


def test_a_failing_index_is_one_sentence(package_index, publish):
    publish(b"data")
    package_index.status = 503
    with pytest.raises(AssetError, match=r"the package index cannot be read.*HTTPError"):
        index.file_url(index.session(), "sample-pkg", NAME, [package_index.url])
