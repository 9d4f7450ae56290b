"""Check, before anything is trained, all that params.yaml says: the first stage of the graph and of `make repro`.

    python -m pipeline check

Names of entries, every section, the files that it names (there, whole, of the hash that it states), folders of data,
ffmpeg where the data need it, the device, the free disk and memory. One line `error: ...` and exit status 2 for the
first thing that is wrong; otherwise a few lines on what the run will take.
"""

import argparse
import os
import re
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from pipeline.core import config
from pipeline.core.config import SECTIONS, Params, load_params
from pipeline.core.runtime import cpu_count, outside, run_command, write_atomic
from pipeline.experiments.sizes import check_sizes

ENTRIES = ("separators", "mae_separators", "mixit_music", "mixit_clips")
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]*", re.ASCII)
MAX_NAME = 64
# Files of reports/stages are named after stages and entries: these names would be another stage's.
RESERVED = re.compile(r"sed|mixit_.*|train_.*|evaluate_.*|probe_.*|pretrain_.*")
NEEDS_FFMPEG = (".m4a", ".mp4", ".webm", ".mkv", ".aac")
OTHER_NUMBERS = {"data", "mixture", "pretrain_mae", "sed", "train"}  # of metrics.json, beside those of entries
LOOK_AT = 2000  # files of a folder of data, at most: it may have millions
GIGABYTE = 1e9


def check_names(document: Mapping[str, Any]) -> None:
    """ValueError for a name of an entry that is no plain name: it becomes a part of commands and of paths."""
    seen: dict[str, str] = {}
    for section in ENTRIES:
        entries = document.get(section)
        if not isinstance(entries, dict):
            raise ValueError(f"params.yaml: {section} must be a mapping of names to entries, not {entries!r}")
        for name in entries:
            where = f"params.yaml: {section}: the name {str(name)[:MAX_NAME]!r}"
            if not isinstance(name, str):
                raise ValueError(f"{where} is a {type(name).__name__}, not text: use letters, or quote it")
            if not NAME.fullmatch(name):
                raise ValueError(f"{where} must be of letters A-Z a-z, digits, _ and -, and not begin with -")
            if len(name) > MAX_NAME:
                raise ValueError(f"{where}... has {len(name)} characters; {MAX_NAME} are allowed")
            if RESERVED.fullmatch(name):
                raise ValueError(f"{where} is reserved: its files would be those of another stage")
            kind = "mixit" if section.startswith("mixit_") else "separators"
            if (other := seen.setdefault(f"{kind}/{name}", section)) != section:
                raise ValueError(f"{where} is in {other} too: their files would be the same")


def sections() -> dict[str, type[Params]]:
    """List the Params class of each section of params.yaml, but those of entries."""
    from pipeline.core.config import AudioParams, DataParams
    from pipeline.datasets import synthetic
    from pipeline.mixtures.mixing import PairsParams
    from pipeline.mixtures.tracks import MusicParams
    from pipeline.reporting.gates import GateParams
    from pipeline.stages import evaluate, evaluate_mixit, make_eval_pairs, mine_anchors, report, resample, sed
    from pipeline.stages.train_separator import TrainParams
    from pipeline.training import mae as pretraining
    from pipeline.training.mixit import MixitParams, PretrainPerformerParams

    return {
        "data": DataParams,
        "synthetic": synthetic.Options,
        "audio": AudioParams,
        "resample": resample.ResampleParams,
        "sed": sed.SedParams,
        "pretrain_mae": pretraining.PretrainParams,
        "mine_anchors": mine_anchors.MineAnchorsParams,
        "pairs": PairsParams,
        "make_eval_pairs": make_eval_pairs.MakeEvalPairsParams,
        "train": TrainParams,
        "evaluate": evaluate.EvaluateParams,
        "music": MusicParams,
        "pretrain_performer": PretrainPerformerParams,
        "mixit": MixitParams,
        "evaluate_mixit": evaluate_mixit.EvaluateMixitParams,
        "report": report.ReportParams,
        "gate": GateParams,
    }


