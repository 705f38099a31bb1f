"""Commands that score, time and tabulate: evaluate, latency, report."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from jsonargparse.typing import NonNegativeInt, PositiveInt
from rich.table import Table

from furina.cli.parsing import REQUIRED, Command
from furina.cli.shared import (
    MAIN_SUITE,
    WithBackbone,
    WithData,
    console,
    own_readme,
    require_new,
)
from furina.errors import ConfigurationError, nearest
from furina.progress import part
from furina.records import RecordError
from furina.records.cells import CELLS, RECORD

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from furina.data.protocols import Protocol
    from furina.evaluation.evaluation import Evaluation
    from furina.records import Spread, Variant


@dataclass(kw_only=True)
class _WithModel(WithBackbone):
    """A command on a backbone, alone or with an adapter."""

    adapter_path: Path | None = None
    """adapter folder, of which the unmerged model and, where its method merges, the merged one are
    taken; without it the plain backbone is"""

    @property
    def adapters(self) -> list[Path]:
        """Return the adapter's folder, if one is named."""
        return [] if self.adapter_path is None else [self.adapter_path]

    def load(self, backbone: str) -> PreTrainedModel:
        """Load backbone and adapter onto the best device."""
        from furina.backbones.load import load_backbone
        from furina.kernels.processor import best_device, use_cores
        from furina.model.checkpoint import load

        use_cores()
        model = load_backbone(backbone, self.dtype, device=best_device())
        for folder in self.adapters:
            load(folder, model)
        return model


@dataclass(kw_only=True)
class Evaluate(WithData, _WithModel):
    """Score a backbone, alone or with an adapter (unmerged and merged), through lm-eval."""

    example: ClassVar[str] = "furina evaluate --adapter-path runs/demo/adapter --task arc_easy"

    task: list[str] = field(metadata=REQUIRED)
    """one or more tasks"""
    protocol: str = "text"
    """how items are asked and scored: see furina data list"""
    split: Literal["train", "validation", "test"] = "test"
    """which items of the task"""
    size: PositiveInt | None = None
    """score a fixed random subset of this size"""
    seed: int | None = None
    """which subset --size takes; 0 if none"""
    batch_size: PositiveInt = 16
    """rows scored or generated at once"""
    engine: Literal["shared", "lm_eval"] = "shared"
    """shared computes a question once for all its choices, lm_eval is lm-eval's own"""
    execute_code: bool = False
    """run the programs that the model writes, which protocol code is scored by"""
    output: Path | None = None
    """new folder for scores.json and the outputs of every item"""

    def run(self) -> None:
        """Score every task and variant, print the table, write the outputs if asked to."""
        from furina.data.protocols import GenerationProtocol, get_protocol
        from furina.data.sources import load_items
        from furina.data.splits import test_subset
        from furina.data.tasks import get_task

        require_new(self.output)
        protocol = get_protocol(self.protocol)
        for name in self.task:
            task = get_task(name)
            protocol.require(task)
            if isinstance(protocol, GenerationProtocol):
                protocol.require_consent(task, self.execute_code)
        self._refuse_idle(protocol)
        backbone = self.backbone_of(*self.adapters)
        items = {}
        for name in dict.fromkeys(self.task):
            every = load_items(name, self.split, self.source, self.data_dir)
            items[name] = test_subset(every, self.size, self.seed or 0)[1]
        model = self.load(backbone)
        from furina.backbones.load import load_tokenizer
        from furina.evaluation.evaluate import evaluate

        tokenizer = load_tokenizer(backbone)
        done = []
        for variant in _variants(model):
            for name, rows in items.items():
                with part(f"scoring {variant} on {name}"):
                    scored = evaluate(
                        model,
                        tokenizer,
                        name,
                        rows,
                        self.protocol,
                        batch_size=self.batch_size,
                        engine=self.engine,
                        execute_code=self.execute_code,
                    )
                done.append((variant, scored))
        _print(done)
        if self.output is not None:
            _write(done, self.output)

    def _refuse_idle(self, protocol: Protocol) -> None:
        """Refuse options that would change nothing."""
        from furina.data.protocols import GenerationProtocol

        generates = isinstance(protocol, GenerationProtocol)
        if self.seed is not None and self.size is None:
            raise ConfigurationError("--seed has no effect without --size: all items are scored.")
        if self.engine != "shared" and generates:
            raise ConfigurationError(
                f"--engine has no effect with protocol {protocol.name}: the model writes its "
                "answers."
            )
        if self.execute_code and not getattr(protocol, "runs_code", False):
            raise ConfigurationError(
                f"--execute-code has no effect with protocol {protocol.name}: it runs no programs."
            )


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
    from furina.storage import atomic_directory, remove_leftovers, write_json

    remove_leftovers(folder)
    with atomic_directory(folder, last="scores.json") as temporary:
        rows = []
        for variant, evaluation in done:
            name = f"{evaluation.task}-{variant}.jsonl.gz"
            evaluation.write_samples(temporary / name)
            rows += [asdict(record) for record in evaluation.to_records(variant, name)]
        write_json(temporary / "scores.json", rows)
    print(f"{folder}: scores.json and the outputs of every item")


