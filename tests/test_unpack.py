"""Containers that AudioSet is handed around in become files that its reader finds, whole or not at all."""

import io
import json
import tarfile
from collections import Counter
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet
import pytest
import soundfile

from pipeline import unpack as module
from pipeline.datasets.audioset import clips
from pipeline.unpack import unpack

IDS = ("--PJHxphWEs", "Y_abcdefghi", "0123456789-")
SEGMENTS = "# a\n# b\n# YTID, start_seconds, end_seconds, positive_labels\n" + "".join(
    f'{ytid}, 30.000, 40.000, "/m/09x0r,/t/dd00088"\n' for ytid in IDS
)


def samples(seed=0):
    return np.random.default_rng(seed).integers(-(2**15), 2**15, 3200, dtype=np.int16)


def encoded(kind="FLAC", seed=0):
    file = io.BytesIO()
    soundfile.write(file, samples(seed), 16000, format=kind)
    return file.getvalue()


def write_parquet(path, rows):
    audio = pa.array(
        [None if content is None else {"bytes": content, "path": name} for _, content, name in rows],
        pa.struct([("bytes", pa.binary()), ("path", pa.string())]),
    )
    ids = pa.array([ytid for ytid, *_ in rows], pa.string())
    pyarrow.parquet.write_table(pa.table({"video_id": ids, "audio": audio, "labels": [["/m/09x0r"]] * len(rows)}), path)
    return path


def write_tar(path, members):
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            if content is None:
                member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
                tar.addfile(member)
            else:
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return path


def write_hdf5(path, names, waveforms, **attributes):
    with h5py.File(path, "w") as file:
        file["audio_name"] = np.array(names, "S20")
        file["waveform"] = waveforms
        file.attrs.update(attributes)
    return path


def found_by_the_reader(root: Path):
    (root / "balanced_train_segments.csv").write_text(SEGMENTS)
    return {clip.clip_id: clip.path for clip in clips(root, "balanced_train", Counter())}


def test_the_rows_of_hugging_faces_parquet_are_found_as_files(tmp_path):
    out, flac, wav = tmp_path / "root" / "audio", encoded(), encoded("WAV")
    rows = [(IDS[0], flac, "audio/bal_train/x.flac"), (IDS[1], wav, None), (IDS[2], None, None)]
    path = write_parquet(tmp_path / "00.parquet", rows)
    summary = unpack([path], out)
    assert summary == {str(path): {"without_audio": 1, "written": 2}}
    assert json.loads((out / "unpacked.json").read_text()) == summary
    assert (out / f"{IDS[0]}.flac").read_bytes() == flac
    assert found_by_the_reader(tmp_path / "root") == {
        IDS[0]: f"audio/{IDS[0]}.flac",
        IDS[1]: f"audio/{IDS[1]}.wav",
        IDS[2]: None,
    }


def test_the_samples_of_webdataset_shards_are_found_as_files(tmp_path):
    out, flac = tmp_path / "root" / "audio", encoded()
    members = [(f"20k/{IDS[0]}.flac", flac), (f"20k/{IDS[0]}.json", b"{}"), (f"{IDS[2]}.flac", flac)]
    path = write_tar(tmp_path / "000.tar", members)
    assert unpack([path], out) == {str(path): {"not_audio": 1, "written": 2}}
    found = found_by_the_reader(tmp_path / "root")
    assert found == {IDS[0]: f"audio/{IDS[0]}.flac", IDS[1]: None, IDS[2]: f"audio/{IDS[2]}.flac"}


@pytest.mark.parametrize("attributes", [{}, {"sample_rate": 16000}])
def test_the_waveforms_of_panns_come_out_sample_for_sample(tmp_path, attributes):
    out, waveforms = tmp_path / "root" / "audio", np.stack([samples(), 0 * samples(), samples(1)])
    names = [f"Y{IDS[0]}.wav", "", f"Y{IDS[1]}.wav"]
    path = write_hdf5(tmp_path / "balanced_train.h5", names, waveforms, **attributes)
    assert unpack([path], out) == {str(path): {"without_audio": 1, "written": 2}}
    assert set(found_by_the_reader(tmp_path / "root").values()) == {
        f"audio/Y{IDS[0]}.flac",
        f"audio/Y{IDS[1]}.flac",
        None,
    }
    for ytid, expected in ((IDS[0], waveforms[0]), (IDS[1], waveforms[2])):
        read, rate = soundfile.read(out / f"Y{ytid}.flac", dtype="int16")
        assert rate == attributes.get("sample_rate", 32000)
        np.testing.assert_array_equal(read, expected)


