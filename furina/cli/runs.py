"""Commands that train: fit, reproduce."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from jsonargparse import ArgumentParser, Namespace

from furina.cli.parsing import add_fields, option_values, read_yaml
from furina.cli.shared import MAIN_SUITE, console, default_readme
from furina.errors import ConfigurationError, nearest

if TYPE_CHECKING:
    from furina.experiment.config import RunConfig

SCORING = {
    *("suite", "score", "test_size", "test_seed", "eval_batch_size", "engine", "execute_code"),
    *("score_without_router", "latency_rounds", "latency_warmup"),
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
    add_fields(parser, RunConfig, skip={"adapter", *SCORING})
    _add_method_options(parser, _method(words, RunConfig.method))


def _method(words: Sequence[str], default: str) -> str:
    """Return the method that the command line, else the YAML file, else `default` names."""
    files = [read_yaml(path) for path in option_values(words, "config")]
    named = [str(content["method"]) for content in files if "method" in content]
    return [default, *named, *option_values(words, "method")][-1]


def _add_method_options(parser: ArgumentParser, method: str) -> None:
    from furina.adapters import methods

    if method == "base":
        return
    if method not in methods():
        known = nearest(method, [*methods(), "base"])
        raise ConfigurationError(f"Unknown method {method!r}.{known}")
    add_fields(parser, methods()[method], prefix="adapter.", title=f"options of method {method}")


def fit(options: Namespace) -> None:
    """Fine-tune, or go on where a killed run was, and say what came out."""
    from furina.experiment.config import RunConfig
    from furina.experiment.fit import fit as train

    given = options.as_dict()
    own = ("config", "run_dir", "show_groups")
    config = RunConfig(**{key: given[key] for key in given if key not in own})
    if options.show_groups:
        _print_groups(config)
        return
    run_dir = options.run_dir or Path("runs") / config.name
    training = train(config, run_dir).training
    print(f"loss {training.final_loss:.4f} after {training.steps} steps, {training.seconds:.0f} s")
    print(f"{training.trainable:,} of {training.total:,} parameters were trained")
    print(f"{run_dir / 'adapter'}: the adapter; next: furina evaluate --adapter-path")


def _print_groups(config: RunConfig) -> None:
    """Print the optimiser's groups and the parameters in each."""
    from furina.backbones import load_backbone
    from furina.inject import adapt, parameter_groups

    config.adapter_config()
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


def reproduce_options(parser: ArgumentParser, words: Sequence[str]) -> None:
    """Add the options of `furina reproduce`."""
    parser.add_argument(
        "suite",
        nargs="?",
        type=Path,
        default=Path("experiments") / MAIN_SUITE,
        help=f"folder of defaults.yaml and one file per method; experiments/{MAIN_SUITE} if none",
    )
    parser.add_argument(
        "--methods",
        nargs="+",
        type=str,
        default=["all"],
        help="only the runs of these methods",
    )
    parser.add_argument(
        "--full", action="store_true", help="score all test questions, into a suite of their own"
    )
    parser.add_argument(
        "--results", type=Path, default=Path("results"), help="folder that takes the records"
    )
    parser.add_argument(
        "--runs", type=Path, default=Path("runs"), help="folder of checkpoints and logs"
    )


def reproduce(options: Namespace) -> None:
    """Run what is missing, then regenerate the report and print the suite's tables.

    The runs that succeeded are reported even if others failed.
    """
    from furina.records import RecordError
    from furina.reproduce import FailedRunsError
    from furina.reproduce import reproduce as run_suite

    try:
        run_suite(
            options.suite,
            methods=options.methods,
            full=options.full,
            results=options.results,
            runs=options.runs,
        )
    except FailedRunsError:
        with suppress(RecordError):  # no run succeeded: there is nothing to report
            _report(options, fill_readme=False)
        raise
    _report(options, fill_readme=True)


def _report(options: Namespace, fill_readme: bool) -> None:
    from furina.reporting import print_tables, report

    name = options.suite.resolve().name + ("-full" if options.full else "")
    readme = default_readme() if fill_readme and name == MAIN_SUITE else None
    made = report(options.results, suite=name if readme else None, readme=readme)
    own = [table for table in made.tables if table.title.startswith(f"{name}: ")]
    print_tables(own or made.tables, console())
