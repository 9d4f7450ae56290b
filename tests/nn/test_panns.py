"""PANNs: the published networks' numbers without their package's download; and the small network of the same family."""

import json
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from pipeline import upstreams
from pipeline.nn import panns
from tests.golden import fill

CLASSES = [3, 70, 400]


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def small(seed=0, channels=(4, 4, 8)):
    torch.manual_seed(seed)
    return panns.SmallCnn(class_indices=CLASSES, channels=list(channels), embedding_dim=5)


# The published networks


def published(name, golden):
    """The golden file's fill, with the transform and the filters as the network constructs them."""
    network = getattr(panns.panns_models(), name)(32000, 1024, 320, 64, 50, 14000, 527)
    return network.state_dict() | fill.filled(golden)


@pytest.mark.slow
def test_the_detector_gives_the_published_segments():
    golden = fill.arrays("cnn14_dlm_strong")
    detector = panns.PannsDetector(published("Cnn14_DecisionLevelMax", "cnn14_dlm_strong"))
    with torch.inference_mode():
        probability = detector.framewise_probability(golden["input"])
    torch.testing.assert_close(probability, golden["segmentwise_output"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(probability.amax(dim=1), golden["clipwise_output"], rtol=1e-4, atol=1e-5)
    frames = panns.to_frames(probability, segment_samples=detector.segment_samples, n_frames=1001)
    torch.testing.assert_close(frames[:, ::50], golden["framewise_output"], rtol=1e-4, atol=1e-5)
    assert detector.class_indices == list(range(527))
    assert detector.segment_samples == 10240

    # A waveform shorter than a segment, and one that ends within one.
    with torch.inference_mode():
        assert detector.framewise_probability(golden["input"][:, :100]).shape == (1, 1, 527)
        assert detector.framewise_probability(golden["input"][:, :64000]).shape == (1, 6, 527)


@pytest.fixture(scope="module")
def query_encoder():
    return panns.PannsQueryEncoder(published("Cnn14", "cnn14_strong"))


def test_the_query_encoder_gives_the_published_embedding(query_encoder):
    golden = fill.arrays("cnn14_strong")
    with torch.inference_mode():
        query = query_encoder.embed(golden["input"])
        assert query_encoder.embed(golden["input"][:, :100]).isfinite().all()
    assert query.shape == (1, query_encoder.query_dim) == (1, 2048)
    # Sums of thousands of products differ by 1e-5 between processors.
    torch.testing.assert_close(query, golden["embedding"], rtol=1e-4, atol=1e-4)


def test_an_upstream_hears_what_the_published_query_is_made_of(query_encoder, tmp_path):
    panns.save(query_encoder, tmp_path)
    config, state = upstreams.read("panns", {"weights": str(tmp_path)}, tmp_path)
    upstream = upstreams.build("panns", **config).eval()
    upstream.load_state_dict(state)
    assert (upstream.dim, upstream.frames_per_step) == (2048, 32.0)
    waveform = 0.1 * torch.randn(2, 64000, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        h = upstream.hidden(waveform)[0]
        pooled = h.amax(dim=1) + h.mean(dim=1)
        query = upstream.network.network.fc1(pooled).relu()
        torch.testing.assert_close(query, query_encoder.embed(waveform), rtol=1e-5, atol=1e-5)
    assert h.shape == (2, 6, 2048)
    assert [len(group) > 0 for group in upstream.layer_groups()] == [True, True]


def test_published_weights_are_frozen_and_ready_for_inference(query_encoder):
    assert not any(p.requires_grad for p in query_encoder.parameters())
    assert not query_encoder.network.training


def test_weights_that_do_not_fit_are_refused_by_name(query_encoder):
    state = query_encoder.network.state_dict()
    without = {name: tensor for name, tensor in state.items() if name != "fc1.bias"}
    with pytest.raises(RuntimeError, match=r"Missing key.*fc1\.bias"):
        query_encoder.network.load_state_dict(without)


def test_a_saved_query_encoder_is_the_same_again(query_encoder, tmp_path):
    panns.save(query_encoder, tmp_path)
    again = panns.load_query_encoder(tmp_path)
    waveform = randn(1, 16000)
    with torch.inference_mode():
        assert torch.equal(again.embed(waveform), query_encoder.embed(waveform))
    with pytest.raises(ValueError, match="holds a PannsQueryEncoder, which does not detect"):
        panns.load_detector(tmp_path)


def test_the_architecture_loads_without_network_or_a_trace_at_home(tmp_path):
    """`import panns_inference` runs wget, and leaves an empty label file in the home folder when that fails."""
    home, tools = tmp_path / "home", tmp_path / "tools"
    home.mkdir()
    tools.mkdir()
    (tools / "wget").write_text(f"#!/bin/sh\ntouch {tmp_path}/downloaded\n")
    (tools / "wget").chmod(0o755)
    code = (
        "import sys; from pipeline.nn.panns import panns_models; models = panns_models(); "
        "assert models is panns_models(); assert models.Cnn14_DecisionLevelMax; "
        "assert 'panns_inference' not in sys.modules; assert 'matplotlib' not in sys.modules"
    )
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("XDG_", "MPL"))}
    environment |= {"HOME": str(home), "PATH": f"{tools}:{os.environ['PATH']}"}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, timeout=120)
    assert sorted(tmp_path.rglob("*")) == sorted([home, tools, tools / "wget"])


