"""Containers that AudioSet is handed around in become files that its reader finds, whole or not at all."""

import io
import json
import subprocess
import sys
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

from pipeline.datasets import _unpack as module
from pipeline.datasets._unpack import unpack
from pipeline.datasets.audioset import clips

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
    with pytest.raises(ValueError, match=r"0\.tar: cut off at byte 8000: .*; until there: 1 written$"):
        unpack([path], tmp_path / "audio")
    assert {file.name for file in (tmp_path / "audio").iterdir()} == {f"{IDS[0]}.flac", "unpacked.json"}
    recorded = json.loads((tmp_path / "audio" / "unpacked.json").read_text())
    assert recorded == {str(path): {"broken_off": 1, "written": 1}}


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


def test_another_sound_under_a_name_that_is_taken_is_kept_beside_it_and_stays_there(tmp_path, caplog):
    shards = [write_tar(tmp_path / f"{n}.tar", [("000000.flac", encoded(seed=n))]) for n in range(3)]
    out = tmp_path / "audio"
    first = unpack(shards, out)
    beside = {"written_beside_another_of_its_name": 1}
    assert list(first.values()) == [{"written": 1}, beside, beside]
    files = {file.name: file.read_bytes() for file in out.glob("*.flac")}
    assert sorted(files.values()) == sorted(encoded(seed=n) for n in range(3))
    assert files["000000.flac"] == encoded(seed=0)
    assert sum("another sound" in message for message in caplog.messages) == 2
    assert all({"already_there": 1} == counts for counts in unpack(shards, out).values())
    assert {file.name: file.read_bytes() for file in out.glob("*.flac")} == files


def test_two_sounds_of_one_name_in_a_container_are_both_kept(tmp_path):
    rows = [(IDS[0], encoded(seed=n), "x.flac") for n in (0, 1, 0)]
    path = write_parquet(tmp_path / "0.parquet", rows)
    counts = {"already_there": 1, "written": 1, "written_beside_another_of_its_name": 1}
    assert unpack([path], tmp_path / "audio") == {str(path): counts}


def test_the_same_samples_by_another_flac_encoder_are_the_same_sound(tmp_path):
    path = write_hdf5(tmp_path / "0.h5", ["Yx.wav"], samples()[None])
    unpack([path], tmp_path / "audio")
    soundfile.write(tmp_path / "audio" / "Yx.flac", samples(), 32000, compression_level=0.0)
    before = (tmp_path / "audio" / "Yx.flac").read_bytes()
    assert unpack([path], tmp_path / "audio") == {str(path): {"already_there": 1}}
    assert (tmp_path / "audio" / "Yx.flac").read_bytes() == before


def test_a_tar_that_is_cut_anywhere_is_noticed_and_counts_what_it_gave(tmp_path):
    whole = write_tar(tmp_path / "whole.tar", [(f"{ytid}.wav", bytes(600)) for ytid in IDS]).read_bytes()
    cut = tmp_path / "cut.tar"
    data_end = 3 * (512 + 1024)
    for length in [*range(0, data_end + 1, 256), data_end + 512]:
        cut.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=rf"cut\.tar: cut off at byte {length}: .*; until there: "):
            unpack([cut], tmp_path / f"audio{length}")
        assert len(list((tmp_path / f"audio{length}").glob("*.wav"))) == length // 1536
    cut.write_bytes(whole[: data_end + 1024])
    assert unpack([cut], tmp_path / "audio") == {str(cut): {"written": 3}}


def test_a_damaged_header_in_a_tar_is_noticed(tmp_path):
    path = write_tar(tmp_path / "0.tar", [(f"{ytid}.flac", bytes(100)) for ytid in IDS])
    content = bytearray(path.read_bytes())
    content[1024 + 5] ^= 0x10
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"0\.tar: damaged header at byte 1024: .*; until there: 1 written$"):
        unpack([path], tmp_path / "audio")


def test_a_second_archive_behind_the_first_is_not_lost_without_a_word(tmp_path):
    path = write_tar(tmp_path / "0.tar", [("a.wav", bytes(100))])
    path.write_bytes(path.read_bytes() * 2)
    with pytest.raises(ValueError, match=r"data after the end of the archive .*until there: 1 written$"):
        unpack([path], tmp_path / "audio")


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names_folders_and_unusual_headers_of_every_format_are_read(tmp_path, format):
    with tarfile.open(tmp_path / "0.tar", "w", format=format) as tar:
        folder = tarfile.TarInfo("a")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        for name in (f"{'d' * 90}/{'e' * 90}.wav", f"{'ä' * 30}/b.wav", "c.wav"):
            member = tarfile.TarInfo(name)
            member.size = 3
            member.mtime = 1.5 if format == tarfile.PAX_FORMAT else 1
            tar.addfile(member, io.BytesIO(name[-5:-4].encode() * 3))
    counts = {"not_a_regular_file": 1, "written": 3}
    assert unpack([tmp_path / "0.tar"], tmp_path / "audio") == {str(tmp_path / "0.tar"): counts}
    found = {path.name: path.read_bytes() for path in (tmp_path / "audio").glob("*.wav")}
    assert found == {f"{'e' * 90}.wav": b"eee", "b.wav": b"bbb", "c.wav": b"ccc"}


