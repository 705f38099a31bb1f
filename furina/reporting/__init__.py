"""Tables and figures, generated from the JSON records alone (no torch is imported)."""

from furina.reporting.pages.generate import OutdatedReportError, Report, report
from furina.reporting.tables.cells import Cell, Table
from furina.reporting.tables.render import print_tables
from furina.reporting.tables.studies import best_point

__all__ = [
    "Cell",
    "OutdatedReportError",
    "Report",
    "Table",
    "best_point",
    "print_tables",
    "report",
]
