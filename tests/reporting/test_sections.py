"""Sections of the report: one file each, found by being there; and the tables that they are made of."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from dvc.repo import Repo

from pipeline.reporting.sections import load_sections
from pipeline.reporting.tables import Cell, Row, Table, words
from pipeline.stages.report import report
from tests.stages.test_report import make_run

ROOT = Path(__file__).parents[2]

LOUDEST = '''\
"""The class of the loudest mixture, which no other section says."""

from pipeline.reporting.sections import Drawing
from pipeline.reporting.sections import Section as Base


class Section(Base[dict]):
    title = "Loudest <class>"
    place = 35
    template = """<p>Its input SDR is {{ metrics["loudest.sdr"] | db }} dB & <{{ name }}>.</p>{{ drawings.loudest }}"""

    def read(self, run):
        row = run.scores.loc[run.scores["sdr_mixture"].idxmax()]
        return {"name": row["mid"], "sdr": float(row["sdr_mixture"])}

    def metrics(self, data):
        return {"loudest.sdr": data["sdr"]}

    def drawings(self, data, metrics):
        return {"loudest": Drawing('<svg viewBox="0 0 1 1"></svg>', "a drawing")}

    def files(self, data, metrics):
        return {"loudest.txt": data["name"]}

    def context(self, data, metrics):
        return data
'''

REPORT = """\
import sys
from dataclasses import replace
from pathlib import Path

from dvc.repo import Repo
from tests.stages.test_report import make_run
from pipeline.stages.report import report
root = Path(sys.argv[1])
places, settings = make_run(root)
report(places, root / "reports", settings)
"""


def test_a_section_is_added_by_one_file_and_nothing_else(tmp_path):
    for package in ("pipeline", "tests"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__", "golden"))
    (tmp_path / "pipeline" / "reporting" / "sections" / "loudest.py").write_text(LOUDEST)
    command = [sys.executable, "-c", REPORT, str(tmp_path / "run")]
    done = subprocess.run(command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(tmp_path)}, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    reports = tmp_path / "run" / "reports"
    page = (reports / "report.html").read_text()
    assert '<a href="#loudest">Loudest &lt;class&gt;</a>' in page
    assert page.index('<section id="classes">') < page.index('<section id="loudest">')
    assert page.index('<section id="loudest">') < page.index('<section id="input">')
    assert "Its input SDR is " in page
    assert 'aria-label="a drawing"' in page
    assert '"loudest.sdr": ' in (reports / "metrics.json").read_text()
    assert (reports / "loudest.svg").is_file()
    assert (reports / "loudest.txt").read_text().startswith("/m/")


def test_every_section_has_its_own_place_and_says_what_it_shows():
    sections = load_sections()
    places = [section.place for section in sections.values()]
    assert places == sorted(set(places))
    assert next(iter(sections)) == "verdict"
    assert [name for name, section in sections.items() if not section.title] == ["verdict"]
    assert all(section.template for section in sections.values())


# ------------------------------------------------------------------------------------------------- tables

TABLE = Table(
    ["name", "word", "number"],
    [
        Row([Cell("a<b>"), Cell("x|y", code=True), Cell("1.00", "[0.50, 1.50]")], flag="bad | worse"),
        Row([*words("other", "differs"), Cell("no", tone="bad")], reference=True),
    ],
    n_text=2,
    title="Two",
    notes=["a *note*"],
)


def test_a_table_is_written_as_markdown():
    assert TABLE.section() == [
        "## Two",
        "",
        "| name | word | number |",
        "| --- | --- | --- |",
        "| a\\<b\\> (bad \\| worse) | `x\\|y` | 1.00 [0.50, 1.50] |",
        "| other | differs | **no** |",
        "",
        "- a \\*note\\*",
    ]
    assert Table(["a"], [], title="None").section() == ["## None", "", "No entry."]


def test_the_same_table_is_written_as_html():
    html = str(TABLE.html)
    assert '<th>name</th><th>word</th><th class="n">number</th>' in html
    assert '<tr><th>a&lt;b&gt; <span class="flag">bad | worse</span></th><td><code>x|y</code></td>' in html
    assert '<td class="n">1.00<br><span class="ci">[0.50, 1.50]</span></td></tr>' in html
    assert '<tr class="reference"><th>other</th><td>differs</td><td class="n"><span class="bad">no</span></td>' in html
    assert 'class="n"' not in str(Table(["a", "b"], [Row(words("1", "2"))], n_text=-1).html)


class Recording(dict):
    """A document of params that records the sections that are read of it."""

    def __init__(self, document):
        super().__init__(document)
        self.read = set()

    def __getitem__(self, key):
        self.read.add(key)
        return super().__getitem__(key)

    def get(self, key, default=None):
        self.read.add(key)
        return super().get(key, default)

    def __contains__(self, key):
        self.read.add(key)
        return super().__contains__(key)


def test_dvc_yaml_lists_every_section_of_params_that_the_report_reads(tmp_path):
    places, settings = make_run(tmp_path)
    document = Recording(settings.document)
    report(places, tmp_path / "reports", replace(settings, document=document))
    (stage,) = [stage for stage in Repo(str(ROOT)).index.stages if stage.addressing == "report"]
    listed = {key.split(".")[0] for dep in stage.deps if hasattr(dep, "params") for key in dep.params}
    assert {"data", "train", "separators", "mixit_music"} <= document.read <= listed


def test_exports_are_a_section_where_there_are_some_and_no_byte_where_there_are_none(tmp_path):
    places, settings = make_run(tmp_path)
    before = report(places, tmp_path / "reports", settings)
    assert not [key for key in before if key.startswith("exports.")]
    assert "Exports" not in (tmp_path / "reports/report.html").read_text()
    parity = {"max_difference": 1.5e-7, "rtf_network": 0.07, "rtf_export": 0.08, "mb_network": 6.4, "mb_export": 14.9}
    for name, change in (("resunet_onnx", -0.0001), ("a_<b>", None)):
        folder = tmp_path / "data/exports" / name
        folder.mkdir(parents=True)
        (folder / "parity.json").write_text(json.dumps(parity | {"sdri_change": change}))
    after = report(places, tmp_path / "reports", settings)
    assert after == before | {
        "exports.resunet_onnx.sdri_change": -0.0001,
        "exports.resunet_onnx.max_difference": 1.5e-7,
        "exports.a_<b>.max_difference": 1.5e-7,
    }
    page = (tmp_path / "reports/report.html").read_text()
    assert '<section id="exports">' in page
    assert "<code>a_&lt;b&gt;</code>" in page
