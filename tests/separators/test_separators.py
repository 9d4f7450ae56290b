"""Separators: every file of the folder does what the contract says, and ResUNet30 is the published network."""

import functools
import hashlib

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pipeline import separators
from pipeline.separators import Batch, bandsplit, resunet
from tests.golden import fill

QUERY_DIM = 6
FEATURES = {
    **{"upstream": "mae", "freeze_mae": False, "mae_input": "crop", "layers": "last", "repeat": "interleave"},
    **{"fusion_options": {}, "lora_rank": 0, "encoder_learning_rate": 1e-4, "encoder_weight_decay": 5e-4},
    **{"layer_decay": 0.75, "unfreeze_step": 0, "drop_path": 0.0, "bf16_frozen": False, "context": "anchor"},
    "upstream_config": {"mae_input": "crop", "dim": 16, "depth": 2, "heads": 2},
}
# The smallest sensible `model:` of each file; a new file needs a line here.
TINY = {
    "bandsplit": {
        **{"n_fft": 128, "hop_length": 48, "bands": 4, "width": 8, "layers": 1, "frame_hidden": 16},
        **{"recurrent_hidden": 8, "mask_hidden": 16, "query_hidden": 8},
    },
    "gru": {
        **{"n_fft": 128, "hop_length": 48, "width": 16, "hidden": 16, "layers": 2, "mask_hidden": 16},
        **{"query_hidden": 8},
    },
    "resunet": {"n_fft": 128, "hop_length": 48, "channels": [4, 4, 4, 4, 4, 4]},
    "zipformer": {
        **{"n_fft": 128, "hop_length": 48, "rates": [1, 2, 1], "blocks": 1, "width": 16, "hidden": 16, "heads": 2},
        **{"head_width": 8, "reach": 8, "mask_hidden": 16, "query_hidden": 8},
    },
}
UNET = {"n_fft": 1024, "hop_length": 320, "channels": [4, 4, 4, 4, 4, 4], "norm_momentum": 0.1, "phase_bias": 1.0}
TINY["mae_resunet"] = {"body": UNET, **FEATURES, "fusion": "freq"}
TINY["mae_bandsplit"] = {"body": TINY["bandsplit"], **FEATURES, "fusion": "frames"}

# Of those without queries.
TINY_BLIND = {
    "performer": {
        **{"n_sources": 3, "front_end": "stft", "norm": "none", "n_fft": 128, "hop_length": 32, "patch_frames": 1},
        **{"dim": 16, "depth": 1, "heads": 2, "mlp_ratio": 2.0, "dropout": 0.0, "attention": "favor", "n_features": 16},
        **{"stabiliser": "full", "eps": 1e-8, "qk_norm": True, "recompute": False},
        **{"mask_activation": "softmax", "consistency": "none"},
    },
    "conv_tasnet": {
        **{"n_sources": 3, "window_ms": 2.0, "n_filters": 16, "bottleneck": 8, "hidden": 16, "layers": 2},
        **{"stacks": 1, "mask_activation": "softmax", "consistency": "uniform", "recompute": False},
    },
}

each_separator = pytest.mark.parametrize("name", [name for name in separators.names() if separators.takes_query(name)])
each_levelled_separator = pytest.mark.parametrize("name", ["bandsplit", "gru", "zipformer"])
each_blind_separator = pytest.mark.parametrize("name", [n for n in separators.names() if not separators.takes_query(n)])


def tiny(name, seed=0, **options):
    torch.manual_seed(seed)
    return separators.build(name, query_dim=QUERY_DIM, **TINY[name], **options)


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def relative(estimate, reference):
    return ((estimate - reference).norm() / reference.norm()).item()


def test_an_unknown_separator_is_refused_with_the_known_ones():
    with pytest.raises(
        ValueError,
        match=r"no separator 'resnet'; there are \['bandsplit', 'conv_tasnet', 'gru', 'mae_bandsplit', 'mae_resunet', ",
    ):
        separators.build("resnet", query_dim=1)


def tiny_blind(name, seed=0):
    torch.manual_seed(seed)
    return separators.build_blind(name, sample_rate=8000, **TINY_BLIND[name])


