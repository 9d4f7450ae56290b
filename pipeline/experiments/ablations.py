"""`make ablations`: each ablation as a DVC experiment, and one table of what came of them.

    python -m pipeline ablations --list      # one line each, to run by hand
    python -m pipeline ablations             # run those that are missing, one after the other, and collect
    python -m pipeline ablations --collect   # only write reports/ablations.csv and .md

An experiment belongs to a commit: those that this commit has already are not run again, so that the command can be
killed and called again. One whose params.yaml differs from the workspace's in more than its setting is refused by name:
it is of another profile. Each runs in a copy of the workspace, whose own results stay. `dvc repro report` then shows
the table in the page.
"""

import argparse
import copy
import csv
import io
import json
import logging
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dvc.api  # type: ignore[import-untyped]
from ruamel.yaml import YAML

from pipeline.core.runtime import read_json, run_command, write_atomic
from pipeline.reporting.ablation_table import (
    ABLATION_COLUMNS,
    ablation_row,
    ablation_table,
    about,
    as_it_stands,
    read_ablations,
)
from pipeline.reporting.tables import markdown_escape

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Ablation:
    """One experiment: `settings` are what differs from params.yaml."""

    name: str
    settings: tuple[str, ...]
    why: str

    @property
    def command(self) -> str:
        """The line that runs it by hand."""
        return " ".join(["dvc exp run", *(f"-S {setting}" for setting in self.settings)])


def _one(name: str, setting: str, why: str) -> Ablation:
    return Ablation(name, (setting,), why)


ABLATIONS = (
    _one("upstream-none", "model.upstream=none", "the width of the features without features"),
    _one("upstream-constant", "model.upstream=constant", "one table of vectors for every mixture"),
    _one("upstream-panns", "model.upstream=panns", "features that know the classes: the query encoder's own"),
    _one("upstream-wavlm", "model.upstream=wavlm", "a speech model; random weights unless params.yaml names a folder"),
    _one("upstream-dasheng", "model.upstream=dasheng", "a general-audio model; random weights unless a file is named"),
    _one("input-crop", "model.mae_input=crop", "aligned in time"),
    _one("input-hop35", "model.mae_input=hop35", "aligned, with the paper's shapes"),
    _one("layers-last3", "model.layers=last3", "the mean of the last three (of fewer: of all), as AudioLDM2 has it"),
    _one("layers-weighted", "model.layers=weighted", "all layers, frozen"),
    _one("repeat-tile", "model.repeat=tile", "the other reading of 'repeated 7 times'"),
    _one("fusion-channel", "model.fusion=channel", "a second channel in place of more columns"),
    _one("fusion-deep", "model.fusion=deep", "where a row of the U-Net is 16 frames"),
    _one("fusion-film", "model.fusion=film", "the mean over time, with the query"),
    _one("fusion-attention", "model.fusion=attention", "looked up at the bottleneck"),
    _one("fusion-interferer", "model.fusion=interferer", "they tell what else sounds, by an objective of its own"),
    Ablation(
        "interferer-untrained",
        ("model.fusion=interferer", "model.upstream=mae_untrained"),
        "the same objective, on an encoder of random weights",
    ),
    _one("fusion-none", "model.fusion=none", "the baseline through the same code"),
    _one("updated", "model.freeze_mae=false", "the encoder learns, all its layers are used"),
    Ablation("lora", ("model.freeze_mae=false", "model.lora_rank=8"), "low-rank adapters learn in the encoder"),
    _one("gains-none", "pairs.normalize=none", "no rescaling of the mixtures"),
    _one("gains-declip", "pairs.normalize=declip", "only mixtures that clip are rescaled"),
    _one("gains-separate", "pairs.normalize=separate", "Eq. 2 read literally"),
)


def _run(*command: str) -> str:
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return done.stdout


def finished() -> dict[str, str]:
    """Git references of the experiments of this commit, by name."""
    head = _run("git", "rev-parse", "HEAD").strip()
    prefix = f"refs/exps/{head[:2]}/{head[2:]}/"
    references = _run("git", "for-each-ref", "--format=%(refname)", prefix).split()
    return {reference.removeprefix(prefix): reference for reference in references}


def check_same_but(ablation: Ablation, reference: str, workspace: Mapping[str, Any]) -> None:
    """ValueError where an experiment's params.yaml is not that of the workspace with `ablation.settings`.

    `report` and `gate` may differ: they are read after the scores are there.
    """
    expected, found = copy.deepcopy(dict(workspace)), params_of(reference)
    for setting in ablation.settings:
        place, value = setting.split("=", 1)
        *sections, key = place.split(".")
        node = expected
        for section in sections:
            node = node[section]
        node[key] = YAML(typ="safe").load(value)
    keys = sorted(key for key in {*found, *expected} - {"report", "gate"} if found.get(key) != expected.get(key))
    if keys:
        raise ValueError(
            f"experiment {ablation.name} differs from the workspace in more than {' '.join(ablation.settings)}: see "
            f"{', '.join(keys)} in `dvc params diff {ablation.name}`; remove it with `dvc exp remove {ablation.name}`"
        )


