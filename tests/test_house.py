"""The house rules that no tool checks by itself."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
SOURCES = sorted((ROOT / "furina").rglob("*.py"))
MAX_LINES, MAX_TEST_LINES = 350, 450


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pairs = [line.split("==") for line in lines if not line.startswith("#")]
    return {canonicalize_name(name): version for name, version in pairs}


def requirements() -> list[Requirement]:
    extras = PROJECT["optional-dependencies"].values()
    return [
        Requirement(text) for text in [*PROJECT["dependencies"], *(r for e in extras for r in e)]
    ]


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def run(*command: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **variables}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def test_the_licence_is_the_whole_apache_2_text() -> None:
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License" in text and "Version 2.0, January 2004" in text
    assert "END OF TERMS AND CONDITIONS" in text
    assert PROJECT["license"] == "Apache-2.0"


def test_the_citation_names_paper_and_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    (paper,) = citation["references"]
    assert paper["identifiers"][0]["value"] == "arXiv:2509.14900"
    from furina import __version__

    assert citation["version"] == __version__


@pytest.mark.parametrize("requirement", requirements(), ids=str)
def test_the_pinned_version_lies_in_the_declared_range(requirement: Requirement) -> None:
    assert pins()[canonicalize_name(requirement.name)] in requirement.specifier


def test_pins_are_bare_versions_without_hashes_or_local_tags() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = [line for line in lines if not line.startswith("#")]
    assert [line for line in pinned if not re.fullmatch(r"[\w.-]+==[\w.]+", line)] == []


def test_the_malicious_lightning_uploads_are_excluded() -> None:
    (lightning,) = (r for r in requirements() if r.name == "lightning")
    assert not any(version in lightning.specifier for version in ("2.6.2", "2.6.3"))


def test_python_3_11_to_3_13_are_supported() -> None:
    supported = SpecifierSet(PROJECT["requires-python"])
    versions = ["3.10", "3.11", "3.12", "3.13", "3.14"]
    assert [v for v in versions if v in supported] == ["3.11", "3.12", "3.13"]


def imported_packages(source: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(source.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found.add(node.module.split(".")[0])
    return found - set(sys.stdlib_module_names) - {"furina"}


def test_every_imported_package_is_declared() -> None:
    declared = {canonicalize_name(Requirement(text).name) for text in PROJECT["dependencies"]}
    distributions = packages_distributions()
    undeclared = {
        (relative(source), package)
        for source in SOURCES
        for package in imported_packages(source)
        if not declared & {canonicalize_name(name) for name in distributions.get(package, [])}
    }
    assert undeclared == set()


def test_no_file_is_longer_than_the_limit() -> None:
    limits = {"furina": MAX_LINES, "benchmarks": MAX_LINES, "tests": MAX_TEST_LINES}
    files = [(file, most) for room, most in limits.items() for file in (ROOT / room).rglob("*.py")]
    lengths = {relative(file): (len(file.read_text().splitlines()), most) for file, most in files}
    assert {file: n for file, (n, most) in lengths.items() if n > most} == {}


def test_the_map_shows_every_room_and_every_file_it_names_is_there() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    tree = re.findall(r"```\n(furina/\n.*?)```", text, re.DOTALL)[0]
    rooms = {f"{path.parent.name}/" for path in (ROOT / "furina").glob("*/__init__.py")}
    assert rooms == set(re.findall(r"^  (\w+/)", tree, re.MULTILINE))
    modules = {path.name for path in (ROOT / "furina").glob("*.py") if path.name[0] != "_"}
    assert modules == set(re.findall(r"\w+\.py", tree)) and len(modules) == 4
    walks = text[text.index("Three walks") : text.index("## Adding a method")]
    named = re.findall(r"`(\w+(?:/\w+)+\.py)`", walks)
    assert len(named) > 10 and all((ROOT / "furina" / name).is_file() for name in named)


def test_the_readme_keeps_to_150_lines() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def test_layers_hold() -> None:
    result = run(str(Path(sys.executable).with_name("lint-imports")), "--no-cache")
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("test", ["pytest", "ruff check", "mypy", "lint-imports"]),
        ("test-processors", ["tests.processors"]),
        ("reproduce", ["furina assets", "furina run quickstart"]),
        ("report", ["furina report"]),
        ("lint", ["ruff check", "ruff format --check", "mypy", "lint-imports"]),
    ],
)
def test_a_make_target_installs_and_then_does_what_it_says(target: str, words: list[str]) -> None:
    result = run("make", "-n", target, "VENV=absent")
    assert result.returncode == 0, result.stderr
    position = [result.stdout.index(word) for word in ["-e '.[dev]'", *words]]
    assert position[0] == min(position)


def test_make_says_so_in_one_sentence_where_no_python_is_new_enough(tmp_path: Path) -> None:
    old = tmp_path / "python3"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    result = run("make", "setup", f"VENV={tmp_path / 'venv'}", f"PYTHON={old}")
    assert result.returncode != 0
    assert "error: furina needs Python 3.11, 3.12 or 3.13" in result.stderr
    assert not (tmp_path / "venv").exists()


def test_continuous_integration_runs_make_test() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert "exec make test" in script.read_text()


def test_the_workflow_has_read_permission_only() -> None:
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
    assert workflow["permissions"] == {"contents": "read"}