@pytest.mark.parametrize("kind", [tarfile.REGTYPE, tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME])
@pytest.mark.parametrize("size", [b"\xff" * 12, b"\xff" * 10 + b"\xfe\x00"])
def test_a_size_that_leads_backwards_is_refused(tmp_path, kind, size):
    member = tarfile.TarInfo("a.wav")
    member.type = kind
    header = bytearray(member.tobuf())
    header[124:136] = size
    header[148:156] = b"%06o\0 " % (sum(header[:148]) + 256 + sum(header[156:]))
    (tmp_path / "0.tar").write_bytes(header + bytes(10240))
    with pytest.raises(ValueError, match=r"0\.tar: 'a\.wav' has -\d+ bytes"):
        unpack([tmp_path / "0.tar"], tmp_path / "audio")


@pytest.mark.parametrize("headers", [{"size": "-512"}, {"GNU.sparse.major": "1", "GNU.sparse.realsize": "3000000000"}])
def test_an_extended_header_that_gives_another_size_is_refused(tmp_path, headers):
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        member = tarfile.TarInfo("a.wav")
        member.pax_headers = headers
        tar.addfile(member)
    with pytest.raises(ValueError, match=r"0\.tar: an extended header gives"):
        unpack([tmp_path / "0.tar"], tmp_path / "audio")


def external_storage(file, target):
    file.create_dataset("waveform", (1, 50), np.int16, external=[(str(target), 0, 100)])


def external_link(file, target):
    file["waveform"] = h5py.ExternalLink(str(target), "waveform")


def soft_link(file, target):
    file["elsewhere"] = h5py.ExternalLink(str(target), "waveform")
    file["waveform"] = h5py.SoftLink("/elsewhere")


def virtual(file, target):
    layout = h5py.VirtualLayout((1, 50), np.int16)
    layout[:] = h5py.VirtualSource(str(target), "waveform", (1, 50))
    file.create_virtual_dataset("waveform", layout)


@pytest.mark.parametrize("way", [external_storage, external_link, soft_link, virtual])
def test_hdf5_whose_content_is_in_another_file_is_refused(tmp_path, way):
    secret = write_hdf5(tmp_path / "secret", ["Yx.wav"], samples()[None, :50])
    with h5py.File(tmp_path / "0.h5", "w") as file:
        file["audio_name"] = np.array(["Yx.wav"], "S20")
        way(file, secret)
    with pytest.raises(ValueError, match=r"0\.h5: waveform (is a link|lies in other files).*until there: nothing$"):
        unpack([tmp_path / "0.h5"], tmp_path / "audio")
    assert [file.name for file in (tmp_path / "audio").iterdir()] == ["unpacked.json"]


def test_a_recording_over_the_bound_is_passed_over_in_a_tar_and_in_parquet(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "MAX_BYTES", 10_000)
    large, small = bytes(10_001), bytes(10_000)
    tar = write_tar(tmp_path / "0.tar", [("a.wav", large), ("b.wav", small)])
    parquet = write_parquet(
        tmp_path / "0.parquet", [("c", large, "x.wav"), ("d", small, "x.wav"), ("e", b"x", "x.wav")]
    )
    counts = unpack([tar, parquet], tmp_path / "audio")
    assert list(counts.values()) == [{"too_large": 1, "written": 1}, {"too_large": 1, "written": 2}]
    assert {file.name for file in (tmp_path / "audio").glob("*.wav")} == {"b.wav", "d.wav", "e.wav"}


def test_little_parquet_does_not_become_gigabytes(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "MAX_BYTES", 100_000)
    one = write_parquet(tmp_path / "one.parquet", [("a", bytes(3_000_000), "x.wav")])
    assert one.stat().st_size < 200_000
    with pytest.raises(ValueError, match=r"one\.parquet: 3\d+ bytes of audio in 1 rows; until there: nothing"):
        unpack([one], tmp_path / "audio")
    many = write_parquet(tmp_path / "many.parquet", [(f"n{k}", bytes(90_000), "x.wav") for k in range(200)])
    given = module.MAX_BYTES + 100 * many.stat().st_size
    assert given < 200 * 90_000
    with pytest.raises(
        ValueError, match=r"many\.parquet: its recordings are more than 100 times its size; until there"
    ):
        unpack([many], tmp_path / "audio")
    assert sum(file.stat().st_size for file in (tmp_path / "audio").glob("*.wav")) <= given


