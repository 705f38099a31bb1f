"""Suites of experiments: read, planned and run, here or on a cluster."""

from furina.suites.cells import Places
from furina.suites.grid import FailedRunsError, run_suite
from furina.suites.reading import read_suite
from furina.suites.suites import Scale, Suite

__all__ = ["FailedRunsError", "Places", "Scale", "Suite", "read_suite", "run_suite"]
