"""Why there is no clip of a file: a closed list of reasons, and the error that carries one."""

from typing import Literal

Reason = Literal[
    "missing",  # was listed, is not there
    "outside_root",  # an absolute path, one with .., or one through a link that leads out of the corpus
    "not_regular_file",  # a link, a pipe, a device, a directory
    "unreadable",  # the system refuses: permissions, a failing disk, an ffmpeg that does not start or takes too long
    "undecodable",  # not audio, or damaged
    "unsupported_container",  # mp4, webm, aac, and no ffmpeg here
    "rate_out_of_bounds",
    "no_samples",
    "truncated",  # the file ends before the audio that it announces
    "too_long",  # over a day of sound, which a few kilobytes can hold
    "too_short",  # under a second of what should be longer
    "outside_segment",  # a whole recording that ends before the segment begins
    "non_finite",
    "peak_out_of_range",
    "silent",
    "also_in_eval",  # a clip of train with the samples of one that is held out
]


class BadClip(Exception):
    """A file that no clip can be made of: a reason of the closed list above, and the particulars in words."""

    def __init__(self, reason: Reason, detail: str = "") -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = " ".join(detail.split())  # one line

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}" if self.detail else self.reason
