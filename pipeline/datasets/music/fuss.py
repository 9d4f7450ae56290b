"""FUSS (Wisdom et al. 2021), no music but the set with a published MixIT recipe: 22,000 mixtures of 10 s at 16 kHz.

    <root>/[ssdata/ | ssdata_reverb/]{train,validation,eval}_example_list.txt   mixture <tab> source <tab> source ...
                                     train/example00000.wav
                                     train/example00000_sources/{background0,foregroundK}_sound.wav

A background and up to three foregrounds; a source is called background0, foreground0, ... The subset `eval` is `test`.
"""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from pipeline.datasets.music import Stem, Track, in_order, root_of

_PLACES = ("", "ssdata", "ssdata_reverb")
_SUBSETS = {"train": "train", "validation": "validation", "eval": "test"}


def tracks(root: Path, counts: Counter[str] | None = None) -> Iterator[Track]:
    """The examples of every list that is there, by id: train_example00000."""
    del counts  # lists are followed to the letter: nothing is passed over
    root_of(root)
    for place in _PLACES:
        lists = [(subset, root / place / f"{subset}_example_list.txt") for subset in _SUBSETS]
        if any(path.is_file() for _, path in lists):
            prefix = f"{place}/" if place else ""
            yield from in_order(
                track for subset, path in lists if path.is_file() for track in _read(path, subset, prefix)
            )
            return
    raise FileNotFoundError(f"music.root {str(root)!r}: no {{train,validation,eval}}_example_list.txt of FUSS in there")


def _read(path: Path, subset: str, prefix: str) -> Iterator[Track]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not text in UTF-8: {error}") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        mixture, *sources = line.strip().split("\t")
        if not sources or any(source.startswith("/") for source in (mixture, *sources)):
            raise ValueError(f"{path}:{number}: a line should be a mixture and its sources, relative, tabs between")
        try:
            stems = tuple(
                Stem(Path(source).stem.removesuffix("_sound"), (f"{prefix}{source}",)) for source in sorted(sources)
            )
            yield Track(f"{subset}_{Path(mixture).stem}", None, _SUBSETS[subset], stems, f"{prefix}{mixture}")
        except ValueError as error:
            raise ValueError(f"{path}:{number}: {error}") from None
