"""Where in a clip a label sounds surest, from a detector's frame-wise probability (Kong et al., arXiv:2305.07447).

    probability    ____|~~~~~~|______________        one value per 10 ms
    box mean       __/~~~~~~~~~~\\____________        over `width` frames around each frame
                         ^ centre: the first maximum
                 [---- segment ----)                 moved inwards where it would leave the clip

Frame f is sample f * hop: a clip of n samples has n // hop + 1 frames, and a segment of L frames that begins at frame
s takes the samples of frames s to s + L. What is past the end of the clip must have been cut off by the caller.
"""

import hashlib
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

# Probabilities are summed as whole billionths. Integers add up to the same in any order and on any machine, so that
# equally good windows are exactly equal and the first one wins. In floating point the order of the sum decides, and
# ties are the rule: PANNs gives 31 distinct values for the 1,001 frames of a clip.
STEPS = 10**9


@dataclass(frozen=True)
class Window:
    """A segment of a clip, and how sure the detector is of its label in it."""

    start: int  # frame
    score: float  # the label's mean probability in the segment
    purity: float  # 1 - the highest mean probability of any other class in the segment


def box_sum(steps: Int[np.ndarray, "frames ..."], width: int) -> Int[np.ndarray, "frames ..."]:
    """Sum over the `width` (odd) frames around each frame, the first and last frame repeated outwards."""
    if width < 1 or width % 2 == 0:
        raise ValueError(f"a box around a frame has an odd number of frames, not {width}")
    half = width // 2
    padded = np.pad(steps, [(half + 1, half)] + [(0, 0)] * (steps.ndim - 1), mode="edge")
    padded[0] = 0
    total = np.cumsum(padded, axis=0)
    return total[width:] - total[:-width]


def smooth(probability: Float[np.ndarray, "frames ..."], width: int) -> Float[np.ndarray, "frames ..."]:
    """Mean over the `width` (odd) frames around each frame, the first and last frame repeated outwards."""
    return box_sum(_steps(probability), width) / (width * STEPS)


def last_start(n_frames: int, segment_frames: int) -> int:
    """The last frame at which a segment may begin; 0 for a clip that is shorter than a segment."""
    return max(0, n_frames - 1 - segment_frames)


def best_start(probability: Float[np.ndarray, " frames"], *, width: int, segment_frames: int) -> int:
    """Where the segment begins whose centre has the highest box mean, the first of equals."""
    centre = int(np.argmax(box_sum(_steps(probability), width)))
    return min(max(0, centre - segment_frames // 2), last_start(len(probability), segment_frames))


def random_start(n_frames: int, *, segment_frames: int, seed: int, key: str) -> int:
    """Any start, all equally likely, the same for a (seed, key) wherever and whenever it is drawn.

    Kong et al.'s code draws the centre from the first *segment's* frames, not the clip's, and so starts within the
    first second every time.
    """
    word = int.from_bytes(hashlib.sha256(key.encode()).digest()[:16], "little")
    return int(np.random.default_rng([seed, word]).integers(last_start(n_frames, segment_frames) + 1))


def window(
    probability: Float[np.ndarray, "frames classes"],
    start: int,
    *,
    segment_frames: int,
    class_position: int,
    kin: Bool[np.ndarray, " classes"],
) -> Window:
    """Score and purity of the segment that begins at frame `start`.

    `kin` marks the classes that do not count as other: the label's own and its ancestors and descendants in the
    ontology, which sound when it sounds. All other classes of the detector count, whether the clip is labelled with
    them or not: labels are incomplete. Both are means over the segment's frames, of the clip's if it is shorter.
    """
    mean = _steps(probability[start : start + segment_frames + 1]).sum(axis=0)
    mean = mean / (STEPS * min(segment_frames + 1, len(probability) - start))
    return Window(start, float(mean[class_position]), float(1 - np.max(mean[~kin], initial=0.0)))


def _steps(probability: Float[np.ndarray, "frames ..."]) -> Int[np.ndarray, "frames ..."]:
    if not np.isfinite(probability).all():
        raise ValueError("the detector gave a probability that is not a finite number")
    return np.rint(probability.astype(np.float64) * STEPS).astype(np.int64)
