"""Spectra and log-mel features: against librosa, torchlibrosa's numbers and signals whose spectrum is known."""

import librosa
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.nn.features import istft, log_mel, magnitude, mel_filters, pad_to, stft
from tests.golden import fill


def noise(samples, batch=1, seed=0):
    return torch.randn(batch, samples, generator=torch.Generator().manual_seed(seed))


def relative(estimate, reference):
    return ((estimate - reference).norm() / reference.norm()).item()


@settings(max_examples=20, deadline=None)
@given(samples=st.integers(257, 3000), hop_length=st.sampled_from([64, 100, 192]))
def test_istft_undoes_stft_at_any_length(samples, hop_length):
    waveform = noise(samples, batch=2)
    spectrum = stft(waveform, n_fft=512, hop_length=hop_length)
    assert spectrum.shape == (2, samples // hop_length + 1, 257)
    torch.testing.assert_close(istft(spectrum, n_fft=512, hop_length=hop_length, length=samples), waveform)


@pytest.mark.parametrize(("n_fft", "hop_length", "samples"), [(512, 128, 3000), (512, 160, 3001), (256, 128, 2047)])
def test_istft_is_torchs_forward_and_backward(n_fft, hop_length, samples):
    frames = samples // hop_length + 1
    generator = torch.Generator().manual_seed(0)
    # No spectrum of a waveform: its imaginary parts at 0 Hz and Nyquist are ignored by both.
    spectrum = torch.randn(3, frames, n_fft // 2 + 1, 2, generator=generator)
    spectrum = torch.view_as_complex(spectrum).requires_grad_()
    errors = torch.randn(3, samples, generator=generator)
    window = torch.hann_window(n_fft)
    found = istft(spectrum, n_fft=n_fft, hop_length=hop_length, length=samples)
    wanted = torch.istft(spectrum.transpose(1, 2), n_fft, hop_length, window=window, length=samples)
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(*(torch.autograd.grad(y, spectrum, errors)[0] for y in (found, wanted)))


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"n_fft": 256, "hop_length": 129, "length": 100}, "hop_length 129"),
        ({"n_fft": 512, "hop_length": 64, "length": 100}, "129 bins"),
        ({"n_fft": 256, "hop_length": 64, "length": 640}, "640 samples"),
        ({"n_fft": 256, "hop_length": 64, "length": 0}, "0 samples"),
    ],
)
def test_istft_refuses_what_is_no_stft_of_that_length(options, named):
    with pytest.raises(ValueError, match=named):
        istft(torch.zeros(1, 10, 129, dtype=torch.complex64), **options)


def test_istft_refuses_what_torch_refuses():
    """The last sample has a weight of 4e-13."""
    options = {"n_fft": 4096, "hop_length": 2048, "length": 9 * 2048 - 1}
    spectrum = torch.ones(1, 9, 2049, dtype=torch.complex64)
    with pytest.raises(ValueError, match="hangs by the tip"):
        istft(spectrum, **options)
    with pytest.raises(RuntimeError, match="window overlap add min"):
        torch.istft(spectrum.transpose(1, 2), 4096, 2048, window=torch.hann_window(4096), length=options["length"])
    assert istft(spectrum, n_fft=4096, hop_length=2048, length=9 * 2048 - 100).isfinite().all()


def test_frames_come_before_bins():
    # A click in the middle lights one frame; a sine lights one bin.
    click = torch.zeros(1, 8000)
    click[0, 4000] = 1
    assert magnitude(stft(click, n_fft=256, hop_length=80))[0].sum(dim=1).argmax() == 50
    sine = torch.sin(2 * torch.pi * 10 / 256 * torch.arange(8000))[None]
    assert (magnitude(stft(sine, n_fft=256, hop_length=80))[0, 5:-5].argmax(dim=1) == 10).all()


def test_magnitude_is_that_of_uss():
    golden = fill.arrays("resunet30_strong")
    spectrum = stft(golden["input"][0], n_fft=2048, hop_length=320)
    assert relative(magnitude(spectrum)[:, ::10], golden["mag"]) < 1e-6


def test_magnitude_of_silence_has_a_finite_gradient():
    silence = torch.zeros(1, 1000, requires_grad=True)
    result = magnitude(stft(silence, n_fft=256, hop_length=80))
    result.sum().backward()
    assert (result == 1e-5).all()
    assert silence.grad.isfinite().all()


def test_transforms_are_float32_under_autocast():
    waveform = noise(2000)
    with torch.autocast("cpu", torch.bfloat16):
        assert stft(waveform.bfloat16(), n_fft=256, hop_length=80).dtype == torch.complex64
        assert torch.equal(stft(waveform, n_fft=256, hop_length=80), stft(waveform, n_fft=256, hop_length=80))
        inside = log_mel(waveform)
    assert torch.equal(inside, log_mel(waveform))


@pytest.mark.parametrize(
    ("n_fft", "n_mels", "f_min", "f_max"),
    [(1024, 64, 50.0, 14000.0), (2048, 128, 0.0, 16000.0), (2048, 10, 300.0, 900.0)],
)
def test_mel_filters_are_those_of_librosa(n_fft, n_mels, f_min, f_max):
    ours = mel_filters(n_fft=n_fft, n_mels=n_mels, f_min=f_min, f_max=f_max, sample_rate=32000)
    theirs = librosa.filters.mel(sr=32000, n_fft=n_fft, n_mels=n_mels, fmin=f_min, fmax=f_max).T
    np.testing.assert_allclose(ours.numpy(), theirs, rtol=1e-5, atol=1e-8)


def test_log_mel_is_that_of_panns():
    golden = fill.arrays("cnn14_strong")
    error_db = (log_mel(golden["input"]) - golden["logmel"][:, 0]).abs()
    # Near the floor the convolution's own rounding shows: 0.02 dB at -99 dB.
    assert error_db.max() < 0.05
    assert error_db[golden["logmel"][:, 0] > -60].max() < 1e-3


def test_log_mel_of_silence_is_the_floor():
    assert (log_mel(torch.zeros(1, 32000)) == -100).all()


def test_log_mel_rises_by_the_gain():
    waveform = noise(32000)
    torch.testing.assert_close(log_mel(10 * waveform) - log_mel(waveform), torch.full((1, 101, 64), 20.0))


def test_a_waveform_too_short_to_reflect_is_refused():
    with pytest.raises(ValueError, match="128 samples is too short to reflect 128"):
        stft(noise(128), n_fft=256, hop_length=80)
    assert stft(noise(129), n_fft=256, hop_length=80).shape == (1, 2, 129)


def test_padding_only_ever_appends_silence():
    waveform = noise(10)
    assert torch.equal(pad_to(waveform, 5), waveform)
    assert torch.equal(pad_to(waveform, 13), torch.cat([waveform, torch.zeros(1, 3)], dim=1))
