"""Zipformer's parts: activations, norm, frame rates, and how far attention looks."""

import pytest
import torch

from pipeline import separators
from pipeline.separators import zipformer
from tests.separators.test_separators import QUERY_DIM, TINY, randn


def test_the_activations_are_those_of_the_paper():
    x = torch.tensor([-3.0, 0.0, 2.0], dtype=torch.float64)
    right = (1 + (x - 1).exp()).log() - 0.08 * x - 0.313261687
    left = (1 + (x - 4).exp()).log() - 0.08 * x - 0.035
    torch.testing.assert_close(zipformer.swoosh_r(x), right)
    torch.testing.assert_close(zipformer.swoosh_l(x), left)
    assert zipformer.swoosh_r(torch.zeros(())).abs() < 1e-7


def test_the_norm_keeps_some_of_the_length_beside_its_bias():
    norm = zipformer.BiasNorm(4)
    x = randn(3, 4)
    torch.testing.assert_close(norm(x), norm(5 * x))  # without a bias it is an RMS norm
    with torch.no_grad():
        norm.bias.fill_(2.0)
        norm.scale.fill_(0.5)
    expected = x / (x - 2).square().mean(dim=1, keepdim=True).sqrt() * torch.tensor(0.5).exp()
    torch.testing.assert_close(norm(x), expected)
    assert not torch.allclose(norm(x).norm(dim=1), norm(5 * x).norm(dim=1), rtol=0.01)


def test_attention_sums_to_one_over_the_frames_in_reach():
    torch.manual_seed(0)
    weights = zipformer.Weights(8, heads=2, head_width=4, reach=3)(randn(1, 12, 8))
    torch.testing.assert_close(weights.sum(dim=-1), torch.ones(1, 2, 12))
    places = torch.arange(12)
    inside = (places[:, None] - places).abs() <= 3
    assert (weights[0, :, inside] > 0).all()
    assert not weights[0, :, ~inside].any()


@pytest.mark.parametrize("frames", [1, 7, 8, 9])
def test_a_slower_stack_without_blocks_repeats_means_of_its_frames(frames):
    stack = zipformer.Stack(4, 2, [])
    with torch.no_grad():
        stack.share.fill_(1.0)
    x = randn(1, frames, 2)
    found = stack(x, randn(1, 1, 8))
    padded = torch.cat([x, x[:, -1:].expand(-1, -frames % 4, -1)], dim=1)
    expected = padded.unflatten(1, (-1, 4)).mean(dim=2).repeat_interleave(4, dim=1)[:, :frames]
    torch.testing.assert_close(found, expected)


def test_the_grid_is_the_hop_of_the_lowest_rate():
    separator = separators.build("zipformer", query_dim=QUERY_DIM, **TINY["zipformer"] | {"rates": [1, 4, 2]})
    assert separator.grid_samples == 4 * 48


@pytest.mark.parametrize("rates", [[], [3], [1, 0], [-2], [128]])
def test_rates_that_are_no_powers_of_two_are_refused(rates):
    with pytest.raises(ValueError, match="are not powers of 2 up to 64"):
        separators.build("zipformer", query_dim=QUERY_DIM, **TINY["zipformer"] | {"rates": rates})
