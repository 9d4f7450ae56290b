"""Mask metrics against numbers that can be worked out by hand, and the golden files of test_losses.py."""

import pytest
import torch

from pipeline.evaluation.masks import effective_sources, mask_energies, mask_overlap, signal_energies
from pipeline.nn.losses import diversity_loss
from tests.golden.fill import arrays


@pytest.mark.parametrize("n_sources", [4, 8])
def test_agree_with_their_golden_numbers(n_sources):
    golden = arrays(f"mixit_n{n_sources}")
    torch.testing.assert_close(mask_overlap(golden["masks"]), golden["overlap"], rtol=0, atol=1e-8)
    found = effective_sources(mask_energies(golden["masks"]))
    torch.testing.assert_close(found, golden["eff_masks"], rtol=0, atol=1e-8)


def test_overlap_is_the_diversity_loss():
    masks = torch.rand(3, 5, 7, 11, generator=torch.Generator().manual_seed(0))
    masks[1, 2] = 0
    masks[2, :, 0, 0] = -1
    torch.testing.assert_close(mask_overlap(masks).float(), diversity_loss(masks))


def test_independent_uniform_masks_overlap_by_three_quarters():
    masks = torch.rand(1, 4, 200, 200, generator=torch.Generator().manual_seed(0))
    assert mask_overlap(masks).item() == pytest.approx(0.75, abs=0.005)
    assert mask_overlap(masks[:, :1].expand(1, 4, 200, 200)).item() == pytest.approx(1)
    assert mask_overlap(torch.eye(4).view(1, 4, 2, 2)).item() == 0
    assert mask_overlap(masks[:, :1]).isnan()


def test_effective_sources_counts_the_equal_ones():
    energies = torch.tensor([[1.0, 1, 1, 1], [0, 3, 3, 0], [0, 0, 0, 9], [0, 0, 0, 0]])
    assert effective_sources(energies).tolist() == pytest.approx([4, 2, 1, float("nan")], nan_ok=True)
    # Shares of 0.9 and 0.1 have an entropy of 0.325 nats.
    assert effective_sources(torch.tensor([[0.9, 0.1]])).item() == pytest.approx(1.3841, abs=1e-4)


def test_energies_are_mean_squares():
    waveform = torch.tensor([[[3.0, -3], [1, 0]]])
    assert signal_energies(waveform).tolist() == [[9, 0.5]]
    assert mask_energies(waveform[..., None]).tolist() == [[9, 0.5]]
