"""Make every generated file from the records, or check that the files on disk are those."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from furina.errors import FurinaError, nearest
from furina.records import RecordError, SearchRecord, SelectionRecord
from furina.reporting import plots, render
from furina.reporting import readme as readme_block
from furina.reporting.cells import Table
from furina.reporting.details import latency_table, merge_table
from furina.reporting.paper import paper_table
from furina.reporting.removal import removal_table
from furina.reporting.studies import search_table, selection_table
from furina.reporting.suites import Suite, load_suites, read_folder
from furina.reporting.tables import main_table
from furina.storage import write_text

STUDIES = ("search", "selection")
PAPER = "paper"
BENCHMARKS = ("training", "latency", "vllm", "merging", "gguf")
"""Folders that scripts in benchmarks/ write, with tables of their own."""
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
    """Write (or, with `check`, compare) all tables and figures of `results_dir`.

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
    names = _suites(results_dir)
    for name in names:
        for number, suite_of in enumerate(load_suites(results_dir / name, metric)):
            add = _add_accuracy if number else _add_suite
            add(made, results_dir / name, suite_of)
    _add_studies(made, results_dir)
    paper = results_dir / PAPER / "main.csv"
    papers = [paper_table(paper)] if paper.is_file() else []
    _add_tables(made, results_dir / PAPER, papers)
    if not made.tables:
        raise RecordError(f"There are no records in {results_dir}; run `furina reproduce` first.")
    if readme is not None:
        shown = _choose(results_dir, names, suite)
        main = next(t for t in made.tables if t.title.startswith(f"{shown}: ") and t.name == "main")
        made.files[readme] = readme_block.fill(readme, _readme_text(main, papers))
    return made


def _suites(results_dir: Path) -> list[str]:
    reserved = (*STUDIES, PAPER, *BENCHMARKS)
    found = sorted({path.parent.name for path in results_dir.glob("*/*.json")})
    return [name for name in found if name not in reserved and not name.startswith(".")]


def _choose(results_dir: Path, names: Sequence[str], suite: str | None) -> str:
    if suite is not None and suite in names:
        return suite
    if suite is not None:
        raise RecordError(f"{results_dir} holds no suite {suite!r}.{nearest(suite, names)}")
    if len(names) != 1:
        known = ", ".join(names) or "none"
        raise RecordError(f"Say which suite the README shows; {results_dir} holds: {known}.")
    return names[0]


def _add_suite(made: Report, folder: Path, suite: Suite) -> None:
    tables = [main_table(suite), latency_table(suite), merge_table(suite), removal_table(suite)]
    _add_tables(made, folder, [table for table in tables if table is not None])
    figures = {
        "accuracy_latency": plots.accuracy_latency(suite),
        "loss_curves": plots.loss_curves(suite),
    }
    for name, figure in figures.items():
        if figure is not None:
            made.files[folder / "figures" / f"{name}.svg"] = plots.svg(figure)


def _add_accuracy(made: Report, folder: Path, suite: Suite) -> None:
    """Add the table of a further protocol: one table never mixes two."""
    table = main_table(suite)
    _add_tables(made, folder, [replace(table, name=f"main-{suite.protocol}")])


def _add_studies(made: Report, results_dir: Path) -> None:
    search = read_folder(results_dir / "search", SearchRecord.read)
    if search:
        _add_tables(made, results_dir / "search", [search_table(search)])
    selection = read_folder(results_dir / "selection", SelectionRecord.read)
    if selection:
        _add_tables(made, results_dir / "selection", [selection_table(selection)])


def _add_tables(made: Report, folder: Path, tables: Sequence[Table]) -> None:
    for table in tables:
        made.tables.append(table)
        stem = folder / "tables" / table.name
        made.files[stem.with_suffix(".md")] = f"# {table.title}\n\n{render.markdown(table)}"
        made.files[stem.with_suffix(".csv")] = render.csv(table)
        made.files[stem.with_suffix(".tex")] = render.latex(table)


def _readme_text(main: Table, papers: Sequence[Table]) -> str:
    """Return the main table and, apart and under its own heading, the paper's main numbers."""
    context = [f"**{table.title}**\n\n{render.markdown(table)}" for table in papers]
    return "\n".join([render.markdown(main), *context])


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
