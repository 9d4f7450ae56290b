"""The filter bank is Kaldi's: to the bit against torchaudio's on this machine, and to the stored original."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from torchaudio.compliance import kaldi

from pipeline.audio import resample
from pipeline.nn import fbank as ours
from tests.golden.fill import arrays


def reference(waveform):
    return kaldi.fbank(
        waveform,
        htk_compat=True,
        sample_frequency=16000,
        use_energy=False,
        window_type="hanning",
        num_mel_bins=128,
        dither=0.0,
        frame_shift=10,
    )


def clips():
    """Noise at several levels, a tone, an offset, digital silence, a click, a tone that ends."""
    generator = torch.Generator().manual_seed(0)
    time = torch.arange(32000) / 16000
    noise = torch.randn(4, 32000, generator=generator) * torch.tensor([[0.3], [1e-2], [1e-4], [1e-6]])
    tone = 0.5 * torch.sin(2 * torch.pi * 440 * time)
    click = torch.zeros(32000)
    click[9000] = 1.0
    half = tone * (time < 1)
    return torch.stack([*noise, tone, tone + 0.3, torch.zeros(32000), click, half])


def test_a_batch_equals_kaldi_clip_by_clip():
    batch = clips()
    found = ours.fbank(batch)
    for one, features in zip(batch, found, strict=True):
        torch.testing.assert_close(features, reference(one[None]), rtol=0, atol=1e-5)


ROOT = Path(__file__).parents[2]
ESC10 = ROOT / "data" / "esc10" / "audio"


def test_a_hundred_recordings_of_esc10_equal_kaldi():
    paths = sorted(ESC10.glob("*.opus"))
    chosen = [paths[k] for k in np.random.default_rng(0).permutation(len(paths))[:100]]
    assert len(chosen) == 100
    batch = torch.zeros(100, 80_000)
    for row, path in zip(batch, chosen, strict=True):
        waveform, rate = soundfile.read(path, dtype="float32")
        heard = torch.from_numpy(resample(waveform, rate, 16_000))[:80_000]
        row[: len(heard)] = heard
    batch = torch.stack([_centred(row[None])[0] for row in batch])
    features = ours.fbank(batch)
    for found, waveform in zip(features, batch, strict=True):
        torch.testing.assert_close(found, reference(waveform[None]), rtol=0, atol=1e-5)


def of_the_stored_original():
    """What is found and what is stored: frames of the whole, all of two seconds, the mel filters."""
    golden = arrays("fbank")
    return (
        (ours.fbank(_centred(golden["waveform"]))[0, ::8], golden["fbank_raw"]),
        (ours.fbank(_centred(golden["waveform"][:, 48000:80000]))[0], golden["fbank2s_raw"]),
        (ours.mel_banks()[:256].T, golden["mel_banks"]),
    )


def test_the_stored_original():
    """Whatever kernels this processor has: a bin at float32's noise floor, 1e-7 of its frame's power, is known to 1e-2.

    Within 50 dB of a frame's loudest bin the two agree to 1e-3, and on average to 1e-4 everywhere.
    """
    *banks, mel = of_the_stored_original()
    for found, expected in banks:
        error = (found - expected).abs()
        loud = expected > expected.amax(dim=1, keepdim=True) - 11.5  # 50 dB
        assert error[loud].max() < 1e-3
        assert error.mean() < 1e-4
        assert error.max() < 2e-2
    torch.testing.assert_close(*mel, rtol=0, atol=2e-5)


ON_INTEL_MKL = """
from tests.intel_mkl import take_intel_path
take_intel_path()
from tests.nn.test_fbank import of_the_stored_original
print(*((found - expected).abs().max().item() for found, expected in of_the_stored_original()))
"""


@pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() != "AVX512",
    reason="the stored original was made by MKL's kernels for AVX-512",
)
def test_the_stored_original_by_the_kernels_it_was_made_with():
    """Its noise floor is that of MKL's FFT on Intel's processors with AVX-512: with those kernels ours is the file."""
    done = subprocess.run([sys.executable, "-c", ON_INTEL_MKL], cwd=ROOT, capture_output=True, text=True, check=False)
    if "NoMKL" in done.stderr:
        pytest.skip(done.stderr.splitlines()[-1])
    assert done.returncode == 0, done.stderr
    distances = [float(distance) for distance in done.stdout.split()]
    assert len(distances) == 3
    assert max(distances) <= 1e-5


def _centred(waveform):
    return waveform - waveform.double().mean().float()  # in float32 it depends on the number of threads


def test_one_mel_filter_is_empty_and_stays_at_the_floor():
    found = ours.fbank(clips())
    empty = (ours.mel_banks() == 0).all(dim=0).nonzero().flatten().tolist()
    assert empty == [3]
    assert (found[..., 3] == torch.tensor(torch.finfo(torch.float32).eps).log()).all()


def test_autocast_does_not_reach_it():
    batch = clips()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = ours.fbank(ours.to_16k(batch))
    assert torch.equal(found, ours.fbank(ours.to_16k(batch)))


def test_padding_is_louder_than_the_average_of_audioset():
    assert pytest.approx(0.46703, abs=1e-5) == ours.PADDING
    assert ours.normalise(torch.tensor(torch.finfo(torch.float32).eps).log()).item() == pytest.approx(
        -1.27759, abs=1e-4
    )


@pytest.mark.parametrize(("samples", "frames"), [(400, 1), (559, 1), (560, 2), (160000, 998), (32000, 198)])
def test_only_whole_windows_count(samples, frames):
    assert ours.fbank(torch.randn(1, samples)).shape == (1, frames, 128)
    assert ours.whole_frames(samples) == frames


def test_less_than_a_window_is_refused():
    with pytest.raises(ValueError, match="399 samples has no window of 400"):
        ours.fbank(torch.zeros(1, 399))


def test_halving_the_rate_keeps_a_tone():
    time = torch.arange(32000) / 32000
    low = ours.to_16k(torch.sin(2 * torch.pi * 1000 * time)[None])
    expected = torch.sin(2 * torch.pi * 1000 * torch.arange(16000) / 16000)
    torch.testing.assert_close(low[0, 100:-100], expected[100:-100], rtol=0, atol=5e-3)
