"""Music made by rule, with its stems: for a machine that has no corpus, and where the right answer must be known.

    <root>/trackNNN/{vocals,drums,bass,other}.wav     mono, 16 bit, all of one length

Under the names that the corpora use: vocals is a lead melody, sung, blown or plucked; drums are struck; bass walks
under the chords; other holds or breaks them. The stems of a track share tempo, key, chords and bars, as those of a
song do, which makes them correlated; tempo, key, timbres, patterns and levels vary widely from track to track. From
section to section some fall silent (exact zeros), so that one to four are active at a time; every stem sounds
somewhere.

Track i is a function of the options and i alone: its bytes are the same in every run on one machine with the same
libraries, whatever `n_tracks` is.
"""

import hashlib
import io
import logging
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import scipy.fft
import soundfile
from jaxtyping import Bool, Float, Float32, Float64
from pydantic import Field

from pipeline.audio import to_int16
from pipeline.core.config import Params
from pipeline.core.runtime import write_atomic, write_json
from pipeline.datasets._generated import claim, is_there
from pipeline.datasets.music import Track, load

logger = logging.getLogger(__name__)

STEMS = ("vocals", "drums", "bass", "other")
MARKER = ".synthetic_stems.json"
RAMP_SECONDS = 0.01  # of a stem that enters or falls silent

SCALES = ((0, 2, 4, 5, 7, 9, 11), (0, 2, 3, 5, 7, 8, 10), (0, 2, 3, 5, 7, 9, 10), (0, 2, 4, 5, 7, 9, 10))
PROGRESSIONS = ((0, 4, 5, 3), (0, 5, 3, 4), (0, 3, 4, 3), (5, 3, 0, 4), (0, 3, 0, 4), (1, 4, 0, 0), (0, 6, 5, 4))

Waveform = Float64[np.ndarray, " time"]
Rng = np.random.Generator


class Options(Params):
    """Section `music.synthetic_stems:` of params.yaml."""

    seed: int = Field(ge=0, lt=2**31)
    n_tracks: int = Field(ge=1, le=100_000)
    seconds: float = Field(gt=0, le=3600)
    """Of each track."""
    sample_rate: int = Field(ge=8000, le=768_000)


@dataclass(frozen=True)
class Note:
    """A tone of an equal-tempered pitch (69 is 440 Hz) in its place."""

    start: float  # seconds
    seconds: float
    pitch: float


@dataclass(frozen=True)
class Song:
    """Tempo, key and form that the stems of a track share."""

    seconds: float
    beat: float  # seconds
    key: int  # semitones above c
    scale: tuple[int, ...]
    chords: tuple[int, ...]  # degree of the scale, bar after bar, round and round
    active: Bool[np.ndarray, "sections stems"]
    section_bars: int

    @property
    def bar(self) -> float:
        """Seconds of four beats."""
        return 4 * self.beat

    @property
    def n_bars(self) -> int:
        """Bars, the last one cut by the end."""
        return int(np.ceil(self.seconds / self.bar))

    def pitch(self, degree: int, lowest: float) -> float:
        """Pitch of a degree of the scale, counted from the first key note at or above `lowest`."""
        octave, step = divmod(degree, len(self.scale))
        return lowest + (self.key - lowest) % 12 + 12 * octave + self.scale[step]


def song_of(options: Options, i: int) -> Song:
    """Tempo, key, chords and arrangement of track i."""
    rng = np.random.default_rng([options.seed, i, 0])
    beat = 60 / rng.uniform(70, 160)
    key = int(rng.integers(12))
    scale = SCALES[rng.integers(len(SCALES))]
    chords = PROGRESSIONS[rng.integers(len(PROGRESSIONS))]
    section_bars = int(rng.integers(1, 3))
    sections = max(1, int(np.ceil(options.seconds / (4 * beat * section_bars))))
    active = rng.random((sections, len(STEMS))) < 0.65
    for row in active:
        if not row.any():
            row[rng.integers(len(STEMS))] = True
    # The last section may be only a moment long.
    whole = max(1, sections - 1)
    for stem in range(len(STEMS)):
        if not active[:whole, stem].any():
            active[rng.integers(whole), stem] = True
    return Song(options.seconds, beat, key, scale, chords, active, section_bars)


