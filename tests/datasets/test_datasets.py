"""What lies on disk, however it lies there, becomes the same clips; what is wrong is said with file and line."""

import csv
import hashlib
import io
import json
import math
import os
import re
import shutil
import string
import subprocess
import sys
import time
import unicodedata
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import assume, given
from hypothesis import strategies as st

from pipeline.core import ontology
from pipeline.datasets import (
    AUDIO_SUFFIXES,
    Clip,
    audio_suffix,
    audioset,
    esc50,
    fsd50k,
    load,
    recording_of,
    synthetic,
    walk,
)
from pipeline.datasets.audioset import Segment, read_segments, resolve
from pipeline.datasets.music import audio_files

SPEECH, MALE, DOG = "/m/09x0r", "/m/05zppz", "/m/0bt9lr"
HUMAN = "/m/0dgw9r"  # a node of the ontology, none of the 527
YTID = "-0RWZT-miFs"

HEADER = (
    "# Segments csv created Sun Mar  5 10:54:31 2017\n"
    "# num_ytids=2, num_segs=2, num_unique_labels=3, num_positive_labels=3\n"
    "# YTID, start_seconds, end_seconds, positive_labels\n"
)
ROWS = f'{YTID}, 30.000, 40.000, "{SPEECH},{MALE}"\nYabcdef_-12, 0.500, 10.000, "{DOG}"\n'
EXPECTED = [Segment(YTID, 30.0, 40.0, (SPEECH, MALE)), Segment("Yabcdef_-12", 0.5, 10.0, (DOG,))]


def put(path: Path, content: str | bytes = b"") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def rows(*ids: str, start: str = "30.000", end: str = "40.000") -> str:
    return HEADER + "".join(f'{ytid}, {start}, {end}, "{SPEECH}"\n' for ytid in ids)


# ------------------------------------------------------------------------------------------------------- segment lists


@pytest.mark.parametrize(
    "text",
    [
        HEADER + ROWS,
        ROWS,
        HEADER.splitlines(keepends=True)[2] + ROWS,
        "YTID,start_seconds,end_seconds,positive_labels\n" + ROWS,
        HEADER + ROWS.replace(", ", ",").replace("30.000", "30").replace("40.000", "40"),
        HEADER + f"{YTID},30,40,{SPEECH},{MALE}\nYabcdef_-12,0.5,10,{DOG}\n",
        "\ufeff" + (HEADER + ROWS).replace("\n", "\r\n"),
        HEADER + "empty\nempty\n\nempty\n" + ROWS,
        HEADER + f'{YTID},30,40," ""{SPEECH}","{MALE}""",,,\nYabcdef_-12,0.5,10,"""{DOG}""",,,,\n,,,,\n',
        HEADER + f'"{YTID}, 30.000, 40.000, ""{SPEECH},{MALE}"""\n"Yabcdef_-12, 0.5, 10.0, ""{DOG}""",,\n',
        HEADER + f'{YTID}, 30.000, 40.000, "{SPEECH}, {MALE} "\nYabcdef_-12, 0.500, 10.000, "{DOG}"',
        # one row a label, and a row repeated
        HEADER + f"{YTID},30,40,{MALE}\nYabcdef_-12,0.5,10,{DOG}\n{YTID},30,40,{SPEECH}\n{YTID},30,40,{SPEECH}\n",
    ],
)
def test_every_form_of_a_segment_list_reads_the_same(tmp_path, text):
    assert read_segments(put(tmp_path / "x.csv", text), Counter()) == EXPECTED


def test_a_quote_that_is_never_closed_swallows_no_other_row(tmp_path):
    path = put(tmp_path / "x.csv", HEADER + ROWS.replace(f'{MALE}"', MALE))
    assert read_segments(path, Counter()) == EXPECTED


def test_what_is_passed_over_in_a_list_is_counted(tmp_path):
    text = HEADER + f"empty\n{YTID},30,40,{SPEECH}\n{YTID},30,40,{SPEECH}\nabcdefghijk,0,10,{HUMAN}\n"
    counts: Counter[str] = Counter()
    assert [s.ytid for s in read_segments(put(tmp_path / "x.csv", text), counts)] == [YTID]
    assert counts == {"empty_rows": 1, "duplicate_rows": 1, "labels_outside_the_527": 1, "segments_without_label": 1}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("../etc/pass,0,10,/m/09x0r", "x.csv:4: '../etc/pass' is not an id"),
        ("abc.def_ghi,0,10,/m/09x0r", "x.csv:4: 'abc.def_ghi' is not an id"),
        (f"{YTID},zero,10,/m/09x0r", "x.csv:4: 'zero' is not a time"),
        (f"{YTID},nan,10,/m/09x0r", "x.csv:4: 'nan' is not a time"),
        (f"{YTID},-1,10,/m/09x0r", "x.csv:4: '-1' is not a time"),
        (f"{YTID},0,inf,/m/09x0r", "x.csv:4: 'inf' is not a time"),
        (f"{YTID},10,10,/m/09x0r", f"x.csv:4: {YTID} ends at 10.0 s, not after"),
        (f"{YTID},0", "x.csv:4: a row should be"),
        (f"{YTID},0,10,/m/09xOr", "x.csv:4: '/m/09xOr' is not a label of AudioSet"),
        (f"{YTID},0,10,Speech", "x.csv:4: 'Speech' is not a label of AudioSet"),
        (f"{YTID},0,10,{SPEECH}\n#NAME?,0,10,{SPEECH}", "x.csv:5: '#NAME\\?' is not an id"),
        ("#NAME?,0,10,/m/09x0r", "x.csv:4: '#NAME\\?' is not an id"),
        (f"{YTID},0,10,{SPEECH}\0", "x.csv:4: a NUL byte"),
        ("", "x.csv lists no segment"),
    ],
)
def test_a_mistake_in_a_list_names_its_file_and_line(tmp_path, row, message):
    with pytest.raises(ValueError, match=message):
        read_segments(put(tmp_path / "x.csv", HEADER + row + "\n"), Counter())