@pytest.mark.parametrize(("shape", "chunks"), [((1, 1_500_000_000), (1, 1000)), ((10**9, 100), (10**7, 100))])
def test_little_hdf5_does_not_become_gigabytes(tmp_path, shape, chunks):
    with h5py.File(tmp_path / "0.h5", "w") as file:
        file.create_dataset("audio_name", shape[:1], "S20", chunks=(1,))
        file.create_dataset("waveform", shape, np.int16, chunks=chunks, compression="gzip")
    assert (tmp_path / "0.h5").stat().st_size < 10_000
    with pytest.raises(ValueError, match=r"0\.h5: waveform is read in pieces of \d+ bytes"):
        unpack([tmp_path / "0.h5"], tmp_path / "audio")


@pytest.mark.parametrize("content", [3_000_000_000, "text", 0.5, [1, 2]])
def test_what_is_not_bytes_in_parquet_is_refused(tmp_path, content):
    table = pa.table({"video_id": ["a"], "audio": [{"bytes": content, "path": "x.wav"}]})
    pyarrow.parquet.write_table(table, tmp_path / "0.parquet")
    with pytest.raises(ValueError, match=r"0\.parquet: column audio\.bytes should be bytes; it is "):
        unpack([tmp_path / "0.parquet"], tmp_path / "audio")


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"video_id": [1], "audio": [{"bytes": b"x", "path": "x.wav"}]}, "column video_id should be text; it is int64"),
        ({"video_id": ["a"], "audio": [b"x"]}, "no column audio.bytes"),
        ({"video_id": ["a"], "audio": [{"bytes": b"x", "path": 1}]}, "column audio.path should be text; it is int64"),
    ],
)
def test_columns_of_another_kind_are_named(tmp_path, columns, message):
    pyarrow.parquet.write_table(pa.table(columns), tmp_path / "0.parquet")
    with pytest.raises(ValueError, match=rf"0\.parquet: {message}"):
        unpack([tmp_path / "0.parquet"], tmp_path / "audio")


@pytest.mark.parametrize("rate", [0, -1, 10**9, "fast", [1, 2], np.nan])
def test_a_rate_that_is_none_is_named(tmp_path, rate):
    path = write_hdf5(tmp_path / "0.h5", ["Yx.wav"], samples()[None], sample_rate=rate)
    with pytest.raises(ValueError, match=r"0\.h5: sample_rate should be 4000 to 384000 Hz; it is "):
        unpack([path], tmp_path / "audio")


def test_names_that_are_numbers_groups_and_missing_datasets_are_one_line_each(tmp_path):
    for name, content in (("number", np.zeros(1)), ("scalar", np.bytes_("x")), ("group", None), ("missing", False)):
        with h5py.File(tmp_path / f"{name}.h5", "w") as file:
            file["waveform"] = samples()[None]
            if content is None:
                file.create_group("audio_name")
            elif content is not False:
                file["audio_name"] = content
        with pytest.raises(ValueError, match=rf"{name}\.h5: [^\n]+; until there: nothing$"):
            unpack([tmp_path / f"{name}.h5"], tmp_path / "audio")


def test_damaged_content_of_hdf5_and_parquet_is_one_line_and_a_count(tmp_path):
    with h5py.File(tmp_path / "0.h5", "w") as file:
        file["audio_name"] = np.array(["a.wav", "b.wav"], "S20")
        data = file.create_dataset("waveform", (2, 3200), np.int16, chunks=(1, 3200), compression="gzip")
        data[0], data[1] = samples(), samples(1)
        second = data.id.get_chunk_info(1).byte_offset
    parquet = write_parquet(tmp_path / "0.parquet", [(IDS[0], encoded(), "x.flac")])
    for path, at in ((tmp_path / "0.h5", second), (parquet, 10)):
        content = bytearray(path.read_bytes())
        content[at : at + 40] = b"\xff" * 40
        path.write_bytes(content)
    with pytest.raises(ValueError, match=r"0\.h5: [^\n]+; until there: 1 written$"):
        unpack([tmp_path / "0.h5"], tmp_path / "audio")
    with pytest.raises(ValueError, match=r"0\.parquet: [^\n]+; until there: nothing$"):
        unpack([parquet], tmp_path / "audio")


def test_a_name_that_no_disk_takes_is_counted(tmp_path):
    path = write_parquet(tmp_path / "0.parquet", [("x" * 300, encoded(), "x.flac")])
    assert unpack([path], tmp_path / "audio") == {str(path): {"unusable_name": 1}}


def test_a_fault_in_writing_is_not_the_containers(tmp_path):
    path = write_tar(tmp_path / "0.tar", [("a.wav", b"x")])
    (tmp_path / "audio").write_text("a file where the folder should be")
    with pytest.raises(OSError, match="audio"):
        unpack([path], tmp_path / "audio")


def test_the_command_says_a_fault_in_one_line(tmp_path):
    path = write_tar(tmp_path / "0.tar", [("a.wav", b"x"), ("b.wav", b"y")])
    path.write_bytes(path.read_bytes()[:1024])
    command = [sys.executable, "-m", "pipeline.datasets._unpack", "--out", str(tmp_path / "audio"), str(path)]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == (
        f"error: {path}: cut off at byte 1024: no end of archive; until there: 1 written"
    )
    assert "Traceback" not in done.stderr
