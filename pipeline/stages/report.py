"""Stage report: the numbers of the run, and one page to look at and listen to.

metrics.json (flat, for the gates), headline.json (a few of them, for `dvc metrics`), per_class.csv, table1.md,
drawings, provenance.json and report.html, which needs no other file and no network; where params.yaml has separators
without queries (`mixit_music:`, `mixit_anchors:`), also mixit.md and three drawings of them. All are made from one set
of numbers.
The same inputs give the same bytes; only what names the run (provenance.json, and timings in report.html) may differ.
"""

import argparse
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from markupsafe import Markup
from pydantic import ConfigDict, Field

from pipeline.core import ontology
from pipeline.core.config import Params, load_params
from pipeline.core.runtime import as_json, run_command, running, write_together
from pipeline.evaluation.bootstrap import per_class_csv, summarise
from pipeline.reporting import charts, encoder, listening, music, page, published, sounds, tables
from pipeline.reporting.gates import Bound, GateParams, evaluate_gates
from pipeline.reporting.headline import headline, shares
from pipeline.reporting.inputs import (
    SPLITS,
    SplitData,
    flat_scalars,
    read_curve,
    read_curves,
    read_pairs,
    read_split,
    read_summaries,
    read_timings,
)
from pipeline.reporting.mixit_intervals import read_intervals
from pipeline.reporting.provenance import provenance
from pipeline.reporting.scores import QUERIES, listed_models, read_scores

log = logging.getLogger(__name__)

# Of report.html, which shall be fit to lie in git. The three pairs always stay; excerpts of MixIT fill what is left.
MAX_PAGE_BYTES = 950_000


class ReportParams(Params):
    """Section `report:` of params.yaml."""

    bootstrap_resamples: int = Field(gt=1, le=100_000)
    bootstrap_seed: int = Field(ge=0, lt=2**31)
    min_targets: int = Field(ge=0)
    max_lost: float = Field(ge=0, le=1)


class Context(Params):
    """Part of another stage's section: what the report says of it. The section is checked by that stage."""

    model_config = ConfigDict(extra="ignore")


class DataContext(Context):
    """Keys of `data:` that the report reads."""

    source: str
    train: list[str]
    eval: list[str]


class SedContext(Context):
    """Keys of `sed:` that the report reads."""

    weights: str | None
    query_weights: str | None


class PairsContext(Context):
    """Keys of `pairs:` that the report reads."""

    exclude: str
    normalize: str


class EvalPairsContext(Context):
    """Keys of `make_eval_pairs:` that the report reads."""

    pairs_per_class: int


class TrainContext(Context):
    """Keys of `train:` that the report reads."""

    steps: int
    batch_size: int


