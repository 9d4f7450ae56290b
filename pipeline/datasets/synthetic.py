"""A weakly labelled corpus made by rule, laid out on disk as an AudioSet copy: for a machine that has no AudioSet.

    <root>/{balanced_train,eval}_segments.csv   three header lines, `<ytid>, <start>, <end>, "<mids>"`
    <root>/class_labels_indices.csv
    <root>/audio/<ytid>.{wav,flac,ogg}          22.05, 44.1, 48 kHz; mono, stereo; most 10 s, some shorter
    <root>/events.csv                           what sounds when: for tests. The pipeline never reads it

Every clip has one to three of 24 classes of sounds that synthesis does justice to, at unknown times over a quiet
noise. Pitch, rate, timbre, envelope, level and onset vary widely, and train and eval never share a draw. Some listed
clips have no file, and a handful have a broken one, as in any real copy.

Clip i of a split is a function of (seed, split, i) alone, file and all: its bytes are the same in every run on one
machine with the same libraries.
"""

import base64
import csv
import hashlib
import io
import logging
import struct
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import scipy.fft
import scipy.signal
import soundfile
from jaxtyping import Float, Float64
from pydantic import Field

from pipeline.core import ontology
from pipeline.core.config import Params
from pipeline.core.runtime import cpu_count, remove, write_atomic, write_json
from pipeline.datasets import Clip, load
from pipeline.datasets._generated import claim, is_there

logger = logging.getLogger(__name__)

CLIP_SECONDS = 10.0
SUBSETS = ("balanced_train", "eval")
MARKER = ".synthetic.json"
DEFECTS = {
    "balanced_train": ("empty", "truncated", "not_audio", "silent", "non_finite"),
    "eval": ("truncated", "silent"),
}
MISSING = {"balanced_train": 3, "eval": 2}

Number = int | float
Waveform = Float64[np.ndarray, " time"]
Kernel = Float64[np.ndarray, "..."]  # short, of any length
Starts = Float64[np.ndarray, " strokes"]  # seconds
Rng = np.random.Generator


class Options(Params):
    """Section `synthetic:` of params.yaml."""

    seed: int = Field(ge=0, lt=2**31)
    train_clips_per_class: int = Field(ge=1, le=100_000)
    """Clips made for each of the classes; a clip has other classes too, so that a class has about twice as many."""
    eval_clips_per_class: int = Field(ge=1, le=100_000)
    defective: bool
    """Also a handful of clips whose files are broken."""


# ------------------------------------------------------------------------------------------------- building blocks


def _log_uniform(rng: Rng, low: Number, high: Number) -> float:
    return float(np.exp(rng.uniform(np.log(low), np.log(high))))


def _phase(frequency: Number | Waveform, n: int, rate: int, rng: Rng) -> Waveform:
    """Phase in cycles of an oscillator of this frequency in Hz, from a random start."""
    steps = np.broadcast_to(np.asarray(frequency, dtype=np.float64) / rate, (n,))
    return np.asarray(rng.random() + np.cumsum(steps))


def _sine(frequency: Number | Waveform, n: int, rate: int, rng: Rng) -> Waveform:
    return np.asarray(np.sin(2 * np.pi * _phase(frequency, n, rate, rng)))


def _harmonic(
    frequency: Number | Waveform, amplitudes: Float[np.ndarray, " harmonics"], n: int, rate: int, rng: Rng
) -> Waveform:
    """A periodic tone; amplitudes of its harmonics 1, 2, ... Those above the Nyquist frequency are left out.

    Read from a table of one period: a sine for each harmonic would cost 2 ms each.
    """
    highest = int(0.45 * rate / float(np.max(frequency)))
    spectrum = np.zeros(4097, dtype=np.complex128)
    kept = amplitudes[: max(1, min(highest, 1024))]
    spectrum[1 : len(kept) + 1] = kept * np.exp(2j * np.pi * rng.random(len(kept)))
    table = np.fft.irfft(spectrum, norm="forward")
    return np.asarray(table[(_phase(frequency, n, rate, rng) * len(table)).astype(np.int64) % len(table)])


def _rolloff(n_harmonics: int, slope: Number, rng: Rng, odd: Number = 0.0) -> Waveform:
    """Amplitudes k^-slope, each off by a random 6 dB or so; `odd` = 1 leaves the odd harmonics only."""
    k = np.arange(1, n_harmonics + 1)
    amplitudes = k**-slope * np.exp(0.5 * rng.standard_normal(n_harmonics))
    amplitudes[1::2] *= 1 - odd
    return np.asarray(amplitudes)


def _noise(n: int, rate: int, rng: Rng, gain: Callable[[Waveform], Waveform]) -> Waveform:
    """Gaussian noise with the magnitude spectrum gain(frequencies in Hz); its RMS is 1."""
    size = scipy.fft.next_fast_len(n, real=True)
    spectrum = scipy.fft.rfft(rng.standard_normal(size))
    spectrum *= gain(np.fft.rfftfreq(size, 1 / rate))
    waveform = scipy.fft.irfft(spectrum, size)[:n]
    return np.asarray(waveform / (np.sqrt(np.mean(waveform**2)) + 1e-12))


