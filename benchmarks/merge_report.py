"""Make merging.md again from the merging.json that benchmarks/merge_error.py wrote.

python benchmarks/merge_report.py results/merging
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from furina.reporting.tables.cells import Cell, Row, Table, build, label, missing
from furina.reporting.tables.render import markdown as render
from furina.storage import write_json, write_text

Case = Mapping[str, Any]
Z = 1.959964
"""Of a two-sided interval of 95 %."""


def wilson(count: int, n: int) -> tuple[float, float]:
    """Return the ends of Wilson's 95 % interval of the share `count`/`n`."""
    share, square = count / n, Z**2 / n
    middle = (share + square / 2) / (1 + square)
    half = Z / (1 + square) * math.sqrt(share * (1 - share) / n + square / (4 * n))
    # Rounding would leave a hair outside the range.
    return 0.0 if count == 0 else middle - half, 1.0 if count == n else middle + half


def changed_ratio(count: int, other: int) -> float:
    """Return the ratio of two counts, half a change added to each: none is a count too."""
    return (count + 0.5) / (other + 0.5)


def ratios(cases: Sequence[Case]) -> dict[str, float]:
    """Return by name what merging changes over what a batch of another size or the dtype does.

    One whose divisor is zero is left out.
    """
    found = {name: value for case in cases for name, value in _ratios(case)}
    return {name: value for name, value in found.items() if value is not None}


def _ratios(case: Case) -> Iterator[tuple[str, float | None]]:
    of, answers, logits = f"{case['method']}/{case['dtype']}", case["answers"], case["logits"]
    yield f"flips/{of}/merged_over_batch", changed_ratio(answers["merged"], answers["batch"])
    if "merged_widest" in answers and case["dtype"] != "float32":
        counts = (answers["merged_widest"], answers["unmerged_widest"])
        yield f"flips/{of}/merged_over_unmerged_against_float32", changed_ratio(*counts)
    counts = (logits["merged"]["changed"], logits["batch"]["changed"])
    yield f"tokens/{of}/merged_over_batch", changed_ratio(*counts)
    counts = (logits["merged_exact"]["changed"], logits["unmerged_exact"]["changed"])
    yield f"tokens/{of}/merged_over_unmerged_against_exact", changed_ratio(*counts)
    apart = (answers["loglikelihood_merged"], answers["loglikelihood_batch"])
    yield f"loglikelihood/{of}/merged_over_batch", _quotient(*apart)
    errors = (logits["merged"]["relative"], logits["batch"]["relative"])
    yield f"logits/{of}/merged_over_batch", _quotient(*errors)
    errors = (logits["merged_exact"]["relative"], logits["unmerged_exact"]["relative"])
    yield f"logits/{of}/merged_error_over_unmerged_error", _quotient(*errors)
    for quantised in case.get("quantised", ()):
        errors = (
            quantised["logits"]["after"]["relative"],
            quantised["logits"]["beside"]["relative"],
        )
        yield f"logits/{of}/int{quantised['bits']}/after_over_beside", _quotient(*errors)


def _quotient(one: float, other: float) -> float | None:
    return one / other if other else None


def line(case: Case) -> str:
    """Return what is printed of a case as soon as it is measured."""
    answers, logits, drift = case["answers"], case["logits"], case["drift"]
    return (
        f"{case['method']:<9} {case['dtype']:<9} |ΔW|/|W| {case['relative_update']:.3f}"
        f"   weights {case['weights']['relative']:.1e} ({case['weights']['ulps']:.2f} ulp)"
        f"   logits {logits['merged']['relative']:.1e}, batch {logits['batch']['relative']:.1e}"
        f"   tokens {logits['merged']['changed']}, batch {logits['batch']['changed']}"
        f" of {logits['merged']['n']}"
        f"   answers {answers['merged']}, batch {answers['batch']} of {answers['n']}"
        f"   drift {drift['unmerged'] + drift['merged'] + case['bytes_after_removal']} bytes"
    )


