"""benchmarks/serving/vllm_engine.py: its rule, what it asks of an engine, and what it writes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import furina
from benchmarks.common import models
from benchmarks.common.worker import WorkerError
from benchmarks.serving import vllm_checks, vllm_engine, vllm_models, vllm_page
from furina.errors import FurinaError
from tests.benchmarks import helpers
from tests.benchmarks.helpers import printed, written

SMALL = ["--backbone", "tiny-llama", "--rank", "8", "--experts", "4", "--task", "random"]
SMALL += ["--rounds", "2", "--warmup", "1", "--prompt-tokens", "6", "--new-tokens", "4"]
SMALL += ["--rows", "3", "--row-tokens", "8", "--generations", "3", "--threads", "1"]
SMALL += ["--dtype", "float32", "--relative-update", "0.1"]
WORKER = """
import json, sys
setup = json.loads(input())
if setup["rank"]:
    print(json.dumps({"error": "ValueError: no LoRA here\\nsecond line"}), flush=True)
    sys.exit()
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(setup["model"], dtype=torch.float32)
versions = {"vllm": "0", "torch (vllm)": "1"}
print(json.dumps({"seconds": 0.5, "versions": versions}), flush=True)


def follow(prompt, n):
    for _ in range(n):
        logits = model(torch.tensor([prompt])).logits[0, -1]
        prompt = [*prompt, int(logits.argmax())]
    return prompt[-n:]


def score(prompt):
    scores = model(torch.tensor([prompt])).logits[0, :-1].log_softmax(-1)
    real = scores.gather(-1, torch.tensor(prompt[1:])[:, None])[:, 0]
    return {"top": scores.argmax(-1).tolist(), "logprob": real.tolist()}


for line in sys.stdin:
    command, *rest = json.loads(line)
    if command == "times":
        answer = [0.25] + [0.125] * (rest[1] - 1)
    elif command == "generate":
        answer = [follow(prompt, rest[1]) for prompt in rest[0]]
    else:
        answer = [score(prompt) for prompt in rest[0]]
    print(json.dumps(answer), flush=True)
"""


@pytest.fixture
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Return a function that makes an environment whose worker is the program given."""

    def make(program: str) -> Path:
        made = helpers.environment(tmp_path, program)
        monkeypatch.setattr(vllm_engine, "WORKER", made / "worker.py")
        return made

    return make


