"""Word problems of arithmetic, as LLM-Adapters tests on them (Hu et al., 2023, arXiv:2304.01933).

Of AddSub, MAWPS and SingleEq no set of a public hub is known to hold the same rows. The public hub
cuts MultiArith's and SVAMP's problems in two; here they are one test split, as in the literature.
"""

from __future__ import annotations

from furina.data.items import Problem
from furina.data.parsing import Row, instruction_row, number_text, text, value, worked_problem
from furina.data.places import Files, Hub
from furina.data.tasks import Task


def _multiarith(row: Row) -> Problem:
    return worked_problem(text(row, "question").strip(), number_text(value(row, "final_ans")))


def _svamp(row: Row) -> Problem:
    """Join body and question as one text, the body ending in a full stop."""
    body, question = text(row, "Body").strip(), text(row, "Question").strip()
    joined = f"{body} {question}" if body.endswith((".", "?", "!")) else f"{body}. {question}"
    return worked_problem(joined, number_text(value(row, "Answer")))


def _mawps(row: Row) -> Problem:
    """Read a problem whose solution is its equation."""
    answer = number_text(value(row, "ans"))
    return worked_problem(text(row, "original_text"), answer, text(row, "equation"))


# Hosseini et al., 2014, EMNLP: additions and subtractions.
ADDSUB = Task(
    name="addsub",
    title="AddSub",
    kind="math",
    licence="not stated",
    rows={"test": 395},
    files={"test": Files("llm_adapters_math/AddSub_test.json.gz", instruction_row)},
)

# Koncel-Kedziorski et al., 2016, NAACL: a collection. Most problems of AddSub and many of
# MultiArith stand in its train split: a model trained on it is not to be tested on those.
MAWPS = Task(
    name="mawps",
    title="MAWPS",
    kind="math",
    licence="not stated",
    rows={"train": 1898, "validation": 237, "test": 238},
    files={
        "train": Files("llm_adapters_math/mawps_trainset.json.gz", _mawps),
        "validation": Files("llm_adapters_math/mawps_validset.json.gz", _mawps),
        "test": Files("llm_adapters_math/mawps_test.json.gz", instruction_row),
    },
)

# Roy and Roth, 2015, arXiv:1608.01413: several steps.
MULTIARITH = Task(
    name="multiarith",
    title="MultiArith",
    kind="math",
    licence="not stated",
    rows={"test": 600},
    hub={"test": Hub("ChilleD/MultiArith", None, "train+test", _multiarith)},
    files={"test": Files("llm_adapters_math/MultiArith_test.json.gz", instruction_row)},
)

# Koncel-Kedziorski et al., 2015, TACL: one equation.
SINGLEEQ = Task(
    name="singleeq",
    title="SingleEq",
    kind="math",
    licence="not stated",
    rows={"test": 508},
    files={"test": Files("llm_adapters_math/SingleEq_test.json.gz", instruction_row)},
)

# Patel et al., 2021, arXiv:2103.07191: small, confusing changes.
SVAMP = Task(
    name="svamp",
    title="SVAMP",
    kind="math",
    licence="MIT",
    rows={"test": 1000},
    hub={"test": Hub("ChilleD/SVAMP", None, "train+test", _svamp)},
    files={"test": Files("llm_adapters_math/SVAMP_test.json.gz", instruction_row)},
)
