"""Conv-TasNet is torchaudio's network, for mixtures of any length and with masks that its own class does not offer."""

import pytest
import torch
from torchaudio.models import ConvTasNet

from pipeline.separators.conv_tasnet import Separator

TINY = {
    **{"sample_rate": 8000, "n_sources": 3, "window_ms": 2.75, "n_filters": 12, "bottleneck": 8, "hidden": 10},
    **{"layers": 2, "stacks": 2, "mask_activation": "softmax", "consistency": "none", "recompute": False},
}
lengths = pytest.mark.parametrize("samples", [1, 10, 11, 12, 999, 1000, 1001])


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def tiny(seed=0, **changes):
    torch.manual_seed(seed)
    return Separator(**TINY | changes)


def assert_close(found, expected, atol=1e-5):
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)


@pytest.mark.parametrize(
    ("sample_rate", "window_ms", "window_samples"), [(8000, 2.0, 16), (8000, 2.75, 22), (44100, 2.5, 110)]
)
@lengths
def test_sigmoid_masks_make_the_network_of_torchaudio(sample_rate, window_ms, window_samples, samples):
    """The window is a time: at another rate of the same entry it has other samples, an even number."""
    separator = tiny(mask_activation="sigmoid", sample_rate=sample_rate, window_ms=window_ms)
    theirs = ConvTasNet(
        num_sources=3,
        enc_kernel_size=window_samples,
        enc_num_feats=12,
        msk_num_feats=8,
        msk_num_hidden_feats=10,
        msk_num_layers=2,
        msk_num_stacks=2,
    )
    theirs.load_state_dict(separator.network.state_dict())
    mixture = randn(2, samples)
    assert_close(separator(mixture), theirs(mixture[:, None]), atol=1e-6)


@lengths
@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
@pytest.mark.parametrize("consistency", ["uniform", "magsq"])
def test_with_the_projection_the_estimates_add_up_to_the_mixture(samples, activation, consistency):
    mixture = randn(2, samples)
    assert_close(tiny(mask_activation=activation, consistency=consistency)(mixture).sum(dim=1), mixture)


@lengths
def test_softmax_masks_add_up_to_one_and_the_estimates_to_what_the_filters_keep(samples):
    separator, mixture = tiny(), randn(2, samples)
    estimates, masks = separator.separate(mixture)
    assert estimates.shape == (2, 3, samples)
    assert masks.shape == (2, 3, 12, -(-samples // 11) + 1)
    assert_close(masks.sum(dim=1), torch.ones_like(masks[:, 0]), atol=1e-6)
    padded = torch.nn.functional.pad(mixture, (0, -samples % 11))[:, None]
    kept = separator.network.decoder(separator.network.encoder(padded))[:, 0, :samples]
    assert_close(estimates.sum(dim=1), kept)
    assert torch.equal(separator(mixture), estimates)


def test_a_mask_of_one_source_passes_everything():
    mixture = randn(2, 1000)
    assert_close(tiny(n_sources=1, consistency="uniform")(mixture)[:, 0], mixture)
    assert (tiny(n_sources=1).separate(mixture)[1] == 1).all()


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_every_parameter_gets_a_gradient(activation):
    separator = tiny(mask_activation=activation)
    (separator(randn(2, 999)) * randn(2, 3, 999, seed=1)).sum().backward()
    assert [n for n, p in separator.named_parameters() if p.grad is None or not p.grad.any()] == []
    assert all(p.grad.isfinite().all() for p in separator.parameters())


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
@pytest.mark.parametrize("consistency", ["none", "uniform", "magsq"])
def test_silence_gives_silence_and_finite_gradients(activation, consistency):
    separator = tiny(mask_activation=activation, consistency=consistency)
    mixture = torch.zeros(2, 500, requires_grad=True)
    estimates = separator(mixture)
    estimates.abs().mean().backward()
    assert not estimates.any()
    assert mixture.grad.isfinite().all()
    assert all(p.grad.isfinite().all() for p in separator.parameters() if p.grad is not None)


def test_the_same_seed_is_the_same_separator_and_its_state_another_one():
    mixture = randn(2, 999)
    first, other = tiny(), tiny(seed=1)
    assert torch.equal(first(mixture), tiny()(mixture))
    assert not torch.equal(first(mixture), other(mixture))
    other.load_state_dict(first.state_dict())
    assert torch.equal(first(mixture), other(mixture))


def test_recomputing_changes_nothing_and_keeps_less():
    mixture, results, kept = randn(2, 999), [], []
    for recompute in (False, True):
        separator = tiny(recompute=recompute)
        sizes = {}

        def keep(tensor, sizes=sizes):
            sizes[id(tensor.untyped_storage())] = (tensor.untyped_storage(), tensor.untyped_storage().nbytes())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            estimates = separator(mixture)
        kept.append(sum(size for _, size in sizes.values()))
        estimates.square().sum().backward()
        results.append([estimates, *(p.grad for p in separator.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert kept[1] < 0.6 * kept[0]


def test_autocast_leaves_filters_and_masks_in_float32():
    separator, mixture = tiny(consistency="uniform"), randn(2, 999)
    plain = separator(mixture)
    with torch.autocast("cpu", torch.bfloat16):
        estimates, masks = separator.separate(mixture)
    assert estimates.dtype == masks.dtype == torch.float32
    assert_close(estimates.sum(dim=1), mixture)
    assert 0 < ((estimates - plain).norm() / plain.norm()).item() < 0.02


def test_one_batch_is_learned_by_heart():
    time = torch.arange(800) / 8000
    sources = torch.stack([(2 * torch.pi * hz * time).sin() for hz in (500.0, 2200.0)])[None]
    separator = tiny(n_sources=2, consistency="uniform")
    optimizer = torch.optim.AdamW(separator.parameters(), 1e-2)
    losses = []
    for _ in range(100):
        loss = (separator(sources.sum(dim=1)) - sources).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 10


def test_the_size_of_the_full_model():
    with torch.device("meta"):
        full = Separator(
            **TINY | {"n_sources": 8, "window_ms": 2.0, "n_filters": 512, "bottleneck": 128, "hidden": 512},
        )
        block = sum(p.numel() for p in full.network.mask_generator.conv_layers[0].parameters())
        rest = sum(p.numel() for p in full.parameters()) - 4 * block
    assert round((rest + 24 * block) / 1e6, 2) == 5.38


@pytest.mark.parametrize("window_ms", [0.0, -1.0, 0.1])
def test_windows_that_cannot_overlap_by_half_are_refused(window_ms):
    with pytest.raises(ValueError, match=f"window_ms {window_ms} is less than two samples at 8000 Hz"):
        tiny(window_ms=window_ms)