class SeparatorsContext(Context):
    """`separators:` or another mapping: its entries, in their order."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, Any]

    @property
    def entries(self) -> dict[str, dict[str, Any]]:
        """The entries by name."""
        return dict(self.__pydantic_extra__)


class MaeContext(Context):
    """Keys of `pretrain_mae:` that the report reads."""

    weights: str | None
    weights_format: str
    steps: int
    model: dict[str, Any]


class MusicContext(Context):
    """Keys of `music:` that the report reads."""

    source: str


P = TypeVar("P", bound=Context)


def load_optional(section: str, cls: type[P], path: Path) -> P | None:
    """A section of params.yaml, or None where there is no such section."""
    try:
        return load_params(section, cls, path)
    except ValueError as error:
        if f"no section {section!r}" not in str(error):
            raise
        return None


def models_with_features(path: Path) -> dict[str, dict[str, Any]]:
    """`mae_separators:` by name, each with the settings and the sizes that it points to as its `model`."""
    entries = load_params("mae_separators", SeparatorsContext, path).entries
    for name, entry in entries.items():
        settings, unet = (load_params(entry[key], SeparatorsContext, path).model_dump() for key in ("settings", "unet"))
        entries[name] = {**entry, "weights": None, "model": {**unet, **settings}}
    return entries


@dataclass(frozen=True)
class Settings:
    """Everything of params.yaml that the report uses or shows."""

    report: ReportParams
    bounds: dict[str, Bound]
    data: DataContext
    sed: SedContext
    pairs: PairsContext
    eval_pairs: EvalPairsContext
    train: TrainContext
    separators: dict[str, dict[str, Any]]  # with those of `mae_separators:` behind; all are held against the first
    mae: MaeContext
    mixit: dict[str, dict[str, Any]] | None  # `mixit_music:`, `mixit_anchors:`; None where params.yaml has neither
    music: str | None  # where the music comes from

    @classmethod
    def load(cls, path: Path) -> "Settings":
        """Read params.yaml; ValueError names what does not fit."""
        mixit = {data: load_optional(f"mixit_{data}", SeparatorsContext, path) for data in ("music", "anchors")}
        without_query = {
            name: {**entry, "data": data}
            for data, section in mixit.items()
            for name, entry in (section.entries if section is not None else {}).items()
        }
        music_params = load_optional("music", MusicContext, path)
        return cls(
            load_params("report", ReportParams, path),
            load_params("gate", GateParams, path).bounds,
            load_params("data", DataContext, path),
            load_params("sed", SedContext, path),
            load_params("pairs", PairsContext, path),
            load_params("make_eval_pairs", EvalPairsContext, path),
            load_params("train", TrainContext, path),
            load_params("separators", SeparatorsContext, path).entries | models_with_features(path),
            load_params("pretrain_mae", MaeContext, path),
            without_query if any(section is not None for section in mixit.values()) else None,
            None if music_params is None else music_params.source,
        )


@dataclass(frozen=True)
class Places:
    """Where things lie; each holds one folder per split or model."""

    scores: Path
    manifest: Path
    clips: Path
    anchors: Path
    pairs: Path
    separators: Path
    pretrained: Path
    summaries: Path
    timings: Path
    ablations: Path  # the table that `pipeline.experiments.ablations` keeps; it need not be there
    params: Path
    root: Path  # of the checkout
    mixit_scores: Path  # of the separators without queries; it need not be there


def comparisons(settings: Settings, n_classes: int, n_pairs: int) -> list[tables.Comparison]:
    """List what bears on comparing our Table I with the paper's (Zhao et al., section III; Kong et al.)."""
    trained = {name: entry for name, entry in settings.separators.items() if entry.get("weights") is None}
    models = [entry.get("model", {}) for entry in settings.separators.values()]
    n_fft = sorted({model["n_fft"] for model in models if "n_fft" in model})
    here_source = settings.data.source
    query = "Cnn14" if settings.sed.query_weights else "small network of this run"
    detector = "Cnn14_DecisionLevelMax" if settings.sed.weights else "small network of this run"
    return [
        tables.Comparison(
            "corpus",
            f"{here_source}: {', '.join(settings.data.train)} / {', '.join(settings.data.eval)}; {n_classes:,} classes",
            "audioset: balanced_train / eval; 527 classes",
        ),
        tables.Comparison("classes", f"{n_classes:,}", "527"),
        tables.Comparison("pairs per class", f"{settings.eval_pairs.pairs_per_class:,}", "100"),
        tables.Comparison("pairs", f"{n_pairs:,}", "52,700"),
        tables.Comparison("detector that cuts the anchors", detector, "Cnn14_DecisionLevelMax"),
        tables.Comparison("query encoder", query, "Cnn14"),
        tables.Comparison("training steps", f"{settings.train.steps:,}" if trained else "published weights", "600,000"),
        tables.Comparison("batch size", f"{settings.train.batch_size}" if trained else "published weights", "16"),
        tables.Comparison("STFT window", " / ".join(map(str, n_fft)) or "unknown", "1024"),
        *_feature_comparisons(settings),
        tables.Comparison("gain rule (Eq. 2)", settings.pairs.normalize, "separate as written; at evaluation not said"),
        tables.Comparison(
            "interferer",
            {
                "none": "any other class",
                "label": "other class, clip without the target's label",
                "ontology": "other class, clip without the target's label or its kin",
            }.get(settings.pairs.exclude, settings.pairs.exclude),
            "any other class",
        ),
    ]


