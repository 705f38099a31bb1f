"""Suites of experiments: read, planned and run, here or on a cluster."""

from furina.suites.cells import Folders
from furina.suites.reading import read_suite
from furina.suites.run import FailedRunsError, run_suite
from furina.suites.suite import Scale, Suite

__all__ = ["FailedRunsError", "Folders", "Scale", "Suite", "read_suite", "run_suite"]