def check_params(path: Path) -> dict[str, Any]:
    """Hold every section and entry of a params.yaml to its type; return the document. ValueError names the key."""
    if not path.is_file():
        raise ValueError(f"no file {path}: run this in the project's folder; `make profile NAME=default` writes one")
    document = config.read_document(path)
    if not isinstance(document, dict):
        raise ValueError(f"{path} is not a mapping of sections")
    if missing := sorted(SECTIONS - set(document)):
        raise ValueError(f"{path}: no section {', '.join(missing)}")
    check_names(document)
    from pipeline import datasets, upstreams
    from pipeline.datasets import music
    from pipeline.datasets.music.synthetic_stems import Options as SyntheticStems
    from pipeline.evaluation import metrics
    from pipeline.separators import fusions, model_params
    from pipeline.separators._features import Settings
    from pipeline.stages.train_separator import SeparatorParams, read_mae_entry, read_train
    from pipeline.training.mixit import read_entry

    for section, params in sections().items():
        load_params(section, params, path)
    for section, load in (("data", datasets.load), ("music", music.load)):
        try:
            load(document[section]["source"])
        except ValueError as error:
            raise ValueError(f"{path}: {section}.source: {error}") from None
    for name in document["separators"]:
        entry = load_params(f"separators.{name}", SeparatorParams, path)
        with _at(f"separators.{name}", "architecture"):
            load_params(f"separators.{name}.model", model_params(entry.architecture), path)
        read_train(name, "separators", path)
    for name in document["mae_separators"]:
        with _at(f"mae_separators.{name}", "architecture, body, settings"):
            read_mae_entry(name, path)
        read_train(name, "mae_separators", path)
    for place in ["model", *(f"variants.{name}" for name in document["variants"])]:
        settings = load_params(place, Settings, path)
        load_params(f"{place}.fusion_options", fusions.options(settings.fusion), path)
    for name in document["evaluate"]["metrics"]:
        with _at("evaluate", "metrics"):
            load_params(f"evaluate.metrics.{name}", metrics.options(name), path)
    for name in document["upstreams"]:
        if (options := upstreams.options(name)) is not None:
            load_params(f"upstreams.{name}", options, path)
    load_params("music.synthetic_stems", SyntheticStems, path)
    for data in ("music", "clips"):
        for name in document[f"mixit_{data}"]:
            with _at(f"mixit_{data}.{name}", "architecture, model"):
                read_entry(name, data, path)
    with _at("pretrain_performer", "model"):
        load_params(document["pretrain_performer"]["model"], model_params("performer"), path)
    used = {entry["model"] for data in ("music", "clips") for entry in document[f"mixit_{data}"].values()}
    for name in document["mixit_models"]:
        if (place := f"mixit_models.{name}") not in {*used, document["pretrain_performer"]["model"]}:
            _check_unused(place, path)
    return document


def _check_unused(place: str, path: Path) -> None:
    """ValueError for the sizes of a separator without queries that no entry uses, and that fit none."""
    from pipeline import separators

    for architecture in separators.names():
        if not separators.takes_query(architecture):
            try:
                load_params(place, separators.model_params(architecture), path)
            except ValueError:
                continue
            return
    raise ValueError(f"{path}: {place} fits no separator without queries, and no entry uses it")


