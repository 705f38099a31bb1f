"""A suite is read strictly, runs what has no record, and leaves what the report is made from."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import yaml

from furina import adapt, describe, reproduce
from furina.data.tasks import get_task
from furina.errors import ConfigurationError, FurinaError
from furina.experiment import cell
from furina.experiment.config import RunConfig
from furina.records import RunRecord, SearchRecord, SelectionRecord
from furina.reporting import OutdatedReportError, report
from furina.reproduce import _VARIED, Suite, read_suite
from tests.experiment.helpers import OPTIONS, SIZES, SMALL, time_few_tokens, write_data
from tests.records.fakes import search_record, selection_record

SHIPPED = sorted((Path(__file__).parents[1] / "experiments").glob("*/defaults.yaml"))
SEARCH = {"study": "search"}


def write_suite(folder: Path, defaults: dict[str, Any], **files: dict[str, Any]) -> Path:
    folder.mkdir(parents=True)
    for name, content in {"defaults": defaults, **files}.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    return folder


def values(suite: Suite, *names: str) -> list[tuple[Any, ...]]:
    plain = [{**run.to_dict(), **run.adapter} for run in suite.runs]
    return [tuple(run.get(name) for name in names) for run in plain]


def lora(**content: Any) -> dict[str, Any]:
    return {"method": "lora", **content}


# Reading a suite


def test_defaults_hold_for_all_files_and_each_overrides_them(tmp_path: Path) -> None:
    folder = write_suite(tmp_path / "own", {"steps": 3}, a=lora(seed=1), b=lora(steps=4))
    suite = read_suite(folder)
    assert (suite.name, suite.study) == ("own", "cells")
    assert values(suite, "suite", "steps", "seed") == [("own", 3, 1), ("own", 4, 0)]


def test_a_mapping_sweeps_over_all_combinations(tmp_path: Path) -> None:
    name, factors = "magnitude_lr_multiplier", [2.0, 4.0]
    own = {"method": "furina", "sweep": {"seed": [0, 1], f"adapter.{name}": factors}}
    suite = read_suite(write_suite(tmp_path / "s", SEARCH, a=own))
    assert values(suite, "seed", name) == list(itertools.product([0, 1], factors))


def test_a_list_sweeps_over_its_points(tmp_path: Path) -> None:
    sweep = [{"seed": 0, "adapter.rank": 2}, {"seed": 1}]
    suite = read_suite(write_suite(tmp_path / "s", {}, a=lora(adapter={"rank": 8}, sweep=sweep)))
    assert values(suite, "seed", "rank") == [(0, 2), (1, 8)]


def test_the_sweeps_of_defaults_and_file_are_multiplied(tmp_path: Path) -> None:
    shared, own = {"task": ["arc_easy", "openbookqa"]}, {"seed": [0, 1]}
    folder = write_suite(tmp_path / "s", {"sweep": shared}, a=lora(sweep=own))
    assert values(read_suite(folder), "task", "seed") == [
        *(("arc_easy", 0), ("arc_easy", 1)),
        *(("openbookqa", 0), ("openbookqa", 1)),
    ]


@pytest.mark.parametrize(
    ("own", "expected"),
    [
        ({"sweep": {"seed": [5, 6]}}, [(5, 2), (5, 4), (6, 2), (6, 4)]),
        ({"seed": 7}, [(7, 2), (7, 4)]),
        ({"adapter": {"magnitude_lr_multiplier": 3.0}}, [(0, 3.0), (1, 3.0)]),
        ({"seed": 7, "adapter": {"magnitude_lr_multiplier": 3.0}}, [(7, 3.0)]),
    ],
)
def test_what_a_file_says_wins_over_the_sweep_of_defaults_and_leaves_no_duplicates(
    tmp_path: Path, own: dict[str, Any], expected: list[tuple[int, int]]
) -> None:
    name = "magnitude_lr_multiplier"
    defaults = {**SEARCH, "sweep": {"seed": [0, 1], f"adapter.{name}": [2.0, 4.0]}}
    suite = read_suite(write_suite(tmp_path / "s", defaults, a={"method": "furina", **own}))
    assert sorted(values(suite, "seed", name)) == expected


@pytest.mark.parametrize(
    ("defaults", "content", "file", "said"),
    [
        ({"study": "serch"}, lora(), "defaults", "unknown study 'serch'. Did you mean 'search'"),
        ({"stepz": 3}, lora(), "defaults", "'stepz'. Did you mean 'steps'"),
        ({}, lora(stepz=3), "a", "'stepz'. Did you mean 'steps'"),
        ({}, lora(sweep={"stepz": [3]}), "a", "'stepz'. Did you mean 'steps'"),
        ({}, lora(adapter={"rnk": 3}), "a", "'rnk'. Did you mean 'rank'"),
        ({}, lora(sweep={"adapter.rnk": [3]}), "a", "'rnk'. Did you mean 'rank'"),
        ({}, {"method": "lorra"}, "a", "'lorra'. Did you mean 'lora'"),
        ({}, lora(task="arc_esy"), "a", "'arc_esy'. Did you mean 'arc_easy'"),
        ({}, lora(learning_rate="5e-4"), "a", "learning_rate must be float"),
        ({}, lora(steps=0), "a", "steps=0 must be at least 1"),
        ({}, lora(adapter=None), "a", "adapter must hold options"),
        ({}, lora(sweep={"seed": 0}), "a", "sweep must map fields to lists"),
        ({}, lora(sweep={"seed": []}), "a", "sweep must map fields to lists"),
        ({}, lora(sweep=[0, 1]), "a", "sweep must map fields to lists"),
        ({"sweep": {"task": "arc_easy"}}, lora(), "defaults", "sweep must map fields to lists"),
        ({"adapter": {"dropout": 0.1}}, lora(), "defaults", "where the method is named"),
        ({"targets": ["q_proj"]}, {"method": "base"}, "a", "method base trains nothing"),
    ],
)
def test_a_mistake_is_one_sentence_with_the_file(
    tmp_path: Path, defaults: dict[str, Any], content: dict[str, Any], file: str, said: str
) -> None:
    folder = write_suite(tmp_path / "s", defaults, a=content)
    with pytest.raises(ConfigurationError) as caught:
        read_suite(folder)
    assert str(folder / f"{file}.yaml") in str(caught.value) and said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [("method: [", "is not YAML"), ("- lora", "must hold options"), ("", "must hold options")],
)
def test_a_file_that_holds_no_options_is_one_sentence(tmp_path: Path, text: str, said: str) -> None:
    folder = write_suite(tmp_path / "s", {}, a=lora())
    (folder / "a.yaml").write_text(text)
    with pytest.raises(ConfigurationError, match=said) as caught:
        read_suite(folder)
    assert str(folder / "a.yaml") in str(caught.value) and "\n" not in str(caught.value)


def test_the_defaults_may_leave_the_task_to_the_sweep(tmp_path: Path) -> None:
    shared = {"protocol": "cot", "sweep": {"task": ["gsm8k", "mawps"]}}
    suite = read_suite(write_suite(tmp_path / "s", shared, a=lora()))
    assert [run.task for run in suite.runs] == ["gsm8k", "mawps"]
    folder = write_suite(tmp_path / "t", {"protocol": "cot"}, a=lora())
    with pytest.raises(ConfigurationError, match="Protocol cot cannot ask arc_easy"):
        read_suite(folder)


def test_a_folder_that_is_no_suite_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="There is no suite file"):
        read_suite(tmp_path / "nowhere")
    with pytest.raises(ConfigurationError, match="holds no runs"):
        read_suite(write_suite(tmp_path / "empty", {}))


def test_two_cells_of_one_name_are_refused_before_one_overwrites_the_other(tmp_path: Path) -> None:
    folder = write_suite(tmp_path / "s", {}, a=lora(sweep={"learning_rate": [0.1, 0.2]}))
    with pytest.raises(ConfigurationError, match="more than one run of lora on arc_easy, seed 0"):
        read_suite(folder)


def test_two_trials_that_differ_in_nothing_their_records_name_are_refused(tmp_path: Path) -> None:
    shared = {"study": "search"}
    varied = {"learning_rate": [0.1, 0.2], "steps": [3, 4]}
    assert len(read_suite(write_suite(tmp_path / "ok", shared, a=lora(sweep=varied))).runs) == 4
    folder = write_suite(tmp_path / "s", shared, a=lora(sweep={"batch_size": [8, 16]}))
    with pytest.raises(
        ConfigurationError, match="differ in none of: protocol, learning_rate, steps"
    ):
        read_suite(folder)


@pytest.mark.parametrize(
    ("study", "record"),
    [
        ("search", search_record("lora", "arc_easy", 0.1, 0.5)),
        ("selection", selection_record(0, 0.1, 0.5)),
    ],
)
def test_records_are_named_by_all_that_runs_of_a_study_may_differ_in(study, record) -> None:
    """A field is varied exactly if another value of it gives the record another name."""
    changes = {
        "protocol": {"protocol": "label"},
        "learning_rate": {"learning_rate": 0.3},
        "steps": {"steps": 7},
        "adapter.magnitude_lr_multiplier": {"magnitude_multiplier": 3.0},
        "adapter.selection_reduction": {"reduction": "mean"},
        "adapter.selection_coefficient": {"coefficient": 0.7},
    }
    fields = {field.name for field in dataclasses.fields(record)}
    naming = {
        name
        for name, change in changes.items()
        if set(change) <= fields
        and dataclasses.replace(record, **change).file_name != record.file_name
    }
    assert naming == set(_VARIED[study])


def test_a_suite_is_named_by_its_folder_wherever_it_is_called_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(write_suite(tmp_path / "own", {}, a=lora()))
    suite = read_suite(Path("."))
    assert (suite.name, suite.runs[0].suite) == ("own", "own")


def smollm2_without_weights() -> torch.nn.Module:
    """Return a model of SmolLM2-135M's shapes, which the shipped ranks and allocations are for."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sides = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30}
    heads = {"num_attention_heads": 9, "num_key_value_heads": 3}
    with torch.device("meta"):
        return LlamaForCausalLM(LlamaConfig(**sides, **heads))


