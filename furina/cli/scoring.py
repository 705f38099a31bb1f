"""Commands that score, time and tabulate: evaluate, latency, report."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from jsonargparse import ArgumentParser, Namespace
from jsonargparse.typing import NonNegativeInt, PositiveInt
from rich.table import Table

from furina.cli.shared import (
    DEFAULT_BACKBONE,
    MAIN_SUITE,
    add_backbone,
    add_data_source,
    backbone_of,
    console,
    own_readme,
    require_adapter,
    require_backbone,
    require_new,
)
from furina.errors import ConfigurationError
from furina.progress import part
from furina.records import RecordError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from furina.data.items import Item
    from furina.data.protocols import Protocol
    from furina.evaluation.evaluation import Evaluation
    from furina.records import Spread, Variant


def evaluate_options(parser: ArgumentParser, words: Sequence[str]) -> None:
    """Add the options of `furina evaluate`."""
    parser.add_argument("--task", nargs="+", type=str, required=True, help="one or more tasks")
    parser.add_argument(
        "--adapter-path",
        type=Path | None,
        default=None,
        help="adapter folder, scored unmerged and, where its method merges, merged; "
        "without it the plain backbone is scored",
    )
    add_backbone(parser)
    parser.add_argument(
        "--protocol",
        type=str,
        default="text",
        help="how items are asked and scored: see furina data list",
    )
    parser.add_argument(
        "--split",
        type=Literal["train", "validation", "test"],
        default="test",
        help="which items of the task",
    )
    parser.add_argument(
        "--size",
        type=PositiveInt | None,
        default=None,
        help="score a fixed random subset of this size",
    )
    parser.add_argument(
        "--seed", type=int | None, default=None, help="which subset --size takes; 0 if none"
    )
    parser.add_argument(
        "--batch-size", type=PositiveInt, default=16, help="rows scored or generated at once"
    )
    parser.add_argument(
        "--engine",
        type=Literal["shared", "lm_eval"],
        default="shared",
        help="shared computes a question once for all its choices, lm_eval is lm-eval's own",
    )
    parser.add_argument(
        "--execute-code",
        action="store_true",
        help="run the programs that the model writes, which protocol code is scored by",
    )
    add_data_source(parser)
    parser.add_argument(
        "--output",
        type=Path | None,
        default=None,
        help="new folder for scores.json and the outputs of every item",
    )


def evaluate(options: Namespace) -> None:
    """Score every task and variant, print the table, write the outputs if asked to."""
    from furina.data.protocols import GenerationProtocol, get_protocol
    from furina.data.tasks import get_task

    require_new(options.output)
    protocol = get_protocol(options.protocol)
    for name in options.task:
        task = get_task(name)
        protocol.require(task)
        if isinstance(protocol, GenerationProtocol):
            protocol.require_consent(task, options.execute_code)
    _refuse_idle(options, protocol)
    _require_model(options)
    items = {task: _items(options, task) for task in dict.fromkeys(options.task)}
    model, backbone = _model(options)
    from furina.backbones.load import load_tokenizer
    from furina.evaluation.evaluate import evaluate as score

    tokenizer = load_tokenizer(backbone)
    settings = {key: options[key] for key in ("batch_size", "engine", "execute_code")}
    done = []
    for variant in _variants(model):
        for task, rows in items.items():
            with part(f"scoring {variant} on {task}"):
                scored = score(model, tokenizer, task, rows, options.protocol, **settings)
            done.append((variant, scored))
    _print(done)
    if options.output is not None:
        _write(done, options.output)


def _items(options: Namespace, task: str) -> list[Item]:
    from furina.data.sources import load_items
    from furina.data.splits import test_subset

    rows = load_items(task, options.split, options.source, options.data_dir)
    return test_subset(rows, options.size, options.seed or 0)[1]


def _refuse_idle(options: Namespace, protocol: Protocol) -> None:
    """Refuse options that would change nothing."""
    from furina.data.protocols import GenerationProtocol

    generates = isinstance(protocol, GenerationProtocol)
    if options.seed is not None and options.size is None:
        raise ConfigurationError("--seed has no effect without --size: all items are scored.")
    if options.engine != "shared" and generates:
        raise ConfigurationError(
            f"--engine has no effect with protocol {protocol.name}: the model writes its answers."
        )
    if options.execute_code and not getattr(protocol, "runs_code", False):
        raise ConfigurationError(
            f"--execute-code has no effect with protocol {protocol.name}: it runs no programs."
        )


def _require_model(options: Namespace) -> None:
    """Refuse a backbone or an adapter folder that is not there."""
    if options.adapter_path is None:
        require_backbone(options.backbone or DEFAULT_BACKBONE)
    else:
        require_adapter(options.adapter_path)
        require_backbone(options.backbone)


def _model(options: Namespace) -> tuple[PreTrainedModel, str]:
    """Load backbone and adapter, if one is named, onto the best device; return backbone's name."""
    adapters = [] if options.adapter_path is None else [options.adapter_path]
    backbone = backbone_of(options.backbone, *adapters)
    from furina.backbones.load import load_backbone
    from furina.kernels.processor import best_device, use_cores
    from furina.model.checkpoint import load

    use_cores()
    model = load_backbone(backbone, options.dtype, device=best_device())
    for folder in adapters:
        load(folder, model)
    return model, backbone


