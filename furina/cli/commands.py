"""The list of commands, in the order in which a newcomer needs them."""

from __future__ import annotations

from furina.cli import adapters, analysis, data, runs, scoring
from furina.cli.parsing import Command

COMMANDS = {
    command.name: command
    for command in (
        Command(
            "assets",
            "Fetch the model and the data into a cache (resumable, verified)",
            "furina assets --list",
            adapters.assets_options,
            adapters.assets,
        ),
        Command(
            "data",
            "List the benchmarks, show an item as each protocol asks it, count repeats and leaks",
            "furina data show arc_easy",
            data.data_options,
            data.data,
        ),
        Command(
            "methods",
            "List the fine-tuning methods: mergeable or not and why, parameters, source",
            "furina methods --json",
            adapters.methods_options,
            adapters.methods,
        ),
        Command(
            "fit",
            "Fine-tune a backbone on a task with a method; a killed run goes on where it was",
            "furina fit --method furina --task arc_easy --steps 60 --adapter.rank 16",
            runs.fit_options,
            runs.fit,
        ),
        Command(
            "evaluate",
            "Score a backbone, alone or with an adapter (unmerged and merged), through lm-eval",
            "furina evaluate --adapter-path runs/demo/adapter --task arc_easy",
            scoring.evaluate_options,
            scoring.evaluate,
        ),
        Command(
            "merge",
            "Merge an adapter into its backbone: a plain Hugging Face folder",
            "furina merge runs/demo/adapter merged",
            adapters.merge_options,
            adapters.merge,
        ),
        Command(
            "export",
            "Write an adapter as one PEFT LoRA, or merged",
            "furina export --format peft runs/demo/adapter lora",
            adapters.export_options,
            adapters.export,
        ),
        Command(
            "combine",
            "Combine adapters of one backbone into one LoRA adapter",
            "furina combine runs/maths/adapter runs/science/adapter both --weights 0.5 0.5",
            adapters.combine_options,
            adapters.combine,
        ),
        Command(
            "latency",
            "Time first token, each token and the total: base, unmerged and merged",
            "furina latency --adapter-path runs/demo/adapter --rounds 10",
            scoring.latency_options,
            scoring.latency,
        ),
        Command(
            "analyse",
            "Say which experts of an adapter are active, how evenly and on which tasks; draw maps",
            "furina analyse runs/demo/adapter --task arc_easy openbookqa --out activity.json",
            analysis.analyse_options,
            analysis.analyse,
        ),
        Command(
            "report",
            "Make tables, figures and the README's block from the records in results/",
            "furina report --check",
            scoring.report_options,
            scoring.report,
        ),
        Command(
            "run",
            "Run every cell of a suite that is not finished, here or on a cluster, then report",
            "furina run main --scale cpu --rows furina lora",
            runs.run_options,
            runs.run,
        ),
    )
}
