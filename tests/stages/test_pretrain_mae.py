"""The stages pretrain_mae and probe, on tones: they learn, resume to the same bytes, convert, and say what was lost."""

import hashlib
import itertools
import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.core.config import AudioParams
from pipeline.evaluation.probing import ProbeParams
from pipeline.mixtures.shards import ClipReader
from pipeline.nn.fbank import PADDING, STD
from pipeline.separators import build
from pipeline.stages.pretrain_mae import pretrain_mae
from pipeline.stages.probe import probe
from pipeline.training.mae import FilterBanks, PretrainParams, mean_patch, reconstruction_loss, untrained
from pipeline.upstreams.mae import Encoder, MaskedAutoencoder
from tests.corpora import write_clips

AUDIO = AudioParams(sample_rate=32000, clip_seconds=4.0, segment_seconds=2.0)
PROBE = ProbeParams(regularisation=0.1, bootstrap_resamples=20, batch_size=4)
MODEL = {
    **{"dim": 32, "depth": 2, "heads": 2, "mlp_ratio": 2.0},
    **{"decoder": "global", "decoder_dim": 32, "decoder_depth": 1, "decoder_heads": 2},
}


def params(**changes):
    return PretrainParams.model_validate(
        {
            "weights": None,
            "weights_sha256": None,
            "weights_format": "audiomae",
            "model": MODEL,
            "seed": 0,
            "steps": 6,
            "batch_size": 4,
            "learning_rate": 3e-3,
            "warmup_steps": 2,
            "weight_decay": 1e-4,
            "mask_ratio": 0.8,
            "frames": 128,
            "magnitude": True,
            "roll": False,
            "short": "pad",
            "precision": "fp32",
            "device": "cpu",
            "recompute": False,
            "log_every_steps": 2,
            "checkpoint_every_seconds": 60.0,
            "n_reconstructions": 2,
            "probe": PROBE.model_dump(),
            **changes,
        }
    )


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    root = tmp_path_factory.mktemp("clips")
    return write_clips(root / "train", 6), write_clips(root / "eval", 4, seed=1)


@pytest.fixture
def run(clips, tmp_path, monkeypatch):
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))

    def run(name="out", **changes):
        out = tmp_path / name
        return out, pretrain_mae(*clips, out, out.with_suffix(".csv"), audio=AUDIO, params=params(**changes))

    return run


def test_pretraining_lowers_the_loss_and_writes_what_separators_need(run):
    _, begun = run("begun", steps=1)
    out, summary = run(steps=60, batch_size=8, learning_rate=1e-2)
    assert summary["loss"] < begun["loss"] - 0.05  # measured over seeds: 0.24 to 0.28 lower
    assert summary["loss_of_mean_patch"] == begun["loss_of_mean_patch"] < 1
    config = json.loads((out / "config.json").read_text())
    assert config["model"] == MODEL
    MaskedAutoencoder(**config["model"]).load_state_dict(load_file(out / "weights.safetensors"))
    assert set(summary["probe"]) == {"before", "after", "difference"}
    with np.load(out / "reconstructions.npz") as pictures:
        assert pictures["original"].shape == pictures["reconstruction"].shape == (2, 128, 128)
        hidden = np.isnan(pictures["visible"])
        assert hidden.mean() == pytest.approx(0.8, abs=0.02)
        assert np.array_equal(pictures["visible"][~hidden], pictures["original"][~hidden])


def test_the_same_run_gives_the_same_bytes_and_another_seed_others(run):
    one, two, other = (run(name, seed=seed)[0] for name, seed in (("one", 0), ("two", 0), ("other", 1)))
    files = ("weights.safetensors", "config.json", "reconstructions.npz")
    assert all((one / f).read_bytes() == (two / f).read_bytes() for f in files)
    assert (one / files[0]).read_bytes() != (other / files[0]).read_bytes()