def _feature_comparisons(settings: Settings) -> list[tables.Comparison]:
    """Comparisons for the models with features; none where there are no such models."""
    models = {name: e["model"] for name, e in settings.separators.items() if "fusion" in e.get("model", {})}
    if not models:
        return []
    size = settings.mae.model
    encoder_is = f"{settings.mae.weights_format}, published" if settings.mae.weights else "pretrained in this run"
    return [
        tables.Comparison("A-MAE", encoder_is, "audiomae, published"),
        # Of a published encoder the sizes are its file's, and the line above says which it is.
        *([] if settings.mae.weights else [_encoder_size(size)]),
        *(
            tables.Comparison(
                f"{name}: features (input and fusion as we read the paper)",
                f"{m['upstream']}, {'frozen' if m['freeze_mae'] else 'updated'}, {m['mae_input']}, {m['fusion']}",
                f"mae, {'frozen' if m['freeze_mae'] else 'updated'}, pad1024, freq",
            )
            for name, m in models.items()
        ),
        *(
            tables.Comparison(f"{name}: objective", "L1, and the interferer's embedding told by the features", "L1")
            for name, m in models.items()
            if m["fusion"] == "interferer"
        ),
    ]


def as_published(settings: Settings) -> str | None:
    """The first model whose features, frozen, are joined as we read the paper; None where there is none."""
    frozen = {"upstream": "mae", "freeze_mae": True, "mae_input": "pad1024", "fusion": "freq"}
    models = {name: entry.get("model", {}) for name, entry in settings.separators.items()}
    return next((name for name, model in models.items() if frozen.items() <= model.items()), None)


def _encoder_size(size: Mapping[str, Any]) -> tables.Comparison:
    return tables.Comparison("A-MAE's encoder", f"{size.get('depth')} layers of {size.get('dim')}", "12 layers of 768")


def _names(mids: Sequence[str] | None) -> list[str]:
    return [ontology.class_of(mid).name if ontology.is_class(mid) else mid for mid in mids or []]


def _rerun(found: dict[str, Any]) -> str:
    """The commands that give this run again."""
    code, params = found["code"], found["params"]
    lines = [f"git checkout {code['revision']}"] if code["revision"] else []
    threads = found["training_threads"]
    one = f"OMP_NUM_THREADS={threads[0]} " if len(threads) == 1 and not found["hardware"]["gpus"] else ""
    if params["profile"]:
        lines.append(f"cp {params['profile']} params.yaml")
    elif "params.yaml" in code["changed_files"]:
        lines.append(f"# params.yaml had changes of its own: sha256 {params['sha256']}")
    return "\n".join([*lines, f"{one}make repro", "python -m pipeline gate"])


def _training_notes(settings: Settings, models: Sequence[str], trained: Sequence[str]) -> dict[str, str]:
    notes = {}
    for model in models:
        if settings.separators[model].get("weights") is not None:
            notes[model] = "published weights, not trained here"
        elif model not in trained:
            notes[model] = "no training curve was left"
        else:
            own = TrainContext.model_validate(
                {**settings.train.model_dump(), **settings.separators[model].get("train", {})}
            )
            notes[model] = f"{own.steps:,} steps of {own.batch_size} mixtures"
    return notes


def _ablations(path: Path, metrics: Mapping[str, int | float]) -> list[dict[str, str]]:
    rows = encoder.ablations(path, metrics)
    if not rows and path.is_file():
        log.warning("%s is of another run than this one and is not shown; `make ablations` makes one of this", path)
    return rows


