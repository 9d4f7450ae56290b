"""The sections of the report: one file of this folder each, found by being there.

A file holds a class `Section`. The page shows the sections in the order of their `place`, each with its `title` as
heading and in the navigation, and the file's name as anchor. `stages/report.py` has the order of calls:

    read      what the section shows, from the files of a run; None: this run has nothing of the kind
    metrics   its numbers in metrics.json
    drawings  its charts: files reports/<name>.svg, and {{ drawings.<name> }} in its template
    files     other files that it writes into reports/
    context   names of its template, a piece of Jinja; `text` that comes out empty leaves the section out of the page
    fill      names for sounds and pictures that may take what is left of the page's size; asked last

All but `read` and `metrics` are given `metrics`, the numbers of all sections.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from pipeline.core.registry import Registry
from pipeline.reporting.run import Run

D = TypeVar("D")
Metrics = Mapping[str, int | float]


@dataclass(frozen=True)
class Drawing:
    """A chart as SVG, with its description for who does not see it; one that is not kept is in the page alone."""

    svg: str
    label: str
    kept: bool = True


class Section(Generic[D]):
    """A section of the report, with nothing in it; a section overrides what it needs."""

    title = ""  # none: the piece stands in the head of the page, above the navigation
    place = 0
    template = ""

    def read(self, run: Run) -> D | None:
        """Read what the section shows from the files of a run; None leaves the section out."""
        raise NotImplementedError

    def metrics(self, data: D) -> dict[str, int | float]:
        """The section's numbers by their keys in metrics.json; a number that is undefined has no key."""
        return {}

    def drawings(self, data: D, metrics: Metrics) -> dict[str, Drawing]:
        """The section's charts by name."""
        return {}

    def files(self, data: D, metrics: Metrics) -> dict[str, str | bytes]:
        """Contents of the section's files by their names in reports/."""
        return {}

    def context(self, data: D, metrics: Metrics) -> dict[str, Any]:
        """Names that the template uses; `drawings`, `metrics` and the filters of page.py are there besides."""
        return {}

    def fill(self, data: D, n_bytes: int) -> dict[str, Any]:
        """Names that replace those of `context`, and may lengthen the page by at most `n_bytes`."""
        return {}


REGISTRY = Registry(__name__, __file__, "section")


def load_sections() -> dict[str, Section[Any]]:
    """One of each section by the name of its file, in the order of the page."""
    sections = {name: REGISTRY.module(name).Section() for name in REGISTRY.names()}
    return dict(sorted(sections.items(), key=lambda item: item[1].place))
