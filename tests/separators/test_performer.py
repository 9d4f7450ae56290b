"""The Performer separator shares the mixture out, and its pretraining hides and predicts what it says."""

import copy
import math

import pytest
import torch

from pipeline.nn.features import stft
from pipeline.separators import performer
from pipeline.separators.performer import Pretrainer, Separator, statistics

TINY = {
    **{"sample_rate": 8000, "n_sources": 3, "front_end": "stft", "norm": "zscore", "n_fft": 64, "hop_length": 16},
    **{"patch_frames": 1, "dim": 16, "depth": 2, "heads": 2, "mlp_ratio": 2.0, "dropout": 0.0, "attention": "favor"},
    **{"n_features": 16, "stabiliser": "full", "eps": 1e-8, "qk_norm": True, "recompute": False},
    **{"mask_activation": "softmax", "consistency": "none"},
}
each_front_end = pytest.mark.parametrize("front_end", ["stft", "conv"])
each_patch = pytest.mark.parametrize("patch_frames", [1, 3])
each_mode = pytest.mark.parametrize("mask_mode", ["token", "zero", "noise", "drop"])


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0):
    return torch.randn(shape, generator=generator(seed))


def tiny(seed=0, **changes):
    torch.manual_seed(seed)
    return Separator(**TINY | changes)


def tones(samples=1024):
    """Two sines per item, of frequencies that a masked frame's neighbours tell."""
    time = torch.arange(samples) / 8000
    hz = torch.tensor([[300.0, 1500.0], [700.0, 2500.0], [1100.0, 3100.0], [450.0, 2000.0]])
    return 0.3 * (2 * math.pi * hz[..., None] * time).sin().sum(dim=1)


def assert_close(found, expected, atol=1e-5):
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)


