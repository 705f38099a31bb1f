"""The command that looks into a mixture: analyse."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from jsonargparse import ArgumentParser, Namespace

from furina.cli.shared import (
    add_backbone,
    add_data_source,
    backbone_of,
    console,
    require_adapter,
    require_backbone,
)
from furina.errors import ConfigurationError
from furina.progress import part
from furina.storage import require_writable


def analyse_options(parser: ArgumentParser, words: Sequence[str]) -> None:
    """Add the options of `furina analyse`."""
    parser.add_argument(
        "adapter_dir", type=Path, help="adapter folder that fit or furina.save wrote"
    )
    parser.add_argument("--task", nargs="+", type=str, required=True, help="one or more tasks")
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        help="new JSON file for the record; its maps go to a folder beside it",
    )
    add_backbone(parser)
    parser.add_argument(
        "--protocol", type=str, default="text", help="how items are asked: see furina data list"
    )
    parser.add_argument(
        "--items",
        type=int,
        default=64,
        help="items of each task's test split: a fixed random subset, all if there are not so many",
    )
    parser.add_argument("--seed", type=int, default=0, help="which subset --items takes")
    parser.add_argument(
        "--examples",
        type=int,
        default=2,
        help="items of each task that the record holds token by token",
    )
    parser.add_argument("--batch-size", type=int, default=16, help="items read at once")
    parser.add_argument(
        "--row", type=str, default="", help="name in tables and maps; the method if not given"
    )
    add_data_source(parser)


def analyse(options: Namespace) -> None:
    """Read the tasks, write the record and its maps, and print the numbers."""
    from furina.data.protocols import get_protocol
    from furina.data.sources import load_items
    from furina.data.tasks import get_task

    _check(options)
    for task in options.task:
        get_protocol(options.protocol).require(get_task(task))
    tasks = {
        task: load_items(task, "test", options.source, options.data_dir) for task in options.task
    }
    options.backbone = backbone_of(options.backbone, options.adapter_dir)
    from furina.analysis import TaskItems
    from furina.analysis import analyse as look
    from furina.backbones.load import backbone_hash, load_backbone, load_tokenizer
    from furina.kernels.processor import best_device, resolve_dtype, use_cores
    from furina.model.checkpoint import load
    from furina.records import Backbone

    use_cores()
    options.dtype = resolve_dtype(options.dtype).dtype  # the record's command names it
    model = load_backbone(options.backbone, options.dtype, device=best_device())
    backbone = Backbone(options.backbone, backbone_hash(model))
    load(options.adapter_dir, model)
    with part("analysing the experts"):
        record = look(
            model,
            load_tokenizer(options.backbone),
            {task: TaskItems(options.protocol, items) for task, items in tasks.items()},
            backbone=backbone,
            size=options["items"],  # options.items is a method
            subset_seed=options.seed,
            examples=options.examples,
            batch_size=options.batch_size,
            command=_command(options),
        )
    record = replace(record, row=options.row or record.method)
    record.write(options.out)
    _show(options.out)


def _check(options: Namespace) -> None:
    for name, least in (("items", 1), ("batch_size", 1), ("examples", 0)):
        if options[name] < least:
            option = name.replace("_", "-")
            raise ConfigurationError(f"--{option}={options[name]} must be at least {least}.")
    if options.out.exists():
        raise ConfigurationError(f"{options.out} exists already: name a new file.")
    require_writable(options.out.parent)
    require_adapter(options.adapter_dir)
    require_backbone(options.backbone)


def _command(options: Namespace) -> str:
    """Return the command that makes the same record again, but for where data lie."""
    words = ["furina", "analyse", str(options.adapter_dir), "--task", *options.task]
    for name in ("protocol", "items", "seed", "examples", "batch_size", "backbone", "dtype"):
        words += [f"--{name.replace('_', '-')}", str(options[name])]
    words += ["--row", options.row] if options.row else []
    return shlex.join([*words, "--out", str(options.out)])


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