@pytest.mark.parametrize("content", [os.urandom(5000) + b"\xff", "YTID,1,2".encode("utf-16"), b"\x89PNG\r\n\x1a\n\0"])
def test_a_list_that_is_not_text_is_refused_by_name(tmp_path, content):
    with pytest.raises(ValueError, match=r"x\.csv"):
        read_segments(put(tmp_path / "x.csv", content), Counter())


def test_a_field_of_megabytes_is_an_error_with_its_line(tmp_path):
    with pytest.raises(ValueError, match=r"x\.csv:4: field larger"):
        read_segments(put(tmp_path / "x.csv", HEADER + "a" * 200_000 + ",0,1,x\n"), Counter())


def test_a_list_is_found_under_its_usual_names_and_a_wrong_place_is_named(tmp_path):
    for name in ("balanced_train_segments.csv", "metadata/eval_segments.csv", "metadata/part/x_part00.csv"):
        put(tmp_path / name, HEADER + ROWS)
    for subset in ("balanced_train", "eval", "eval_segments", "part/x_part00"):
        assert len(list(audioset.clips(tmp_path, subset))) == 2
    with pytest.raises(FileNotFoundError, match=r"unbalanced_train_segments\.csv"):
        list(audioset.clips(tmp_path, "unbalanced_train"))
    with pytest.raises(FileNotFoundError, match="nowhere' does not exist"):
        list(audioset.clips(tmp_path / "nowhere", "eval"))
    with pytest.raises(NotADirectoryError, match="is not a folder"):
        list(audioset.clips(tmp_path / "balanced_train_segments.csv", "eval"))
    for subset in ("../eval", "/etc/passwd", "", "a//b", "a.csv"):
        with pytest.raises(ValueError, match="is not a name"):
            list(audioset.clips(tmp_path, subset))


# ---------------------------------------------------------------------------------------------------------- file names

LAYOUTS = {
    "panns": lambda s: f"audios/balanced_train_segments/Y{s.ytid}.wav",
    "huggingface": lambda s: f"audio/bal_train/{s.ytid}.flac",
    "audiosetdl": lambda s: f"audio/{s.ytid}_{s.start_seconds * 1000:.0f}_{s.end_seconds * 1000:.0f}.flac",
    "ast": lambda s: f"train/{s.ytid[0]}/{s.ytid[1]}/{s.ytid}_{s.start_seconds:.3f}.flac",
    "audioset-download": lambda s: f"Speech/{s.ytid}_{s.start_seconds}-{s.end_seconds}.ogg",
    "fast": lambda s: f"wavs/balanced_train/000000/id_{s.ytid}.m4a",
    "processing": lambda s: f"speech/{s.ytid}_{int(s.start_seconds)}.wav",
    "dcase": lambda s: f"audio/Y{s.ytid}_{s.start_seconds:.3f}_{s.end_seconds:.3f}.wav",
    "vggsound": lambda s: f"video/{s.ytid}_{int(s.start_seconds):06d}.mp4",
    "audiocaps": lambda s: f"{s.ytid}.WAV",
    "underscore_y": lambda s: f"audio/_Y{s.ytid}_{s.start_seconds:.3f}.opus",
}
REAL_IDS = st.text(string.ascii_letters + string.digits + "_-", min_size=11, max_size=11)
AWKWARD_IDS = st.text("Y_-i30d", min_size=11, max_size=11)
TIMES = st.one_of(st.integers(0, 600).map(float), st.integers(0, 600_000).map(lambda ms: ms / 1000))


def name_of(layout: str, segment: Segment) -> str:
    return os.path.splitext(os.path.basename(LAYOUTS[layout](segment)))[0]


def table(ids: list[str], starts: list[float]) -> dict[str, list[Segment]]:
    return {ytid: [Segment(ytid, t, round(t + 10, 3), (SPEECH,))] for ytid, t in zip(ids, starts, strict=True)}


@given(st.lists(REAL_IDS, min_size=1, max_size=20, unique=True), st.data())
def test_every_id_comes_back_from_every_layout(ids, data):
    segments = table(ids, data.draw(st.lists(TIMES, min_size=len(ids), max_size=len(ids))))
    for layout in LAYOUTS:
        for ytid in ids:
            held = resolve(name_of(layout, segments[ytid][0]), segments)
            # Random ids may be drawn to contain one another; the next test is about those.
            assume(len({segment.ytid for segment, _ in held}) <= 1)
            assert [segment for segment, _ in held] == segments[ytid]