@each_front_end
@each_patch
@pytest.mark.parametrize("samples", [1, 32, 33, 63, 999, 1000, 1024])
def test_softmax_masked_estimates_add_up_to_the_mixture_of_any_length(front_end, patch_frames, samples):
    mixture = randn(2, samples)
    estimates, masks = tiny(front_end=front_end, patch_frames=patch_frames).separate(mixture)
    assert estimates.shape == (2, 3, samples)
    assert masks.shape == (2, 3, 33, max(samples, 33) // 16 + 1)
    assert_close(estimates.sum(dim=1), mixture)
    assert_close(masks.sum(dim=1), torch.ones_like(masks[:, 0]), atol=1e-6)


@pytest.mark.parametrize("consistency", ["uniform", "magsq"])
@pytest.mark.parametrize("samples", [1, 999])
def test_the_projection_makes_sigmoid_masked_estimates_add_up(consistency, samples):
    mixture = randn(2, samples)
    assert_close(tiny(mask_activation="sigmoid", consistency=consistency)(mixture).sum(dim=1), mixture)
    assert not torch.allclose(tiny(mask_activation="sigmoid")(mixture).sum(dim=1), mixture, atol=1e-3)


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
@pytest.mark.parametrize("n_sources", [1, 2, 8])
def test_masks_start_near_equal_shares_but_not_equal(activation, n_sources):
    masks = tiny(mask_activation=activation, n_sources=n_sources).separate(randn(2, 999))[1]
    if n_sources == 1:
        if activation == "softmax":
            assert (masks == 1).all()
        else:
            assert_close(masks, torch.full_like(masks, 0.5), atol=0.3)
            assert masks.std() > 0.001
        return
    assert_close(masks, torch.full_like(masks, 1 / n_sources), atol=0.6 / n_sources)
    assert abs(masks.mean() * n_sources - 1) < 0.03
    assert (masks[:, 0] - masks[:, 1]).abs().mean() > 0.01 / n_sources


def test_the_masks_returned_are_those_applied():
    separator, mixture = tiny(), randn(2, 1024)
    estimates, masks = separator.separate(mixture)
    spectrum = stft(mixture, n_fft=64, hop_length=16)
    masked = masks[:, 1].transpose(1, 2) * spectrum
    window = torch.hann_window(64)
    expected = torch.istft(masked.transpose(1, 2), 64, 16, window=window, length=1024)
    assert_close(estimates[:, 1], expected, atol=1e-6)
    assert torch.equal(separator(mixture), estimates)


@each_patch
def test_a_patch_of_frames_has_their_masks_side_by_side(patch_frames):
    separator = tiny(patch_frames=patch_frames)
    frame, source, bin_ = 4, 1, 7
    with torch.no_grad():
        row = ((frame % patch_frames) * 3 + source) * 33 + bin_
        separator.head.bias[row] = 100.0
    masks = separator.separate(randn(1, 999))[1][0]
    full = masks[source, bin_] > 0.999
    assert full.nonzero()[:, 0].tolist() == list(range(frame % patch_frames, masks.shape[2], patch_frames))
    assert (masks > 0.999).sum() == full.sum()


def test_features_are_log_magnitudes_brought_to_scale():
    separator, waveform = tiny(), 0.3 * randn(2, 999)
    expected = torch.log1p(100 * stft(waveform, n_fft=64, hop_length=16).abs())
    assert_close(separator.log_magnitude(waveform), expected, atol=1e-4)
    mean, std = statistics(separator, [waveform[:1], waveform[1:]])
    separator.set_statistics(mean, std)
    normalised = separator.normalised(waveform).flatten(0, 1)
    assert_close(normalised.mean(dim=0), torch.zeros(33), atol=1e-4)
    assert_close(normalised.std(dim=0, correction=0), torch.ones(33), atol=1e-4)


def test_minmax_brings_the_training_data_between_zero_and_one():
    separator, waveform = tiny(norm="minmax"), 0.3 * randn(2, 999)
    separator.set_statistics(*statistics(separator, [waveform]))
    normalised = separator.normalised(waveform)
    assert normalised.min() == 0
    assert_close(normalised.max(), torch.tensor(1.0), atol=1e-6)
    separator = tiny(norm="none")
    separator.set_statistics(*statistics(separator, [waveform]))
    assert torch.equal(separator.normalised(waveform), separator.log_magnitude(waveform))


def test_statistics_of_nothing_are_refused_and_empty_bins_are_not_blown_up():
    separator = tiny()
    with pytest.raises(ValueError, match="no waveforms"):
        statistics(separator, [])
    separator.set_statistics(*statistics(separator, [torch.zeros(1, 500)]))
    assert (separator.std == performer.MIN_STD).all()
    assert separator(torch.zeros(1, 500)).isfinite().all()


@each_front_end
@each_patch
@pytest.mark.parametrize("attention", ["favor", "sdpa"])
def test_every_parameter_gets_a_gradient(front_end, patch_frames, attention):
    separator = tiny(front_end=front_end, patch_frames=patch_frames, attention=attention)
    (separator(randn(2, 999)) * randn(2, 3, 999, seed=1)).sum().backward()
    assert [n for n, p in separator.named_parameters() if p.grad is None or not p.grad.any()] == []
    assert all(p.grad.isfinite().all() for p in separator.parameters())


@each_front_end
@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
@pytest.mark.parametrize("consistency", ["none", "uniform", "magsq"])
def test_silence_gives_silence_and_finite_gradients(front_end, activation, consistency):
    separator = tiny(front_end=front_end, mask_activation=activation, consistency=consistency)
    mixture = torch.zeros(2, 500, requires_grad=True)
    estimates = separator(mixture)
    estimates.abs().mean().backward()
    assert not estimates.any()
    assert mixture.grad.isfinite().all()
    assert all(p.grad.isfinite().all() for p in separator.parameters() if p.grad is not None)


def test_the_same_seed_is_the_same_separator_and_its_state_another_one():
    mixture = randn(2, 999)
    first, again, other = tiny().eval(), tiny().eval(), tiny(seed=1).eval()
    first.set_statistics(randn(33), randn(33).abs())
    again.set_statistics(randn(33), randn(33).abs())
    first.redraw(1000, 3)
    again.redraw(1000, 3)
    assert torch.equal(first(mixture), again(mixture))
    assert not torch.equal(first(mixture), other(mixture))
    other.load_state_dict(first.state_dict())
    assert torch.equal(first(mixture), other(mixture))


def test_recomputing_changes_nothing():
    mixture, gradients = randn(2, 999), []
    for recompute in (False, True):
        separator = tiny(recompute=recompute)
        separator(mixture).square().sum().backward()
        gradients.append([p.grad for p in separator.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@each_front_end
def test_autocast_leaves_transform_and_masks_in_float32(front_end):
    separator, mixture = tiny(front_end=front_end).eval(), randn(2, 999)
    plain = separator(mixture)
    with torch.autocast("cpu", torch.bfloat16):
        estimates, masks = separator.separate(mixture)
    assert estimates.dtype == masks.dtype == torch.float32
    assert_close(estimates.sum(dim=1), mixture)
    assert 0 < ((estimates - plain).norm() / plain.norm()).item() < 0.01


def test_one_batch_is_learned_by_heart():
    time = torch.arange(800) / 8000
    sources = torch.stack([(2 * math.pi * hz * time).sin() for hz in (500.0, 2200.0)])[None]
    separator = tiny(n_sources=2)
    optimizer = torch.optim.AdamW(separator.parameters(), 1e-2)
    losses = []
    for _ in range(60):
        loss = (separator(sources.sum(dim=1)) - sources).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 10


def test_the_size_of_the_full_model():
    full = TINY | {"n_sources": 8, "n_fft": 1024, "hop_length": 256, "dim": 512, "depth": 1, "heads": 8}
    torch.manual_seed(0)
    separator = Separator(**full | {"mlp_ratio": 4.0, "n_features": 256, "qk_norm": False})
    sizes = {name: p.numel() for name, p in separator.named_parameters()}
    block = sum(n for name, n in sizes.items() if name.startswith("encoder.blocks.0."))
    assert round((12 * block + 1024) / 1e6, 1) == 37.8
    assert round((12 * block + 1024 + sum(sizes.values()) - block - 1024) / 1e6, 1) == 40.2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_fft": 65}, "n_fft 65 is odd"),
        ({"hop_length": 25}, "hop_length 25 is not between 1 and 3/8 of n_fft 64"),
        ({"heads": 3}, r"dim 16 must be even and a multiple of heads \(3\)"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        tiny(**changes)


@pytest.mark.parametrize("mask_ratio", [0.3, 0.75])
@pytest.mark.parametrize("mask_span", [1, 8])
@pytest.mark.parametrize("tokens", [2, 7, 100])
def test_the_asked_share_of_tokens_is_hidden_in_every_item(mask_ratio, mask_span, tokens):
    hidden = Pretrainer(tiny(), mask_ratio=mask_ratio, mask_span=mask_span).draw(5, tokens, generator())
    expected = min(max(round(mask_ratio * tokens), 1), tokens - 1)
    assert (hidden.sum(dim=1) == expected).all()


def test_hidden_tokens_come_in_spans_and_everywhere_alike():
    pretrainer = Pretrainer(tiny(), mask_span=8)
    hidden = pretrainer.draw(4000, 101, generator())
    begins = (hidden[:, 1:] & ~hidden[:, :-1]).sum(dim=1) + hidden[:, 0]
    assert begins.max() <= 6  # of 30 tokens: three whole spans, two cut by the ends, one that was only begun
    assert_close(hidden.float().mean(dim=0), torch.full((101,), 30 / 101), atol=0.04)
    assert torch.equal(pretrainer.draw(3, 101, generator(4)), pretrainer.draw(3, 101, generator(4)))
    assert not torch.equal(pretrainer.draw(3, 101, generator(4)), pretrainer.draw(3, 101, generator(5)))
    assert Pretrainer(tiny(patch_frames=3), mask_span=8).span_tokens == 3


@each_mode
@pytest.mark.parametrize("target", ["logmag", "wave"])
@pytest.mark.parametrize("loss_on", ["masked", "all"])
def test_the_loss_is_the_mean_square_of_what_is_asked(mask_mode, target, loss_on):
    pretrainer = Pretrainer(tiny(), mask_mode=mask_mode, target=target, loss_on=loss_on)
    with torch.no_grad():
        pretrainer.decoder.weight.zero_()
        pretrainer.decoder.bias.zero_()
    waveform = randn(2, 999)
    frames = pretrainer.targets(waveform).square().mean(dim=-1)
    hidden = pretrainer.draw(2, frames.shape[1], generator(3))
    expected = frames.mean() if loss_on == "all" else frames[hidden].mean()
    assert_close(pretrainer(waveform, generator(3)), expected)


@each_patch
@pytest.mark.parametrize("samples", [64, 999])
def test_targets_are_fixed_data_of_each_frame(patch_frames, samples):
    separator, waveform = tiny(patch_frames=patch_frames), randn(2, samples)
    separator.set_statistics(randn(33), randn(33).abs() + 0.5)
    assert torch.equal(Pretrainer(separator).targets(waveform), separator.normalised(waveform))
    wave = Pretrainer(separator, target="wave").targets(waveform)
    assert wave.shape == (2, samples // 16 + 1, 64)
    assert_close(wave[:, 2], waveform[:, :64], atol=0)  # the third frame is centred at sample 32
    spectrum = torch.fft.rfft(wave * torch.hann_window(64))
    assert_close(spectrum.abs(), stft(waveform, n_fft=64, hop_length=16).abs(), atol=1e-4)


@each_mode
def test_hidden_tokens_do_not_reach_the_prediction(mask_mode):
    pretrainer = Pretrainer(tiny(), mask_mode=mask_mode).eval()
    tokens = randn(2, 40, 16)
    hidden = pretrainer.draw(2, 40, generator())
    changed = torch.where(hidden[..., None], tokens.flip(0).flip(1), tokens)
    out, other = (pretrainer._encode(t, hidden, generator(1)) for t in (tokens, changed))
    assert torch.equal(out, other)
    nudged = torch.where(hidden[..., None], tokens, tokens.roll(1, dims=2))
    assert (pretrainer._encode(nudged, hidden, generator(1)) - out)[hidden].abs().max() > 1e-4


@pytest.mark.parametrize(
    ("mask_mode", "patch_frames", "front_end"),
    [("token", 1, "stft"), ("token", 3, "conv"), ("zero", 1, "conv"), ("noise", 3, "stft"), ("drop", 1, "stft")],
)
def test_pretraining_learns_in_a_few_steps(mask_mode, patch_frames, front_end):
    separator = tiny(front_end=front_end, patch_frames=patch_frames, depth=1)
    waveform = tones()
    separator.set_statistics(*statistics(separator, [waveform]))
    pretrainer = Pretrainer(separator, mask_mode=mask_mode, mask_span=4)
    optimizer = torch.optim.AdamW(pretrainer.parameters(), 1e-2)
    draws, losses = generator(), []
    for _ in range(40):
        loss = pretrainer(waveform, draws)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])
    without = [n for n, p in pretrainer.named_parameters() if p.grad is None]
    assert without == ["separator.head.weight", "separator.head.bias"]


@each_mode
@pytest.mark.parametrize("target", ["logmag", "wave"])
def test_the_pretraining_loss_is_deterministic_and_float32_under_autocast(mask_mode, target):
    pretrainer = Pretrainer(tiny(), mask_mode=mask_mode, target=target)
    waveform = randn(2, 999)
    plain = pretrainer(waveform, generator(2))
    assert torch.equal(pretrainer(waveform, generator(2)), plain)
    with torch.autocast("cpu", torch.bfloat16):
        found = pretrainer(waveform, generator(2))
    assert found.dtype == torch.float32
    assert abs(found / plain - 1) < 0.02


@each_front_end
@each_mode
def test_what_is_pretrained_is_loaded_and_the_head_stays_new(front_end, mask_mode):
    pretrained = tiny(front_end=front_end)
    pretrained.set_statistics(randn(33), randn(33).abs() + 0.5)
    state = copy.deepcopy(Pretrainer(pretrained, mask_mode=mask_mode).encoder_state())
    assert not [name for name in state if name.startswith("head")]
    assert {"mean", "std", "encoder.norm.weight", "encoder.blocks.1.attention.projection"} <= state.keys()
    separator = tiny(seed=1, front_end=front_end, n_sources=2)
    head = separator.head.weight.clone()
    separator.load_pretrained(state)
    waveform = randn(2, 999)
    assert torch.equal(separator.tokens(waveform), pretrained.tokens(waveform))
    assert torch.equal(separator.encoder(separator.tokens(waveform)), pretrained.encoder(pretrained.tokens(waveform)))
    assert torch.equal(separator.head.weight, head)


def test_what_does_not_fit_is_not_loaded():
    state = Pretrainer(tiny()).encoder_state()
    with pytest.raises(ValueError, match=r"without \['mean'\], with \['meen'\]"):
        tiny().load_pretrained({("meen" if name == "mean" else name): t for name, t in state.items()})
    with pytest.raises(ValueError, match=r"with \['head.bias'\]"):
        tiny().load_pretrained(state | {"head.bias": torch.zeros(99)})
    with pytest.raises(ValueError, match=r"attention.projection has the shape \[16, 8\], and not \[12, 8\]"):
        tiny(n_features=12).load_pretrained(state)
    with pytest.raises(ValueError, match=r"without \[\], with \['encoder.blocks.0.attention.projection'"):
        tiny(attention="sdpa").load_pretrained(state)


def test_pretraining_arguments_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match=r"mask_ratio 1\.0 is not between 0 and 1"):
        Pretrainer(tiny(), mask_ratio=1.0)
    with pytest.raises(ValueError, match="mask_span 0 is not at least 1 frame"):
        Pretrainer(tiny(), mask_span=0)
    with pytest.raises(ValueError, match="1 token: there is nothing to predict"):
        Pretrainer(tiny(patch_frames=8))(randn(1, 50), generator())