# Segments and frames


def test_frames_repeat_their_segment_and_then_the_last_one():
    segments = torch.tensor([[[0.1], [0.7]]])
    frames = panns.to_frames(segments, segment_samples=3 * 320, n_frames=8)
    torch.testing.assert_close(frames[0, :, 0], torch.tensor([0.1] * 3 + [0.7] * 5))
    with pytest.raises(ValueError, match="2 segments cover 6 frames, more than 5"):
        panns.to_frames(segments, segment_samples=3 * 320, n_frames=5)


# The small network


@pytest.mark.parametrize("samples", [1, 300, 2559, 2560, 31999, 32000, 33000])
@pytest.mark.parametrize("n_blocks", [1, 3])
def test_segments_cover_the_clip(samples, n_blocks):
    network = small(channels=[4] * n_blocks).eval()
    probability = network.framewise_probability(randn(2, samples))
    frames = samples // 320 + 1
    assert network.segment_samples == 320 * 2**n_blocks
    assert probability.shape == (2, max(1, frames // 2**n_blocks), len(CLASSES))
    assert ((probability > 0) & (probability < 1)).all()
    assert network.embed(randn(2, samples)).shape == (2, 5)


def test_a_sound_shows_in_the_segments_around_it():
    network = small().eval()
    silence = network.segment_logits(network.log_mel(torch.zeros(1, 64000)))
    for segment in (2, 11, 20):
        waveform = torch.zeros(1, 64000)
        start = segment * network.segment_samples
        waveform[0, start : start + network.segment_samples] = randn(network.segment_samples)
        heard = (network.segment_logits(network.log_mel(waveform)) - silence)[0].abs().sum(dim=1)
        # Three blocks of two convolutions at strides of 2, 4 and 8 frames reach five segments of 8 to either side.
        assert not heard[: max(0, segment - 5)].any()
        assert not heard[segment + 6 :].any()
        assert heard[segment] > 0.01


def test_a_clips_logit_is_that_of_its_surest_segment():
    network, waveform = small().eval(), randn(2, 32000)
    clipwise = network(network.log_mel(waveform)).sigmoid()
    torch.testing.assert_close(clipwise, network.framewise_probability(waveform).amax(dim=1))


def test_frames_after_the_last_whole_segment_are_left_out():
    network, log_mel = small().eval(), 10 * randn(1, 47, 64)
    assert torch.equal(network(log_mel), network(log_mel[:, :40]))
    with pytest.raises(ValueError, match="7 frames are fewer than a segment of 8"):
        network(log_mel[:, :7])


def test_every_parameter_gets_a_gradient():
    network = small()
    network(10 * randn(4, 100, 64)).square().mean().backward()
    assert [n for n, p in network.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_silence_is_finite():
    network = small()
    network(network.log_mel(torch.zeros(2, 32000))).sum().backward()
    assert all(p.grad.isfinite().all() for p in network.parameters())
    assert network.eval().embed(torch.zeros(1, 32000)).isfinite().all()


def tones(seed, n_clips=24):
    """Two-second clips of noise; one of three tones for 0.3 s somewhere in three of four. The weak label says which."""
    generator = torch.Generator().manual_seed(seed)
    which = torch.arange(n_clips) % (len(CLASSES) + 1)
    onset = torch.randint(0, 64000 - 9600, (n_clips,), generator=generator)
    waveform = 0.01 * torch.randn(n_clips, 64000, generator=generator)
    time = torch.arange(9600) / 32000
    for row, (index, start) in enumerate(zip(which.tolist(), onset.tolist(), strict=True)):
        if index < len(CLASSES):
            waveform[row, start : start + 9600] += 0.3 * torch.sin(2 * torch.pi * [400, 1500, 5000][index] * time)
    return waveform, F.one_hot(which, len(CLASSES) + 1)[:, : len(CLASSES)].float()


def trained(steps, n_batches=8):
    torch.manual_seed(0)
    network = panns.SmallCnn(class_indices=CLASSES, channels=[8, 8, 16], embedding_dim=32)
    batches = [(network.log_mel(waveform), labels) for waveform, labels in map(tones, range(1, 1 + n_batches))]
    optimizer = torch.optim.Adam(network.parameters(), 3e-3)
    for step in range(steps):
        log_mel, labels = batches[step % n_batches]
        optimizer.zero_grad()
        F.binary_cross_entropy_with_logits(network(log_mel), labels).backward()
        optimizer.step()
    return network


def test_weak_labels_are_learned_and_tell_classes_apart_on_clips_that_were_not_heard():
    """Clips without a tone, and 192 of them in all: of twelve, each with a tone, chance decides what is learned.

    Bounds are far from what ten other seeds end with, for processors round differently.
    """
    network = trained(steps=100).eval()
    waveform, labels = tones(seed=0, n_clips=48)
    with torch.inference_mode():
        probability = network.framewise_probability(waveform).amax(dim=1)
        query = F.normalize(network.embed(waveform), dim=1)
    # Measured: 0.99 or 1.00 and 0.00, but for one seed in fourteen, which has not found one of the three: 0.67.
    assert probability[labels > 0].mean() > probability[labels == 0].mean() + 0.25

    # Embeddings of one class are nearer to each other than to those of another, on the whole.
    some = labels.any(dim=1)
    same = (labels @ labels.T)[some][:, some] > 0
    similarity = (query @ query.T)[some][:, some]
    assert similarity[same].mean() > similarity[~same].mean() + 0.03  # measured: 0.11 to 0.32


def test_training_is_the_same_to_the_bit():
    one, other = trained(steps=3, n_batches=1), trained(steps=3, n_batches=1)
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


def test_a_saved_network_is_the_same_again_and_so_are_its_files(tmp_path):
    network = small().eval()
    for directory in ("one", "other"):
        panns.save(network, tmp_path / directory)
    for name in ("config.json", "weights.safetensors"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "other" / name).read_bytes()
    detector, encoder = panns.load_detector(tmp_path / "one"), panns.load_query_encoder(tmp_path / "one")
    waveform = randn(2, 32000)
    assert torch.equal(detector.framewise_probability(waveform), network.framewise_probability(waveform))
    assert torch.equal(encoder.embed(waveform), network.embed(waveform))
    assert detector.class_indices == CLASSES
    assert encoder.query_dim == 5


def test_an_unknown_class_in_a_config_is_refused(tmp_path):
    panns.save(small(), tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"class": "Module"}))
    with pytest.raises(ValueError, match=r"config\.json: no class 'Module'"):
        panns.load_detector(tmp_path)
    with pytest.raises(ValueError, match="cannot save a Linear"):
        panns.save(torch.nn.Linear(1, 1), tmp_path)


def test_more_blocks_than_the_mels_allow_are_refused():
    with pytest.raises(ValueError, match="7 blocks do not fit 64 mels"):
        small(channels=[4] * 7)
