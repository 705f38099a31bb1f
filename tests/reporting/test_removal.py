from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from furina.records import RunRecord
from furina.reporting.read.statistics import Difference
from furina.reporting.tables.removal import removal_table, verdict
from tests.records import fakes
from tests.reporting.frames import load_suite, rows_of


def routed(folder: Path, removed: float) -> RunRecord:
    """Write a run of a routed method whose answers without the router are right at a rate."""
    record = fakes.run_record("lora", "arc_easy")
    trained = next(s for s in record.evaluations if s.variant == "unmerged")
    answers = [i < removed * trained.n for i in range(trained.n)]
    file = "samples/mixlora--arc_easy--removed.jsonl.gz"
    fakes.write_samples(folder / file, "acc", answers)
    score = fakes.score("router_removed", "arc_easy", answers, file)
    record = replace(record, method="mixlora", evaluations=(trained, score), merge=None)
    record.write(folder / record.file_name)
    return record


def shown(folder: Path) -> dict[str, dict[tuple[str, str], str]]:
    table = removal_table(load_suite(folder))
    assert table is not None
    rows = [row for row in rows_of(table) if row["", "task"].text == "arc_easy"]
    return {row["", "method"].text: {key: cell.text for key, cell in row.items()} for row in rows}


def test_there_is_no_table_where_no_router_was_removed(folder: Path) -> None:
    assert removal_table(load_suite(folder)) is None


def test_a_mixture_at_chance_without_its_router_has_collapsed(folder: Path) -> None:
    record = routed(folder, removed=0.25)
    rows = shown(folder)
    assert set(rows) == {"base", "lora", "furina", "mixlora"}
    row = rows["mixlora"]
    lost = 100 * (record.evaluations[1].value - record.evaluations[0].value)
    assert row["difference", "points"] == f"{lost:+.1f}"
    low, _, high = row["difference", "95 % interval"].partition(" to ")
    assert float(low) < lost < float(high) < 0
    assert (row["", "verdict"], row["", "how"]) == ("collapses", "router removed")
    assert (rows["furina"]["", "verdict"], rows["furina"]["", "how"]) == ("no difference", "merged")
    assert rows["base"]["", "verdict"] == "–"


def difference(value: float, stderr: float | None = 0.01) -> Difference:
    return Difference(value, stderr, paired=True)


@pytest.mark.parametrize(
    "lost, left, said",
    [
        (difference(-0.019), difference(0.2), "no difference"),
        (difference(0.019), difference(-0.2), "no difference"),
        (difference(-0.1), difference(0.1), "drops"),
        (difference(-0.1), difference(0.019), "collapses"),
        (difference(-0.1), None, "drops"),
        (difference(0.1), difference(0.3), "gains"),
        (difference(-0.1, None), difference(0.1), "unknown"),
    ],
)
def test_the_verdict_follows_from_the_intervals(lost, left, said) -> None:
    assert verdict(lost, left) == said