def _band(low: Number, high: Number, slope: Number = 4.0) -> Callable[[Waveform], Waveform]:
    """Gain of a band pass in Hz with smooth flanks."""

    def gain(f: Waveform) -> Waveform:
        f = np.maximum(f, 1e-3)
        return np.asarray(1 / np.sqrt((1 + (low / f) ** (2 * slope)) * (1 + (f / high) ** (2 * slope))))

    return gain


def _tilt(exponent: Number) -> Callable[[Waveform], Waveform]:
    """Gain of a power spectrum f^exponent above 20 Hz."""
    return lambda f: np.asarray(np.where(f < 20, 0, np.maximum(f, 20) ** (exponent / 2)))


def _wander(n: int, rate: int, rng: Rng, hz: Number) -> Waveform:
    """A smooth random curve of variance near 1 that turns about `hz` times a second."""
    knots = max(4, int(n / rate * hz * 2) + 2)
    at = np.linspace(0, knots - 1, n)
    values = rng.standard_normal(knots)
    left = np.minimum(at.astype(np.int64), knots - 2)
    x = at - left
    ease = x * x * (3 - 2 * x)
    return np.asarray(values[left] * (1 - ease) + values[left + 1] * ease)


def _decay(seconds: Number, rate: int, attack_seconds: Number = 0.0005) -> Kernel:
    """An envelope that falls by 60 dB in `seconds`, after a short attack."""
    n = max(8, int(seconds * rate))
    t = np.arange(n) / rate
    return np.asarray(np.exp(-6.9 * t / seconds) * np.minimum(1, t / attack_seconds))


def _strike(starts: Starts, kernels: list[Kernel], n: int, rate: int, rng: Rng, spread_db: Number = 3.0) -> Waveform:
    """Kernels in turn, one at each start in seconds, each a little louder or softer; cut at the end."""
    waveform = np.zeros(n)
    for i, start in enumerate(starts):
        at = int(start * rate)
        kernel = kernels[i % len(kernels)][: max(0, n - at)]
        waveform[at : at + len(kernel)] += kernel * 10 ** (rng.normal(0, spread_db / 3) / 20)
    return waveform


def _regular(seconds: Number, period: Number, jitter: Number, rng: Rng) -> Starts:
    """Times of a beat of this period, each off by `jitter` of it; the first within one period, at least one."""
    starts = np.arange(rng.random() * min(period, 0.3), seconds, period)
    return np.asarray(np.sort(np.maximum(0, starts + jitter * period * rng.standard_normal(len(starts)))))


def _gate(n: int, rate: int, on: Number, off: Number, ramp: Number, start: Number = 0.0) -> Waveform:
    """1 for `on` seconds, 0 for `off`, and again, with flanks of `ramp` seconds; it begins `start` into the cycle."""
    t = (np.arange(n) / rate + start) % (on + off)
    return np.asarray(np.clip(np.minimum(t, on - t) / ramp, 0, 1))


def _resonances(waveform: Waveform, rate: int, centres: list[float], quality: Number) -> Waveform:
    """The waveform through parallel resonators at these centres in Hz, and a little of it as it is."""
    f = np.fft.rfftfreq(size := scipy.fft.next_fast_len(len(waveform), real=True), 1 / rate)
    gain = np.full(len(f), 0.15)
    for centre in centres:
        gain += 1 / np.sqrt(1 + (quality * (f / centre - centre / np.maximum(f, 1))) ** 2)
    return np.asarray(scipy.fft.irfft(scipy.fft.rfft(waveform, size) * gain, size)[: len(waveform)])


# --------------------------------------------------------------------------------------------------- the 24 classes
# Each draws `n` samples at `rate` of its class; the level is set afterwards. Ranges are wide on purpose: a class is
# its structure, never one pitch or rate.


def sine_wave(n: int, rate: int, rng: Rng) -> Waveform:
    """One steady pure tone."""
    return _sine(_log_uniform(rng, 200, 4000), n, rate, rng)


def dial_tone(n: int, rate: int, rng: Rng) -> Waveform:
    """Two steady tones: North America's 350 and 440 Hz, or another country's."""
    low, high = [(350, 440), (350, 450), (400, 450), (425, 455)][rng.integers(4)]
    off = rng.uniform(0.96, 1.04)
    tone = _sine(low * off, n, rate, rng) + rng.uniform(0.6, 1.4) * _sine(high * off, n, rate, rng)
    return np.asarray(np.tanh(tone * rng.uniform(0.1, 1.2)))