def test_a_killed_pretraining_ends_in_the_same_bytes(run, monkeypatch):
    whole, _ = run("whole", checkpoint_every_seconds=1e-9)
    calls, batch = itertools.count(), FilterBanks.batch

    def dies(self, *arguments, **options):
        if next(calls) == 4:
            raise KeyboardInterrupt
        return batch(self, *arguments, **options)

    monkeypatch.setattr(FilterBanks, "batch", dies)
    with pytest.raises(KeyboardInterrupt):
        run("halves", checkpoint_every_seconds=1e-9)
    monkeypatch.setattr(FilterBanks, "batch", batch)
    halves, _ = run("halves", checkpoint_every_seconds=1e-9)
    assert (whole / "weights.safetensors").read_bytes() == (halves / "weights.safetensors").read_bytes()
    assert whole.with_suffix(".csv").read_bytes() == halves.with_suffix(".csv").read_bytes()


@pytest.fixture(scope="module")
def data(clips, tmp_path_factory):
    return FilterBanks(ClipReader(clips[0], 32000), tmp_path_factory.mktemp("f") / "f.npy", short="pad")


BATCH = {"size": 5, "seed": 0, "frames": 128, "magnitude": False, "roll": False}


def test_a_batch_is_a_function_of_its_number_and_an_epoch_has_every_clip_once(data):
    one = data.batch(3, **BATCH)
    data.batch(9, **BATCH)
    assert all(torch.equal(a, b) for a, b in zip(one, data.batch(3, **BATCH), strict=True))
    count = len(data.clip_ids)
    seen = [row for n in range(2 * count // 4) for row in data.rows(n, size=4, seed=0)]
    assert sorted(seen[:count]) == sorted(seen[count : 2 * count]) == list(range(count))
    assert seen[:count] != seen[count : 2 * count]


def test_what_follows_a_short_clip_is_padding_or_the_clip_again(data, clips, tmp_path):
    frames = int(data.n_frames[0])
    assert frames == 398
    assert (data.features[:, frames:] == np.float16(PADDING)).all()
    again = FilterBanks(ClipReader(clips[0], 32000), tmp_path / "f.npy", short="repeat")
    assert (again.n_frames == 1024).all()
    assert np.allclose(again.features[0, 400:700], again.features[0, :300], atol=0.05)


def test_a_louder_waveform_is_a_shift_of_the_features(data):
    plain, loud = (data.batch(0, **{**BATCH, "magnitude": m, "frames": 1024})[0] for m in (False, True))
    shift = (loud - plain)[0, :398]
    audible = plain[0, :398] > -1.0
    assert audible.any()
    spread = shift[audible].max() - shift[audible].min()
    assert spread < 1e-3
    assert abs(shift[audible].mean()) <= 2 * np.log(2) / (2 * STD)
    assert torch.equal(loud[0, 398:], plain[0, 398:])  # padding has no level


def test_the_mean_patch_is_a_better_guess_than_zero(data):
    torch.manual_seed(0)
    model = untrained(MODEL, params())
    _, guess = reconstruction_loss(model.eval(), data, mean_patch(data), params())
    _, zero = reconstruction_loss(model, data, torch.zeros(8, 256), params())
    assert guess < zero < 1.01


def test_the_local_decoder_takes_whole_clips_only():
    with pytest.raises(ValueError, match="decoder local has windows for 1024 frames, not for 128"):
        params(model={**MODEL, "decoder": "local"})


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"model": {**MODEL, "decoder": "local", "decoder_depth": 2}, "frames": 1024, "recompute": True},
        {"precision": "bf16"},
        {"roll": True},
    ],
    ids=["local", "bf16", "roll"],
)
def test_each_way_of_training_lowers_the_loss(run, changes):
    _, begun = run("begun", steps=1, **changes)
    _, ended = run("ended", steps=60, batch_size=8, learning_rate=1e-2, **changes)
    assert ended["loss"] < begun["loss"] - 0.02