def report(places: Places, out: Path, settings: Settings) -> dict[str, int | float]:
    """Write all files of the report into `out`, together or none of them; return what metrics.json holds.

    ValueError where scores are missing for every model, incomplete, or of different pairs for different models.
    A model without scores, and a data stage that was not run, are named in the page.
    """
    models, not_evaluated, left_over = listed_models(places.scores, settings.separators)
    notes = [f"{model} is in params.yaml but was not evaluated" for model in not_evaluated]
    notes += [f"scores of {model} were ignored: params.yaml has no such entry" for model in left_over]
    for note in notes:
        log.warning(note)
    scores = read_scores(places.scores, models, read_pairs(places.pairs))
    summary = summarise(
        scores,
        {c.mid: c.name for c in ontology.classes()},
        n_resamples=settings.report.bootstrap_resamples,
        seed=settings.report.bootstrap_seed,
    )
    splits = [
        read_split(split, manifest=places.manifest, clips=places.clips, anchors=places.anchors, pairs=places.pairs)
        for split in SPLITS
    ]
    metrics = summary.metrics | shares(scores)
    for split in splits:
        metrics |= split.metrics()
    configs = encoder.read_configs(places.separators, models)
    probes = {
        model: read_summaries(places.summaries, [f"probe_{model}"])[f"probe_{model}"]
        for model in models
        if "fusion" in settings.separators[model].get("model", {})
    }
    pretraining = read_summaries(places.summaries, ["pretrain_mae"])["pretrain_mae"]
    metrics |= encoder.encoder_metrics(pretraining, probes, configs)
    timings = read_timings(places.timings, _items(settings))
    drawn = {"n_resamples": settings.report.bootstrap_resamples, "seed": settings.report.bootstrap_seed}
    intervals = read_intervals(places.mixit_scores, list(settings.mixit or {}), **drawn)
    unsupervised = music.read_entries(places.summaries, settings.mixit or {}, timings, intervals)
    pretraining_music = music.read_pretraining(places.summaries) if settings.mixit else {}
    for text in [*music.alarms(unsupervised), *music.idlers(unsupervised)]:
        log.warning(text)
    metrics |= music.metrics(unsupervised, pretraining_music)
    metrics = dict(sorted(metrics.items()))
    curves = {model: curve for model, curve in read_curves(places.summaries, models).items() if not curve.empty}
    manifests = [places.clips / split / "manifest.csv" for split in SPLITS]
    trainings = [int(t["threads"]) for stage, t in timings.items() if stage.startswith("train_") and "threads" in t]
    found = provenance(places.root, places.params, manifests, trainings)
    frozen = as_published(settings)
    flatness = published.flatness_by_class(places.anchors / "eval")
    gains = published.class_gains(summary.per_class, models[0], frozen, flatness)
    checks = published.class_checks(gains)
    drawings = {
        "class_sdri": charts.class_chart(summary.per_class),
        "gain_flatness": charts.flatness_chart(gains, published.figures()["classes"]["gain_most"]),
        "training": charts.training_chart(curves),
        "pretraining": charts.training_chart(read_curve(places.summaries / "pretrain_mae.csv", "A-MAE")),
        "purity": charts.purity_chart({s.split: s.purity for s in splits if s.purity is not None}),
    }
    music_curves = music.read_curves(places.summaries, unsupervised)
    if settings.mixit is not None:
        pretrained = read_curve(places.summaries / "pretrain_performer.csv", "Performer") if settings.mixit else {}
        drawings |= {
            "mixit_length": music.length_drawing(unsupervised),
            "mixit_training": charts.training_chart(music_curves),
            "mixit_pretraining": charts.training_chart(pretrained),
        }
    ours = tables.our_rows(metrics, models, QUERIES, [entry.name for entry in unsupervised])
    best = listening.best_model(metrics, models)
    n_classes = int(metrics["mixture.n_classes"])
    warnings = [
        *tables.without_width(int(metrics["mixture.n_classes_with_one_clip"]), n_classes),
        *tables.below_half(ours),
    ]
    for text in warnings:
        log.warning(text)
    compared = comparisons(settings, n_classes, int(metrics["mixture.n_pairs"]))

    gates = evaluate_gates(metrics, settings.bounds)
    short = headline(metrics, models, [entry.name for entry in unsupervised], sum(not gate.passed for gate in gates))
    files: dict[str, str | bytes] = {
        "metrics.json": as_json(metrics),
        "headline.json": as_json(short),
        "per_class.csv": per_class_csv(summary.per_class),
    }
    bound = [tables.BEST_ASSIGNMENT] if any(tables.UNSUPERVISED in row.system for row in ours) else []
    paper = published.table_1_rows()
    table_1 = tables.table1_markdown(ours, paper, compared, [*bound, *warnings, *notes], several=len(models) > 1)
    files["table1.md"] = f"{table_1}\n{published.checks_markdown(checks)}"
    music_tables = music.report_tables(unsupervised, pretraining_music)
    if settings.mixit is not None:
        files["mixit.md"] = music.markdown(unsupervised, music_tables, settings.music)
    files |= {f"{name}.svg": svg for name, svg in drawings.items()}
    files["provenance.json"] = as_json(found)

    context: dict[str, Any] = {
        "models": models,
        "best": best,
        "other_sound": listening.OTHER,
        "metrics": metrics,
        "rows": ours,
        "paper_rows": paper,
        "checks": checks,
        "checks_are": published.CHECKS_ARE,
        "checks_generated": published.GENERATED if settings.data.source == "synthetic" else "",
        "gain_svg": Markup(charts.themed(drawings["gain_flatness"], "Gain of each class by its spectral flatness")),
        "shares": tables.SHARES,
        "share_rows": tables.with_shares(ours),
        "comparisons": compared,
        "columns": tables.COLUMNS,
        "one_training": tables.ONE_TRAINING,
        "gates": gates,
        "notes": notes,
        "n_resamples": settings.report.bootstrap_resamples,
        "examples": [],
        "excerpts": [],
        "excerpts_left_out": 0,
        "loudness_db": sounds.LOUDNESS_DB,
        "class_svg": Markup(charts.themed(drawings["class_sdri"], "SDRi by class")),
        "training_svg": Markup(charts.themed(drawings["training"], "Loss by training step")),
        "purity_svg": Markup(charts.themed(drawings["purity"], "Purity of the anchors")),
        "pretraining_svg": Markup(charts.themed(drawings["pretraining"], "Loss of the masked autoencoder by step")),
        "pretraining": pretraining,
        "pictures": encoder.pictures(places.pretrained),
        "probes": {model: probe for model, probe in probes.items() if probe is not None and probe.get("after")},
        "costs": encoder.cost_rows(models, configs, timings),
        "ablations": _ablations(places.ablations, metrics),
        "training_notes": _training_notes(settings, models, list(curves)),
        "splits": splits,
        "provenance": found,
        "rerun": _rerun(found),
        "limitations": page.limitations(
            settings.data.source, settings.pairs.normalize, int(metrics["mixture.n_classes_with_one_clip"])
        ),
        "licences": page.licences(settings.data.source, _published(settings)),
        "best_assignment": bound,
        "warnings": warnings,
        **_music_context(unsupervised, music_curves, music_tables, pretraining_music, drawings, settings.music),
        **_class_context(summary.per_class, splits, settings.report),
        **_stage_context(places, models, unsupervised, timings),
    }
    filters = {
        "db": tables.db,
        "share": tables.share,
        "interval": tables.interval,
        "cell": tables.cell,
        "p_value": tables.p_value,
    }
    # A page without sounds tells how many of them will fit.
    budget = MAX_PAGE_BYTES - len(page.render(context, filters).encode())
    heard = [entry for entry in unsupervised if not (entry.data == "music" and settings.music in music.WITHHELD)]
    examples, rate, picture = listening.read_examples(places.scores, models, best)
    context |= {"examples": examples, "nyquist_khz": rate / 2000}
    budget -= sum(len(sound.audio) + len(sound.image) for example in examples for sound in example.sounds)
    excerpts, left_out = music.read_examples(places.mixit_scores, heard, budget)
    context |= {"excerpts": excerpts, "excerpts_left_out": left_out}
    files["report.html"] = page.render(context, filters)
    if picture is not None:
        files["example.webp"] = picture
    write_together({out / name: content for name, content in files.items()})
    return metrics


