"""Prompts are fixed byte for byte: a changed byte is a new version."""

from __future__ import annotations

import pytest

from furina.data.items import Instruction, Problem, Program, Question
from furina.data.protocols import ChoiceProtocol, GenerationProtocol, get_protocol, protocols
from furina.data.tasks import get_task, tasks
from furina.errors import ConfigurationError

ASKED = {
    "arc_easy": Question("1", "Where does °C = 0?", ("on ice", "in fire", "at sea"), 2),
    "boolq": Question("2", "do fish sleep", ("no", "yes"), 1, "Fish rest."),
    "hellaswag": Question("3", "Baking: A cook", ("sings.", "bakes.", "runs.", "flies."), 1),
    "piqa": Question("4", "Open a tin.", ("Use a key.", "Use a leaf."), 0),
    "social_iqa": Question("5", "How does Lee feel?", ("glad", "sad", "odd"), 1, "Lee fell."),
    "winogrande": Question("6", "The cup and the jug: _ is full.", ("cup", "jug"), 1),
    "commonsense_qa": Question("7", "Where is a bee?", ("hive", "sea", "sky", "car", "ice"), 0),
}
SUM = Problem("8", "What is 2 + 3 cows?", "2 + 3 = 5", "5")
BODY = Program(
    "9", "def one():\n    '''Return 1.'''\n", "one", "def check(f): ...", "    return 1\n"
)
ORDER = Instruction("10", "Say hi.", "", "print('hi')")

TEXT = {
    "arc_easy": (b"Question: Where does \xc2\xb0C = 0?\nAnswer:", b" at sea"),
    "boolq": (b"Fish rest.\nQuestion: do fish sleep?\nAnswer:", b" yes"),
    "hellaswag": (b"Baking: A cook", b" bakes."),
    "piqa": (b"Question: Open a tin.\nAnswer:", b" Use a key."),
    "social_iqa": (b"Question: Lee fell. How does Lee feel?\nAnswer:", b" sad"),
    "winogrande": (b"Sentence: The cup and the jug:", b" jug is full."),
    "commonsense_qa": (b"Question: Where is a bee?\nAnswer:", b" hive"),
}
LABEL = {
    "arc_easy": (
        b"Please choose the correct answer to the question: Where does \xc2\xb0C = 0? "
        b"(A) on ice (B) in fire (C) at sea\nAnswer:",
        b" C",
    ),
    "boolq": (
        b"Please answer the following question with true or false: do fish sleep?\nAnswer:",
        b" true",
    ),
    "hellaswag": (
        b"Please choose the correct ending to complete the given sentence.\n"
        b"Sentence: Baking. A cook\n(A) sings.\n(B) bakes.\n(C) runs.\n(D) flies.\nAnswer:",
        b" B",
    ),
    "piqa": (
        b"Below is a common task along with two possible solutions labeled (A) and (B). Please "
        b"select the appropriate solution to achieve the task:\nOpen a tin.\n\n(A) Use a key.\n"
        b"(B) Use a leaf.\n\nCorrect solution:",
        b" A",
    ),
    "social_iqa": (
        b"Please choose the correct answer to the question.\nQuestion: Lee fell. How does Lee "
        b"feel?\n(A) glad\n(B) sad\n(C) odd\nAnswer:",
        b" B",
    ),
    "winogrande": (
        b"Please choose the correct answer to fill in the blank to complete the given sentence.\n"
        b"Sentence: The cup and the jug: _ is full.\n(A) cup\n(B) jug\nAnswer:",
        b" B",
    ),
    "commonsense_qa": (
        b"Please choose the correct answer to the question: Where is a bee? "
        b"(A) hive (B) sea (C) sky (D) car (E) ice\nAnswer:",
        b" A",
    ),
}
INSTRUCTION = (
    "Please choose the correct answer to the question: Where does °C = 0?\n\n"
    "Answer1: on ice Answer2: in fire Answer3: at sea\n\nAnswer format: answer1/answer2/answer3"
)
FIRST = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request."
)
INDENT = " " * 16


def test_the_text_protocol_is_these_bytes_of_version_1():
    check("text", TEXT)


def test_the_label_protocol_is_these_bytes_of_version_1():
    check("label", LABEL)


def check(name, golden):
    protocol = get_protocol(name)
    assert protocol.version == 1
    for task, (context, target) in golden.items():
        item, found = ASKED[task], get_task(task)
        assert protocol.context(found, item).encode() == context
        assert protocol.target(found, item).encode() == target
        assert protocol.pair(found, item) == (context.decode(), target.decode())


def test_arc_compares_all_nine_labels_of_moe_peft():
    label, arc = get_protocol("label"), get_task("arc_easy")
    answers = label.answers(arc, ASKED["arc_easy"])
    assert answers == (" 1", " 2", " 3", " 4", " A", " B", " C", " D", " E")
    assert answers[label.right(arc, ASKED["arc_easy"])] == " C"


