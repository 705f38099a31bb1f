"""What vllm_engine.py reports: paired ratios with intervals, and the tables made from its JSON."""

from __future__ import annotations

from typing import Any

from benchmarks.common import show
from benchmarks.latency import page as latency
from benchmarks.latency.page import TIMES, Rounds, paired, time_columns, time_row
from furina.reporting.tables.cells import Table, label

RATIOS = ("merged/base", "adapter/base", "base_again/base")
EXCEPTIONS: show.Columns = {
    ("", "engine"): "name",
    ("", "row"): "row .0f",
    ("", "position"): "position .0f",
    ("", "lead"): "gap .3g",
    ("token", "ours"): "ours .0f",
    ("token", "ours rounded"): "ours_rounded .0f",
    ("token", "vLLM's"): "theirs .0f",
}
AGREEMENTS: show.Columns = {
    ("", "generations of"): "pair",
    ("", "prompts"): "n .0f",
    ("", "all tokens equal, %"): show.at("equal .0f", 100),
    ("", "equal from the start, tokens"): "prefix .1f",
}
VERDICTS: show.Columns = {
    ("", "engine"): "name",
    ("", "positions"): "positions .0f",
    ("", "rounding"): "allowed .3g",
    ("lead above rounding", "positions"): "decided .0f",
    ("lead above rounding", "other token"): "exceptions .0f",
    ("other token anywhere", "vLLM"): "disagree .0f",
    ("other token anywhere", "ours rounded"): "disagree_rounded .0f",
    ("other token anywhere", "largest lead"): "largest_gap .3g",
    ("log-probability error, median", "vLLM"): "logprob_error.median .2g",
    ("log-probability error, median", "ours rounded"): "logprob_error_rounded.median .2g",
    ("log-probability error, largest", "vLLM"): "logprob_error.max .2g",
    ("log-probability error, largest", "ours rounded"): "logprob_error_rounded.max .2g",
}


def summary(rounds: Rounds, new_tokens: int) -> dict[str, Any]:
    """Return the rounds and what they come to: times, tokens per second, ratios, intervals.

    A ratio's name ends in that of its time, or, for the total, in nothing.
    """
    timed = {name: own for name, own in rounds.items() if own}
    quotients: dict[str, list[float]] = {}
    for time in ("total_ms", "ttft_ms", "per_token_ms"):
        for one, other in (pair.split("/") for pair in RATIOS):
            if one in timed and other in timed:
                key = f"{one}/{other}" if time == "total_ms" else f"{one}/{other}/{time}"
                quotients[key] = paired(timed, one, other, time)
    return latency.summary(timed, new_tokens, quotients)


def page(report: show.Report) -> show.Page:
    """Return the report's tables: times, ratios, likeliest tokens, exceptions, generations."""
    settings, failed = report["settings"], report["failed"]
    times: show.Columns = {
        ("", "engine"): lambda row: show.noted(report, row["name"]),
        ("", "loading, s"): "load .1f",
        **time_columns(label("–")),
        ("", "n"): "total_ms.n .0f",
    }
    loads = report["load_seconds"]
    rows = [
        time_row(report, name) | {"load": loads.get(name)}
        for name in dict.fromkeys([*loads, *failed])
    ]
    asked = f"{settings['prompt_tokens']} tokens in and {settings['new_tokens']} out"
    title = f"vLLM: batch 1, {asked}"
    tables = [show.table("engine", title, rows, times, *_remarks(report))]
    tables += [_ratios(report)] if report["ratios"] else []
    tables += [_verdicts(report)] if report["verdicts"] else []
    exceptions = [
        {"name": name, **each}
        for name, found in report["verdicts"].items()
        for each in found["disagreements"]
        if each["gap"] > found["allowed"]
    ]
    if exceptions:
        tables.append(show.table("exceptions", "Exceptions", exceptions, EXCEPTIONS))
    if agreements := report["agreements"]:
        remark = (
            f"Greedy, {settings['new_tokens']} tokens, all prompts in one batch; ours/ is "
            "transformers' generation, of the model with the adapter beside it or merged. A tie "
            "that rounding decides changes all that follows."
        )
        rows = [{"pair": pair, **found} for pair, found in agreements.items()]
        tables.append(show.table("agreements", "Greedy generations", rows, AGREEMENTS, remark))
    return show.Page(tables)


def _ratios(report: show.Report) -> Table:
    rows = []
    for key, value in report["ratios"].items():
        one, other, *time = key.split("/")
        words = TIMES[time[0] if time else "total_ms"].partition(",")[0]
        row = {"ratio": f"{one}/{other}", "time": words, "value": value}
        rows.append(row | {"interval": report["intervals"][key]})
    columns: show.Columns = {
        ("", "ratio"): "ratio",
        ("", "of the"): "time",
        ("", "value"): "value .3f",
        ("", "95 % interval"): show.between("interval", ".3f"),
    }
    remark = (
        "The median of the rounds' own ratios, and a bootstrap interval of it over rounds; below 1 "
        "the first is quicker. base_again is the base in another process: its ratio is noise."
    )
    return show.table("ratios", "Ratios", rows, columns, remark)


def _verdicts(report: show.Report) -> Table:
    settings, moved = report["settings"], report["update"]["changed"]
    exact = "float64" if settings["dtype"] == "float32" else "float32"
    remarks = [
        f"{settings['rows']} rows of {settings['row_tokens']} tokens: {settings['prompts']}. "
        "Lead: our exact first logit minus the second. Rounding: the largest change of the first's "
        f"lead over any of the ten likeliest tokens, from {exact} to "
        f"{settings['dtype']} in our own model at any position. Where the lead is larger, vLLM's "
        "likeliest token must be ours.",
        "Log-probability error: of the real next token, against our exact one.",
    ]
    if moved:
        remarks.append(
            f"The update changes the likeliest token at {moved['positions']} positions, "
            f"{moved['decided']} of them with a lead above rounding."
        )
    title = "The likeliest next token, vLLM's and ours"
    rows = [{"name": name, **found} for name, found in report["verdicts"].items()]
    return show.table("verdicts", title, rows, VERDICTS, *remarks)


def _remarks(report: show.Report) -> tuple[str, ...]:
    settings, update = report["settings"], report["update"]
    names = ("torch", "transformers", "vllm", "torch (vllm)", "transformers (vllm)")
    made = "every parameter moved by a seed" if settings["adapter"] is None else "a trained one"
    return (
        f"{settings['backbone']} in {settings['dtype']}, an adapter of rank {update['rank']} with "
        f"|ΔW|/|W| = {update['relative']:.3f}, {made}; rounds in random order, each with a new "
        "random prompt that all engines read.",
        "Each engine is a process of its own, eager, without prefix caching; the adapter runs as "
        "vLLM's LoRA. Loading is one measurement each, imports not included.",
        f"Made by {report['command']}.",
        "; ".join(
            [
                show.machine(report, "an engine's threads"),
                show.versions(report, *names),
                f"{show.commit(report)}.",
            ]
        ),
    )
