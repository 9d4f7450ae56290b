"""The on-disk sample: what is written is what webdataset reads, and what is damaged or hostile is refused."""

import hashlib
import io
import json
import os
import pickle
import resource
import subprocess
import sys
import tarfile
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.core.runtime import let_go
from pipeline.mixtures import shards
from pipeline.mixtures.shards import Member, ShardReader, read_shard, verify, write_index, write_shard

SAMPLES = [
    ("-0RWZT-miFs", {"wav": b"RIFF" * 300, "json": b"{}"}),
    ("4vG0ATGz9Qw-137", {"json": b'{"a": 1}', "npy": b"", "wav": bytes(512)}),
    ("k" * 150, {"wav": b"a long name goes into an extended header", "seg.json": b"[]"}),
    ("_" * 97, {"wav": b"a name of 101 characters"}),
]


def damaged(path: Path, start: int, content: bytes) -> Path:
    whole = bytearray(path.read_bytes())
    whole[start : start + len(content)] = content
    path.write_bytes(whole)
    return path


def with_checksum(header: bytearray) -> bytes:
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


def tar_of(path: Path, *entries: tarfile.TarInfo, **options: Any) -> Path:
    with tarfile.open(path, "w", **options) as tar:
        for entry in entries:
            tar.addfile(entry, io.BytesIO(bytes(entry.size)))
    return path


def entry(name: str, size: int = 3, **fields: Any) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.size = size
    for field, value in fields.items():
        setattr(info, field, value)
    return info


# ------------------------------------------------------------------------------------------- write and read


def test_what_is_written_is_read(tmp_path: Path) -> None:
    write_shard(tmp_path / "a-00000.tar", SAMPLES)
    assert list(read_shard(tmp_path / "a-00000.tar")) == [(key, dict(sorted(files.items()))) for key, files in SAMPLES]


def test_offsets_are_those_that_tarfile_finds(tmp_path: Path) -> None:
    members = write_shard(tmp_path / "a.tar", SAMPLES)
    with tarfile.open(tmp_path / "a.tar") as tar:
        theirs = [Member(*info.name.split(".", 1), info.offset_data, info.size) for info in tar]
    assert members == theirs == list(shards.members(tmp_path / "a.tar"))


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # webdataset's
def test_webdataset_reads_the_same_in_sequence_as_we_do_at_random(tmp_path: Path) -> None:
    import webdataset

    members = write_shard(tmp_path / "a-00000.tar", SAMPLES)
    reader = ShardReader(tmp_path)
    at_random = {(m.key, m.ext): reader.read("a-00000.tar", m.offset, m.size) for m in reversed(members)}
    streamed = webdataset.WebDataset(str(tmp_path / "a-00000.tar"), shardshuffle=False)
    theirs = [(s["__key__"], {k: v for k, v in s.items() if not k.startswith("__")}) for s in streamed]
    assert theirs == list(read_shard(tmp_path / "a-00000.tar"))
    assert at_random == {(key, ext): content for key, files in theirs for ext, content in files.items()}


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # webdataset's
def test_shards_of_webdatasets_own_writer_are_read(tmp_path: Path) -> None:
    import webdataset

    with webdataset.TarWriter(str(tmp_path / "a.tar")) as tar:  # with the wall clock as mtime
        tar.write({"__key__": "x" * 120, "wav": b"123"})
    assert list(read_shard(tmp_path / "a.tar")) == [("x" * 120, {"wav": b"123"})]


def test_a_shard_can_be_hashed_while_it_is_written_and_let_go_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_shard(tmp_path / "a.tar", SAMPLES)
    calls = list[int]()
    monkeypatch.setattr(shards, "let_go", lambda descriptor: calls.append(descriptor) or let_go(descriptor))
    monkeypatch.setattr(shards, "_HELD", 600)
    digest = hashlib.sha256()
    write_shard(tmp_path / "b.tar", SAMPLES, digest.update)
    assert (tmp_path / "a.tar").read_bytes() == (tmp_path / "b.tar").read_bytes()
    assert digest.hexdigest() == hashlib.sha256((tmp_path / "a.tar").read_bytes()).hexdigest()
    assert len(calls) > 3


