from __future__ import annotations

import re
from collections import Counter
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest

from furina.records import RecordError
from furina.reporting.figures import plots
from furina.reporting.figures.scores import loss_curves
from furina.reporting.pages.inline import inline
from furina.reporting.pages.page import FOLDER, Drawing, Section, page
from furina.reporting.tables.cells import Cell, Table, build, label, missing
from furina.reporting.tables.details import latency_table
from furina.reporting.tables.main import main_table
from tests.reporting.frames import load_suite, rows_of

HOSTILE = "</style><script>alert(1)</script> & \"q\" 'a' <img src=x onerror=alert(1)>"
VOID = {"meta", "link", "img", "br", "hr", "input"}


class Page(HTMLParser):
    """What a page holds: its elements, its texts by place, and what is open at its end."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.texts: list[tuple[tuple[str, ...], str]] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append((tuple(self.open), data))

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]

    def text(self, tag: str) -> list[str]:
        """Return the texts that stand directly in elements of one name."""
        return [data for path, data in self.texts if path and path[-1] == tag]

    @property
    def ids(self) -> list[str]:
        return [str(attributes["id"]) for _, attributes in self.elements if "id" in attributes]


@pytest.fixture
def small() -> Table:
    rows = [
        {
            ("", "method"): label("lora"),
            ("speed, ms", "first"): Cell("1.2 ± 0.1", {"": 1.23456789, "stderr": 0.1}, ("slow",)),
            ("speed, ms", "range"): Cell("1 to 2", {"low": 1.25, "high": 2.0}),
        },
        {
            ("", "method"): label(HOSTILE, HOSTILE),
            ("speed, ms", "first"): missing("never ran"),
            ("speed, ms", "range"): Cell("3", {"": 3}, ("slow", HOSTILE), bold=True),
        },
    ]
    return build("small", f"A {HOSTILE}", rows, (HOSTILE,))


@pytest.fixture
def drawing(folder: Path) -> Drawing:
    figure = loss_curves(load_suite(folder))
    assert figure is not None
    return Drawing("loss_curves", "Training loss", plots.svg(figure))


RECORDS = {"lora": ["quickstart/lora--arc_easy--seed0.json", "quickstart/samples/a.jsonl.gz"]}


@pytest.fixture
def whole(folder: Path, small: Table, drawing: Drawing) -> str:
    suite = load_suite(folder)
    latency = latency_table(suite)
    assert latency is not None
    tables = (main_table(suite), latency)
    return page(
        [
            Section(
                "quickstart", "Quickstart", ("Words.",), tables, (drawing, drawing), records=RECORDS
            ),
            Section("second", HOSTILE, (HOSTILE,), (small, small), (drawing,), written=False),
        ]
    )


def test_the_page_is_well_nested_and_says_its_language_title_and_viewport(whole: str) -> None:
    found = Page(whole)
    assert found.open == []
    assert found.of("html") == [{"lang": "en"}]
    assert "".join(found.text("title")).strip()
    assert any(meta.get("name") == "viewport" for meta in found.of("meta"))


def test_nothing_is_fetched(whole: str) -> None:
    """Only links that a reader follows lead out; a policy in the page says so to the browser."""
    found = Page(whole)
    loads = {
        (tag, name, value)
        for tag, attributes in found.elements
        for name, value in attributes.items()
        if name in ("src", "href", "xlink:href", "srcset", "data", "action", "poster")
        and not str(value).startswith("#")
    }
    assert {(tag, name) for tag, name, value in loads if value != "data:,"} == {("a", "href")}
    assert not re.search(r"url\((?!#)", whole)
    assert "@import" not in whole
    policies = [meta for meta in found.of("meta") if "http-equiv" in meta]
    assert "default-src 'none'" in str(policies[0]["content"])
    for word in ("fetch(", "XMLHttpRequest", "import(", "http:"):
        assert word not in (FOLDER / "page.js").read_text()


def test_no_two_ids_are_equal_and_every_reference_leads_to_one(whole: str) -> None:
    """The same figure and the same table stand on the page more than once."""
    found = Page(whole)
    assert [i for i, n in Counter(found.ids).items() if n > 1] == []
    targets = re.findall(r'(?:href="#|url\(#|aria-labelledby=")([^")]+)', whole)
    assert len(targets) > 50
    assert set(targets) <= set(found.ids)


def test_a_row_leads_to_its_records_and_samples(whole: str) -> None:
    found = Page(whole)
    links = [a["href"] for a in found.of("a")]
    assert links.count("#quickstart-records-lora") == 1, "of the main table"
    assert "quickstart-records-lora" in found.ids
    assert set(RECORDS["lora"]) <= set(links)
    assert links.count(RECORDS["lora"][0]) > 1, "the table of latencies has a row per record"


def test_every_cell_of_every_table_is_there_in_order(whole: str, folder: Path) -> None:
    suite = load_suite(folder)
    for table in (main_table(suite), latency_table(suite)):
        assert table is not None
        cells = [cell.text for row in rows_of(table) for cell in row.values()]
        body = next(
            part for part in whole.split("<table>") if table.title in part.split("<thead")[0]
        )
        shown = Page(body[body.index("<tbody>") : body.index("</tbody>") + len("</tbody>")])
        texts = [
            data
            for path, data in shown.texts
            if path[-1] in ("th", "td", "b") or tuple(path[-2:]) == ("th", "a")
        ]
        assert [text for text in texts if text.strip()] == [text for text in cells if text.strip()]


def test_cells_sort_by_their_unrounded_first_number_and_a_missing_one_by_none(small: Table) -> None:
    found = Page(page([Section("s", "S", tables=(small,))]))
    cells = [a for tag, a in found.elements if tag == "td" or a.get("scope") == "row"]
    values = [cell.get("data-value") for cell in cells]
    assert values == ["lora", "1.23456789", "1.25", HOSTILE, None, "3"]
    assert [cell.get("class") for cell in cells[:3]] == [None, "number", "number"]


def test_a_column_of_words_of_which_one_is_missing_is_sorted_as_words() -> None:
    rows = [{("", "scale"): cell} for cell in (label("cpu"), missing("not run"), label("paper"))]
    assert 'class="number"' not in page([Section("s", "S", tables=(build("t", "T", rows),))])


def test_heads_are_scoped_and_groups_span_their_columns(small: Table) -> None:
    found = Page(page([Section("s", "S", tables=(small,))]))
    heads = [(a.get("scope"), a.get("colspan")) for a in found.of("th")]
    assert heads[:2] == [("colgroup", "1"), ("colgroup", "2")]
    assert heads[2:5] == [("col", None)] * 3
    assert heads[5:] == [("row", None)] * 2


def test_footnotes_and_remarks_stand_beneath_and_marks_lead_to_them(small: Table) -> None:
    text = page([Section("s", "S", tables=(small,))])
    assert '<sup><a href="#s-small-a">a</a></sup>' in text
    assert '<p id="s-small-a"><sup>a</sup> slow.</p>' in text
    assert '<sup><a href="#s-small-a">a</a>,<a href="#s-small-b">b</a></sup>' in text
    assert "s/tables/small.csv" in text
    assert "small.csv" not in page([Section("s", "S", tables=(small,), written=False)])


def test_hostile_text_stays_text(whole: str) -> None:
    found = Page(whole)
    assert len(found.of("script")) == len(found.of("style")) == 1
    assert found.of("img") == []
    assert whole.count("&lt;script&gt;alert(1)") > 5
    names = [name for _, attributes in found.elements for name in attributes]
    assert [name for name in names if name.startswith("on")] == []


def test_headings_are_in_order_and_all_are_in_the_table_of_contents(whole: str) -> None:
    found = Page(whole)
    levels = [int(tag[1]) for tag, _ in found.elements if re.fullmatch(r"h\d", tag)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(later - earlier <= 1 for earlier, later in pairwise(levels))
    headings = {a["id"] for tag, a in found.elements if tag in ("h2", "h3")}
    assert {f"#{i}" for i in headings} <= {a.get("href") for a in found.of("a")}


def test_every_table_has_a_caption_and_every_figure_a_name(whole: str) -> None:
    found = Page(whole)
    assert len(found.of("caption")) == len(found.of("table")) == 4
    pictures = [a for a in found.of("div") if a.get("role") == "img"]
    assert len(pictures) == len(found.of("svg")) == 3
    assert all(picture["aria-labelledby"] in found.ids for picture in pictures)


def test_what_scrolls_can_be_reached_by_key(whole: str) -> None:
    boxes = [a for a in Page(whole).of("div") if a.get("class") == "box"]
    assert len(boxes) == 7
    assert all(b["tabindex"] == "0" and b["role"] == "region" for b in boxes)


def test_the_same_sections_are_the_same_bytes(whole: str, folder: Path, small: Table) -> None:
    sections = [Section("s", "S", tables=(small, main_table(load_suite(folder))))]
    assert page(sections) == page(sections)
    assert not re.search(r"[ \t]$", whole, re.M)


def test_a_figure_follows_the_theme_unless_its_words_stand_on_colours(drawing: Drawing) -> None:
    themed, fixed = inline(drawing.svg, "a"), inline(drawing.svg, "a", themed=False)
    assert "var(--paper)" in themed and "var(--ink)" in themed
    assert "#ffffff" not in themed.lower()
    assert "var(" not in fixed and 'class="fixed"' in fixed
    for colour in re.findall(r"#[0-9a-f]{6}", drawing.svg):
        assert colour in fixed
    assert plots.COLOURS[0].lower() in themed


def test_a_figure_keeps_its_shapes(drawing: Drawing) -> None:
    before = re.findall(r"<(path|use|clipPath|rect)\b", drawing.svg)
    assert re.findall(r"<(path|use|clipPath|rect)\b", inline(drawing.svg, "a")) == before
    for before, after in zip(points(drawing.svg), points(inline(drawing.svg, "a")), strict=True):
        assert after == pytest.approx(before, abs=0.0051)


def points(svg: str) -> list[list[float]]:
    """Return the numbers of every path."""
    paths = re.findall(r' d="([^"]+)"', svg)
    return [[float(n) for n in re.findall(r"-?\d+(?:\.\d+)?(?:e-?\d+)?", path)] for path in paths]


@pytest.mark.parametrize(
    "inside",
    [
        "<script>alert(1)</script>",
        "<foreignObject><p>x</p></foreignObject>",
        '<image href="https://example.org/x.png"/>',
        '<path style="fill: url(https://example.org/x)"/>',
        '<path onclick="alert(1)"/>',
        "<style>body {display: none}</style>",
        "<g>",
    ],
)
def test_a_figure_that_would_run_or_fetch_something_is_an_error(inside: str) -> None:
    with pytest.raises(RecordError, match="draw it again"):
        inline(f'<svg xmlns="http://www.w3.org/2000/svg">{inside}</svg>', "figure")


def test_template_style_and_script_are_packaged() -> None:
    project = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    for name in ("page.html", "page.css", "page.js"):
        assert (FOLDER / name).is_file()
        assert f'"**/*.{name.rpartition(".")[2]}"' in project