@dataclass(kw_only=True)
class Latency(_WithModel):
    """Time first token, each token and the total: base, unmerged and merged."""

    example: ClassVar[str] = "furina latency --adapter-path runs/demo/adapter --rounds 10"

    prompt_tokens: PositiveInt = 100
    """tokens of the prompt"""
    new_tokens: PositiveInt = 100
    """tokens to generate; generation never stops early"""
    batch_size: PositiveInt = 1
    """rows of the prompt"""
    rounds: PositiveInt = 20
    """rounds; each times every variant once, in random order"""
    warmup: NonNegativeInt = 2
    """untimed rounds before"""
    seed: int = 0
    """decides the prompts and the order"""

    def run(self) -> None:
        """Time the variants side by side and print medians, quartiles and ratios to the base."""
        if self.new_tokens < 2:
            raise ConfigurationError(
                "--new-tokens 1 leaves no token after the first: time 2 or more."
            )
        model = self.load(self.backbone_of(*self.adapters))
        from furina.evaluation.latency import measure_latency

        with part("timing"):
            results = measure_latency(
                model,
                prompt_tokens=self.prompt_tokens,
                new_tokens=self.new_tokens,
                batch_size=self.batch_size,
                rounds=self.rounds,
                warmup=self.warmup,
                seed=self.seed,
            )
        times = ("first token, ms", "each token, ms", "total, ms")
        table = Table("variant", *times, "tokens/s", "total / base")
        for result in results:
            spreads = (result.ttft_ms, result.per_token_ms, result.total_ms)
            ratio = result.ratio_to_base["total_ms"]
            cells = (*map(_milliseconds, spreads), f"{result.tokens_per_second:.1f}")
            table.add_row(result.variant, *cells, f"{ratio.median:.2f}")
        console().print(table)
        where = f"on {model.device}, batch {self.batch_size}"
        print(f"Median (quartiles) of {self.rounds} rounds {where}.")


def _milliseconds(spread: Spread) -> str:
    return f"{spread.median:.2f} ({spread.q1:.2f} to {spread.q3:.2f})"


@dataclass(kw_only=True)
class Report(Command):
    """Make tables, figures and the README's block from the records in results/."""

    example: ClassVar[str] = "furina report --check"

    results: Path = Path("results")
    """folder of the records, and of report.html and REPRODUCING.md, made from them"""
    readme: Path | None = None
    """file whose marked block takes the main table; if none README.md, where it has such a block
    and --results is the results/ beside it"""
    suite: str | None = None
    """suite whose table that block takes; quickstart if none"""
    metric: str | None = None
    """metric of the tables, such as acc_norm; what each record lists first if none"""
    check: bool = False
    """write nothing; fail if a generated file differs"""

    def run(self) -> None:
        """Print the tables and write (or check) every generated file."""
        if self.check and self.metric:
            raise ConfigurationError(
                "--check compares what `furina report` writes by default: leave out --metric."
            )
        if self.readme and not self.readme.is_file():
            raise RecordError(f"{self.readme} does not exist, so its table cannot be filled in.")
        readme = self.readme or own_readme(self.results)
        self._look_at_records(readme)
        from furina.reporting import print_tables, report

        made = report(
            self.results,
            suite=(self.suite or MAIN_SUITE) if readme else None,
            readme=readme,
            metric=self.metric,
            check=self.check,
        )
        print_tables(made.tables, console())
        state = "are what the records give" if self.check else "are up to date"
        with_readme = f", the table in {readme} among them" if readme else ""
        print(f"{len(made.files)} generated files {state}{with_readme}")

    def _look_at_records(self, readme: Path | None) -> None:
        """Refuse names that no record bears: to import what reads the records takes seconds."""
        if not self.results.is_dir():
            raise ConfigurationError(
                f"There is no folder {self.results}: name the one that `furina run` filled with "
                "--results."
            )
        files = list(self.results.glob("*/*.json"))
        if not files:
            raise RecordError(f"There are no records in {self.results}; run `furina run` first.")
        if self.suite and readme is None:
            raise ConfigurationError(
                f"--suite {self.suite} has no effect: it chooses the table of a README, and none "
                "takes one; name it with --readme."
            )
        suites = {file.parent.name for file in files}
        if self.suite and self.suite not in suites:
            raise RecordError(
                f"{self.results} holds no suite {self.suite!r}.{nearest(self.suite, suites)}"
            )
        if self.metric:
            files += self.results.glob(f"{CELLS}/*/{RECORD}")
            texts = (file.read_text(encoding="utf-8", errors="replace") for file in files)
            known = {name for text in texts for name in re.findall(r'"metric": "(.*?)"', text)}
            if self.metric not in known:
                raise RecordError(
                    f"No record holds a metric {self.metric!r}.{nearest(self.metric, known)}"
                )
