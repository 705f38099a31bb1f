from __future__ import annotations

import json
import logging
import random
import socket
import subprocess
import sys

import pytest
import torch

import furina
from furina.backbones.load import load_backbone
from furina.backbones.tiny import tiny_tokenizer
from furina.data.protocols import get_protocol
from furina.data.tasks import get_task
from furina.errors import ConfigurationError, DataError, FurinaError
from furina.evaluation.choices import TASKS
from furina.evaluation.evaluate import evaluate
from furina.evaluation.independence import check_causal
from furina.evaluation.samples import read_samples
from furina.records import Score
from tests.evaluation.conftest import templated
from tests.helpers import perturb

ARC = get_task("arc_easy")


def lm_eval_alone(folder, data_dir, protocol, dtype, batch_size):
    """Score a plain model folder by lm-eval and the task files, without the evaluation's code."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    name = f"furina_{protocol}"
    metadata = {"benchmark": "arc_easy", "data_dir": str(data_dir)}
    manager = TaskManager(include_path=str(TASKS), include_defaults=False, metadata=metadata)
    results = simple_evaluate(
        model="hf",
        model_args={"pretrained": str(folder), "dtype": dtype, "softmax_dtype": "float32"},
        tasks=[name],
        task_manager=manager,
        batch_size=batch_size,
        device="cpu",
    )
    return results["results"][name], results["samples"][name]


@pytest.mark.parametrize(
    ("protocol", "dtype", "batch_size"),
    [("text", "bfloat16", 4), ("text", "float32", 3), ("label", "bfloat16", 4)],
)
def test_the_score_is_lm_evals_own_question_by_question(
    protocol, dtype, batch_size, questions, data_dir, tokenizer, tmp_path
):
    model = load_backbone("tiny-llama", dtype=dtype)
    for saved in (model, tokenizer):
        saved.save_pretrained(tmp_path / "model")
    options = {"batch_size": batch_size, "engine": "lm_eval"}
    ours = evaluate(model, tokenizer, "arc_easy", questions, protocol, **options)
    scores, samples = lm_eval_alone(tmp_path / "model", data_dir, protocol, dtype, batch_size)
    theirs = [tuple(value for value, _ in sample["filtered_resps"]) for sample in samples]
    assert [sample.loglikelihoods for sample in ours.samples] == theirs
    for metric, score in ours.scores.items():
        assert [sample.correct[metric] for sample in ours.samples] == [s[metric] for s in samples]
        assert score.value == scores[f"{metric},none"]
        assert score.stderr == pytest.approx(scores[f"{metric}_stderr,none"], rel=1e-12)


@pytest.mark.parametrize("protocol", ["text", "label"])
def test_the_engine_does_not_change_what_is_predicted(protocol, model, tokenizer, questions):
    ours, theirs = (
        evaluate(model, tokenizer, "arc_easy", questions, protocol, engine=engine)
        for engine in ("shared", "lm_eval")
    )
    assert (ours.engine, theirs.engine) == ("shared", "lm_eval")
    for one, other in zip(ours.samples, theirs.samples, strict=True):
        assert one.loglikelihoods == pytest.approx(other.loglikelihoods, abs=1e-3)
        assert one.prediction == other.prediction


@pytest.mark.slow
def test_the_score_is_that_of_lm_evals_command_line(
    questions, data_dir, model, tokenizer, tmp_path
):
    for saved in (model, tokenizer):
        saved.save_pretrained(tmp_path / "model")
    command = [sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--device", "cpu"]
    command += ["--model_args", f"pretrained={tmp_path / 'model'},softmax_dtype=float32"]
    command += ["--include_path", str(TASKS), "--tasks", "furina_text"]
    metadata = {"benchmark": "arc_easy", "data_dir": str(data_dir)}
    command += ["--metadata", json.dumps(metadata)]
    command += ["--batch_size", "4", "--output_path", str(tmp_path / "out"), "--log_samples"]
    subprocess.run(command, check=True, capture_output=True)
    (file,) = (tmp_path / "out").rglob("samples_*.jsonl")
    rows = sorted(map(json.loads, file.read_text().splitlines()), key=lambda row: row["doc_id"])
    theirs = [tuple(float(value) for value, _ in row["filtered_resps"]) for row in rows]
    ours = evaluate(model, tokenizer, "arc_easy", questions, batch_size=4, engine="lm_eval")
    assert [sample.loglikelihoods for sample in ours.samples] == theirs


@pytest.mark.parametrize("name", ["text", "label"])
def test_loglikelihoods_are_those_of_the_answer_tokens(name, model, tokenizer, questions):
    protocol, task = get_protocol(name), get_task("commonsense_qa")
    evaluation = evaluate(model, tokenizer, "commonsense_qa", questions, name, batch_size=4)
    for question, sample in zip(questions, evaluation.samples, strict=True):
        answers = protocol.answers(task, question)
        for answer, found in zip(answers, sample.loglikelihoods, strict=True):
            context = tokenizer.encode(protocol.context(task, question))
            whole = tokenizer.encode(protocol.context(task, question) + answer)
            with torch.no_grad():
                logits = model(torch.tensor([whole])).logits[0].log_softmax(-1)
            expected = sum(
                logits[position - 1, whole[position]]
                for position in range(len(context), len(whole))
            )
            assert found == pytest.approx(float(expected), abs=1e-4)


def test_the_batch_size_reaches_the_model_and_long_prompts_come_first(model, tokenizer, questions):
    check_causal(model)
    shapes: list[torch.Size] = []
    model.register_forward_pre_hook(lambda _, args: shapes.append(args[0].shape))
    evaluate(model, tokenizer, "arc_easy", questions, batch_size=5, engine="lm_eval")
    sizes, lengths = zip(*shapes, strict=True)
    assert set(sizes[:-1]) == {5} and 1 <= sizes[-1] <= 5
    assert list(lengths) == sorted(lengths, reverse=True) and lengths[0] > lengths[-1]


def test_the_batch_size_does_not_change_what_is_predicted(model, tokenizer, questions):
    one, eight = (
        evaluate(model, tokenizer, "arc_easy", questions, batch_size=size) for size in (1, 8)
    )
    assert [a.prediction for a in one.samples] == [b.prediction for b in eight.samples]


def test_the_model_is_in_eval_and_inference_mode_while_scored(model, tokenizer, questions):
    seen: set[tuple[bool, bool]] = set()
    last = model.model.layers[1].mlp
    last.register_forward_pre_hook(
        lambda module, _: seen.add((module.training, torch.is_inference_mode_enabled()))
    )
    model.train()
    evaluate(model, tokenizer, "arc_easy", questions)
    assert seen == {(False, True)}
    assert model.training and last.training


def test_modes_come_back_after_an_error(model, tokenizer, questions):
    model.train()
    model.model.layers[0].eval()
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(FurinaError, match="not finite"):
        evaluate(model, tokenizer, "arc_easy", questions)
    assert model.training and not model.model.layers[0].training
    assert model.model.layers[1].training


def test_nothing_of_the_callers_is_changed(model, questions):
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = None
    furina.adapt(model, "lora", rank=4, seed=0)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    grads = {name: p.requires_grad for name, p in model.named_parameters()}
    torch_state, python_state = torch.get_rng_state(), random.getstate()
    evaluate(model, tokenizer, "arc_easy", questions)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert grads == {name: p.requires_grad for name, p in model.named_parameters()}
    assert torch.equal(torch.get_rng_state(), torch_state) and random.getstate() == python_state
    assert tokenizer.pad_token is None


def test_a_scored_model_can_go_on_training(model, tokenizer, questions):
    furina.adapt(model, "furina", rank=4, seed=0).train()
    evaluate(model, tokenizer, "arc_easy", questions[:3])
    ids = torch.arange(3, 11).reshape(1, -1)
    loss = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids).loss
    (loss + furina.auxiliary_loss(model)).backward()
    assert any(p.grad is not None for p in furina.adapter_parameters(model).values())


@pytest.mark.parametrize("method", ["lora", "furina"])
def test_base_unmerged_and_merged_are_three_scorings_of_one_model(
    method, model, tokenizer, questions
):
    def loglikelihoods() -> torch.Tensor:
        samples = evaluate(model, tokenizer, "arc_easy", questions).samples
        return torch.tensor([value for sample in samples for value in sample.loglikelihoods])

    base = loglikelihoods()
    furina.adapt(model, method, rank=4, seed=0)
    perturb(model)
    unmerged = loglikelihoods()
    furina.merge(model)
    merged = loglikelihoods()
    furina.remove(model)
    assert (unmerged - base).abs().max() > 0.1
    torch.testing.assert_close(merged, unmerged, rtol=1e-4, atol=1e-3)
    assert torch.equal(loglikelihoods(), base)


def test_the_tokenizers_own_bos_stays_none_or_one(model, questions):
    for adds_bos in (False, True):
        tokenizer = tiny_tokenizer(adds_bos=adds_bos)
        first = evaluate(model, tokenizer, "arc_easy", questions).first_prompt
        assert first.ids.count(tokenizer.bos_token_id) == adds_bos


@pytest.mark.parametrize(
    ("template", "message"), [("<s> <s> $A", "two BOS"), ("$A </s>", "appends EOS")]
)
def test_misplaced_special_tokens_are_an_error(template, message, model, questions):
    with pytest.raises(ConfigurationError, match=message):
        evaluate(model, templated(template), "arc_easy", questions)


@pytest.mark.parametrize("protocol", ["text", "label", "lm_eval", "generate_clean"])
def test_the_first_prompt_is_kept_as_text_and_tokens(protocol, model, tokenizer, questions):
    evaluation = evaluate(model, tokenizer, "arc_easy", questions, protocol)
    first = evaluation.first_prompt
    if protocol == "lm_eval":  # the harness's ARC prompt is the one that `text` follows
        protocol = "text"
    assert first.text == get_protocol(protocol).context(ARC, questions[0])
    assert tokenizer.decode(first.ids) == first.text
    assert first.sha256 == evaluation.samples[0].prompt_sha256


def test_cut_prompts_are_counted_and_warned_of(tokenizer, questions):
    model = load_backbone("tiny-llama", dtype="float32")
    whole = evaluate(model, tokenizer, "arc_easy", questions)
    assert whole.truncated == 0
    model.config.max_position_embeddings = len(whole.first_prompt.ids)
    with pytest.warns(UserWarning, match="beginnings were cut"):
        cut = evaluate(model, tokenizer, "arc_easy", questions)
    window, text = model.config.max_position_embeddings + 1, get_protocol("text")
    assert cut.truncated == sum(
        len(tokenizer.encode(text.context(ARC, question) + answer)) > window
        for question in questions
        for answer in text.answers(ARC, question)
    )
    assert 0 < cut.truncated < sum(len(question.choices) for question in questions)


def test_the_samples_give_the_scores(model, tokenizer, questions, tmp_path):
    evaluation = evaluate(model, tokenizer, "arc_easy", questions)
    evaluation.write_samples(tmp_path / "samples.jsonl.gz")
    samples = read_samples(tmp_path / "samples.jsonl.gz")
    assert tuple(samples) == evaluation.samples
    for metric, score in evaluation.scores.items():
        norms = [s.lengths if metric == "acc_norm" else [1] * len(s.lengths) for s in samples]
        best = [
            max(range(len(norm)), key=lambda i, s=sample, n=norm: s.loglikelihoods[i] / n[i])
            for sample, norm in zip(samples, norms, strict=True)
        ]
        hits = [choice == sample.answer for choice, sample in zip(best, samples, strict=True)]
        assert score.value == pytest.approx(sum(hits) / len(hits))


def test_a_model_that_guesses_is_suspect_and_one_that_knows_is_not(model, tokenizer, questions):
    guessed = evaluate(model, tokenizer, "arc_easy", questions).scores["acc"]
    expected = sum(1 / len(question.choices) for question in questions) / len(questions)
    assert guessed.chance == pytest.approx(expected) and guessed.suspect
    answers = [
        sample.prediction["acc"]
        for sample in evaluate(model, tokenizer, "arc_easy", questions).samples
    ]
    known = [
        type(q)(q.id, q.stem, q.choices, answer)
        for q, answer in zip(questions, answers, strict=True)
    ]
    score = evaluate(model, tokenizer, "arc_easy", known).scores["acc"]
    assert score.value == 1 and not score.suspect


def test_records_hold_every_metric_with_its_provenance(model, tokenizer, questions):
    import lm_eval

    evaluation = evaluate(model, tokenizer, "arc_easy", questions)
    records = evaluation.to_records("merged", "samples.jsonl.gz")
    assert [record.metric for record in records] == ["acc", "acc_norm"]
    assert all(isinstance(record, Score) and record.variant == "merged" for record in records)
    assert {record.lm_eval for record in records} == {lm_eval.__version__}
    assert {record.n for record in records} == {len(questions)}
    asked = {(r.task, r.protocol, r.protocol_version, r.engine) for r in records}
    assert asked == {("arc_easy", "text", "1", "shared")}
    assert {record.first_prompt_ids for record in records} == {evaluation.first_prompt.ids}
    assert {record.first_prompt_sha256 for record in records} == {evaluation.first_prompt.sha256}


def test_limit_takes_the_first_questions(model, tokenizer, questions):
    evaluation = evaluate(model, tokenizer, "arc_easy", questions, limit=3)
    assert [sample.id for sample in evaluation.samples] == [q.id for q in questions[:3]]


def test_bad_questions_and_options_are_one_sentence(model, tokenizer, questions):
    with pytest.raises(DataError, match="at least 2"):
        evaluate(model, tokenizer, "arc_easy", questions[:1])
    with pytest.raises(DataError, match="same id"):
        evaluate(model, tokenizer, "arc_easy", [questions[0]] * 2)
    with pytest.raises(ConfigurationError, match="Did you mean"):
        evaluate(model, tokenizer, "arc_esay", questions)
    with pytest.raises(ConfigurationError, match="batch size"):
        evaluate(model, tokenizer, "arc_easy", questions, batch_size=0)


@pytest.mark.parametrize("limit", [-1, 0, 0.5, True, "10"])
def test_a_limit_that_is_no_number_of_questions_is_refused(model, tokenizer, questions, limit):
    with pytest.raises(ConfigurationError, match="limit"):
        evaluate(model, tokenizer, "arc_easy", questions, limit=limit)


@pytest.mark.parametrize("protocol", ["text", "generate_v1"])
def test_a_batch_size_that_is_no_number_is_refused(model, tokenizer, questions, protocol):
    with pytest.raises(ConfigurationError, match="batch size"):
        evaluate(model, tokenizer, "arc_easy", questions, protocol, batch_size="auto")


def test_scoring_is_silent_and_needs_no_network(model, tokenizer, questions, monkeypatch, capfd):
    def refuse(*_):
        raise AssertionError("tried to connect")

    import lm_eval.api.task

    logger, bar = logging.getLogger("lm_eval"), lm_eval.api.task.tqdm
    level = logger.level
    monkeypatch.setattr(socket.socket, "connect", refuse)
    evaluate(model, tokenizer, "arc_easy", questions)
    assert capfd.readouterr() == ("", "")
    assert logger.level == level and lm_eval.api.task.tqdm is bar