@given(st.lists(AWKWARD_IDS, min_size=1, max_size=20, unique=True), st.data())
def test_ids_made_to_confuse_come_back_or_are_ambiguous_for_a_reason(ids, data):
    segments = table(ids, data.draw(st.lists(TIMES, min_size=len(ids), max_size=len(ids))))
    prefixes = ("", "Y", "_Y", "id_")
    for layout in LAYOUTS:
        for ytid in ids:
            name = name_of(layout, segments[ytid][0])
            held = {segment.ytid for segment, _ in resolve(name, segments)}
            if name in segments:
                assert held == {name}  # the whole name is an id: nothing else is read into it
            else:
                assert ytid in held
                assert all(any(name.startswith(prefix + other) for prefix in prefixes) for other in held)


@given(st.text(max_size=40), st.lists(REAL_IDS, max_size=5, unique=True))
def test_any_other_name_is_nobodys_and_never_an_error(name, ids):
    assume(not any(ytid in name for ytid in ids))
    assert resolve(name, table(ids, [0.0] * len(ids))) == []


@pytest.mark.parametrize(
    "name",
    [
        f"{YTID}_30.000_40.000_50.000",
        f"{YTID}30",
        f"{YTID}_",
        f"{YTID}.30",
        f"x{YTID}",
        f"{YTID}_\u0663\u0660",  # 30 in Arabic digits
        f"{YTID}_1e9",
        YTID[1:],
        YTID.lower(),
        f"{YTID}_70.000_80.000",  # another part of that recording
        f"{YTID}_{'9' * 400}",
    ],
)
def test_a_name_that_is_nearly_right_is_not_taken(name):
    assert resolve(name, table([YTID], [30.0])) == []


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_copy_in_any_layout_gives_the_same_clips(tmp_path, layout):
    segments = [Segment(ytid, 30.0, 40.0, (SPEECH,)) for ytid in (YTID, "Yabcdef_-12", "_Yabcdefghi", "id_abcdefgh")]
    put(tmp_path / "balanced_train_segments.csv", rows(*(s.ytid for s in segments), "missing-one"))
    for segment in segments:
        put(tmp_path / LAYOUTS[layout](segment))
    put(tmp_path / "audio" / "not_an_id_at_all.wav")
    put(tmp_path / "audio" / "README.txt")
    counts: Counter[str] = Counter()
    expected = [Clip(s.ytid, s.labels, LAYOUTS[layout](s), 30.0, 40.0, s.ytid) for s in segments]
    expected.append(Clip("missing-one", (SPEECH,), None, 30.0, 40.0, "missing-one"))
    assert list(audioset.clips(tmp_path, "balanced_train", counts)) == sorted(expected, key=lambda clip: clip.clip_id)
    assert counts["audio_files"] == 5
    assert counts["files_of_no_listed_segment"] == 1


def test_a_wav_goes_before_a_flac_before_the_rest_and_duplicates_are_counted(tmp_path, caplog):
    put(tmp_path / "eval_segments.csv", rows("aaaaaaaaaaa", "bbbbbbbbbbb", "ccccccccccc"))
    for name in ("Animal/aaaaaaaaaaa.ogg", "Speech/aaaaaaaaaaa.flac", "Zebra/aaaaaaaaaaa.wav", "a/bbbbbbbbbbb.mp3"):
        put(tmp_path / name)
    put(tmp_path / "b" / "bbbbbbbbbbb_30.000.flac")
    for folder in ("x", "y"):  # one copy per label
        put(tmp_path / folder / "ccccccccccc_30.000-40.000.ogg")
    counts: Counter[str] = Counter()
    found = {clip.clip_id: clip.path for clip in audioset.clips(tmp_path, "eval", counts)}
    assert found == {
        "aaaaaaaaaaa": "Zebra/aaaaaaaaaaa.wav",
        "bbbbbbbbbbb": "b/bbbbbbbbbbb_30.000.flac",
        "ccccccccccc": "x/ccccccccccc_30.000-40.000.ogg",
    }
    assert counts["duplicate_files"] == 4
    assert "4 duplicate files" in caplog.text


def test_two_segments_of_one_recording_are_two_clips_each_with_its_own_file(tmp_path):
    text = HEADER + f"{YTID},30,40,{SPEECH}\n{YTID},70.5,80.5,{DOG}\nabcdefghijk,0,10,{DOG}\n"
    put(tmp_path / "eval_segments.csv", text)
    put(tmp_path / f"{YTID}_70500_80500.wav")
    put(tmp_path / f"{YTID}_30.000.flac")
    put(tmp_path / f"{YTID}.wav")  # the whole recording, or one of the two: not certain
    one, two, other = audioset.clips(tmp_path, "eval")
    assert (one.clip_id, one.path, one.labels) == (f"{YTID}_30000", f"{YTID}_30.000.flac", (SPEECH,))
    assert (two.clip_id, two.path, two.labels) == (f"{YTID}_70500", f"{YTID}_70500_80500.wav", (DOG,))
    assert one.recording == two.recording == YTID
    assert other.clip_id == "abcdefghijk"

    (tmp_path / f"{YTID}_30.000.flac").unlink()
    (tmp_path / f"{YTID}_70500_80500.wav").unlink()
    counts: Counter[str] = Counter()
    assert [clip.path for clip in audioset.clips(tmp_path, "eval", counts)][:2] == [f"{YTID}.wav"] * 2
    assert counts["files_of_several_segments"] == 1


@pytest.mark.parametrize(
    ("name", "recording"),
    [
        ("1-100032-A-0", "100032"),
        ("5-9032-C", "9032"),
        ("6-9032-C", "6-9032-C"),  # no fold of ESC-50
        (YTID, YTID),
        (f"{YTID}_30000", YTID),
        (f"{YTID}_", f"{YTID}_"),
        ("100032", "100032"),
    ],
)
def test_the_recording_is_what_the_name_of_a_clip_states(name, recording):
    assert recording_of(name) == recording
    assert recording_of(recording) == recording


