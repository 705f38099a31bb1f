"""Written answers are judged item by item, and programs are run only where that is allowed."""

from __future__ import annotations

import pytest

from furina.data.items import Problem, Program
from furina.errors import ConfigurationError
from furina.evaluation import answers
from furina.evaluation.evaluate import evaluate
from furina.evaluation.generation import Generated

PROBLEMS = [Problem(f"p{n}", f"What is {n} + 1?", "", str(n + 1)) for n in range(4)]
PROGRAMS = [
    Program(
        f"f{n}",
        f'def f{n}():\n    """Return {n}."""\n',
        f"f{n}",
        f"def check(f):\n    assert f() == {n}\n",
        f"    return {n}\n",
    )
    for n in range(2)
]


@pytest.fixture
def says(monkeypatch):
    """Let the model write given texts."""

    def says(*texts):
        written = Generated(texts, (1, 2), 0)
        monkeypatch.setattr(answers, "generate", lambda *_: written)

    return says


def test_each_reading_of_an_answer_is_a_metric_with_its_own_predictions(says, model, tokenizer):
    says(" 0 + 1 = 1\n#### 1", " so it is 2", "#### 7", "")
    evaluation = evaluate(model, tokenizer, "gsm8k", PROBLEMS, "cot")
    assert [s.prediction["flexible"] for s in evaluation.samples] == ["1", "2", "7", None]
    assert [s.prediction["strict"] for s in evaluation.samples] == ["1", None, "7", None]
    values = {metric: score.value for metric, score in evaluation.scores.items()}
    assert values == {"flexible": 0.5, "strict": 0.25, "math_verify": 0.5}
    assert next(iter(values)) == "flexible"
    assert (evaluation.engine, evaluation.truncated) == ("generate", 0)
    assert {score.chance for score in evaluation.scores.values()} == {0}


def test_programs_are_run_only_with_the_flag(says, model, tokenizer):
    says("\n    return 0\n", "\n    return 0\n")
    with pytest.raises(ConfigurationError, match="say --execute-code"):
        evaluate(model, tokenizer, "humaneval", PROGRAMS, "code")
    evaluation = evaluate(model, tokenizer, "humaneval", PROGRAMS, "code", execute_code=True)
    assert [sample.correct["pass@1"] for sample in evaluation.samples] == [True, False]
    assert evaluation.samples[0].prediction == {"pass@1": "passed"}
    assert "AssertionError" in str(evaluation.samples[1].prediction["pass@1"])


def test_a_generated_answer_does_not_depend_on_the_batch_size(model, tokenizer, questions):
    one, three = (
        evaluate(model, tokenizer, "arc_easy", questions, "generate_clean", batch_size=size)
        for size in (1, 3)
    )
    assert [s.output for s in one.samples] == [s.output for s in three.samples]
    assert [s.answer for s in one.samples] == [q.letters[q.answer] for q in questions]