def test_generate_v1_has_llm_adapters_two_prompts():
    protocol, task, item = get_protocol("generate_v1"), get_task("arc_easy"), ASKED["arc_easy"]
    assert (protocol.version, protocol.loss_on_prompt, protocol.ends) == (1, True, True)
    assert protocol.context(task, item) == (
        f"{FIRST} \n\n{INDENT}### Instruction:\n{INDENT}{INSTRUCTION}\n\n"
        f"{INDENT}### Response:\n{INDENT}"
    )
    assert protocol.pair(task, item) == (
        f"{FIRST}  \n\n{INDENT}### Instruction:\n{INDENT}{INSTRUCTION}\n{INDENT}\n"
        f"{INDENT}### Response:\n{INDENT}",
        "the correct answer is answer3",
    )
    decoding = protocol.decoding(task)
    assert (decoding.num_beams, decoding.max_new_tokens) == (4, 32)
    assert (decoding.pass_mask, decoding.pad_id) == (False, 0)
    assert protocol.decoding(get_task("gsm8k")).max_new_tokens == 256


def test_generate_clean_has_one_prompt_and_masks_padding():
    protocol, task, item = get_protocol("generate_clean"), get_task("arc_easy"), ASKED["arc_easy"]
    prompt = f"{FIRST}\n\n### Instruction:\n{INSTRUCTION}\n\n### Response:"
    assert protocol.context(task, item) == prompt
    assert protocol.pair(task, item) == (prompt, " the correct answer is answer3")
    decoding = protocol.decoding(task)
    assert (decoding.num_beams, decoding.pass_mask, protocol.loss_on_prompt) == (1, True, False)


@pytest.mark.parametrize(
    ("output", "published", "clean"),
    [
        ("the correct answer is answer3", True, True),
        ("answer1? No: the correct answer is answer3", False, True),
        ("", False, False),
        ("the correct answer is not answer3", True, False),
    ],
)
def test_published_extraction_is_unanchored_and_the_clean_one_is_not(output, published, clean):
    task, item = get_task("arc_easy"), ASKED["arc_easy"]
    for name, right in (("generate_v1", published), ("generate_clean", clean)):
        assert get_protocol(name).judge(task, item, output)["acc"].correct is right


def test_chain_of_thought_is_these_bytes_and_three_readings():
    cot, task = get_protocol("cot"), get_task("gsm8k")
    assert cot.pair(task, SUM) == (
        "Question: What is 2 + 3 cows?\nAnswer:",
        " 2 + 3 = 5\n#### 5",
    )
    judged = cot.judge(task, SUM, " 2 + 3 = 5\n#### 5")
    assert {name: j.correct for name, j in judged.items()} == dict.fromkeys(cot.metrics, True)
    judged = cot.judge(task, SUM, "That makes 5 cows")
    assert (judged["flexible"].correct, judged["strict"].correct) == (True, False)
    judged = cot.judge(task, SUM, "#### 6")
    assert not any(judgement.correct for judgement in judged.values())


def test_a_box_closes_the_solution_of_a_latex_problem():
    cot, task = get_protocol("cot"), get_task("math500")
    problem = Problem("11", "Half of $x$?", "It is $\\boxed{\\frac{x}{2}}$.", "\\frac{x}{2}")
    assert cot.target(task, problem) == " It is $\\boxed{\\frac{x}{2}}$."
    judged = cot.judge(task, problem, "So $\\boxed{\\dfrac{x}{2}}$.")
    assert all(judgement.correct for judgement in judged.values())


def test_code_asks_humaneval_as_it_asks_codealpaca():
    code, task = get_protocol("code"), get_task("humaneval")
    assert code.context(task, BODY) == (
        "### Instruction:\nComplete the following Python function.\n\n"
        "### Input:\ndef one():\n    '''Return 1.'''\n\n### Response:"
    )
    assert code.pair(task, ORDER) == (
        "### Instruction:\nSay hi.\n\n### Response:",
        "\nprint('hi')",
    )
    with pytest.raises(ConfigurationError, match="judged by running it"):
        code.judge(task, BODY, "    return 1")


@pytest.mark.parametrize("name", sorted(protocols()))
def test_a_protocol_asks_or_says_why_not(name):
    protocol = get_protocol(name)
    assert protocol.name == name and protocol.summary and protocol.metrics
    assert not (isinstance(protocol, ChoiceProtocol) and isinstance(protocol, GenerationProtocol))
    asked = {task for task in tasks() if protocol.refusal(get_task(task)) is None}
    assert asked
    for task in set(tasks()) - asked:
        with pytest.raises(ConfigurationError, match=f"Protocol {name} cannot ask {task}: "):
            protocol.require(get_task(task))


def test_every_task_can_be_asked_under_some_protocol_that_trains():
    for task in tasks().values():
        assert any(p.trains and p.refusal(task) is None for p in protocols().values()), task.name


def test_an_unknown_protocol_suggests_the_nearest():
    with pytest.raises(ConfigurationError, match=r"no protocol 'labels'. Did you mean 'label'"):
        get_protocol("labels")
