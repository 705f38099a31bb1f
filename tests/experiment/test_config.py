"""A RunConfig refuses what no run could use, and changes keep or drop an adapter's options."""

from __future__ import annotations

import json
from typing import Any

import pytest

from furina.errors import ConfigurationError
from furina.experiment.config import RunConfig
from furina.kernels import processor
from furina.kernels.processor import Precision


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("steps", 0, "at least 1"),
        ("batch_size", -1, "at least 1"),
        ("checkpoint_interval", 0, "at least 1"),
        ("eval_batch_size", 0, "at least 1"),
        ("validation_interval", 0, "at least 1"),
        ("validation_size", -1, "0 or larger"),
        ("latency_rounds", -1, "0 or larger"),
        ("latency_warmup", -1, "0 or larger"),
        ("bucket_steps", 0, "at least 1"),
        ("warmup_steps", -1, "0 or larger"),
        ("learning_rate", -1.0, "larger than 0"),
        ("lora_plus_ratio", 0.0, "larger than 0"),
        ("gradient_clip", -3.0, "larger than 0"),
        ("weight_decay", -0.1, "0 or larger"),
        ("micro_batch_size", 0, "at least 1, or left out"),
        ("test_size", 0, "at least 1, or left out"),
        ("max_length", 0, "at least 1"),
        ("row", "../../x", "leave out slashes and a leading dot"),
        ("suite", ".hidden", "leave out slashes and a leading dot"),
        ("learning_rate", "5e-4", "must be a number, not '5e-4'"),  # what YAML makes of 5e-4
        ("learning_rate", float("nan"), "finite"),
        ("steps", 1.5, "must be a whole number"),
        ("gradient_checkpointing", "no", "must be true or false"),
        ("targets", "q_proj", "must be a list"),
        ("protocol", "txt", "Did you mean 'text'?"),
        ("protocol", "lm_eval", "only evaluates"),
        ("task", "arc_esay", "Did you mean 'arc_easy'?"),
        ("score", ("arc_easy", "arc_easy:text"), "names something twice"),
        ("mixture", {"arc_easy": {}}, "is itself a task: choose another name"),
        ("mixture", [1], "one 'name: options' a line"),
        ("engine", "hf", "Known: lm_eval, shared"),
        ("dtype", "bfloat", "Did you mean 'bfloat16'?"),
        ("schedule", "liner", "Did you mean 'linear'?"),
        ("adapter", None, "one 'name: value' a line"),
    ],
)
def test_a_value_no_run_could_use_is_one_sentence_with_its_field(
    field: str, value: Any, said: str
) -> None:
    with pytest.raises(ConfigurationError) as caught:
        RunConfig().updated({field: value}).check_tasks()
    assert field in str(caught.value) and said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("change", [{"protocol": "cot"}, {"score": ["arc_easy:cot"]}])
def test_a_task_that_a_protocol_cannot_ask_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match="Protocol cot cannot ask arc_easy: it is not"):
        RunConfig().updated(change).check_tasks()


def test_what_is_scored_is_what_is_trained_unless_said() -> None:
    assert RunConfig().scored == (("arc_easy", "text"),)
    mixture = RunConfig(task="both", mixture={"arc_easy": None, "piqa": {"weight": 2}})
    assert mixture.scored == (("arc_easy", "text"), ("piqa", "text"))
    assert mixture.trained["piqa"].weight == 2
    held_out = RunConfig(score=("arc_easy:lm_eval", "gsm8k:cot", "mmlu"))
    assert held_out.scored == (("arc_easy", "lm_eval"), ("gsm8k", "cot"), ("mmlu", "text"))


def test_an_unknown_field_suggests_the_nearest() -> None:
    with pytest.raises(ConfigurationError, match=r"'learning_rat'.*Did you mean 'learning_rate'"):
        RunConfig().updated({"learning_rat": 0.1})


