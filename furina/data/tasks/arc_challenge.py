"""ARC-Challenge: grade-school science questions (Clark et al., 2018, arXiv:1803.05457)."""

from __future__ import annotations

from furina.data.arc import arc_task

TASK = arc_task("arc_challenge", "ARC-Challenge", {"train": 1119, "validation": 299, "test": 1172})