def test_takes_in_a_copy_laid_out_as_audioset_are_of_one_recording(tmp_path):
    takes = ("1-100032-A", "1-100032-B", "1-100033-A")
    (tmp_path / "eval_segments.csv").write_text("".join(f'{take}, 0.000, 5.000, "{SPEECH}"\n' for take in takes))
    assert [clip.recording for clip in audioset.clips(tmp_path, "eval")] == ["100032", "100032", "100033"]


def test_a_name_without_fraction_of_a_second_still_finds_its_segment(tmp_path):
    put(tmp_path / "eval_segments.csv", rows(YTID, start="30.700", end="40.700"))
    put(tmp_path / f"{YTID}_30.wav")
    assert next(audioset.clips(tmp_path, "eval")).path == f"{YTID}_30.wav"


def test_ids_of_another_length_must_be_the_whole_name(tmp_path):
    put(tmp_path / "eval_segments.csv", rows("1-100032-A", "1-1000", "a-very-long-identifier"))
    for name in ("1-100032-A.ogg", "1-100032-A_30.wav", "a-very-long-identifier.ogg", "Y1-1000.wav", "1-1000-40.wav"):
        put(tmp_path / "audio" / name)
    found = {clip.clip_id: clip.path for clip in audioset.clips(tmp_path, "eval")}
    assert found == {
        "1-100032-A": "audio/1-100032-A.ogg",
        "1-1000": None,
        "a-very-long-identifier": "audio/a-very-long-identifier.ogg",
    }


def test_clip_ids_that_would_collide_are_refused(tmp_path):
    text = HEADER + f"{YTID},30,40,{SPEECH}\n{YTID},70,80,{SPEECH}\n{YTID}_30000,0,10,{SPEECH}\n"
    put(tmp_path / "eval_segments.csv", text)
    with pytest.raises(ValueError, match=f"two segments would both be called '{YTID}_30000'"):
        list(audioset.clips(tmp_path, "eval"))


def test_links_are_never_followed_and_odd_files_are_handed_on_unopened(tmp_path):
    outside = put(tmp_path / "outside" / "ccccccccccc.wav").parent
    root = tmp_path / "root"
    put(root / "eval_segments.csv", rows("aaaaaaaaaaa", "bbbbbbbbbbb", "ccccccccccc", "ddddddddddd", "eeeeeeeeeee"))
    (root / "aaaaaaaaaaa.wav").symlink_to("/etc/passwd")
    os.mkfifo(root / "bbbbbbbbbbb.wav")
    (root / "folder").symlink_to(outside)
    (root / "loop").symlink_to(root)
    (root / "ddddddddddd.wav").mkdir()
    (root / "eeeeeeeeeee.wav").symlink_to("/etc/passwd")
    put(root / "eeeeeeeeeee.ogg")  # a regular file goes before one that is none
    put(root / ".cache" / "ccccccccccc.wav")
    counts: Counter[str] = Counter()
    found = {clip.clip_id[0]: clip.path for clip in audioset.clips(root, "eval", counts)}
    assert found == {
        "a": "aaaaaaaaaaa.wav",
        "b": "bbbbbbbbbbb.wav",
        "c": None,
        "d": "ddddddddddd.wav",
        "e": "eeeeeeeeeee.ogg",
    }
    assert counts["links_not_followed"] == 4


def test_names_that_cannot_be_written_down_are_passed_over_and_counted(tmp_path):
    put(tmp_path / "eval_segments.csv", rows("aaaaaaaaaaa", "bbbbbbbbbbb"))
    os.mkdir(os.fsencode(tmp_path) + b"/\xff\xfe")
    put(Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff\xfe/aaaaaaaaaaa.wav")))
    put(tmp_path / "line\nbreak" / "bbbbbbbbbbb.wav")
    counts: Counter[str] = Counter()
    assert [clip.path for clip in audioset.clips(tmp_path, "eval", counts)] == [None, None]
    assert counts["unprintable_names"] == 2


# --------------------------------------------------------------------------------------------------------- the contract


def test_an_unknown_data_set_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"no dataset 'urbansound'; there are \['audioset', 'esc50', 'fsd50k', 'syn"):
        load("urbansound")
    with pytest.raises(ValueError, match="no dataset"):
        load("../stages/scan")
    assert load("audioset") is audioset


@pytest.mark.parametrize("clip_id", ["", "a.b", "a/b", "../a", "a b", "é", "a\n"])
def test_a_clip_id_that_could_not_be_a_key_is_refused(clip_id):
    with pytest.raises(ValueError, match="clip id"):
        Clip(clip_id, (SPEECH,), None, 0.0, 10.0, "x")


# ----------------------------------------------------------------------------------------------------- FSD50K, ESC-50


def fsd50k_copy(root: Path) -> Path:
    dev = f'fname,labels,mids,split\n64760,"Bark,Dog","{DOG},{SPEECH},{HUMAN}",train\n100,Dog,{DOG},val\n'
    dev += f"7,X,{HUMAN},train\n"
    put(root / "FSD50K.ground_truth" / "dev.csv", dev)
    put(root / "FSD50K.ground_truth" / "eval.csv", f"fname,labels,mids\n9,Dog,{DOG}\n10,Dog,{DOG}\n")
    for name in ("dev_audio/64760", "dev_audio/100", "eval_audio/9"):
        put(root / f"FSD50K.{name}.wav")
    return root


