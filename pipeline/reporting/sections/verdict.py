"""The head of the page: what came out in one sentence, a card for each model, and the bounds that were missed."""

from typing import Any

from pipeline.reporting.gates import Bound, evaluate_gates
from pipeline.reporting.headline import HALF_SDRI, best_model
from pipeline.reporting.run import Run
from pipeline.reporting.scores import AVERAGE, QUERIES
from pipeline.reporting.sections import Metrics
from pipeline.reporting.sections import Section as Base
from pipeline.reporting.tables import interval

ONE_TRAINING = (
    "One training each is no verdict: the intervals are over recordings. Another seed moves a difference by more, and "
    "so does the same seed on another kind of processor, whose sums differ in their last bits. "
    "python -m pipeline seeds gives intervals over trainings."
)


class Section(Base[Run]):
    """The head of the page."""

    place = 0
    template = """\
<h1>Universal sound separation: report</h1>
<p class="lead">Of {{ metrics["mixture.n_pairs"] | count }} mixtures of two sounds, of
{{ metrics["mixture.n_classes"] | count }} classes, <b>{{ best }}</b> separates the sound of a given class with an SDR
{{ sdri | db }} dB above the mixture's (SDRi) and an SI-SDR {{ si_sdri | db }} dB above it (SI-SDRi): {{ query }} query,
mean over classes of the class mean. Half of the mixture, with nothing separated, has {{ half | db }} dB and 0.</p>
{% if models | length > 1 %}<p class="muted">{{ one_training }}</p>{% endif %}
<div class="cards">
{% for model in models %}
<div><div class="label">{{ model.name }}: SDRi, {{ model.query }} query</div>
<div class="value">{{ model.sdri | db }} <small>dB</small></div>
<div class="sub">95 % {{ model.interval }}<br>SI-SDRi {{ model.si_sdri | db }} dB
{% for query, sdri in model.others.items() %}<br>{{ query }} query: SDRi {{ sdri | db }} dB
{% endfor %}<br>doing nothing: <span class="nobreak">SDRi {{ half | db }},</span>
<span class="nobreak">SI-SDRi 0</span></div></div>
{% endfor %}
<div><div class="label">Evaluated</div>
<div class="value">{{ metrics["mixture.n_pairs"] | count }} <small>mixtures</small></div>
<div class="sub">{{ metrics["mixture.n_classes"] | count }} classes{% if n_without %}; {{ n_without }} more without
pairs{% endif %}</div></div>
<div><div class="label">Gates</div>
<div class="value">{{ gates | selectattr("passed") | list | length }}
<small>of {{ gates | length }} passed</small></div>
<div class="sub">{% for gate in gates if not gate.passed %}{% if loop.first %}failed: {% endif %}<code>{{ gate.key }}
</code>{% if not loop.last %}, {% endif %}{% else %}{% if gates %}nothing out of bounds{% else %}no bounds are set
{% endif %}{% endfor %}</div></div>
</div>"""

    def read(self, run: Run) -> Run:
        """Read the scores of the run."""
        return run

    def context(self, data: Run, metrics: Metrics) -> dict[str, Any]:
        """The best model, a card for each, and the gates."""
        bounds: dict[str, Bound] = data.settings.bounds
        best = best_model(metrics, data.models)
        evaluation = next(split for split in data.splits if split.split == "eval")
        return {
            "best": best,
            "query": AVERAGE,
            "sdri": metrics.get(f"{best}.{AVERAGE}.sdri_class_mean_mean"),
            "si_sdri": metrics.get(f"{best}.{AVERAGE}.si_sdri_class_mean_mean"),
            "half": metrics.get(HALF_SDRI),
            "models": [card(model, metrics) for model in data.models],
            "one_training": ONE_TRAINING,
            "n_without": len(evaluation.without_pairs),
            "gates": evaluate_gates(metrics, bounds),
        }


def card(model: str, metrics: Metrics) -> dict[str, Any]:
    """The numbers of a model's card: of its first query, and SDRi of the others."""
    key = "sdri_class_mean_mean"
    queries = [query for query in QUERIES if f"{model}.{query}.n_pairs" in metrics]
    first = {k.removeprefix(start): v for k, v in metrics.items() if k.startswith(start := f"{model}.{queries[0]}.")}
    return {
        "name": model,
        "query": queries[0],
        "sdri": first.get(key),
        "interval": interval(first, key),
        "si_sdri": first.get(f"si_{key}"),
        "others": {query: metrics.get(f"{model}.{query}.{key}") for query in queries[1:]},
    }