def _class_context(per_class: Any, splits: Sequence[SplitData], params: ReportParams) -> dict[str, Any]:
    titles, rows = page.class_table(per_class)
    evaluation = next(split for split in splits if split.split == "eval")
    without = sorted({*(evaluation.classes_without_anchors or []), *(evaluation.classes_without_pairs or [])})
    return {
        "class_titles": titles,
        "class_rows": rows,
        "eval_without": sorted(_names(without)),
        "without_anchors": {split.split: sorted(_names(split.classes_without_anchors)) for split in splits},
        "thin_classes": {
            split.split: split.thin_classes(min_targets=params.min_targets, max_lost=params.max_lost)
            for split in splits
        },
        "min_targets": params.min_targets,
        "max_lost": params.max_lost,
        "class_names": {c.mid: c.name for c in ontology.classes()},
        "without_pairs": {split.split: sorted(_names(split.classes_without_pairs)) for split in splits},
    }


def _music_context(
    entries: Sequence[music.Entry],
    curves: Mapping[str, Any],
    shown: Sequence[music.Table],
    pretraining: Mapping[str, int | float],
    drawings: Mapping[str, str],
    source: str | None,
) -> dict[str, Any]:
    """The section of the unsupervised separators; None where none of them was trained or evaluated."""
    if not curves and all(entry.status is None for entry in entries):
        return {"mixit": None}
    of_music = any(entry.data == "music" for entry in entries)
    labels = {
        "length": "Stem SI-SNRi and MoM SNR above doing nothing by length of the segments",
        "training": "Loss of the unsupervised separators by training step",
        "pretraining": "Loss of the pretraining of the Performer by step",
    }
    svgs = {name: Markup(charts.themed(drawings[f"mixit_{name}"], label)) for name, label in labels.items()}
    svgs["memory"] = Markup(charts.themed(music.memory_drawing(entries), "Peak memory by length of the segments"))
    return {
        "mixit": {
            "introduction": music.INTRODUCTION,
            "generated": music.GENERATED if of_music and source == "synthetic_stems" else "",
            "alarms": music.alarms(entries),
            "idlers": music.idlers(entries),
            "tables": [shown[0], music.cost_table(entries), *shown[1:]],
            "svg": svgs,
            "pretrained": any(entry.pretrained for entry in entries),
            "pretraining_ran_out": music.PRETRAINING_RAN_OUT if "out_of_memory" in pretraining else "",
            "licence": page.music_licence(source) if of_music and source else "",
            "withheld": of_music and source in music.WITHHELD,
            "excerpt_seconds": music.EXCERPT_SECONDS,
        }
    }


