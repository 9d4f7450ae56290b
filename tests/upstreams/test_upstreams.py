"""Every upstream keeps the contract: shapes, any length, honest times, whole groups, and no network."""

import hashlib
import json
import socket

import pytest
import torch
from safetensors.torch import save_file

from pipeline import separators, upstreams
from pipeline.core.devices import use_precision
from pipeline.nn import panns
from pipeline.nn.fbank import to_16k
from pipeline.nn.panns import SmallCnn
from pipeline.upstreams import align, combine
from pipeline.upstreams.mae import MaskedAutoencoder
from tests.separators.test_mae_resunet import SETTINGS, UNET

CONVOLUTIONS = {"conv_dim": [16] * 7, "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 2}
TRANSFORMER = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
SMALL = {"weights": "random", "sha256": None, "config_sha256": None, "config": {**TRANSFORMER, **CONVOLUTIONS}}
OPTIONS = {
    "mae": {"mae_input": "crop", "drop_path": 0.0},
    "mae_untrained": {"mae_input": "crop", "drop_path": 0.0},
    "logmel": {},
    "none": {"mae_input": "crop"},
    "constant": {"mae_input": "crop"},
    "panns": {"weights": "the fixture's"},
    "hubert": SMALL,
    "distilhubert": SMALL,
    "wavlm": SMALL,
    "data2vec": SMALL,
    "dasheng": {"weights": "random", "sha256": None, "config": {"embed_dim": 32, "depth": 2, "num_heads": 2}},
}
LEARNING = [name for name in OPTIONS if name not in ("none", "constant", "logmel")]
ADAPTED = [name for name in LEARNING if name != "panns"]
each_upstream = pytest.mark.parametrize("name", upstreams.names())


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    directory = tmp_path_factory.mktemp("mae")
    sizes = {"dim": 32, "depth": 2, "heads": 2, "decoder": "global", "decoder_dim": 16, "decoder_depth": 1}
    sizes["decoder_heads"] = 2
    save_file(MaskedAutoencoder(**sizes).state_dict(), directory / "weights.safetensors")
    (directory / "config.json").write_text(json.dumps({"model": sizes}))
    torch.manual_seed(0)
    network = SmallCnn(class_indices=[0, 1], channels=[8, 16, 16, 32], embedding_dim=8)
    panns.save(network, directory / "query")
    OPTIONS["panns"]["weights"] = str(directory / "query")
    return directory


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*arguments):
        raise AssertionError("an upstream asked for the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)


def make(name, pretrained):
    torch.manual_seed(0)
    config, state = upstreams.read(name, OPTIONS[name], pretrained)
    upstream = upstreams.build(name, **json.loads(json.dumps(config)))
    if state is not None:
        upstream.load_state_dict(state)
    return upstream.eval()


def noise(samples, seed=0):
    return 0.1 * torch.randn(2, samples, generator=torch.Generator().manual_seed(seed))


def test_every_file_is_under_test():
    assert upstreams.names() == sorted(OPTIONS)


@each_upstream
@pytest.mark.parametrize("samples", [10, 16000, 64000, 64123])
def test_layers_and_steps(name, samples, pretrained):
    upstream = make(name, pretrained)
    assert upstream.sample_rate == (32000 if name == "panns" else 16000)
    hidden = upstream.hidden(noise(samples))
    assert len(hidden) == upstream.n_layers
    assert {h.shape for h in hidden} == {(2, hidden[0].shape[1], upstream.dim)}
    layers = ["last", "last3", "weighted"]
    weights = torch.zeros(upstream.n_layers)
    for kind in layers:
        steps = upstream.to_steps(combine(upstream, hidden, kind, weights))
        assert steps.isfinite().all()
        frames = align(steps, upstream.frames_per_step, samples // 320 + 1)
        assert frames.shape == (2, samples // 320 + 1, upstream.dim)
    if samples >= 16000:
        # The steps cover the mixture: no frame but those of the last moment has to repeat the last step. A query is of
        # whole segments.
        moment = upstream.frames_per_step if name == "panns" else 4
        assert steps.shape[1] * upstream.frames_per_step >= samples / 320 - moment


@pytest.mark.parametrize("mae_input", ["pad1024", "crop", "hop35"])
@pytest.mark.parametrize("samples", [10, 9920, 64000, 64123, 327679, 327681, 328320, 640001])
def test_features_without_information_have_the_steps_of_the_a_mae(mae_input, samples, pretrained):
    options = {"mae_input": mae_input, "drop_path": 0.0}
    ours, theirs = [], []
    for name in ("mae", "constant", "none"):
        config, _ = upstreams.read(name, options, pretrained)
        upstream = upstreams.build(name, **config).eval()
        steps = upstream.to_steps(upstream.hidden(noise(samples))[-1])
        (theirs if name == "mae" else ours).append((steps.shape, upstream.frames_per_step))
    assert ours == 2 * theirs


def test_log_mels_of_a_tone_lie_in_its_band_and_in_the_frames_where_it_sounds(pretrained):
    upstream = make("logmel", pretrained)
    waveform = noise(64000) / 100
    waveform[:, 32000:] += 0.1 * torch.sin(2 * torch.pi * 1000 / 32000 * torch.arange(32000))
    (found,) = upstream.hidden(waveform)
    assert found.shape == (2, 200, 128)
    assert set(found[:, 110:190].argmax(dim=2).flatten().tolist()) <= {43, 44, 45, 46, 47}  # of 128, even in mel
    assert (found[:, 110:190].amax(dim=2) > found[:, :90].amax(dim=2).amax()).all()


def test_an_untrained_encoder_has_the_sizes_of_the_trained_one_and_other_weights(pretrained):
    trained, drawn = (make(name, pretrained).state_dict() for name in ("mae", "mae_untrained"))
    assert {name: t.shape for name, t in trained.items()} == {name: t.shape for name, t in drawn.items()}
    name = "encoder.blocks.0.attn.qkv.weight"
    assert not torch.equal(trained[name], drawn[name])


@pytest.mark.parametrize("name", LEARNING)
def test_a_burst_changes_the_frames_around_it_most(name, pretrained):
    upstream = make(name, pretrained)
    quiet = noise(64000)  # a louder burst would move all frames, by the norms over the whole mixture
    loud = quiet.clone()
    loud[:, 32000:35200] = noise(3200, seed=1)
    frames = [align(upstream.to_steps(upstream.hidden(w)[-1]), upstream.frames_per_step, 201) for w in (quiet, loud)]
    change = (frames[1] - frames[0]).norm(dim=-1).mean(dim=0)
    near = change[95:117].mean()
    far = torch.cat([change[:80], change[130:]]).mean()
    assert near > 1.2 * far


@each_upstream
def test_weights_may_be_held_in_bfloat16(name, pretrained):
    exact, rounded = (make(name, pretrained) for _ in range(2))
    rounded.to(torch.bfloat16)
    wanted, found = (upstream.hidden(noise(32000))[-1].float() for upstream in (exact, rounded))
    assert found.shape == wanted.shape
    assert (found - wanted).norm() <= 0.1 * wanted.norm()


@each_upstream
def test_a_config_and_a_state_give_the_same_features_again(name, pretrained):
    upstream = make(name, pretrained)
    config, _ = upstreams.read(name, OPTIONS[name], pretrained)
    torch.manual_seed(1)
    again = upstreams.build(name, **json.loads(json.dumps(config))).eval()
    again.load_state_dict(upstream.state_dict())
    assert torch.equal(upstream.hidden(noise(16000))[-1], again.hidden(noise(16000))[-1])


@each_upstream
def test_groups_hold_every_learning_parameter_once(name, pretrained):
    upstream = make(name, pretrained)
    held = [id(p) for group in upstream.layer_groups() for p in group]
    assert len(held) == len(set(held))
    assert {id(p) for p in upstream.parameters() if p.requires_grad} <= set(held)
    if held:
        assert len(upstream.layer_groups()) == upstream.n_layers + 1


@pytest.mark.parametrize("name", LEARNING)
def test_gradients_reach_the_first_layer(name, pretrained):
    upstream = make(name, pretrained).train()
    torch.stack([h.square().mean() for h in upstream.hidden(noise(16000))]).sum().backward()
    for group in upstream.layer_groups():
        assert any(p.grad is not None and p.grad.any() for p in group)


@each_upstream
def test_hearing_changes_no_statistics(name, pretrained):
    """What does not move before `unfreeze_step` must not drift either: norms keep what they were trained with."""
    upstream = make(name, pretrained).train()
    before = {key: tensor.clone() for key, tensor in upstream.state_dict().items()}
    upstream.hidden(noise(16000))
    assert all(torch.equal(tensor, before[key]) for key, tensor in upstream.state_dict().items())


@each_upstream
def test_no_front_end_is_rounded(name, pretrained, monkeypatch):
    """Ten bits of mantissa are heard in a log-mel of quiet frames. A front end is known by its Fourier transform."""
    upstream, seen = make(name, pretrained), []
    plain = torch.stft, torch.fft.rfft

    def note(transform):
        def noted(*arguments, **options):
            seen.append((torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32))
            return transform(*arguments, **options)

        return noted

    monkeypatch.setattr(torch, "stft", note(plain[0]))
    monkeypatch.setattr(torch.fft, "rfft", note(plain[1]))
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    use_precision("tf32")
    try:
        upstream.hidden(noise(16000))
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before
    assert set(seen) <= {(False, False)}
    assert seen or name not in ("mae", "panns", "dasheng")


def test_adapters_are_refused_where_there_is_nothing_to_adapt():
    network = {"class": "SmallCnn", "arguments": {"class_indices": [0], "channels": [4], "embedding_dim": 4}}
    settings = {**SETTINGS, "upstream": "panns", "freeze_mae": False, "lora_rank": 2}
    with pytest.raises(ValueError, match="upstream 'panns' has nothing for lora_rank to adapt"):
        separators.build("mae_resunet", body=UNET, query_dim=8, upstream_config={"network": network}, **settings)


@pytest.mark.parametrize("name", ADAPTED)
def test_adapters_change_what_they_adapt(name, pretrained):
    """Of some encoders the attention reads its projections' weights itself: adapters there would be passed by."""
    from peft import LoraConfig, inject_adapter_in_model

    upstream = make(name, pretrained)
    before = upstream.hidden(noise(16000))[-1]
    config = LoraConfig(r=2, target_modules=list(upstream.lora_targets), init_lora_weights=False)
    torch.manual_seed(0)
    inject_adapter_in_model(config, upstream)
    assert not torch.allclose(upstream.hidden(noise(16000))[-1], before)
    upstream.hidden(noise(16000))[-1].square().mean().backward()
    adapters = [p for n, p in upstream.named_parameters() if "lora_B" in n]
    assert adapters
    assert all(p.grad is not None and p.grad.any() for p in adapters)


@pytest.mark.parametrize(("name", "library"), [("hubert", "Hubert"), ("wavlm", "WavLM"), ("data2vec", "Data2VecAudio")])
@pytest.mark.parametrize("kind", ["model.safetensors", "pytorch_model.bin"])
def test_a_downloaded_folder_gives_the_librarys_own_features(name, library, kind, tmp_path, pretrained):

    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{library}Config")(**TRANSFORMER, **CONVOLUTIONS)
    theirs = getattr(transformers, f"{library}Model")(config).eval()
    theirs.save_pretrained(tmp_path)
    if kind == "pytorch_model.bin":
        (tmp_path / "model.safetensors").unlink()
        prefix = {"hubert": "hubert.", "wavlm": "wavlm.", "data2vec": "data2vec_audio."}[name]
        state = {prefix + n: t for n, t in theirs.state_dict().items()}
        # As the files on the hub have it.
        old = {"parametrizations.weight.original0": "weight_g", "parametrizations.weight.original1": "weight_v"}
        for new, before in old.items():
            state = {n.replace(new, before): t for n, t in state.items()}
        torch.save({**state, "lm_head.weight": torch.zeros(3)}, tmp_path / kind)
    saved = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**saved, "auto_map": {"AutoConfig": "evil.Config"}, "other": 1}))
    options = {"weights": str(tmp_path)}
    for key, file in (("sha256", kind), ("config_sha256", "config.json")):
        options[key] = hashlib.sha256((tmp_path / file).read_bytes()).hexdigest()
    with pytest.raises(FileNotFoundError, match=r"no preprocessor_config\.json"):
        upstreams.read(name, {**options, "config": {}}, pretrained)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"do_normalize": True}))
    for sha256, message in ((None, "its sha256 is not known"), ("0" * 64, "has sha256 .*, not 0{64}")):
        with pytest.raises(ValueError, match=rf"config\.json.* {message}"):
            upstreams.read(name, {**options, "config_sha256": sha256, "config": {}}, pretrained)
    config, state = upstreams.read(name, {**options, "config": {}}, pretrained)
    assert not {"auto_map", "other"} & set(config["config"])
    upstream = upstreams.build(name, **json.loads(json.dumps(config))).eval()
    upstream.load_state_dict(state)
    waveform = noise(32000)
    low = to_16k(waveform)
    low = (low - low.mean(dim=1, keepdim=True)) / (low.var(dim=1, keepdim=True, correction=0) + 1e-7).sqrt()
    with torch.inference_mode():
        expected = theirs(low, output_hidden_states=True).hidden_states[1:]
        for ours, their in zip(upstream.hidden(waveform), expected, strict=True):
            torch.testing.assert_close(ours, their, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["hubert", "wavlm"])