@each_blind_separator
@pytest.mark.parametrize("samples", [1, 64, 65, 999, 4097])
def test_without_a_query_all_sources_come_at_once_and_add_up_to_the_mixture(name, samples):
    mixture = randn(2, samples)
    separator = tiny_blind(name).eval()
    estimates, masks = separator.separate(mixture)
    assert estimates.shape == (2, 3, samples)
    assert masks.shape[:2] == (2, 3)
    assert masks.ndim == 4
    torch.testing.assert_close(estimates.sum(dim=1), mixture, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(separator(mixture), estimates)


@each_blind_separator
def test_without_a_query_every_parameter_gets_a_gradient(name):
    separator = tiny_blind(name)
    separator(randn(2, 3000))[:, 0].square().mean().backward()
    assert [n for n, p in separator.named_parameters() if p.grad is None or not p.grad.any()] == []


@each_blind_separator
def test_without_a_query_silence_is_silent_and_has_finite_gradients(name):
    separator = tiny_blind(name)
    estimates = separator(torch.zeros(2, 3000))
    estimates.abs().mean().backward()
    assert estimates.abs().max() < 1e-6
    assert [n for n, p in separator.named_parameters() if p.grad is not None and not p.grad.isfinite().all()] == []


@each_blind_separator
def test_its_params_are_its_arguments_but_the_rate_of_the_data(name):
    params = separators.model_params(name)
    assert "sample_rate" not in params.model_fields
    assert params(**TINY_BLIND[name]).model_dump() == TINY_BLIND[name]


@each_separator
@pytest.mark.parametrize("samples", [1, 64, 65, 999, 4096, 4097])
def test_an_estimate_is_as_long_as_its_mixture(name, samples):
    estimate = tiny(name).eval()(randn(2, samples), randn(2, QUERY_DIM))
    assert estimate.shape == (2, samples)
    assert estimate.isfinite().all()


@each_separator
def test_every_parameter_gets_a_gradient(name):
    separator = tiny(name)
    with torch.no_grad():
        for parameter in separator.parameters():
            if not parameter.any():  # a layer that begins as nothing holds the gradient back from what is before it
                parameter.normal_(std=0.1)
    separator(randn(2, 3000), randn(2, QUERY_DIM)).square().mean().backward()
    assert [
        n for n, p in separator.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())
    ] == []


@each_separator
@pytest.mark.parametrize("training", [True, False])
def test_silence_gives_silence_and_finite_gradients(name, training):
    separator = tiny(name).train(training)
    mixture = torch.zeros(2, 3000, requires_grad=True)
    estimate = separator(mixture, randn(2, QUERY_DIM))
    estimate.abs().mean().backward()
    assert not estimate.any()
    assert mixture.grad.isfinite().all()
    assert [n for n, p in separator.named_parameters() if p.grad is not None and not p.grad.isfinite().all()] == []


@each_separator
def test_two_queries_give_two_estimates(name):
    mixture = randn(1, 3000).expand(2, -1)
    one, other = tiny(name).eval()(mixture, randn(2, QUERY_DIM))
    assert relative(one, other) > 1e-3


@each_separator
def test_an_estimate_does_not_depend_on_its_batch(name):
    separator, mixture, query = tiny(name).eval(), randn(3, 3000), randn(3, QUERY_DIM)
    alone = torch.cat([separator(m[None], q[None]) for m, q in zip(mixture, query, strict=True)])
    torch.testing.assert_close(separator(mixture, query), alone, rtol=1e-4, atol=1e-6)


def tones_and_queries():
    """Two tones, whose queries differ; each is asked for once."""
    time = torch.arange(1440) / 32000
    tones = torch.sin(2 * torch.pi * torch.tensor([[1500.0], [6000.0]]) * time)
    return tones.sum(dim=0).expand(2, -1), torch.eye(QUERY_DIM)[:2], tones


@pytest.mark.slow
@each_separator
def test_one_batch_is_learned_by_heart(name):
    separator = tiny(name)
    mixture, query, target = tones_and_queries()
    optimizer = torch.optim.Adam(separator.parameters(), 1e-2)
    losses = []
    for _ in range(200):
        optimizer.zero_grad()
        loss = (separator(mixture, query) - target).abs().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0], losses[::20]