# ------------------------------------------------------------------------------------------------- tones and noises


@dataclass(frozen=True)
class Timbre:
    """How a voice sounds, beside its notes."""

    slope: float  # amplitude of harmonic k is k^-slope, off by a few dB
    attack: float  # seconds
    odd: float = 0.0  # 1: odd harmonics only
    decay: float = 9.0  # seconds to fall to 1/e
    release: float = 0.03  # seconds
    vibrato_hz: float = 5.0
    vibrato_semitones: float = 0.0
    formants: tuple[float, ...] = ()  # Hz
    breath: float = 0.0  # noise beside the tone


def _voice(notes: list[Note], timbre: Timbre, n: int, rate: int, rng: Rng) -> Waveform:
    """One voice through its notes, the pitch held in the rests between: a wavetable, an envelope and formants."""
    frequency = np.full(n, 440.0)
    envelope = np.zeros(n)
    for k, note in enumerate(notes):
        first = int(note.start * rate)
        hertz = 440 * 2 ** ((note.pitch - 69) / 12)
        until = int(notes[k + 1].start * rate) if k + 1 < len(notes) else n
        frequency[first if k else 0 : until] = hertz
        release = max(8, int(timbre.release * rate))
        held = max(release, int(note.seconds * rate))
        t = np.arange(held) / rate
        shape = -np.expm1(-t / timbre.attack) * np.exp(-t / timbre.decay)
        shape[-release:] *= np.linspace(1, 0, release)
        level = 10 ** (rng.normal(0, 2) / 20)
        kept = shape[: max(0, n - first)]
        envelope[first : first + len(kept)] = level * kept
    if timbre.vibrato_semitones:
        swing = np.sin(2 * np.pi * (timbre.vibrato_hz * np.arange(n) / rate + rng.random()))
        frequency *= 2 ** (timbre.vibrato_semitones * swing / 12)
    table = _table(timbre, int(0.45 * rate / frequency.max()), rng)
    phase = rng.random() + np.cumsum(frequency / rate)
    waveform = table[(phase * len(table)).astype(np.int64) & (len(table) - 1)]
    if timbre.breath:
        waveform += timbre.breath * rng.standard_normal(n)
    waveform *= envelope
    return _formants(waveform, rate, timbre.formants) if timbre.formants else waveform


def _table(timbre: Timbre, highest: int, rng: Rng) -> Float64[np.ndarray, " phase"]:
    """A period of the tone, of harmonics up to number `highest`, with an RMS of 1."""
    k = np.arange(1, max(1, min(highest, 200)) + 1)
    amplitudes = k**-timbre.slope * np.exp(0.5 * rng.standard_normal(len(k)))
    amplitudes[1::2] *= 1 - timbre.odd
    spectrum = np.zeros(2049, dtype=np.complex128)
    spectrum[1 : len(k) + 1] = amplitudes * np.exp(2j * np.pi * rng.random(len(k)))
    table = np.fft.irfft(spectrum)
    return np.asarray(table / np.sqrt(np.mean(table**2)))


def _formants(waveform: Waveform, rate: int, centres: tuple[float, ...]) -> Waveform:
    """The waveform through parallel resonances, and a little of it as it is."""
    size = scipy.fft.next_fast_len(len(waveform), real=True)
    f = np.maximum(np.fft.rfftfreq(size, 1 / rate), 1.0)
    gain = 0.1 + sum(1 / np.sqrt(1 + (5 * (f / centre - centre / f)) ** 2) for centre in centres)
    return np.asarray(scipy.fft.irfft(scipy.fft.rfft(waveform, size) * gain, size)[: len(waveform)])


