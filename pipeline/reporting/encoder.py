"""What the report says of the upstream encoder: its pretraining, what it knows and forgot, and what models cost."""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from pipeline.core.runtime import read_json
from pipeline.reporting.charts import RANGE_DB, spectrogram_images
from pipeline.reporting.sounds import data_uri
from pipeline.reporting.tables import db, interval

# Of the normalised filter bank (fbank.py): a unit of it in dB. Told here again, for the report loads no torch.
DB_PER_UNIT = 2 * 4.5689974 * 10 / float(np.log(10))

ABLATION_COLUMNS = (
    *("name", "setting", "sdri", "interval", "difference", "difference_interval"),
    *("difference_of_means", "difference_of_means_interval", "parameters", "why"),
)
ABLATED, BASELINE = "mae_resunet", "resunet"
DIFFERENCES = {"difference": "sdri_class_median_mean", "difference_of_means": "sdri_class_mean_mean"}


@dataclass(frozen=True)
class Picture:
    """One clip: what there was, what the encoder saw of it, what the decoder made of that. Data URIs."""

    clip: str
    images: list[tuple[str, str]]  # name, URI


@dataclass(frozen=True)
class CostRow:
    """Cost of one model: parameters, time, memory."""

    model: str
    numbers: dict[str, int | float]  # parameters, trainable, gmacs, relative_macs, seconds, peak_bytes; what is known


def pictures(pretrained: Path) -> list[Picture]:
    """The reconstructions that stage pretrain_mae kept; none where there are none."""
    path = pretrained / "reconstructions.npz"
    if not path.is_file():
        return []
    found = []
    with np.load(path) as stored:
        names = ("original", "visible", "reconstruction")
        for i, clip in enumerate(stored["clips"].tolist()):
            planes = [_plane(stored[name][i].astype(np.float32)) for name in names]
            uris = [data_uri(image, "image/webp") for image in spectrogram_images(planes)]
            found.append(Picture(str(clip), list(zip(("original", "what it saw", "filled in"), uris, strict=True))))
    return found


def _plane(features: Float[np.ndarray, "frames mels"]) -> Float[np.ndarray, "mels frames"]:
    decibels = features.T * DB_PER_UNIT
    return np.where(np.isnan(decibels), np.nanmax(decibels) - RANGE_DB, decibels)


def read_configs(separators: Path, models: Sequence[str]) -> dict[str, dict[str, Any]]:
    """config.json of each model's folder; models without one are left out."""
    paths = {model: separators / model / "config.json" for model in models}
    return {model: read_json(path) for model, path in paths.items() if path.is_file()}


def cost_rows(
    models: Sequence[str], configs: Mapping[str, Mapping[str, Any]], timings: Mapping[str, Mapping[str, int | float]]
) -> list[CostRow]:
    """One row per model with a config; multiply-accumulates are relative to the first model's."""
    rows = []
    first = configs.get(models[0], {}).get("macs")
    for model in models:
        if model not in configs:
            continue
        config, taken = configs[model], timings.get(f"train_separator@{model}", {})
        known = {
            "n_parameters": config.get("n_parameters"),
            "n_trainable": config.get("n_trainable"),
            "gmacs": config["macs"] / 1e9 if config.get("macs") else None,
            "relative_macs": config["macs"] / first if config.get("macs") and first else None,
            "seconds": taken.get("seconds"),
            "peak_bytes": taken.get("cuda_allocated_bytes") or taken.get("peak_rss_bytes"),
        }
        rows.append(CostRow(model, {key: value for key, value in known.items() if value is not None}))
    return rows


def encoder_metrics(
    pretraining: Mapping[str, Any] | None,
    probes: Mapping[str, Mapping[str, Any] | None],
    configs: Mapping[str, Mapping[str, Any]],
) -> dict[str, int | float]:
    """The numbers for metrics.json; what was not measured has no key."""
    metrics: dict[str, int | float] = {}
    if pretraining is not None:
        for key in ("loss", "loss_of_mean_patch"):
            if key in pretraining:
                metrics[f"pretrain_mae.{key}"] = pretraining[key]
        if "loss" in pretraining:
            below = pretraining["loss_of_mean_patch"] - pretraining["loss"]
            metrics["pretrain_mae.loss_below_mean_patch"] = round(below, 6)
        for when, found in pretraining.get("probe", {}).items():
            metrics |= _flat(f"pretrain_mae.probe_{when}", found)
    for model, probe in probes.items():
        for when in ("before", "after", "difference"):
            if probe is not None and probe.get(when):
                metrics |= _flat(f"{model}.probe_{when}", probe[when])
    for model, config in configs.items():
        for key in ("n_parameters", "n_trainable", "macs"):
            if key in config:
                metrics[f"{model}.{key}"] = config[key]
    return metrics


def _flat(prefix: str, found: Mapping[str, float]) -> dict[str, int | float]:
    names = {"mean_average_precision": "map", "ci_lo": "map_ci_lo", "ci_hi": "map_ci_hi"}
    return {f"{prefix}_{names[key]}": value for key, value in found.items()}


def ablation_row(name: str, setting: str, why: str, metrics: Mapping[str, int | float]) -> dict[str, str]:
    """A line of the table of ablations from the metrics.json of one experiment."""
    key = DIFFERENCES["difference"]
    ours = {k.removeprefix(f"{ABLATED}.average."): v for k, v in metrics.items() if k.startswith(f"{ABLATED}.average.")}
    versus = f"vs_{BASELINE}."
    gain = {k.removeprefix(versus): v for k, v in ours.items() if k.startswith(versus)}
    parameters = metrics.get(f"{ABLATED}.n_parameters")
    differences = {}
    for column, aggregate in DIFFERENCES.items():
        differences[column] = db(gain.get(aggregate), signed=True)
        differences[f"{column}_interval"] = interval(gain, aggregate, signed=True)
    return {
        "name": name,
        "setting": setting,
        "sdri": db(ours.get(key)),
        "interval": interval(ours, key),
        **differences,
        "parameters": "" if parameters is None else f"{parameters:,.0f}",
        "why": why,
    }


def as_it_stands(metrics: Mapping[str, int | float]) -> dict[str, str]:
    """The first line of the table: the run that the ablations are ablations of."""
    return ablation_row("as it stands", "", "", metrics)


def ablations(path: Path, metrics: Mapping[str, int | float]) -> list[dict[str, str]]:
    """The rows of ablations.csv as text, as experiments.ablations writes it; none where there is none for this run.

    A table whose first line is not what `metrics` say belongs to another run, of another profile or of other code.
    ValueError names the columns that an older one, or an empty file, lacks.
    """
    if not path.is_file():
        return []
    table = csv.DictReader(io.StringIO(path.read_text(encoding="utf-8")), restval="")
    missing = [column for column in ABLATION_COLUMNS if column not in (table.fieldnames or ())]
    if missing:
        raise ValueError(f"{path}: no column {', '.join(missing)}; delete it, or make it anew: `make ablations`")
    rows = list(table)
    return rows if rows[:1] == [as_it_stands(metrics)] else []
