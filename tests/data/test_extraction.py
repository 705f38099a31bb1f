"""Reading answers out of outputs: each rule against what it says, with answers found by hand."""

from __future__ import annotations

import gzip
import json
import os
import re
import signal
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lm_eval.api.metrics import exact_match_hf_evaluate
from lm_eval.filters.extraction import RegexFilter

from furina.data import extraction as x

DATA = os.environ.get("FURINA_DATA_DIR")
BOOL = ("true", "false")
ANSWERS = tuple(f"answer{n}" for n in range(1, 6))


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("She gave 7 away and has 5. The answer is 12.", "12"),
        ("That makes $5 * 3 = $18.00.", "18.00"),
        ("He earned 1,234", "1234"),
        ("In total 12,345,678.50 dollars", "12345678.50"),
        ("at 5 km/h", "5"),
        ("The difference is 3 - 87 = -84", "-84"),
        ("between 10-12", "-12"),  # a hyphen is a sign
        ("it fell to \u22125 degrees", "5"),  # a typographic minus is none
        ("so 30% of them", "30"),
        ("which is 3/4", "4"),
        ("about 0.25 or .5", "5"),
        ("version 1.2.3", "3"),
        ("#### 5 #### 6", "6"),
        ("answer1", "1"),
        ("the answer is 1, 2", "2"),
        ("3 apples, or 1,2", "12"),
        ("The answer is 12 (see step 3)", "3"),
        ("1e5", "5"),
        ("none", None),
        ("", None),
        ("-", None),
        ("x = - 4", "4"),
    ],
)
def test_the_last_number(text, number):
    assert x.last_number(text) == number


@pytest.mark.parametrize(
    ("a", "b", "equal"),
    [
        ("18", "18.0", True),
        ("18.00", "18", True),
        ("1,234", "1234.0", True),
        ("$18.", "18", True),
        ("4.333333333333333", "4.3333", True),
        ("1.001", "1", True),
        ("1.002", "1", False),
        ("-3", "3", False),
        ("inf", "inf", False),
        ("nan", "nan", False),
        ("9" * 400, "9" * 400, False),
        (None, "1", False),
        ("1", None, False),
        ("", "", False),
        ("..", "0", False),
        ("12", "answer", False),
    ],
)
def test_numbers_are_compared_within_a_thousandth(a, b, equal):
    assert x.numbers_equal(a, b) is equal
    assert x.numbers_equal(b, a) is equal


def test_the_tolerance_can_be_chosen():
    assert x.numbers_equal("1", "1.4", tolerance=0.5)
    assert not x.numbers_equal("1", "1.0001", tolerance=0)


@pytest.mark.parametrize(
    ("text", "first", "anchored"),
    [
        ("The answer is (B).", "B", "B"),
        ("Because it is so, the answer is C", "B", "C"),
        ("All of it. The answer is (D).", "A", "D"),
        ("the answer is e", None, None),
        ("THE ANSWER IS (B)", "E", "B"),
        ("The answer is not B", "B", None),
        ("The answer is not (B). The answer is (C).", "B", "C"),
        ("The answer isn't B, it must be (A)", "B", "A"),
        ("The answer is (B), not (C)", "B", "B"),
        ("The answer is A. No, wait: the answer is D.", "A", "D"),
        ("(A) is wrong, hence (C)", "A", "C"),
        ("(A) is not right", "A", None),
        ("The answer is B. (A) would need 5.", "B", "B"),
        ("The answer is A or B", "A", None),
        ("either (A) or (B), I think (B)", "A", "B"),
        ("so 36. #### D", "D", "D"),
        ("#### A\n#### B", "A", "B"),
        ("####C", "C", "C"),
        ("B", "B", "B"),
        ("(E).", "E", "E"),
        ("I computed 5.\nC\n", "C", "C"),
        ("Answer: **D**", "A", "D"),
        ("Answer:\n\nB) 36", "A", "B"),
        ("the correct option is (A) 5", "A", "A"),
        ("Option C: 5 and the choice is D", "C", "D"),
        ("The answer is $\\boxed{B}$.", "B", "B"),
        ("The answer is option E", "E", "E"),
        ("The answer is Because", "B", None),
        ("The answer is F", None, None),
        ("A man has 5 Apples", "A", None),
        ("The answer is 36, which is (B)", "B", "B"),
        ("36", None, None),
        ("", None, None),
    ],
)
def test_letters(text, first, anchored):
    assert x.first_letter(text) == first
    assert x.anchored_letter(text) == anchored


