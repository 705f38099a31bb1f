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
from markdown_it import MarkdownIt

from furina.reporting.pages.generate import BEGIN, END

HERE = Path(__file__).parent
REPORT = HERE.parents[1] / "results" / "report.html"
NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
BROWSER = next(filter(None, map(shutil.which, NAMES)), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="there is no Chromium or Chrome")


def checked(text: str, size: str, folder: Path) -> dict[str, Any]:
    """Return what check_page.js finds in a page of this text in a window of this size."""
    script = f"<script>{(HERE / 'check_page.js').read_text()}</script></body>"
    return shown(text.replace("</body>", script), size, folder)


def shown(text: str, size: str, folder: Path) -> dict[str, Any]:
    """Return the JSON that a page's script has put into its title."""
    page = folder / "page.html"
    page.write_text(text)
    flags = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}"]
    flags += [f"--window-size={size}", "--virtual-time-budget=60000", "--dump-dom"]
    command = [str(BROWSER), *flags, page.as_uri()]
    dumped = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True).stdout
    title = re.search("<title>(.*?)</title>", dumped)
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


def test_the_readmes_tables_fit_a_page_and_scroll_on_a_phone(tmp_path: Path) -> None:
    """As GitHub shows them: at 1280 px beside a column, at 390 px in a box that scrolls."""
    readme = (HERE.parents[1] / "README.md").read_text(encoding="utf-8")
    block = readme[readme.index(BEGIN) : readme.index(END)]
    body = MarkdownIt("commonmark", {"html": True}).enable("table").render(block)
    style = (
        "body { font: 16px/1.5 sans-serif; margin: 32px auto; max-width: 832px }"
        "@media (max-width: 500px) { body { margin: 16px } }"
        "table { display: block; width: max-content; max-width: 100%; overflow: auto }"
        "th, td { padding: 6px 13px; border: 1px solid }"
    )
    script = (
        "const wide = (e) => e.scrollWidth > e.clientWidth;"
        "const tables = [...document.querySelectorAll('table')];"
        "document.title = JSON.stringify({page: wide(document.documentElement),"
        "tables: tables.map(wide)});"
    )
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width">'
    page = f"{head}<title></title><style>{style}</style>{body}<script>{script}</script>"
    assert shown(page, "1280,900", tmp_path) == {"page": False, "tables": [False, False]}
    assert not shown(page, "390,844", tmp_path)["page"]


@pytest.mark.slow  # it tests the test
def test_a_wrong_order_and_a_wide_page_are_found(tmp_path: Path) -> None:
    ordered = 'return direction === "ascending" ? compare(a, b) : compare(b, a);'
    text = REPORT.read_text()
    assert ordered in text
    wide = '<div style="width: 5000px">wide</div></body>'
    text = text.replace(ordered, "return compare(b, a);").replace("</body>", wide)
    wrong = checked(text, "1280,900", tmp_path)["wrong"]
    assert "wider than the window" in wrong
    assert any(" follows " in words for words in wrong)
