"""What the exports in data/exports lose against the models that they were made of, as each wrote it itself."""

from typing import Any

from pipeline.core.runtime import read_json
from pipeline.reporting.run import Run
from pipeline.reporting.sections import Metrics
from pipeline.reporting.sections import Section as Base
from pipeline.reporting.tables import DASH, Cell, Row, Table, db, fixed

Parities = dict[str, dict[str, Any]]


class Section(Base[Parities]):
    """Exports with their change of SDRi, time and size; no section where there are none."""

    title, place = "Exports", 78
    template = """
<p>Models as files for other programs (<code>python -m pipeline export</code>), each beside the network that it was made
of. Changes are of the mean SDRi over evaluation pairs under the average query; seconds are of one core.</p>
{{ table.html }}
"""

    def read(self, run: Run) -> Parities | None:
        """Read each export's parity by the name of its folder."""
        paths = sorted((run.places.root / "data/exports").glob("*/parity.json"))
        return {path.parent.name: read_json(path) for path in paths} or None

    def metrics(self, data: Parities) -> dict[str, int | float]:
        """Each export's change of SDRi and its difference, by exports.<folder>."""
        keys = ("sdri_change", "max_difference")
        return {f"exports.{name}.{key}": one[key] for name, one in data.items() for key in keys if one[key] is not None}

    def context(self, data: Parities, metrics: Metrics) -> dict[str, Any]:
        """One row for each export."""
        columns = ["export", "change of SDRi, dB", "largest difference", "s per s", "of the network", "MB", "of it"]
        return {"table": Table(columns, [_row(name, one) for name, one in data.items()])}


def _row(name: str, one: dict[str, Any]) -> Row:
    change = DASH if one["sdri_change"] is None else db(one["sdri_change"], signed=True)
    numbers = [change, f"{one['max_difference']:.1e}", fixed(one["rtf_export"], 3), fixed(one["rtf_network"], 3)]
    numbers += [fixed(one["mb_export"], 1), fixed(one["mb_network"], 1)]
    return Row([Cell(name, code=True), *(Cell(text) for text in numbers)])