@pytest.mark.parametrize("defaults", SHIPPED, ids=lambda path: path.parent.name)
def test_every_shipped_run_builds_its_adapter(defaults: Path) -> None:
    suite = read_suite(defaults.parent)
    assert suite.runs
    for options in {json.dumps([run.method, run.adapter, run.targets]) for run in suite.runs}:
        method, adapter, targets = json.loads(options)
        if method != "base":
            model = adapt(smollm2_without_weights(), method, targets=targets, **adapter)
            assert describe(model).trainable > 0
    assert all(get_task(task) for run in suite.runs for task in run.trained)


@pytest.mark.parametrize(
    "file", sorted(path for d in SHIPPED for path in d.parent.glob("*.yaml")), ids=lambda p: p.stem
)
def test_the_first_line_of_a_shipped_file_is_the_command_that_runs_it(file: Path) -> None:
    comment, *words = file.read_text().splitlines()[0].split()
    assert (comment, words[:2]) == ("#", ["furina", "reproduce"])
    assert words[2] == f"experiments/{file.parent.name}"
    named = yaml.safe_load(file.read_text()).get("method")
    assert words[3:] == (["--methods", named] if named else [])


# Running a suite: what is run, with a stand-in for the cells


class StandIn:
    """Write a small file in place of a record, and note what was run."""

    def __init__(self) -> None:
        self.ran: list[RunConfig] = []
        self.commands: list[str] = []

    def __call__(self, suite: Suite, config: RunConfig, run_dir: Path, results: Path) -> Path:
        self.ran.append(config)
        self.commands.append(suite.command(config))
        if config.seed == 13:
            raise FurinaError("an unlucky seed")
        file = results / config.suite / f"{config.name}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(config.to_dict()))
        return file