def test_fsd50k_gives_its_splits_of_whole_recordings(tmp_path):
    root = fsd50k_copy(tmp_path)
    counts: Counter[str] = Counter()
    bark = Clip("64760", (SPEECH, DOG), "FSD50K.dev_audio/64760.wav", 0.0, math.inf, "64760")
    dog = Clip("100", (DOG,), "FSD50K.dev_audio/100.wav", 0.0, math.inf, "100")
    assert list(fsd50k.clips(root, "dev", counts)) == [dog, bark]
    assert counts == {"labels_outside_the_527": 2, "segments_without_label": 1}
    assert list(fsd50k.clips(root, "train")) == [bark]
    assert list(fsd50k.clips(root, "val")) == [dog]
    assert [(c.clip_id, c.path) for c in fsd50k.clips(root, "eval")] == [
        ("10", None),
        ("9", "FSD50K.eval_audio/9.wav"),
    ]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("100,Dog", "64760,Dog", "dev.csv:3: clip '64760' a second time"),
        (",val", ",test", "dev.csv:3: split 'test' is neither"),
        (",val", "", "dev.csv:3: 3 fields under 4 columns"),
        ("mids", "mid", "dev.csv: no column 'mids'"),
        (f"Dog,{DOG}", "Dog,/m/nonsense", "dev.csv:3: '/m/nonsense' is not a label"),
    ],
)
def test_a_mistake_in_fsd50k_names_its_line(tmp_path, old, new, message):
    path = fsd50k_copy(tmp_path) / "FSD50K.ground_truth" / "dev.csv"
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(ValueError, match=message):
        list(fsd50k.clips(tmp_path, "dev"))


ODD = [
    "dog, barking", 'the "dog"', "100%", "a#1", "-rf", "two  spaces ", "Straßenbahn", "caf\u00e9", "鐘", "it's",
    "a;b", "$HOME", "*", "x" * 200, "a.b", "new\nline", "../100", "",
]  # fmt: skip


@pytest.mark.parametrize("name", ODD)
def test_one_odd_name_is_one_clip_or_one_missing_and_not_the_end_of_the_list(tmp_path, name):
    fsd, esc = fsd50k_copy(tmp_path / "fsd"), esc50_copy(tmp_path / "esc")
    on_disk = unicodedata.normalize("NFD", name)  # as some systems write it
    is_there = name not in ("new\nline", "../100", "")
    for root, audio, table in (
        (fsd, "FSD50K.dev_audio", "FSD50K.ground_truth/dev.csv"),
        (esc, "audio", "meta/esc50.csv"),
    ):
        if is_there:
            put(root / audio / f"{on_disk}.wav")
        rows = list(csv.reader((root / table).read_text().splitlines()))
        rows[1][0] = name if root == fsd else f"{name}.wav"
        with open(root / table, "w", newline="") as file:
            csv.writer(file).writerows(rows)
    for reader, root, subset in ((fsd50k, fsd, "dev"), (esc50, esc, "1")):
        counts = Counter()
        found = list(reader.clips(root, subset, counts))
        assert len(found) == len(list(reader.clips(root, subset)))
        (odd,) = [clip for clip in found if re.search("_[0-9a-f]{8}$", clip.clip_id)] or [
            clip for clip in found if clip.clip_id == name
        ]
        assert counts["names_that_are_no_ids"] == (odd.clip_id != name)
        assert (odd.path is not None) == is_there
        assert odd.path is None or (root / odd.path).is_file()
        assert len(odd.clip_id) <= 200


def test_fsd50k_without_its_folders_or_with_a_link_says_so(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"FSD50K\.dev_audio"):
        list(fsd50k.clips(tmp_path, "dev"))
    (tmp_path / "FSD50K.dev_audio").symlink_to("/")
    with pytest.raises(NotADirectoryError, match="is a link"):
        list(fsd50k.clips(tmp_path, "dev"))
    with pytest.raises(ValueError, match=r"no subset 'test'; there are \['dev', 'eval', 'train', 'val'\]"):
        list(fsd50k.clips(tmp_path, "test"))


ESC10 = {"chainsaw", "clock_tick", "crackling_fire", "crying_baby", "dog"}
ESC10 |= {"helicopter", "rain", "rooster", "sea_waves", "sneezing"}


def esc50_copy(root: Path) -> Path:
    lines = ["filename,fold,target,category,esc10,src_file,take"]
    for i, category in enumerate(sorted(esc50.MIDS)):
        name = f"{i % 5 + 1}-{1000 + i}-A-{i}.wav"
        lines.append(f"{name},{i % 5 + 1},{i},{category},{category in ESC10},{1000 + i},A")
        if i != 5:
            put(root / "audio" / name)
    put(root / "meta" / "esc50.csv", "\r\n".join(lines) + "\r\n")
    return root


def test_esc50_gives_its_folds_in_audiosets_classes(tmp_path):
    root = esc50_copy(tmp_path)
    folds = {fold: list(esc50.clips(root, fold)) for fold in esc50.FOLDS}
    assert sum(map(len, folds.values())) == 50
    assert Clip("1-1005-A-5", ("/m/01yrx",), None, 0.0, 5.0, "1005") in folds["1"]
    assert Clip("4-1018-A-18", ("/m/05tny_",), "audio/4-1018-A-18.wav", 0.0, 5.0, "1018") in folds["4"]


