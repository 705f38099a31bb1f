"""Commands that train: fit, run."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from jsonargparse import ArgumentParser

from furina.backbones.architectures import ARCHITECTURES
from furina.backbones.names import local_folder, require_targets
from furina.cli.parsing import Command, add_group, option_values, read_yaml
from furina.cli.shared import MAIN_SUITE, console, own_readme
from furina.data.sources import resolve_source
from furina.errors import ConfigurationError
from furina.storage import require_writable

if TYPE_CHECKING:
    from furina.experiment.config import RunConfig
    from furina.suites import Suite
    from furina.suites.jobs import Slurm


@dataclass(kw_only=True)
class Fit(Command):
    """Fine-tune a backbone on a task with a method; a killed run goes on where it was."""

    example: ClassVar[str] = (
        "furina fit --method furina --task arc_easy --steps 60 --adapter.rank 16"
    )

    run_dir: Path | None = None
    """folder of the run, where it is also resumed; runs/METHOD--TASK--seedSEED if none"""
    show_groups: bool = False
    """only print every trained parameter with its learning rate and weight decay"""
    steps: int | None = None
    """optimiser steps; 60 if epochs is none too"""
    warmup_steps: int | None = None
    """optimiser steps of linear warm-up; 5, or all of a shorter run, if none"""

    @classmethod
    def add_options(cls, parser: ArgumentParser, words: Sequence[str]) -> None:
        """Add the fields of RunConfig too, and the options of the method that `words` choose."""
        from furina.experiment.config import SCORING, RunConfig

        parser.add_argument("--config", action="config", help="YAML file of these options")
        super().add_options(parser, words)
        add_group(parser, RunConfig, skip={"adapter", "steps", "warmup_steps", *SCORING})
        method = _method(words, RunConfig.method)
        adapter = RunConfig(method=method).adapter_config()
        if adapter is not None:
            title = f"options of method {method}"
            add_group(parser, type(adapter), prefix="adapter.", title=title)

    def run(self, config: object = None, **given: Any) -> None:
        """Fine-tune, or go on where a killed run was, and say what came out."""
        settings = self._settings(given)
        settings.check_training()
        require_targets(settings.backbone, settings.targets)
        run_dir = self.run_dir or Path("runs") / settings.name
        require_writable(run_dir)
        resolve_source(settings.source, settings.data_dir)
        from furina.kernels.processor import use_cores

        use_cores()
        if self.show_groups:
            _print_groups(settings)
            return
        from furina.experiment.fit import fit

        training = fit(settings, run_dir).training
        loss, seconds = f"{training.final_loss:.4f}", f"{training.seconds:.0f}"
        print(f"loss {loss} after {training.steps} steps, {seconds} s")
        print(f"{training.trainable:,} of {training.total:,} parameters were trained")
        print(f"{run_dir / 'adapter'}: the adapter; next: {_evaluation(settings, run_dir)}")

    def _settings(self, given: dict[str, Any]) -> RunConfig:
        from furina.experiment.config import RunConfig

        steps, warmup_steps = self.steps, self.warmup_steps
        if steps is None and given["epochs"] is None:
            steps = RunConfig.steps
        if warmup_steps is None:
            warmup_steps = min(RunConfig.warmup_steps, max(steps or RunConfig.warmup_steps, 0))
        return RunConfig(**given, steps=steps, warmup_steps=warmup_steps)


def _method(words: Sequence[str], default: str) -> str:
    """Return the method that the command line, else the YAML file, else `default` names."""
    files = [read_yaml(path) for path in option_values(words, "config")]
    named = [str(content["method"]) for content in files if "method" in content]
    return [default, *named, *option_values(words, "method")][-1]


def _evaluation(config: RunConfig, run_dir: Path) -> str:
    """Return the command that scores what was trained, as a shell takes it."""
    words = ["furina", "evaluate", "--adapter-path", str(run_dir / "adapter")]
    words += ["--task", *config.trained]
    for name in ("backbone", "dtype", "protocol", "source", "data_dir"):
        if getattr(config, name) != getattr(type(config), name):
            words += [f"--{name.replace('_', '-')}", str(getattr(config, name))]
    return shlex.join(words)


def _print_groups(config: RunConfig) -> None:
    """Print the optimiser's groups and the parameters in each."""
    from furina.backbones.load import load_backbone
    from furina.model.inject import adapt
    from furina.model.parameters import parameter_groups

    model = load_backbone(config.backbone, config.dtype)
    adapt(model, config.method, targets=config.targets, seed=config.seed, **config.adapter)
    rates = config.learning_rate, config.weight_decay, config.lora_plus_ratio
    for group in parameter_groups(model, *rates):
        size = sum(parameter.numel() for parameter in group["params"])
        print(
            f"learning rate {group['lr']:g}, weight decay {group['weight_decay']:g}: "
            f"{len(group['names'])} tensors, {size:,} parameters"
        )
        for name in group["names"]:
            print(f"  {name}")


