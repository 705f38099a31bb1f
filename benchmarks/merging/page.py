"""What error.py reports: ratios, and the tables made from its JSON."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from benchmarks.common import show
from benchmarks.common.rounds import changed_ratio
from furina.reporting.tables.cells import Table

Case = Mapping[str, Any]
START: show.Columns = {("", "method"): "method", ("", "dtype"): "dtype"}
COMPARED = {
    "merged": "merged − unmerged",
    "batch": "batch − alone",
    "merged_exact": "merged − exact",
    "unmerged_exact": "unmerged − exact",
}
QUANTISED = {"beside": "adapter beside", "after": "merged", "apart": "one − other"}
CHANGED = "likeliest token changed, % [95 %]"


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


def page(report: Case) -> show.Page:
    """Return the report's tables."""
    settings, data, cases = report["settings"], report["data"], report["cases"]
    paragraphs = (
        f"{settings['backbone']}; total rank {settings['rank']}, {settings['experts']} experts; "
        f"every entry of a fresh adapter moved by noise so that each linear's ‖ΔW‖/‖W‖ is near "
        f"{settings['update']:g}, the same adapter in every dtype. Questions: {data['task']}, "
        f"test, {data['subset']}, data {data['sha256'][:12]}, protocol text.",
        f"{show.processor(report)}, threads: {settings['threads']}; "
        f"{show.versions(report, 'torch', 'transformers')}; {show.commit(report)}. "
        f"Made by `{report['command']}`.",
    )
    tables = [_weights(cases), _logits(cases), _tokens(cases), _answers(cases)] if cases else []
    if any(case.get("quantised") for case in cases):
        tables.append(_quantised(cases))
    failed = [f"{name} has no numbers: {reason}" for name, reason in report["failed"].items()]
    return show.Page(tables, "What merging changes", paragraphs, after=failed)


def _weights(cases: Sequence[Case]) -> Table:
    stored, differ = "stored weight − (W + ΔW)", "bytes that differ"
    columns = START | {
        ("", "‖ΔW‖/‖W‖"): "relative_update .3f",
        (stored, "max"): "weights.max_abs .1e",
        (stored, "relative"): "weights.relative .1e",
        (stored, "max, ulp"): "weights.ulps .3f",
        (differ, "unmerged"): "drift.unmerged ,",
        (differ, "merged"): "drift.merged ,",
        (differ, "adapter removed"): "bytes_after_removal ,",
    }
    drift = cases[0]["drift"]
    remarks = (
        "W + ΔW is summed in float64; relative is the Frobenius norm over all linears; half a unit "
        "in the last place (ulp) is what one rounding costs.",
        f"Unmerged: base weights and adapter after each of {drift['cycles']} merges and unmerges "
        f"of {drift['linears']} linears of {cases[0]['linears']}, against those before. Merged: "
        "the merged weights of each cycle against the first's. Adapter removed: the whole "
        "backbone after all of it.",
    )
    return show.table("weights", "Weights and drift", cases, columns, *remarks, keys=2)


def _logits(cases: Sequence[Case]) -> Table:
    columns = START | {
        (name, words): f"logits.{key}.{size} .1e"
        for key, name in COMPARED.items()
        for words, size in (("max", "max_abs"), ("relative", "relative"))
    }
    remark = (
        "Relative is ‖difference‖/‖exact‖ over all positions and tokens. Exact is the same weights "
        "and adapter, unmerged, in float64; batch and alone are the unmerged model with several "
        "texts at a time and with one."
    )
    return show.table("logits", "Logits", cases, columns, remark, keys=2)


def _tokens(cases: Sequence[Case]) -> Table:
    columns = START | {("", "positions"): "logits.merged.n ,"}
    for key, name in COMPARED.items():
        columns[CHANGED, name] = show.share(f"logits.{key}.changed", f"logits.{key}.n")
    remark = (
        "The likeliest next token at each position of the same texts; of equal logits the first."
    )
    return show.table("tokens", "Greedy tokens", cases, columns, remark, keys=2)


def _answers(cases: Sequence[Case]) -> Table:
    compared = {"merged − unmerged": "merged", "batch − alone": "batch"}
    compared |= {f"{name} − float32": f"{name}_widest" for name in ("merged", "unmerged")}
    columns = START | {("", "questions"): "answers.n ,"}
    for name, key in compared.items():
        columns["answer changed, % [95 %]", name] = show.share(
            f"answers.{key}", "answers.n", "float32 was not run"
        )
    for name in ("merged", "batch"):
        columns["change of log-likelihood, nats", name] = f"answers.loglikelihood_{name} .1e"
    for name in ("base", "unmerged", "merged"):
        columns["right, %", name] = f"right.{name} .1f"
    rows = [{**case, "right": _right(case["answers"])} for case in cases]
    remark = (
        "Intervals are Wilson's. Float32 is that dtype's unmerged model with the same adapter. The "
        "change of log-likelihood is the root of the mean square over all choices."
    )
    return show.table("answers", "Answers", rows, columns, remark, keys=2)


def _right(own: Case) -> dict[str, float]:
    """Return how many percent of the answers are right."""
    return {name: 100 * own[f"right_{name}"] / own["n"] for name in ("base", "unmerged", "merged")}


def _quantised(cases: Sequence[Case]) -> Table:
    rows = [
        {"method": case["method"], "base": f"int{quantised['bits']}", **quantised}
        for case in cases
        for quantised in case.get("quantised", ())
    ]
    columns: show.Columns = {("", "method"): "method", ("", "base"): "base"}
    columns |= {
        (f"{what}, {words}", name): f"{what}.{key}.{size} .1e"
        for what in ("weights", "logits")
        for words, size in (("relative", "relative"), ("max", "max_abs"))
        for key, name in QUANTISED.items()
    }
    for key, name in QUANTISED.items():
        columns[CHANGED, name] = show.share(f"logits.{key}.changed", f"logits.{key}.n")
    remark = (
        "Adapter beside: Q(W) with the adapter unmerged. Merged: Q(W + ΔW). Both against exact "
        "W + ΔW, in float32; relative as above. Q rounds to the nearest step, of which a group's "
        "largest entry is a whole number, symmetrically; the other weights stay."
    )
    return show.table("quantised", "Quantised base", rows, columns, remark, keys=2)