def test_esc10_is_what_of_esc50_says_so(tmp_path):
    root = esc50_copy(tmp_path)
    found = {fold: list(esc50.clips(root, f"esc10-{fold}")) for fold in esc50.FOLDS}
    assert {clip.labels[0] for clips in found.values() for clip in clips} == {esc50.MIDS[name] for name in ESC10}
    assert sum(map(len, found.values())) == 10
    assert all(set(found[fold]) < set(esc50.clips(root, fold)) for fold in esc50.FOLDS)
    path = root / "meta" / "esc50.csv"
    path.write_text(path.read_text().replace(",False,", ",no,"))
    with pytest.raises(ValueError, match=r"esc50.csv:2: esc10 is 'no', neither True nor False"):
        list(esc50.clips(root, "esc10-1"))
    assert list(esc50.clips(root, "1"))


def test_esc50s_categories_are_fifty_different_classes():
    assert len(esc50.MIDS) == len(set(esc50.MIDS.values())) == 50
    assert all(ontology.is_class(mid) for mid in esc50.MIDS.values())


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (",airplane,", ",aeroplane,", "esc50.csv:2: 'aeroplane' is not a category"),
        (".wav,1,0", ".wav,6,0", "esc50.csv:2: fold '6' is not one of"),
        ("1-1005-A-5.wav", "1-1000-A-0.wav", "esc50.csv:7: clip '1-1000-A-0' a second time"),
        ("filename", "file\0name", "esc50.csv"),
    ],
)
def test_a_mistake_in_esc50_names_its_line(tmp_path, old, new, message):
    path = esc50_copy(tmp_path) / "meta" / "esc50.csv"
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(ValueError, match=message):
        list(esc50.clips(tmp_path, "1"))
    with pytest.raises(ValueError, match="ESC-50 has no subset 'eval'"):
        list(esc50.clips(tmp_path, "eval"))


# ------------------------------------------------------------------------------------------------- the synthetic corpus

OPTIONS = synthetic.Options(seed=7, train_clips_per_class=1, eval_clips_per_class=1, defective=True)


def content(root: Path) -> dict[str, str]:
    return {
        path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file() and path.name != synthetic.MARKER  # which says whose it is
    }


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("synthetic")
    synthetic.prepare(root, OPTIONS)
    return root


def test_the_corpus_is_an_audioset_copy_with_a_few_files_missing(corpus):
    for subset, n in (("balanced_train", 24 + 3 + 5), ("eval", 24 + 2 + 2)):
        found = list(audioset.clips(corpus, subset))
        assert found == list(synthetic.clips(corpus, subset))
        assert len(found) == n
        assert sum(clip.path is None for clip in found) == synthetic.MISSING[subset]
        assert {mid for clip in found for mid in clip.labels} == set(synthetic.SOUNDS)
        lines = (corpus / f"{subset}_segments.csv").read_text().splitlines()
        assert [line[0] for line in lines[:4]].count("#") == 3
    assert (corpus / "class_labels_indices.csv").read_bytes() == (
        ontology.ASSETS / "class_labels_indices.csv"
    ).read_bytes()


def test_the_classes_are_of_the_ontology_and_train_shares_nothing_with_eval(corpus):
    assert len(synthetic.SOUNDS) == 24
    assert all(ontology.is_class(mid) for mid in synthetic.SOUNDS)
    train, evaluation = (list(synthetic.clips(corpus, subset)) for subset in synthetic.SUBSETS)
    assert not {c.recording for c in train} & {c.recording for c in evaluation}
    good = [p for p in (corpus / "audio").iterdir() if p.stat().st_size > 2000]
    assert len({hashlib.sha256(p.read_bytes()).digest() for p in good}) == len(good)


def test_the_good_files_hold_what_the_list_says(corpus):
    listed = {e.ytid: e for e in synthetic.entries(OPTIONS) if e.suffix and not e.defect}
    formats, rates, channels = Counter(), Counter(), Counter()
    for entry in listed.values():
        samples, rate = soundfile.read(corpus / "audio" / entry.name, always_2d=True)
        assert len(samples) == round(entry.seconds * rate)
        assert np.isfinite(samples).all()
        assert 10 ** (-50 / 20) < np.sqrt(np.mean(samples**2)) < 0.5
        assert np.max(np.abs(samples)) < 1.2  # Vorbis overshoots
        formats[entry.suffix] += 1
        rates[rate] += 1
        channels[samples.shape[1]] += 1
    assert set(formats) == {"wav", "flac", "ogg"}
    assert set(rates) == {22050, 44100, 48000}
    assert set(channels) == {1, 2}
    seconds = [entry.seconds for entry in listed.values()]
    assert sum(s == 10 for s in seconds) > len(seconds) * 0.7
    assert min(seconds) < 2


def test_every_defect_is_there_as_announced(corpus):
    broken = {(e.subset, e.defect): corpus / "audio" / e.name for e in synthetic.entries(OPTIONS) if e.defect}
    assert set(broken) == {(s, d) for s, defects in synthetic.DEFECTS.items() for d in defects}
    assert broken["balanced_train", "empty"].stat().st_size == 0
    for defect in ("truncated", "not_audio"):
        with pytest.raises(soundfile.LibsndfileError):
            soundfile.read(broken["balanced_train", defect])
    assert not soundfile.read(broken["eval", "silent"])[0].any()
    assert np.isnan(soundfile.read(broken["balanced_train", "non_finite"])[0]).any()
    none = OPTIONS.model_copy(update={"defective": False})
    assert not any(e.defect for e in synthetic.entries(none))