def test_the_same_samples_give_the_same_bytes_whatever_the_order_of_their_members(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.tar", SAMPLES)
    write_shard(tmp_path / "b.tar", [(key, dict(reversed(files.items()))) for key, files in SAMPLES])
    assert (tmp_path / "a.tar").read_bytes() == (tmp_path / "b.tar").read_bytes()


keys = st.text(st.sampled_from("abcXYZ019_-"), min_size=1, max_size=140)
contents = st.dictionaries(st.sampled_from(["wav", "json", "npy", "a.b"]), st.binary(max_size=1500), min_size=1)


@settings(max_examples=40, deadline=None)
@given(samples=st.dictionaries(keys, contents, min_size=1, max_size=5))
def test_any_samples_survive_a_round_trip(tmp_path_factory: pytest.TempPathFactory, samples: dict[str, Any]) -> None:
    directory = tmp_path_factory.mktemp("shards")
    members = write_shard(directory / "a.tar", samples.items())
    assert dict(read_shard(directory / "a.tar")) == samples
    whole = (directory / "a.tar").read_bytes()
    for m in members:
        assert whole[m.offset : m.offset + m.size] == samples[m.key][m.ext]


def test_a_shard_without_samples_is_no_file_and_counted(tmp_path: Path) -> None:
    assert write_shard(tmp_path / "a-00001.tar", []) == []
    write_shard(tmp_path / "a-00000.tar", SAMPLES)
    index = write_index(tmp_path, ["a-00000.tar", "a-00001.tar"])
    assert index["a-00001.tar"] == {"bytes": 0, "count": 0, "sha256": ""}
    assert verify(tmp_path) == index
    assert sorted(os.listdir(tmp_path)) == ["a-00000.tar", "shards.json"]


def test_the_shard_of_a_key_is_its_hash() -> None:
    assert [shards.shard_number(key, 7) for key in ("a", "b", "--PJHxphWEs")] == [
        int(hashlib.sha256(key.encode()).hexdigest(), 16) % 7 for key in ("a", "b", "--PJHxphWEs")
    ]


# --------------------------------------------------------------------------------------------------- refuse


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        ([("Y_30.000_40.000", {"wav": b""})], "is not a key"),  # webdataset would call it Y_30 and merge two clips
        ([("../x", {"wav": b""})], "is not a key"),
        ([("", {"wav": b""})], "is not a key"),
        ([("a\n", {"wav": b""})], "is not a key"),
        ([("a", {"WAV": b""})], "is not an extension"),
        ([("a", {".wav": b""})], "is not an extension"),
        ([("a", {"": b""})], "is not an extension"),
        ([("a", {})], "has no members"),
        ([("a", {"wav": b""}), ("b", {"wav": b""}), ("a", {"json": b""})], "two samples have the key 'a'"),
    ],
)
def test_a_sample_that_would_be_read_differently_is_not_written(
    tmp_path: Path, samples: list[tuple[str, dict[str, bytes]]], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        write_shard(tmp_path / "a.tar", samples)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("name", ["../a.tar", ".a.tar", "a.b.tar", "a.tgz"])
def test_a_shards_name_is_plain(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=r"not a shard's name|No such file"):
        write_shard(Path(f"{tmp_path}/x/{name}".replace("/x/../", "/.x")), SAMPLES)
    with pytest.raises(ValueError, match="not a shard's name"):
        ShardReader(tmp_path).read(name, 0, 1)


@pytest.mark.parametrize(
    "hostile",
    [
        entry("../../etc/cron.wav"),
        entry("/etc/passwd.wav"),
        entry("a/b.wav"),
        entry("a"),
        entry(".wav"),
        entry("a.wav\x7f"),
        entry("ä.wav"),
        entry("a.wav", 0, type=tarfile.SYMTYPE, linkname="/etc/passwd"),
        entry("a.wav", 0, type=tarfile.LNKTYPE, linkname="b.wav"),
        entry("a.wav", 0, type=tarfile.CHRTYPE, devmajor=1, devminor=5),
        entry("a.wav", 0, type=tarfile.FIFOTYPE),
        entry("a", 0, type=tarfile.DIRTYPE),
        entry("a.wav", type=tarfile.CONTTYPE),
        entry("a.wav", pax_headers={"size": "-512"}),
        entry("a.wav", pax_headers={"GNU.sparse.major": "1"}),
        entry("a.wav", pax_headers={"path": "../b.wav"}),
        entry("a.wav", pax_headers={"comment": "x" * 10_000}),
    ],
    ids=lambda info: f"{info.type.decode()}-{info.name}-{'-'.join(info.pax_headers)}",
)
@pytest.mark.parametrize("first", [True, False])
def test_hostile_members_are_refused(tmp_path: Path, hostile: tarfile.TarInfo, first: bool) -> None:
    path = tar_of(tmp_path / "x.tar", *([hostile] if first else [entry("ok.wav"), hostile]))
    with pytest.raises(ValueError, match=r"x\.tar"):
        list(read_shard(path))


@pytest.mark.parametrize(
    "names", [["a.wav", "a.wav"], ["a.wav", "b.wav", "a.json"]], ids=["same file", "sample comes twice"]
)
def test_repeated_keys_are_refused(tmp_path: Path, names: list[str]) -> None:
    path = tar_of(tmp_path / "x.tar", *map(entry, names))
    with pytest.raises(ValueError, match="repeats a sample's key"):
        list(read_shard(path))


@pytest.mark.parametrize(
    "size", [b"-0000000512\0", b"\x80" + b"\xff" * 11, b"\xff" * 12, b"77777777777\0", b"+0000000003\0"]
)
def test_a_size_that_leads_backwards_or_out_is_refused(tmp_path: Path, size: bytes) -> None:
    # Such a header sent tarfile round in circles for ever before Python 3.11.14 (CVE-2025-8194).
    header = bytearray(tar_of(tmp_path / "x.tar", entry("a.wav")).read_bytes()[:512])
    header[124:136] = size
    damaged(tmp_path / "x.tar", 0, with_checksum(header))
    with pytest.raises(ValueError, match=r"damaged header|cut off"):
        list(read_shard(tmp_path / "x.tar"))


@pytest.mark.parametrize("content", [b"", b"\0" * 512, b"<html>" * 1000, b"\x1f\x8b" + bytes(600)])
def test_what_is_not_a_tar_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.tar").write_bytes(content)
    with pytest.raises(ValueError, match=r"x\.tar"):
        list(read_shard(tmp_path / "x.tar"))


def test_a_shard_cut_anywhere_is_noticed(tmp_path: Path) -> None:
    # tarfile and webdataset read a shard that ends between two members without an error, samples missing.
    write_shard(tmp_path / "a.tar", SAMPLES)
    whole = (tmp_path / "a.tar").read_bytes()
    data_end = max(m.offset + m.size for m in shards.members(tmp_path / "a.tar"))
    for length in [*range(0, data_end + 1, 256), data_end + 512]:
        (tmp_path / "a.tar").write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"a\.tar: (cut off|damaged)"):
            list(read_shard(tmp_path / "a.tar"))


