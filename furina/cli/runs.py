"""Commands that train: fit, run."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from jsonargparse import ArgumentParser, Namespace

from furina.cli.parsing import add_fields, add_options, option_values, read_yaml
from furina.cli.shared import MAIN_SUITE, console, own_readme, require_backbone
from furina.data.sources import resolve_source
from furina.errors import ConfigurationError, nearest
from furina.options.signatures import method_names, method_options

if TYPE_CHECKING:
    from furina.experiment.config import RunConfig
    from furina.suites import Suite
    from furina.suites.jobs import Slurm

SCORING = {
    *(
        "suite",
        "row",
        "score",
        "test_size",
        "test_seed",
        "eval_batch_size",
        "engine",
        "execute_code",
    ),
    *("score_without_router", "activity_items", "latency_rounds", "latency_warmup"),
}
"""Fields of RunConfig that `fit` does not read: evaluate and latency have options of their own."""


def fit_options(parser: ArgumentParser, words: Sequence[str]) -> None:
    """Add the fields of RunConfig, and the options of the method that `words` choose."""
    from furina.experiment.config import RunConfig

    parser.add_argument("--config", action="config", help="YAML file of these options")
    parser.add_argument(
        "--run-dir",
        type=Path | None,
        default=None,
        help="folder of the run, where it is also resumed; runs/METHOD--TASK--seedSEED if none",
    )
    parser.add_argument(
        "--show-groups",
        action="store_true",
        help="only print every trained parameter with its learning rate and weight decay",
    )
    parser.add_argument(
        "--steps",
        type=int | None,
        default=None,
        help=f"optimiser steps; {RunConfig.steps} if epochs is none too",
    )
    add_fields(parser, RunConfig, skip={"adapter", "steps", *SCORING})
    _add_method_options(parser, _method(words, RunConfig.method))


def _method(words: Sequence[str], default: str) -> str:
    """Return the method that the command line, else the YAML file, else `default` names."""
    files = [read_yaml(path) for path in option_values(words, "config")]
    named = [str(content["method"]) for content in files if "method" in content]
    return [default, *named, *option_values(words, "method")][-1]


def _add_method_options(parser: ArgumentParser, method: str) -> None:
    if method == "base":
        return
    if method not in method_names():
        known = nearest(method, [*method_names(), "base"])
        raise ConfigurationError(f"Unknown method {method!r}.{known}")
    prefix, title, options = "adapter.", f"options of method {method}", method_options(method)
    if options is not None:
        add_options(parser, options, prefix, title)
        return
    from furina.adapters import methods

    add_fields(parser, methods()[method], prefix, title=title)


def fit(options: Namespace) -> None:
    """Fine-tune, or go on where a killed run was, and say what came out."""
    from furina.experiment.config import RunConfig
    from furina.storage import require_writable

    given = options.as_dict()
    if given["steps"] is None and given["epochs"] is None:
        given["steps"] = RunConfig.steps
    own = ("config", "run_dir", "show_groups")
    config = RunConfig(**{key: given[key] for key in given if key not in own})
    if config.is_base:
        raise ConfigurationError("method base has nothing to fit: choose one of `furina methods`.")
    config.check_tasks()
    config.check_sizes()
    require_backbone(config.backbone)
    run_dir = options.run_dir or Path("runs") / config.name
    require_writable(run_dir)
    resolve_source(config.source, config.data_dir)
    config.adapter_config()
    from furina.kernels.processor import use_cores

    use_cores()
    if options.show_groups:
        _print_groups(config)
        return
    from furina.experiment.fit import fit as train

    training = train(config, run_dir).training
    print(f"loss {training.final_loss:.4f} after {training.steps} steps, {training.seconds:.0f} s")
    print(f"{training.trainable:,} of {training.total:,} parameters were trained")
    print(f"{run_dir / 'adapter'}: the adapter; next: {_evaluation(config, run_dir)}")


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


def run_options(parser: ArgumentParser, words: Sequence[str]) -> None:
    """Add the options of `furina run`."""
    parser.add_argument(
        "suite",
        nargs="?",
        type=str,
        default=MAIN_SUITE,
        help=f"folder of defaults.yaml and one file per row, or its name in experiments/; "
        f"{MAIN_SUITE} if none",
    )
    parser.add_argument(
        "--scale",
        type=Literal["cpu", "paper"] | None,
        default=None,
        help="of a suite that has both: what two CPU cores finish, or the paper's own settings",
    )
    for name, what in (("rows", "rows of the table"), ("tasks", "tasks or mixtures")):
        parser.add_argument(
            f"--{name}", nargs="+", type=str, default=["all"], help=f"only the runs of these {what}"
        )
    parser.add_argument(
        "--seeds",
        type=int | None,
        default=None,
        help="run each with the seeds 0 to n - 1; with those of its files if none",
    )
    parser.add_argument(
        "--full", action="store_true", help="score all test questions, into a suite of their own"
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="only list the runs with their estimated cost and memory (and Slurm's script)",
    )
    parser.add_argument(
        "--device",
        type=str | None,
        default=None,
        help="with --dry-run, what to plan for: cpu, a100-80gb, h100-80gb, h200, rtx-4090 or l40s",
    )
    _add_places(parser)
    _add_cluster(parser)


def _add_places(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--results", type=Path, default=Path("results"), help="folder that takes the records"
    )
    parser.add_argument(
        "--runs", type=Path, default=Path("runs"), help="folder of checkpoints and logs"
    )


def _add_cluster(parser: ArgumentParser) -> None:
    from furina.suites.jobs import Slurm

    parser.add_argument(
        "--jobs", type=int, default=1, help="runs at once, each a process or a job of its own"
    )
    parser.add_argument(
        "--cluster",
        type=Literal["local", "slurm"],
        default="local",
        help="where they run: on this machine, or as an array of Slurm jobs",
    )
    add_fields(parser, Slurm, prefix="slurm.", title="what each job asks of Slurm")


def run(options: Namespace) -> None:
    """Run what is missing, then regenerate the report and print the suite's tables.

    The runs that succeeded are reported even if others failed.
    """
    from furina.plan.devices import device
    from furina.records import RecordError
    from furina.storage import require_writable
    from furina.suites import FailedRunsError, Places, read_suite, run_suite
    from furina.suites.jobs import run_jobs

    places, slurm = Places(options.results, options.runs), _slurm(options)
    for folder in (places.results, places.runs):
        require_writable(folder)
    if options.device and not options.dry_run:
        raise ConfigurationError("--device has no effect without --dry-run.")
    if options.device:
        device(options.device)
    suite = read_suite(
        options.suite, options.scale, options.rows, options.tasks, options.seeds, options.full
    )
    for backbone in {run.backbone for run in suite.runs} if not options.dry_run else ():
        require_backbone(backbone)
    from furina.kernels.processor import use_cores

    use_cores()
    if options.dry_run:
        _print_plan(suite, options, slurm)
        return
    try:
        if options.jobs == 1 and slurm is None:
            run_suite(suite, places)
        else:
            run_jobs(suite, places, options.jobs, slurm)
    except FailedRunsError:
        with suppress(RecordError):  # no run succeeded: there is nothing to report
            _report(suite, options.results, fill_readme=False)
        raise
    _report(suite, options.results, fill_readme=True)


def _slurm(options: Namespace) -> Slurm | None:
    """Return what is asked of Slurm, None if the runs stay here."""
    from furina.suites.jobs import Slurm

    if options.jobs < 1:
        raise ConfigurationError(f"--jobs {options.jobs} must be at least 1.")
    asked = Slurm(**options.slurm.as_dict())
    if options.cluster == "slurm":
        return asked
    if asked != Slurm():
        raise ConfigurationError("Options of --slurm have no effect without --cluster slurm.")
    return None


def _print_plan(suite: Suite, options: Namespace, slurm: Slurm | None) -> None:
    """List the runs with what they come to, and Slurm's script if they would go there."""
    from furina.plan.plan import DEVICE, plan_all
    from furina.plan.summary import summary
    from furina.reporting import print_tables
    from furina.suites import Places
    from furina.suites.jobs import slurm_script
    from furina.suites.suites import title

    for run in suite.runs:
        print(f"{run.suite}: {title(run)}, {run.backbone}")
    device = options.device or (DEVICE if suite.scale == "paper" else "cpu")
    print_tables([summary(plan_all(suite.runs, device))], console())
    if slurm is not None:
        print(slurm_script(suite, Places(options.results, options.runs), options.jobs, slurm))


def _report(suite: Suite, results: Path, fill_readme: bool) -> None:
    from furina.reporting import print_tables, report

    readme = own_readme(results) if fill_readme and suite.name == MAIN_SUITE else None
    made = report(results, suite=suite.name if readme else None, readme=readme)
    names = dict.fromkeys(run.suite for run in suite.runs)
    own = [table for table in made.tables if table.title.partition(": ")[0] in names]
    print_tables(own or made.tables, console())