def test_events_lie_in_their_clip_and_are_of_its_labels(corpus):
    listed = {e.ytid: e for e in synthetic.entries(OPTIONS)}
    heard: dict[str, set[str]] = {}
    with open(corpus / "events.csv", newline="") as file:
        for row in csv.DictReader(file):
            entry = listed[row["ytid"]]
            onset, offset = float(row["onset"]), float(row["offset"])
            assert 0 <= onset < offset <= entry.seconds
            assert offset - onset >= min(1.499, entry.seconds)
            heard.setdefault(row["ytid"], set()).add(row["mid"])
    assert heard == {y: set(e.labels) for y, e in listed.items() if e.suffix and not e.defect}
    assert max(len(mids) for mids in heard.values()) <= 3


def test_an_event_is_louder_than_the_clip_around_it():
    checked = 0
    for entry in synthetic.entries(OPTIONS):
        placed = synthetic.events(entry, OPTIONS.seed)
        if entry.seconds == 10 and len(placed) == 1 and checked < 6:
            waveform, rate = synthetic.render(entry, OPTIONS.seed)
            inside = slice(round(placed[0].onset_seconds * rate), round(placed[0].offset_seconds * rate))
            power = (waveform**2).mean(axis=1)
            outside = np.delete(power, np.r_[inside])
            assert 10 * np.log10(power[inside].mean() / outside.mean()) > 20
            checked += 1
    assert checked == 6


def test_events_overlap_sometimes_and_not_mostly():
    options = OPTIONS.model_copy(update={"train_clips_per_class": 10})
    sounding = overlapping = clips = 0
    for entry in synthetic.entries(options):
        active = np.zeros((len(entry.labels), round(1000 * entry.seconds)), dtype=int)  # in ms
        for event in synthetic.events(entry, options.seed):
            at = slice(round(1000 * event.onset_seconds), round(1000 * event.offset_seconds))
            active[entry.labels.index(event.mid), at] += 1
        assert active.max() == 1  # a class never meets itself
        sounding += (active.sum(0) > 0).sum()
        overlapping += (active.sum(0) > 1).sum()
        clips += (active.sum(0) > 1).any()
    assert 0.03 < overlapping / sounding < 0.2
    assert clips > 60


def spectrum(waveform: np.ndarray, bands: int = 24) -> np.ndarray:
    """Mean, spread and change in time of the log power in bands: a crude ear."""
    frames = waveform[: len(waveform) // 512 * 512].reshape(-1, 512) * np.hanning(512)
    power = np.abs(np.fft.rfft(frames))[:, 1:] ** 2
    edges = np.unique(np.geomspace(1, 256, bands + 1).astype(int))
    db = np.log(np.add.reduceat(power, edges[:-1] - 1, axis=1) + 1e-4 * power.mean())
    return np.concatenate([db.mean(0), db.std(0), np.abs(np.diff(db, axis=0)).mean(0)])


def test_the_classes_can_be_told_apart_and_vary_within():
    rate, n_train, n_test = 22050, 20, 5
    features = np.array(
        [
            [spectrum(sound(3 * rate, rate, np.random.default_rng([5, i, k]))) for k in range(n_train + n_test)]
            for i, sound in enumerate(synthetic.SOUNDS.values())
        ]
    )
    assert np.isfinite(features).all()
    features = (features - features.mean((0, 1))) / (features.std((0, 1)) + 1e-6)
    train, test = features[:, :n_train], features[:, n_train:]
    apart = np.linalg.norm(test[:, :, None, None] - train[None, None], axis=-1).min(-1)  # (class, draw, class)
    accuracy = np.mean(apart.argmin(-1) == np.arange(24)[:, None])
    assert accuracy > 0.8, accuracy
    steady = [i for i, s in enumerate(synthetic.SOUNDS) if s in ("/m/0chx_", "/m/0cj0r")]  # noise is always noise
    spread = train.std(1).mean(-1)
    assert np.delete(spread, steady).min() > 0.1, spread


def test_a_second_run_touches_nothing_and_a_lost_or_cut_file_comes_back(corpus, tmp_path):
    root = tmp_path / "copy"
    shutil.copytree(corpus, root)
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    synthetic.prepare(root, OPTIONS)
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*")} == before
    files = sorted((root / "audio").iterdir())
    files[0].unlink()
    files[1].write_bytes(files[1].read_bytes()[:-1] if files[1].stat().st_size else b"x")
    (root / "events.csv").unlink()
    synthetic.prepare(root, OPTIONS)
    assert content(root) == content(corpus)


@pytest.mark.slow
def test_a_run_that_was_killed_is_continued_to_the_same_bytes(corpus, tmp_path):
    root = tmp_path / "killed"
    code = (
        "import sys; from pathlib import Path; from pipeline.datasets import synthetic\n"
        f"synthetic.prepare(Path(sys.argv[1]), synthetic.Options(**{OPTIONS.model_dump()!r}))"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(root)])
    while len(list(root.glob("audio/[!.]*"))) < 8:
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert "sizes" not in json.loads((root / synthetic.MARKER).read_text())
    done = {path: path.stat().st_mtime_ns for path in root.glob("audio/[!.]*")}
    put(root / "audio" / ".left.wav.tmp")
    synthetic.prepare(root, OPTIONS)
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in done.items())
    assert content(root) == content(corpus)


