"""Stage index_music: list the segments of all tracks, their levels and how many stems sound in them, and split them.

One table per segment length. Tracks with the same samples, under whatever names, are on one side of the split and
counted; those of a source's own train split that it also holds out are left out. Tracks that cannot be read are
quarantined with the reason; more than music.max_bad_fraction of them stop the stage. Audio is read in blocks, never a
whole track at once.
"""

import argparse
import io
import json
import logging
from collections import Counter
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.core.config import load_params
from pipeline.core.runtime import outside, publish, remove, run_command, running, write_atomic, write_json
from pipeline.datasets.music import load, tracks_of
from pipeline.mixtures.tracks import MusicParams, index_file, segments

log = logging.getLogger(__name__)


def index_music(out: Path, params: MusicParams) -> dict[str, Any]:
    """Write segments_<length>s.parquet, quarantine.csv and summary.json into `out`; return the summary."""
    root, met = outside(params.root), Counter[str]()
    tracks = tracks_of(params.source, root, params.view, met)
    folder = out.with_name(f".{out.name}.tmp")
    remove(folder)
    folder.mkdir(parents=True)
    summary: dict[str, Any] = {"source": params.source, "tracks": len(tracks), "reader": dict(sorted(met.items()))}
    quarantine: dict[tuple[str, str], dict[str, str]] = {}
    for seconds in params.segment_seconds:
        hop = seconds if params.hop_seconds is None else params.hop_seconds
        fractions = (params.fractions[0], params.fractions[1], params.fractions[2])
        table, passed = segments(tracks, root, seconds, hop, how=params.split, fractions=fractions, seed=params.seed)
        for bad in passed.quarantine:
            row = {"track_id": bad.track_id, "path": bad.path, "reason": bad.reason, "detail": bad.detail}
            quarantine[bad.track_id, bad.path] = row
        if len(passed.quarantine) > params.max_bad_fraction * len(tracks):
            raise ValueError(
                f"{len(passed.quarantine)} of {len(tracks)} tracks under {params.root!r} cannot be read "
                f"({dict(sorted(passed.counts.items()))}), the first is {passed.quarantine[0]}; "
                f"music.max_bad_fraction is {params.max_bad_fraction}"
            )
        if table.empty:
            raise ValueError(f"no segment of {seconds:g} s in {len(tracks)} tracks: {dict(passed.counts)}")
        buffer = io.BytesIO()
        pq.write_table(pa.Table.from_pandas(table.reset_index(drop=True), preserve_index=False), buffer)
        write_atomic(index_file(folder, seconds), buffer.getvalue())
        summary[f"segments_{seconds:g}s"] = {
            "kept": len(table),
            "left_out": dict(sorted(passed.counts.items())),
            "splits": {
                str(split): {"segments": len(rows), "tracks": int(rows["track_id"].nunique())}
                for split, rows in table.groupby("split")
            },
            "repeated_sounds": passed.repeats["repeated_sounds"],
            "active_stems": {str(n): int(count) for n, count in sorted(Counter(table["n_active_stems"]).items())},
        }
    summary["quarantined"] = len({track for track, _ in quarantine})
    columns = ["track_id", "path", "reason", "detail"]
    listing = pd.DataFrame([quarantine[key] for key in sorted(quarantine)], columns=columns)
    write_atomic(folder / "quarantine.csv", listing.to_csv(index=False, lineterminator="\n"))
    write_json(folder / "summary.json", summary)
    publish(folder, out)
    return summary


def main() -> None:
    """Paths come from dvc.yaml, numbers from params.yaml."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--summary", type=Path, required=True)
    args = parser.parse_args()
    params = load_params("music", MusicParams)
    source = load(params.source)
    with running("index_music", args.out):
        if hasattr(source, "prepare"):
            source.prepare(Path(params.root), load_params(f"music.{params.source}", source.Options))
        summary = index_music(args.out, params)
        found = summary[f"segments_{params.segment_seconds[0]:g}s"]
        if found["repeated_sounds"]:
            log.warning(
                "%d tracks have the samples of others: all of one sound are on one side of the split, and %d that the "
                "source trains on and holds out are left out of its train split",
                found["repeated_sounds"],
                found["left_out"].get("also_held_out", 0),
            )
        write_json(args.summary, summary)
        log.info("%s", json.dumps(summary))


if __name__ == "__main__":
    run_command(main)