@contextmanager
def _at(entry: str, keys: str) -> Iterator[None]:
    """Say which entry's keys an error is about, where it names a place that they point to, or none."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{entry} ({keys}): {error}") from None


def check_gates(document: Mapping[str, Any]) -> None:
    """ValueError for a gate on a number of a model that is no entry: it would fail after all trainings."""
    entries = {name for section in ENTRIES for name in document[section]}
    for key in document["gate"]:
        head, _, rest = key.partition(".")
        name = rest.partition(".")[0] if head == "mixit" else head
        if name not in entries and head not in OTHER_NUMBERS:
            raise ValueError(f"params.yaml: gate: {key}: no entry {name!r}; there are {sorted(entries)}")


def weights_of(document: Mapping[str, Any]) -> Iterator[tuple[str, Path, str | None]]:
    """(key, file, SHA-256 or None) of every file of weights that the document names and a stage will open."""
    sed, mae = document["sed"], document["pretrain_mae"]
    places = [("sed.weights", sed["weights"], sed["weights_sha256"])]
    places.append(("sed.query_weights", sed["query_weights"], sed["query_weights_sha256"]))
    places.append(("pretrain_mae.weights", mae["weights"], mae["weights_sha256"]))
    for name, entry in document["separators"].items():
        places.append((f"separators.{name}.weights", entry["weights"], entry["weights_sha256"]))
    for key, weights, sha256 in places:
        if weights is not None:
            yield key, outside(weights), sha256
    for name in sorted({settings["upstream"] for settings in [document["model"], *document["variants"].values()]}):
        options = document["upstreams"].get(name, {})
        if "sha256" in options and options["weights"] != "random":
            path = outside(options["weights"])
            if path.is_dir():
                yield f"upstreams.{name}.config_sha256", path / "config.json", options["config_sha256"]
                files = [path / file for file in ("model.safetensors", "pytorch_model.bin")]
                path = next((file for file in files if file.is_file()), files[0])
            yield f"upstreams.{name}.weights", path, options["sha256"]


def check_files(document: Mapping[str, Any]) -> None:
    """ValueError for weights, or a folder of data, that are not there or not what params.yaml says."""
    from pipeline.core import weights

    for folder in (Path("data"), *sorted(Path("data").glob("*")), Path("reports")):
        if folder.is_symlink():
            raise ValueError(
                f"{folder} is a link to {folder.resolve()}: DVC takes no results behind a link. Have a folder "
                "here, and the project on the disk that has the room"
            )
    for key, path, sha256 in weights_of(document):
        try:
            weights.check(path, sha256)
        except (ValueError, OSError) as error:
            raise ValueError(f"{key}: {error}") from None
    made = {"data": Path("data/clips/train/manifest.csv"), "music": Path("data/music/index")}
    for section, made_from_it in made.items():
        source, root = document[section]["source"], outside(document[section]["root"])
        if source.startswith("synthetic") or made_from_it.exists():  # the originals are not read again
            continue
        if not root.is_dir():
            raise ValueError(f"{section}.root: no folder {root}, where {section}.source {source} should lie")
        if section == "data" and shutil.which("ffmpeg") is None and (file := _for_ffmpeg(root)) is not None:
            raise ValueError(f"{section}.root: {file} needs ffmpeg, which is not on the PATH: install it")


def _for_ffmpeg(root: Path) -> Path | None:
    seen = 0
    for folder, _, names in os.walk(root):
        for name in names:
            if name.lower().endswith(NEEDS_FFMPEG):
                return Path(folder, name)
        seen += len(names)
        if seen > LOOK_AT:
            return None
    return None


def check_machine(document: Mapping[str, Any], path: Path) -> list[str]:
    """Lines on disk, memory and time; ValueError where the device is not there, or the disk cannot hold the clips."""
    from pipeline.core.devices import choose_device

    for section, params in document.items():
        if isinstance(params, dict) and "device" in params:
            try:
                choose_device(params["device"])
            except ValueError as error:
                raise ValueError(f"{section}.device: {error}") from None
    lines = []
    free, memory = shutil.disk_usage(".").free, psutil.virtual_memory()
    clips = number_of_clips(document)
    if clips is not None:
        audio = document["audio"]
        # 16 bits; the clips, and as much again for the originals that are made here, anchors and tables
        needed = 2 * clips * audio["clip_seconds"] * audio["sample_rate"] * 2
        if not Path("data/clips/eval").exists() and needed > free:
            raise ValueError(
                f"the disk of {Path.cwd()} has {free / GIGABYTE:.1f} GB free; {clips} clips take some "
                f"{needed / GIGABYTE:.1f} GB: free some, or move the project to a larger disk"
            )
        lines.append(f"disk: {clips:,} clips take some {needed / GIGABYTE:.1f} GB, {free / GIGABYTE:.1f} GB are free")
    else:
        lines.append(f"disk: {free / GIGABYTE:.1f} GB are free; what the clips take is known after scan")
    lines.append(
        f"memory: {memory.available / GIGABYTE:.1f} GB free of {memory.total / GIGABYTE:.1f}; {cpu_count()} cores"
    )
    lines.append(f"time: {training_hours(document, path)}")
    return lines


def number_of_clips(document: Mapping[str, Any]) -> int | None:
    """Clips of both splits, from scan's manifest or the sizes of the synthetic corpus; None: not known yet."""
    if document["data"]["source"] == "synthetic":
        from pipeline.datasets.synthetic import SOUNDS

        made = document["synthetic"]
        return len(SOUNDS) * (made["train_clips_per_class"] + made["eval_clips_per_class"])
    manifests = [Path("data/manifest", f"{split}.csv") for split in ("train", "eval")]
    if not all(path.is_file() for path in manifests):
        return None
    return sum(path.read_bytes().count(b"\n") - 1 for path in manifests)


