"""Table I over training seeds: what another training would have given, beside what other recordings would have.

    python -m pipeline seeds --seeds 1 2             # run those that this commit has not, and collect all there are
    python -m pipeline seeds --collect               # only write reports/seeds/seeds.json and .md
    python -m pipeline seeds --runs runs/0 runs/1    # collect from folders named by their seed: <model>/scores.parquet
    ... --equivalent upstream_constant upstream_none   # and say whether two models agree within noise
    python -m pipeline seeds --again reports/seeds   # make the table again from the scores that lie beside it

Beside the table lie the scores that it is made of and the params of their runs: scores.parquet and params.yaml.

Each seed is an experiment, seed-N, with `train.seed` alone changed: the separators are trained anew, while detector,
encoders and evaluation pairs stay. The workspace's own scores are the run of params.yaml's seed.

What is made of the runs, and how its intervals are meant: pipeline/reporting/over_seeds.py.
"""

import argparse
import logging
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import dvc.api  # type: ignore[import-untyped]
import pandas as pd
from dvc.exceptions import DvcException  # type: ignore[import-untyped]
from pydantic import ConfigDict, Field

from pipeline.core.config import Params, load_params, read_document
from pipeline.core.runtime import run_command
from pipeline.experiments.ablations import Ablation, check_same_but, finished, params_of, run
from pipeline.reporting.kept import PARAMS, keep, read_kept
from pipeline.reporting.over_seeds import check_runs, lines, summarise, write
from pipeline.reporting.run import baseline as first_separator
from pipeline.reporting.scores import AVERAGE, WITH_INTERFERER, read_scores

log = logging.getLogger(__name__)


class SeedParams(Params):
    """The one key of `train:` that this is about; the section is checked by the stage that trains."""

    model_config = ConfigDict(extra="ignore", strict=True, frozen=True)
    seed: int = Field(ge=0, lt=2**31)


class BootstrapParams(Params):
    """Settings of intervals in `report:` of params.yaml: these are drawn as the report's are."""

    model_config = ConfigDict(extra="ignore")

    bootstrap_resamples: int = Field(gt=1)
    bootstrap_seed: int = Field(ge=0, lt=2**31)


def read_run(scores: Path) -> dict[str, pd.DataFrame]:
    """All models of one run, by name: scores/<model>/scores.parquet, the rows of the average query by pair.

    A model that was also given what else sounds is there twice, the second time as <model>+interferer.
    """
    models = sorted(path.parent.name for path in scores.glob("[!.]*/scores.parquet"))
    if not models:
        raise ValueError(f"no <model>/scores.parquet in {scores}")
    tables = {}
    for model in models:
        table = read_scores(scores, [model])
        tables[model] = table[table["query"] == AVERAGE].reset_index(drop=True)
        if tables[model].empty:
            raise ValueError(f"{scores / model / 'scores.parquet'} has no rows of the {AVERAGE} query")
        given = table[table["query"] == WITH_INTERFERER].reset_index(drop=True)
        if not given.empty:
            tables[f"{model}+interferer"] = given
    return tables


def from_folders(folders: Sequence[Path]) -> dict[int, dict[str, pd.DataFrame]]:
    """Runs from folders, each named by its seed."""
    runs: dict[int, dict[str, pd.DataFrame]] = {}
    for folder in folders:
        if not re.fullmatch(r"[0-9]+", folder.name):
            raise ValueError(f"{folder}: a run's folder is named by its seed, as in runs/0")
        if int(folder.name) in runs:
            raise ValueError(f"{folder}: seed {int(folder.name)} is given twice")
        runs[int(folder.name)] = read_run(folder)
    return runs


def from_experiments(scores: Path) -> dict[int, dict[str, pd.DataFrame]]:
    """The workspace's run, and those of the experiments seed-N of this commit: their scores out of DVC's cache.

    ValueError where an experiment differs from the workspace in more than its seed.
    """
    own = load_params("train", SeedParams).seed
    runs, workspace = {own: read_run(scores)}, params_of(None)
    for name, reference in sorted(finished().items()):
        if not re.fullmatch(r"seed-[0-9]+", name):
            continue
        seed = int(name.removeprefix("seed-"))
        if seed == own:
            log.info("%s: the workspace's own run stands for it", name)
            continue
        check_same_but(_training(seed), reference, workspace)
        with tempfile.TemporaryDirectory() as folder:
            _fetch(reference, name, scores, Path(folder))
            runs[seed] = read_run(Path(folder))
    return runs


def _training(seed: int) -> Ablation:
    return Ablation(f"seed-{seed}", (f"train.seed={seed}",), "another training")


def _fetch(revision: str, name: str, scores: Path, folder: Path) -> None:
    """Copy scores/<model>/scores.parquet of a revision to folder/<model>/, out of DVC's cache or its remote."""
    try:
        files = dvc.api.DVCFileSystem(rev=revision)
        for directory in files.ls(scores.as_posix(), detail=False):
            source = f"{directory}/scores.parquet"
            if files.exists(source):
                target = folder / Path(directory).name / "scores.parquet"
                target.parent.mkdir()
                files.get_file(source, str(target))
    except (OSError, DvcException) as error:
        raise ValueError(f"the scores of experiment {name} cannot be read from DVC's cache: {error}") from error


def table_again(folder: Path) -> dict[str, Any]:
    """Make the table from the scores and params that lie in its folder, and from nothing else."""
    runs, equivalent = read_kept(folder)
    bootstrap = load_params("report", BootstrapParams, folder / PARAMS)
    return summarise(
        runs,
        n_resamples=bootstrap.bootstrap_resamples,
        seed=bootstrap.bootstrap_seed,
        baseline=first_separator(read_document(folder / PARAMS)),
        equivalent=equivalent,
    )


def main() -> None:
    """Run the trainings of other seeds, or collect finished ones, as the command line asks."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--seeds", nargs="+", type=int, metavar="N", help="run those that are missing, and collect")
    what.add_argument("--collect", action="store_true", help="only write the tables")
    what.add_argument("--runs", nargs="+", type=Path, metavar="DIR", help="collect from these, each named by its seed")
    what.add_argument("--again", type=Path, metavar="DIR", help="make DIR's table from the scores and params in it")
    parser.add_argument(
        "--params", type=Path, default=Path("params.yaml"), help="of --runs, to lie beside the table (%(default)s)"
    )
    parser.add_argument("--scores", type=Path, default=Path("data/scores"), help="of the workspace and experiments")
    parser.add_argument("--out", type=Path, default=Path("reports/seeds"))
    parser.add_argument(
        "--equivalent", nargs=2, action="append", metavar=("A", "B"), default=[], help="may be given more than once"
    )
    args = parser.parse_args()
    out = args.again or args.out
    if args.seeds:
        own = load_params("train", SeedParams).seed
        seeds = [seed for seed in dict.fromkeys(args.seeds) if seed != own]
        run([_training(seed) for seed in seeds])
    if not args.again:
        collected = from_folders(args.runs) if args.runs else from_experiments(args.scores)
        check_runs(collected)
        keep(collected, out, args.params, [(a, b) for a, b in args.equivalent])
    summary = table_again(out)
    write(summary, out)
    for line in lines(summary):
        log.info("%s", line)


if __name__ == "__main__":
    run_command(main)