def test_a_damaged_header_is_noticed(tmp_path: Path) -> None:
    # tarfile ends there, quietly.
    members = write_shard(tmp_path / "a.tar", SAMPLES)
    damaged(tmp_path / "a.tar", members[2].offset - 512, b"\xff")
    with pytest.raises(ValueError, match=r"a\.tar: damaged header at byte"):
        list(read_shard(tmp_path / "a.tar"))


def test_two_archives_in_one_file_are_refused(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.tar", SAMPLES)
    (tmp_path / "a.tar").write_bytes((tmp_path / "a.tar").read_bytes() * 2)
    with pytest.raises(ValueError, match="data after the end"):
        list(read_shard(tmp_path / "a.tar"))


# -------------------------------------------------------------------------------------------------- faults


def test_an_error_in_the_samples_leaves_no_shard(tmp_path: Path) -> None:
    def samples() -> Any:
        yield SAMPLES[0]
        raise RuntimeError("decoder lost sync")

    with pytest.raises(RuntimeError, match="lost sync"):
        write_shard(tmp_path / "a.tar", samples())
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("limit", [4096, 100_000, 1_000_000])
def test_a_full_disk_leaves_neither_a_shard_nor_a_temporary_file(tmp_path: Path, limit: int) -> None:
    code = f"""
import errno, resource
from pathlib import Path
from pipeline.mixtures.shards import write_shard
resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
try:
    write_shard(Path("a.tar"), ((f"k{{i}}", {{"wav": bytes(10_000)}}) for i in range(100)))
except OSError as error:
    assert error.errno == errno.EFBIG, error
    raise SystemExit(42)
"""
    run = subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=tmp_path, env=_environment(), check=False)
    assert run.returncode == 42
    assert os.listdir(tmp_path) == []


