"""Mixing: the gain rule, what each normalization promises, silence, and NumPy against Torch."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from pipeline.mixtures.mixing import PairsParams, energy, energy_gain, level_ratio, mix

RULE = {"match_energy": True, "min_gain": 0.02, "max_gain": 50.0}
NORMALIZE = ["none", "joint", "declip", "separate"]
PARAMS = {"exclude": "ontology", "normalize": "joint", **RULE}


def noise(seed: int, *, level: float = 0.1, shape: tuple[int, ...] = (3, 2000)) -> np.ndarray:
    return level * np.random.default_rng(seed).standard_normal(shape)


def snr_db(target, interferer):
    return 10 * np.log10(energy(target) / energy(interferer))


@given(st.floats(1e-3, 10), st.floats(1e-3, 10), st.sampled_from(NORMALIZE[:3]), st.integers(0, 99))
def test_the_mixture_is_at_0_db_unless_the_gain_is_clamped(target_level, interferer_level, normalize, seed):
    target, interferer = noise(seed, level=target_level), noise(seed + 100, level=interferer_level)
    gain = energy_gain(energy(target), energy(interferer), **RULE)
    _, target, interferer = mix(target, interferer, gain, normalize)
    ratio = target_level / interferer_level
    if 0.025 < ratio < 40:  # the levels drawn are within a few per cent of those asked for
        np.testing.assert_allclose(snr_db(target, interferer), 0, atol=1e-9)
    elif ratio > 63:
        assert np.all(gain == 50)
        assert np.all(snr_db(target, interferer) > 0)
    elif ratio < 0.016:
        assert np.all(gain == 0.02)
        assert np.all(snr_db(target, interferer) < 0)


@given(st.floats(1e-4, 30), st.sampled_from(NORMALIZE[:3]), st.integers(0, 99))
def test_what_is_left_beside_the_target_is_the_scaled_interferer(level, normalize, seed):
    before, interferer = noise(seed, level=level), noise(seed + 100)
    gain = np.array([0.02, 1.0, 50.0])
    mixture, target, residual = mix(before, interferer, gain, normalize)
    np.testing.assert_allclose(mixture - target, residual, atol=1e-12 * level)
    scale = (target / before)[:, :1]
    np.testing.assert_allclose(target, scale * before)  # one factor for the whole segment
    np.testing.assert_allclose(residual, scale * gain[:, None] * interferer)  # and the same for the interferer


def test_joint_scaling_brings_every_mixture_to_a_peak_of_one():
    mixture, _, _ = mix(noise(0) * [[1e-3], [1], [1e3]], noise(1), np.ones(3), "joint")
    np.testing.assert_allclose(abs(mixture).max(-1), 1)


def test_declipping_touches_only_mixtures_above_full_scale():
    target, interferer = np.array([[0.5, 0.1], [0.9, 0.3]]), np.array([[0.4, 0.2], [0.9, 0.1]])
    mixture, declipped, _ = mix(target, interferer, np.ones(2), "declip")
    np.testing.assert_array_equal(mixture[0], target[0] + interferer[0])
    np.testing.assert_array_equal(declipped[0], target[0])
    np.testing.assert_allclose(mixture[1], [0.9, 0.2])
    np.testing.assert_allclose(declipped[1], target[1] / 2)


def test_separate_scaling_takes_the_target_out_of_the_mixture():
    """Eq. 2 read literally: the target the loss sees is not the one in the mixture, here by 3 dB."""
    time = np.arange(32000) / 32000
    target, interferer = np.sin(2 * np.pi * 440 * time)[None], np.sin(2 * np.pi * 660 * time)[None]
    mixture, scaled, _ = mix(target, interferer, np.ones(1), "separate")
    np.testing.assert_allclose(abs(scaled).max(), 1)
    np.testing.assert_allclose(abs(mixture).max(), 1)
    contained = (mixture * scaled).mean() / energy(scaled)
    assert contained[0] < 0.6
    assert energy(mixture - scaled)[0] < 0.8 * energy(scaled)[0]


def test_without_normalization_the_peak_is_left_alone():
    mixture, target, _ = mix(np.full((1, 4), 0.9), np.full((1, 4), 0.9), np.ones(1), "none")
    np.testing.assert_allclose(mixture, 1.8)
    np.testing.assert_array_equal(target, np.full((1, 4), 0.9))


@pytest.mark.parametrize("normalize", NORMALIZE)
@pytest.mark.parametrize("library", [np.asarray, torch.as_tensor])
def test_silence_gives_finite_numbers(normalize, library):
    silence, sound = np.zeros((1, 50)), noise(0, shape=(1, 50))
    for target, interferer in [(silence, sound), (sound, silence), (silence, silence), (sound, -sound)]:
        target, interferer = library(target), library(interferer)
        gain = energy_gain(energy(target), energy(interferer), **RULE)
        parts = mix(target, interferer, gain, normalize)
        assert all(np.isfinite(np.asarray(part)).all() for part in parts)
        assert all(abs(np.asarray(part)).max() <= 1.5 for part in parts)  # nothing is blown up


def test_a_silent_target_gets_the_faintest_interferer():
    assert energy_gain(np.zeros(1), np.ones(1), **RULE) == 0.02


def test_the_bounds_are_34_db_either_way():
    gain = energy_gain(np.array([1.0, 1.0, 1e-4, 1e-3]), np.array([1e-4, 1e-3, 1.0, 1.0]), **RULE)
    np.testing.assert_allclose(gain, [50, 1e3**0.5, 0.02, 1e-3**0.5])


def test_energies_are_left_alone_when_they_are_not_to_match():
    off = RULE | {"match_energy": False}
    assert energy_gain(np.array([4.0]), np.array([1.0]), **off) == 1
    assert energy_gain(torch.tensor([4.0]), torch.tensor([1.0]), **off) == 1
    assert level_ratio(np.array([4.0]), np.array([1.0])) == 2


@pytest.mark.parametrize("normalize", NORMALIZE)
def test_numpy_and_torch_agree_and_keep_their_type(normalize):
    target, interferer = noise(0).astype(np.float32), noise(1, level=0.7).astype(np.float32)
    gain = energy_gain(energy(target), energy(interferer), **RULE)
    theirs = [torch.as_tensor(x) for x in (target, interferer)]
    torch_gain = energy_gain(energy(theirs[0]), energy(theirs[1]), **RULE)
    torch.testing.assert_close(torch_gain, torch.as_tensor(gain))
    for ours, other in zip(mix(target, interferer, gain, normalize), mix(*theirs, torch_gain, normalize), strict=True):
        assert ours.dtype == np.float32
        assert other.dtype == torch.float32
        torch.testing.assert_close(other, torch.as_tensor(ours))


@pytest.mark.parametrize("normalize", NORMALIZE)
def test_a_batch_is_mixed_as_its_items_are(normalize):
    target, interferer, gain = noise(0), noise(1, level=1.0), np.array([0.1, 1.0, 10.0])
    batched = mix(target, interferer, gain, normalize)
    for n in range(3):
        for part, single in zip(batched, mix(target[n], interferer[n], gain[n, ...], normalize), strict=True):
            np.testing.assert_array_equal(part[n], single)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"exclude": "labels"}, "exclude"), ({"normalize": "peak"}, "normalize"), ({"min_gain": 60.0}, "above max_gain")],
)
def test_a_wrong_rule_is_refused(change, message):
    with pytest.raises(ValidationError, match=message):
        PairsParams.model_validate(PARAMS | change)
