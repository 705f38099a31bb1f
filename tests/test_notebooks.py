"""The notebooks run from top to bottom, and what is stored in them is what they print."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbformat import NotebookNode

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
NUMBER = re.compile(r"[ \t]*\d[\d.]*(?:e[+-]?\d+)?")
every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def code_cells(notebook: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def shape_of_outputs(notebook: NotebookNode) -> list[list[str]]:
    """Return each code cell's outputs: texts without their numbers, the types of anything else."""
    return [[shape(output) for output in cell.outputs] for cell in code_cells(notebook)]


def shape(output: NotebookNode) -> str:
    return NUMBER.sub(" #", output.text) if "text" in output else " ".join(sorted(output.data))


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A kernel that writes nothing outside an empty folder and needs neither network nor cores."""
    for name in ("JUPYTER_RUNTIME_DIR", "JUPYTER_DATA_DIR", "IPYTHONDIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.setenv("FURINA_OFFLINE", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    folder = tmp_path / "work"
    folder.mkdir()
    yield folder


@pytest.mark.timeout(600)
@every_notebook
def test_a_notebook_runs_to_its_end_and_prints_what_is_stored_but_for_the_digits(
    path: Path, elsewhere: Path
) -> None:
    stored, notebook = (nbformat.read(path, as_version=4) for _ in range(2))
    place = {"metadata": {"path": str(elsewhere)}}
    client = NotebookClient(notebook, timeout=500, coalesce_streams=True, resources=place)
    client.execute()  # raises at the first error
    assert shape_of_outputs(notebook) == shape_of_outputs(stored)
    assert list(elsewhere.iterdir()) == []


@every_notebook
def test_a_stored_notebook_is_small_and_was_run_once_from_top_to_bottom(path: Path) -> None:
    assert path.stat().st_size < 200_000
    cells = code_cells(nbformat.read(path, as_version=4))
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    kinds = {output.output_type for cell in cells for output in cell.outputs}
    assert "stream" in kinds and "error" not in kinds


@every_notebook
def test_no_result_is_typed_into_a_notebooks_text(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    text = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    text = re.sub(r"\]\(http[^)]*\)|arXiv:[\d.]+", "", text)
    assert re.findall(r"\d+\.\d+|\d+ ?%|\de-?\d", text) == []


def test_there_are_notebooks_and_the_readme_names_their_folder() -> None:
    assert NOTEBOOKS
    assert "](notebooks" in (ROOT / "README.md").read_text(encoding="utf-8")