def test_a_full_disk_leaves_the_shard_that_was_there(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.tar", SAMPLES)
    before = (tmp_path / "a.tar").read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (8192, hard))
        with pytest.raises(OSError, match="too large"):
            write_shard(tmp_path / "a.tar", [("a", {"wav": bytes(50_000)})])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (tmp_path / "a.tar").read_bytes() == before
    assert os.listdir(tmp_path) == ["a.tar"]


def _environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}


# ------------------------------------------------------------------------------------------------- verify


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    for i in range(3):
        write_shard(tmp_path / f"a-0000{i}.tar", [(f"k{i}{j}", {"wav": bytes([i, j]) * 500}) for j in range(4)])
    write_index(tmp_path)
    return tmp_path


def test_whole_shards_pass(directory: Path) -> None:
    index = verify(directory)
    assert {name: entry["count"] for name, entry in index.items()} == dict.fromkeys(sorted(index), 4)
    assert json.loads((directory / "shards.json").read_bytes()) == index


def test_a_flipped_byte_names_its_shard(directory: Path) -> None:
    member = list(shards.members(directory / "a-00001.tar"))[2]
    damaged(directory / "a-00001.tar", member.offset + 7, b"\x55")
    with pytest.raises(ValueError, match=r"a-00001\.tar: sha256 is .* truncated or damaged"):
        verify(directory)
    verify(directory, content=False)  # a tar has no checksum of its data


@pytest.mark.parametrize("content", [True, False])
def test_a_truncated_shard_is_named(directory: Path, content: bool) -> None:
    os.truncate(directory / "a-00002.tar", 2048)
    with pytest.raises(ValueError, match=r"a-00002\.tar: bytes is 2048"):
        verify(directory, content)


@pytest.mark.parametrize("content", [True, False])
def test_a_missing_shard_is_named(directory: Path, content: bool) -> None:
    (directory / "a-00000.tar").unlink()
    with pytest.raises(ValueError, match=r"a-00000\.tar: bytes is 0"):
        verify(directory, content)


def test_a_shard_of_another_run_is_named(directory: Path) -> None:
    write_shard(directory / "a-00003.tar", SAMPLES)
    with pytest.raises(ValueError, match=r"a-00003\.tar is not in shards\.json"):
        verify(directory)


@pytest.mark.parametrize(
    "index", [b"", b"[]", b'{"../a.tar": {"bytes": 1, "count": 1, "sha256": ""}}', b'{"a.tar": {}}', b"\xff"]
)
def test_a_damaged_index_is_named(directory: Path, index: bytes) -> None:
    (directory / "shards.json").write_bytes(index)
    with pytest.raises(ValueError, match=r"shards\.json"):
        verify(directory)


