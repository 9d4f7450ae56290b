"""The ablations that `make ablations` has collected for this run."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.reporting.ablation_table import ablation_table, about, read_ablations
from pipeline.reporting.run import Run
from pipeline.reporting.sections import Metrics
from pipeline.reporting.sections import Section as Base

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Ablations:
    """Where the table lies, and the params of the run that it must be of."""

    path: Path
    document: dict[str, Any]


class Section(Base[Ablations]):
    """The table of ablations."""

    title = "Ablations"
    place = 70
    template = """\
{% if table %}<p class="muted">{{ about }} Each was trained and evaluated as the rest (<code>make ablations</code>).</p>
{{ table.html }}{% endif %}"""

    def read(self, run: Run) -> Ablations | None:
        """Find the table, if there is one."""
        path = run.places.ablations
        return Ablations(path, run.settings.document) if path.is_file() else None

    def context(self, data: Ablations, metrics: Metrics) -> dict[str, Any]:
        """The table, if it is of this run."""
        rows = read_ablations(data.path, metrics, data.document)
        if not rows:
            log.warning(
                "%s is of another run than this one and is not shown; `make ablations` makes one of this", data.path
            )
        return {"table": ablation_table(rows) if rows else None, "about": about(data.document)}
