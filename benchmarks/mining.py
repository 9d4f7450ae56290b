"""Mining anchors once against mining them again at every training step, as uss does.

    python -m benchmarks.mining [n_clips]

A training step needs `batch` targets with their queries, and as many interferers.

    at every step   read `batch` 10-s clips, detect, cut the best window of one label each, embed the targets;
                    each segment is one pair's target and another's interferer
    once            stage mine_anchors over the whole corpus, every label of every clip; then a step reads 2 x `batch`
                    segments and `batch` queries by byte offset

Both run here on one thread with the small network of params.yaml, and with the sizes of that file. The ratio for a
number of steps is (steps x step) / (mining + steps x reading). The larger the detector, the larger it gets:
PANNs' is 20 times the cost of this one.
"""

import os
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from itertools import count
from pathlib import Path

import numpy as np
import torch
import yaml

from pipeline.core.config import load_params
from pipeline.core.ontology import class_of, classes, kin
from pipeline.mixtures import shards
from pipeline.mixtures.anchors import AnchorIndex, AnchorReader
from pipeline.mixtures.mining import best_start
from pipeline.mixtures.pairs import PairStream
from pipeline.mixtures.shards import ClipReader
from pipeline.nn import panns
from pipeline.stages.mine_anchors import AudioParams, MineAnchorsParams, load_networks, mine_anchors

SAMPLE_RATE, N_CLASSES = 32000, 24
CHANNELS, EMBEDDING_DIM = [16, 32, 64, 128], 128
PAPER = ("paper", 20_550, 600_000, 16)  # clips, steps, batch


def write_corpus(directory: Path, n_clips: int) -> None:
    rng = np.random.default_rng(0)
    mids = [c.mid for c in classes() if c.index % 20 == 0][:N_CLASSES]
    samples, labels = [], {}
    for n in range(n_clips):
        pcm = (3000 * rng.standard_normal(10 * SAMPLE_RATE)).clip(-32768, 32767).astype(np.int16)
        key = f"clip{n:05d}"
        labels[key] = [mids[j] for j in sorted(rng.choice(len(mids), rng.integers(1, 5), replace=False))]
        samples.append((key, {"flac": shards.encode_flac(pcm, SAMPLE_RATE)}))
    directory.mkdir()
    members = shards.write_shard(directory / "clips-00000.tar", samples)
    lines = ["clip_id,labels,status,duration_seconds,shard,offset,size"]
    lines += [f"{m.key},{';'.join(labels[m.key])},ok,10.0,clips-00000.tar,{m.offset},{m.size}" for m in members]
    (directory / "manifest.csv").write_text("\n".join(lines) + "\n")
    shards.write_index(directory)


def seconds(function: Callable[[], object], repeat: int) -> float:
    """Median duration of a call."""
    times = []
    for _ in range(repeat):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return float(np.median(times))


def main() -> None:
    n_clips = int(sys.argv[1]) if len(sys.argv) > 1 else 64
    torch.set_num_threads(1)
    os.environ["USS_WORKERS"] = "0"
    with tempfile.TemporaryDirectory() as temporary:
        os.environ["DVC_ROOT"] = temporary
        root = Path(temporary)
        write_corpus(root / "clips", n_clips)
        torch.manual_seed(0)
        clips = ClipReader(root / "clips", SAMPLE_RATE)
        known = sorted({class_of(mid).index for clip in clips.clips.values() for mid in clip.labels})
        network = panns.SmallCnn(class_indices=known, channels=CHANNELS, embedding_dim=EMBEDDING_DIM).eval()
        for part in ("detector", "query"):
            panns.save(network, root / "sed" / part)
        audio = load_params("audio", AudioParams)
        params = load_params("mine_anchors", MineAnchorsParams).model_copy(update={"device": "cpu"})
        segment_samples = round(audio.segment_seconds * SAMPLE_RATE)

        def mine_all() -> None:
            mine_anchors(root / "clips", root / "sed", root / "anchors", audio=audio, params=params)

        mine_all()  # imports, and the corpus in the page cache
        per_clip = seconds(mine_all, 3) / n_clips
        networks = load_networks(root / "sed", "", "cpu")
        index = AnchorIndex.load(root / "anchors")
        reader = AnchorReader(root / "anchors", index)
        print(f"mining once: {1e3 * per_clip:.1f} ms a clip, {len(index) / n_clips:.2f} anchors each")
        stream = PairStream(**index.pair_columns(), seed=0, exclude="ontology", kin=kin)
        rng = np.random.default_rng(0)

        def mine_step(batch: int) -> None:
            chosen = rng.choice(list(clips.clips), batch)
            waveform = torch.from_numpy(np.stack([clips.waveform(clip) for clip in chosen]))
            with torch.inference_mode():
                probability = panns.to_frames(
                    networks.detector.framewise_probability(waveform),
                    segment_samples=networks.detector.segment_samples,
                    n_frames=waveform.shape[1] // panns.FRAME_SAMPLES + 1,
                ).numpy()
                segments = []
                for own, clip, sound in zip(probability, chosen, waveform, strict=True):
                    column = networks.position[class_of(clips.clips[clip].labels[0]).index]
                    frame = best_start(own[:, column], width=201, segment_frames=segment_samples // panns.FRAME_SAMPLES)
                    begin = frame * panns.FRAME_SAMPLES
                    segments.append(sound[begin : begin + segment_samples])
                networks.encoder.embed(torch.stack(segments))

        n = count()

        def read_step(batch: int) -> None:
            targets, interferers = stream.batch(next(n), batch)
            reader.waveforms(targets)
            reader.waveforms(interferers)
            reader.queries(targets)

        mine_step(1)
        ours = yaml.safe_load(Path("params.yaml").read_text())
        n_train = N_CLASSES * ours["synthetic"]["train_clips_per_class"]
        for name, corpus, steps, batch in [
            ("default", n_train, ours["train"]["steps"], ours["train"]["batch_size"]),
            PAPER,
        ]:
            remine, read = seconds(partial(mine_step, batch), 10), seconds(partial(read_step, batch), 50)
            ratio = steps * remine / (corpus * per_clip + steps * read)
            print(
                f"{name}: {corpus} clips, {steps} steps of {batch}: {1e3 * remine:.1f} ms a step re-mining, "
                f"{1e3 * read:.2f} ms reading; mining once is {ratio:.1f} times as fast"
            )


if __name__ == "__main__":
    main()
