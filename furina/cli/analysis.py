"""The command that looks into a mixture: analyse."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar

from jsonargparse.typing import NonNegativeInt, PositiveInt

from furina.cli.parsing import REQUIRED
from furina.cli.shared import WithBackbone, WithData, console
from furina.errors import ConfigurationError
from furina.progress import part
from furina.storage import require_writable


@dataclass(kw_only=True)
class Analyse(WithData, WithBackbone):
    """Say which experts of an adapter are active, how evenly and on which tasks; draw maps."""

    example: ClassVar[str] = (
        "furina analyse runs/demo/adapter --task arc_easy openbookqa --out activity.json"
    )

    adapter_dir: Path
    """adapter folder that fit or furina.save wrote"""
    task: list[str] = field(metadata=REQUIRED)
    """one or more tasks"""
    out: Path = field(metadata=REQUIRED)
    """new JSON file for the record; its maps go to a folder beside it"""
    protocol: str = "text"
    """how items are asked: see furina data list"""
    items: PositiveInt = 64
    """items of each task's test split: a fixed random subset, all if there are not so many"""
    seed: int = 0
    """which subset --items takes"""
    examples: NonNegativeInt = 2
    """items of each task that the record holds token by token"""
    batch_size: PositiveInt = 16
    """items read at once"""
    row: str = ""
    """name in tables and maps; the method if not given"""

    def run(self) -> None:
        """Read the tasks, write the record and its maps, and print the numbers."""
        from furina.data.protocols import get_protocol
        from furina.data.sources import load_items
        from furina.data.tasks import get_task

        if self.out.exists():
            raise ConfigurationError(f"{self.out} exists already: name a new file.")
        require_writable(self.out.parent)
        for task in self.task:
            get_protocol(self.protocol).require(get_task(task))
        self.backbone = self.backbone_of(self.adapter_dir)
        tasks = {task: load_items(task, "test", self.source, self.data_dir) for task in self.task}
        from furina.analysis import TaskItems, analyse
        from furina.backbones.load import backbone_hash, load_backbone, load_tokenizer
        from furina.kernels.processor import best_device, resolve_dtype, use_cores
        from furina.model.checkpoint import load
        from furina.records import Backbone

        use_cores()
        dtype = resolve_dtype(self.dtype).dtype  # the record's command names it
        model = load_backbone(self.backbone, dtype, device=best_device())
        backbone = Backbone(self.backbone, backbone_hash(model))
        load(self.adapter_dir, model)
        with part("analysing the experts"):
            record = analyse(
                model,
                load_tokenizer(self.backbone),
                {task: TaskItems(self.protocol, items) for task, items in tasks.items()},
                backbone=backbone,
                size=self.items,
                subset_seed=self.seed,
                examples=self.examples,
                batch_size=self.batch_size,
                command=self._command(dtype),
            )
        record = replace(record, row=self.row or record.method)
        record.write(self.out)
        _show(self.out)

    def _command(self, dtype: str) -> str:
        """Return the command that makes the same record again, but for where data lie."""
        words = ["furina", "analyse", str(self.adapter_dir), "--task", *self.task]
        values = vars(self) | {"dtype": dtype}
        for name in ("protocol", "items", "seed", "examples", "batch_size", "backbone", "dtype"):
            words += [f"--{name.replace('_', '-')}", str(values[name])]
        words += ["--row", self.row] if self.row else []
        return shlex.join([*words, "--out", str(self.out)])


def _show(file: Path) -> None:
    """Print the record's tables and draw its maps."""
    from furina.records import ActivityRecord
    from furina.reporting import print_tables
    from furina.reporting.figures import plots
    from furina.reporting.figures.activity import activity_figures
    from furina.reporting.tables.activity import activity_tables
    from furina.storage import write_text

    records = {file: ActivityRecord.read(file)}
    folder = file.with_name(f"{file.stem}-maps")
    figures = activity_figures(records)
    for name, figure in figures.items():
        write_text(folder / f"{name}.svg", plots.svg(figure))
    print_tables(activity_tables(records), console())
    print(f"{file}: the record\n{folder}: {len(figures)} maps")