@each_separator
def test_training_is_the_same_to_the_bit(name):
    def run():
        separator = tiny(name)
        mixture, query, target = tones_and_queries()
        optimizer = torch.optim.Adam(separator.parameters(), 1e-2)
        for _ in range(5):
            optimizer.zero_grad()
            (separator(mixture, query) - target).abs().mean().backward()
            optimizer.step()
        return torch.cat([tensor.flatten().double() for tensor in separator.state_dict().values()])

    assert torch.equal(run(), run())


@each_separator
def test_bfloat16_autocast_is_close_to_float32(name):
    separator, mixture, query = tiny(name), randn(2, 3000), randn(2, QUERY_DIM)
    exact = separator(mixture, query)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = separator(mixture, query)
    assert rounded.dtype == torch.float32
    assert 0 < relative(rounded, exact) < 0.08
    rounded.square().mean().backward()
    trained = [(n, p.grad) for n, p in separator.named_parameters() if p.requires_grad]
    assert [n for n, gradient in trained if gradient is None or not gradient.isfinite().all()] == []


@each_separator
def test_a_query_of_another_batch_size_is_refused(name):
    with pytest.raises(TypeError, match="query"):
        tiny(name)(randn(2, 3000), randn(3, QUERY_DIM))


# What else sounds


@each_separator
def test_what_else_sounds_may_be_given_row_by_row(name):
    separator = tiny(name, interferer_query=True).eval()
    torch.nn.init.normal_(separator.not_given)
    mixture, query, other = randn(3, 3000), randn(3, QUERY_DIM, seed=1), randn(3, QUERY_DIM, seed=2)
    without = separator(mixture, separator.joint_query(query))
    told = separator(mixture, separator.joint_query(query, other))
    given = torch.tensor([True, False, True])
    some = separator(mixture, separator.joint_query(query, other, given))
    expected = torch.where(given[:, None], told, without)
    torch.testing.assert_close(some, expected, rtol=1e-4, atol=1e-6)
    assert min(relative(a, b) for a, b in zip(told, without, strict=True)) > 1e-3


@each_separator
def test_training_reaches_the_vector_of_what_is_not_given(name):
    separator = tiny(name, interferer_query=True)
    mixture, query = randn(2, 3000), randn(2, QUERY_DIM)
    part = slice(0, 3000)
    for given, learns in (([True, False], True), ([True, True], False)):
        separator.zero_grad()
        batch = Batch(mixture, part, mixture / 2, query, query.flip(0), torch.tensor(given))
        separator.losses(batch, ["l1"])["l1"].backward()
        assert bool(separator.not_given.grad.any()) == learns


@each_separator
def test_a_separator_of_one_query_takes_no_other(name):
    separator, query = tiny(name), randn(2, QUERY_DIM)
    assert torch.equal(separator.joint_query(query), query)
    with pytest.raises(ValueError, match=r"train\.interferer_query"):
        separator.joint_query(query, query)
    assert "not_given" not in separator.state_dict()


# Of a level of 1


@each_levelled_separator
@pytest.mark.parametrize("gain", [2.0**-10, 8.0])
def test_a_louder_mixture_gives_the_same_estimate_louder_to_the_bit(name, gain):
    separator, mixture, query = tiny(name).eval(), randn(2, 3000), randn(2, QUERY_DIM)
    assert torch.equal(separator(gain * mixture, query), gain * separator(mixture, query))


@each_levelled_separator
def test_a_levelled_network_begins_with_about_half_of_the_mixture(name):
    mixture = randn(2, 30 * 48)
    estimate = tiny(name).eval()(mixture, randn(2, QUERY_DIM))
    assert relative(estimate, mixture / 2) < 0.3  # white noise, of which a hundredth is at Nyquist


@each_levelled_separator
def test_in_a_long_recording_what_is_far_changes_nothing(name):
    separator = tiny(name).eval()
    separator.segment_samples = 960
    mixture, query = randn(1, 9600), randn(1, QUERY_DIM)
    louder = torch.cat([mixture[:, :4800], 30 * mixture[:, 4800:]], dim=1)
    near = slice(0, 960)
    with torch.inference_mode():
        assert relative(separator(louder, query)[:, near], separator(mixture, query)[:, near]) < 0.05


