"""Stage report: the numbers of the run, and one page to look at and listen to.

metrics.json (flat, for the gates), headline.json (a few of them, for `dvc metrics`), report.html, which needs no other
file and no network, and the files and drawings of each section (reporting/sections). All are made from one set of
numbers. The same inputs give the same bytes; only what names the run (provenance.json, and timings in report.html) may
differ.
"""

import argparse
import logging
from pathlib import Path

from pipeline.core.runtime import as_json, run_command, running, write_together
from pipeline.reporting.gates import evaluate_gates
from pipeline.reporting.headline import headline
from pipeline.reporting.page import MAX_BYTES, page, piece
from pipeline.reporting.run import Places, ReportParams, Run, Settings
from pipeline.reporting.sections import load_sections

log = logging.getLogger(__name__)

__all__ = ["Places", "ReportParams", "Settings", "report"]


def report(places: Places, out: Path, settings: Settings) -> dict[str, int | float]:
    """Write all files of the report into `out`, together or none of them; return what metrics.json holds.

    ValueError where scores are missing for every model, incomplete, or of different pairs for different models.
    A model without scores, and a data stage that was not run, are named in the page.
    """
    run = Run.read(places, settings)
    sections = load_sections()
    read = {name: section.read(run) for name, section in sections.items()}
    data = {name: found for name, found in read.items() if found is not None}
    numbers: dict[str, int | float] = {}
    for name, found in data.items():
        numbers |= sections[name].metrics(found)
    metrics = dict(sorted(numbers.items()))
    n_failed = sum(not gate.passed for gate in evaluate_gates(metrics, settings.bounds))
    files: dict[str, str | bytes] = {
        "metrics.json": as_json(metrics),
        "headline.json": as_json(headline(metrics, run.models, n_failed)),
    }
    drawings, contexts, pieces = {}, {}, {}
    for name, found in data.items():
        section = sections[name]
        drawings[name] = section.drawings(found, metrics)
        files |= {f"{key}.svg": drawing.svg for key, drawing in drawings[name].items() if drawing.kept}
        files |= section.files(found, metrics)
        contexts[name] = section.context(found, metrics)
        pieces[name] = piece(name, section, drawings[name], metrics, contexts[name])
    for name, found in data.items():  # the page is complete but for sounds: they take what is left of its size
        left = MAX_BYTES - len(page(list(pieces.values())).encode())
        if more := sections[name].fill(found, left):
            pieces[name] = piece(name, sections[name], drawings[name], metrics, contexts[name] | more)
    files["report.html"] = page(list(pieces.values()))
    write_together({out / name: content for name, content in files.items()})
    return metrics


def main() -> None:
    """Paths come from dvc.yaml, numbers from params.yaml."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("scores", "manifest", "clips", "anchors", "pairs", "separators", "pretrained", "summaries", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--mixit-scores", type=Path, default=Path("data/mixit_scores"))
    args = vars(parser.parse_args())
    out = args.pop("out")
    settings = Settings.load(Path("params.yaml"))
    places = Places(
        **args,
        timings=Path("data/timings"),  # where runtime.running leaves them
        ablations=out / "ablations.csv",
        params=Path("params.yaml"),
        root=Path("."),
    )
    with running("report", out):
        metrics = report(places, out, settings)
        for gate in evaluate_gates(metrics, settings.bounds):
            log.info("gate %s: %s (%s)", gate.key, "pass" if gate.passed else "FAIL", gate.why)


if __name__ == "__main__":
    run_command(main)
