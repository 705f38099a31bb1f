"""What a report looks like: its cells, sentences, tables and bars, made from its JSON alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.container import BarContainer
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from benchmarks.common.rounds import wilson
from furina.reporting.figures import plots
from furina.reporting.tables import stored
from furina.reporting.tables.cells import Cell, Row, Table, build, label, missing
from furina.storage import write_text

Report = Mapping[str, Any]
Column = str | Callable[[Report], Cell]
"""A cell of an item: its place and format, as in "weights.max_abs .1e", or a function."""
Columns = dict[tuple[str, str], Column]
"""By group and name."""
OWNERS = {"furina": plots.COLOURS[0], "peft": plots.COLOURS[1], "moe_peft": plots.COLOURS[2]}


@dataclass(frozen=True)
class Page(stored.Page):
    """What a benchmark shows, with its figure."""

    figure: Figure | None = None


def write(stem: Path, report: Report, page: Page) -> None:
    """Write a report as `stem`.json, its page as .md and its figure, if it has one, as .svg."""
    page.write(stem, report)
    if page.figure:
        write_text(stem.with_suffix(".svg"), plots.svg(page.figure))


def table(
    name: str,
    title: str,
    items: Iterable[Report],
    columns: Mapping[tuple[str, str], Column],
    *remarks: str,
    keys: int = 1,
) -> Table:
    """Return a table of one row an item, with columns by group and name."""
    made = {key: at(each) if isinstance(each, str) else each for key, each in columns.items()}
    rows: list[Row] = [{key: cell(item) for key, cell in made.items()} for item in items]
    return build(name, title, rows, remarks, keys)


def found(item: Any, path: str) -> Any:
    """Return what an item has at a path such as "weights.max_abs"; None if it has nothing there."""
    for key in path.split("."):
        item = item.get(key) if isinstance(item, Mapping) else None
    return item


def number(value: float | None, form: str, factor: float = 1) -> Cell:
    """Return a number, shown times `factor`."""
    return missing() if value is None else Cell(format(value * factor, form), {"": value})


def at(place: str, factor: float = 1) -> Callable[[Report], Cell]:
    """Return a column of words, or of numbers as the last word of `place` formats them."""
    path, form = place.rsplit(" ", 1) if " " in place else (place, "")

    def cell(item: Report) -> Cell:
        value = found(item, path)
        return label(value) if isinstance(value, str) else number(value, form, factor)

    return cell


def share(counted: str, n: str, *why: str) -> Callable[[Report], Cell]:
    """Return a column of counts at a path as shares of `n`, with Wilson's interval, in percent.

    Where there is no count, `why` says the reason.
    """

    def cell(item: Report) -> Cell:
        count, whole = found(item, counted), found(item, n)
        if count is None:
            return missing(*why)
        low, high = wilson(count, whole)
        text = f"{100 * count / whole:.2f} [{100 * low:.2f}, {100 * high:.2f}]"
        return Cell(text, {"": count / whole, "low": low, "high": high, "count": count})

    return cell


def between(path: str, form: str, without: Cell | None = None) -> Callable[[Report], Cell]:
    """Return a column of intervals, or of spreads' quartiles; `without` where there is none."""

    def cell(item: Report) -> Cell:
        ends = found(item, path)
        if ends is None:
            return without or missing()
        low, high = (ends["q1"], ends["q3"]) if isinstance(ends, Mapping) else ends
        return label(f"{low:{form}} to {high:{form}}")

    return cell


def noted(report: Report, name: str, *keys: str) -> Cell:
    """Return a variant's name, with why it has no result as notes."""
    failed = report["failed"]
    return label(name, *(f"{key}: {failed[key]}" for key in (name, *keys) if key in failed))


def ratios(report: Report, form: str, title: str, remark: str) -> list[Table]:
    """Return the table of a report's ratios with their intervals, if it has them; none without."""
    rows = [
        {"key": key, "value": value, "interval": report.get("intervals", {}).get(key)}
        for key, value in report["ratios"].items()
    ]
    columns: Columns = {("", "ratio"): "key", ("", "value"): f"value {form}"}
    if "intervals" in report:
        columns["", "95 % interval"] = between("interval", form)
    return [table("ratios", title, rows, columns, remark)] if rows else []


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
