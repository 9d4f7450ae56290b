"""A finished run as the sections of the report read it: its places, its params, its models and their scores."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
from pydantic import Field

from pipeline.core import ontology
from pipeline.core.config import Params, load_params, read_document
from pipeline.core.runtime import read_json
from pipeline.reporting.gates import Bound, GateParams
from pipeline.reporting.inputs import SPLITS, SplitData, read_pairs, read_split, read_timings
from pipeline.reporting.scores import listed_models, read_scores
from pipeline.reporting.summary import Summary, summarise

log = logging.getLogger(__name__)


class ReportParams(Params):
    """Section `report:` of params.yaml."""

    bootstrap_resamples: int = Field(gt=1, le=100_000)
    bootstrap_seed: int = Field(ge=0, lt=2**31)
    min_targets: int = Field(ge=0)
    max_lost: float = Field(ge=0, le=1)


def baseline(document: Mapping[str, Any]) -> str:
    """Name of the model that all others are compared with: the first entry of `separators:` in params.yaml."""
    if not document.get("separators"):
        raise ValueError("params.yaml lists no separators: the first entry is what all others are compared with")
    return str(next(iter(document["separators"])))


@dataclass(frozen=True)
class Settings:
    """The params of a run: the report's own, typed, and the whole document, which stage `check` has checked."""

    report: ReportParams
    bounds: dict[str, Bound]
    document: dict[str, Any]

    @classmethod
    def load(cls, path: Path) -> "Settings":
        """Read params.yaml; ValueError names what does not fit."""
        report, gate = load_params("report", ReportParams, path), load_params("gate", GateParams, path)
        return cls(report, gate.bounds, read_document(path))

    @cached_property
    def models(self) -> dict[str, dict[str, Any]]:
        """Entries of `separators:`, the baseline first, then of `mae_separators:`, which get `weights` and `model`."""
        entries: dict[str, dict[str, Any]] = {}
        for name, entry in self.document["mae_separators"].items():
            model = {**self.at(f"{entry['body']}.model"), **self.at(entry["settings"])}
            entries[name] = {**entry, "weights": None, "model": model}
        return {**self.document["separators"], **entries}

    @cached_property
    def with_features(self) -> dict[str, dict[str, Any]]:
        """Sizes and settings of the models that an encoder's features join, by name."""
        models = {name: entry.get("model", {}) for name, entry in self.models.items()}
        return {name: model for name, model in models.items() if "fusion" in model}

    @cached_property
    def blind(self) -> dict[str, dict[str, Any]]:
        """Entries of `mixit_music:` and `mixit_clips:`, the separators without queries, each with its `data`."""
        return {
            name: {**entry, "data": data}
            for data in ("music", "clips")
            for name, entry in self.document.get(f"mixit_{data}", {}).items()
        }

    @property
    def has_blind(self) -> bool:
        """Whether params.yaml has a section of separators without queries, be it empty."""
        return any(f"mixit_{data}" in self.document for data in ("music", "clips"))

    @property
    def music_source(self) -> str | None:
        """Where the music comes from, if there is any."""
        source: str | None = self.document.get("music", {}).get("source")
        return source

    def at(self, place: str) -> Any:
        """The value at a place such as "variants.updated" of params.yaml."""
        node: Any = self.document
        for key in place.split("."):
            node = node[key]
        return node


@dataclass(frozen=True)
class Places:
    """Where the results of a run lie; each holds one folder per split or model."""

    scores: Path
    manifest: Path
    clips: Path
    anchors: Path
    pairs: Path
    separators: Path
    pretrained: Path
    summaries: Path
    timings: Path
    ablations: Path  # the table that `python -m pipeline ablations` keeps; it need not be there
    params: Path
    root: Path  # of the checkout
    mixit_scores: Path  # of the separators without queries; it need not be there


@dataclass(frozen=True)
class Run:
    """A run with what several sections read of it. `models` are those with scores, the baseline first.

    `scores` as of `scores.read_scores`; `notes` name entries without scores and scores without an entry.
    """

    places: Places
    settings: Settings
    models: list[str]
    notes: list[str]
    scores: pd.DataFrame

    @classmethod
    def read(cls, places: Places, settings: Settings) -> "Run":
        """Read the scores. ValueError where they are missing for every model, incomplete, or of different pairs."""
        models, not_evaluated, left_over = listed_models(places.scores, settings.models)
        notes = [f"{model} is in params.yaml but was not evaluated" for model in not_evaluated]
        notes += [f"scores of {model} were ignored: params.yaml has no such entry" for model in left_over]
        for note in notes:
            log.warning(note)
        scores = read_scores(places.scores, models, read_pairs(places.pairs))
        return cls(places, settings, models, notes, scores)

    @cached_property
    def statistics(self) -> Summary:
        """Aggregates of the scores with their intervals, and a row per class."""
        params = self.settings.report
        names = {c.mid: c.name for c in ontology.classes()}
        return summarise(self.scores, names, n_resamples=params.bootstrap_resamples, seed=params.bootstrap_seed)

    @cached_property
    def splits(self) -> list[SplitData]:
        """Counts of what the data stages have left of each split."""
        p = self.places
        folders = {"manifest": p.manifest, "clips": p.clips, "anchors": p.anchors, "pairs": p.pairs}
        return [read_split(split, **folders) for split in SPLITS]

    @cached_property
    def timings(self) -> dict[str, dict[str, int | float]]:
        """Seconds and memory of the last run of each stage."""
        return read_timings(self.places.timings, [*SPLITS, *self.settings.models, *self.settings.blind])

    def summary(self, stage: str) -> dict[str, Any] | None:
        """The summary that a stage has left, such as `pairs_eval`; None where it was not run."""
        path = self.places.summaries / f"{stage}.json"
        return read_json(path) if path.is_file() else None

    def config(self, model: str) -> dict[str, Any] | None:
        """The config.json beside a model's weights, if it is there."""
        path = self.places.separators / model / "config.json"
        return read_json(path) if path.is_file() else None

    def probe(self, model: str) -> dict[str, Any] | None:
        """The linear probe of a model's encoder, if the model has one and the stage was run."""
        return self.summary(f"probe_{model}") if model in self.settings.with_features else None


def class_names(mids: list[str] | None) -> list[str]:
    """Names of classes by AudioSet's ids, sorted; an id that is no class' stands for itself."""
    return sorted(ontology.class_of(mid).name if ontology.is_class(mid) else mid for mid in mids or [])
