"""ResUNet's bottleneck: the published one is what it was, and the dual-path one hears all frames."""

import pytest
import torch

from pipeline import separators
from pipeline.separators import resunet
from tests.separators.test_separators import QUERY_DIM, TINY, randn, relative


def built(**options):
    torch.manual_seed(0)
    return separators.build("resunet", query_dim=QUERY_DIM, **TINY["resunet"] | options)


def test_the_published_bottleneck_is_the_default_to_the_bit():
    ours, default = built(bottleneck="conv").state_dict(), built().state_dict()
    assert ours.keys() == default.keys()
    assert all(torch.equal(tensor, default[name]) for name, tensor in ours.items())
    assert not any("gru" in name for name in default)


@pytest.mark.parametrize("samples", [1, 999, 4097])
def test_an_estimate_is_as_long_as_its_mixture(samples):
    estimate = built(bottleneck="dprnn").eval()(randn(2, samples), randn(2, QUERY_DIM))
    assert estimate.shape == (2, samples)
    assert estimate.isfinite().all()


def test_every_parameter_gets_a_gradient():
    separator = built(bottleneck="dprnn", n_fft=256)  # which has two bins at the bottom
    separator(randn(2, 6000), randn(2, QUERY_DIM)).square().mean().backward()
    assert [n for n, p in separator.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_it_is_a_gru_over_bins_and_then_one_over_frames():
    torch.manual_seed(0)
    block = resunet.DualPath(4, QUERY_DIM, 0.1).eval()
    x, query = randn(2, 4, 5, 3), randn(2, QUERY_DIM)
    h = block.pres[0](x, query)
    over_bins = torch.stack([block.leaves[0](block.grus[0](h[:, :, f].transpose(1, 2))[0]) for f in range(5)], dim=2)
    x1 = x + over_bins.permute(0, 3, 2, 1)
    h = block.pres[1](x1, query)
    over_time = torch.stack([block.leaves[1](block.grus[1](h[..., b].transpose(1, 2))[0]) for b in range(3)], dim=3)
    torch.testing.assert_close(block(x, query), x1 + over_time.transpose(1, 2), rtol=1e-4, atol=1e-5)


def test_a_query_of_each_window_steers_its_own_frames():
    torch.manual_seed(0)
    block = resunet.DualPath(4, QUERY_DIM, 0.1).eval()
    x, one, other = randn(1, 4, 6, 3), randn(1, QUERY_DIM, seed=1), randn(1, QUERY_DIM, seed=2)
    alike, mixed = block(x, torch.stack([one, one], dim=1)), block(x, torch.stack([one, other], dim=1))
    torch.testing.assert_close(alike, block(x, one))
    assert relative(mixed[:, :, 0], alike[:, :, 0]) < 0.5 * relative(mixed[:, :, 5], alike[:, :, 5])


def test_an_unknown_bottleneck_is_refused_by_the_params():
    params = separators.model_params("resunet")
    assert params(**TINY["resunet"], bottleneck="dprnn").bottleneck == "dprnn"
    with pytest.raises(ValueError, match="bottleneck"):
        params(**TINY["resunet"], bottleneck="lstm")