# ------------------------------------------------------------------------------------------ random access


def test_at_most_so_many_files_are_open(directory: Path) -> None:
    def n_open() -> int:
        return len([fd for fd in os.listdir("/proc/self/fd") if _target(fd).startswith(str(directory))])

    reader = ShardReader(directory, max_open=2)
    for _ in range(2):
        for i in range(3):
            assert reader.read(f"a-0000{i}.tar", 512, 2) == bytes([i, 0])
            assert n_open() <= 2
    del reader
    assert n_open() == 0


def _target(fd: str) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{fd}")
    except FileNotFoundError:
        return ""


@pytest.mark.parametrize(("offset", "size"), [(0, 10_241), (10_240, 1), (-1, 4), (5, -1), (0, 1 << 50), (1 << 70, 1)])
def test_bytes_that_a_shard_does_not_have_name_it(directory: Path, offset: int, size: int) -> None:
    with pytest.raises(ValueError, match=r"a-00000\.tar has 10240 bytes"):
        ShardReader(directory).read("a-00000.tar", offset, size)


def test_a_reader_travels_to_other_processes(directory: Path) -> None:
    reader = ShardReader(directory)
    expected = reader.read("a-00002.tar", 512, 1000)
    assert pickle.loads(pickle.dumps(reader)).read("a-00002.tar", 512, 1000) == expected
    reader._lock.acquire()  # as if another thread were reading at the time of the fork
    child = os.fork()
    if child == 0:
        os._exit(0 if reader.read("a-00002.tar", 512, 1000) == expected else 1)
    reader._lock.release()
    assert os.waitpid(child, 0)[1] == 0


def test_threads_share_a_reader(directory: Path) -> None:
    reader, wrong = ShardReader(directory, max_open=1), []

    def read() -> None:
        for n in range(300):
            if reader.read(f"a-0000{n % 3}.tar", 512, 2) != bytes([n % 3, 0]):
                wrong.append(n)

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


# ------------------------------------------------------------------------------------------------- content


@pytest.mark.parametrize("encode", [shards.encode_wav, shards.encode_flac])
@pytest.mark.parametrize("n", [1, 1000])
def test_waveforms_are_read_as_soundfile_reads_them(encode: Any, n: int) -> None:
    pcm = np.random.default_rng(0).integers(-32768, 32768, n).astype(np.int16)
    content = encode(pcm, 32000)
    waveform, rate = shards.decode_waveform(content)
    theirs, _ = soundfile.read(io.BytesIO(content), dtype="float32")
    assert rate == 32000
    assert waveform.dtype == np.float32
    np.testing.assert_array_equal(waveform, theirs)
    np.testing.assert_array_equal(waveform * 32768, pcm)


def test_the_fast_path_and_libsndfile_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    content = shards.encode_wav(np.arange(-500, 500, dtype=np.int16), 16000)
    with monkeypatch.context() as patch:
        patch.setattr(soundfile, "SoundFile", None)
        fast, rate = shards.decode_waveform(content)
    slow, slow_rate = shards.decode_waveform(content[:12] + b"JUNK\4\0\0\0abcd" + content[12:])
    np.testing.assert_array_equal(fast, slow)
    assert rate == slow_rate == 16000


@pytest.mark.parametrize("subtype", ["PCM_U8", "PCM_24", "FLOAT", "ULAW"])
def test_other_wavs_go_through_libsndfile(subtype: str) -> None:
    file = io.BytesIO()
    soundfile.write(file, np.linspace(-0.5, 0.5, 100), 32000, format="WAV", subtype=subtype)
    waveform, _ = shards.decode_waveform(file.getvalue())
    np.testing.assert_allclose(waveform, np.linspace(-0.5, 0.5, 100), atol=0.02)