def test_strict_letters_follow_the_first_mark():
    assert x.strict_letter("so\n#### B\n#### C") == "B"
    assert x.strict_letter("#### (E)") == "E"
    assert [x.strict_letter(text) for text in ("#### Because", "####B", "B", "#### F", "")] == (
        [None] * 5
    )


@pytest.mark.parametrize(
    ("text", "words", "first", "anchored"),
    [
        ("the correct answer is true", BOOL, "true", "true"),
        ("The correct answer is False.", BOOL, None, "false"),
        ("THE CORRECT ANSWER IS TRUE", BOOL, None, "true"),
        ("not true", BOOL, "true", None),
        ("the correct answer is not true", BOOL, "true", None),
        ("it is untrue", BOOL, "true", None),
        ("true", BOOL, "true", "true"),
        (" False.\n", BOOL, None, "false"),
        ("true, I think", BOOL, "true", None),
        ("the correct answer is false, not true", BOOL, "false", "false"),
        ("the correct answer is true or false", BOOL, "true", None),
        ("the incorrect answer is true", BOOL, "true", None),
        ("the answer is true", BOOL, "true", None),
        ("the correct answer is answer1", ANSWERS, "answer1", "answer1"),
        ("the correct answer is answer10", ANSWERS, "answer1", None),
        ("answer10", ANSWERS, "answer1", None),
        ("the correct answer is Answer3", ANSWERS, None, "answer3"),
        ("answer2 is nice, but the correct answer is answer4", ANSWERS, "answer2", "answer4"),
        ("the correct answer is answer1. No: the correct answer is answer2", ANSWERS,
         "answer1", "answer2"),
        ("the correct answer is answer1, answer2", ANSWERS, "answer1", None),
        ("the correct answer is answer1, because", ANSWERS, "answer1", "answer1"),
        ('the correct answer is: "answer5"', ANSWERS, "answer5", "answer5"),
        ("the  correct\nanswer is answer1", ANSWERS, "answer1", "answer1"),
        ("the correct answer is 1", ANSWERS, None, None),
        ("", BOOL, None, None),
    ],
)  # fmt: skip
def test_words(text, words, first, anchored):
    assert x.first_word(text, words) == first
    assert x.anchored_word(text, words) == anchored


GOLD = "She has 9 + 9 = <<9+9=18>>18 eggs.\n#### 18"
STRICT = r"#### (\-?[0-9\.\,]+)", 0
FLEXIBLE = r"(-?[$0-9.,]{2,})|(-?[0-9]+)", -1
IGNORED = [",", r"\$", "(?s).*#### ", r"\.$"]
ODD = [
    GOLD,
    "#### 18",
    "#### 18.",
    "#### 18.00",
    "#### 1,8",
    "#### $18",
    "#### -18",
    "####18",
    "#### 18 #### 19",
    "#### 19\n#### 18",
    "#### ,",
    "the answer is 18",
    "the answer is $18.",
    "18...",
    "it is 18, or so ...",
    "$$",
    "-",
    "--18",
    "10-18",
    "1,234,567.",
    "18%",
    "\u221218",
    "٣",
    "#### ٣",
    "",
]


def lm_eval(output: str, gold: str, pattern: str, select: int) -> tuple[str | None, bool]:
    """Return lm-eval's own reading and score of an output."""
    (found,) = RegexFilter(pattern, select).apply([[output]], [{}])[0]
    score = exact_match_hf_evaluate(
        [found], [gold], regexes_to_ignore=IGNORED, ignore_case=True, ignore_punctuation=False
    )
    return (None if found == "[invalid]" else found), bool(score["exact_match"])


def agrees(output: str, gold: str) -> None:
    for ours, rule in ((x.strict_number, STRICT), (x.flexible_number, FLEXIBLE)):
        found, correct = lm_eval(output, gold, *rule)
        answer = ours(output)
        assert answer == (None if found is None else x.normalise_number(found))
        assert (answer == x.normalise_number(gold)) == correct


@pytest.mark.parametrize("gold", [GOLD, "#### 1,234,567", "#### -18"])
@pytest.mark.parametrize("output", ODD)
def test_gsm8k_is_read_as_lm_eval_reads_it(output, gold):
    agrees(output, gold)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.text("0123456789$.,-# \nax", max_size=30))