def markdown(report: Case) -> str:
    """Return the report's tables."""
    cases = report["cases"]
    parts = ["# What merging changes", *_introduction(report)]
    if cases:
        tables = [_weights(cases), _logits(cases), _tokens(cases), _answers(cases)]
        if any(case.get("quantised") for case in cases):
            tables.append(_quantised(cases))
        parts += [f"## {table.title}\n\n{render(table).rstrip()}" for table in tables]
    parts += [f"{name} has no numbers: {reason}" for name, reason in report["failed"].items()]
    return "\n\n".join(parts) + "\n"


def _introduction(report: Case) -> tuple[str, ...]:
    settings, environment, data = report["settings"], report["environment"], report["data"]
    hardware, packages = environment["hardware"], environment["packages"]
    changed = " with uncommitted changes" if environment["dirty"] else ""
    return (
        f"{settings['backbone']}; total rank {settings['rank']}, {settings['experts']} experts; "
        f"every entry of a fresh adapter moved by noise so that each linear's ‖ΔW‖/‖W‖ is near "
        f"{settings['update']:g}, the same adapter in every dtype. Questions: {data['task']}, "
        f"test, {data['subset']}, data {data['sha256'][:12]}, protocol text.",
        f"{hardware['accelerator'] if settings['device'] != 'cpu' else hardware['cpu']}, "
        f"threads: {settings['threads']}; torch {packages['torch']}, transformers "
        f"{packages['transformers']}; commit {(environment['commit'] or 'unknown')[:10]}{changed}. "
        f"Made by `{report['command']}`.",
    )


def _start(case: Case) -> Row:
    return {("", "method"): label(case["method"]), ("", "dtype"): label(case["dtype"])}


def _number(value: float, form: str = "{:.1e}") -> Cell:
    return Cell(form.format(value), {"": value})


def _count(value: int) -> Cell:
    return Cell(f"{value:,}", {"": value})


def _share(count: int, n: int) -> Cell:
    """Return a count as a share with its interval, in percent."""
    low, high = wilson(count, n)
    text = f"{100 * count / n:.2f} [{100 * low:.2f}, {100 * high:.2f}]"
    return Cell(text, {"": count / n, "low": low, "high": high, "count": count})


def _weights(cases: Sequence[Case]) -> Table:
    rows = []
    for case in cases:
        own, drift = case["weights"], case["drift"]
        row = _start(case)
        row["", "‖ΔW‖/‖W‖"] = _number(case["relative_update"], "{:.3f}")
        row["stored weight − (W + ΔW)", "max"] = _number(own["max_abs"])
        row["stored weight − (W + ΔW)", "relative"] = _number(own["relative"])
        row["stored weight − (W + ΔW)", "max, ulp"] = _number(own["ulps"], "{:.3f}")
        row["bytes that differ", "unmerged"] = _count(drift["unmerged"])
        row["bytes that differ", "merged"] = _count(drift["merged"])
        row["bytes that differ", "adapter removed"] = _count(case["bytes_after_removal"])
        rows.append(row)
    drift = cases[0]["drift"]
    remarks = (
        "W + ΔW is summed in float64; relative is the Frobenius norm over all linears; half a unit "
        "in the last place (ulp) is what one rounding costs.",
        f"Unmerged: base weights and adapter after each of {drift['cycles']} merges and unmerges "
        f"of {drift['linears']} linears of {cases[0]['linears']}, against those before. Merged: "
        "the merged weights of each cycle against the first's. Adapter removed: the whole "
        "backbone after all of it.",
    )
    return build("weights", "Weights and drift", rows, remarks, keys=2)


COMPARED = {
    "merged": "merged − unmerged",
    "batch": "batch − alone",
    "merged_exact": "merged − exact",
    "unmerged_exact": "unmerged − exact",
}