def test_the_norm_behind_the_last_layer_of_large_models_is_used_and_learns(name, pretrained, monkeypatch):
    """HuBERT-large and WavLM-large norm what goes into a layer: what comes out of the last is not normed yet."""
    large = {**TRANSFORMER, **CONVOLUTIONS, "do_stable_layer_norm": True, "feat_extract_norm": "layer"}
    monkeypatch.setitem(OPTIONS, name, {**SMALL, "config": large})
    upstream = make(name, pretrained)
    norm = upstream.model.encoder.layer_norm
    torch.nn.init.normal_(norm.weight)
    low = to_16k(noise(16000))
    with torch.inference_mode():
        expected = upstream.model(low).last_hidden_state
        found = combine(upstream, upstream.hidden(noise(16000)), "last")
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert any(p is norm.weight for p in upstream.layer_groups()[-1])
    test_groups_hold_every_learning_parameter_once(name, pretrained)


def test_a_folder_without_its_files_is_named(tmp_path, pretrained):
    sha256 = hashlib.sha256(b"{}").hexdigest()
    options = {"weights": str(tmp_path), "sha256": None, "config_sha256": sha256, "config": {}}
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        upstreams.read("wavlm", options, pretrained)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "preprocessor_config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"neither of model\.safetensors, pytorch_model\.bin"):
        upstreams.read("wavlm", options, pretrained)


def test_an_unknown_upstream_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"no upstream 'wavml'; there are \['constant', 'dasheng'"):
        upstreams.build("wavml")


def test_weighted_layers_do_not_drown_in_the_last():
    upstream = upstreams.build("none", dim=4, mae_input="crop")
    hidden = [torch.randn(1, 3, 4), 1000 * torch.randn(1, 3, 4)]
    found = combine(upstream, hidden, "weighted", torch.zeros(2))
    normed = [torch.nn.functional.layer_norm(h, (4,)) for h in hidden]
    torch.testing.assert_close(found, (normed[0] + normed[1]) / 2)
    with pytest.raises(ValueError, match="one weight for each of the 2 layers"):
        combine(upstream, hidden, "weighted", torch.zeros(3))