class Place(NamedTuple):
    root: Path
    stand_in: StandIn

    def run(self, suite: Path, **options: Any) -> list[tuple[str, int]]:
        """Return (method, seed) of the runs that this call did not skip."""
        self.stand_in.ran.clear()
        places = {"results": self.root / "results", "runs": self.root / "runs"}
        reproduce.reproduce(suite, **places, **options)
        return [(config.method, config.seed) for config in self.stand_in.ran]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    stand_in = StandIn()
    monkeypatch.setitem(reproduce._STUDIES, "cells", stand_in)
    return Place(tmp_path, stand_in)


@pytest.fixture
def pair(tmp_path: Path) -> Path:
    files = {"base": {"method": "base"}, "lora": lora(sweep={"seed": [0, 1]})}
    return write_suite(tmp_path / "pair", {}, **files)


def test_what_has_its_record_is_skipped(place: Place, pair: Path) -> None:
    assert place.run(pair) == [("base", 0), ("lora", 0), ("lora", 1)]
    assert place.run(pair) == []
    (place.root / "results" / "pair" / "lora--arc_easy--seed1.json").unlink()
    assert place.run(pair) == [("lora", 1)]


def test_a_record_that_other_settings_replaced_is_not_taken_for_ones_own(
    place: Place, pair: Path
) -> None:
    first = (pair / "base.yaml").read_text()
    place.run(pair)
    (pair / "base.yaml").write_text("method: base\ntest_size: 7\n")
    assert place.run(pair) == [("base", 0)]
    (pair / "base.yaml").write_text(first)
    assert place.run(pair) == [("base", 0)]
    record = json.loads((place.root / "results/pair/base--arc_easy--seed0.json").read_text())
    assert record["test_size"] == RunConfig().test_size


