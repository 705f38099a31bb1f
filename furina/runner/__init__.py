"""Suites of experiments: read, planned and run, here or on a cluster."""

from furina.runner.cells import Places
from furina.runner.grid import FailedRunsError, run_suite
from furina.runner.reading import read_suite
from furina.runner.suites import Scale, Suite

__all__ = ["FailedRunsError", "Places", "Scale", "Suite", "read_suite", "run_suite"]