def params_of(revision: str | None) -> dict[str, Any]:
    """params.yaml of a revision, or of the workspace."""
    return dict(dvc.api.params_show("params.yaml", rev=revision))


def threads_of_the_report(reports: Path) -> dict[str, str]:
    """OMP_NUM_THREADS of the trainings in provenance.json; nothing where that is not known, or they differ."""
    path = reports / "provenance.json"
    threads = json.loads(path.read_bytes()).get("training_threads", []) if path.is_file() else []
    return {"OMP_NUM_THREADS": str(threads[0])} if len(threads) == 1 else {}


def run(chosen: Sequence[Ablation]) -> list[str]:
    """Run those that this commit has not, each as `dvc exp run --temp`; return what failed. The rest goes on.

    On as many threads as the models that they are compared with, where OMP_NUM_THREADS does not say: the last bits of
    sums depend on it, and a short training makes tenths of a dB of them. ValueError where this commit has one of
    another params.yaml.
    """
    references, workspace = finished(), params_of(None)
    for ablation in chosen:  # all of them before any is run, which takes hours
        if ablation.name in references:
            check_same_but(ablation, references[ablation.name], workspace)
    environment = threads_of_the_report(Path("reports")) | dict(os.environ)
    failed = []
    for ablation in chosen:
        if ablation.name in references:
            log.info("%s: done", ablation.name)
            continue
        settings = [part for setting in ablation.settings for part in ("-S", setting)]
        command = [sys.executable, "-m", "dvc", "exp", "run", "--temp", "--name", ablation.name, *settings]
        code = subprocess.run(command, env=environment, stdout=subprocess.DEVNULL).returncode
        if code != 0:
            log.error("%s failed (%d): %s", ablation.name, code, ablation.command)
            failed.append(ablation.name)
    return failed


def collect(known: Sequence[Ablation], reports: Path) -> list[dict[str, str]]:
    """Write ablations.csv and ablations.md from the finished experiments, the run as it stands first.

    Lines that are there already stay, where this commit has no experiment for them and the run as it stands is still
    the same: a later commit need not run them all again. FileNotFoundError where there is no run.
    """
    current = read_json(reports / "metrics.json")
    path = reports / "ablations.csv"
    references, workspace = finished(), params_of(None)
    try:
        kept = {(row["name"], row["setting"]): row for row in read_ablations(path, current, workspace)}
    except ValueError as error:  # of an older form, or no table
        log.warning("made anew: %s", error)
        kept = {}
    rows = [as_it_stands(current, workspace)]
    for ablation in known:
        setting = " ".join(ablation.settings)
        if ablation.name in references:
            check_same_but(ablation, references[ablation.name], workspace)
            metrics = json.loads(_run("git", "show", f"{references[ablation.name]}:{reports / 'metrics.json'}"))
            rows.append(ablation_row(ablation.name, setting, ablation.why, metrics, workspace))
        elif (ablation.name, setting) in kept:
            rows.append(kept[ablation.name, setting])
    text = io.StringIO()
    writer = csv.DictWriter(text, ABLATION_COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomic(path, text.getvalue())
    lines = ["# Ablations", "", markdown_escape(about(workspace)), "", *ablation_table(rows).markdown]
    write_atomic(reports / "ablations.md", "\n".join(lines) + "\n")
    return rows


def main() -> None:
    """Run the ablations that the command line asks for."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="print the commands and run nothing")
    parser.add_argument("--collect", action="store_true", help="only write the tables")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="some of them")
    args = parser.parse_args()
    unknown = set(args.only or ()) - {ablation.name for ablation in ABLATIONS}
    if unknown:
        parser.error(f"no ablation {sorted(unknown)}; there are {[ablation.name for ablation in ABLATIONS]}")
    chosen = [ablation for ablation in ABLATIONS if not args.only or ablation.name in args.only]
    if args.list:
        for ablation in chosen:
            print(f"{ablation.command:<70}# {ablation.why}")
        return
    if not Path("reports/metrics.json").is_file():  # before hours of experiments
        parser.exit(1, "no reports/metrics.json, which the ablations are compared with: `make repro` first\n")
    failed = [] if args.collect else run(chosen)
    if not finished():
        parser.exit(1, "this commit has no finished ablation: reports/ablations.* stay as they are\n")
    for found in collect(ABLATIONS, Path("reports")):
        log.info("%s", " ".join(found[key] for key in ABLATION_COLUMNS[:-1]))
    if failed:
        parser.exit(1, f"failed: {', '.join(failed)}. What they said is above.\n")


if __name__ == "__main__":
    run_command(main)