def test_only_the_chosen_methods_run(place: Place, pair: Path) -> None:
    assert place.run(pair, methods=["base"]) == [("base", 0)]
    assert place.run(pair, methods=["all"]) == [("lora", 0), ("lora", 1)]
    assert place.stand_in.commands[0] == f"furina reproduce {pair} --methods base"


def test_a_method_that_the_suite_lacks_suggests_the_nearest(place: Place, pair: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"'lorra'.*Did you mean 'lora'") as caught:
        place.run(pair, methods=["lorra"])
    assert str(pair) in str(caught.value) and place.stand_in.ran == []


def test_full_takes_all_test_questions_into_a_suite_of_its_own(place: Place, pair: Path) -> None:
    place.run(pair)
    assert len(place.run(pair, full=True)) == 3
    assert {(run.test_size, run.suite) for run in place.stand_in.ran} == {(None, "pair-full")}
    assert place.stand_in.commands[-1].endswith("--methods lora --full")
    assert {path.name for path in (place.root / "results").iterdir()} == {"pair", "pair-full"}
    assert place.run(pair) == []


def test_full_is_refused_where_it_would_be_ignored(tmp_path: Path) -> None:
    folder = write_suite(tmp_path / "s", SEARCH, a=lora())
    with pytest.raises(ConfigurationError, match="--full would be ignored"):
        reproduce.reproduce(folder, full=True, results=tmp_path, runs=tmp_path)


def test_a_failure_does_not_stop_the_others_and_is_reported_at_the_end(
    place: Place, tmp_path: Path
) -> None:
    folder = write_suite(tmp_path / "s", {}, a=lora(sweep={"seed": [13, 14]}))
    with pytest.raises(FurinaError, match="1 of 2 runs failed: lora on arc_easy, seed 13: an unl"):
        place.run(folder)
    assert [run.seed for run in place.stand_in.ran] == [13, 14]
    with pytest.raises(FurinaError):
        place.run(folder)
    assert [run.seed for run in place.stand_in.ran] == [13]


# Running suites for real, on the tiny Llama


