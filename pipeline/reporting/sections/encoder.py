"""The upstream encoder: how it was pretrained, what a linear probe reads from it before and after, reconstructions."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from pipeline.reporting import charts
from pipeline.reporting.inputs import read_curve
from pipeline.reporting.run import Run
from pipeline.reporting.sections import Drawing, Metrics
from pipeline.reporting.sections import Section as Base
from pipeline.reporting.sounds import data_uri
from pipeline.reporting.tables import DASH, Cell, Row, Table, fixed

# Of the normalised filter bank (audio/fbank.py): a unit of it in dB. Given here again, for the report loads no torch.
DB_PER_UNIT = 2 * 4.5689974 * 10 / float(np.log(10))


@dataclass(frozen=True)
class Picture:
    """One clip: its filter bank, what the encoder saw of it, what the decoder made of that. Data URIs."""

    clip: str
    images: list[tuple[str, str]]  # name, URI


@dataclass(frozen=True)
class Encoder:
    """Summary and curve of the pretraining, the models' probes (None: not run) and sizes, and reconstructions."""

    pretraining: dict[str, Any] | None
    curve: dict[str, pd.DataFrame]
    probes: dict[str, dict[str, Any] | None]
    configs: dict[str, dict[str, Any]]
    pictures: list[Picture]


class Section(Base[Encoder]):
    """The upstream encoder's pretraining and probes."""

    title = "Encoder"
    place = 50
    template = """\
{% if pretraining is none %}<p>No masked autoencoder was pretrained or converted.</p>{% else %}
<p>{% if pretraining.weights %}{{ pretraining.weights }}, converted.{% else %}Pretrained without labels on
{{ pretraining.n_train_clips | count }} clips: {{ pretraining.steps | count }} steps, {{ pretraining.epochs }}
epochs.{% endif %}
{% if "loss" in pretraining %} On the eval clips it predicts hidden patches with a mean square error of
<b>{{ "%.3f" | format(pretraining.loss) }}</b>; the best guess without looking, the mean patch of each band, has
{{ "%.3f" | format(pretraining.loss_of_mean_patch) }}.{% endif %}</p>
{{ probes.html }}
<p class="muted">A linear probe predicts the class labels from the encoder's features. A negative difference after
training with a separator is what the encoder forgot of the labels. Brackets: 95 % interval over the eval
recordings.</p>
{% if pictures %}
<h3>Hidden patches, predicted</h3>
{% for picture in pictures %}<div class="panels">{% for name, uri in picture.images %}
<figure><div class="name">{{ name }}{% if loop.first %}<span>{{ picture.clip }}</span>{% endif %}</div>
<div class="spectrogram still"><img src="{{ uri }}" alt="Filter bank, {{ name }}: {{ picture.clip }}"></div></figure>
{% endfor %}</div>
{% endfor %}
<p class="muted">Levels and contrasts of the hidden patches are the true ones; only the pattern inside a patch is the
decoder's, as in Audio-MAE's own pictures.</p>{% endif %}
{{ drawings.pretraining }}
{% endif %}"""

    def read(self, run: Run) -> Encoder:
        """Read what pretraining and probes have left."""
        configs = {model: config for model in run.models if (config := run.config(model)) is not None}
        return Encoder(
            run.summary("pretrain_mae"),
            read_curve(run.places.summaries / "pretrain_mae.csv", "A-MAE"),
            {model: run.probe(model) for model in run.models if model in run.settings.with_features},
            configs,
            pictures(run.places.pretrained),
        )

    def metrics(self, data: Encoder) -> dict[str, int | float]:
        """Losses of the pretraining, probes, and sizes of the models."""
        return encoder_metrics(data.pretraining, data.probes, data.configs)

    def drawings(self, data: Encoder, metrics: Metrics) -> dict[str, Drawing]:
        """The loss of the pretraining."""
        return {"pretraining": Drawing(charts.training_chart(data.curve), "Loss of the masked autoencoder by step")}

    def context(self, data: Encoder, metrics: Metrics) -> dict[str, Any]:
        """The pretraining, the table of probes, the reconstructions."""
        return {"pretraining": data.pretraining, "probes": probe_table(data), "pictures": data.pictures}


def probe_table(data: Encoder) -> Table:
    """Mean average precision of the probes: a row for the pretraining, and one for each model with features."""
    rows = [] if data.pretraining is None else [_probe_row("pretraining", data.pretraining["probe"])]
    for model, probe in data.probes.items():
        if probe is not None and probe.get("after"):
            frozen = " (frozen)" if probe["freeze_mae"] else ""
            rows.append(_probe_row(f"{model}: training with the separator{frozen}", probe))
    return Table(["Linear probe of the class labels, mAP on eval", "before", "after", "difference"], rows)


def _probe_row(name: str, probe: Mapping[str, Any]) -> Row:
    cells = [Cell(name)]
    for when in ("before", "after", "difference"):
        precision = probe.get(when)
        if not precision:
            cells.append(Cell(DASH))
            continue
        value, low, high = (fixed(precision[key], 3) for key in ("mean_average_precision", "ci_lo", "ci_hi"))
        cells.append(Cell(value, f"[{low}, {high}]"))
    return Row(cells)


def pictures(pretrained: Path) -> list[Picture]:
    """The reconstructions that stage pretrain_mae kept; none where there are none."""
    path = pretrained / "reconstructions.npz"
    if not path.is_file():
        return []
    kept = []
    with np.load(path) as stored:
        names = {"original": "original", "visible": "given to the encoder", "reconstruction": "predicted"}
        for i, clip in enumerate(stored["clips"].tolist()):
            planes = [_plane(stored[name][i].astype(np.float32)) for name in names]
            uris = [data_uri(image, "image/webp") for image in charts.spectrogram_images(planes)]
            kept.append(Picture(str(clip), list(zip(names.values(), uris, strict=True))))
    return kept


def _plane(features: Float[np.ndarray, "frames mels"]) -> Float[np.ndarray, "mels frames"]:
    decibels = features.T * DB_PER_UNIT
    return np.where(np.isnan(decibels), np.nanmax(decibels) - charts.RANGE_DB, decibels)


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
        for when, probe in pretraining.get("probe", {}).items():
            metrics |= _flat(f"pretrain_mae.probe_{when}", probe)
    for model, probe in probes.items():
        for when in ("before", "after", "difference"):
            if probe is not None and probe.get(when):
                metrics |= _flat(f"{model}.probe_{when}", probe[when])
    for model, config in configs.items():
        for key in ("n_parameters", "n_trainable", "macs"):
            if key in config:
                metrics[f"{model}.{key}"] = config[key]
    return metrics


def _flat(prefix: str, probe: Mapping[str, float]) -> dict[str, int | float]:
    names = {"mean_average_precision": "map", "ci_lo": "map_ci_lo", "ci_hi": "map_ci_hi"}
    return {f"{prefix}_{names[key]}": value for key, value in probe.items()}
