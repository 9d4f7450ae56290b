"""Any folder of music.

<root>/song.flac                    a track without stems
<root>/[more/]title/vocals.wav      a folder with audio files in it is a track, and the files are its stems;
                    guitar.wav      one called `mixture` or `mix` is their ready mixture
                    mixture.wav
"""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from pipeline.datasets.music import Stem, Track, audio_files, ids_of, in_order, inside, root_of


def tracks(root: Path, counts: Counter[str] | None = None) -> Iterator[Track]:
    """The tracks by id, which is their path in letters of an id."""
    counts = Counter() if counts is None else counts
    found: dict[str, dict[str, str]] = {}
    todo = [""]
    loose: dict[str, str] = {}
    root_of(root)
    while todo:
        folder = todo.pop()
        folders, files = inside(root / folder, counts)
        todo += [f"{folder}/{name}" if folder else name for name in folders]
        audio = audio_files(files, counts)
        if not folder:
            loose = audio
        elif audio:
            found[folder] = audio
    # A file song.wav beside a folder song/ goes by its whole name.
    names = {file: file if base in found else base for base, file in loose.items()}
    ids = ids_of([*found, *names.values()])
    plain = [Track(ids[name], None, None, (), file) for file, name in names.items()]
    yield from in_order([*plain, *(_track(folder, files, ids[folder]) for folder, files in found.items())])


def _track(folder: str, files: dict[str, str], track_id: str) -> Track:
    ready = next((name for name in files if name.lower() in ("mixture", "mix")), None)
    names = ids_of([name for name in files if name != ready])
    stems = tuple(Stem(names[name], (f"{folder}/{files[name]}",)) for name in names)
    return Track(track_id, None, None, stems, f"{folder}/{files[ready]}" if ready else None)