class World(NamedTuple):
    root: Path
    results: Path
    runs: Path
    failure: str


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """Results of a suite of cells of which one diverges, a search and a selection study."""
    root = tmp_path_factory.mktemp("world")
    results, runs = root / "results", root / "runs"
    shared = {**SMALL, "steps": 2, "data_dir": write_data(root / "data")}
    base, furina = {"method": "base"}, {"method": "furina", "adapter": OPTIONS["furina"]}
    wild = lora(learning_rate=1e30, warmup_steps=0)
    write_suite(root / "cells", shared, a=wild, b=base, c=furina)
    options = {**furina["adapter"], "magnitude_lr_multiplier": 2.0}
    write_suite(
        root / "search", {**shared, **SEARCH}, a=wild, b=base, c={**furina, "adapter": options}
    )
    sweep = {"adapter.selection_coefficient": [0.01, 0.0]}
    write_suite(root / "selection", {**shared, "study": "selection"}, c={**furina, "sweep": sweep})
    with pytest.MonkeyPatch.context() as patch:
        time_few_tokens(patch)
        for name in ("search", "selection"):
            reproduce.reproduce(root / name, results=results, runs=runs)
        with pytest.raises(FurinaError) as caught:
            reproduce.reproduce(root / "cells", results=results, runs=runs)
        yield World(root, results, runs, str(caught.value))


def test_a_diverged_cell_leaves_its_record_and_the_others_are_run(world: World) -> None:
    assert "1 of 3 runs failed: lora on arc_easy, seed 0: Training diverged" in world.failure
    records = {r.method: r for r in map(RunRecord.read, (world.results / "cells").glob("*.json"))}
    assert {method: record.status for method, record in records.items()} == {
        "base": "success",
        "furina": "success",
        "lora": "diverged",
    }
    assert records["base"].command == f"furina reproduce {world.root / 'cells'} --methods base"
    assert {s.variant for s in records["furina"].evaluations} == {"unmerged", "merged"}


def test_only_the_diverged_cell_runs_again(
    world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*arguments: Any, **options: Any) -> None:
        raise AssertionError("a finished cell was run again")

    monkeypatch.setattr(cell, "evaluate", fail)
    monkeypatch.setattr(cell, "measure_latency", fail)
    with pytest.raises(FurinaError, match="1 of 3 runs failed: lora"):
        reproduce.reproduce(world.root / "cells", results=world.results, runs=world.runs)
    assert capsys.readouterr().out.count("skipped") == 2


def test_a_search_writes_its_trials(world: World) -> None:
    files = (world.results / "search").glob("*.json")
    trials = {trial.method: trial for trial in map(SearchRecord.read, files)}
    assert trials.keys() == {"base", "furina", "lora"}
    assert trials["lora"].value is None and trials["base"].value is not None
    assert (trials["furina"].magnitude_multiplier, trials["furina"].steps) == (2.0, 2)


def test_a_selection_study_writes_its_runs(world: World) -> None:
    runs = [SelectionRecord.read(file) for file in (world.results / "selection").glob("*.json")]
    by_coefficient = {run.coefficient: run for run in runs}
    assert by_coefficient.keys() == {0.01, 0.0}
    assert by_coefficient[0.01].gradient_ratio is not None
    assert by_coefficient[0.0].gradient_ratio is None
    assert len({run.top_k_share for run in runs}) == 2


def test_the_report_is_made_from_it_and_holds_right_afterwards(world: World) -> None:
    readme = world.root / "README.md"
    readme.write_text("<!-- furina:table begin -->\n<!-- furina:table end -->\n")
    made = report(world.results, readme=readme)
    assert {path.parent.parent.name for path in made.files if path != readme} == {
        "cells",
        "search",
        "selection",
    }
    text = readme.read_text()
    assert "furina" in text and "lora" in text and "base" in text
    report(world.results, readme=readme, check=True)
    readme.write_text(text.replace("base", "basis", 1))
    with pytest.raises(OutdatedReportError, match="README"):
        report(world.results, readme=readme, check=True)


def test_full_scores_every_test_question(world: World) -> None:
    options = {"methods": ["base"], "full": True}
    (file,) = reproduce.reproduce(
        world.root / "cells", results=world.results / "all", runs=world.runs, **options
    )
    record = RunRecord.read(file)
    assert file.parent == world.results / "all" / "cells-full" and record.suite == "cells-full"
    assert {score.n for score in record.evaluations} == {SIZES["test"]}
    assert record.data[0].test_subset == "full"