def _band_noise(n: int, rate: int, low: int | float, high: int | float, rng: Rng) -> Waveform:
    """Noise between two frequencies with smooth flanks; its RMS is 1."""
    f = np.maximum(np.fft.rfftfreq(n, 1 / rate), 1.0)
    gain = 1 / np.sqrt((1 + (low / f) ** 6) * (1 + (f / high) ** 6))
    noise = np.fft.irfft(np.fft.rfft(rng.standard_normal(n)) * gain, n)
    return np.asarray(noise / (np.sqrt(np.mean(noise**2)) + 1e-12))


def _log_uniform(rng: Rng, low: int | float, high: int | float) -> float:
    return float(np.exp(rng.uniform(np.log(low), np.log(high))))


# ----------------------------------------------------------------------------------------------------- the four stems


def vocals(song: Song, n: int, rate: int, rng: Rng) -> Waveform:
    """A melody that wanders over the scale in eighths and longer notes, with rests."""
    lowest = rng.uniform(55, 72)
    notes = []
    at, degree = 0.0, int(rng.integers(7))
    while at < song.seconds:
        length = song.beat / 2 * float(rng.choice([1, 1, 1, 2, 2, 3, 4]))
        if rng.random() > 0.12:
            notes.append(Note(at, length * rng.uniform(0.8, 1.0), song.pitch(degree, lowest)))
        degree = int(np.clip(degree + rng.integers(-3, 4), -2, 10))
        at += length
    kind = rng.integers(3)
    if kind == 0:  # sung
        formants = (_log_uniform(rng, 300, 900), _log_uniform(rng, 1000, 2300), _log_uniform(rng, 2400, 3200))
        slope, attack, hertz, swing = rng.uniform((0.7, 0.02, 4, 0.2), (1.3, 0.06, 7, 0.7))
        timbre = Timbre(
            slope,
            attack,
            release=0.05,
            vibrato_hz=hertz,
            vibrato_semitones=swing,
            formants=formants,
            breath=rng.uniform(0, 0.1),
        )
    elif kind == 1:  # blown
        slope, attack, odd, swing, breath = rng.uniform((1.5, 0.01, 0, 0, 0), (3, 0.05, 1, 0.2, 0.15))
        timbre = Timbre(slope, attack, odd=odd, vibrato_semitones=swing, breath=breath)
    else:  # plucked
        slope, odd = rng.uniform((0.8, 0), (2, 0.7))
        timbre = Timbre(slope, 0.002, odd=odd, decay=_log_uniform(rng, 0.1, 0.6), release=0.02)
    return _voice(notes, timbre, n, rate, rng)


def drums(song: Song, n: int, rate: int, rng: Rng) -> Waveform:
    """Kick, snare, hat and tom on a grid of sixteenths that repeats every bar, with small variations."""
    grid = np.arange(16)
    off = grid % 4 != 0
    patterns = (
        np.where(grid % 8 == 0, 0.95, np.where(off, rng.uniform(0, 0.2), rng.uniform(0, 0.9))),
        np.where(grid % 8 == 4, 0.95, np.where(off, rng.uniform(0, 0.12), 0.05)),
        np.where(grid % rng.choice([1, 2, 4]) == 0, 0.9, 0.05),
        np.full(16, rng.uniform(0, 0.08)),
    )
    sounds = (_kick(rate, rng), _snare(rate, rng), _hat(rate, rng), _kick(rate, rng, tom=True))
    levels = 10 ** (np.array([0, -3, -12, -4]) / 20 + rng.normal(0, 0.15, 4))
    waveform = np.zeros(n)
    for bar in range(song.n_bars):
        for sound, pattern, level in zip(sounds, patterns, levels, strict=True):
            hit = rng.random(16) < pattern
            loudness = level * 10 ** (rng.normal(0, 1.5, 16) / 20)
            for step in np.flatnonzero(hit):
                first = int((bar * song.bar + step * song.beat / 4) * rate)
                kept = sound[: max(0, n - first)]
                waveform[first : first + len(kept)] += loudness[step] * kept
    return waveform