def test_what_is_there_is_not_written_again_and_a_killed_run_goes_on(tmp_path, monkeypatch):
    out = tmp_path / "audio"
    path = write_tar(tmp_path / "000.tar", [(f"{ytid}.flac", encoded(seed=n)) for n, ytid in enumerate(IDS)])
    write, calls = module.write_atomic, []

    def dies(target, content):
        calls.append(target.name)
        if len(calls) == 2:
            raise KeyboardInterrupt
        write(target, content)

    monkeypatch.setattr(module, "write_atomic", dies)
    with pytest.raises(KeyboardInterrupt):
        unpack([path], out)
    assert [file.name for file in out.iterdir()] == [f"{IDS[0]}.flac"]
    monkeypatch.undo()
    assert unpack([path], out) == {str(path): {"already_there": 1, "written": 2}}
    assert [(out / f"{ytid}.flac").read_bytes() for ytid in IDS] == [encoded(seed=n) for n in range(3)]


def test_names_that_lead_elsewhere_and_links_are_not_followed(tmp_path):
    out = tmp_path / "deep" / "audio"
    tar = write_tar(
        tmp_path / "000.tar",
        [("../../evil.flac", encoded()), ("/etc/cron.d/evil2.flac", encoded()), (".hidden.flac", encoded()),
         ("link.flac", None)],
    )  # fmt: skip
    parquet = write_parquet(tmp_path / "0.parquet", [("../up", encoded(), "x.flac"), ("a/b", encoded(), "x.flac")])
    hdf5 = write_hdf5(tmp_path / "0.h5", [b"../../up2.wav", b"\xff.wav"], np.stack([samples(), samples()]))
    summary = unpack([tar, parquet, hdf5], out)
    assert summary[str(tar)] == {"not_a_regular_file": 1, "unusable_name": 1, "written": 2}
    assert summary[str(parquet)] == {"unusable_name": 2}
    assert summary[str(hdf5)] == {"unusable_name": 1, "written": 1}
    everything = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    assert everything == {
        *("000.tar", "0.parquet", "0.h5"),
        *(f"deep/audio/{name}" for name in ("evil.flac", "evil2.flac", "up2.flac", "unpacked.json")),
    }


def test_rows_of_no_known_kind_are_counted(tmp_path):
    path = write_parquet(tmp_path / "0.parquet", [(IDS[0], b"<html>", None), (None, encoded(), "x.flac")])
    assert unpack([path], tmp_path / "audio") == {str(path): {"of_unknown_kind": 1, "without_audio": 1}}


@pytest.mark.parametrize("name", ["a.parquet", "a.tar", "a.h5"])
@pytest.mark.parametrize("content", [b"", b"not what its name says" * 100])
def test_a_container_that_is_none_is_named(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name}: "):
        unpack([tmp_path / name], tmp_path / "audio")


def test_a_tar_that_is_cut_off_is_named_and_what_came_before_stays(tmp_path):
    path = write_tar(tmp_path / "0.tar", [(f"{ytid}.flac", encoded()) for ytid in IDS])
    path.write_bytes(path.read_bytes()[:8000])
    with pytest.raises(ValueError, match=r"0\.tar: .*after 1 rows"):
        unpack([path], tmp_path / "audio")
    assert [file.name for file in (tmp_path / "audio").iterdir()] == [f"{IDS[0]}.flac"]


def test_waveforms_that_are_not_16_bit_integers_are_refused(tmp_path):
    path = write_hdf5(tmp_path / "0.h5", ["Yx.wav"], np.zeros((1, 100), np.float32))
    with pytest.raises(ValueError, match=r"0\.h5: waveform should be int16 .* it is float32 \(1, 100\)"):
        unpack([path], tmp_path / "audio")


def test_another_kind_of_container_and_one_that_is_not_there_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"a\.zip: not a container of this kind"):
        unpack([tmp_path / "a.zip"], tmp_path / "audio")
    with pytest.raises(ValueError, match=r"gone\.parquet: .*[Nn]o such file"):
        unpack([tmp_path / "gone.parquet"], tmp_path / "audio")


def test_a_table_of_something_else_is_named(tmp_path):
    pd.DataFrame({"x": [1]}).to_parquet(tmp_path / "other.parquet")
    with pytest.raises(ValueError, match=r"other\.parquet: "):
        unpack([tmp_path / "other.parquet"], tmp_path / "audio")
