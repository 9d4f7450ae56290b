"""The bounds of params.yaml on numbers of metrics.json, and whether they hold."""

from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.reporting.gates import Bound, Gate, evaluate_gates
from pipeline.reporting.run import Run
from pipeline.reporting.sections import Metrics
from pipeline.reporting.sections import Section as Base
from pipeline.reporting.tables import Cell, Row, Table, words


class Section(Base[Mapping[str, Bound]]):
    """The gates, each with its number."""

    title = "Gates"
    place = 25
    template = """\
{% if gates.rows %}<p class="muted">Bounds that params.yaml sets; <code>make gate</code> fails where one is missed.</p>
{{ gates.html }}
{% else %}<p>params.yaml sets no bounds.</p>{% endif %}"""

    def read(self, run: Run) -> Mapping[str, Bound]:
        """Read the bounds of params.yaml."""
        return run.settings.bounds

    def context(self, data: Mapping[str, Bound], metrics: Metrics) -> dict[str, Any]:
        """The table of the gates."""
        return {"gates": gate_table(evaluate_gates(metrics, data))}


def gate_table(gates: Sequence[Gate]) -> Table:
    """A row for each gate: whether it is passed, its number, and why."""
    rows = []
    for gate in gates:
        verdict = Cell("pass", tone="good") if gate.passed else Cell("FAIL", tone="bad")
        value = "missing" if gate.value is None else f"{gate.value:.4g}"
        rows.append(Row([Cell(gate.key, code=True), verdict, *words(value, str(gate.bound), gate.why)]))
    return Table(["Number of metrics.json", "", "Value", "Bound", "Why"], rows, n_text=-1)