def _variants(model: PreTrainedModel) -> Iterator[Variant]:
    """Yield the name of each variant while `model` is it."""
    from furina.model.merging import merge
    from furina.model.state import is_adapted, state_of

    if not is_adapted(model):
        yield "base"
        return
    yield "unmerged"
    if state_of(model).config.mergeability().ok:
        merge(model, keep_base=False)
        yield "merged"


def _print(done: Sequence[tuple[Variant, Evaluation]]) -> None:
    table = Table("task", "protocol", "variant", "metric", "score", "items", "chance")
    for variant, evaluation in done:
        for score in evaluation.scores.values():
            value = f"{score.value:.3f} ± {score.stderr:.3f}"
            chance = f"{score.chance:.3f}" + (" (not above it)" if score.suspect else "")
            asked = f"{evaluation.protocol} v{evaluation.protocol_version}"
            row = (evaluation.task, asked, variant, score.metric, value, str(score.n), chance)
            table.add_row(*row)
    for (variant, metric), values in _by_metric(done).items():
        if len(values) > 1:
            mean = f"{sum(values) / len(values):.3f}"
            table.add_row(f"mean of {len(values)} tasks", "", variant, metric, mean, "", "")
    console().print(table)


def _by_metric(
    done: Sequence[tuple[Variant, Evaluation]],
) -> dict[tuple[Variant, str], list[float]]:
    """Return each variant's scores by metric, a value per task."""
    values: dict[tuple[Variant, str], list[float]] = {}
    for variant, evaluation in done:
        for score in evaluation.scores.values():
            values.setdefault((variant, score.metric), []).append(score.value)
    return values


def _write(done: Sequence[tuple[Variant, Evaluation]], folder: Path) -> None:
    from furina.storage import atomic_directory, write_json

    with atomic_directory(folder, last="scores.json") as temporary:
        rows = []
        for variant, evaluation in done:
            name = f"{evaluation.task}-{variant}.jsonl.gz"
            evaluation.write_samples(temporary / name)
            rows += [asdict(record) for record in evaluation.to_records(variant, name)]
        write_json(temporary / "scores.json", rows)
    print(f"{folder}: scores.json and the outputs of every item")


def latency_options(parser: ArgumentParser, words: Sequence[str]) -> None:
    """Add the options of `furina latency`."""
    parser.add_argument(
        "--adapter-path",
        type=Path | None,
        default=None,
        help="adapter folder, timed beside the base: unmerged and, where its method merges, merged",
    )
    add_backbone(parser)
    for name, kind, default, text in (
        ("--prompt-tokens", PositiveInt, 100, "tokens of the prompt"),
        ("--new-tokens", PositiveInt, 100, "tokens to generate; generation never stops early"),
        ("--batch-size", PositiveInt, 1, "rows of the prompt"),
        ("--rounds", PositiveInt, 20, "rounds; each times every variant once, in random order"),
        ("--warmup", NonNegativeInt, 2, "untimed rounds before"),
        ("--seed", int, 0, "decides the prompts and the order"),
    ):
        parser.add_argument(name, type=kind, default=default, help=text)