def busy_signal(n: int, rate: int, rng: Rng) -> Waveform:
    """Two tones, 480 and 620 Hz, on and off with equal parts."""
    off = rng.uniform(0.94, 1.06)
    tone = _sine(480 * off, n, rate, rng) + rng.uniform(0.6, 1.4) * _sine(620 * off, n, rate, rng)
    half = rng.choice([0.25, 0.375, 0.5]) * rng.uniform(0.9, 1.1)
    return np.asarray(np.tanh(tone * rng.uniform(0.1, 1.2)) * _gate(n, rate, half, half, 0.004, rng.random() * half))


def dialing(n: int, rate: int, rng: Rng) -> Waveform:
    """A number dialled in DTMF: a low and a high tone for each digit."""
    on, gap = rng.uniform(0.06, 0.22), rng.uniform(0.04, 0.2)
    t = np.arange(n) / rate
    digit = rng.integers(0, 16, int(t[-1] / (on + gap)) + 1)[(t / (on + gap)).astype(np.int64)]
    rows, columns = np.array([697.0, 770, 852, 941]), np.array([1209.0, 1336, 1477, 1633])
    twist = rng.uniform(0.7, 1.4)
    tone = _sine(rows[digit // 4], n, rate, rng) + twist * _sine(columns[digit % 4], n, rate, rng)
    return tone * _gate(n, rate, on, gap, 0.003)


def smoke_detector(n: int, rate: int, rng: Rng) -> Waveform:
    """A piezo near 3.2 kHz in groups of three or four beeps."""
    tone = _harmonic(_log_uniform(rng, 2800, 3600), _rolloff(3, 1.5, rng, odd=0.8), n, rate, rng)
    count, on = [(3, rng.uniform(0.3, 0.55)), (4, rng.uniform(0.08, 0.15))][rng.integers(2)]
    cycle = 2 * on * count + rng.uniform(0.3, 1.2)
    group = _gate(n, rate, 2 * on * count, cycle - 2 * on * count, 1e-3)
    t = np.arange(n) / rate % cycle
    beep = np.clip(np.minimum(t % (2 * on), on - t % (2 * on)) / 0.004, 0, 1)
    return np.asarray(tone * group * beep)


def siren(n: int, rate: int, rng: Rng) -> Waveform:
    """Wail, yelp or two tones, rich in harmonics."""
    low, high = _log_uniform(rng, 400, 700), _log_uniform(rng, 900, 1700)
    kind = rng.integers(3)
    period = [rng.uniform(2, 5), rng.uniform(0.2, 0.5), rng.uniform(0.8, 1.6)][kind]
    x = _phase(1 / period, n, rate, rng) % 1
    if kind == 2:
        curve = np.clip(np.minimum(x, 0.5 - x) / 0.02, 0, 1)
    else:
        curve = np.where(x < 0.6, x / 0.6, (1 - x) / 0.4)
        curve = curve * curve * (3 - 2 * curve)
    frequency = low * (high / low) ** curve
    return _harmonic(frequency, _rolloff(8, rng.uniform(0.8, 1.6), rng), n, rate, rng)


def beep(n: int, rate: int, rng: Rng) -> Waveform:
    """Short tones of one pitch at an even beat."""
    on, period = rng.uniform(0.06, 0.3), rng.uniform(0.35, 1.1)
    tone = _harmonic(_log_uniform(rng, 700, 2600), _rolloff(5, rng.uniform(1, 3), rng, odd=0.9), n, rate, rng)
    return tone * _gate(n, rate, on, period - on, 0.003, rng.random() * on / 2)


def buzzer(n: int, rate: int, rng: Rng) -> Waveform:
    """A low harsh tone, bright up to 8 kHz."""
    pitch = _log_uniform(rng, 80, 260)
    tone = _harmonic(pitch, _rolloff(60, rng.uniform(0.1, 0.6), rng), n, rate, rng)
    tone = _resonances(tone, rate, [_log_uniform(rng, 500, 4500) for _ in range(3)], rng.uniform(2, 5))
    if rng.random() < 0.5:
        return tone
    return tone * _gate(n, rate, rng.uniform(0.4, 1.2), rng.uniform(0.15, 0.5), 0.008)


def chirp_tone(n: int, rate: int, rng: Rng) -> Waveform:
    """A tone that sweeps over an octave or three, up or down, again and again."""
    low = _log_uniform(rng, 250, 1500)
    high = low * _log_uniform(rng, 2.5, 8)
    x = _phase(1 / rng.uniform(0.12, 1.2), n, rate, rng) % 1
    curve = x if rng.random() < 0.5 else 1 - x
    frequency = low * (high / low) ** curve if rng.random() < 0.5 else low + (high - low) * curve
    return _sine(np.minimum(frequency, 0.45 * rate), n, rate, rng) * np.clip(np.minimum(x, 1 - x) / 0.04, 0, 1)


def white_noise(n: int, rate: int, rng: Rng) -> Waveform:
    """Noise with equal power in every hertz."""
    return _noise(n, rate, rng, np.ones_like) * np.exp(rng.uniform(0, 0.15) * _wander(n, rate, rng, 0.7))


def pink_noise(n: int, rate: int, rng: Rng) -> Waveform:
    """Noise with equal power in every octave."""
    return _noise(n, rate, rng, _tilt(-1)) * np.exp(rng.uniform(0, 0.15) * _wander(n, rate, rng, 0.7))


def mains_hum(n: int, rate: int, rng: Rng) -> Waveform:
    """50 or 60 Hz and its harmonics, the even ones strong."""
    amplitudes = _rolloff(16, rng.uniform(0.7, 1.5), rng)
    amplitudes[1::2] *= rng.uniform(1.5, 4)
    return _harmonic([50.0, 60.0][rng.integers(2)], amplitudes, n, rate, rng)


def static(n: int, rate: int, rng: Rng) -> Waveform:
    """A bad radio: hiss that comes and goes, and crackle."""
    hiss = _noise(n, rate, rng, _band(_log_uniform(rng, 300, 1200), _log_uniform(rng, 3000, 8000), 2))
    hiss *= np.exp(1.2 * _wander(n, rate, rng, rng.uniform(8, 25)))
    impulses = (rng.random(n) < rng.uniform(40, 200) / rate) * rng.standard_normal(n)
    kernel = _decay(rng.uniform(0.002, 0.006), rate, 1e-4)
    crackle = scipy.signal.oaconvolve(impulses, kernel * rng.standard_normal(len(kernel)))[:n]
    return np.asarray(hiss + rng.uniform(2, 6) * crackle)


def _click(rng: Rng, rate: int, low: Number, high: Number, seconds: float) -> Waveform:
    envelope = _decay(seconds, rate, 2e-4)
    n = len(envelope)
    ring = sum(
        rng.uniform(0.3, 1) * _sine(min(_log_uniform(rng, low, high), 0.45 * rate), n, rate, rng) for _ in range(3)
    )
    return np.asarray((ring + rng.uniform(0.1, 0.5) * rng.standard_normal(n)) * envelope)


def tick_tock(n: int, rate: int, rng: Rng) -> Waveform:
    """Two resonant clicks in turn at an even beat."""
    period, seconds = 1 / rng.uniform(1.5, 5), rng.uniform(0.02, 0.09)
    tick, tock = _click(rng, rate, 2000, 6000, seconds), _click(rng, rate, 1000, 3000, seconds)
    return _strike(_regular(n / rate, period, 0.01, rng), [tick, tock], n, rate, rng, 1.5)


def clicking(n: int, rate: int, rng: Rng) -> Waveform:
    """Dry clicks at uneven times."""
    gaps = rng.gamma(1.5, 1 / rng.uniform(6, 20), 200)
    starts = np.cumsum(gaps) - gaps[0] * rng.random()
    clicks = [_click(rng, rate, 1500, 8000, rng.uniform(0.003, 0.012)) for _ in range(4)]
    return _strike(starts[starts < n / rate], clicks, n, rate, rng, 9)


def ping(n: int, rate: int, rng: Rng) -> Waveform:
    """A pure tone struck and left to die away, with echoes, as of a sonar."""
    envelope = _decay(rng.uniform(0.5, 1.6), rate, 0.003)
    tone = _sine(_log_uniform(rng, 700, 3200), len(envelope), rate, rng) * envelope
    waveform = _strike(_regular(n / rate, rng.uniform(0.7, 1.8), 0.0, rng), [tone], n, rate, rng, 1)
    delay, gain = int(rng.uniform(0.08, 0.3) * rate), rng.uniform(0.1, 0.5)
    for echo in range(1, 4):
        waveform[echo * delay :] += gain**echo * waveform[: max(0, n - echo * delay)]
    return waveform


def foghorn(n: int, rate: int, rng: Rng) -> Waveform:
    """A long low brassy blast, sliding at its ends."""
    t = np.arange(n) / n
    slide = 1 - 0.12 * np.exp(-t / 0.04) - rng.uniform(0, 0.2) * np.clip((t - 0.8) / 0.2, 0, 1)
    frequency = _log_uniform(rng, 85, 230) * slide * (1 + 0.003 * _wander(n, rate, rng, 3))
    tone = _harmonic(frequency, _rolloff(30, rng.uniform(0.6, 1.2), rng), n, rate, rng)
    return tone * np.minimum(1, t / 0.08)


def whistle(n: int, rate: int, rng: Rng) -> Waveform:
    """A whistle blown, with or without a pea: a high tone with breath, trilled."""
    pitch = _log_uniform(rng, 1700, 4300)
    trill = np.sin(2 * np.pi * _phase(rng.uniform(18, 45), n, rate, rng)) * (rng.random() < 0.6)
    frequency = pitch * (1 + 0.04 * trill + 0.008 * _wander(n, rate, rng, 4))
    tone = _sine(frequency, n, rate, rng) * (1 + 0.5 * trill)
    breath = _noise(n, rate, rng, _band(0.7 * pitch, 1.6 * pitch, 2))
    blow = _gate(n, rate, rng.uniform(0.4, 1.6), rng.uniform(0.1, 0.4), 0.03)
    return (tone + rng.uniform(0.03, 0.25) * breath) * blow


def engine(n: int, rate: int, rng: Rng) -> Waveform:
    """Firing pulses at 20 to 80 Hz, uneven, through the pipe's resonances, the speed drifting."""
    frequency = _log_uniform(rng, 18, 80) * np.exp(
        rng.uniform(0.02, 0.25) * _wander(n, rate, rng, 0.5) + 0.01 * _wander(n, rate, rng, 12)
    )
    phase = _phase(frequency, n, rate, rng)
    fires = np.flatnonzero(np.diff(np.floor(phase)) > 0)
    pulses = np.zeros(n)
    pulses[fires] = rng.uniform(0.5, 1.5, 4)[np.arange(len(fires)) % 4] * rng.uniform(0.85, 1.15, len(fires))
    kernel = _decay(rng.uniform(0.02, 0.05), rate, 1e-3)
    kernel *= 1 + rng.uniform(0.2, 1.0) * rng.standard_normal(len(kernel))
    puffs = scipy.signal.oaconvolve(pulses, kernel)[:n]
    puffs -= puffs.mean()
    centres = [_log_uniform(rng, 80, 250), _log_uniform(rng, 250, 900), _log_uniform(rng, 900, 2500)]
    return _resonances(puffs, rate, centres, rng.uniform(1.5, 4))


def cricket(n: int, rate: int, rng: Rng) -> Waveform:
    """Chirps of a few pulses each near 4.5 kHz."""
    pulse = np.hanning(int(rng.uniform(0.01, 0.02) * rate))
    pulse_period, count = rng.uniform(0.02, 0.035), int(rng.integers(3, 7))
    period = count * pulse_period + rng.uniform(0.1, 0.45)
    starts = _regular(n / rate, period, 0.02, rng)
    starts = (starts[:, None] + pulse_period * np.arange(count)).ravel()
    envelope = _strike(starts, [pulse], n, rate, rng, 2)
    return _sine(_log_uniform(rng, 3600, 5400), n, rate, rng) * envelope


def church_bell(n: int, rate: int, rng: Rng) -> Waveform:
    """Strokes on one bell: hum, prime, tierce, quint, nominal and above, each with its own decay."""
    ratios = np.array([0.5, 1.0, 1.2, 1.5, 2.0, 2.5, 3.0, 4.0]) * np.exp(0.01 * rng.standard_normal(8))
    pitch, seconds = _log_uniform(rng, 220, 750), rng.uniform(2, 5)
    stroke = np.zeros(int(min(seconds, n / rate) * rate))
    for ratio in ratios:
        envelope = _decay(seconds * rng.uniform(0.6, 1.2) / ratio**0.6, rate, 0.002)[: len(stroke)]
        stroke[: len(envelope)] += rng.uniform(0.3, 1) * envelope * _sine(pitch * ratio, len(envelope), rate, rng)
    return _strike(_regular(n / rate, rng.uniform(0.8, 2.2), 0.01, rng), [stroke], n, rate, rng, 2)


def helicopter(n: int, rate: int, rng: Rng) -> Waveform:
    """Rotor: low noise in thumps, 8 to 20 a second, over a turbine's hiss."""
    x = _phase(rng.uniform(8, 20), n, rate, rng) % 1
    thump = np.exp(-x * rng.uniform(4, 9)) * np.minimum(1, x / 0.08)
    low = _noise(n, rate, rng, _band(40, _log_uniform(rng, 250, 900), 1.5))
    hiss = _noise(n, rate, rng, _band(1500, 5000, 1.5))
    return np.asarray(low * (thump + 0.05) + rng.uniform(0.02, 0.1) * hiss * (0.3 + thump))


def hi_hat(n: int, rate: int, rng: Rng) -> Waveform:
    """Closed and open strokes of a hi-hat: bursts of noise above 5 kHz in a rhythm."""
    strokes = []
    low = _log_uniform(rng, 4000, 6500)
    for seconds in (rng.uniform(0.05, 0.12), rng.uniform(0.05, 0.12), rng.uniform(0.05, 0.12), rng.uniform(0.2, 0.5)):
        envelope = _decay(seconds, rate, 5e-4)
        strokes.append(_noise(len(envelope), rate, rng, _band(low, 14000, 3)) * envelope)
    return _strike(_regular(n / rate, rng.uniform(0.11, 0.3), 0.01, rng), strokes, n, rate, rng, 5)


def telephone_bell(n: int, rate: int, rng: Rng) -> Waveform:
    """Two small bells struck in turn some twenty times a second, with pauses."""
    bells = []
    base = _log_uniform(rng, 1100, 2000)
    for pitch in (base, base * rng.uniform(1.15, 1.35)):
        envelope = _decay(rng.uniform(0.25, 0.6), rate)
        partials = [_sine(min(pitch * r, 0.45 * rate), len(envelope), rate, rng) / r for r in (1.0, 2.74, 3.76)]
        bells.append(np.asarray(sum(partials)) * envelope)
    starts = _regular(n / rate, 1 / rng.uniform(18, 28), 0.02, rng)
    on, off = rng.uniform(0.8, 1.8), rng.uniform(0.3, 0.8)
    return _strike(starts[starts % (on + off) < on], bells, n, rate, rng, 2)


Sound = Callable[[int, int, Rng], Waveform]
SOUNDS: dict[str, Sound] = {
    "/m/01v_m0": sine_wave,
    "/m/015jpf": dial_tone,
    "/m/01z47d": busy_signal,
    "/m/02c8p": dialing,
    "/m/01y3hg": smoke_detector,
    "/m/03kmc9": siren,
    "/m/02fs_r": beep,
    "/m/030rvx": buzzer,
    "/m/0hdsk": chirp_tone,
    "/m/0chx_": white_noise,
    "/m/0cj0r": pink_noise,
    "/m/06xkwv": mains_hum,
    "/m/07rgkc5": static,
    "/m/07qjznl": tick_tock,
    "/m/07qc9xj": clicking,
    "/m/07qwdck": ping,
    "/m/04fq5q": foghorn,
    "/m/0l156k": whistle,
    "/m/02mk9": engine,
    "/m/09xqv": cricket,
    "/m/03w41f": church_bell,
    "/m/09ct_": helicopter,
    "/m/03qtq": hi_hat,
    "/m/07pp8cl": telephone_bell,
}
MIDS = tuple(sorted(SOUNDS))


# ------------------------------------------------------------------------------------------------------------ clips


@dataclass(frozen=True)
class Event:
    """One stretch of one class in a clip."""

    mid: str
    onset_seconds: float
    offset_seconds: float


@dataclass(frozen=True)
class Entry:
    """A row of a segment list, and the file that it gets."""

    ytid: str
    subset: str
    index: int
    labels: tuple[str, ...]
    start_seconds: float
    seconds: float
    suffix: str | None
    """None: listed, without a file."""
    defect: str | None

    @property
    def name(self) -> str:
        """File name under audio/."""
        return f"{self.ytid}.{self.suffix}"


def entries(options: Options) -> list[Entry]:
    """Every row of both lists, in the order of the ids."""
    found = []
    for split, subset in enumerate(SUBSETS):
        per_class = (options.train_clips_per_class, options.eval_clips_per_class)[split]
        roles: list[str | None] = [None] * (per_class * len(MIDS))
        roles += ["missing"] * MISSING[subset] + list(DEFECTS[subset] if options.defective else ())
        found += [_entry(options.seed, split, i, role) for i, role in enumerate(roles)]
    return sorted(found, key=lambda entry: entry.ytid)


def _entry(seed: int, split: int, i: int, role: str | None) -> Entry:
    rng = np.random.default_rng([seed, split, i, 0])
    first = MIDS[i % len(MIDS)]
    others = rng.permutation([mid for mid in MIDS if mid != first])[: rng.choice([0, 1, 2], p=[0.4, 0.35, 0.25])]
    labels = sorted([first, *map(str, others)], key=lambda mid: ontology.class_of(mid).index)
    seconds = CLIP_SECONDS
    if role is None and i % 193 == 7:
        seconds = round(float(rng.uniform(1.1, 1.9)), 3)  # no room for an anchor
    elif role is None and rng.random() < 0.08:
        seconds = round(float(rng.uniform(3, 9.5)), 3)
    suffix = {"truncated": "flac", "non_finite": "wav", "not_audio": "wav", "empty": "wav"}.get(
        role or "", ["wav", "flac", "ogg"][rng.choice(3, p=[0.35, 0.45, 0.2])]
    )
    digest = hashlib.sha256(f"synthetic {seed} {split} {i}".encode()).digest()
    return Entry(
        ytid=base64.urlsafe_b64encode(digest).decode()[:11],
        subset=SUBSETS[split],
        index=i,
        labels=tuple(labels),
        start_seconds=10.0 * int(rng.integers(0, 40)),
        seconds=seconds,
        suffix=None if role == "missing" else suffix,
        defect=None if role == "missing" else role,
    )


def _rng(seed: int, entry: Entry, stream: int) -> Rng:
    # Stream 0 draws what a clip is, 1 when its events are, 2 how they sound.
    return np.random.default_rng([seed, SUBSETS.index(entry.subset), entry.index, stream])


def events(entry: Entry, seed: int) -> list[Event]:
    """When each label of a clip sounds: 1.5 to 5 s once, or two shorter stretches."""
    rng = _rng(seed, entry, 1)
    placed: list[Event] = []
    longest = 5 if len(entry.labels) < 3 else 4
    for mid in entry.labels:
        if rng.random() < 0.7 or entry.seconds < 6:
            lengths = [rng.uniform(1.5, longest) if entry.seconds > 2 else entry.seconds]
        else:
            lengths = list(rng.uniform(1.5, 2.5, 2))
        for seconds in (min(length, entry.seconds) for length in lengths):
            # The emptiest of a few places: events overlap sometimes, not mostly. A stretch never meets its own class.
            onsets = rng.uniform(0, entry.seconds - seconds, 8)
            crowd = [sum(_overlap(e, on, seconds) * (9 if e.mid == mid else 1) for e in placed) for on in onsets]
            best = int(np.argmin(crowd))
            if any(e.mid == mid and _overlap(e, onsets[best], seconds) > 0 for e in placed):
                continue
            onset = round(float(onsets[best]), 3)
            placed.append(Event(mid, onset, round(min(onset + seconds, entry.seconds), 3)))
    return placed


def _overlap(event: Event, onset: float, seconds: float) -> float:
    return max(0.0, min(event.offset_seconds, onset + seconds) - max(event.onset_seconds, onset))


def render(entry: Entry, seed: int) -> tuple[Float64[np.ndarray, "time channels"], int]:
    """The clip's samples within [-0.98, 0.98], and its sample rate in Hz."""
    rng = _rng(seed, entry, 2)
    rate = [22050, 44100, 48000][rng.choice(3, p=[0.25, 0.45, 0.3])]
    channels = int(rng.choice([1, 2], p=[0.6, 0.4]))
    n = round(entry.seconds * rate)
    waveform = np.zeros((n, channels))
    level_db = rng.uniform(-26, -14)  # of the clip; its events differ from it
    drawn: dict[str, np.random.SeedSequence] = {}
    for event in events(entry, seed):
        # The stretches of one class in one clip are one source: the same draw, cut differently.
        drawn.setdefault(event.mid, np.random.SeedSequence(int(rng.integers(2**63))))
        length = round((event.offset_seconds - event.onset_seconds) * rate)
        sound = SOUNDS[event.mid](length, rate, np.random.default_rng(drawn[event.mid]))
        ramp = np.minimum(1, np.arange(length) / (rng.uniform(0.005, 0.08) * rate))
        sound = sound * ramp * ramp[::-1]
        gain = 10 ** ((level_db + rng.uniform(-4, 4)) / 20) / (np.sqrt(np.mean(sound**2)) + 1e-9)
        pan = rng.uniform(0.25, 0.75)
        sides = np.array([np.cos(pan * np.pi / 2), np.sin(pan * np.pi / 2)]) if channels == 2 else np.ones(1)
        at = min(round(event.onset_seconds * rate), n - length)
        waveform[at : at + length] += gain * sound[:, None] * sides
    tilt, floor = rng.uniform(-2, -0.5), 10 ** ((level_db - rng.uniform(30, 42)) / 20)
    for channel in range(channels):
        waveform[:, channel] += floor * _noise(n, rate, rng, _tilt(tilt))
    return waveform * min(1.0, 0.98 / float(np.max(np.abs(waveform)))), rate


# ------------------------------------------------------------------------------------------------------------ files


def encode(waveform: Float64[np.ndarray, "time channels"], rate: int, suffix: str) -> bytes:
    """A file's bytes, equal for equal samples."""
    buffer = io.BytesIO()
    kind = {"wav": "PCM_16", "flac": "PCM_16", "ogg": "VORBIS"}[suffix]
    soundfile.write(buffer, waveform, rate, format=suffix.upper(), subtype=kind)
    return _fixed_serial(buffer.getvalue()) if suffix == "ogg" else buffer.getvalue()


_REVERSED = bytes(int(f"{i:08b}"[::-1], 2) for i in range(256))


def _fixed_serial(ogg: bytes) -> bytes:
    """Give an Ogg stream the serial number 1: libsndfile draws it from the clock.

    Every page carries it, and a CRC (RFC 3533, 6). Ogg's CRC is zlib's, bits reversed, without its inversions.
    """
    pages = []
    at = 0
    while at < len(ogg):
        assert ogg[at : at + 4] == b"OggS"
        n_segments = ogg[at + 26]
        end = at + 27 + n_segments + sum(ogg[at + 27 : at + 27 + n_segments])
        page = ogg[at : at + 14] + struct.pack("<I", 1) + ogg[at + 18 : at + 22] + bytes(4) + ogg[at + 26 : end]
        register = zlib.crc32(page.translate(_REVERSED), 0xFFFFFFFF) ^ 0xFFFFFFFF
        crc = int(f"{register:032b}"[::-1], 2)
        pages.append(page[:22] + struct.pack("<I", crc) + page[26:])
        at = end
    return b"".join(pages)


def _float_wav(waveform: Float64[np.ndarray, "time channels"], rate: int) -> bytes:
    """A 32-bit float WAV, which can hold NaN. libsndfile's has a PEAK chunk with the time of day in it."""
    samples = waveform.astype("<f4").tobytes()
    channels = waveform.shape[1]
    form = struct.pack("<HHIIHH", 3, channels, rate, 4 * channels * rate, 4 * channels, 32)
    body = b"WAVEfmt " + struct.pack("<I", len(form)) + form + b"data" + struct.pack("<I", len(samples)) + samples
    return b"RIFF" + struct.pack("<I", len(body)) + body


def _file(entry: Entry, seed: int) -> bytes:
    """A clip's file, broken in the way that it is to be."""
    assert entry.suffix is not None
    if entry.defect == "empty":
        return b""
    if entry.defect == "not_audio":
        return b"<html><body>429 Too Many Requests</body></html>\n" * 40
    waveform, rate = render(entry, seed)
    if entry.defect == "silent":
        return encode(np.zeros_like(waveform), rate, entry.suffix)
    if entry.defect == "non_finite":
        waveform[len(waveform) // 3 : len(waveform) // 2] = np.nan
        return _float_wav(waveform, rate)
    data = encode(waveform, rate, entry.suffix)
    return data[: len(data) // 2] if entry.defect == "truncated" else data


def _tables(options: Options) -> dict[str, str]:
    """The csv files at the root, by name."""
    listed = entries(options)
    tables = {}
    for subset in SUBSETS:
        rows = [entry for entry in listed if entry.subset == subset]
        mids = [mid for entry in rows for mid in entry.labels]
        # AudioSet's own three header lines; its dates would change from run to run.
        lines = [
            "# Segments csv created by the synthetic corpus generator",
            f"# num_ytids={len(rows)}, num_segs={len(rows)}, num_unique_labels={len(set(mids))}, "
            f"num_positive_labels={len(mids)}",
            "# YTID, start_seconds, end_seconds, positive_labels",
        ]
        for entry in rows:
            end = entry.start_seconds + entry.seconds
            lines.append(f'{entry.ytid}, {entry.start_seconds:.3f}, {end:.3f}, "{",".join(entry.labels)}"')
        tables[f"{subset}_segments.csv"] = "".join(f"{line}\n" for line in lines)
    happening = io.StringIO()
    writer = csv.writer(happening, lineterminator="\n")
    writer.writerow(["ytid", "mid", "onset", "offset"])
    for entry in listed:
        if entry.suffix is not None and entry.defect is None:
            writer.writerows(
                [entry.ytid, event.mid, f"{event.onset_seconds:.3f}", f"{event.offset_seconds:.3f}"]
                for event in events(entry, options.seed)
            )
    tables["events.csv"] = happening.getvalue()
    tables["class_labels_indices.csv"] = (ontology.ASSETS / "class_labels_indices.csv").read_text(encoding="utf-8")
    return tables


def prepare(root: Path, options: Options) -> None:
    """Bring the corpus of these options about under `root`; nothing happens where it is there already.

    A run that was killed is continued. A corpus of other options, or of other code, is replaced if this checkout made
    it. A folder with anything else in it is left alone: ValueError.
    """
    identity = hashlib.sha256(options.model_dump_json().encode() + Path(__file__).read_bytes()).hexdigest()
    audio = root / "audio"
    state = claim(root, MARKER, identity, partial(remove, audio), param="data.root", source="the synthetic corpus")
    sizes = state.get("sizes", {})
    listed = [entry for entry in entries(options) if entry.suffix is not None]
    # Files are renamed into place whole: one of a run that was killed is good if it is there.
    todo = [entry for entry in listed if not is_there(audio / entry.name, sizes.get(entry.name))]
    tables = _tables(options)
    if sizes and not todo and all(is_there(root / name, len(text.encode())) for name, text in tables.items()):
        logger.info("%s: all %d clips are there", root, len(listed))
        return

    logger.info("%s: making %d of %d clips", root, len(todo), len(listed))
    for leftover in audio.glob(".*.tmp"):
        leftover.unlink()
    # Threads: nearly all of the time is spent in FFTs and encoders, which let each other run.
    with ThreadPoolExecutor(cpu_count()) as threads:
        for _ in threads.map(lambda entry: write_atomic(audio / entry.name, _file(entry, options.seed)), todo):
            pass
    for name, text in tables.items():
        write_atomic(root / name, text)
    # Last: a corpus with sizes in its marker is complete.
    sizes = {entry.name: (audio / entry.name).stat().st_size for entry in listed}
    write_json(root / MARKER, state | {"sizes": sizes})


def clips(root: Path, subset: str, counts: Counter[str] | None = None) -> Iterator[Clip]:
    """List the generated clips by the AudioSet reader: this is an AudioSet copy."""
    found: Iterator[Clip] = load("audioset").clips(root, subset, counts)
    return found
