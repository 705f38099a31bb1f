"""What a folder of results holds, section by section: the tables and figures of the report."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from matplotlib.figure import Figure

from furina.records import SearchRecord, SelectionRecord
from furina.records.cells import suite_activity
from furina.reporting import plots
from furina.reporting.activity import activity_figures, activity_tables
from furina.reporting.cells import Table
from furina.reporting.comparison import comparison_table
from furina.reporting.details import latency_table, merge_table
from furina.reporting.documents import read_document
from furina.reporting.dots import difference_dots, setting_curves
from furina.reporting.effort import effort_table
from furina.reporting.forgetting import forgetting_table
from furina.reporting.page import Drawing, Section
from furina.reporting.pair_table import pair_table
from furina.reporting.pairs import Pair, row_pairs
from furina.reporting.paper import PaperTable, paper_table
from furina.reporting.places import INDEX, Place, in_order, place_of, read_index
from furina.reporting.removal import removal_table
from furina.reporting.reproducing import explanation, status_table
from furina.reporting.standings import reference_row
from furina.reporting.studies import search_table, selection_table
from furina.reporting.subjects import drop_dots, training_costs
from furina.reporting.suites import Suite, load_suites, read_folder
from furina.reporting.tables import main_table

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
TABLES: tuple[Callable[[Suite], Table | None], ...] = (
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
    folder: Path, suites: Sequence[Suite], place: Place | None, paper: PaperTable | None
) -> Section:
    """Return a suite's tables and figures; of a further protocol, its main table alone."""
    order = tuple(paper.ours) if paper else ()
    first, *others = (replace(suite, papers_rows=order) for suite in suites)
    compared = first.without_general_tasks()
    accuracies = paper if place and place.measure in ("accuracy", "removal") else None
    drops = paper if place and place.measure == "drop" else None
    activity = suite_activity(folder)
    tables = [
        comparison_table(compared, accuracies),
        forgetting_table(first, drops),
        _pairs(first, place, paper),
        *(make(first) for make in TABLES),
        *(replace(main_table(each), name=f"main-{each.protocol}") for each in others),
        *(_titled(first, table) for table in activity_tables(activity)),
    ]
    figures = {
        "differences": difference_dots(compared, accuracies),
        "forgetting": drop_dots(first, drops),
        "training_costs": training_costs(first),
        "settings": setting_curves(first),
        "accuracy_latency": plots.accuracy_latency(first),
        "loss_curves": plots.loss_curves(first),
    }
    drawings = [
        Drawing(name, f"{first.name}: {CAPTIONS[name]}", plots.svg(figure))
        for name, figure in figures.items()
        if figure is not None
    ]
    drawings += [_activity_drawing(first, *named) for named in activity_figures(activity).items()]
    title = first.name + (f" ({place.place} of the paper)" if place else "")
    shown = tuple(table for table in tables if table is not None)
    return Section(first.name, title, tables=shown, drawings=tuple(drawings))


def _pairs(suite: Suite, place: Place | None, paper: PaperTable | None) -> Table | None:
    reference = reference_row(suite, paper)
    if not (place and place.measure and paper and reference):
        return None
    pairs = row_pairs(suite, paper, place.measure)
    return pair_table(suite, paper, place.measure, pairs, reference)


def _titled(suite: Suite, table: Table) -> Table:
    return replace(table, title=f"{suite.name}: {table.title}")


def _activity_drawing(suite: Suite, name: str, figure: Figure) -> Drawing:
    caption = f"{suite.name}: {name.replace('--', ', ')}"
    return Drawing(name, caption, plots.svg(figure), themed=False)


def study_sections(results_dir: Path) -> Iterator[Section]:
    """Yield what was tried on questions held out of train, a section per study."""
    for folder in sorted(path for path in results_dir.glob("*") if path.is_dir()):
        table = _study_table(folder)
        if table is not None:
            yield Section(folder.name, folder.name, tables=(table,))


def _study_table(folder: Path) -> Table | None:
    if _study(folder.name) == "search":
        trials = read_folder(folder, SearchRecord.read)
        return search_table(trials) if trials else None
    if _study(folder.name) == "selection":
        runs = read_folder(folder, SelectionRecord.read)
        return selection_table(runs) if runs else None
    return None


def cost_section(results_dir: Path) -> Section | None:
    """Return what the benchmarks wrote, as they wrote it; None where there is nothing."""
    lead: list[str] = []
    tables: list[Table] = []
    drawings: list[Drawing] = []
    for path in sorted(p for name in BENCHMARKS for p in (results_dir / name).rglob("*.md")):
        document = read_document(path)
        source = path.relative_to(results_dir).with_suffix("").as_posix()
        lead += [f"{source}: {paragraph}" for paragraph in document.paragraphs]
        tables += [replace(table, title=f"{source}: {table.title}") for table in document.tables]
        picture = path.with_suffix(".svg")
        if picture.is_file():
            title = f"{source}: {document.picture or f'{document.title} (figure)'}"
            drawings.append(Drawing(f"{path.stem}-figure", title, picture.read_text("utf-8")))
    if not tables:
        return None
    return Section("cost", "Cost", tuple(lead), tuple(tables), tuple(drawings), written=False)


def load_suites_of(results_dir: Path, metric: str | None) -> dict[str, list[Suite]]:
    """Return each folder's suites, one per protocol."""
    return {name: load_suites(results_dir / name, metric) for name in suite_names(results_dir)}


def load_paper(results_dir: Path) -> dict[Place, PaperTable | None]:
    """Return the paper's tables and figures with their numbers; none where those are not there."""
    path = results_dir / PAPER / INDEX
    places = read_index(path) if path.is_file() else ()
    files = {place: path.with_name(f"{place.file}.csv") for place in places if place.file}
    return {place: PaperTable.read(files[place]) if place in files else None for place in places}


def sections(results_dir: Path, suites: Mapping[str, Sequence[Suite]]) -> list[Section]:
    """Return the suites in the paper's order, then others, studies, costs and the paper's own."""
    paper = load_paper(results_dir)
    found: list[Section] = []
    for name in in_order(suites, list(paper)):
        place = place_of(name, list(paper))
        theirs = paper[place] if place else None
        found.append(suite_section(results_dir / name, suites[name], place, theirs))
    found += study_sections(results_dir)
    own = [paper_table(results_dir / PAPER / f"{place.file}.csv") for place in paper if place.file]
    last = cost_section(results_dir), Section(PAPER, "The paper's own numbers", tables=tuple(own))
    return [*found, *(each for each in last if each and each.tables)]


def status_section(results_dir: Path, suites: Mapping[str, Sequence[Suite]]) -> Section | None:
    """Return what became of the paper's tables and figures; None without a list of them."""
    paper = load_paper(results_dir)
    if not paper:
        return None
    firsts = [suites[name][0] for name in in_order(suites, list(paper))]
    pairs: dict[str, list[Pair]] = {}
    for suite in firsts:
        place = place_of(suite.name, list(paper))
        theirs = paper[place] if place else None
        if place and place.measure and theirs:
            pairs[suite.name] = row_pairs(suite, theirs, place.measure)
    tables = status_table(list(paper), firsts, pairs), effort_table(firsts)
    return Section("status", "Reproducing the paper", explanation(), tables, written=False)
