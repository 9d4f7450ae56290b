"""Sounds for the page: brought to one loudness, and small enough for data URIs."""

import base64
import io

import numpy as np
import soundfile
from jaxtyping import Float

LOUDNESS_DB = -23.0  # RMS, dB re full scale
PEAK = 0.98
MAX_GAIN_DB = 40.0  # an estimate that is nearly silent shall still sound nearly silent


def listening_gain(waveform: Float[np.ndarray, " time"]) -> float:
    """Factor that brings a sound to -23 dB RMS, less where it would clip, and at most 40 dB; 1 for silence."""
    rms = float(np.sqrt(np.mean(np.square(waveform, dtype=np.float64))))
    peak = float(np.abs(waveform).max(initial=0.0))
    if rms == 0:
        return 1.0
    return float(min(10 ** (LOUDNESS_DB / 20) / rms, PEAK / peak, 10 ** (MAX_GAIN_DB / 20)))


def encode(waveform: Float[np.ndarray, " time"], sample_rate: int) -> bytes:
    """MP3 of variable bit rate: about 15 kB for 2 s of noise, less for tones, the same bytes for the same samples.

    Not Ogg: libsndfile draws a random serial number for each stream, and older Safari does not play it.
    """
    buffer = io.BytesIO()
    soundfile.write(
        buffer,
        np.clip(waveform, -1, 1),
        sample_rate,
        format="MP3",
        subtype="MPEG_LAYER_III",
        compression_level=0.6,
        bitrate_mode="VARIABLE",
    )
    return buffer.getvalue()


def data_uri(content: bytes, media_type: str) -> str:
    """`content` as an address that needs no network."""
    return f"data:{media_type};base64,{base64.b64encode(content).decode()}"
