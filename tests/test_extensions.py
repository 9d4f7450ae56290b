"""What the pipeline is extended by is one file each: written into a copy of the package, it is there by its name."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

SEPARATOR = '''
"""Separator gain: the mixture times a learned gain, which a query does not change."""

import torch
from torch import nn

from pipeline.separators import QuerySeparator


class Separator(QuerySeparator):
    """One number."""

    def __init__(self, *, query_dim: int, hop_length: int, interferer_query: bool = False) -> None:
        super().__init__(query_dim=query_dim, interferer_query=interferer_query)
        self.hop_length = hop_length
        self.gain = nn.Parameter(torch.ones(()))

    def forward(self, mixture, query, part=slice(None)):
        """Scale the part."""
        return self.gain * mixture[:, part]
'''
FUSION = '''
"""Fusion louder: the features' mean raises the query."""

from torch import nn

from pipeline.separators import fusions


class Fusion(fusions.Fusion):
    """One layer."""

    def __init__(self, sizes, body, *, width: int = 8) -> None:
        super().__init__()
        self.layer = nn.Linear(sizes.dim, sizes.query_dim)

    def query(self, query, features):
        """Add it."""
        return query + self.layer(features.sounding().mean(dim=1))
'''
UPSTREAM = '''
"""Upstream level: the level of each 10 ms."""

import torch

from pipeline import upstreams


class Upstream(upstreams.Upstream):
    """No weights."""

    dim, n_layers, frames_per_step = 1, 1, 1.0

    def hidden(self, waveform):
        """Mean square per frame."""
        return [waveform.unfold(1, 320, 320).square().mean(dim=2, keepdim=True)]


def read(options, pretrained):
    """Nothing to read."""
    return {}, None
'''
DATASET = '''
"""Dataset nothing: lists no clip."""


def clips(root, subset, counts):
    """None."""
    return iter(())
'''
SOURCE = DATASET.replace("Dataset", "Source")
METRIC = '''
"""Metric peak: how much louder the estimate's peak is than the target's."""

import torch

from pipeline.evaluation import metrics


class Metric(metrics.Metric):
    """One column, and its gain over the mixture's."""

    columns = gains = ("peak",)

    def __init__(self, *, floor: float = 1e-3) -> None:
        self.floor = floor

    def __call__(self, estimates, target, interferer):
        """A ratio in dB."""
        peaks = [x.abs().amax(dim=-1).clamp(min=self.floor) for x in (estimates, target[:, None])]
        return {"peak": 20 * torch.log10(peaks[0] / peaks[1])}
'''
FILES = {
    "evaluation/metrics/peak.py": METRIC,
    "separators/gain.py": SEPARATOR,
    "separators/fusions/louder.py": FUSION,
    "upstreams/level.py": UPSTREAM,
    "datasets/nothing.py": DATASET,
    "datasets/music/nowhere.py": SOURCE,
}
USE = {
    "evaluation/metrics/peak.py": """
import pandas as pd, torch
from pipeline.evaluation import metrics as registry, scores
from pipeline.reporting.sections.table1 import our_systems, systems_table
from pipeline.reporting.summary import summarise
from pipeline.stages.evaluate import EvaluateParams
assert registry.options("peak").model_validate({}).floor == 1e-3 and "peak" in registry.names()
params = EvaluateParams(
    batch_size=1, pairs_per_part=1, metrics={"sdr": {}, "si_sdr": {}, "peak": {}}, n_examples=0, device="cpu"
)
waves = torch.randn(3, 4, 800)
values = scores.score(waves[:, :1], waves[:, 1], waves[:, 2], waves[:, 3], params.build_metrics())
assert set(values) == set(scores.schema(params.build_metrics()).names[8:]) and "peaki" in values
rows = pd.DataFrame({name: column[:, 0] for name, column in values.items()}).assign(
    model="one", query="average", pair=range(3), class_index=0, mid="/m/0bt9lr", target_clip=list("abc"),
    target_recording=list("abc"), interferer_recording=list("bca"), interferer_class_index=1,
)
metrics = summarise(rows, {}, n_resamples=10, seed=0).metrics
assert "one.average.peak_class_median_mean" in metrics and "mixture.peak_class_mean_mean" in metrics
assert "PEAK" in systems_table(our_systems(metrics, ["one"], ["average"])).html
""",
    "separators/gain.py": """
import torch
from pipeline import separators
params = separators.model_params("gain").model_validate({"hop_length": 320})
separator = separators.build("gain", query_dim=4, **params.model_dump())
mixture = torch.ones(2, 1000)
assert torch.equal(separator(mixture, torch.zeros(2, 4), slice(10, 20)), mixture[:, 10:20])
assert separators.takes_query("gain") and "gain" in separators.names()
""",
    "separators/fusions/louder.py": """
from pipeline.separators import fusions
assert fusions.options("louder").model_validate({}).width == 8
assert fusions.reads_features("louder") and "louder" in fusions.names()
""",
    "upstreams/level.py": """
import torch
from pipeline import upstreams
config, state = upstreams.read("level", {}, None)
(hidden,) = upstreams.build("level", **config).hidden(torch.ones(1, 32000))
assert hidden.shape == (1, 100, 1) and upstreams.options("level") is None
""",
    "datasets/nothing.py": """
from pipeline import datasets
assert list(datasets.load("nothing").clips(None, None, None)) == []
""",
    "datasets/music/nowhere.py": """
from pipeline.datasets import music
assert music.load("nowhere").__doc__.strip().startswith("Source nothing")
""",
}


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """A copy of the package."""
    root = tmp_path_factory.mktemp("copy")
    shutil.copytree(ROOT / "pipeline", root / "pipeline", ignore=shutil.ignore_patterns("__pycache__"))
    return root


@pytest.mark.parametrize("file", FILES)
def test_one_file_is_all_that_is_added(package, file):
    def run():
        return subprocess.run([sys.executable, "-c", USE[file]], cwd=package, capture_output=True, text=True)

    before = run()
    assert before.returncode == 1
    assert Path(file).stem in before.stderr  # the known names, and not this one
    (package / "pipeline" / file).write_text(FILES[file].lstrip())
    after = run()
    assert after.returncode == 0, after.stderr