# Band-split


@pytest.mark.parametrize("sizes", [{}, {"recurrent_hidden": 0}, {"layers": 2, "bands": 8, "n_fft": 256}])
def test_every_bin_below_nyquist_is_in_one_band(sizes):
    separator = bandsplit.Separator(query_dim=QUERY_DIM, **TINY["bandsplit"] | sizes)
    assert sum(separator.widths) * separator.group == separator.n_fft // 2
    assert separator(randn(1, 999), randn(1, QUERY_DIM)).shape == (1, 999)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bands": 6}, "bands 6 is not a positive multiple of 4"),
        ({"bands": 32}, "n_fft 128 is not a multiple of 8 x 32 bands"),
        ({"hop_length": 65}, "hop_length 65 is not between 1 and half of n_fft 128"),
    ],
)
def test_bands_that_do_not_fit_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        bandsplit.Separator(query_dim=2, **TINY["bandsplit"] | change)


# ResUNet30


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"channels": [4, 4, 4]}, r"channels has 3 widths \[4, 4, 4\]; there are 6 encoders"),
        ({"n_fft": 100}, "n_fft 100 is not a multiple of 128"),
        ({"hop_length": 49}, "hop_length 49 is not between 1 and 3/8 of n_fft 128"),
        ({"hop_length": 0}, "hop_length 0 is not"),
    ],
)
def test_a_size_that_does_not_fit_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        resunet.Separator(query_dim=2, **(TINY["resunet"] | change))


@pytest.mark.parametrize("in_channels", [1, 2])
def test_a_pointwise_product_is_a_convolution(in_channels):
    torch.manual_seed(0)
    ours, theirs = resunet.Pointwise(in_channels, 8), nn.Conv2d(in_channels, 8, 1)
    theirs.load_state_dict(ours.state_dict())
    one, two = (randn(2, in_channels, 3, 5).requires_grad_() for _ in range(2))
    found, expected = ours(one), theirs(two)
    torch.testing.assert_close(found, expected)
    assert found.is_contiguous(memory_format=torch.channels_last)
    found.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(one.grad, two.grad)
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, theirs.get_parameter(name).grad)


def test_a_mask_never_amplifies():
    separator = tiny("resunet")
    mask = separator.mask(100 * randn(2, 3, 32, 64), frames=20)
    assert mask.shape == (2, 20, 64)
    assert mask.abs().max() <= 1 + 1e-6


def test_a_mask_of_zero_logits_has_finite_gradients():
    logits = torch.zeros(1, 3, 32, 64, requires_grad=True)
    mask = tiny("resunet").mask(logits, frames=20)
    mask.abs().square().sum().backward()
    assert not mask.any()
    assert logits.grad.isfinite().all()


def analytic(name, n_fft):
    """uss's frozen transform: only its first row, the window, is looked at here."""
    shapes = resunet.dropped_shapes(query_dim=1, n_fft=n_fft, channels=[1] * 6)
    tensor = torch.zeros(shapes[name])
    if name == "base.stft.conv_real.weight":
        tensor[0, 0] = torch.hann_window(n_fft)
    return tensor


@functools.cache
def published():
    """The state dict behind the golden file, under the published names."""
    rows = fill.description("resunet30_strong")["state_dict"]
    return fill.filled("resunet30_strong") | {n: analytic(n, 2048) for n, _, _, kind in rows if kind == "analytic"}


@functools.cache
def golden_separator():
    state = published()
    assert resunet.uss_arguments(state) == {
        "query_dim": 2048,
        "n_fft": 2048,
        "channels": [32, 64, 128, 256, 384, 384],
    }
    with torch.device("meta"):
        separator = resunet.Separator(hop_length=320, **resunet.uss_arguments(state))
    separator.load_state_dict(resunet.from_uss(state), assign=True)
    return separator.eval()


def blocks(separator):
    """Published name of a block -> our module with the same output."""
    unet = separator.unet
    named = {"pre_conv": unet.enter, "conv_block7a": unet.bottleneck, "after_conv": unet.leave}
    named |= {f"encoder_block{k}": block for k, block in enumerate(unet.encoders, start=1)}
    return named | {f"decoder_block{k}": block for k, block in enumerate(unet.decoders, start=1)}