def _logits(cases: Sequence[Case]) -> Table:
    rows = []
    for case in cases:
        row = _start(case)
        for key, name in COMPARED.items():
            row[name, "max"] = _number(case["logits"][key]["max_abs"])
            row[name, "relative"] = _number(case["logits"][key]["relative"])
        rows.append(row)
    remark = (
        "Relative is ‖difference‖/‖exact‖ over all positions and tokens. Exact is the same weights "
        "and adapter, unmerged, in float64; batch and alone are the unmerged model with several "
        "texts at a time and with one."
    )
    return build("logits", "Logits", rows, (remark,), keys=2)


def _tokens(cases: Sequence[Case]) -> Table:
    rows = []
    for case in cases:
        row = _start(case)
        row["", "positions"] = _count(case["logits"]["merged"]["n"])
        for key, name in COMPARED.items():
            found = case["logits"][key]
            row["likeliest token changed, % [95 %]", name] = _share(found["changed"], found["n"])
        rows.append(row)
    remark = (
        "The likeliest next token at each position of the same texts; of equal logits the first."
    )
    return build("tokens", "Greedy tokens", rows, (remark,), keys=2)


def _answers(cases: Sequence[Case]) -> Table:
    rows = []
    for case in cases:
        own, row = case["answers"], _start(case)
        n, group = own["n"], "answer changed, % [95 %]"
        row["", "questions"] = _count(n)
        row[group, "merged − unmerged"] = _share(own["merged"], n)
        row[group, "batch − alone"] = _share(own["batch"], n)
        for name in ("merged", "unmerged"):
            known = f"{name}_widest" in own
            cell = _share(own[f"{name}_widest"], n) if known else missing("float32 was not run")
            row[group, f"{name} − float32"] = cell
        for name in ("merged", "batch"):
            row["change of log-likelihood, nats", name] = _number(own[f"loglikelihood_{name}"])
        for name in ("base", "unmerged", "merged"):
            row["right, %", name] = _number(100 * own[f"right_{name}"] / n, "{:.1f}")
        rows.append(row)
    remark = (
        "Intervals are Wilson's. Float32 is that dtype's unmerged model with the same adapter. The "
        "change of log-likelihood is the root of the mean square over all choices."
    )
    return build("answers", "Answers", rows, (remark,), keys=2)


def _quantised(cases: Sequence[Case]) -> Table:
    rows = [
        _quantised_row(case, quantised) for case in cases for quantised in case.get("quantised", ())
    ]
    remark = (
        "Adapter beside: Q(W) with the adapter unmerged. Merged: Q(W + ΔW). Both against exact "
        "W + ΔW, in float32; relative as above. Q rounds to the nearest step, of which a group's "
        "largest entry is a whole number, symmetrically; the other weights stay."
    )
    return build("quantised", "Quantised base", rows, (remark,), keys=2)


def _quantised_row(case: Case, quantised: Case) -> Row:
    names = {"beside": "adapter beside", "after": "merged", "apart": "one − other"}
    row: Row = {
        ("", "method"): label(case["method"]),
        ("", "base"): label(f"int{quantised['bits']}"),
    }
    for key, name in names.items():
        row["weights, relative", name] = _number(quantised["weights"][key]["relative"])
    for key, name in names.items():
        row["weights, max", name] = _number(quantised["weights"][key]["max_abs"])
    for key, name in names.items():
        row["logits, relative", name] = _number(quantised["logits"][key]["relative"])
    for key, name in names.items():
        row["logits, max", name] = _number(quantised["logits"][key]["max_abs"])
    for key, name in names.items():
        found = quantised["logits"][key]
        row["likeliest token changed, % [95 %]", name] = _share(found["changed"], found["n"])
    return row


def write(report: Case, folder: Path) -> None:
    """Write merging.json, and merging.md made from it."""
    write_json(folder / "merging.json", report)
    write_text(folder / "merging.md", markdown(report))


if __name__ == "__main__":
    target = Path(sys.argv[1])
    made = json.loads((target / "merging.json").read_text("utf-8"))
    write_text(target / "merging.md", markdown(made))