def test_other_options_replace_the_corpus_and_foreign_files_are_left_alone(corpus, tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(synthetic, "_file", lambda entry, seed: made.append(entry) or b"x")
    root = tmp_path / "corpus"
    synthetic.prepare(root, OPTIONS)
    old = set(content(root))
    synthetic.prepare(root, OPTIONS.model_copy(update={"seed": 8}))
    assert not {name for name in old & set(content(root)) if name.startswith("audio/")}
    assert len(made) == 2 * (24 + 24 + 5 + 2)

    recording = put(tmp_path / "mine" / "audio" / "holiday.wav", "mine")
    with pytest.raises(ValueError, match=r"holds files that the synthetic corpus did not make \('audio'\)"):
        synthetic.prepare(tmp_path / "mine", OPTIONS)
    assert recording.read_text() == "mine"
    with pytest.raises(NotADirectoryError):
        synthetic.prepare(recording, OPTIONS)
    put(root / synthetic.MARKER, "not json")
    synthetic.prepare(root, OPTIONS)
    assert set(content(root)) == old


def test_the_serial_number_of_an_ogg_stream_is_fixed_and_its_pages_stay_whole():
    waveform = 0.1 * np.random.default_rng(0).standard_normal((22050, 2))
    one, two = (synthetic.encode(waveform, 22050, "ogg") for _ in range(2))
    assert one == two
    assert len(soundfile.read(io.BytesIO(one))[0]) == 22050


def test_every_suffix_that_the_generator_writes_is_one_that_the_reader_knows():
    assert {f".{e.suffix}" for e in synthetic.entries(OPTIONS) if e.suffix} <= set(AUDIO_SUFFIXES)


@pytest.mark.parametrize("suffix", AUDIO_SUFFIXES)
def test_every_kind_of_audio_is_found_in_a_corpus_and_in_a_folder_of_stems(tmp_path, suffix):
    (tmp_path / f"a{suffix.upper()}").write_bytes(b"")
    assert [path for path, _ in walk(tmp_path, Counter())] == [f"a{suffix.upper()}"]
    assert audio_files([f"a{suffix.upper()}", "b.stem.mp4", "c.txt"], Counter()) == {"a": f"a{suffix.upper()}"}


def test_what_soundfile_writes_is_told_by_its_content():
    kinds = {"WAV": ".wav", "RF64": ".wav", "W64": ".w64", "FLAC": ".flac", "AIFF": ".aiff", "AU": ".au", "CAF": ".caf"}
    for kind, expected in (kinds | {"OGG": ".ogg", "MP3": ".mp3"}).items():
        file = io.BytesIO()
        soundfile.write(file, np.zeros(4800), 48000, format=kind)
        assert audio_suffix(file.getvalue()) == expected


@pytest.mark.parametrize(
    ("content", "suffix"),
    [
        (b"\x00\x00\x00\x1cftypM4A ", ".m4a"),
        (b"\x1aE\xdf\xa3\x01\x00", ".webm"),
        (b"\xff\xf1\x50\x80", ".aac"),
        (b"ID3\x04\x00", ".mp3"),
        (b"\x00\x00\x00\x08wide\x00\x00", ".mov"),
        (b"RIFF\x00\x00\x00\x00AVI ", None),
        (b"\xff\xd8\xff\xe0\x00\x10JFIF", None),
        (b"<html>", None),
        (b"", None),
    ],
)
def test_a_kind_of_audio_is_told_by_how_its_content_begins(content, suffix):
    assert audio_suffix(content) == suffix


def test_the_corpus_of_another_checkout_is_refused_in_one_line_and_left_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(synthetic, "_file", lambda entry, seed: b"x")
    other, mine, root = tmp_path / "other", tmp_path / "mine", tmp_path / "disk" / "corpus"
    monkeypatch.setenv("DVC_ROOT", str(other))
    synthetic.prepare(root, OPTIONS)
    before = content(root)
    monkeypatch.setenv("DVC_ROOT", str(mine))
    synthetic.prepare(root, OPTIONS)  # the same corpus may be read by anybody
    with pytest.raises(ValueError, match=rf"data\.root '{root}' holds what the checkout '{other}' has made") as caught:
        synthetic.prepare(root, OPTIONS.model_copy(update={"seed": 8}))
    assert "give this one another folder, or remove" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert content(root) == before
    shutil.rmtree(root)  # as it says
    synthetic.prepare(root, OPTIONS.model_copy(update={"seed": 8}))


def test_a_checkout_that_is_moved_with_its_corpus_goes_on_owning_it(tmp_path, monkeypatch):
    monkeypatch.setattr(synthetic, "_file", lambda entry, seed: b"x")
    monkeypatch.setenv("DVC_ROOT", str(tmp_path / "old"))
    synthetic.prepare(tmp_path / "old" / "data" / "corpus", OPTIONS)
    shutil.copytree(tmp_path / "old", tmp_path / "new")
    monkeypatch.setenv("DVC_ROOT", str(tmp_path / "new"))
    other = OPTIONS.model_copy(update={"seed": 8})
    synthetic.prepare(tmp_path / "new" / "data" / "corpus", other)
    with pytest.raises(ValueError, match="another folder"):
        synthetic.prepare(tmp_path / "old" / "data" / "corpus", other)
