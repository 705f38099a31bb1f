from __future__ import annotations

import statistics
import warnings
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path

import matplotlib as mpl
import pytest
from matplotlib.figure import Figure
from matplotlib.patches import PathPatch

from furina.records import ActivityRecord, RecordError
from furina.reporting.figures import plots
from furina.reporting.figures.activity import TOKENS, activity_figures, legible
from furina.reporting.figures.heatmap import LEVELS, ColourScale, expert_colours
from furina.reporting.tables import activity, render
from furina.reporting.tables.activity import activity_tables
from furina.reporting.tables.cells import Cell
from tests.records.fake_activity import EXPERTS, LAYERS, activity_record, example
from tests.reporting.frames import rows_of

OURS = activity_record()
ROUTED = activity_record("mola", shared=False)


def filed(*records: ActivityRecord) -> dict[Path, ActivityRecord]:
    return {Path(f"folder/{record.file_name}"): record for record in records}


def rows(*records: ActivityRecord, table: int = 0) -> list[dict[tuple[str, str], Cell]]:
    return rows_of(activity_tables(filed(*records))[table])


def test_each_row_is_a_task_and_its_numbers_are_means_over_linears() -> None:
    found = rows(OURS, ROUTED)
    assert [(r["", "row"].text, r["", "task"].text) for r in found] == [
        *(("furina", "arc_easy"), ("furina", "openbookqa")),
        *(("mola", "arc_easy"), ("mola", "openbookqa")),
    ]
    task = OURS.tasks[1]
    shown = found[1]
    assert task.shared_part is not None
    for column, values, factor in (
        (("top-K share, %", "measured"), task.top_k_share, 100),
        (("", "entropy"), task.entropy, 1),
        (("load", "balance"), task.balance, 1),
        (("load", "variation"), task.load_variation, 1),
        (("load", "busiest, %"), task.busiest, 100),
        (("", "shared part, %"), [part or 0 for part in task.shared_part], 100),
    ):
        assert shown[column].numbers[""] == pytest.approx(factor * statistics.fmean(values))
    assert shown["top-K share, %", "if even"].text == "50.0"
    assert shown["top-K share, %", "K of N"].text == "2 of 4"
    assert shown["", "tokens"].numbers == {"": 3100}


def test_what_cannot_be_is_missing_with_the_records_reason() -> None:
    found = rows(ROUTED)[0]["", "shared part, %"]
    assert (found.text, found.notes) == ("–", ("no shared experts",))
    rank = rows(ROUTED, table=1)[0]["experts", "effective rank"]
    assert (rank.text, rank.notes) == ("–", ("there is a router",))


def test_linears_may_have_different_numbers_of_experts() -> None:
    task = OURS.tasks[0]
    fewer = tuple(tuple(load[:2]) if i < 2 else load for i, load in enumerate(task.frequency))
    task = replace(task, frequency=fewer, share=fewer, first=fewer)
    (found,) = rows(replace(OURS, experts=(2, 2, 4, 4, 4, 4), tasks=(task,)))
    assert found["top-K share, %", "K of N"].text == "2 of 2 to 4"
    assert found["top-K share, %", "if even"].numbers[""] == pytest.approx(100 * (2 + 4 / 2) / 6)


def test_what_the_record_does_not_know_is_missing_with_a_reason() -> None:
    found = rows(activity_record(task="", seed=None))[0]
    assert found["", "trained on"].notes == (activity.UNKNOWN,)
    assert found["", "seed"].notes == (activity.NO_SEED,)


def test_experts_and_tasks_are_compared_once_a_record() -> None:
    record = activity_record(tasks=("arc_easy", "boolq", "openbookqa"))
    (found,) = rows(record, table=1)
    a, b, c = record.tasks
    means = {
        pair: statistics.fmean(record.overlap(*both))
        for pair, both in {
            "arc_easy, boolq": (a, b),
            "arc_easy, openbookqa": (a, c),
            "boolq, openbookqa": (b, c),
        }.items()
    }
    mean = statistics.fmean(means.values())
    assert found["tasks", "load overlap, %"].numbers[""] == pytest.approx(100 * mean)
    least = min(means, key=lambda pair: means[pair])
    assert found["tasks", "pair"].text == least
    assert found["tasks", "least, %"].numbers[""] == pytest.approx(100 * means[least])
    information = statistics.fmean(record.task_information() or ())
    assert found["tasks", "information"].numbers[""] == pytest.approx(information)
    chance = statistics.fmean(record.chance_information() or ())
    assert found["tasks", "by chance"].numbers[""] == pytest.approx(chance)
    similarity = [0.01, 0.02, 0.03, 0.04, 0.05, 0.06]
    assert found["experts", "similarity"].numbers[""] == pytest.approx(statistics.fmean(similarity))


