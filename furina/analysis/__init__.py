"""Which experts are active on which tokens, how evenly, and how alike the experts are."""

from furina.analysis.analyse import TaskItems, analyse

__all__ = ["TaskItems", "analyse"]
