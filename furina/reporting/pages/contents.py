"""What a folder of results holds, section by section: the tables and figures of the report."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from furina.records import SearchRecord, SelectionRecord
from furina.records.cells import suite_activity
from furina.reporting.compare.pairs import row_pairs
from furina.reporting.compare.rows import reference_row
from furina.reporting.figures import plots
from furina.reporting.figures.activity import activity_figures
from furina.reporting.figures.dots import difference_dots, drop_dots, setting_curves, training_costs
from furina.reporting.figures.scores import accuracy_latency, loss_curves
from furina.reporting.pages.page import Drawing, Section
from furina.reporting.read.paper import INDEX, Exhibit, PaperTable, exhibit_of, in_order, read_index
from furina.reporting.read.suites import Results, Run, load_suites, read_folder
from furina.reporting.tables.activity import activity_tables
from furina.reporting.tables.cells import Table
from furina.reporting.tables.comparison import comparison_table
from furina.reporting.tables.details import latency_table, merge_table
from furina.reporting.tables.effort import effort_table
from furina.reporting.tables.forgetting import forgetting_table
from furina.reporting.tables.main import main_table
from furina.reporting.tables.paper import paper_table
from furina.reporting.tables.removal import removal_table
from furina.reporting.tables.status import explanation, pair_table, status_table
from furina.reporting.tables.stored import Page
from furina.reporting.tables.studies import search_table, selection_table

PAPER = "paper"
STUDIES = ("search", "selection")
BENCHMARKS = ("training", "latency", "vllm", "merging", "gguf")
"""Folders that scripts in benchmarks/ write, with tables of their own."""
CAPTIONS = {
    "differences": "each seed's difference to a reference row by task, and the mean's interval",
    "forgetting": "relative drops on tasks that no run trained, each seed as a dot",
    "training_costs": "what a step of training takes, each run as a dot",
    "settings": "accuracy over each setting that rows differ in; dotted lines are the base model",
    "accuracy_latency": "accuracy against latency; hollow markers are unmerged models, filled ones "
    "merged, dotted lines the base model",
    "loss_curves": "task loss in training; thin lines are steps, thick ones their running mean",
}
"""What a suite's figures show, by the stem of their file."""
TABLES: tuple[Callable[[Results], Table | None], ...] = (
    main_table,
    latency_table,
    merge_table,
    removal_table,
)


def suite_names(results_dir: Path) -> list[str]:
    """Return the folders that hold a suite's run records."""
    reserved = (PAPER, *BENCHMARKS)
    found = sorted({path.parent.name for path in results_dir.glob("*/*.json")})
    return [n for n in found if n not in reserved and not _study(n) and not n.startswith(".")]


def _study(name: str) -> str | None:
    """Return which study a folder holds, None for a suite's: search, or search-paper."""
    stem = name.removesuffix("-paper")
    return stem if stem in STUDIES else None


def suite_section(
    folder: Path, suites: Sequence[Results], exhibit: Exhibit | None, paper: PaperTable | None
) -> Section:
    """Return a suite's tables and figures; of a further protocol, its main table alone."""
    order = tuple(paper.ours) if paper else ()
    first, *others = (replace(suite, papers_rows=order) for suite in suites)
    compared = first.without_general_tasks()
    measure = exhibit.measure if exhibit else ""
    accuracies = paper if measure in ("accuracy", "removal") else None
    drops = paper if measure == "drop" else None
    activity = suite_activity(folder)
    reference, pairs = reference_row(first, paper), None
    if measure and paper and reference:
        found = row_pairs(first, paper, measure)
        pairs = pair_table(first, paper, measure, found, reference)
    tables = [
        comparison_table(compared, accuracies),
        forgetting_table(first, drops),
        pairs,
        *(make(first) for make in TABLES),
        *(replace(main_table(each), name=f"main-{each.protocol}") for each in others),
        *(replace(t, title=f"{first.name}: {t.title}") for t in activity_tables(activity)),
    ]
    figures = {
        "differences": difference_dots(compared, accuracies),
        "forgetting": drop_dots(first, drops),
        "training_costs": training_costs(first),
        "settings": setting_curves(first),
        "accuracy_latency": accuracy_latency(first),
        "loss_curves": loss_curves(first),
    }
    drawings = [
        Drawing(name, f"{first.name}: {CAPTIONS[name]}", plots.svg(figure))
        for name, figure in figures.items()
        if figure is not None
    ]
    drawings += [
        Drawing(name, f"{first.name}: {name.replace('--', ', ')}", plots.svg(figure), themed=False)
        for name, figure in activity_figures(activity).items()
    ]
    title = first.name + (f" ({exhibit.place} of the paper)" if exhibit else "")
    shown = tuple(table for table in tables if table is not None)
    files: list[tuple[str, Path, Iterable[Path]]] = []
    files += [(run.record.row, run.path, _samples(run)) for run in first.runs]
    files += [(record.row, path, ()) for path, record in activity.items()]
    records = _sources(folder.parent, files)
    return Section(first.name, title, tables=shown, drawings=tuple(drawings), records=records)


