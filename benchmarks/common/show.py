"""What a report looks like: its cells, sentences, tables and bars, made from its JSON alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from matplotlib.axes import Axes
from matplotlib.container import BarContainer
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from benchmarks.common.rounds import wilson
from furina.reporting import plots
from furina.reporting.cells import Cell, Row, Table, build, label, missing
from furina.reporting.render import markdown
from furina.storage import write_json, write_text

T = TypeVar("T")
Report = Mapping[str, Any]
CellOf = Callable[[T], Cell]
Columns = Mapping[tuple[str, str], CellOf[T]]
"""What a table's columns show of an item, by group and name."""
OWNERS = {"furina": plots.COLOURS[0], "peft": plots.COLOURS[1], "moe_peft": plots.COLOURS[2]}


@dataclass(frozen=True)
class Page:
    """A title, paragraphs, a picture's title, tables, and what follows them."""

    tables: Sequence[Table]
    title: str = ""
    paragraphs: Sequence[str] = ()
    picture: str = ""
    after: Sequence[str] = ()

    def markdown(self, stem: str) -> str:
        """Return the page; its picture lies beside it as `stem`.svg."""
        parts = [f"# {self.title}"] * bool(self.title) + [*self.paragraphs]
        parts += [f"![{self.picture}]({stem}.svg)"] * bool(self.picture)
        for table in self.tables:
            parts += [f"## {table.title}"] * (table.title != self.title)
            parts.append(markdown(table).rstrip())
        return "\n\n".join([*parts, *self.after]) + "\n"


def write(stem: Path, report: Report, page: Page, figure: Figure | None = None) -> None:
    """Write a report as `stem`.json, its page as .md and its figure, if there is one, as .svg."""
    write_json(stem.with_suffix(".json"), report)
    write_text(stem.with_suffix(".md"), page.markdown(stem.name))
    if figure:
        write_text(stem.with_suffix(".svg"), plots.svg(figure))


def table(
    name: str, title: str, items: Iterable[T], columns: Columns[T], *remarks: str, keys: int = 1
) -> Table:
    """Return a table of one row an item."""
    rows: list[Row] = [{key: cell(item) for key, cell in columns.items()} for item in items]
    return build(name, title, rows, remarks, keys)


def number(value: float | None, form: str = "{:.2f}", factor: float = 1) -> Cell:
    """Return a number times `factor`, as `form` shows it."""
    return missing() if value is None else Cell(form.format(value * factor), {"": value})


def count(value: int) -> Cell:
    """Return a number of things, thousands apart."""
    return number(value, "{:,}")


def share(counted: int, n: int) -> Cell:
    """Return a count as a share with Wilson's interval, in percent."""
    low, high = wilson(counted, n)
    text = f"{100 * counted / n:.2f} [{100 * low:.2f}, {100 * high:.2f}]"
    return Cell(text, {"": counted / n, "low": low, "high": high, "count": counted})


def quartiles(spread: Mapping[str, float], form: str) -> Cell:
    """Return a spread's quartiles."""
    return between((spread["q1"], spread["q3"]), form)


def between(ends: Sequence[float], form: str = "{:.3f}") -> Cell:
    """Return an interval."""
    low, high = (form.format(end) for end in ends)
    return label(f"{low} to {high}")


def processor(report: Report) -> str:
    """Return what computed."""
    hardware = report["environment"]["hardware"]
    on_cpu = report["settings"].get("device") == "cpu"
    named: str | None = None if on_cpu else hardware["accelerator"]
    return named or str(hardware["cpu"])


def machine(report: Report, threads: str = "threads") -> str:
    """Return what computed, with its cores, and the threads that were asked for."""
    cores = report["environment"]["hardware"]["cores"]
    return f"{processor(report)}, cores: {cores}, {threads}: {report['settings']['threads']}"


def versions(report: Report, *packages: str) -> str:
    """Return the versions of those packages that the report has."""
    found = report["environment"]["packages"]
    return ", ".join(f"{name} {found[name]}" for name in packages if name in found)


def commit(report: Report) -> str:
    """Return the commit, and whether there were changes beside it."""
    environment = report["environment"]
    changed = " with uncommitted changes" if environment["dirty"] else ""
    return f"commit {(environment['commit'] or 'unknown')[:10]}{changed}"


def owner(name: str) -> str:
    """Return whose implementation a variant is."""
    peer = name.rpartition("/")[2]
    return next((package for package in ("moe_peft", "peft") if peer.startswith(package)), "furina")


def bars(axes: Axes, spreads: Mapping[str, Mapping[str, float]]) -> BarContainer:
    """Draw a bar for each variant with its quartiles, in its owner's colour."""
    medians = [each["median"] for each in spreads.values()]
    errors = [
        [each["median"] - each["q1"] for each in spreads.values()],
        [each["q3"] - each["median"] for each in spreads.values()],
    ]
    colours = [OWNERS[owner(name)] for name in spreads]
    whiskers = {"elinewidth": 0.9, "capsize": 2}
    axes.margins(y=0.01)
    axes.grid(axis="y", visible=False)
    return axes.barh([*spreads], medians, xerr=errors, color=colours, error_kw=whiskers)


def owners_legend(names: Iterable[str]) -> list[Patch]:
    """Return a patch for each owner, in the order in which they come."""
    return [Patch(color=OWNERS[each], label=each) for each in dict.fromkeys(map(owner, names))]
