"""The report in a browser, where there is one: its tables sort, and it fits a phone."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
REPORT = HERE.parents[1] / "results" / "report.html"
NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
BROWSER = next(filter(None, map(shutil.which, NAMES)), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="there is no Chromium or Chrome")


def checked(text: str, size: str, folder: Path) -> dict[str, Any]:
    """Return what check_page.js finds in a page of this text in a window of this size."""
    page = folder / "page.html"
    script = f"<script>{(HERE / 'check_page.js').read_text()}</script></body>"
    page.write_text(text.replace("</body>", script))
    flags = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}"]
    flags += [f"--window-size={size}", "--virtual-time-budget=60000", "--dump-dom"]
    command = [str(BROWSER), *flags, page.as_uri()]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True).stdout
    title = re.search("<title>(.*?)</title>", shown)
    assert title
    found: dict[str, Any] = json.loads(html.unescape(title[1]))
    return found


@pytest.mark.parametrize("size", ["1280,900", "390,844"])
def test_every_table_sorts_by_every_column_and_the_page_fits(size: str, tmp_path: Path) -> None:
    text = REPORT.read_text()
    found = checked(text, size, tmp_path)
    assert found["wrong"] == []
    assert found["tables"] == text.count("<table") > 0
    assert found["sorted"] == text.count('<th scope="col"')


def test_a_wrong_order_and_a_wide_page_are_found(tmp_path: Path) -> None:
    ordered = 'return direction === "ascending" ? compare(a, b) : compare(b, a);'
    text = REPORT.read_text()
    assert ordered in text
    wide = '<div style="width: 5000px">wide</div></body>'
    text = text.replace(ordered, "return compare(b, a);").replace("</body>", wide)
    wrong = checked(text, "1280,900", tmp_path)["wrong"]
    assert "wider than the window" in wrong
    assert any(" follows " in words for words in wrong)
