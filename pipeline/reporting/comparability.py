"""What bears on comparing our Table I with the paper's: corpus, encoders, training, gain rule, interferers."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.nn.losses import SEPARATION
from pipeline.reporting.run import Settings
from pipeline.reporting.sections import Metrics
from pipeline.reporting.tables import Cell, Row, Table, words

EXCLUDED = {
    "none": "any other class",
    "label": "other class, clip without the target's label",
    "ontology": "other class, clip without the target's label or its kin",
}


# Of a training: what is compared, the paper's value, and ours from the settings of `train:`.
TRAINING: list[tuple[str, str, Callable[[Mapping[str, Any]], str]]] = [
    ("training steps", "600,000", lambda train: f"{train['steps']:,}"),
    ("batch size", "16", lambda train: f"{train['batch_size']}"),
    ("seconds of a mixture", "2", lambda train: f"{train['segment_seconds']:g}"),
    ("objective", "l1", lambda train: " + ".join(name for name in SEPARATION if train["loss_weights"].get(name))),
    ("query in training", "own", lambda train: str(train["query"])),
]


@dataclass(frozen=True)
class Comparison:
    """One property of the experiment, here and in the paper."""

    what: str
    ours: str
    paper: str

    @property
    def same(self) -> bool:
        """Whether there is nothing to hold against the comparison here."""
        return self.ours == self.paper


def comparison_table(compared: Sequence[Comparison]) -> Table:
    """A row per property, and whether it is the same."""
    verdicts = {True: Cell("same", tone="good"), False: Cell("differs", tone="bad")}
    rows = [Row([*words(c.what, c.ours, c.paper), verdicts[c.same]]) for c in compared]
    return Table(["", "here", "paper", ""], rows, n_text=-1)


def comparisons(settings: Settings, metrics: Metrics) -> list[Comparison]:
    """List what bears on comparing our Table I with the paper's (Zhao et al., section III; Kong et al.)."""
    params = settings.document
    data, sed, pairs = params["data"], params["sed"], params["pairs"]
    n_classes = f"{int(metrics['mixture.n_classes']):,}"
    models = [entry.get("model", {}) for entry in settings.models.values()]
    n_fft = sorted({model["n_fft"] for model in models if "n_fft" in model})
    small = "small network of this run"
    return [
        Comparison(
            "corpus",
            f"{data['source']}: {', '.join(data['train'])} / {', '.join(data['eval'])}; {n_classes} classes",
            "audioset: balanced_train / eval; 527 classes",
        ),
        Comparison("classes", n_classes, "527"),
        Comparison("pairs per class", f"{params['make_eval_pairs']['pairs_per_class']:,}", "100"),
        Comparison("pairs", f"{int(metrics['mixture.n_pairs']):,}", "52,700"),
        Comparison(
            "detector that cuts the anchors",
            "Cnn14_DecisionLevelMax" if sed["weights"] else small,
            "Cnn14_DecisionLevelMax",
        ),
        Comparison("query encoder", "Cnn14" if sed["query_weights"] else small, "Cnn14"),
        *_of_trainings(params, settings.models),
        Comparison("STFT window", " / ".join(map(str, n_fft)) or "unknown", "1024"),
        *_of_features(settings),
        Comparison("gain rule (Eq. 2)", pairs["normalize"], "separate as written; at evaluation not said"),
        Comparison("interferer", EXCLUDED.get(pairs["exclude"], pairs["exclude"]), "any other class"),
    ]


def _of_trainings(params: Mapping[str, Any], models: Mapping[str, Mapping[str, Any]]) -> list[Comparison]:
    """How the models were trained: each entry's own settings over its body's, over those of `train:`."""
    each = {}
    for name, entry in models.items():
        if entry.get("weights") is None:
            body = params["separators"].get(str(entry.get("body", "")).rpartition(".")[2], {})
            each[name] = {**params["train"], **body.get("train", {}), **entry.get("train", {})}
    return [
        Comparison(what, _by_model({name: value(training) for name, training in each.items()}), paper)
        for what, paper, value in TRAINING
    ]


def _by_model(values: Mapping[str, str]) -> str:
    """One value where all models share it, else each with its models; "published weights" where none was trained."""
    names: dict[str, list[str]] = {}
    for name, value in values.items():
        names.setdefault(value, []).append(name)
    if len(names) <= 1:
        return next(iter(names), "published weights")
    return "; ".join(f"{value} ({', '.join(those)})" for value, those in names.items())


def _of_features(settings: Settings) -> list[Comparison]:
    """Comparisons of the models with features; none where there are no such models."""
    models, mae = settings.with_features, settings.document["pretrain_mae"]
    if not models:
        return []
    rows = []
    if mae["weights"]:  # of a published encoder the sizes are its file's, and this line says which it is
        rows.append(Comparison("A-MAE", f"{mae['weights_format']}, published", "audiomae, published"))
    else:
        size = f"{mae['model'].get('depth')} layers of {mae['model'].get('dim')}"
        rows.append(Comparison("A-MAE", "pretrained in this run", "audiomae, published"))
        rows.append(Comparison("A-MAE's encoder", size, "12 layers of 768"))
    for name, m in models.items():
        kept = "frozen" if m["freeze_mae"] else "updated"
        features = f"{m['upstream']}, {kept}, {m['mae_input']}, {m['fusion']}"
        what = f"{name}: features (input and fusion as we read the paper)"
        rows.append(Comparison(what, features, f"mae, {kept}, pad1024, freq"))
        if m["fusion"] == "interferer":
            what = f"{name}: a second objective"
            rows.append(Comparison(what, "the features predict the interferer's embedding", "none"))
    return rows