def test_changes_leave_the_original_alone() -> None:
    config = RunConfig(adapter={"rank": 4})
    assert config.updated({"steps": 7, "adapter": {"rank": 8}}).steps == 7
    assert config == RunConfig(adapter={"rank": 4})


def test_options_of_the_adapter_are_merged() -> None:
    config = RunConfig(adapter={"rank": 4, "top_k": 1})
    changed = config.updated({"adapter": {"rank": 8, "dropout": 0.0}})
    assert changed.adapter == {"rank": 8, "top_k": 1, "dropout": 0.0}
    assert config.updated({"method": "furina", "adapter": {"rank": 8}}).adapter["top_k"] == 1


def test_another_method_drops_the_options_of_the_first() -> None:
    config = RunConfig(adapter={"rank": 4, "top_k": 1})
    assert config.updated({"method": "lora"}).adapter == {}
    assert config.updated({"method": "lora", "adapter": {"rank": 8}}).adapter == {"rank": 8}
    assert config.updated({"method": "base"}).is_base


@pytest.mark.parametrize(
    "change",
    [{"adapter": {"rank": 4}}, {"targets": ["q_proj"]}, {"score_without_router": True}],
)
def test_base_refuses_what_it_would_ignore(change: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match="method base trains nothing"):
        RunConfig().updated({"method": "base", **change})


def test_targets_are_a_tuple_and_no_targets_are_none() -> None:
    config = RunConfig().updated({"targets": ["q_proj", "v_proj"]})
    assert config.targets == ("q_proj", "v_proj")
    assert config.updated({"steps": 3}).targets == config.targets
    assert config.updated({"targets": None}).targets is None


def test_the_plain_form_is_json_and_gives_the_config_back() -> None:
    config = RunConfig(method="lora", adapter={"rank": 4}, targets=("q_proj",))
    plain = json.loads(json.dumps(config.to_dict()))
    assert RunConfig().updated(plain) == config


@pytest.mark.parametrize(
    ("method", "adapter", "said"),
    [
        ("lorra", {}, "Did you mean 'lora'"),
        ("bse", {}, "Did you mean 'base'"),
        ("furina", {"num_expert": 4}, "Did you mean 'num_experts'"),
        ("lora", {"rank": 0}, "rank"),
    ],
)
def test_an_unknown_method_or_option_is_named(
    method: str, adapter: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigurationError, match=said):
        RunConfig(method=method, adapter=adapter).adapter_config()


def test_only_a_router_can_be_removed() -> None:
    assert RunConfig(method="mixlora", score_without_router=True).adapter_config() is not None
    with pytest.raises(ConfigurationError, match="method furina has no router that could be"):
        RunConfig(method="furina", score_without_router=True).adapter_config()


def test_base_has_no_adapter() -> None:
    assert RunConfig(method="base").adapter_config() is None


def test_several_machines_name_their_dtype() -> None:
    with pytest.raises(ConfigurationError, match="dtype=auto may differ between num_nodes=2"):
        RunConfig(num_nodes=2)
    assert RunConfig(num_nodes=2, dtype="bfloat16").world_size == 2


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_resolved_run_names_what_auto_stands_for(
    dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processor, "automatic", lambda kind: Precision(dtype, "a test"))
    assert RunConfig().dtype == "auto" and RunConfig().resolved().dtype == dtype
    assert RunConfig(dtype="float16").resolved() == RunConfig(dtype="float16")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"micro_batch_size": 17}, "micro_batch_size=17 is more than batch_size=16"),
        ({"warmup_steps": 61}, "warmup_steps=61 is more than the steps=60"),
        ({"validation_interval": 61}, "validation_interval=61 is more than the steps=60"),
        ({"validation_interval": 5, "validation_size": 0}, "without rows to validate on"),
    ],
)
def test_a_size_that_leaves_an_option_without_effect_is_refused(
    changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigurationError, match=message):
        RunConfig().updated(changes).check_sizes()