def test_no_samples_are_a_wav_but_not_a_flac() -> None:
    waveform, _ = shards.decode_waveform(shards.encode_wav(np.zeros(0, np.int16), 32000))
    assert waveform.shape == (0,)
    with pytest.raises(ValueError, match="at least one sample"):
        shards.encode_flac(np.zeros(0, np.int16), 32000)


def test_what_is_not_mono_audio_is_refused() -> None:
    stereo = io.BytesIO()
    soundfile.write(stereo, np.zeros((10, 2)), 32000, format="WAV")
    with pytest.raises(ValueError, match="not of 2 channels"):
        shards.decode_waveform(stereo.getvalue())
    for content in (b"", b"RIFF", shards.encode_wav(np.zeros(9, np.int16), 32000)[:40], pickle.dumps([1])):
        with pytest.raises(ValueError, match="not audio"):
            shards.decode_waveform(content)


class Evil:
    def __reduce__(self) -> Any:
        return os.mkdir, ("evil",)


def test_arrays_round_trip_and_pickles_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    array = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)
    np.testing.assert_array_equal(shards.decode_array(shards.encode_array(array)), array)
    evil = io.BytesIO()
    np.save(evil, np.array([Evil()], dtype=object), allow_pickle=True)
    for content in (evil.getvalue(), pickle.dumps(Evil())):
        with pytest.raises(ValueError, match="pickle"):
            shards.decode_array(content)
    assert os.listdir(tmp_path) == []


def test_json_has_one_form() -> None:
    assert shards.encode_json({"b": 1, "a": "ü"}) == '{"a": "ü", "b": 1}'.encode()
    with pytest.raises(ValueError, match="JSON"):
        shards.encode_json(float("nan"))


# --------------------------------------------------------------------------------------------------- clips


@pytest.fixture
def clips(tmp_path: Path) -> Path:
    pcm = {f"clip{i}": np.full(100 + i, i, np.int16) for i in range(4)}
    rows = ["clip_id,split,labels,status,duration_seconds,shard,offset,size"]
    for key, samples in pcm.items():
        (member,) = write_shard(tmp_path / f"clips-{key}.tar", [(key, {"flac": shards.encode_flac(samples, 32000)})])
        rows.append(f"{key},train,/m/1;/m/2,ok,0.1,clips-{key}.tar,{member.offset},{member.size}")
    rows.append("clip9,train,,silent,,,,")
    (tmp_path / "manifest.csv").write_text("\n".join(rows) + "\n")
    return tmp_path


def test_clips_are_read_by_id(clips: Path) -> None:
    reader = pickle.loads(pickle.dumps(shards.ClipReader(clips, 32000)))
    assert list(reader.clips) == [f"clip{i}" for i in range(4)]
    assert reader.clips["clip2"].labels == ("/m/1", "/m/2")
    np.testing.assert_array_equal(reader.waveform("clip3"), np.full(103, 3 / 32768, np.float32))
    with pytest.raises(KeyError):
        reader.waveform("clip9")
    with pytest.raises(ValueError, match="clip1 is at 32000 Hz, not 16000"):
        shards.ClipReader(clips, 16000).waveform("clip1")


def test_a_damaged_row_of_the_manifest_is_named(clips: Path) -> None:
    path = clips / "manifest.csv"
    path.write_text(path.read_text().replace("clip2,train,/m/1;/m/2,ok,0.1", "clip2,train,/m/1;/m/2,ok,long"))
    with pytest.raises(ValueError, match=r"manifest\.csv, line 4: .*'long'"):
        shards.ClipReader(clips, 32000)


def test_importing_shards_parts_and_runtime_loads_neither_torch_nor_dask_nor_pandas() -> None:
    heavy = "{'torch', 'dask', 'pandas'}"
    code = f"import sys, pipeline.core.parts, pipeline.mixtures.shards; print({heavy} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], env=_environment(), capture_output=True, text=True, check=True)
    assert run.stdout == "set()\n"
