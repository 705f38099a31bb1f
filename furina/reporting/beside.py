"""The paper's number beside ours: its value, its difference to the same row, ours minus both."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from furina.records import RecordError
from furina.reporting.cells import Cell, Row, label, missing
from furina.reporting.notes import NOT_RUN, REFERENCE
from furina.reporting.paper import UNKNOWN, PaperTable
from furina.reporting.removal import is_removed
from furina.reporting.suites import Suite

NOT_IN_PAPER = "not in the paper's table"
OURS = "ours − paper"


@dataclass(frozen=True)
class Beside:
    """One of the paper's tables, and which of its columns stand beside a suite.

    `reference` is the row of the suite that the others are compared with.
    """

    paper: PaperTable
    columns: tuple[str, ...]
    reference: str | None

    @classmethod
    def of(cls, suite: Suite, paper: PaperTable, reference: str | None) -> Beside:
        """Choose the columns for a suite's backbone; raises RecordError unless they hold %."""
        columns = paper.columns_for(suite.runs[0].record.backbone.name)
        if any(paper.columns[column] != "%" for column in columns):
            raise RecordError(
                f"The paper's table {paper.name} holds no percentages, so it cannot stand beside "
                f"the accuracies of {suite.name}; give another table or none."
            )
        return cls(paper, columns, reference)

    @property
    def column(self) -> str:
        """Return what the paper's number is of."""
        names = ", ".join(self.columns)
        return names if len(self.columns) == 1 else f"mean of {names}"

    def difference(self, theirs: str | None) -> float | None:
        """Return by how many points one of the paper's rows is above its reference, if known."""
        value, reference = (
            self.value(theirs),
            self.value(self.paper.ours.get(self.reference or "")),
        )
        return None if value is None or reference is None else value - reference

    def cells(
        self, theirs: str | None, ours: float | None, difference: float | None, absent: str
    ) -> Row:
        """Return the cells of one of the paper's rows and of one of ours.

        `ours` and `difference` are our mean and its difference to the reference; `absent` says why
        they are None.
        """
        unknown = UNKNOWN if theirs else NOT_IN_PAPER
        value, group = self.value(theirs), f"in the paper: {self.column}"
        cells: Row = {(group, "%"): missing(unknown) if value is None else _number(value, "")}
        minus: Row = {(OURS, "%"): _minus(ours, value, absent, unknown)}
        if self.reference is not None:
            column = f"difference to {self.reference}"
            if self.reference not in self.paper.ours:
                unknown = f"the paper's table has no row {self.reference}"
            if theirs is not None and theirs == self.paper.ours.get(self.reference):
                cells[group, column] = minus[OURS, column] = missing(REFERENCE)
            else:
                gap = self.difference(theirs)
                cells[group, column] = missing(unknown) if gap is None else _number(gap, "+")
                minus[OURS, column] = _minus(difference, gap, absent, unknown)
        return {**cells, **minus}

    def not_run(self, suite: Suite, columns: Iterable[tuple[str, str]]) -> list[Row]:
        """Return a line with `columns` for each of the paper's rows that the suite lacks.

        A mixture without its router is no row of ours: tables of their own have it.
        """
        rows = []
        for name, ours in self.paper.rows.items():
            if ours not in suite.rows and not is_removed(suite, name):
                cells: Row = {column: missing(NOT_RUN) for column in columns}
                cells["", "row"], cells["", "model"] = label(ours or name), label("not run")
                rows.append({**cells, **self.cells(name, None, None, NOT_RUN)})
        return rows

    def value(self, theirs: str | None) -> float | None:
        """Return what one of the paper's rows has, if known."""
        return None if theirs is None else self.paper.value(theirs, self.columns)


def _minus(ours: float | None, theirs: float | None, absent: str, unknown: str) -> Cell:
    if ours is None:
        return missing(absent)
    return missing(unknown) if theirs is None else _number(ours - theirs, "+")


def _number(value: float, sign: str) -> Cell:
    return Cell(f"{value:{sign}.1f}", {"": value})