@dataclass(kw_only=True)
class Run(Command):
    """Run every cell of a suite that is not finished, here or on a cluster, then report."""

    example: ClassVar[str] = "furina run main --scale cpu --rows furina lora"

    suite: str = field(default=MAIN_SUITE, metadata={"nargs": "?"})
    """folder of defaults.yaml and one file per row, or its name in experiments/; quickstart if
    none"""
    scale: Literal["cpu", "paper"] | None = None
    """of a suite that has both: what two CPU cores finish, or the paper's own settings"""
    rows: Sequence[str] = ("all",)
    """only the runs of these rows of the table"""
    tasks: Sequence[str] = ("all",)
    """only the runs of these tasks or mixtures"""
    seeds: int | None = None
    """run each with the seeds 0 to n - 1; with those of its files if none"""
    full: bool = False
    """score all test questions, into a suite of their own"""
    dry_run: bool = False
    """only list the runs with their estimated cost and memory (and Slurm's script)"""
    show_config: bool = False
    """only print the resolved runs, each value with the file or option that gives it"""
    device: str | None = None
    """with --dry-run, what to plan for: cpu, a100-80gb, h100-80gb, h200, rtx-4090 or l40s"""
    results: Path = Path("results")
    """folder that takes the records"""
    runs: Path = Path("runs")
    """folder of checkpoints and logs"""
    jobs: int = 1
    """runs at once, each a process or a job of its own"""
    cluster: Literal["local", "slurm"] = "local"
    """where they run: on this machine, or as an array of Slurm jobs"""

    @classmethod
    def add_options(cls, parser: ArgumentParser, words: Sequence[str]) -> None:
        """Add the options of Slurm too."""
        from furina.suites.jobs import Slurm

        super().add_options(parser, words)
        add_group(parser, Slurm, prefix="slurm.", title="what each job asks of Slurm")

    def run(self, slurm: dict[str, Any]) -> None:
        """Run what is missing, then regenerate the report and print the suite's tables.

        The runs that succeeded are reported even if others failed.
        """
        from furina.plan.devices import device
        from furina.records import RecordError
        from furina.suites import FailedRunsError, Folders, read_suite, run_suite
        from furina.suites.jobs import run_jobs

        folders, cluster = Folders(self.results, self.runs), self._cluster(slurm)
        for folder in (folders.results, folders.runs):
            require_writable(folder)
        if self.device and not self.dry_run:
            raise ConfigurationError("--device has no effect without --dry-run.")
        if self.device:
            device(self.device)
        suite = read_suite(self.suite, self.scale, self.rows, self.tasks, self.seeds, self.full)
        if self.show_config:
            from furina.suites.show import resolved_text

            print(resolved_text(suite))
            return
        for backbone, targets in {(run.backbone, run.targets) for run in suite.runs}:
            if not self.dry_run:
                require_targets(backbone, targets)
            elif backbone not in ARCHITECTURES:
                local_folder(backbone)
        from furina.kernels.processor import use_cores

        use_cores()
        if self.dry_run:
            self._print_plan(suite, cluster)
            return
        try:
            if self.jobs == 1 and cluster is None:
                run_suite(suite, folders)
            else:
                run_jobs(suite, folders, self.jobs, cluster)
        except FailedRunsError:
            with suppress(RecordError):  # no run succeeded: there is nothing to report
                _report(suite, self.results, fill_readme=False)
            raise
        _report(suite, self.results, fill_readme=True)

    def _cluster(self, given: dict[str, Any]) -> Slurm | None:
        """Return what is asked of Slurm, None if the runs stay here."""
        from furina.suites.jobs import Slurm

        if self.jobs < 1:
            raise ConfigurationError(f"--jobs {self.jobs} must be at least 1.")
        wanted = Slurm(**given)
        if self.cluster == "slurm":
            return wanted
        if wanted != Slurm():
            raise ConfigurationError("Options of --slurm have no effect without --cluster slurm.")
        return None

    def _print_plan(self, suite: Suite, slurm: Slurm | None) -> None:
        """List the runs with what they come to, and Slurm's script if they would go there."""
        from furina.plan.plan import DEVICE, plan_all
        from furina.plan.summary import summary
        from furina.progress import part
        from furina.reporting import print_tables
        from furina.suites import Folders
        from furina.suites.jobs import slurm_script

        for run in suite.runs:
            print(f"{run.suite}: {run.title}, {run.backbone}")
        device = self.device or (DEVICE if suite.scale == "paper" else "cpu")
        with part("planning"):
            plans = plan_all(suite.runs, device)
        print_tables([summary(plans)], console())
        if slurm is not None:
            print(slurm_script(suite, Folders(self.results, self.runs), self.jobs, slurm))


def _report(suite: Suite, results: Path, fill_readme: bool) -> None:
    from furina.reporting import print_tables, report

    readme = own_readme(results) if fill_readme and suite.name == MAIN_SUITE else None
    made = report(results, suite=suite.name if readme else None, readme=readme)
    names = dict.fromkeys(run.suite for run in suite.runs)
    own = [table for table in made.tables if table.title.partition(": ")[0] in names]
    print_tables(own or made.tables, console())
