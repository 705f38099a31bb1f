"""The command line: it teaches, it names every mistake in one sentence, and it starts quickly."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from lightning.pytorch.utilities.exceptions import SIGTERMException

from furina import cli
from furina.adapters import methods
from furina.cli.commands import COMMANDS
from furina.errors import ConfigurationError
from furina.experiment.config import RunConfig

Cli = Callable[..., tuple[int, str, str]]


@pytest.fixture
def furina(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Cli:
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.delenv("FURINA_DEBUG", raising=False)

    def call(*words: str) -> tuple[int, str, str]:
        status = cli.main(words)
        return status, *capsys.readouterr()

    return call


def fails_in_one_sentence(result: tuple[int, str, str], *expected: str) -> bool:
    status, _, message = result
    lines = message.strip().splitlines()
    assert status == 2, message
    assert len(lines) == 1 and lines[0].startswith("error: ") and "Traceback" not in message
    assert all(words in message for words in expected), message
    return True


def test_the_overview_lists_every_command(furina: Cli) -> None:
    status, out, _ = furina("--help")
    assert status == 0
    assert all(f"  {name} " in out for name in COMMANDS)
    assert furina() == (status, out, "")


@pytest.mark.parametrize("name", COMMANDS)
def test_help_shows_an_example_and_explains_every_option(name: str, furina: Cli) -> None:
    status, out, _ = furina(name, "--help")
    assert status == 0
    assert COMMANDS[name].example.startswith(f"furina {name}")
    assert f"example:\n  {COMMANDS[name].example}\n" in out
    for action in COMMANDS[name].parser([])._actions:
        assert action.help, f"{name} does not explain {action.option_strings or action.dest}"


@pytest.mark.parametrize("name", COMMANDS)
def test_an_example_is_accepted_by_its_own_parser(name: str) -> None:
    from furina.cli.parsing import parse

    words = COMMANDS[name].example.split()[2:]
    parse(COMMANDS[name].parser(words), words)


def test_a_misspelt_option_is_not_answered_with_the_whole_list(furina: Cli) -> None:
    _, _, message = furina("fit", "--lerning-rate", "1")
    assert message == (
        "error: furina fit has no option --lerning-rate. Did you mean '--learning-rate'? "
        "`furina fit --help` lists all.\n"
    )


def test_help_and_methods_load_neither_lightning_nor_lm_eval() -> None:
    program = (
        "import sys; from furina.cli import main; main(sys.argv[1:]); "
        "print(*{n.split('.')[0] for n in sys.modules}, file=sys.stderr)"
    )
    heavy = {"torch", "lightning", "lm_eval", "transformers"}
    for words, absent in ((["--help"], heavy), (["methods"], {"lightning", "lm_eval"})):
        done = subprocess.run(
            [sys.executable, "-c", program, *words], capture_output=True, text=True, check=True
        )
        assert not absent & set(done.stderr.split()), words


def test_a_report_needs_neither_torch_nor_lightning(tmp_path: Path) -> None:
    program = (
        "import sys; from furina.cli import main; status = main(sys.argv[1:]); "
        "assert status == 2 and 'furina.reporting' in sys.modules; "
        "assert not {'torch', 'lightning', 'transformers', 'lm_eval'} & set(sys.modules)"
    )
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "damaged.json").write_text("{}")
    words = ["report", "--results", str(tmp_path)]
    subprocess.run([sys.executable, "-c", program, *words], check=True)


def test_methods_are_listed_with_mergeability_and_formula(furina: Cli) -> None:
    status, out, _ = furina("methods", "--json")
    listed = json.loads(out)
    assert status == 0
    assert [row["name"] for row in listed] == list(methods())
    for row in listed:
        assert isinstance(row["mergeable"], bool) and row["reason"] and row["parameters"]
        assert row["options"] == methods()[row["name"]]().to_dict()
        counts = row["llama_2_7b"]
        assert 0 < counts["without_router"] <= counts["trainable"]
        assert 0 < counts["active"] <= counts["trainable"]
    assert all(row["name"] in furina("methods")[1] for row in listed)


def test_show_groups_lists_every_trained_parameter_once_and_trains_nothing(
    furina: Cli, tmp_path: Path
) -> None:
    words = ["fit", "--method", "furina", "--backbone", "tiny-llama", "--show-groups"]
    words += ["--run-dir", str(tmp_path / "run"), "--learning-rate", "0.001"]
    words += ["--lora-plus-ratio", "4", "--adapter.magnitude-lr-multiplier", "30"]
    status, out, _ = furina(*words)
    assert status == 0 and not (tmp_path / "run").exists()
    rates = [line.split(",")[0] for line in out.splitlines() if line.startswith("learning rate")]
    assert rates == ["learning rate 0.001", "learning rate 0.004", "learning rate 0.03"]
    names = [line.strip() for line in out.splitlines() if line.startswith("  ")]
    assert len(names) == len(set(names)) == 3 * 14


def test_the_version_is_the_packages(furina: Cli) -> None:
    from furina import __version__

    assert furina("--version") == (0, f"furina {__version__}\n", "")


def test_an_unknown_command_suggests_the_nearest(furina: Cli) -> None:
    assert fails_in_one_sentence(furina("evalute"), "'evalute'", "Did you mean 'evaluate'?")
    assert fails_in_one_sentence(furina("--jsno"), "name a command first")


@pytest.mark.parametrize("name", COMMANDS)
def test_a_misspelt_option_suggests_the_nearest(name: str, furina: Cli) -> None:
    options = COMMANDS[name].parser([])._option_string_actions
    for option in [option for option in options if option.startswith("--")][::5]:
        wrong = option[:-2] + option[-1] + option[-2] + "q"
        result = furina(name, wrong, "1")
        assert fails_in_one_sentence(result, f"has no option {wrong}.", "Did you mean '--")


def test_a_misspelt_method_option_suggests_the_nearest(furina: Cli) -> None:
    result = furina("fit", "--method", "lora", "--adapter.rnak", "8")
    assert fails_in_one_sentence(result, "--adapter.rnak", "Did you mean '--adapter.rank'?")


def test_an_option_of_another_method_is_refused(furina: Cli) -> None:
    assert fails_in_one_sentence(
        furina("fit", "--method", "lora", "--adapter.num_experts", "8"), "--adapter.num_experts"
    )


def test_an_unknown_method_suggests_the_nearest(furina: Cli) -> None:
    result = furina("fit", "--method", "furnia")
    assert fails_in_one_sentence(result, "Unknown method 'furnia'", "Did you mean 'furina'?")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("stpes: 3", "unknown key 'stpes'. Did you mean 'steps'?"),
        ("adapter: {rnak: 3}", "unknown key 'adapter.rnak'. Did you mean 'adapter.rank'?"),
        ("- steps", "must hold options"),
        ("steps: [", "cannot be read as YAML"),
        ("steps: 3\nseed: 1\nsteps: 4", "'steps' is given twice"),
        ("adapter: 5", "adapter must hold options"),
        ("adapter: {rank: 3, rank: 4}", "'rank' is given twice"),
        ("{method: base, adapter: {rank: 3}}", "unknown key 'adapter.rank'"),
        ("method: furnia", "Did you mean 'furina'?"),
    ],
)
def test_a_wrong_config_file_is_one_sentence(
    text: str, expected: str, furina: Cli, tmp_path: Path
) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    assert fails_in_one_sentence(furina("fit", "--config", str(path)), expected)


def test_a_missing_config_file_is_one_sentence(furina: Cli) -> None:
    result = furina("fit", "--config", "absent.yaml")
    assert fails_in_one_sentence(result, "absent.yaml: no such file or folder")


def test_the_command_line_wins_over_the_file_wherever_it_stands(tmp_path: Path) -> None:
    from furina.cli.parsing import parse

    path = tmp_path / "config.yaml"
    path.write_text("method: lora\nsteps: 3\nlearning_rate: 1e-4\nadapter: {rank: 4}\n")
    for words in (
        ["--steps", "5", "--adapter.rank", "8", "--config", str(path)],
        [f"--config={path}", "--adapter.rank=8", "--steps=5"],
    ):
        parsed = parse(COMMANDS["fit"].parser(words), words)
        assert (parsed.steps, parsed.adapter.rank, parsed.method) == (5, 8, "lora")
        assert parsed.learning_rate == 1e-4


@pytest.mark.parametrize(
    ("words", "steps", "epochs", "warm_up"),
    [
        ([], 60, None, 5),
        (["--epochs", "2"], None, 2, 5),
        (["--steps", "7"], 7, None, 5),
        (["--steps", "3"], 3, None, 3),
        (["--steps", "3", "--warmup-steps", "0"], 3, None, 0),
        (["--steps", "null", "--epochs", "3"], None, 3, 5),
        (["--config", "epochs.yaml"], None, 4, 5),
        (["--config", "warm_up.yaml", "--steps", "3"], 3, None, 2),
    ],
)
def test_epochs_stand_in_place_of_steps_and_the_warm_up_follows_few_steps(
    words: list[str],
    steps: int | None,
    epochs: int | None,
    warm_up: int,
    furina: Cli,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(config: RunConfig, _: Path) -> None:
        raise ConfigurationError(
            f"steps {config.steps}, epochs {config.epochs}, warm-up {config.warmup_steps}"
        )

    monkeypatch.setattr("furina.experiment.fit.fit", refuse)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "epochs.yaml").write_text("epochs: 4\n")
    (tmp_path / "warm_up.yaml").write_text("warmup_steps: 2\n")
    result = furina("fit", "--backbone", "tiny-llama", *words)
    assert fails_in_one_sentence(result, f"steps {steps}, epochs {epochs}, warm-up {warm_up}")


def test_dashes_and_underscores_in_option_names_are_alike() -> None:
    from furina.cli.parsing import parse

    for words in (["--learning_rate", "3e-4"], ["--learning-rate=3e-4"]):
        assert parse(COMMANDS["fit"].parser(words), words).learning_rate == 3e-4


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["fit", "--steps", "many"], "--steps must be a whole number"),
        (["fit", "--learning-rate", "fast"], "--learning-rate must be a number"),
        (["export", "a", "b", "--format", "pefd"], "Did you mean 'peft'?"),
        (["merge", "a"], "required: out_dir"),
        (["merge", "absent", "out"], "absent is not a furina adapter folder"),
        (["assets", "smollm"], "There is no asset 'smollm'"),
        (["methods", "lora"], "unrecognized arguments: lora"),
        (["fit", "--steps"], "expected one argument"),
        (["run", "man"], "There is no suite man, a folder with defaults.yaml. Did you mean 'main'"),
        (["run", "quickstart", "--scale", "cpu"], "has one scale only: leave out --scale cpu"),
        (["run", "main", "--scale", "huge"], "--scale cannot be 'huge'. Known: cpu, paper"),
        (["run", "main", "--rows", "furna"], "no runs of row 'furna'. Did you mean 'furina'"),
        (["run", "main", "--tasks", "boolk"], "no runs of task 'boolk'. Did you mean 'boolq'"),
        (["run", "main", "--seeds", "0"], "--seeds 0 must be at least 1"),
        (["run", "main", "--jobs", "0"], "--jobs 0 must be at least 1"),
        (["run", "main", "--slurm.hours", "3"], "have no effect without --cluster slurm"),
        (["run", "main", "--device", "h200"], "--device has no effect without --dry-run"),
        (["run", "main", "--dry-run", "--device", "h201"], "Did you mean 'h200'"),
        (["run", "main", "--results", "README.md/x"], "README.md is a file, not a folder"),
        (["run", "main", "--runs", "README.md", "--dry-run"], "README.md is a file, not a folder"),
        (["evaluate", "--task", "arc_easy", "--output", "README.md/x"], "README.md is a file"),
        (["report", "--metric", "acc_nrm"], "No record holds a metric 'acc_nrm'. Did you mean"),
        (["report", "--check", "--metric", "acc_norm"], "leave out --metric"),
        (["fit", "--learning-rate", "-1"], "learning_rate=-1.0 must be larger than 0"),
    ],
)
def test_wrong_input_is_one_sentence(words: list[str], expected: str, furina: Cli) -> None:
    assert fails_in_one_sentence(furina(*words), expected)


def _ended_by_lightning(interrupt: BaseException) -> SystemExit:
    """Return what Lightning's Trainer makes of Ctrl-C."""
    try:
        try:
            raise interrupt
        except BaseException:
            sys.exit(1)
    except SystemExit as error:
        return error


