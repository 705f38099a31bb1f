"""What vllm_engine.py reports: paired ratios with intervals, and the tables made from its JSON."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from benchmarks.common import show
from benchmarks.latency import page as latency
from benchmarks.latency.page import TIMES, Rounds, paired, rounds_of, time_columns
from furina.reporting.cells import Cell, Table, label

Report = show.Report
RATIOS = ("merged/base", "adapter/base", "base_again/base")
NO_QUARTILES = label("–")


def summary(rounds: Rounds, new_tokens: int) -> dict[str, Any]:
    """Return the rounds and what they come to: times, tokens per second, ratios, intervals.

    A ratio's name ends in that of its time, or, for the total, in nothing.
    """
    timed = {name: own for name, own in rounds.items() if own}
    quotients = {
        pair if time == "total_ms" else f"{pair}/{time}": paired(timed, *pair.split("/"), time)
        for time in ("total_ms", "ttft_ms", "per_token_ms")
        for pair in RATIOS
        if timed.keys() >= {*pair.split("/")}
    }
    return latency.summary(timed, new_tokens, quotients)


def page(report: Report) -> show.Page:
    """Return the report's tables: times, ratios, likeliest tokens, exceptions, generations."""
    made: tuple[tuple[Callable[[Report], Table], object], ...] = (
        (_times, True),
        (_ratios, report["ratios"]),
        (_verdicts, report["verdicts"]),
        (_exceptions, _listed(report)),
        (_agreements, report["agreements"]),
    )
    return show.Page([make(report) for make, found in made if found])


def _times(report: Report) -> Table:
    settings, failed = report["settings"], report["failed"]

    def engine(name: str) -> Cell:
        return label(name, *([f"{name}: {failed[name]}"] if name in failed else []))

    columns: show.Columns[str] = {
        ("", "engine"): engine,
        ("", "loading, s"): lambda name: show.number(report["load_seconds"].get(name), "{:.1f}"),
        **time_columns(report, NO_QUARTILES),
        ("", "n"): lambda name: rounds_of(report, name),
    }
    tokens = f"{settings['prompt_tokens']} tokens in and {settings['new_tokens']} out"
    names = dict.fromkeys([*report["load_seconds"], *failed])
    return show.table("engine", f"vLLM: batch 1, {tokens}", names, columns, *_remarks(report))


def _ratios(report: Report) -> Table:
    def time_of(key: str) -> str:
        time = (key.split("/")[2:] or ["total_ms"])[0]
        return TIMES[time].partition(",")[0]

    columns: show.Columns[str] = {
        ("", "ratio"): lambda key: label("/".join(key.split("/")[:2])),
        ("", "of the"): lambda key: label(time_of(key)),
        ("", "value"): lambda key: show.number(report["ratios"][key], "{:.3f}"),
        ("", "95 % interval"): lambda key: show.between(report["intervals"][key]),
    }
    remark = (
        "The median of the rounds' own ratios, and a bootstrap interval of it over rounds; below 1 "
        "the first is quicker. base_again is the base in another process: its ratio is noise."
    )
    return show.table("ratios", "Ratios", report["ratios"], columns, remark)


def _verdicts(report: Report) -> Table:
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
    lead, other, error = "lead above rounding", "other token anywhere", "log-probability error"
    shown = {
        ("", "positions"): ("positions", "{:.0f}"),
        ("", "rounding"): ("allowed", "{:.3g}"),
        (lead, "positions"): ("decided", "{:.0f}"),
        (lead, "other token"): ("exceptions", "{:.0f}"),
        (other, "vLLM"): ("disagree", "{:.0f}"),
        (other, "ours rounded"): ("disagree_rounded", "{:.0f}"),
        (other, "largest lead"): ("largest_gap", "{:.3g}"),
    }
    columns: dict[tuple[str, str], show.CellOf[tuple[str, Report]]] = {
        ("", "engine"): lambda item: label(item[0]),
        **{
            column: lambda item, key=key, form=form: show.number(item[1][key], form)
            for column, (key, form) in shown.items()
        },
    }
    for words, size in (("median", "median"), ("largest", "max")):
        for whose, key in (("vLLM", "logprob_error"), ("ours rounded", "logprob_error_rounded")):
            columns[f"{error}, {words}", whose] = lambda item, key=key, size=size: show.number(
                item[1][key][size], "{:.2g}"
            )
    title = "The likeliest next token, vLLM's and ours"
    return show.table("verdicts", title, report["verdicts"].items(), columns, *remarks)


def _listed(report: Report) -> list[tuple[str, Report]]:
    return [
        (name, each)
        for name, found in report["verdicts"].items()
        for each in found["disagreements"]
        if each["gap"] > found["allowed"]
    ]


def _exceptions(report: Report) -> Table:
    shown = {
        ("", "row"): ("row", "{:.0f}"),
        ("", "position"): ("position", "{:.0f}"),
        ("", "lead"): ("gap", "{:.3g}"),
        ("token", "ours"): ("ours", "{:.0f}"),
        ("token", "ours rounded"): ("ours_rounded", "{:.0f}"),
        ("token", "vLLM's"): ("theirs", "{:.0f}"),
    }
    columns: show.Columns[tuple[str, Report]] = {
        ("", "engine"): lambda item: label(item[0]),
        **{
            column: lambda item, key=key, form=form: show.number(item[1][key], form)
            for column, (key, form) in shown.items()
        },
    }
    return show.table("exceptions", "Exceptions", _listed(report), columns)


def _agreements(report: Report) -> Table:
    found = report["agreements"]
    columns: show.Columns[str] = {
        ("", "generations of"): label,
        ("", "prompts"): lambda pair: show.number(found[pair]["n"], "{:.0f}"),
        ("", "all tokens equal, %"): lambda pair: show.number(100 * found[pair]["equal"], "{:.0f}"),
        ("", "equal from the start, tokens"): lambda pair: show.number(
            found[pair]["prefix"], "{:.1f}"
        ),
    }
    remark = (
        f"Greedy, {report['settings']['new_tokens']} tokens, all prompts in one batch; ours/ is "
        "transformers' generation, of the model with the adapter beside it or merged. A tie that "
        "rounding decides changes all that follows."
    )
    return show.table("agreements", "Greedy generations", found, columns, remark)


def _remarks(report: Report) -> tuple[str, ...]:
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