def test_one_task_has_nothing_to_be_compared_with() -> None:
    (found,) = rows(activity_record(tasks=["arc_easy"]), table=1)
    assert found["tasks", "information"].notes == (activity.ONE_TASK,)


def test_the_mean_leaves_out_linears_whose_experts_have_no_update() -> None:
    weights = replace(OURS.weights, similarity=(None, 0.2, 0.4, None, None, None))
    (found,) = rows(replace(OURS, weights=weights), table=1)
    assert found["experts", "similarity"].numbers[""] == pytest.approx(0.3)
    none = replace(weights, similarity=(None,) * 6)
    (found,) = rows(replace(OURS, weights=none), table=1)
    assert found["experts", "similarity"].notes == (activity.NO_UPDATE,)


def test_records_of_other_items_weights_or_protocols_cannot_share_a_table() -> None:
    task = OURS.tasks[0]
    for other, said in (
        (replace(ROUTED, backbone=replace(ROUTED.backbone, sha256="0")), "the backbone's hash is"),
        (replace(ROUTED, tasks=(replace(ROUTED.tasks[0], sha256="0"),)), "arc_easy's items is"),
        (replace(ROUTED, tasks=(replace(task, protocol="label"),)), "protocol of arc_easy is"),
        (replace(ROUTED, dtype="float32"), "the dtype is 'bfloat16' in the first and 'float32'"),
    ):
        with pytest.raises(RecordError, match=rf"furina.* and .*mola.* cannot share .*{said}"):
            activity_tables(filed(OURS, other))


def test_a_record_that_does_not_say_its_dtype_stands_beside_one_of_the_same_weights() -> None:
    assert activity_tables(filed(OURS, replace(ROUTED, dtype=None)))


def test_without_records_there_are_neither_tables_nor_figures() -> None:
    assert activity_tables({}) == [] and activity_figures({}) == {}


def test_the_tables_can_be_written_in_every_form() -> None:
    for table in activity_tables(filed(OURS, ROUTED)):
        assert render.markdown(table) and render.latex(table) and render.csv(table)


def drawn(*records: ActivityRecord) -> dict[str, Figure]:
    return activity_figures(filed(*records))


@pytest.fixture(scope="module")
def ours() -> dict[str, Figure]:
    return drawn(OURS)


def test_every_row_has_its_maps_and_of_several_seeds_the_lowest_is_shown() -> None:
    found = drawn(
        activity_record(seed=3), OURS, ROUTED, activity_record(tasks=["arc_easy"], row="x")
    )
    kinds = ("load", "share", "tasks", "tokens")
    assert set(found) == {
        *(f"activity-{kind}--furina--arc_easy--seed0" for kind in kinds),
        *(f"activity-{kind}--mola--arc_easy--seed0" for kind in kinds),
        *(f"activity-{kind}--x--arc_easy--seed0" for kind in kinds if kind != "tasks"),
    }


def test_without_examples_there_is_no_strip_of_tokens() -> None:
    assert not any("tokens" in name for name in drawn(replace(OURS, examples=())))


