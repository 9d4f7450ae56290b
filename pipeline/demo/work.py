"""What the page does with a file, without the page: a recording and what is asked of it to sounds with pictures."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.separate import Separator, Unusable, command
from pipeline.separate.files import open_recording
from pipeline.separate.job import REST, Job
from pipeline.separate.spectrogram import draw

MIXTURE = "mixture"
MAX_SECONDS = 600.0  # of a recording: what a person waits for


@dataclass(frozen=True)
class Sound:
    """A sound to hear (an audio file) and to see (a PNG with its spectrogram)."""

    name: str
    audio: Path
    picture: Path


def separate_file(
    separator: Separator,
    path: Path,
    out: Path,
    *,
    classes: Sequence[str] = (),
    example: Path | None = None,
    auto: bool = False,
) -> list[Sound]:
    """Separate a recording into files in `out`: the mixture first, then the stems, at last the residual.

    Unusable, with a reason of one line, for a file that cannot be read or is longer than ten minutes, and where nothing
    is asked of a model that takes queries.
    """
    recording = open_recording(path)
    seconds = 0.0
    for block in recording.blocks():
        seconds += block.shape[1] / recording.sample_rate
        if seconds > MAX_SECONDS:
            raise Unusable(f"{path.name} is longer than {MAX_SECONDS / 60:g} minutes; `separate` takes any length")
    if not separator.takes_queries:
        classes, example, auto = (), None, False
    words = [str(path), "--out", str(out), "--filename", "{stem}.{ext}", "--residual", "--float32", "--spectrogram"]
    words += [word for name in classes for word in ("--class", name)]
    words += ["--query", str(example)] if example else []
    words += ["--auto"] if auto else []
    args = command.parser().parse_args(words)
    command.check(args, separator)
    job = Job(separator, args, command.named_queries(separator, args), None, bars=False)
    stems: dict[str, str] = job.separate(path)["stems"]
    picture = out / f"{MIXTURE}.png"
    draw(recording.blocks(), recording.sample_rate, picture)
    found = [Sound(MIXTURE, path, picture)]
    order = [*(name for name in stems if name != REST), REST]
    return found + [Sound(name, Path(stems[name]), Path(stems[name]).with_suffix(".png")) for name in order]