def test_gsm8k_is_read_as_lm_eval_reads_any_text(output):
    agrees(output, GOLD)


@pytest.mark.parametrize(
    ("text", "strict", "flexible"),
    [
        (GOLD, "18", "18"),
        ("#### 18 #### 19", "18", "19"),
        ("#### 1,234.", "1234", "1234"),
        ("so $18.00", None, "18.00"),
        ("it is 18, I am sure...", None, ".."),  # the dots are a run
        ("five", None, None),
        ("", None, None),
    ],
)
def test_strict_and_flexible_numbers(text, strict, flexible):
    assert x.strict_number(text) == strict
    assert x.flexible_number(text) == flexible


@pytest.mark.parametrize(
    ("text", "content"),
    [
        (r"so $\boxed{5}$.", "5"),
        (r"\boxed{1} and \boxed{2}", "2"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\left\{ x \right.}", r"\left\{ x \right."),
        (r"\fbox{7}", "7"),
        (r"$\boxed 5$", "5"),
        (r"\boxed \frac{3}{4}.", r"\frac{3}{4}"),
        (r"\boxed {9}", "9"),
        (r"\boxed{\boxed{3}}", "3"),
        (r"\boxed{5}. Again: \boxed{\frac{5", "5"),  # cut off
        (r"\boxed{", None),
        (r"\boxed", None),
        (r"\boxedx{5}", None),
        ("5", None),
        ("", None),
    ],
)
def test_the_last_box(text, content):
    assert x.last_boxed(text) == content


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (r"\dfrac{1}{2}", r"\frac12"),
        (r"\tfrac{1}{2}", "1/2"),
        ("0.5", ".5"),
        ("0.5", r"\frac{1}{2}"),
        (r"\frac{2}{4}", "1/2"),
        (r"-\frac{1}{2}", r"\frac{-1}{2}"),
        (r"\left( 1, 2 \right)", "(1,2)"),
        ("$5$", "5."),
        (r"\$18.00", "18"),
        (r"10,\!080", "10080"),
        ("1,234", "1234"),
        ("12{,}345", "12345"),
        (r"5\text{ cm}", "5"),
        (r"5\text{ cm}^2", "5"),
        ("5 inches", "5"),
        (r"\text{Evelyn}", "Evelyn"),
        (r"\text{(C)}", "C"),
        (r"90^\circ", "90"),
        (r"90^{\circ}", r"90\degree"),
        (r"50\%", "50"),
        ("x = 5", "5"),
        (r"\sqrt2", r"\sqrt{2}"),
        (r"2\sqrt{3}", r"2 \sqrt{3}"),
        ("52_8", "52_{8}"),
        ("x^{2}", "x^2"),
        (r"x \leq 3", r"x\le 3"),
        (r"\( 7 \)", "7"),
        (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}"),
        ("\u22123", "-3"),
        ("+3", "3"),
        (r"\frac3{10}", r"\frac{3}{10}"),
        ("007/2", "3.5"),
    ],
)
def test_equal_latex(a, b):
    assert x.latex_equal(a, b)
    assert x.latex_equal(b, a)
    assert x.normalise_latex(x.normalise_latex(a)) == x.normalise_latex(a)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("5", "6"),
        ("(1,200)", "1200"),
        ("1,2", "12"),
        ("5m", "5"),
        ("x", "y"),
        ("-3", "3"),
        (r"\frac{1}{2}", r"\frac{2}{1}"),
        ("0.3333", "1/3"),
        ("10.05", "10.5"),
        (r"\leftarrow", "arrow"),
        ("1/0", "2/0"),
        ("", ""),
        ("(A)", "(B)"),
        ("[1,2]", "(1,2)"),
    ],
)
def test_unequal_latex(a, b):
    assert not x.latex_equal(a, b)


VERIFIED = [
    ("10", r"so $\boxed{10}$.", True),
    (r"\frac{1}{2}", r"\boxed{0.5}", True),
    ("x^2+2x+1", r"\boxed{(x+1)^2}", True),
    ("12", "The answer is 13", False),
    ("1,2", r"\boxed{2,1}", True),
    ("12", "", False),
    ("", r"\boxed{1}", None),
    (r"\frac{", r"\boxed{1}", None),
]