def _kick(rate: int, rng: Rng, tom: bool = False) -> Waveform:
    t = np.arange(int(0.5 * rate)) / rate
    low, high = (rng.uniform(80, 220), 1.6) if tom else (rng.uniform(38, 65), rng.uniform(2, 5))
    hertz = low * (1 + (high - 1) * np.exp(-t / rng.uniform(0.01, 0.05)))
    body = np.sin(2 * np.pi * np.cumsum(hertz) / rate) * np.exp(-t / rng.uniform(0.06, 0.15))
    click = rng.uniform(0, 0.3) * rng.standard_normal(len(t)) * np.exp(-t / 0.002)
    return np.asarray((body + click) * np.minimum(1, (t[-1] - t) / 0.05))


def _snare(rate: int, rng: Rng) -> Waveform:
    t = np.arange(int(0.35 * rate)) / rate
    rattle = _band_noise(len(t), rate, rng.uniform(500, 2000), 0.45 * rate, rng) * np.exp(-t / rng.uniform(0.03, 0.1))
    body = np.sin(2 * np.pi * rng.uniform(150, 260) * t) * np.exp(-t / 0.05)
    return np.asarray((0.5 * rattle + rng.uniform(0.2, 0.8) * body) * np.minimum(1, (t[-1] - t) / 0.05))


def _hat(rate: int, rng: Rng) -> Waveform:
    t = np.arange(int(0.25 * rate)) / rate
    hiss = _band_noise(len(t), rate, rng.uniform(0.2, 0.3) * rate, 0.47 * rate, rng)
    return np.asarray(hiss * np.exp(-t / _log_uniform(rng, 0.01, 0.08)) * np.minimum(1, (t[-1] - t) / 0.05))


def bass(song: Song, n: int, rate: int, rng: Rng) -> Waveform:
    """The root of the chord, sometimes its fifth or octave, in a rhythm that repeats every bar."""
    lowest = rng.uniform(26, 33)
    steps = np.flatnonzero((np.arange(8) == 0) | (rng.random(8) < rng.uniform(0.2, 0.9)))
    ends = np.append(steps[1:], 8)
    offsets = rng.choice([0, 0, 0, 4, 7], len(steps))
    offsets[0] = 0
    hold = rng.uniform(0.5, 1)
    notes = [
        Note(
            bar * song.bar + step * song.beat / 2,
            hold * (end - step) * song.beat / 2,
            song.pitch(song.chords[bar % len(song.chords)] + int(offset), lowest),
        )
        for bar in range(song.n_bars)
        for step, end, offset in zip(steps, ends, offsets, strict=True)
    ]
    notes = [note for note in notes if note.start < song.seconds]
    slope, attack, odd = rng.uniform((1, 0.003, 0), (2.2, 0.02, 0.8))
    timbre = Timbre(slope, attack, odd=odd, decay=_log_uniform(rng, 0.2, 4))
    return _voice(notes, timbre, n, rate, rng)


def other(song: Song, n: int, rate: int, rng: Rng) -> Waveform:
    """The chords: held by three or four detuned voices, or broken into eighths or sixteenths by one."""
    lowest = rng.uniform(48, 60)
    tones = (0, 2, 4, 6)[: int(rng.integers(3, 5))]
    roots = [song.chords[bar % len(song.chords)] for bar in range(song.n_bars)]
    waveform = np.zeros(n)
    if rng.random() < 0.5:
        slope, attack, odd = rng.uniform((0.9, 0.05, 0), (2.5, 0.4, 1))
        timbre = Timbre(slope, attack, odd=odd, release=0.1, vibrato_semitones=0.05)
        for tone in tones:
            cents = rng.normal(0, 5)
            notes = [
                Note(bar * song.bar, song.bar, song.pitch(root + tone, lowest) + cents / 100)
                for bar, root in enumerate(roots)
            ]
            waveform += _voice(notes, timbre, n, rate, rng)
        return waveform
    parts = int(rng.choice([8, 16]))
    order = rng.permutation(len(tones))
    slope, odd = rng.uniform((0.8, 0), (2, 0.5))
    timbre = Timbre(slope, 0.002, odd=odd, decay=_log_uniform(rng, 0.08, 0.5), release=0.02)
    step = song.bar / parts
    notes = [
        Note(bar * song.bar + k * step, step, song.pitch(root + tones[order[k % len(tones)]], lowest))
        for bar, root in enumerate(roots)
        for k in range(parts)
        if bar * song.bar + k * step < song.seconds
    ]
    return _voice(notes, timbre, n, rate, rng)


