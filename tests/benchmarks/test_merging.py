"""benchmarks/merging: its numbers are those of a hand, and it sees what would break."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import furina
from benchmarks.common import models, rounds
from benchmarks.merging import error, measures, page, quantised
from furina.model.state import state_of
from tests.benchmarks.helpers import printed, written
from tests.experiment.helpers import write_data

SMALL = ["--backbone", "tiny-llama", "--rank", "8", "--experts", "4", "--cycles", "2"]
SMALL += ["--items", "6", "--sequences", "3", "--batch-size", "4", "--threads", "1"]
SMALL += ["--only", "lora", "furina"]


@pytest.fixture(scope="module", autouse=True)
def questions(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Made-up questions to ask."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FURINA_DATA_DIR", write_data(tmp_path_factory.mktemp("data")))
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("results")


@pytest.fixture(scope="module")
def report(folder: Path) -> dict[str, Any]:
    with contextlib.redirect_stdout(io.StringIO()) as written:
        error.main([*SMALL, "--results", str(folder)])
    made: dict[str, Any] = json.loads(written.getvalue().splitlines()[-1])
    return made


def adapted(method: str = "lora", dtype: str = "float32"):
    model = furina.load_backbone("tiny-llama", dtype)
    furina.adapt(model, method, rank=4, dropout=0.0, seed=0)
    models.perturb(model, 0.05, seed=0)
    return model


def answers(*chosen: int, loglikelihoods: tuple[float, ...] = ()):
    return measures.Answers(list(chosen), [list(loglikelihoods)])


def test_the_script_measures_each_method_in_each_dtype_and_writes_what_it_prints(report, folder):
    cases = [(case["method"], case["dtype"]) for case in report["cases"]]
    dtypes = ("float32", "bfloat16", "float16")
    assert cases == [(method, dtype) for method in ("furina", "lora") for dtype in dtypes]
    assert report["failed"] == {}
    assert report["settings"]["batch_size"] == 4 and report["data"]["subset"] == "subset-6-seed0"
    assert "flips/furina/bfloat16/merged_over_batch" in report["ratios"]
    assert written(folder / "merging") == (report, page.page(report).markdown("merging"))


def test_weights_are_rounded_once_and_nothing_drifts(report):
    for case in report["cases"]:
        # Torch goes from float64 to 16 bits by way of float32.
        most = 0.5 if case["dtype"] == "float32" else 0.5 + 1e-4
        assert 0.45 < case["weights"]["ulps"] <= most
        assert case["drift"] == {"linears": 7, "cycles": 2, "unmerged": 0, "merged": 0}
        assert case["bytes_after_removal"] == 0
        assert 0.045 < case["relative_update"] < 0.055


def test_logits_are_as_far_apart_as_the_dtype_makes_them(report):
    """In fp32 2^-24, in fp16 2^-11 and in bf16 2^-8 of a logit, and some dozens of roundings."""
    for case in report["cases"]:
        unit = {"float32": 2**-24, "float16": 2**-11, "bfloat16": 2**-8}[case["dtype"]]
        for name in ("merged", "merged_exact", "unmerged_exact"):
            assert unit / 2 < case["logits"][name]["relative"] < 30 * unit
        assert case["logits"]["merged"]["n"] > 3 * 20
        assert 0 <= case["answers"]["merged"] <= case["answers"]["n"] == 6


def test_a_quantised_base_is_compared_in_float32_only(report):
    for case in report["cases"]:
        found = {quantised["bits"]: quantised for quantised in case.get("quantised", ())}
        assert set(found) == ({8, 4} if case["dtype"] == "float32" else set())
        for name in ("beside", "after") if found else ():
            eight, four = (found[bits]["weights"][name]["relative"] for bits in (8, 4))
            assert 0.003 < eight < 0.01 and 0.05 < four < 0.2


def test_every_entry_of_every_adapter_is_moved_and_every_update_is_as_large_as_asked():
    for method in ("furina", "pissa", "dora"):
        model = furina.load_backbone("tiny-llama", "float32")
        furina.adapt(model, method, rank=4, dropout=0.0, seed=0)
        before = {n: p.detach().clone() for n, p in furina.adapter_parameters(model).items()}
        models.perturb(model, 0.05, seed=0)
        for name, parameter in furina.adapter_parameters(model).items():
            assert (parameter != before[name]).float().mean() > 0.99, name
        for layer in state_of(model).layers.values():
            ratio = layer.delta().norm() / layer.pristine_weight.double().norm()
            assert 0.045 <= ratio <= 0.055


def test_the_error_of_a_known_rounding_is_the_one_of_a_hand():
    exact = torch.tensor([[1.0 + 2**-9, 3.0]], dtype=torch.float64)
    stored = exact.to(torch.bfloat16)  # between 1 and 2 bf16 counts by 2^-7
    found = measures.weight_difference(iter([(stored, exact)]))
    assert found["max_abs"] == 2**-9
    assert found["relative"] == pytest.approx(2**-9 / ((1 + 2**-9) ** 2 + 9) ** 0.5)
    assert measures.ulps(stored, exact) == 0.25


def test_logits_are_compared_position_by_position():
    one = torch.tensor([[1.0, 0.0], [0.0, 3.0], [0.0, 1.0]])
    other = torch.tensor([[1.0, 0.0], [4.0, 3.0], [0.0, 1.0]])
    found = measures.logit_difference(one, other, exact=torch.tensor([[2.0, 0.0]] * 3))
    assert (found["max_abs"], found["changed"], found["n"]) == (4.0, 1, 3)
    assert found["relative"] == pytest.approx(4 / 12**0.5)


def test_padding_and_batches_do_not_move_the_logits_of_a_text():
    model = furina.load_backbone("tiny-llama", "float64")
    texts = [[5, 6, 7, 8], [9, 10], [11, 12, 13]]
    alone, together = measures.logits(model, texts, 1), measures.logits(model, texts, 2)
    assert alone.shape == (9, 384)
    assert torch.allclose(alone, together, atol=1e-12)
    assert torch.allclose(alone[4:6], model(torch.tensor([texts[1]])).logits[0], atol=1e-12)


def test_changed_answers_are_counted():
    assert measures.flips(answers(0, 1, 2, 3), answers(0, 2, 2, 0)) == 2
    one, other = (answers(0, loglikelihoods=x) for x in ((-1.0, -2.0), (-4.0, -6.0)))
    assert measures.loglikelihood_change(one, other) == pytest.approx(12.5**0.5)


def test_an_unmerge_that_is_off_by_one_bit_is_drift(monkeypatch):
    model = adapted()
    assert measures.drift(model, 3) == {"linears": 14, "cycles": 3, "unmerged": 0, "merged": 0}
    unmerge = furina.unmerge

    def careless(model: torch.nn.Module) -> None:
        unmerge(model)
        weight = next(iter(state_of(model).layers.values())).base.weight
        weight.detach().view(torch.uint8)[0, 0] ^= 1

    monkeypatch.setattr(furina, "unmerge", careless)
    # The bit is set after the first and the third cycle.
    assert measures.drift(model, 3)["unmerged"] == 2


def test_a_merge_that_is_not_the_same_each_time_is_drift(monkeypatch):
    model = adapted()
    merge, done = furina.merge, []

    def careless(model: torch.nn.Module) -> None:
        merge(model)
        done.append(1)
        if len(done) == 3:
            next(iter(state_of(model).layers.values())).base.weight.detach()[0, 0] = 100.0

    monkeypatch.setattr(furina, "merge", careless)
    found = measures.drift(model, 4)
    assert 0 < found["merged"] <= 4 and found["unmerged"] == 0


def test_quantising_rounds_to_the_nearest_step_of_each_group():
    quantise = quantised.quantise
    weight = torch.tensor([[-7.0, 3.4, 0.6, 0.0, 1.4, 0.05], [0.0, 0.0, 0.0, 0.0, 0.0, 0.0]])
    rounded = quantise(weight, bits=4, group=4)
    # Steps of 1 in the first group of four, of 0.2 in the two that are left.
    assert rounded[0].tolist() == pytest.approx([-7, 3, 1, 0, 1.4, 0])
    assert rounded[1].tolist() == [0.0] * 6


@pytest.mark.parametrize("merged", [False, True])
def test_quantising_takes_the_stored_weights_and_gives_them_back(merged):
    model = adapted("dora")
    if merged:
        furina.merge(model)
    layer = next(iter(state_of(model).layers.values()))
    before = layer.base.weight.detach().clone()
    ids = torch.tensor([[5, 6, 7]])
    outputs = [model(ids).logits]
    with quantised.quantised(model, 4, 32):
        assert torch.equal(layer.base.weight, quantised.quantise(before, 4, 32))
        outputs.append(model(ids).logits)
    assert torch.equal(layer.base.weight, before)
    assert torch.equal(model(ids).logits, outputs[0]) and not torch.equal(*outputs)


def test_wilsons_interval_is_the_books():
    wilson = rounds.wilson
    assert wilson(10, 100) == pytest.approx((0.0552, 0.1744), abs=1e-4)
    assert wilson(0, 20) == pytest.approx((0, 0.1611), abs=1e-4)
    assert wilson(20, 20) == pytest.approx((0.8389, 1), abs=1e-4)


def test_a_ratio_names_method_dtype_and_what_is_compared(report):
    case = json.loads(json.dumps(report["cases"][1]))
    assert (case["method"], case["dtype"]) == ("furina", "bfloat16")
    case["answers"] |= {"merged": 1, "batch": 0, "loglikelihood_batch": 0.0}
    case["logits"]["merged"]["relative"], case["logits"]["batch"]["relative"] = 0.3, 0.2
    found = page.ratios([case])
    assert found["flips/furina/bfloat16/merged_over_batch"] == 3  # 1½ over ½
    assert found["logits/furina/bfloat16/merged_over_batch"] == pytest.approx(1.5)
    assert "loglikelihood/furina/bfloat16/merged_over_batch" not in found


def test_the_table_is_made_from_the_json_alone(report):
    changed = json.loads(json.dumps(report))
    changed["cases"][1]["answers"] |= {"n": 200, "merged": 3}
    changed["failed"] = {"dora/float16": "The logits are not finite."}
    table = page.page(changed).markdown("merging")
    assert "| furina | bfloat16 | 200 | 1.50 \\[0.51, 4.32\\] |" in table
    assert "dora/float16 has no numbers: The logits are not finite." in table


def test_what_overflows_is_named_and_the_others_go_on(monkeypatch, capsys):
    logits = measures.logits

    def overflowing(model, *arguments):
        found = logits(model, *arguments)
        if found.dtype == torch.float16:
            raise furina.errors.FurinaError("The logits are not finite.")
        return found

    monkeypatch.setattr(measures, "logits", overflowing)
    error.main([*SMALL[:-1], "--dtypes", "float16", "float32"])
    report = printed(capsys)
    assert report["failed"] == {"lora/float16": "The logits are not finite."}
    assert [case["dtype"] for case in report["cases"]] == ["float32"]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--only", "molora"], "error: No method that merges is called molora; choose of dora"),
        (["--backbone", "tiny-lama"], "Did you mean 'tiny-llama'"),
        (["--task", "arc_eazy"], "Did you mean 'arc_easy'"),
    ],
)
def test_a_wrong_name_is_one_sentence(words, sentence):
    with pytest.raises(SystemExit) as stopped:
        error.main([*SMALL, *words])
    assert sentence in str(stopped.value) and "\n" not in str(stopped.value)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--batch-size", "1"], "--batch-size must be at least 2"),
        (["--rank", "6"], "--experts must divide --rank"),
        (["--items", "0"], "--items must be at least 1"),
        (["--bits", "16"], "--bits must be 2 to 8"),
        (["--device", "abacus"], "abacus"),
    ],
)
def test_a_wrong_number_is_refused_before_anything_runs(words, sentence, capsys):
    with pytest.raises(SystemExit):
        error.parse([*SMALL, *words])
    assert sentence in capsys.readouterr().err
