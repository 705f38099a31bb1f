"""Tables and figures, generated from the JSON records alone (no torch is imported)."""

from furina.reporting.cells import Cell, Table
from furina.reporting.generate import OutdatedReportError, Report, report
from furina.reporting.render import print_tables
from furina.reporting.studies import best_point

__all__ = [
    "Cell",
    "OutdatedReportError",
    "Report",
    "Table",
    "best_point",
    "print_tables",
    "report",
]