_MAKERS = {"vocals": vocals, "drums": drums, "bass": bass, "other": other}


def render(options: Options, i: int) -> dict[str, Float32[np.ndarray, " time"]]:
    """The stems of track i, peaks under half of full scale."""
    song = song_of(options, i)
    rate, n = options.sample_rate, max(1, round(options.seconds * options.sample_rate))
    rendered = {}
    for k, stem in enumerate(STEMS):
        rng = np.random.default_rng([options.seed, i, 1 + k])
        loudness = 10 ** (rng.uniform(-26, -16) / 20)
        waveform = _MAKERS[stem](song, n, rate, rng) * _gate(song, song.active[:, k], n, rate)
        sounding = waveform[waveform != 0]
        level = float(np.sqrt(np.mean(sounding**2))) if len(sounding) else 1.0
        gain = min(loudness / max(level, 1e-9), 0.5 / max(float(np.abs(waveform).max()), 1e-9))
        rendered[stem] = (gain * waveform).astype(np.float32)
    return rendered


def _gate(song: Song, active: Bool[np.ndarray, " sections"], n: int, rate: int) -> Float[np.ndarray, " time"]:
    """1 in the sections in which the stem is active, 0 in the others, with short ramps inside the active ones."""
    edges = np.round(np.arange(len(active) + 1) * song.section_bars * song.bar * rate).astype(np.int64)
    gate = np.zeros(n)
    ramp = np.linspace(0, 1, max(2, int(RAMP_SECONDS * rate)))
    for k in np.flatnonzero(active):
        section = gate[edges[k] : edges[k + 1]]
        section[:] = 1
        if k and not active[k - 1]:
            section[: len(ramp)] *= ramp[: len(section)]
        if k + 1 < len(active) and not active[k + 1]:
            section[-len(ramp) :] *= ramp[::-1][-len(section) :]
    return gate


# ------------------------------------------------------------------------------------------------------------ on disk


def prepare(root: Path, options: Options) -> None:
    """Bring the tracks of these options about under `root`; nothing happens where they are there already.

    A run that was killed is continued. Tracks of other options, or of other code, are replaced if this checkout made
    them. A folder with anything else in it is left alone: ValueError.
    """
    identity = hashlib.sha256(options.model_dump_json().encode() + Path(__file__).read_bytes()).hexdigest()

    def clear() -> None:
        for old in root.glob("track[0-9]*"):
            shutil.rmtree(old)

    state = claim(root, MARKER, identity, clear, param="music.root", source="synthetic_stems")
    names = [f"track{i:03}" for i in range(options.n_tracks)]
    sizes = state.get("sizes", {})
    todo = [
        i
        for i, name in enumerate(names)
        if not all(is_there(root / name / f"{stem}.wav", sizes.get(f"{name}/{stem}")) for stem in STEMS)
    ]
    if sizes and not todo:
        logger.info("%s: all %d tracks are there", root, len(names))
        return
    logger.info("%s: making %d of %d tracks", root, len(todo), len(names))
    for i in todo:
        for stem, waveform in render(options, i).items():
            # Renamed into place whole: a file of a run that was killed is good if it is there.
            write_atomic(root / names[i] / f"{stem}.wav", _wav(waveform, options.sample_rate))
    sizes = {f"{name}/{stem}": (root / name / f"{stem}.wav").stat().st_size for name in names for stem in STEMS}
    write_json(root / MARKER, state | {"sizes": sizes})


def _wav(waveform: Float32[np.ndarray, " time"], rate: int) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, to_int16(waveform), rate, format="WAV", subtype="PCM_16")
    return file.getvalue()


def tracks(root: Path, counts: Counter[str] | None = None) -> Iterator[Track]:
    """List the generated tracks by the folder reader."""
    found: Iterator[Track] = load("folder").tracks(root, counts)
    return found
