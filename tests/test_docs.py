"""Texts for people: README is a front door, links resolve, nothing is left to fill in, figures are those of the run."""

import json
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TRACKED = subprocess.run(["git", "ls-files", "*.md"], cwd=ROOT, capture_output=True, text=True).stdout.split("\n")[:-1]
PAGES = [name for name in TRACKED if not name.startswith(("reports/", "tests/"))]
README = (ROOT / "README.md").read_text()


def without_code(text: str) -> str:
    return re.sub(r"```.*?```", "", text, flags=re.DOTALL)


def test_readme_is_a_front_door():
    assert len(README.splitlines()) <= 150


@pytest.mark.parametrize("name", TRACKED)
def test_nothing_is_left_to_fill_in(name):
    assert not re.search(r"@@\w*@@|@[A-Z]{4,}@|\bTODO\b|\bFIXME\b|\bXXX\b", (ROOT / name).read_text())


@pytest.mark.parametrize(
    "name", [name for name in PAGES if name in ("README.md", "CONTRIBUTING.md") or "docs/" in name]
)
def test_no_line_is_wider_than_a_screen(name):
    prose = [line for line in without_code((ROOT / name).read_text()).splitlines() if not line.startswith(("|", "#"))]
    assert [line for line in prose if len(re.sub(r"\]\([^)]*\)", "]", line)) > 125] == []


@pytest.mark.parametrize("name", PAGES)
def test_links_to_files_resolve(name):
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", (ROOT / name).read_text()):
        if "://" not in target:
            assert (ROOT / name).parent.joinpath(target).exists(), target


def test_readmes_figures_are_those_of_the_committed_metrics():
    """Every number with two decimals in README's table is a number of that model in reports/metrics.json."""
    metrics = json.loads((ROOT / "reports/metrics.json").read_text())
    table = README[README.index("## What comes out") : README.index("## Where things are")]
    rows = [line for line in table.splitlines() if line.startswith("|") and re.search(r"\d\.\d\d", line)]
    assert len(rows) >= 4
    for row in rows:
        name, *cells = (cell.strip(" *`") for cell in row.strip("|").split("|"))
        prefixes = (
            f"{name}.average.",
            f"{name}.average+interferer.",
            f"mixit.{name}.",
            "half_mixture." if "half" in name else "\n",
        )
        known = {f"{value:.2f}" for key, value in metrics.items() if key.startswith(prefixes)}
        assert set(re.findall(r"-?\d+\.\d\d", " ".join(cells))) <= known, row


def test_documents_name_targets_that_make_has():
    targets = set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for name in PAGES:
        for target in re.findall(r"`make ([a-z][a-z-]*)|^make ([a-z][a-z-]*)", (ROOT / name).read_text(), re.MULTILINE):
            assert (target[0] or target[1]) in targets, (name, target)