def _items(settings: Settings) -> list[str]:
    return [*SPLITS, *settings.separators, *(settings.mixit or {})]


def _stage_context(
    places: Places,
    models: Sequence[str],
    unsupervised: Sequence[music.Entry],
    timings: Mapping[str, Mapping[str, int | float]],
) -> dict[str, Any]:
    names = [f"{stage}_{split}" for stage in ("resample", "mine_anchors", "pairs") for split in SPLITS]
    probes = [f"probe_{m}" for m in models if (places.summaries / f"probe_{m}.json").is_file()]
    names = [*names[:2], "sed", "pretrain_mae", *names[2:], *(f"evaluate_{model}" for model in models), *probes]
    names += ["index_music"] if (places.summaries / "index_music.json").is_file() else []
    names += ["pretrain_performer"] if any(entry.pretrained for entry in unsupervised) else []
    names += [f"evaluate_mixit_{entry.name}" for entry in unsupervised]
    summaries = read_summaries(places.summaries, names)
    detector = (summaries["sed"] or {}).get("mean_average_precision")
    return {
        "summaries": {name: None if value is None else flat_scalars(value) for name, value in summaries.items()},
        "not_run": [name for name, value in summaries.items() if value is None],
        "detector_map": detector,
        "overlap": (summaries["pairs_eval"] or {}).get("overlap"),
        "repeats": {split: (summaries[f"pairs_{split}"] or {}).get("repeats_by_class") for split in SPLITS},
        "overlap_free": (summaries["pairs_eval"] or {}).get("overlap_without_exclusion"),
        "timings": {
            stage: {
                "seconds": float(taken["seconds"]),
                "peak": max(taken.get("peak_rss_bytes") or 0, taken.get("peak_rss_child_bytes") or 0) or None,
                "threads": taken.get("threads"),
            }
            for stage, taken in timings.items()
        },
        "total_seconds": sum(float(taken["seconds"]) for taken in timings.values()),
    }


def _published(settings: Settings) -> list[str]:
    """File names of the published weights that this run used."""
    paths = [settings.sed.weights, settings.sed.query_weights, settings.mae.weights]
    paths += [entry.get("weights") for entry in settings.separators.values()]
    return sorted({Path(path).name for path in paths if path is not None})


def main() -> None:
    """Paths come from dvc.yaml, numbers from params.yaml."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("scores", "manifest", "clips", "anchors", "pairs", "separators", "pretrained", "summaries", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--mixit-scores", type=Path, default=Path("data/mixit_scores"))
    args = parser.parse_args()
    settings = Settings.load(Path("params.yaml"))
    places = Places(
        args.scores,
        args.manifest,
        args.clips,
        args.anchors,
        args.pairs,
        args.separators,
        args.pretrained,
        args.summaries,
        timings=Path("data/timings"),  # where runtime.running leaves them
        ablations=args.out / "ablations.csv",
        params=Path("params.yaml"),
        root=Path("."),
        mixit_scores=args.mixit_scores,
    )
    with running("report", args.out):
        metrics = report(places, args.out, settings)
        for gate in evaluate_gates(metrics, settings.bounds):
            log.info("gate %s: %s (%s)", gate.key, "pass" if gate.passed else "FAIL", gate.why)


if __name__ == "__main__":
    run_command(main)
