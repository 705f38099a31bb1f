"""ARC-Easy: grade-school science questions (Clark et al., 2018, arXiv:1803.05457)."""

from __future__ import annotations

from furina.data.arc import arc_task

TASK = arc_task("arc_easy", "ARC-Easy", {"train": 2251, "validation": 570, "test": 2376})
