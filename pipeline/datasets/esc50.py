"""ESC-50 (Piczak 2015) as published: 2,000 Freesound excerpts of 5 s, 50 categories, five folds.

    <root>/meta/esc50.csv                       filename,fold,target,category,esc10,src_file,take
    <root>/audio/<fold>-<src>-<take>-<target>.wav

Subsets are the folds, "1" to "5"; excerpts of one recording lie in one fold. "esc10-1" to "esc10-5" are what of them
belongs to ESC-10, ten categories. Each category is one AudioSet class.
"""

import unicodedata
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from pipeline.datasets import Clip, clip_id_of, files_by_name, labels_of, read_table, recording_of, root_of

FOLDS = ("1", "2", "3", "4", "5")
ESC10 = "esc10-"
SUBSETS = (*FOLDS, *(ESC10 + fold for fold in FOLDS))
_SECONDS = 5.0

# The class that sounds the same where AudioSet has no class of that name: can_opening (a pop), drinking_sipping (a
# liquid), washing_machine (a mechanism).
MIDS = {
    "airplane": "/m/0cmf2",  # Fixed-wing aircraft, airplane
    "breathing": "/m/0lyf6",  # Breathing
    "brushing_teeth": "/m/012xff",  # Toothbrush
    "can_opening": "/m/07qsvvw",  # Burst, pop
    "car_horn": "/m/0912c9",  # Vehicle horn, car horn, honking
    "cat": "/m/01yrx",  # Cat
    "chainsaw": "/m/01j4z9",  # Chainsaw
    "chirping_birds": "/m/020bb7",  # Bird vocalization, bird call, bird song
    "church_bells": "/m/03w41f",  # Church bell
    "clapping": "/m/0l15bq",  # Clapping
    "clock_alarm": "/m/046dlr",  # Alarm clock
    "clock_tick": "/m/07qjznl",  # Tick-tock
    "coughing": "/m/01b_21",  # Cough
    "cow": "/m/07rpkh9",  # Moo
    "crackling_fire": "/m/07pzfmf",  # Crackle
    "crickets": "/m/09xqv",  # Cricket
    "crow": "/m/04s8yn",  # Crow
    "crying_baby": "/t/dd00002",  # Baby cry, infant cry
    "dog": "/m/05tny_",  # Bark
    "door_wood_creaks": "/m/07qh7jl",  # Creak
    "door_wood_knock": "/m/07r4wb8",  # Knock
    "drinking_sipping": "/m/04k94",  # Liquid
    "engine": "/m/02mk9",  # Engine
    "fireworks": "/m/0g6b5",  # Fireworks
    "footsteps": "/m/07pbtc8",  # Walk, footsteps
    "frog": "/m/09ld4",  # Frog
    "glass_breaking": "/m/07rn7sz",  # Shatter
    "hand_saw": "/m/01b82r",  # Sawing
    "helicopter": "/m/09ct_",  # Helicopter
    "hen": "/m/07st89h",  # Cluck
    "insects": "/m/03vt0",  # Insect
    "keyboard_typing": "/m/01m2v",  # Computer keyboard
    "laughing": "/m/01j3sz",  # Laughter
    "mouse_click": "/m/07qc9xj",  # Clicking
    "pig": "/m/068zj",  # Pig
    "pouring_water": "/m/07prgkl",  # Pour
    "rain": "/m/06mb1",  # Rain
    "rooster": "/m/07qn5dc",  # Crowing, cock-a-doodle-doo
    "sea_waves": "/m/034srq",  # Waves, surf
    "sheep": "/m/07bgp",  # Sheep
    "siren": "/m/03kmc9",  # Siren
    "sneezing": "/m/01hsr_",  # Sneeze
    "snoring": "/m/01d3sd",  # Snoring
    "thunderstorm": "/m/0jb2l",  # Thunderstorm
    "toilet_flush": "/m/01jt3m",  # Toilet flush
    "train": "/m/07jdr",  # Train
    "vacuum_cleaner": "/m/0d31p",  # Vacuum cleaner
    "washing_machine": "/t/dd00077",  # Mechanisms
    "water_drops": "/m/07r5v4s",  # Drip
    "wind": "/m/03m9d0z",  # Wind
}


def clips(root: Path, subset: str, counts: Counter[str] | None = None) -> Iterator[Clip]:
    """The clips of a subset sorted by clip_id, which is the name of the file without its suffix."""
    counts = Counter() if counts is None else counts
    if subset not in SUBSETS:
        raise ValueError(f"ESC-50 has no subset {subset!r}; its subsets are {list(SUBSETS)}")
    fold, only_esc10 = subset.removeprefix(ESC10), subset.startswith(ESC10)
    root_of(root, "meta/esc50.csv and audio/")
    present = files_by_name(root, counts, "audio")

    found: dict[str, Clip] = {}
    columns = ("filename", "fold", "category", "src_file", *(["esc10"] if only_esc10 else []))
    for where, row in read_table(root / "meta" / "esc50.csv", columns):
        filename = unicodedata.normalize("NFC", row["filename"])
        if row["fold"] not in FOLDS:
            raise ValueError(f"{where}: fold {row['fold']!r} is not one of {list(FOLDS)}")
        if row["category"] not in MIDS:
            raise ValueError(f"{where}: {row['category']!r} is not a category of ESC-50")
        if only_esc10 and row["esc10"] not in ("True", "False"):
            raise ValueError(f"{where}: esc10 is {row['esc10']!r}, neither True nor False")
        if row["fold"] != fold or (only_esc10 and row["esc10"] != "True"):
            continue
        if (clip_id := clip_id_of(filename.removesuffix(".wav"), counts)) in found:
            raise ValueError(f"{where}: clip {clip_id!r} a second time")
        labels = labels_of([MIDS[row["category"]]], where, counts)
        recording = row["src_file"] or recording_of(clip_id)
        found[clip_id] = Clip(clip_id, labels, present.get(f"audio/{filename}"), 0.0, _SECONDS, recording)
    yield from (found[clip_id] for clip_id in sorted(found))