def latency(options: Namespace) -> None:
    """Time the variants side by side and print medians, quartiles and ratios to the base."""
    if options.new_tokens < 2:
        raise ConfigurationError("--new-tokens 1 leaves no token after the first: time 2 or more.")
    _require_model(options)
    model, _ = _model(options)
    from furina.evaluation.latency import measure_latency

    with part("timing"):
        results = measure_latency(
            model,
            prompt_tokens=options.prompt_tokens,
            new_tokens=options.new_tokens,
            batch_size=options.batch_size,
            rounds=options.rounds,
            warmup=options.warmup,
            seed=options.seed,
        )
    times = ("first token, ms", "each token, ms", "total, ms")
    table = Table("variant", *times, "tokens/s", "total / base")
    for result in results:
        spreads = (result.ttft_ms, result.per_token_ms, result.total_ms)
        ratio = result.ratio_to_base["total_ms"]
        cells = (*map(_milliseconds, spreads), f"{result.tokens_per_second:.1f}")
        table.add_row(result.variant, *cells, f"{ratio.median:.2f}")
    console().print(table)
    where = f"on {model.device}, batch {options.batch_size}"
    print(f"Median (quartiles) of {options.rounds} rounds {where}.")


def _milliseconds(spread: Spread) -> str:
    return f"{spread.median:.2f} ({spread.q1:.2f} to {spread.q3:.2f})"


def report_options(parser: ArgumentParser, words: Sequence[str]) -> None:
    """Add the options of `furina report`."""
    parser.add_argument(
        "--results",
        type=Path,
        default=Path("results"),
        help="folder of the records, and of report.html and REPRODUCING.md, made from them",
    )
    parser.add_argument(
        "--readme",
        type=Path | None,
        default=None,
        help="file whose marked block takes the main table; if none README.md, where it has such a "
        "block and --results is the results/ beside it",
    )
    parser.add_argument(
        "--suite",
        type=str | None,
        default=None,
        help=f"suite whose table that block takes; {MAIN_SUITE} if none",
    )
    parser.add_argument(
        "--metric",
        type=str | None,
        default=None,
        help="metric of the tables, such as acc_norm; what each record lists first if none",
    )
    parser.add_argument(
        "--check", action="store_true", help="write nothing; fail if a generated file differs"
    )


def report(options: Namespace) -> None:
    """Print the tables and write (or check) every generated file."""
    if options.check and options.metric:
        raise ConfigurationError(
            "--check compares what `furina report` writes by default: leave out --metric."
        )
    if not options.results.is_dir():
        raise ConfigurationError(
            f"There is no folder {options.results}: name the one that `furina run` filled with "
            "--results."
        )
    if not any(options.results.glob("*/*.json")):
        raise RecordError(f"There are no records in {options.results}; run `furina run` first.")
    if options.readme and not options.readme.is_file():
        raise RecordError(f"{options.readme} does not exist, so its table cannot be filled in.")
    readme = options.readme or own_readme(options.results)
    if options.suite and readme is None:
        raise ConfigurationError(
            f"--suite {options.suite} has no effect: it chooses the table of a README, and none "
            "takes one; name it with --readme."
        )
    from furina.reporting import print_tables
    from furina.reporting import report as make

    made = make(
        options.results,
        suite=(options.suite or MAIN_SUITE) if readme else None,
        readme=readme,
        metric=options.metric,
        check=options.check,
    )
    print_tables(made.tables, console())
    state = "are what the records give" if options.check else "are up to date"
    with_readme = f", the table in {readme} among them" if readme else ""
    print(f"{len(made.files)} generated files {state}{with_readme}")
