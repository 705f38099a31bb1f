"""What finetuning.py reports: the table and the loss curves made from its JSON."""

from __future__ import annotations

from statistics import fmean, median

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from benchmarks.common import show
from furina.reporting.figures import plots

PLAIN, AGAIN = "plain/peft_lora", "plain/peft_lora_again"
LORA, BUCKETED, FURINA = "furina/lora", "furina/lora_bucketed", "furina/furina"
ARMS = (PLAIN, AGAIN, LORA, BUCKETED, FURINA)
SHORT = {LORA: "lora", BUCKETED: "lora_bucketed", FURINA: "furina", AGAIN: "plain_again"}
"""What the ratios call the arms that are held against the plain loop."""
SAME_ROWS = (LORA, AGAIN)
"""The arms whose steps hold the rows of the plain loop's, so that their losses compare."""


def page(report: show.Report) -> show.Page:
    """Return the report's table, a row for each arm."""
    columns: show.Columns = {
        ("", "arm"): "arm",
        ("tokens/s", "median"): "speed.median .0f",
        ("tokens/s", "quartiles"): show.between("speed", ".0f"),
        ("tokens/s", "over the plain loop's"): "ratio .2f",
        ("", "padding"): "padding .1%",
        ("", "wall clock, s"): "wall .1f",
        ("", "trainable, M"): show.at("trainable .2f", 1e-6),
        ("loss", "last"): "last .3f",
        ("loss minus the plain loop's", "mean"): "difference.mean +.4f",
        ("loss minus the plain loop's", "largest"): "difference.max_abs .4f",
    }
    rows = [_row(report, name) for name in ARMS]
    title = "Fine-tuning from end to end"
    arms = show.table("finetuning", title, rows, columns, *_remarks(report))
    return show.Page([arms], figure=_figure(report))


def _row(report: show.Report, name: str) -> show.Report:
    short = SHORT.get(name)
    ran = [each["arms"][name] for each in report["rounds"]]
    padding = 1 - sum(arm["tokens"] for arm in ran) / sum(arm["positions"] for arm in ran)
    return {
        "arm": name,
        "speed": report["tokens_per_second"][name],
        "ratio": report["ratios"].get(f"end_to_end/{short}/plain"),
        "padding": padding,
        "wall": median(arm["wall_seconds"] for arm in ran),
        "trainable": ran[0]["trainable"],
        "last": fmean(curve[-1] for curve in report["losses"][name]),
        "difference": report["loss_differences"].get(f"loss/{short}_minus_plain"),
    }


def _remarks(report: show.Report) -> tuple[str, ...]:
    told = [f"{key.replace('_', ' ')}: {value}" for key, value in report["settings"].items()]
    cores = report["environment"]["hardware"]["cores"]
    return (
        "Tokens are real ones, timed from the first forward to the last update; a ratio is the "
        "median of the rounds' own. The wall clock, a median, holds loading and saving too.",
        "Losses are nats per answer token, without FURINA's selection loss: the mean of the last, "
        "and differences over the steps of all rounds, where they hold the same rows. "
        f"{AGAIN} is the plain loop from another start: noise.",
        f"{', '.join(told)}.",
        f"{show.processor(report)}, cores: {cores}; "
        f"{show.versions(report, 'torch', 'transformers', 'peft', 'lightning')}; "
        f"{show.commit(report)}; data {report['data'][:10]}. Made by {report['command']}.",
    )


def _figure(report: show.Report) -> Figure:
    """Return the loss curves, a line for each arm: means over rounds."""
    with plots.style():
        drawn = Figure(figsize=(6.4, 3.6), layout="constrained")
        axes = drawn.add_subplot()
        for name, colour, marker in zip(ARMS, plots.COLOURS, plots.MARKERS, strict=False):
            curve = [fmean(step) for step in zip(*report["losses"][name], strict=True)]
            steps = range(1, len(curve) + 1)
            axes.plot(steps, curve, marker=marker, color=colour, markersize=4, label=name)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set(xlabel="optimiser step", ylabel="loss, nats per answer token")
        axes.legend()
    return drawn