@pytest.mark.parametrize(
    ("error", "status", "expected"),
    [
        (OSError(errno.ENOSPC, "No space left", "x.bin"), 2, "x.bin: the disk is full"),
        (PermissionError(errno.EACCES, "Permission denied", "x"), 2, "x: permission denied."),
        (FileNotFoundError(errno.ENOENT, "No such file", "x"), 2, "x: no such file or folder."),
        (RuntimeError("odd"), 1, "RuntimeError: odd (this is a bug; --debug shows the traceback)"),
        (KeyboardInterrupt(), 130, "stopped"),
        (SIGTERMException(), 143, "stopped"),
        (_ended_by_lightning(KeyboardInterrupt()), 130, "stopped"),
    ],
)
def test_what_a_command_raises_becomes_a_sentence_and_a_status(
    error: BaseException, status: int, expected: str, furina: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr("furina.adapters.methods", fail)
    found, _, message = furina("methods")
    assert found == status
    assert expected in message and "Traceback" not in message


@pytest.mark.parametrize("through", ["option", "variable"])
def test_debug_shows_the_traceback(
    through: str, furina: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    if through == "variable":
        monkeypatch.setenv("FURINA_DEBUG", "1")
    words = ["--debug"] if through == "option" else []
    status, _, message = furina("merge", "absent", "out", *words)
    assert status == 2
    assert "Traceback" in message


def test_a_warning_is_one_line_without_source_code(
    furina: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    import warnings

    monkeypatch.setattr(
        "furina.adapters.methods", lambda: warnings.warn("beware", stacklevel=1) or {}
    )
    assert furina("methods")[2] == "warning: beware\n"


def test_an_existing_folder_is_never_overwritten(furina: Cli, tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "furina_config.json").write_text("{}")
    precious = tmp_path / "home" / "precious.txt"
    precious.parent.mkdir()
    precious.write_text("mine")
    furina("merge", str(tmp_path / "adapter"), str(precious.parent))
    assert precious.read_text() == "mine"


def test_the_reader_of_a_pipe_may_leave_early() -> None:
    done = subprocess.run(
        f"{sys.executable} -m furina methods --json | head -1",
        shell=True,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    assert (done.stdout, done.stderr) == ("[\n", "")