def test_resunet_gives_the_published_networks_output_and_that_of_every_block():
    golden, separator = fill.arrays("resunet30_strong"), golden_separator()
    outputs = {}
    handles = [separator.norm.register_forward_hook(lambda _, __, h: outputs.update(bn0=h))]
    for name, block in blocks(separator).items():
        handles.append(block.register_forward_hook(lambda _, __, h, name=name: outputs.update({name: h})))
    with torch.inference_mode():
        estimate = separator(golden["input"][0], golden["condition"])
    for handle in handles:
        handle.remove()
    assert relative(estimate, golden["output"][0]) < 1e-5

    assert relative(outputs.pop("bn0").transpose(1, 2)[:, ::25, ::32], golden["tap_bn0"]) < 1e-5
    assert len(outputs) == 15
    for name, (output,) in outputs.items():
        frames, bins = output.shape[1:]
        tap = output[:4, :: max(1, frames // 7), :: max(1, bins // 16)]
        assert relative(tap, golden[f"tap_{name}"]) < 1e-5, name
        assert relative(output.mean(dim=(1, 2)), golden[f"tapmean_{name}"]) < 1e-4, name


def test_the_shifts_are_those_of_the_published_film():
    golden, separator = fill.arrays("resunet30_strong"), golden_separator()
    ours = {
        resunet.published_name(f"{name}.weight").removeprefix("film.").removesuffix(".weight"): module
        for name, module in separator.named_modules()
        if name.endswith("beta")
    }
    rows = fill.description("resunet30_strong")["film_first4_rows"]
    dead = {f"decoder_block{k}->beta2" for k in range(1, 7)}
    assert set(rows) - set(ours) == dead
    for row, values in zip(rows, golden["film_first4"], strict=True):
        if row not in dead:
            torch.testing.assert_close(ours[row](golden["condition"])[0, :4], values)


def leaky_slope(monkeypatch):
    monkeypatch.setattr(resunet, "NEGATIVE_SLOPE", 0.2)


def beta_after_activation(monkeypatch):
    def forward(self, x, query):
        return F.leaky_relu(self.norm(x), 0.01) + self.beta(query)[:, :, None, None]

    monkeypatch.setattr(resunet.FiLMNorm, "forward", forward)


def skip_before_upsampled(monkeypatch):
    def forward(self, x, skip, query):
        return self.block(torch.cat([skip, self.upsample(self.pre(x, query))], dim=1), query)

    monkeypatch.setattr(resunet.DecoderBlock, "forward", forward)


def shortcut_of_the_activated(monkeypatch):
    def forward(self, x, query):
        h = self.pre1(x, query)
        return self.conv2(self.pre2(self.conv1(h), query)) + self.shortcut(h)

    monkeypatch.setattr(resunet.ResBlock, "forward", forward)


def max_pool(monkeypatch):
    monkeypatch.setattr(resunet.F, "avg_pool2d", F.max_pool2d)


def padded_before_the_norm(monkeypatch):
    def plane(self, spectrum):
        h = F.pad(resunet.magnitude(spectrum), (0, 0, 0, -spectrum.shape[1] % 32))
        return self.norm(h.transpose(1, 2)).transpose(1, 2)[:, None, :, :-1]

    monkeypatch.setattr(resunet.Separator, "plane", plane)


def dc_dropped(monkeypatch):
    original = resunet.Separator.plane
    monkeypatch.setattr(resunet.Separator, "plane", lambda self, s: original(self, s.roll(-1, dims=2)))


def conjugate_mask(monkeypatch):
    original = resunet.Separator.mask
    monkeypatch.setattr(resunet.Separator, "mask", lambda self, h, frames: original(self, h, frames=frames).conj())


def symmetric_window(monkeypatch):
    original = torch.hann_window
    monkeypatch.setattr(torch, "hann_window", lambda n, **kwargs: original(n, periodic=False, **kwargs))


def another_epsilon(monkeypatch):
    for module in golden_separator().modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            monkeypatch.setattr(module, "eps", 1e-3)


@pytest.mark.parametrize(
    "mistake",
    [
        leaky_slope,
        beta_after_activation,
        skip_before_upsampled,
        shortcut_of_the_activated,
        max_pool,
        padded_before_the_norm,
        dc_dropped,
        conjugate_mask,
        symmetric_window,
        another_epsilon,
    ],
)
def test_the_golden_test_would_notice(mistake, monkeypatch):
    golden, separator = fill.arrays("resunet30_strong"), golden_separator()
    mixture, query = golden["input"][0, :, :9600], golden["condition"]
    with torch.inference_mode():
        right = separator(mixture, query)
        mistake(monkeypatch)
        wrong = separator(mixture, query)
    assert relative(wrong, right) > 1e-4


def test_a_checkpoint_file_is_read_into_a_separator(tmp_path):
    separator = tiny("resunet")
    sizes = {"query_dim": QUERY_DIM, "n_fft": 128, "channels": TINY["resunet"]["channels"]}
    state = {name: torch.zeros(shape) for name, shape in resunet.dropped_shapes(**sizes).items()}
    state["base.stft.conv_real.weight"][0, 0] = torch.hann_window(128)
    state |= {resunet.published_name(name): tensor for name, tensor in separator.state_dict().items()}
    content = {"state_dict": {f"ss_model.{name}": tensor for name, tensor in state.items()}}
    content["state_dict"]["query_net.base.fc1.bias"] = torch.zeros(4)
    torch.save(content, path := tmp_path / "uss.ckpt")

    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    again, arguments = separators.read_published("resunet", path, sha256=sha256)
    assert arguments == sizes
    assert again.keys() == separator.state_dict().keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in separator.state_dict().items())
    with pytest.raises(ValueError, match="has sha256"):
        separators.read_published("resunet", path, sha256="0" * 64)


def test_a_lightning_checkpoints_prefix_is_taken_off():
    prefixed = {f"ss_model.{name}": tensor for name, tensor in published().items()}
    assert resunet.uss_arguments(prefixed) == resunet.uss_arguments(published())
    ours, again = resunet.from_uss(prefixed), resunet.from_uss(published())
    assert all(tensor is again[name] for name, tensor in ours.items())
    assert ours.keys() == golden_separator().state_dict().keys()


def test_only_the_transform_and_the_dead_tensors_are_left_out():
    used = {resunet.published_name(name) for name in resunet.from_uss(published())}
    left_out = published().keys() - used
    assert {name for name in left_out if name.startswith(("base.stft.", "base.istft."))} == {
        "base.stft.conv_real.weight",
        "base.stft.conv_imag.weight",
        "base.istft.conv_real.weight",
        "base.istft.conv_imag.weight",
        "base.istft.ola_window",
    }
    rest = {name for name in left_out if not name.startswith(("base.stft.", "base.istft."))}
    assert len(rest) == 6 * (5 + 2)
    assert all((".bn2." in name or "->beta2." in name) and "conv_block" not in name for name in rest)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("base.pre_conv.bias"), r"missing base\.pre_conv\.bias"),
        (lambda s: s.pop("film.decoder_block3->beta2.bias"), "missing film.decoder_block3->beta2.bias"),
        (lambda s: s.update(extra=torch.zeros(1)), "unexpected extra"),
        (lambda s: s.update({"query_net.base.fc1.bias": torch.zeros(1)}), r"unexpected query_net\.base\.fc1\.bias"),
        (
            lambda s: s.update({"base.after_conv.weight": torch.zeros(4, 32, 1, 1)}),
            r"base\.after_conv\.weight is \(4, 32, 1, 1\), not \(3, 32, 1, 1\)",
        ),
        (
            lambda s: s.update({"base.decoder_block1.bn2.weight": torch.zeros(1)}),
            r"base\.decoder_block1\.bn2\.weight is \(1,\), not \(384,\)",
        ),
        (lambda s: s.pop("base.bn0.weight"), r"not a uss checkpoint: it has no base\.bn0\.weight"),
        (
            lambda s: s.update({"base.stft.conv_real.weight": torch.ones(1025, 1, 2048)}),
            "window is not a periodic Hann",
        ),
    ],
)
def test_a_checkpoint_that_is_not_quite_one_is_refused_by_name(change, message):
    state = dict(published())
    change(state)
    with pytest.raises(ValueError, match=message):
        resunet.from_uss(state)
