"""The paper's number of a row, and how far it is from the paper's number of a reference row."""

from __future__ import annotations

from dataclasses import dataclass

from furina.records import RecordError
from furina.reporting.read.paper import PaperTable
from furina.reporting.read.scores import scores
from furina.reporting.read.suites import Results

REMOVED = "router_removed"
PAPERS_ROWS = {"SLIM, merged without its router": "slim"}
"""The paper's rows of a mixture without its router, which is no row of ours but a variant."""


@dataclass(frozen=True)
class PaperColumns:
    """One of the paper's tables, and which of its columns compare with a suite.

    `reference` is the row of the suite that the others are compared with.
    """

    paper: PaperTable
    columns: tuple[str, ...]
    reference: str | None

    @classmethod
    def of(cls, suite: Results, paper: PaperTable, reference: str | None) -> PaperColumns:
        """Choose the columns for a suite's backbone; raises RecordError unless they hold %."""
        columns = paper.columns_for(suite.runs[0].record.backbone.name)
        if any(paper.columns[column] != "%" for column in columns):
            raise RecordError(
                f"The paper's table {paper.name} holds no percentages, so it cannot stand beside "
                f"the accuracies of {suite.name}; give another table or none."
            )
        return cls(paper, columns, reference)

    @property
    def name(self) -> str:
        """Return what the paper's number is of."""
        names = ", ".join(self.columns)
        return names if len(self.columns) == 1 else f"mean of {names}"

    def value(self, theirs: str | None) -> float | None:
        """Return what one of the paper's rows has, if known."""
        return None if theirs is None else self.paper.value(theirs, self.columns)

    def difference(self, theirs: str | None) -> float | None:
        """Return by how many points one of the paper's rows is above its reference, if known."""
        value, usual = self.value(theirs), self.value(self.paper.ours.get(self.reference or ""))
        return None if value is None or usual is None else value - usual


def is_removed(suite: Results, theirs: str) -> bool:
    """Tell whether one of the paper's rows is a mixture whose router we removed, and scored."""
    row = PAPERS_ROWS.get(theirs, "")
    return any(scores(suite, row, task, REMOVED) for task in suite.tasks)
