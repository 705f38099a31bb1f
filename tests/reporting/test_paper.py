from __future__ import annotations

import re
from pathlib import Path

import pytest

from furina.records import RecordError
from furina.reporting.read.paper import HEADER, INDEX, PaperTable, read_index
from furina.reporting.tables.paper import paper_table

PAPER = Path(__file__).parents[2] / "results" / "paper"
FILES = sorted(path for path in PAPER.glob("*.csv") if path.name != INDEX)
HEAD = ",".join(HEADER) + "\n"
LINE = "s,t,LoRA,c,1.5,%,Table 1,lora\n"


def read(name: str) -> PaperTable:
    return PaperTable.read(PAPER / f"{name}.csv")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_file_of_the_papers_numbers_is_a_table(path: Path) -> None:
    table = paper_table(path)
    paper = PaperTable.read(path)
    assert [cell.text for cell in table.frame["", "method"]] == list(paper.rows)
    assert re.fullmatch(r"(Table|Figure) \d", paper.place)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "must have lines under the header"),
        ("a,b\n1,2\n", "must have lines under the header"),
        ("source,table,row,column,value,unit\ns,t,r,c,1,%\n", "must have lines under the header"),
        (HEAD, "must have lines"),
        (HEAD + "s,t,r,c,1,%,p\n", "line 2 must have 8 columns"),
        (HEAD + "s,t,r,c,1,%,p,o,more\n", "line 2 must have 8 columns"),
        (HEAD + "s,t,r,c,x,%,p,o\n", "'x' is not a number"),
        (HEAD + "s,t,r,c,nan,%,p,o\n", "'nan' is not a number"),
        (HEAD + "s,t,r,c,1,%,p,o\ns,t,r,c,2,%,p,o\n", "twice"),
        (HEAD + "s,t,r,c,1,%,p,o\ns,t,r,d,2,%,p,other\n", "'r' must always have the same ours"),
        (HEAD + "s,t,r,c,1,%,p,o\ns,t,q,c,2,ms,p,\n", "'c' must always have the same unit"),
        (HEAD + "s,t,r,c,1,%,p,o\ns,t,q,c,2,%,p,o\n", "two of the paper's rows cannot be one"),
        (HEAD + "s,t,r,c,1,%,p,o\ns,t,q,c,2,%,p2,\n", "must have the same place on every line"),
        (HEAD + "s,t,r,c,1,%,,o\n", "must have the same place on every line"),
        (HEAD + 's,t,r,c,1,%,p,"o\n', "is not CSV"),
    ],
)
def test_a_damaged_file_of_the_papers_numbers_is_one_sentence(
    text: str, message: str, tmp_path: Path
) -> None:
    (tmp_path / "main.csv").write_text(text)
    with pytest.raises(RecordError, match=message):
        paper_table(tmp_path / "main.csv")


def test_several_rows_may_have_no_row_of_ours(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(HEAD + LINE + "s,t,x,c,1,%,Table 1,\ns,t,y,c,2,%,Table 1,\n")
    paper = PaperTable.read(tmp_path / "a.csv")
    assert paper.rows == {"LoRA": "lora", "x": "", "y": ""}
    assert paper.ours == {"lora": "LoRA"}


def test_the_papers_means_of_three_are_the_means_of_its_three_backbones() -> None:
    paper = read("main")
    *backbones, mean = paper.columns
    checked = 0
    for row in paper.rows:
        ours, theirs = paper.value(row, tuple(backbones)), paper.value(row, (mean,))
        if ours is not None:
            assert ours == pytest.approx(theirs, abs=0.051)
            checked += 1
    assert checked == 3


@pytest.mark.parametrize(
    ("table", "backbone", "columns"),
    [
        ("main", "Qwen/Qwen2-7B", ("Qwen2-7B",)),
        ("main", "meta-llama/Llama-3.2-3B", ("Llama-3.2-3B",)),
        ("main", "openchat/openchat-3.6-8b-20240522", ("OpenChat-8B",)),
        ("main", "smollm2-135m-instruct", ("mean of 3",)),
        ("main", "Qwen/Qwen2.5-7B", ("mean of 3",)),
        ("gsm8k", "meta-llama/Llama-3.2-3B", ("Llama-3.2-3B",)),
        ("gsm8k", "smollm2-135m-instruct", ("OpenChat-8B", "Llama-3.2-3B", "Qwen2-7B")),
        ("ablation", "Qwen/Qwen2-7B", ("Qwen2-7B and Llama-3.2-3B",)),
    ],
)
def test_a_backbone_stands_beside_its_own_column_or_a_mean(
    table: str, backbone: str, columns: tuple[str, ...]
) -> None:
    assert read(table).columns_for(backbone) == columns


def test_a_value_is_a_mean_over_columns_that_are_all_known() -> None:
    paper = read("gsm8k")
    columns = paper.columns_for("smollm2-135m-instruct")
    assert paper.value("LoRA", columns) == pytest.approx((61.1 + 47.8 + 62.5) / 3)
    main = read("main")
    assert main.value("SLIM", ("Llama-3.2-3B",)) == 79.2
    assert main.value("SLIM", ("Llama-3.2-3B", "Qwen2-7B")) is None
    assert main.value("no such row", ("mean of 3",)) is None


PLACES = {place.file: place for place in read_index(PAPER / INDEX) if place.file}


@pytest.mark.parametrize("name", PLACES)
def test_the_papers_rows_are_rows_of_the_suite_that_repeats_them(name: str) -> None:
    suite = PAPER.parents[1] / "experiments" / PLACES[name].suite
    known = {path.stem for path in suite.glob("*.yaml")} - {"defaults"}
    assert set(read(name).ours) <= known
    assert read(name).place == PLACES[name].place


def test_every_file_of_the_papers_numbers_has_a_place() -> None:
    assert {path.stem for path in FILES} == set(PLACES)
