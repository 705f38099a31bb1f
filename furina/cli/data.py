"""The command on benchmarks: data list, data show, data audit."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from rich.markup import escape
from rich.table import Column, Table

from furina.cli.shared import WithData, console
from furina.errors import ConfigurationError

if TYPE_CHECKING:
    from furina.data.audit import Audit
    from furina.data.items import Item
    from furina.data.tasks import Task


_READS = {
    "list": {"json"},
    "show": {"split", "index", "source", "data_dir"},
    "audit": {"source", "data_dir", "json"},
}


@dataclass(kw_only=True)
class Data(WithData):
    """List the benchmarks, show an item as each protocol asks it, count repeats and leaks."""

    example: ClassVar[str] = "furina data show arc_easy"

    action: Literal["list", "show", "audit"]
    """list: every task; show: one of its items as each protocol asks it; audit: counts, repeats,
    and test items that stand in train"""
    tasks: list[str] = field(metadata={"nargs": "*"})
    """one for show; for audit, all at hand when none is named"""
    split: Literal["train", "validation", "test"] = "test"
    """show: which items of the task"""
    index: int = 0
    """show: which item of the split"""
    json: bool = False
    """list and audit: print JSON in place of a table"""

    def run(self) -> None:
        """List, show or audit."""
        for option in fields(self):
            idle = option.default is not MISSING and option.name not in _READS[self.action]
            if idle and getattr(self, option.name) != option.default:
                name = option.name.replace("_", "-")
                raise ConfigurationError(f"furina data {self.action} does not read --{name}.")
        {"list": _list, "show": _show, "audit": _audit}[self.action](self)


def _list(options: Data) -> None:
    from furina.data.tasks import tasks

    if options.tasks:
        raise ConfigurationError(
            f"furina data list takes no task: furina data show {options.tasks[0]} shows one."
        )
    facts = [_facts(task) for task in tasks().values()]
    if options.json:
        print(json.dumps(facts, indent=2, ensure_ascii=False))
        return
    names = Column("task", no_wrap=True)
    table = Table(names, "title", "kind", "rows", "sources", "protocols", "licence")
    for fact in facts:
        rows = ", ".join(f"{split} {count:,}" for split, count in fact["rows"].items())
        sources = ", ".join(_with_lack(name, held, fact) for name, held in fact["sources"].items())
        protocols = ", ".join(fact["protocols"])
        shown = (fact["title"], fact["kind"], rows, sources, protocols, fact["licence"])
        table.add_row(fact["task"], *map(escape, shown))
    console().print(table)
    print("A source that holds only some of the splits is listed with them.")


def _with_lack(source: str, held: Sequence[str], fact: dict[str, Any]) -> str:
    return source if len(held) == len(fact["rows"]) else f"{source} ({', '.join(held)})"


def _facts(task: Task) -> dict[str, Any]:
    from furina.data.protocols import protocols
    from furina.data.sources import splits_held

    held = {name: splits_held(task, name) for name in ("hub", "wheel", "folder")}
    return {
        "task": task.name,
        "title": task.title,
        "kind": task.kind,
        "rows": dict(task.rows),
        "sources": {name: splits for name, splits in held.items() if splits},
        "protocols": [name for name, asks in protocols().items() if asks.refusal(task) is None],
        "licence": task.licence,
    }


def _show(options: Data) -> None:
    from furina.data.protocols import protocols
    from furina.data.sources import load_items, resolve_source
    from furina.data.tasks import get_task

    if len(options.tasks) != 1:
        raise ConfigurationError("furina data show takes one task: furina data show arc_easy.")
    task = get_task(options.tasks[0])
    items = load_items(task.name, options.split, options.source, options.data_dir)
    if not 0 <= options.index < len(items):
        raise ConfigurationError(
            f"--index {options.index} is not possible with {len(items)} items: choose 0 to "
            f"{len(items) - 1}."
        )
    item = items[options.index]
    source = resolve_source(options.source, options.data_dir)
    rows = ", ".join(f"{split} {count:,}" for split, count in task.rows.items())
    print(f"{task.title} ({task.name}), {task.kind}; licence: {task.licence}")
    print(f"public rows: {rows}")
    print(f"read from the {source}: {options.split} {len(items):,}")
    print(f"item {options.index}, id {item.id}")
    for name, protocol in protocols().items():
        print(f"\n=== {name}, version {protocol.version}: {protocol.summary}")
        _print_prompt(task, item, name)


def _print_prompt(task: Task, item: Item, name: str) -> None:
    """Print what a protocol asks, the target apart from the context, or why it does not."""
    from furina.data.protocols import get_protocol

    protocol = get_protocol(name)
    if reason := protocol.refusal(task):
        print(f"not for this task: {reason}")
        return
    if protocol.trains:
        context, target = protocol.pair(task, item)
        if (asked := protocol.context(task, item)) != context:
            print(f"--- context in evaluation\n{asked}")
    else:
        from furina.evaluation.builtin import harness_prompt

        context, target = harness_prompt(task, item)
    print(f"--- context\n{context}\n--- target\n{target}\n--- end")


def _audit(options: Data) -> None:
    from furina.data.audit import audit

    named, absent = _tasks_to_audit(options)
    audits = [audit(name, options.source, options.data_dir) for name in named]
    if options.json:
        facts = {"audits": [asdict(done) for done in audits], "not_at_hand": absent}
        print(json.dumps(facts, indent=2, ensure_ascii=False))
        return
    if audits:
        console().print(_audit_table(audits))
        print(
            "Repeats: rows whose text an earlier row has. In train: test items whose text, or a "
            f"run of {audits[0].ngram_size} of its words (a shorter text whole), stands in train."
        )
    if absent:
        print(f"Not at hand, not audited: {', '.join(absent)}")


def _tasks_to_audit(options: Data) -> tuple[list[str], list[str]]:
    """Return the tasks to audit and those left out: without names, all splits must be at hand."""
    from furina.data.sources import resolve_source, splits_at_hand, splits_held
    from furina.data.tasks import get_task, tasks

    if options.tasks:
        return [get_task(name).name for name in dict.fromkeys(options.tasks)], []
    source = resolve_source(options.source, options.data_dir)
    at_hand = [
        name
        for name, task in tasks().items()
        if (splits := splits_at_hand(task, options.source, options.data_dir))
        and splits == splits_held(task, source)
    ]
    return at_hand, [name for name in tasks() if name not in at_hand]


def _audit_table(audits: Iterable[Audit]) -> Table:
    counts = [Column(name, justify="right") for name in ("rows", "public rows", "repeats")]
    shared = [Column(name, justify="right") for name in ("text in train", "words in train")]
    table = Table("task", "source", "split", *counts, "right answers", *shared)
    for done in audits:
        for split, facts in done.splits.items():
            balance = " ".join(
                f"{letter} {count / facts.rows:.2f}" for letter, count in facts.labels.items()
            )
            table.add_row(
                *(done.task, done.source, split, f"{facts.rows:,}", f"{facts.public_rows:,}"),
                *(f"{facts.duplicates:,}", balance, *_shared(done, split)),
            )
    return table


def _shared(done: Audit, split: str) -> tuple[str, str]:
    if split != "test":
        return "", ""
    if done.leakage is None:
        return "no train", "no train"
    found = done.leakage
    exact, ngram = (
        f"{count:,} ({count / found.test_rows:.2%})" for count in (found.exact, found.ngram)
    )
    return exact, ngram