def logits(*rows: list[float]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def test_an_error_is_what_rounding_does_to_the_lead_over_a_candidate():
    exact = logits([5.0, 3.0, 0.0], [1.0, 2.0, 1.5])
    rounded = logits([5.1, 3.5, 0.1], [1.0, 2.0, 2.25])
    found = vllm_checks.refer(exact, rounded, torch.tensor([0, 2]))
    assert found.top.tolist() == [0, 1]
    assert found.gap.tolist() == [2.0, 0.5]
    assert found.error.tolist() == pytest.approx([0.4, 0.75])  # 2 became 1.6, 0.5 became −0.25
    assert found.rounded_top.tolist() == [0, 2]
    assert found.logprob[0].item() == pytest.approx(exact[0].log_softmax(-1)[0].item())


def test_a_shift_of_all_logits_is_no_error():
    exact = logits([5.0, 3.0, 0.0])
    assert vllm_checks.refer(exact, exact + 7, torch.tensor([0])).error.item() == 0


def reference_of(top: list[int], gap: list[float], error: list[float]):
    zeros = torch.zeros(len(top), dtype=torch.float64)
    tops = torch.tensor(top)
    return vllm_checks.Reference(tops, logits(gap)[0], logits(error)[0], zeros, tops, zeros)


def test_a_lead_above_the_largest_error_decides_and_a_smaller_one_does_not():
    ours = reference_of([1, 2, 3, 4], [0.1, 0.6, 0.6, 0.5], [0.0, 0.5, 0.1, 0.1])
    told = torch.tensor([9, 2, 9, 9]), logits([0.0, 0.25, -0.5, 0.0])[0]
    found = vllm_checks.verdict(ours, *told, width=2)
    assert (found["positions"], found["allowed"]) == (4, 0.5)
    assert (found["decided"], found["exceptions"], found["disagree"]) == (2, 1, 3)
    assert found["largest_gap"] == 0.6
    assert found["logprob_error"] == {"median": 0.0, "max": 0.5}
    first = found["disagreements"][0]
    assert first == {"row": 1, "position": 0, "gap": 0.6, "ours": 3, "ours_rounded": 3, "theirs": 9}
    gaps = [each["gap"] for each in found["disagreements"]]
    assert gaps == sorted(gaps, reverse=True)


def test_an_engine_that_agrees_has_no_exception():
    ours = reference_of([1, 2], [0.1, 0.6], [0.2, 0.2])
    found = vllm_checks.verdict(ours, ours.top, ours.logprob, width=2)
    assert (found["exceptions"], found["disagree"], found["largest_gap"]) == (0, 0, None)
    assert found["disagreements"] == []


def test_what_an_update_changes_is_counted():
    base = reference_of([1, 2, 3], [1.0, 1.0, 1.0], [0.0, 0.0, 0.0])
    other = reference_of([1, 5, 6], [1.0, 0.1, 1.0], [0.2, 0.0, 0.0])
    assert vllm_checks.changed(base, other) == {"positions": 2, "decided": 1}


def test_generations_agree_up_to_the_first_other_token():
    assert vllm_checks.common_prefix([1, 2, 3], [1, 9, 3]) == 1
    assert vllm_checks.common_prefix([1, 2, 3], [1, 2, 3]) == 3
    found = vllm_checks.agreement([[1, 2], [3, 4]], [[1, 2], [5, 4]])
    assert found == {"equal": 0.5, "prefix": 1, "n": 2}
    with pytest.raises(ValueError):
        vllm_checks.agreement([[1, 2]], [[1]])


def times(*totals: float) -> list[dict[str, float]]:
    return [{"ttft_ms": 1.0, "per_token_ms": total / 10, "total_ms": total} for total in totals]


def test_a_ratio_is_the_median_of_the_rounds_own_and_lies_in_its_interval():
    rounds = {"base": times(4.0, 8.0, 3.0), "merged": times(2.0, 8.0, 9.0)}
    found = vllm_page.summary(rounds, new_tokens=10)
    assert found["ratios"]["merged/base"] == 1.0  # of 1/2, 1 and 3; the medians' quotient is 2
    assert found["ratios"]["merged/base/ttft_ms"] == 1.0
    low, high = found["intervals"]["merged/base"]
    assert (low, high) == (0.5, 3.0)
    assert found["intervals"]["merged/base/ttft_ms"] == (1.0, 1.0)
    assert found["tokens_per_second"]["base"] == 2500.0
    assert "adapter/base" not in found["ratios"]


def test_a_rank_gets_the_smallest_room_that_holds_it():
    room_for = vllm_engine.room_for
    assert [room_for(rank) for rank in (3, 8, 100, 128, 512)] == [8, 8, 128, 128, 512]
    with pytest.raises(FurinaError, match="up to rank 512, and this has rank 513"):
        room_for(513)


def test_rows_are_cut_of_whole_texts():
    rows = vllm_models.cut(["ab", "cde"], lambda text: [*map(ord, text.strip())], 4)
    assert [next(rows), next(rows)] == [[*map(ord, "abcd")], [*map(ord, "abcd")]]


def test_every_parameter_of_the_adapter_moves_and_the_update_has_the_size_asked_for(tmp_path):
    options = vllm_engine.parse([*SMALL, "--relative-update", "0.05", "--seed", "3"])
    exports = vllm_models.export(tmp_path, options)
    assert exports.relative_update == pytest.approx(0.05, rel=1e-3)
    model, fresh = (furina.load_backbone("tiny-llama", "float32") for _ in range(2))
    furina.load(exports.adapter, model)
    models.adapt(fresh, "furina", options)
    start = furina.adapter_parameters(fresh)
    for name, parameter in furina.adapter_parameters(model).items():
        assert (parameter != start[name]).float().mean() > 0.99, name


@pytest.mark.slow
def test_the_script_asks_each_engine_and_goes_on_where_one_fails(environment, tmp_path, capsys):
    results = tmp_path / "results"
    where = ["--vllm", str(environment(WORKER)), "--results", str(results)]
    vllm_engine.main([*SMALL, *where, "--only", "base", "merged", "adapter"])
    report = printed(capsys)
    assert report["failed"] == {"adapter": "ValueError: no LoRA here"}
    assert report["load_seconds"] == {"base": 0.5, "merged": 0.5}
    assert report["times"]["merged"]["ttft_ms"]["median"] == 250.0
    assert report["times"]["merged"]["total_ms"] == {"median": 625, "q1": 625, "q3": 625, "n": 2}
    assert report["ratios"]["merged/base"] == 1.0
    assert report["environment"]["packages"]["torch (vllm)"] == "1"
    for verdict in report["verdicts"].values():  # the worker is transformers itself
        assert (verdict["positions"], verdict["exceptions"]) == (21, 0)
        assert verdict["logprob_error"]["max"] < 1e-4
    assert report["agreements"]["merged and ours/merged"] == {"equal": 1.0, "prefix": 4, "n": 3}
    assert report["agreements"]["merged and base"]["equal"] < 1.0
    assert report["update"]["changed"]["positions"] > 0
    assert written(results / "engine") == (report, vllm_page.page(report).markdown("engine"))


def test_a_saved_adapter_is_exported_as_it_is(tmp_path):
    model = furina.load_backbone("tiny-llama", "float32")
    models.adapt(model, "furina", vllm_engine.parse([*SMALL, "--rank", "4"]))
    models.perturb(model, 0.2, seed=1)
    made = models.relative_update(model)
    furina.save(model, tmp_path / "saved")
    options = vllm_engine.parse([*SMALL, "--adapter-path", str(tmp_path / "saved")])
    exports = vllm_models.export(tmp_path / "exports", options)
    assert exports.rank == 4
    assert exports.relative_update == pytest.approx(made)
    merged = vllm_models.load("merged", exports, "float32", "cpu")
    beside = vllm_models.load("adapter", exports, "float32", "cpu")
    ids = torch.tensor([[5, 6, 7]])
    assert torch.allclose(merged(ids).logits, beside(ids).logits, atol=1e-4)


def test_the_table_is_made_from_the_json_alone():
    rounds = {"base": times(10.0, 20.0, 30.0), "merged": times(10.0, 20.0, 60.0)}
    hardware = {"cpu": "a processor", "accelerator": None, "cores": 2}
    settings = {"prompt_tokens": 6, "new_tokens": 10, "backbone": "tiny", "dtype": "bfloat16"}
    settings |= {"rows": 3, "row_tokens": 8, "threads": 1, "prompts": "random tokens"}
    disagreement = {"row": 1, "position": 4, "ours": 7, "ours_rounded": 7, "theirs": 8}
    sizes = {"median": 0.01, "max": 0.5}
    verdict = {"positions": 21, "allowed": 0.25, "decided": 9, "exceptions": 1, "disagree": 2}
    verdict |= {"disagree_rounded": 1, "largest_gap": 0.5, "logprob_error": sizes}
    verdict |= {"logprob_error_rounded": sizes}
    verdict["disagreements"] = [{**disagreement, "gap": 0.5}, {**disagreement, "gap": 0.125}]
    report = {
        "settings": {**settings, "adapter": None},
        "environment": {"hardware": hardware, "commit": None, "dirty": None}
        | {"packages": {"torch": "2", "vllm": "3", "torch (vllm)": "4"}},
        "command": "python -m benchmarks.serving.vllm_engine",
        "update": {"relative": 0.03, "rank": 8, "changed": {"positions": 5, "decided": 2}},
        "load_seconds": {"base": 1.0, "merged": 2.0},
        **vllm_page.summary(rounds, 10),
        "verdicts": {"merged": verdict},
        "agreements": {"merged and base": {"equal": 0.5, "prefix": 3.5, "n": 2}},
        "failed": {"adapter": "it cannot run"},
    }
    table = vllm_page.page(json.loads(json.dumps(report))).markdown("engine")
    assert "| base | 1.0 | 1.0 | 1.0 to 1.0 | 2.0 | 1.5 to 2.5 | 20.0 | 15.0 to 25.0 |" in table
    assert "adapter: it cannot run." in table
    assert "| merged/base | total | 1.000 | 1.000 to 2.000 |" in table
    assert "| merged | 21 | 0.25 | 9 | 1 | 2 | 1 | 0.5 |" in table
    assert "| merged | 1 | 4 | 0.5 | 7 | 7 | 8 |" in table  # only what exceeds the rule
    assert "0.125" not in table
    assert "| merged and base | 2 | 50 | 3.5 |" in table
    assert "torch 2, vllm 3, torch (vllm) 4" in table


def test_a_missing_environment_is_one_sentence(tmp_path):
    with pytest.raises(SystemExit, match=r"^error: vllm is not installed: run `make vllm`$"):
        vllm_engine.main([*SMALL, "--vllm", str(tmp_path)])


def test_a_dead_worker_is_one_sentence_with_its_last_words(environment):
    program = "import sys\ninput()\nprint('out of memory', file=sys.stderr)\nsys.exit(3)\n"
    with pytest.raises(WorkerError) as caught:
        vllm_engine.engine(environment(program), 1, {"model": "x"})
    assert str(caught.value) == "vLLM's process ended with status 3: out of memory"


def test_where_no_engine_runs_the_status_is_not_zero(environment, capsys):
    program = "import sys\ninput()\nsys.exit(3)\n"
    with pytest.raises(SystemExit, match="no engine ran: vLLM's process ended with status 3"):
        vllm_engine.main([*SMALL, "--vllm", str(environment(program))])
    report = printed(capsys)
    assert list(report["failed"]) == ["base", "merged", "adapter", "base_again"]


def test_an_engine_that_dies_while_it_is_timed_is_left_out_of_all_rounds(capsys):

    class Fake:
        def __init__(self, answers: int) -> None:
            self.left, self.closed = answers, False

        def ask(self, command, prompt, new_tokens):
            if not self.left:
                raise FurinaError("the process ended")
            self.left -= 1
            return [0.5] * new_tokens

        def close(self) -> None:
            self.closed = True

    short, engines, failed = Fake(2), {"base": Fake(9)}, {}
    engines["merged"] = short
    rounds = vllm_engine.time_rounds(engines, failed, 50, vllm_engine.parse(SMALL))
    assert list(rounds) == list(engines) == ["base"]
    assert len(rounds["base"]) == 2
    assert failed == {"merged": "the process ended"} and short.closed


@pytest.mark.parametrize(
    "wrong", [["--experts", "3"], ["--rows", "0"], ["--rounds", "-1"], ["--relative-update", "0"]]
)
def test_wrong_options_are_refused_before_anything_runs(wrong):
    with pytest.raises(SystemExit) as caught:
        vllm_engine.parse([*SMALL, *wrong])
    assert caught.value.code == 2