def test_a_published_encoder_is_converted_in_place_of_training(run, tmp_path):
    torch.manual_seed(3)
    encoder = Encoder(dim=64, depth=1, heads=1, post_norm=True)
    names = {"patch_embed.proj": "local_encoder.proj", "cls_token": "extra_tokens"}
    names["pos_embed"] = "fixed_positional_encoder.positions"
    state = {}
    for name, tensor in encoder.state_dict().items():
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        state[name] = tensor.contiguous()
    path = tmp_path / "model.safetensors"
    save_file(state, path)
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    out, summary = run(weights=str(path), weights_sha256=sha256, weights_format="eat")
    assert summary["steps"] == 0
    assert "loss" not in summary
    converted = Encoder(**json.loads((out / "config.json").read_text())["model"])
    converted.load_state_dict(load_file(out / "weights.safetensors"))
    features = torch.randn(1, 32, 128)
    assert torch.equal(converted.hidden(features)[-1], encoder.hidden(features)[-1])


def test_a_published_autoencoder_is_evaluated_on_whole_clips_whatever_was_to_be_heard(run, tmp_path):
    sizes = {"dim": 64, "depth": 1, "heads": 1, "decoder": "local", "decoder_dim": 64, "decoder_depth": 1}
    torch.manual_seed(3)
    path = tmp_path / "pretrained.pth"
    torch.save({"model": MaskedAutoencoder(**sizes, decoder_heads=16).state_dict()}, path)
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    out, summary = run(weights=str(path), weights_sha256=sha256, weights_format="audiomae", frames=128)
    assert summary["steps"] == 0
    assert summary["loss"] > 0
    assert json.loads((out / "config.json").read_text())["model"]["decoder"] == "local"


UNET = {"n_fft": 1024, "hop_length": 320, "channels": [4] * 6, "norm_momentum": 0.1, "phase_bias": 1.0}
SETTINGS = {
    **{
        "upstream": "mae",
        "mae_input": "pad1024",
        "layers": "auto",
        "repeat": "interleave",
        "fusion": "film",
        "fusion_options": {},
    },
    **{"lora_rank": 0, "encoder_learning_rate": 1e-3, "encoder_weight_decay": 0.0, "layer_decay": 1.0},
    **{"unfreeze_step": 0, "drop_path": 0.0, "bf16_frozen": False, "context": "anchor"},
}


def test_audio_that_upstreams_would_hear_too_fast_is_refused(clips, tmp_path):
    audio = AUDIO.model_copy(update={"sample_rate": 44100})
    with pytest.raises(ValueError, match=r"audio\.sample_rate is 44100; upstreams hear 32000 Hz"):
        pretrain_mae(*clips, tmp_path / "out", tmp_path / "out.csv", audio=audio, params=params())
    with pytest.raises(ValueError, match=r"audio\.sample_rate is 44100; upstreams hear 32000 Hz"):
        probe(tmp_path, tmp_path, *clips, audio=audio, params=PROBE)


@pytest.mark.parametrize("updated", [False, True])
def test_the_probe_of_a_separator_tells_what_training_changed(run, clips, tmp_path, updated):
    out, pretraining = run()
    sizes = {k: v for k, v in MODEL.items() if not k.startswith("decoder")}
    model = {"body": UNET, **SETTINGS, "freeze_mae": not updated, "query_dim": 4}
    model["upstream_config"] = {**sizes, "mae_input": "pad1024", "drop_path": 0.0}
    separator = build("mae_resunet", **model)
    state = load_file(out / "weights.safetensors")
    separator.load_pretrained(
        {f"encoder.{n}": t for n, t in state.items() if not n.startswith("decoder") and n != "mask_token"}
    )
    if updated:
        torch.nn.init.zeros_(separator.upstream.encoder.norm.weight)  # all forgotten
    directory = tmp_path / "separator"
    directory.mkdir()
    tensors = {n: t.contiguous() for n, t in separator.state_dict().items()}
    save_file(tensors, directory / "weights.safetensors")
    config = {"architecture": "mae_resunet", "model": model, "segment_samples": 64000}
    (directory / "config.json").write_text(json.dumps(config))
    summary = probe(directory, out, *clips, audio=AUDIO, params=PROBE)
    if updated:
        assert summary["difference"]["mean_average_precision"] < 0
    else:
        assert summary["after"] == summary["before"] == pretraining["probe"]["after"]  # nothing of the padding
        assert summary["difference"]["mean_average_precision"] == 0
