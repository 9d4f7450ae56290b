"""What is committed belongs together: dvc.lock to the code, and page, tables and summaries to metrics.json.

After a change of code or params these fail until `make repro` has run and its results are committed with the change.
"""

import hashlib
import html
import json
import re
from pathlib import Path

import pytest
from dvc.repo import Repo
from ruamel.yaml import YAML

from pipeline.reporting.blind import read_pretraining, read_results
from pipeline.reporting.blind_tables import blind_tables, markdown
from pipeline.reporting.gates import evaluate_gates
from pipeline.reporting.headline import headline
from pipeline.reporting.scores import QUERIES
from pipeline.reporting.sections.encoder import encoder_metrics
from pipeline.reporting.sections.table1 import UNSUPERVISED, our_systems, systems_table
from pipeline.stages.report import Settings

ROOT = Path(__file__).parent.parent
REPORTS = ROOT / "reports"
STAGES = {stage.addressing: stage for stage in Repo(str(ROOT)).index.stages if stage.cmd}


@pytest.fixture(scope="module")
def settings():
    return Settings.load(ROOT / "params.yaml")


@pytest.fixture(scope="module")
def metrics():
    return json.loads((REPORTS / "metrics.json").read_text())


@pytest.fixture(scope="module")
def entries(settings, metrics):
    """The entries from their summaries, with the intervals of metrics.json: their scores are not committed."""
    found = {
        name: {key.removeprefix(f"mixit.{name}."): x for key, x in metrics.items() if key.startswith(f"mixit.{name}.")}
        for name in settings.blind
    }
    intervals = {name: {k: x for k, x in own.items() if k[-6:] in ("_ci_lo", "_ci_hi")} for name, own in found.items()}
    return read_results(REPORTS / "stages", settings.blind, {}, intervals)


@pytest.fixture(scope="module")
def table(metrics, settings, entries):
    """Table I from metrics.json: ours, as the page and table1.md show them."""
    systems = our_systems(
        metrics, list(settings.models), QUERIES, {entry.name: UNSUPERVISED[entry.subsets] for entry in entries}
    )
    return systems_table(systems)


@pytest.mark.parametrize("name", STAGES)
def test_dvc_lock_is_of_this_code_and_these_params(name):
    """By hashes: of files and folders of code, and of the params that the stage reads. Needs no data."""
    stage = STAGES[name]
    code = [dep for dep in stage.deps if str(dep).split("/")[0] in ("pipeline", "params.yaml")]
    assert code
    stale = [str(dep) for dep in code if dep.hash_info != dep.get_hash()]
    stale += [f"{path}: {change}" for dep in stage.params for path, change in dep.status().items()]
    assert not stale, f"{name} was run before {', '.join(stale)} changed: `make repro`, and commit what it writes"
    assert not stage.changed_stage()  # the command


def test_dvc_lock_has_no_stage_that_is_gone():
    locked = set(YAML(typ="safe").load(ROOT / "dvc.lock")["stages"])
    assert locked == set(STAGES)


def test_the_provenance_is_of_these_params():
    found = json.loads((REPORTS / "provenance.json").read_text())
    assert found["params"]["sha256"] == hashlib.sha256((ROOT / "params.yaml").read_bytes()).hexdigest()


def test_the_headline_is_of_the_metrics(metrics, settings):
    failed = sum(not gate.passed for gate in evaluate_gates(metrics, settings.bounds))
    expected = headline(metrics, list(settings.models), failed)
    assert json.loads((REPORTS / "headline.json").read_text()) == expected
    assert failed == 0


def test_the_metrics_are_of_the_stages_summaries(metrics, settings, entries):
    def summary(name):
        return json.loads((REPORTS / "stages" / f"{name}.json").read_text())

    probes = {model: summary(f"probe_{model}") for model in settings.with_features}
    expected = encoder_metrics(summary("pretrain_mae"), probes, {})
    pretraining = read_pretraining(summary("pretrain_performer"))
    expected |= {f"pretrain_performer.{key}": value for key, value in pretraining.items()}
    for entry in entries:
        expected |= entry.metrics()
    assert {key: metrics.get(key) for key in expected} == expected
    for split in ("train", "eval"):
        assert metrics[f"data.{split}.pairs"] == summary(f"pairs_{split}")["pairs"]


@pytest.fixture(scope="module")
def rows(table):
    return table.rows


def test_table_1_is_of_the_metrics_cell_by_cell(table, rows):
    text = (REPORTS / "table1.md").read_text().split("\n## ")[0]
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    written = [[cell.strip() for cell in line.split(" | ")] for line in (line[2:-2] for line in lines)]
    assert written[0] == list(table.columns)
    for row in rows:
        assert [cell.markdown for cell in row.cells] in written
    assert len(rows) > 2


def test_the_page_is_of_the_metrics_cell_by_cell(rows, metrics, settings):
    page = (REPORTS / "report.html").read_text()

    def cells(part):
        found = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, re.DOTALL) for row in re.findall(r"<tr.*?</tr>", part)]
        return [[html.unescape(re.sub("<[^>]*>", " ", cell)).split() for cell in row] for row in found]

    section = page[page.index('<section id="table1">') : page.index('<section id="classes">')]
    shown = cells(section)
    for row in rows:
        assert [str(cell).split() for cell in row.cells] in shown
    for gate in evaluate_gates(metrics, settings.bounds):
        (found,) = [row for row in shown if row[:1] == [[gate.key]]]
        assert found[1] == ["pass" if gate.passed else "FAIL"]
        assert found[2] == [f"{gate.value:.4g}"]


def test_the_tables_without_queries_are_of_the_summaries(entries, settings):
    pretraining = json.loads((REPORTS / "stages" / "pretrain_performer.json").read_text())
    shown = blind_tables(entries, read_pretraining(pretraining))
    assert (REPORTS / "mixit.md").read_text() == markdown(entries, shown, settings.music_source)
