"""A pair manifest at full scale: 527 classes x 100 pairs from a synthetic index of 20,000 clips.

    python -m benchmarks.pairs

The clips carry labels in AudioSet's proportions: two classes with 5,000 clips each, the others around 57, 2.4 labels
a clip. Prints seconds, peak memory of the whole process and the manifest's hash. Bars: 30 s, 1 GB.
"""

import os
import resource
import tempfile
import time
from pathlib import Path

import numpy as np

from pipeline.core.ontology import classes
from pipeline.mixtures.anchors import anchor_key, write_index
from pipeline.mixtures.mixing import PairsParams
from pipeline.stages.make_eval_pairs import MakeEvalPairsParams, make_eval_pairs

N_CLIPS, PAIRS_PER_CLASS = 20_000, 100
PAIRS = PairsParams(exclude="ontology", normalize="joint", match_energy=True, min_gain=0.02, max_gain=50.0)


def write_synthetic_index(directory: Path, n_clips: int) -> int:
    """An anchors directory without its shards; returns the number of anchors."""
    rng = np.random.default_rng(0)
    labels: list[set[int]] = [set() for _ in range(n_clips)]
    common = [k for k, c in enumerate(classes()) if c.name in ("Speech", "Music")]
    for k in range(len(classes())):
        n = n_clips // 4 if k in common else round(n_clips * rng.uniform(48, 90) / 20_000)
        for clip in rng.choice(n_clips, n, replace=False):
            labels[clip].add(k)
    for clip in labels:
        if not clip:
            clip.add(int(rng.integers(len(classes()))))
    rows = []
    for n, own in enumerate(labels):
        joined = ";".join(classes()[k].mid for k in sorted(own))
        for k in sorted(own):
            clip_id = f"clip{n:07d}"
            rows.append(
                {
                    "anchor": anchor_key(clip_id, k), "clip_id": clip_id, "class_index": k, "mid": classes()[k].mid,
                    "labels": joined, "onset_seconds": int(rng.integers(801)) / 100, "score": 0.5, "purity": 0.5,
                    "energy": float(10 ** rng.uniform(-5, -0.5)), "peak": 1.0, "shard": "anchors-00000.tar",
                    "wav_offset": 0, "wav_size": 0, "query_offset": 0, "query_size": 0, "sha256": "",
                }
            )  # fmt: skip
    directory.mkdir()
    write_index(directory, rows, sample_rate=32000, segment_samples=64000, query_dim=2048, empty_classes=[])
    return len(rows)


def main() -> None:
    with tempfile.TemporaryDirectory() as temporary:
        os.environ["DVC_ROOT"] = temporary
        directory = Path(temporary)
        n_anchors = write_synthetic_index(directory / "anchors", N_CLIPS)
        params = MakeEvalPairsParams(seed=1234, pairs_per_class=PAIRS_PER_CLASS)
        start = time.perf_counter()
        summary = make_eval_pairs(directory / "anchors", directory / "pairs", pairs=PAIRS, params=params)
        seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    print(f"{summary['pairs']} pairs of {summary['classes']} classes from {N_CLIPS} clips, {n_anchors} anchors")
    print(f"{seconds:.2f} s (bar 30), peak {peak:.2f} GB (bar 1), sha256 {summary['content_sha256']}")
    assert summary["pairs"] == 52_700


if __name__ == "__main__":
    main()
