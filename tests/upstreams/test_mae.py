"""Audio-MAE equals the published code for fixed weights, and its readings of a mixture are what they say."""

import argparse
import hashlib

import pytest
import torch
from safetensors.torch import save_file

from pipeline.nn.fbank import PADDING, STD
from pipeline.upstreams import align, combine
from pipeline.upstreams.mae import (
    Encoder,
    MaskedAutoencoder,
    Upstream,
    normalised_patches,
    patches,
    positions,
    read_published,
    unpatched,
)
from tests.golden.fill import arrays, description, fill_amae

SMALL = {"dim": 96, "depth": 3, "heads": 4, "decoder_dim": 64, "decoder_heads": 16}
DEPTH = {"local": 16, "global": 2}
FIXED = ("pos_embed", "decoder_pos_embed")


def filled(model):
    state = {n: t if n in FIXED else fill_amae(n, tuple(t.shape)) for n, t in model.state_dict().items()}
    model.load_state_dict(state)
    return model.eval()


def small(decoder):
    return filled(MaskedAutoencoder(**SMALL, decoder=decoder, decoder_depth=DEPTH[decoder]))


def assert_close(found, expected, atol=2e-5):
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)


@pytest.mark.parametrize(("decoder", "name"), [("local", "small_local"), ("global", "small_global")])
def test_tensors_have_the_published_names_and_shapes(decoder, name):
    assert {k: list(v.shape) for k, v in small(decoder).state_dict().items()} == dict(
        description("amae_state_dict")[name]
    )


def test_the_base_size_has_the_published_tensors():
    with torch.device("meta"):
        shapes = MaskedAutoencoder(dim=768, depth=12, heads=12).state_dict()
    assert {k: list(v.shape) for k, v in shapes.items()} == dict(description("amae_state_dict")["base_local"])
    trained = sum(v.numel() for k, v in shapes.items() if k not in FIXED)
    assert round(trained / 1e6, 2) == 136.34


@pytest.mark.parametrize("decoder", ["local", "global"])
def test_loss_prediction_and_gradients_of_the_published_code(decoder):
    golden, model = arrays("amae_small"), small(decoder)
    features = golden["input"][0]
    loss, prediction, hidden = model(features, golden["noise"])
    assert torch.equal(hidden, golden["mask"].bool())
    assert hidden.sum() == 410  # int(512 * 0.2) = 102 are visible
    assert_close(prediction[:, ::8], golden[f"fan_{decoder}_pred"])
    assert_close(loss, golden[f"fan_{decoder}_loss"])
    assert_close(model.loss(features, prediction, hidden, normalised=False), golden[f"fan_{decoder}_loss_nonorm"])
    loss.backward()
    assert_close(model.mask_token.grad, golden[f"fan_{decoder}_grad_mask_token"])
    assert_close(model.patch_embed["proj"].bias.grad, golden[f"fan_{decoder}_grad_patch_embed.proj.bias"])
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    assert_close(norm, golden[f"fan_{decoder}_gradnorm"])


def test_features_of_the_published_code():
    golden, model = arrays("amae_small"), small("global")
    hidden = model.hidden(golden["input"][0])
    assert_close(model.norm(hidden[-1])[:, ::8], golden["fan_enc_nomask"])
    latent, _, _ = model.encode_visible(golden["input"][0], golden["noise"], 0.8)
    assert_close(latent, golden["fan_enc_masked"])


def test_the_base_encoder_and_its_pooling():
    features, golden = arrays("amae_small")["input"][0], arrays("amae_base_encoder")
    upstream = Upstream(mae_input="pad1024", dim=768, depth=12, heads=12)
    filled(upstream.encoder)
    with torch.inference_mode():
        blocks = upstream.encoder.hidden(features)
        assert_close(torch.cat(blocks)[:, [1, 512]], golden["fan_blocks"])
        hidden = [h[:, 1:] for h in blocks]
        last = combine(upstream, hidden, "last")
        assert_close(last[:, 15::16], golden["fan_enc_nomask"][:, 1:])
        assert_close(upstream.to_steps(last), golden["fan_pool32"])
        assert_close(upstream.to_steps(combine(upstream, hidden, "last3")), golden["fan_pool32_contextual"])
        cropped = upstream.encoder.norm(upstream.encoder.hidden(features[:, :224])[-1])
        assert_close(cropped[:, ::4], golden["fan_enc_crop224"])


