"""Make every generated file from the records, or check that the files on disk are those."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from furina.errors import FurinaError, nearest
from furina.options.registry import registry
from furina.records import RecordError
from furina.reporting.pages.contents import PAPER, load_suites_of, sections, status_section
from furina.reporting.pages.page import Section, page
from furina.reporting.read.suites import Results
from furina.reporting.tables import render
from furina.reporting.tables.cells import Table
from furina.reporting.tables.overview import WIDEST, overview_table
from furina.reporting.tables.status import reproducing
from furina.storage import write_text

BEGIN = "<!-- furina:table begin -->"
END = "<!-- furina:table end -->"
STATUS = "REPRODUCING.md"
PAGE = "report.html"
GENERATED = {"tables": ("md", "csv", "tex"), "figures": ("svg",)}


class OutdatedReportError(FurinaError):
    """Generated files on disk are not what the records give."""


@dataclass
class Report:
    """Tables for the terminal, and every generated file's text by path."""

    tables: list[Table] = field(default_factory=list)
    files: dict[Path, str] = field(default_factory=dict)


def report(
    results_dir: Path,
    *,
    suite: str | None = None,
    readme: Path | None = None,
    metric: str | None = None,
    check: bool = False,
) -> Report:
    """Write (or, with `check`, compare) all tables, figures and pages of `results_dir`.

    Args:
        results_dir: folder with a folder of run records per suite, and search/, selection/, paper/.
        suite: the suite in the README's block; may be left out where there is only one.
        readme: the file whose marked block is filled; None leaves it alone.
        metric: the metric of the tables; by default the one each record lists first.
        check: write nothing and raise OutdatedReportError listing every file that differs.

    Raises RecordError where records are damaged or cannot share a table.
    """
    made = generate(results_dir, suite=suite, readme=readme, metric=metric)
    stale = _stale(results_dir, made.files)
    if check:
        _compare(made.files, stale)
        return made
    for path, text in made.files.items():
        if not _is_current(path, text):
            write_text(path, text)
    for path in stale:
        path.unlink()
    return made


def generate(
    results_dir: Path, *, suite: str | None, readme: Path | None, metric: str | None
) -> Report:
    """Return the report in memory; nothing on disk is touched."""
    made = Report()
    suites = load_suites_of(results_dir, metric)
    _require_metric(metric, suites)
    shown = _choose(results_dir, list(suites), suite) if readme is not None and suites else ""
    _warn_of_strangers(suites)
    found = sections(results_dir, suites)
    for section in found:
        if section.written:
            _add(made, results_dir / section.name, section)
    if not made.tables:
        raise RecordError(f"There are no records in {results_dir}; run `furina run` first.")
    status = status_section(results_dir, suites)
    if status is not None:
        made.tables += status.tables
        made.files[results_dir / STATUS] = reproducing(*status.tables)
        found = [status, *found]
    made.files[results_dir / PAGE] = page(found)
    if readme is not None:
        made.tables.append(overview_table(suites[shown][0]))
        text = _readme_text(made.tables, results_dir, shown, readme)
        made.files[readme] = fill(readme, text)
    return made


def fill(readme: Path, block: str) -> str:
    """Return the README's text with `block` between the two marks; RecordError without them."""
    try:
        text = readme.read_text("utf-8")
    except FileNotFoundError as error:
        raise RecordError(f"{readme} does not exist, so its table cannot be filled in.") from error
    if (text.count(BEGIN), text.count(END)) != (1, 1) or text.index(BEGIN) > text.index(END):
        raise RecordError(f"{readme} must hold one line {BEGIN} and, after it, one line {END}.")
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n{block.strip()}\n{END}{after}"


def _warn_of_strangers(suites: Mapping[str, Sequence[Results]]) -> None:
    """Warn of records that are tabulated though they may lie there by mistake."""
    known = {*registry().methods(), "base"}
    for name, (suite, *_) in suites.items():
        for run in suite.runs:
            method, own = run.record.method, run.record.suite
            if method not in known:
                text = f"method {method!r}, which this furina does not have"
            elif own != name:
                text = f"suite {own!r}, and is tabulated with {name!r}, in whose folder it lies"
            else:
                continue
            warnings.warn(f"{run.path} is of {text}.", stacklevel=3)


def _require_metric(metric: str | None, suites: Mapping[str, Sequence[Results]]) -> None:
    """Refuse a metric that no record holds."""
    runs = [run for found in suites.values() for run in found[0].runs]
    known = sorted({score.metric for run in runs for score in run.record.evaluations})
    if metric is not None and metric not in known:
        raise RecordError(f"No record holds a metric {metric!r}.{nearest(metric, known)}")


def _choose(results_dir: Path, names: Sequence[str], suite: str | None) -> str:
    if suite is not None and suite in names:
        return suite
    if suite is not None:
        raise RecordError(f"{results_dir} holds no suite {suite!r}.{nearest(suite, names)}")
    if len(names) != 1:
        known = ", ".join(names) or "none"
        raise RecordError(f"Say which suite the README shows; {results_dir} holds: {known}.")
    return names[0]


def _add(made: Report, folder: Path, section: Section) -> None:
    """Add the files of a section's tables and figures."""
    for table in section.tables:
        made.tables.append(table)
        stem = folder / "tables" / table.name
        made.files[stem.with_suffix(".md")] = f"# {table.title}\n\n{render.markdown(table)}"
        made.files[stem.with_suffix(".csv")] = render.csv(table)
        made.files[stem.with_suffix(".tex")] = render.latex(table)
    for drawing in section.drawings:
        made.files[folder / "figures" / f"{drawing.name}.svg"] = drawing.svg


def _readme_text(tables: Sequence[Table], results: Path, suite: str, readme: Path) -> str:
    """Return a suite's table at a glance and, apart and under its own heading, the paper's.

    A link leads to what a page does not hold, such as all columns.
    """
    folder = Path(os.path.relpath(results, readme.parent))
    own = next(table for table in tables if table.name == "overview")
    link = f"<br>[All columns]({_link(folder, suite, 'main')})\n"
    parts = [render.markdown(own).rstrip() + link]  # one line: a README has few
    for table in (t for t in tables if t.name == "paper_main"):
        is_wide = len(table.frame.columns) > WIDEST
        link = f"[The paper's table]({_link(folder, PAPER, table.name)})\n"
        parts.append(f"**{table.title}**\n\n{link if is_wide else render.markdown(table)}")
    return "\n".join(parts)


def _link(results: Path, folder: str, table: str) -> str:
    return (results / folder / "tables" / f"{table}.md").as_posix()


def _stale(results_dir: Path, files: dict[Path, str]) -> list[Path]:
    """Return generated files that the records no longer give."""
    patterns = [f"*/{folder}/*.{end}" for folder, ends in GENERATED.items() for end in ends]
    found = (path for pattern in patterns for path in results_dir.glob(pattern))
    return sorted(path for path in found if path not in files)


def _is_current(path: Path, text: str) -> bool:
    return path.is_file() and path.read_bytes() == text.encode()


def _compare(files: dict[Path, str], stale: Sequence[Path]) -> None:
    differing = [path for path, text in files.items() if not _is_current(path, text)]
    names = ", ".join(str(path) for path in sorted([*differing, *stale]))
    if names:
        raise OutdatedReportError(
            f"These generated files differ from the records: {names}; run `furina report`."
        )
