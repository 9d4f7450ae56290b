"""What bears on comparing our Table I with the paper's: corpus, encoders, training, gain rule, interferers."""

from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.reporting.run import Settings
from pipeline.reporting.sections import Metrics
from pipeline.reporting.tables import Cell, Row, Table, words

EXCLUDED = {
    "none": "any other class",
    "label": "other class, clip without the target's label",
    "ontology": "other class, clip without the target's label or its kin",
}


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
    data, sed, train, pairs = params["data"], params["sed"], params["train"], params["pairs"]
    n_classes = f"{int(metrics['mixture.n_classes']):,}"
    trained = any(entry.get("weights") is None for entry in settings.models.values())
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
        Comparison("training steps", f"{train['steps']:,}" if trained else "published weights", "600,000"),
        Comparison("batch size", f"{train['batch_size']}" if trained else "published weights", "16"),
        Comparison("STFT window", " / ".join(map(str, n_fft)) or "unknown", "1024"),
        *_of_features(settings),
        Comparison("gain rule (Eq. 2)", pairs["normalize"], "separate as written; at evaluation not said"),
        Comparison("interferer", EXCLUDED.get(pairs["exclude"], pairs["exclude"]), "any other class"),
    ]


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
            rows.append(
                Comparison(f"{name}: objective", "L1, and the interferer's embedding predicted by the features", "L1")
            )
    return rows