def test_the_filter_bank_as_the_published_encoder_gets_it(monkeypatch):
    """Centred, normalised, filled up with zeros behind the logarithm; but for float32's noise floor (test_fbank.py)."""
    golden = arrays("fbank")
    # What is stored is at 16 kHz.
    monkeypatch.setattr("pipeline.upstreams.mae.to_16k", lambda waveform, rate: waveform)
    upstream = Upstream(mae_input="pad1024", dim=8, depth=1, heads=1)
    for waveform, expected, every in (
        (golden["waveform"], golden["fbank_norm"], 8),
        (golden["waveform"][:, 48000:80000], golden["fbank2s_norm_first224"], 2),
    ):
        features = upstream.features(waveform)
        assert features.shape == (1, 1024, 128)
        found = features[0, ::every][: len(expected)]
        error = (found - expected).abs()
        sounds = expected > expected.amax(dim=1, keepdim=True) - 11.5 / (2 * STD)  # 50 dB
        assert error[sounds].max() < 1e-4
        assert error.mean() < 1e-5
        assert (found[-1] == expected[-1]).all()  # the filling, to the bit
        assert len(found[-1].unique()) == 1


def test_positions_are_a_transposed_grid():
    table = positions(768)[0]
    assert (table[0] == 0).all()
    for n in (0, 1, 63, 64, 511):
        for half, place in ((table[1 + n, :384], n % 64), (table[1 + n, 384:], n // 64)):
            assert half[0].item() == pytest.approx(torch.sin(torch.tensor(float(place), dtype=torch.float64)).item())


def test_patches_and_back():
    features = torch.randn(2, 64, 128)
    cut = patches(features)
    assert torch.equal(cut[:, 8 * 2 + 3], features[:, 32:48, 48:64].reshape(2, -1))
    assert torch.equal(unpatched(cut), features)
    normed = normalised_patches(cut)
    assert normed.mean(dim=-1).abs().max() < 1e-5
    assert (normed.var(dim=-1) - 1).abs().max() < 1e-4


def test_the_windows_of_odd_decoder_blocks_are_shifted_in_time_only_and_do_not_wrap():
    model = small("local")
    x = torch.randn(1, 512, 64)
    y = x.clone()
    y[:, 8 * 63] += 1  # the last step
    for block, touched in ((model.decoder_blocks[0], range(60, 64)), (model.decoder_blocks[1], range(62, 64))):
        steps = (block(x) != block(y)).any(dim=-1).view(64, 8)
        assert set(steps.any(dim=1).nonzero().flatten().tolist()) <= set(touched)
        assert set(steps.any(dim=0).nonzero().flatten().tolist()) <= set(range(4))


def test_recomputing_the_decoder_gives_the_same_gradients():
    golden = arrays("amae_small")
    gradients = []
    for recompute in (False, True):
        model = filled(MaskedAutoencoder(**SMALL, decoder="global", decoder_depth=2, recompute=recompute)).train()
        model(golden["input"][0], golden["noise"])[0].backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, plain in gradients[0].items():
        assert_close(gradients[1][name], plain, atol=1e-7)


SIZES = {"dim": 32, "depth": 2, "heads": 4}


@pytest.mark.parametrize(
    ("mae_input", "frames", "steps"), [("pad1024", 1024, 32), ("crop", 224, 14), ("hop35", 1024, 32)]
)
def test_what_the_encoder_sees_of_two_seconds(mae_input, frames, steps):
    upstream = Upstream(mae_input=mae_input, **SIZES)
    waveform = torch.randn(2, 64000) * 0.1
    features = upstream.features(waveform)
    assert features.shape == (2, frames, 128)
    hidden = upstream.hidden(waveform)
    assert [h.shape for h in hidden] == [(2, frames // 2, 32)] * 2
    assert upstream.to_steps(hidden[-1]).shape == (2, steps, 32)
    if mae_input == "pad1024":
        assert (features[:, 198:] == PADDING).all()
        assert not (features[:, :198] == PADDING).any()
    else:
        assert (features[:, -1] < -1.2).all()  # silence, which every pretraining has seen


@pytest.mark.parametrize("mae_input", ["pad1024", "crop", "hop35"])
@pytest.mark.parametrize("samples", [1, 4000, 64001, 330000])
def test_any_length(mae_input, samples):
    upstream = Upstream(mae_input=mae_input, **SIZES).eval()
    steps = upstream.to_steps(upstream.hidden(torch.randn(1, samples))[-1])
    assert align(steps, upstream.frames_per_step, samples // 320 + 1).isfinite().all()


@pytest.mark.parametrize(
    ("mae_input", "where"), [("crop", range(92, 116)), ("hop35", range(92, 116)), ("pad1024", range(18, 30))]
)
def test_a_burst_changes_the_features_of_its_frames_only_where_they_are_aligned(mae_input, where):
    """In the published reading a second of sound is 22 STFT frames: the burst at 1.0 s shows at frame 21."""
    torch.manual_seed(0)
    upstream = Upstream(mae_input=mae_input, **SIZES).eval()
    quiet = 0.01 * torch.randn(1, 64000)
    loud = quiet.clone()
    loud[:, 32000:33600] += torch.randn(1600)
    frames = [align(upstream.to_steps(upstream.hidden(w)[-1]), upstream.frames_per_step, 201) for w in (quiet, loud)]
    change = (frames[1] - frames[0]).norm(dim=-1)[0]
    assert int(change.argmax()) in where


def test_bfloat16_weights_give_nearly_the_same_features():
    upstream = Upstream(mae_input="crop", **SIZES).eval()
    waveform = torch.randn(1, 64000)
    exact = combine(upstream, upstream.hidden(waveform), "last")
    rounded = combine(upstream, upstream.to(torch.bfloat16).hidden(waveform), "last").float()
    assert (rounded - exact).norm() / exact.norm() < 0.02


def test_layer_groups_hold_every_trainable_parameter_once():
    upstream = Upstream(mae_input="crop", **SIZES)
    grouped = [id(p) for group in upstream.layer_groups() for p in group]
    assert len(grouped) == len(set(grouped))
    assert set(grouped) == {id(p) for n, p in upstream.named_parameters() if "pos_embed" not in n}
    assert len(upstream.layer_groups()) == 3


# -------------------------------------------------------------------------------------------- published files

PUBLISHED = {"dim": 64, "depth": 2, "heads": 1, "decoder": "global", "decoder_dim": 64, "decoder_depth": 1}


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def audiomae(path, **changes):
    torch.manual_seed(0)
    state = MaskedAutoencoder(**PUBLISHED, decoder_heads=16).state_dict()
    content = {"model": {**state, **changes}, "args": argparse.Namespace(lr=1e-3), "epoch": 32}
    torch.save(content, path)
    return state


def test_a_published_audiomae_is_read_with_its_namespace(tmp_path):
    path = tmp_path / "pretrained.pth"
    state = audiomae(path)
    sizes, found = read_published(path, sha256=digest(path), layout="audiomae")
    assert {**PUBLISHED, "decoder_heads": 16, "mlp_ratio": 4.0} == sizes
    MaskedAutoencoder(**sizes).load_state_dict(found)
    assert all(torch.equal(found[n], t) for n, t in state.items())


def test_mended_positions_are_refused(tmp_path):
    path = tmp_path / "pretrained.pth"
    audiomae(path, pos_embed=positions(64).flip(1))
    with pytest.raises(ValueError, match=r"pretrained\.pth: its positions are not A-MAE's transposed grid"):
        read_published(path, sha256=digest(path), layout="audiomae")


def test_a_missing_and_an_unexpected_tensor_are_named(tmp_path):
    path = tmp_path / "pretrained.pth"
    torch.manual_seed(0)
    state = MaskedAutoencoder(**PUBLISHED, decoder_heads=16).state_dict()
    del state["norm.bias"]
    torch.save({"model": {**state, "head.bias": torch.zeros(3)}}, path)
    with pytest.raises(ValueError, match=r"missing \['norm.bias'\], unexpected \['head.bias'\]"):
        read_published(path, sha256=digest(path), layout="audiomae")


@pytest.mark.parametrize(
    ("without", "message"),
    [
        ("decoder_", r"pretrained\.pth has no decoder: it is not pretrained\.pth, but a fine-tuned encoder"),
        ("mask_token", r"pretrained\.pth has no decoder"),
        ("blocks.0.mlp.fc1.weight", r"pretrained\.pth has no encoder of the layout 'audiomae'"),
        ("blocks.", r"pretrained\.pth has no encoder of the layout 'audiomae'"),
        ("norm.weight", r"pretrained\.pth: missing \['norm\.weight'\], unexpected \['blocks\.x\.y'\]"),
    ],
)
def test_another_file_of_the_same_project_is_named(tmp_path, without, message):
    path = tmp_path / "pretrained.pth"
    state = MaskedAutoencoder(**PUBLISHED, decoder_heads=16).state_dict()
    kept = {name: tensor for name, tensor in state.items() if not name.startswith(without)}
    torch.save({"model": {**kept, "blocks.x.y": torch.zeros(1)}}, path)
    with pytest.raises(ValueError, match=message):
        read_published(path, sha256=digest(path), layout="audiomae")


def test_anything_else_than_a_namespace_is_not_unpickled(tmp_path):
    path = tmp_path / "pretrained.pth"
    torch.save({"model": {}, "args": pytest.Cache}, path)
    with pytest.raises(ValueError, match="cannot be read as plain tensors"):
        read_published(path, sha256=digest(path), layout="audiomae")


@pytest.mark.parametrize(("prefix", "rows"), [("", 512), ("model.", 6144)])
def test_eat_and_sslam_load_into_the_same_encoder(tmp_path, prefix, rows):
    """Their table of positions goes on, up to two minutes: 768 steps of 8 bands."""
    path = tmp_path / "model.safetensors"
    torch.manual_seed(0)
    encoder = Encoder(dim=64, depth=2, heads=1, post_norm=True)
    theirs = {"patch_embed.proj.": "local_encoder.proj.", "cls_token": "extra_tokens"}
    state = {}
    for name, tensor in encoder.state_dict().items():
        for a, b in theirs.items():
            name = name.replace(a, b)
        state[prefix + name] = tensor.contiguous()
    table = torch.cat([state.pop(prefix + "pos_embed")[:, 1:], torch.randn(1, rows - 512, 64)], dim=1)
    state[prefix + "fixed_positional_encoder.positions"] = table.contiguous()
    save_file(state, path)
    sizes, found = read_published(path, sha256=digest(path), layout="eat")
    assert sizes == {"dim": 64, "depth": 2, "heads": 1, "mlp_ratio": 4.0, "post_norm": True}
    loaded = Encoder(**sizes)
    loaded.load_state_dict(found)
    features = torch.randn(1, 32, 128)
    assert torch.equal(loaded.hidden(features)[-1], encoder.hidden(features)[-1])


def test_post_norm_blocks_end_in_a_norm():
    """As in EAT: the output of each block is normed, and nothing follows the last."""
    encoder = Encoder(dim=64, depth=2, heads=1, post_norm=True)
    for h in encoder.hidden(torch.randn(1, 32, 128)):
        assert h.mean(dim=-1).abs().max() < 1e-5
    assert isinstance(encoder.norm, torch.nn.Identity)