@pytest.mark.parametrize(("gold", "output", "verdict"), VERIFIED)
def test_math_verify_is_asked(gold, output, verdict):
    assert x.verified(gold, output) is verdict


def test_math_verify_answers_in_other_threads_without_a_word(caplog):
    verdicts = []

    def work():
        verdicts.extend(x.verified(gold, output) for gold, output, _ in VERIFIED)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert verdicts == [verdict for _, _, verdict in VERIFIED]
    assert caplog.records == []


def test_math_verify_gives_an_outer_timer_back():
    kept = signal.getsignal(signal.SIGALRM), signal.getitimer(signal.ITIMER_REAL)
    rung = []
    signal.signal(signal.SIGALRM, lambda *_: rung.append(1))
    try:
        signal.setitimer(signal.ITIMER_REAL, 100)
        x.verified("10", r"\boxed{10}")
        assert 50 < signal.getitimer(signal.ITIMER_REAL)[0] <= 100
        signal.setitimer(signal.ITIMER_REAL, 0)
        x.verified("10", r"\boxed{10}")
        assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)
    finally:
        signal.signal(signal.SIGALRM, kept[0])
        signal.setitimer(signal.ITIMER_REAL, *kept[1])
    assert rung == []


def recorded(name: str) -> list[dict[str, str]]:
    with gzip.open(Path(DATA or "") / name, "rt") as file:
        return [row for row in json.load(file) if row["output"]]


@pytest.mark.skipif(not DATA, reason="FURINA_DATA_DIR holds no data")
@pytest.mark.parametrize("task", ["AddSub", "MultiArith", "SingleEq", "SVAMP", "gsm8k"])
def test_recorded_outputs_are_read_by_the_documented_rule(task):
    folder = "gsm8k/llm_adapters" if task == "gsm8k" else f"llm_adapters_math/{task}"
    rows = recorded(f"{folder}_test.json.gz")
    right = 0
    for row in rows:
        numbers = re.findall(r"-?\d+\.?\d*", row["output"].replace(",", ""))
        answer = x.last_number(row["output"])
        assert (answer is None) == (not numbers)
        close = bool(numbers) and abs(float(numbers[-1]) - float(row["answer"])) <= 1e-3
        assert x.numbers_equal(answer, row["answer"]) == close
        right += close
        solution = f"#### {row['answer'].removesuffix('.0')}"
        agrees(row["output"], solution)
    print(f"\n{task}: last number right in {right} of {len(rows)} = {right / len(rows):.4f}")
    assert right > len(rows) / 2


@pytest.mark.skipif(not DATA, reason="FURINA_DATA_DIR holds no data")
def test_recorded_letters_are_read_by_the_documented_rules():
    rows = recorded("llm_adapters_math/AQuA_test.json.gz")
    first = anchored = stated = 0
    for row in rows:
        letters = re.findall("A|B|C|D|E", row["output"])
        assert x.first_letter(row["output"]) == (letters[0] if letters else None)
        first += x.first_letter(row["output"]) == row["answer"]
        anchored += x.anchored_letter(row["output"]) == row["answer"]
        if sentence := re.findall(r"The answer is \(([A-E])\)\.?\s*$", row["output"]):
            stated += 1
            assert x.anchored_letter(row["output"]) == sentence[-1]
    print(f"\nAQuA: first letter {first}, stated letter {anchored} of {len(rows)}")
    assert stated > len(rows) / 2


@pytest.mark.skipif(not DATA, reason="FURINA_DATA_DIR holds no data")
def test_every_solution_of_math_500_answers_itself():
    with gzip.open(Path(DATA or "") / "math/math500.jsonl.gz", "rt") as lines:
        solutions = [json.loads(line)["solution"] for line in lines]
    for solution in solutions:
        gold = x.last_boxed(solution)
        assert gold and x.latex_equal(gold, gold)
        normal = x.normalise_latex(gold)
        assert normal and x.normalise_latex(normal) == normal
        assert normal.count("{") == normal.count("}")
    verdicts = [x.verified(x.last_boxed(s) or "", s) for s in solutions[:100]]
    print(
        f"\nMATH-500: math-verify finds {verdicts.count(True)} of 100, {verdicts.count(None)} none"
    )
    assert verdicts.count(True) > 90
