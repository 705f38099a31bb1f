"""The sentences of the footnotes that more than one table uses."""

from __future__ import annotations

ONE_MODEL = "the base model has no adapter: nothing is trained and there is one model to score"
ONE_SEED = "one seed: the spread over seeds is unknown"
TWO_SEEDS = "two seeds: the spread over seeds is hardly known"
FEW_SEEDS: dict[int, tuple[str, ...]] = {1: (ONE_SEED,), 2: (TWO_SEEDS,)}
"""What is said of so few seeds."""
NO_RECORD = "no record"
NOT_RUN = "not run: there is no record of it"
NOT_ALL_TASKS = "some task has no score, so there is no mean"
REFERENCE = "the row that the others are compared with"
NO_RESULT = "its run diverged or failed, see below"
DIRTY = "from a working tree with uncommitted changes"
NO_COMMIT = "from outside a git checkout: the commit is unknown"
UNMEASURED = "not measured"