def training_hours(document: Mapping[str, Any], path: Path) -> str:
    """Rough hours of the separators' trainings here, from their multiply-accumulates and the speed of one product."""
    import torch

    from pipeline.core.devices import choose_device
    from pipeline.evaluation.cost import cost
    from pipeline.separators import body_of, build
    from pipeline.stages.train_separator import read_mae_entry, read_train

    rate = document["audio"]["sample_rate"]
    device = choose_device(document["train"]["device"])
    matrix = torch.randn(1024, 1024, device=device)
    float((matrix @ matrix)[0, 0])  # the first one also starts the libraries
    start, n = time.perf_counter(), 0
    while time.perf_counter() - start < 0.1:
        float((matrix @ matrix)[0, 0])
        n += 1
    macs_per_second = n * 1024**3 / (time.perf_counter() - start) / 2  # convolutions reach about half of it
    trained = {name: entry for name, entry in document["separators"].items() if entry["weights"] is None}
    runs = [
        (entry["architecture"], entry["model"], read_train(name, "separators", path)) for name, entry in trained.items()
    ]
    for name in document["mae_separators"]:  # without what the features cost beside the body
        entry, sizes, _ = read_mae_entry(name, path)
        runs.append((body_of(entry.architecture), sizes, read_train(name, "mae_separators", path)))
    seconds = 0.0
    for architecture, model, train in runs:
        macs = cost(build(architecture, query_dim=128, **model), query_dim=128, samples=2 * rate).macs
        heard = train.steps * train.batch_size * train.segment_seconds  # seconds of mixtures
        seconds += 3 * macs / 2 * heard / macs_per_second  # forward, and twice as much backward
    hours = f"{seconds / 3600:.1f} h" if seconds >= 3600 else f"{max(1, seconds / 60):.0f} min"
    return f"roughly {hours} for the {len(runs)} trainings of separators, one after the other on {device.type}"


def main() -> None:
    """Check, print what the run takes, and write the output of the stage where it is one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--params", type=Path, default=Path("params.yaml"))
    parser.add_argument("--out", type=Path, help="a file that says that the check has passed, for the graph")
    args = parser.parse_args()
    document = check_params(args.params)
    check_gates(document)
    check_sizes(document)
    check_files(document)
    for line in check_machine(document, args.params):
        print(line, flush=True)
    if args.out is not None:
        write_atomic(args.out, "params.yaml has passed pipeline.experiments.check\n")


if __name__ == "__main__":
    run_command(main)