def _samples(run: Run) -> Iterator[Path]:
    return (run.path.parent / s.samples for s in run.record.evaluations if s.samples)


def _sources(
    results_dir: Path, files: Iterable[tuple[str, Path, Iterable[Path]]]
) -> dict[str, list[str]]:
    """Return by row its records, each with its samples after it, as seen from the page."""
    found: dict[str, dict[str, None]] = {}
    for row, record, samples in files:
        paths = (Path(os.path.relpath(path, results_dir)) for path in (record, *samples))
        found.setdefault(row, {}).update(dict.fromkeys(path.as_posix() for path in paths))
    return {row: list(paths) for row, paths in found.items()}


def study_sections(results_dir: Path) -> Iterator[Section]:
    """Yield what was tried on questions held out of train, a section per study."""
    for folder in sorted(path for path in results_dir.glob("*") if path.is_dir()):
        study, table = _study(folder.name), None
        files: list[tuple[str, Path, tuple[Path, ...]]] = []
        if study == "search" and (trials := read_folder(folder, SearchRecord.read)):
            table = search_table(trials)
            files = [(trial.method, path, ()) for path, trial in trials.items()]
        if study == "selection" and (runs := read_folder(folder, SelectionRecord.read)):
            table = selection_table(runs)
            files = [(run.method, path, ()) for path, run in runs.items()]
        if table is not None:
            records = _sources(results_dir, files)
            yield Section(folder.name, folder.name, tables=(table,), records=records)


def cost_section(results_dir: Path) -> Section | None:
    """Return what the benchmarks keep in their JSON; None where there is nothing."""
    lead: list[str] = []
    tables: list[Table] = []
    drawings: list[Drawing] = []
    for path in sorted(p for name in BENCHMARKS for p in (results_dir / name).rglob("*.json")):
        page = Page.read(path)
        source = path.relative_to(results_dir).with_suffix("").as_posix()
        paragraphs = (text.replace("`", "") for text in (*page.paragraphs, *page.after))
        lead += [f"{source}: {text}" for text in paragraphs]
        tables += [
            replace(table, title=f"{source}: {table.title}", source=f"{source}.json")
            for table in page.tables
        ]
        picture = path.with_suffix(".svg")
        if picture.is_file():
            heading = page.title or page.tables[0].title
            title = f"{source}: {page.picture or f'{heading} (figure)'}"
            drawings.append(Drawing(f"{path.stem}-figure", title, picture.read_text("utf-8")))
    if not tables:
        return None
    return Section("cost", "Cost", tuple(lead), tuple(tables), tuple(drawings), written=False)


def load_suites_of(results_dir: Path, metric: str | None) -> dict[str, list[Results]]:
    """Return each folder's suites, one per protocol."""
    return {name: load_suites(results_dir / name, metric) for name in suite_names(results_dir)}


def load_paper(results_dir: Path) -> dict[Exhibit, PaperTable | None]:
    """Return the paper's tables and figures with their numbers; none where those are not there."""
    path = results_dir / PAPER / INDEX
    found = read_index(path) if path.is_file() else ()
    files = {each: path.with_name(f"{each.file}.csv") for each in found if each.file}
    return {each: PaperTable.read(files[each]) if each in files else None for each in found}


def sections(results_dir: Path, suites: Mapping[str, Sequence[Results]]) -> list[Section]:
    """Return the suites in the paper's order, then others, studies, costs and the paper's own."""
    paper = load_paper(results_dir)
    found: list[Section] = []
    for name in in_order(suites, list(paper)):
        exhibit = exhibit_of(name, list(paper))
        theirs = paper[exhibit] if exhibit else None
        found.append(suite_section(results_dir / name, suites[name], exhibit, theirs))
    found += study_sections(results_dir)
    own = [paper_table(results_dir / PAPER / f"{each.file}.csv") for each in paper if each.file]
    last = cost_section(results_dir), Section(PAPER, "The paper's own numbers", tables=tuple(own))
    return [*found, *(each for each in last if each and each.tables)]


def status_section(results_dir: Path, suites: Mapping[str, Sequence[Results]]) -> Section | None:
    """Return what became of the paper's tables and figures; None without a list of them."""
    paper = load_paper(results_dir)
    if not paper:
        return None
    firsts = [suites[name][0] for name in in_order(suites, list(paper))]
    pairs = {
        suite.name: row_pairs(suite, theirs, exhibit.measure)
        for suite in firsts
        if (exhibit := exhibit_of(suite.name, list(paper)))
        and (theirs := paper[exhibit])
        and exhibit.measure
    }
    tables = status_table(list(paper), firsts, pairs), effort_table(firsts)
    return Section("status", "Reproducing the paper", explanation(), tables, written=False)