def test_figures_are_the_same_bytes_twice_whatever_the_users_style(
    ours: dict[str, Figure],
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # such as a character without a glyph
        first = {name: plots.svg(figure) for name, figure in ours.items()}
    with mpl.rc_context({"font.size": 20, "axes.grid": True, "svg.hashsalt": "other"}):
        again = {name: plots.svg(figure) for name, figure in drawn(OURS).items()}
    assert first == again
    for text in first.values():
        assert ET.fromstring(text).tag.endswith("svg")
        assert "<image" not in text, "a picture inside would depend on its compressor"


def test_every_character_has_a_glyph() -> None:
    assert (legible(" the"), legible("\n"), legible("  "), legible("a語\u200b")) == (
        *("the", "\\n", "·", "a□□"),
    )


def area(figure: Figure) -> list[dict[str, float]]:
    """Return the area of each colour in each panel, in cells."""
    found = []
    for axes in figure.axes:
        areas: dict[str, float] = {}
        for patch in (p for p in axes.patches if isinstance(p, PathPatch)):
            corners = patch.get_path().vertices.reshape(-1, 5, 2)
            sides = corners[:, 2] - corners[:, 0]
            colour = mpl.colors.to_hex(patch.get_facecolor())
            areas[colour] = areas.get(colour, 0) + float((sides[:, 0] * sides[:, 1]).sum())
        if areas:
            found.append(areas)
    return found


def test_a_map_has_a_cell_for_every_expert_and_layer_in_its_loads_colour(
    ours: dict[str, Figure],
) -> None:
    panels = area(ours["activity-load--furina--arc_easy--seed0"])
    assert len(panels) == 2
    places = [OURS.linears.index(name) for name in OURS.shown]
    most = max(max(task.frequency[place]) for task in OURS.tasks for place in places)
    scale = ColourScale(0.0, most)
    for task, areas in zip(OURS.tasks, panels, strict=True):
        assert sum(areas.values()) == LAYERS * EXPERTS
        wanted: dict[str, float] = {}
        for place in places:
            for value in task.frequency[place]:
                colour = scale.colour(value)
                assert colour
                wanted[colour] = wanted.get(colour, 0) + 1
        assert areas == wanted


def test_a_layer_with_fewer_experts_leaves_cells_blank() -> None:
    fewer = [tuple(load[:2]) if i < 2 else load for i, load in enumerate(OURS.tasks[0].frequency)]
    task = replace(OURS.tasks[0], frequency=tuple(fewer), share=tuple(fewer), first=tuple(fewer))
    record = replace(OURS, experts=(2, 2, 4, 4, 4, 4), tasks=(task,), examples=())
    (areas,) = area(drawn(record)["activity-load--furina--arc_easy--seed0"])
    assert sum(areas.values()) == 2 + 4 + 4


def test_a_strip_shows_the_last_tokens_in_their_experts_colours() -> None:
    long = example("arc_easy", TOKENS + 15)
    record = replace(OURS, examples=(long, example("arc_easy", 3)))
    figure = drawn(record)["activity-tokens--furina--arc_easy--seed0"]
    (areas,) = area(figure)
    colours = map(str.lower, expert_colours(EXPERTS))
    for expert, colour in enumerate(colours):
        assert areas[colour] == sum(row[-TOKENS:].count(expert) for row in long.expert)
    (axes,) = figure.axes
    labels = [text.get_text() for text in axes.get_xticklabels()]
    assert labels == [legible(token) for token in long.tokens[-TOKENS:]]
    assert [float(line.get_xdata()[0]) for line in axes.lines] == [TOKENS - 2]  # type: ignore[index]


def test_the_overlap_of_tasks_stands_in_its_cells(ours: dict[str, Figure]) -> None:
    figure = ours["activity-tasks--furina--arc_easy--seed0"]
    overlap = statistics.fmean(OURS.overlap(*OURS.tasks))
    names = [text.get_text() for text in figure.axes[0].get_yticklabels()]
    assert names == ["openbookqa", "arc_easy"], "from the bottom up"
    assert [text.get_text() for text in figure.axes[0].texts] == [
        *(f"{overlap:.2f}", "1.00", "1.00", f"{overlap:.2f}")
    ]


def test_colours_tell_levels_and_experts_apart() -> None:
    scale = ColourScale(0.2, 1.0)
    found = [scale.colour(0.2 + 0.8 * i / 100) for i in range(101)]
    assert len(dict.fromkeys(found)) == LEVELS and scale.colour(None) is None
    assert scale.is_dark(0.2) and not scale.is_dark(1.0)
    assert ColourScale(1.0, 1.0).colour(1.0), "all linears may have as many experts as K"
    for count in (2, 7, 8, 32):
        assert len(set(expert_colours(count))) == count
