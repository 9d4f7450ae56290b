"""Mixture-invariant training, around the loss: entries that fit, how long an epoch is, and which batch comes when."""

from pathlib import Path

import numpy as np
import pytest
import torch
from ruamel.yaml import YAML

from pipeline.core.devices import is_out_of_memory
from pipeline.mixtures.moms import Moms, is_validation
from pipeline.nn.losses import diversity_loss, mixit_loss, sparsity_loss
from pipeline.separators import build_blind
from pipeline.training import mixit
from pipeline.training.loop import weigh
from pipeline.training.mixit import (
    MixitParams,
    MusicParams,
    PretrainPerformerParams,
    Streams,
    anchor_streams,
    build_optimizer,
    clip_streams,
    learning_rate_factor,
    loss_weights,
    music_streams,
    read_entry,
    seed_of,
    training_losses,
)
from tests.corpora import write_recordings, write_sounds
from tests.tiny_mixit import CONV_TASNET, MIXIT, PERFORMER, PRETRAIN, RATE, SECONDS, entry, music_params, write_music

ENTRY = {
    **{"architecture": "performer", "model": "mixit_models.performer", "segment_seconds": None, "epochs": 1.5},
    **{"mixtures": "whole", "pretrained": False, "diversity": 0.0, "sparsity": 0.0, "sparsity_form": "report"},
}


def training_loss(separator, mixtures, params, mixit_params, device):
    """The weighted sum that training minimises."""
    return weigh(training_losses(separator, mixtures, params, mixit_params, device), loss_weights(params))


@pytest.fixture(scope="module")
def music(tmp_path_factory):
    return write_music(tmp_path_factory.mktemp("music"))


# ------------------------------------------------------------------------------------------------------------- entries


def write_params(path: Path, changes=None, data="music", **models) -> Path:
    sizes = {"performer": PERFORMER, "conv_tasnet": CONV_TASNET} | models
    YAML().dump({f"mixit_{data}": {"one": ENTRY | (changes or {})}, "mixit_models": sizes}, path)
    return path


@pytest.mark.parametrize("data", ["music", "clips"])
def test_an_entry_has_the_sizes_it_points_to(tmp_path, data):
    found = read_entry("one", data, write_params(tmp_path / "params.yaml", data=data))
    assert (found.name, found.data, found.model) == ("one", data, PERFORMER)
    assert (found.params.epochs, found.params.segment_seconds) == (1.5, None)
    changes = {"architecture": "conv_tasnet", "model": "mixit_models.conv_tasnet"}
    assert read_entry("one", data, write_params(tmp_path / "params.yaml", changes, data)).model == CONV_TASNET


@pytest.mark.parametrize(
    ("changes", "models", "message"),
    [
        ({"epochs": "many"}, {}, r"mixit_music\.one\.epochs: Input should be a valid number \(got 'many'\)"),
        ({"epoch": 1.0}, {}, r"mixit_music\.one\.epoch: Extra inputs are not permitted"),
        ({"segment_seconds": []}, {}, r"mixit_music\.one\.segment_seconds: .*at least 1 item"),
        ({"diversity": -0.1}, {}, r"mixit_music\.one\.diversity: .*greater than or equal to 0"),
        ({"mixtures": "stems"}, {}, r"mixit_music\.one\.mixtures: .*'whole' or 'subsets'"),
        ({"sparsity_form": "l2"}, {}, r"mixit_music\.one\.sparsity_form: .*'report' or 'l1l2'"),
        ({"architecture": "transformer"}, {}, "no separator 'transformer'; there are"),
        ({"architecture": "resunet"}, {}, r"mixit_music\.one\.architecture: 'resunet' needs a query"),
        ({"model": "mixit_models.large"}, {}, r"no section 'mixit_models\.large'"),
        ({"model": "mixit_models.conv_tasnet"}, {}, r"mixit_models\.conv_tasnet\.dim: Field required"),
        ({}, {"performer": PERFORMER | {"dim": 1.5}}, r"mixit_models\.performer\.dim: .*integer \(got 1\.5\)"),
        ({}, {"performer": PERFORMER | {"sample_rate": 8000}}, r"performer\.sample_rate: Extra inputs are not"),
    ],
)
def test_a_mistake_names_its_key(tmp_path, changes, models, message):
    with pytest.raises(ValueError, match=message):
        read_entry("one", "music", write_params(tmp_path / "params.yaml", changes, **models))


def test_an_entry_of_clips_cannot_be_pretrained(tmp_path):
    path = write_params(tmp_path / "params.yaml", {"pretrained": True}, "clips")
    with pytest.raises(ValueError, match=r"mixit_clips\.one\.pretrained: the pretraining hears music"):
        read_entry("one", "clips", path)


def test_an_entry_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"no section 'mixit_music\.two'"):
        read_entry("two", "music", write_params(tmp_path / "params.yaml"))


@pytest.mark.parametrize("lengths", [[0.5, 0.5], [0.5, 0.0], [-1.0]])
def test_segment_lengths_are_above_zero_and_each_there_once(tmp_path, lengths):
    with pytest.raises(ValueError, match=r"lengths above 0, each once|greater than 0"):
        music_params(tmp_path, segment_seconds=lengths)


def test_the_sections_of_the_project_are_those_that_are_read():
    from pipeline.core.config import load_params

    path = Path(__file__).parents[2] / "params.yaml"
    music = load_params("music", MusicParams, path)
    assert load_params("mixit", MixitParams, path).max_stems >= 1
    pretrain = load_params("pretrain_performer", PretrainPerformerParams, path)
    assert pretrain.segment_seconds is None or pretrain.segment_seconds in music.segment_seconds
    for data in ("music", "clips"):
        for name in YAML(typ="safe").load(path)[f"mixit_{data}"]:
            found = read_entry(name, data, path)
            # What is pretrained loads its weights into its own sizes.
            assert not found.params.pretrained or (data == "music" and found.params.model == pretrain.model)


# ------------------------------------------------------------------------------------------------------------- streams


class Numbers:
    """Stands for moms whose batch n is known by a name."""

    def __init__(self, name: str) -> None:
        self.name = name

    @property
    def n_batches(self) -> int:
        return 3

    def batch(self, n: int):
        return self.name, n

    def describe(self, n: int) -> list[tuple[str, str]]:
        return [(f"{self.name}{n}", "a"), (f"{self.name}{n}", "b")]


def test_an_epoch_hears_as_much_audio_whatever_the_length_and_the_batch():
    def steps(epochs, batch_size, *seconds):
        return Streams(RATE, seconds, [Numbers("x")] * len(seconds), 100.0).steps(epochs, batch_size)

    assert steps(1.0, 1, 5.0) == 10  # 2 x 5 s a step
    assert steps(1.0, 2, 5.0) == steps(1.0, 1, 10.0) == 5
    assert steps(2.5, 2, 5.0) == 13
    assert steps(1.0, 1, 2.5, 7.5) == 10  # 5 s on average
    assert steps(1e-9, 8, 5.0) == 1


def test_every_batch_is_of_one_length_and_all_lengths_come():
    streams = Streams(RATE, (1.0, 2.0, 4.0), [Numbers("x"), Numbers("y"), Numbers("z")], 100.0)
    buckets = [streams.bucket(n, 0) for n in range(300)]
    assert buckets == [streams.bucket(n, 0) for n in range(300)]
    assert buckets != [streams.bucket(n, 1) for n in range(300)]
    assert all(buckets.count(i) > 70 for i in range(3))
    for n in (0, 5, 17):
        name = "xyz"[buckets[n]]
        assert streams.moms[buckets[n]].batch(n) == (name, n)
        assert streams.describe(n, 0) == f"{name}{n} + a, {name}{n} + b"


def open_music(music, **changes):
    index, params = music
    options = {"seconds": None, "seed": 0, "batch_size": 2, "max_stems": 3, "snr_range": [-5.0, 5.0]}
    options |= {"mixtures": "subsets", "random_subsets": True, "fixed": False}
    return music_streams(index, changes.pop("split", "train"), params, **options | changes)


def test_music_streams_have_a_length_each(music):
    streams = open_music(music)
    assert (streams.sample_rate, tuple(streams.seconds)) == (RATE, SECONDS)
    assert streams.epoch_seconds == 4 * 2.0  # four tracks to train on
    shapes = {streams.load(n, 0).mixtures.shape for n in range(12)}
    assert shapes == {(2, 2, round(seconds * RATE)) for seconds in SECONDS}
    assert open_music(music, seconds=[0.5]).steps(3.0, 2) == 12


def test_the_splits_of_music_share_no_track(music):
    tracks = {}
    for split in ("train", "validation", "test"):
        moms = open_music(music, split=split, fixed=True, seconds=[0.5]).moms[0]
        tracks[split] = {track for n in range(moms.n_batches) for pair in moms.describe(n) for track in pair}
    assert {split: len(some) for split, some in tracks.items()} == {"train": 4, "validation": 2, "test": 2}
    assert len(set.union(*tracks.values())) == 8


def test_a_length_that_was_not_indexed_is_named(music):
    with pytest.raises(ValueError, match=r"segments of 1\.5 s were not indexed: music\.segment_seconds has no 1\.5"):
        open_music(music, seconds=[0.5, 1.5])


def test_music_that_is_gone_is_said_to_be_made_or_moved(music, tmp_path):
    index, params = music
    gone = (index, params.model_copy(update={"root": str(tmp_path / "gone")}))
    with pytest.raises(FileNotFoundError, match=r"music\.root '.*gone' is not a directory now.*--force index_music"):
        open_music(gone)


def test_anchor_streams_are_whole_anchors_of_their_part_where_no_length_is_said(tmp_path):
    sounds = [(f"c{index}x{number}", index, [index]) for index in (3, 72, 137, 300) for number in range(40)]
    directory = write_sounds(tmp_path / "train", sounds)
    n_held_out = sum(is_validation(clip) for clip, _, _ in sounds)
    options = {"seed": 0, "batch_size": 2, "max_stems": 2, "snr_range": [-5.0, 5.0], "random_subsets": True}
    for part, n_anchors, n_items in (("train", 160 - n_held_out, None), ("validation", n_held_out, 6), ("all", 160, 6)):
        streams = anchor_streams(directory, part, seconds=None, n_items=n_items, **options)
        assert (streams.sample_rate, list(streams.seconds)) == (RATE, [0.25])
        assert streams.epoch_seconds == n_anchors * 0.25
        assert streams.load(0, 0).mixtures.shape == (2, 2, 2000)
        if n_items:
            assert streams.moms[0].n_batches == 3
    short = anchor_streams(directory, "train", seconds=[0.125, 0.25], n_items=None, **options)
    assert {short.load(n, 0).mixtures.shape[2] for n in range(12)} == {1000, 2000}
    assert short.epoch_seconds == (160 - n_held_out) * 0.25


def test_clip_streams_have_the_length_of_the_anchors_and_as_much_audio_as_the_clips(tmp_path):
    sounds = [(f"c{index}x{number}", index, [index]) for index in (3, 72) for number in range(40)]
    anchors = write_sounds(tmp_path / "anchors", sounds)
    rng = np.random.default_rng(0)
    noises = {clip: 0.1 * rng.standard_normal(3 * RATE) for clip, _, _ in sounds}
    clips = write_recordings(tmp_path / "clips", noises, RATE)
    n_held_out = sum(is_validation(clip) for clip in noises)
    options = {"seconds": None, "seed": 0, "batch_size": 2, "snr_range": [-5.0, 5.0]}
    for part, n_clips, n_items in (("train", 80 - n_held_out, None), ("validation", n_held_out, 6)):
        streams = clip_streams(clips, anchors, part, n_items=n_items, **options)
        assert isinstance(streams.moms[0], Moms)
        assert (streams.sample_rate, list(streams.seconds)) == (RATE, [0.25])
        assert streams.epoch_seconds == n_clips * 3.0
        assert streams.load(0, 0).mixtures.shape == (2, 2, 2000)
        heard = {clip for n in range(3) for pair in streams.moms[0].describe(n) for clip in pair}
        assert all(is_validation(clip) == (part == "validation") for clip in heard)


def test_moms_of_music_and_of_anchors_are_the_same_kind(music):
    assert all(isinstance(moms, Moms) for moms in open_music(music).moms)


def test_purposes_and_seeds_have_streams_of_their_own():
    purposes = (mixit.TRAIN, mixit.VALIDATION, mixit.TEST, mixit.SINGLE, mixit.BUCKET)
    seeds = [seed_of(seed, purpose) for seed in range(20) for purpose in purposes]
    assert len(set(seeds)) == 100
    assert all(0 <= seed < 2**63 for seed in seeds)


# ------------------------------------------------------------------------------------------------------------ training


def test_the_learning_rate_warms_up_and_falls_along_half_a_cosine():
    def factor(step, **changes):
        return learning_rate_factor(step, **{"warmup_steps": 0, "steps": 100, "final": 0.1} | changes)

    assert [factor(0), factor(50), factor(100)] == pytest.approx([1.0, 0.55, 0.1])
    assert factor(25) == pytest.approx(0.1 + 0.45 * (1 + np.cos(np.pi / 4)))
    assert all(factor(n) > factor(n + 1) for n in range(100))
    warm = [factor(n, warmup_steps=4, steps=10**9) for n in range(8)]
    assert warm == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0, 1.0, 1.0])


@pytest.mark.parametrize("architecture", ["performer", "conv_tasnet"])
@pytest.mark.parametrize("form", ["report", "l1l2"])
def test_the_loss_is_mixits_with_the_others_times_their_weights(architecture, form):
    torch.manual_seed(0)
    one = entry(architecture)
    separator = build_blind(architecture, sample_rate=RATE, **one.model).eval()
    mixtures = 0.1 * torch.randn(3, 2, 1000)

    def loss(**changes):
        params = one.params.model_copy(update={"sparsity_form": form, **changes})
        return training_loss(separator, mixtures, params, MIXIT, torch.device("cpu")).item()

    estimates, masks = separator.separate(mixtures.sum(dim=1))
    mixit_value = mixit_loss(estimates, mixtures).loss.mean().item()
    diversity = diversity_loss(masks).mean().item()
    sparsity = sparsity_loss(estimates, mixtures.sum(dim=1), form).mean().item()
    assert loss() == pytest.approx(mixit_value, abs=1e-5)
    assert loss(diversity=0.5) == pytest.approx(mixit_value + 0.5 * diversity, abs=1e-5)
    assert loss(sparsity=2.0) == pytest.approx(mixit_value + 2 * sparsity, abs=1e-5)
    assert loss(diversity=0.1, sparsity=0.1) == pytest.approx(mixit_value + 0.1 * (diversity + sparsity), abs=1e-5)
    assert diversity > 0.1
    assert sparsity > 0.1


@pytest.mark.parametrize("objective", ["snr", "si_snr", "mse"])
def test_the_loss_is_the_one_asked_for_and_reaches_every_weight(objective):
    torch.manual_seed(0)
    one = entry("performer", diversity=0.1, sparsity=0.1)
    separator = build_blind("performer", sample_rate=RATE, **one.model).eval()
    mixtures = 0.1 * torch.randn(2, 2, 1000)
    params = MIXIT.model_copy(update={"loss": objective})
    training_loss(separator, mixtures, one.params, params, torch.device("cpu")).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in separator.parameters())
    assert separator.embed.weight.grad.any()
    plain = training_loss(separator, mixtures, entry().params, params, torch.device("cpu")).item()
    found = mixit_loss(separator(mixtures.sum(dim=1)), mixtures, objective=objective).loss.mean()
    assert plain == pytest.approx(found.item(), abs=1e-5)


def test_in_bfloat16_the_loss_is_float32_and_near():
    torch.manual_seed(0)
    one = entry("performer", diversity=0.1)
    separator = build_blind("performer", sample_rate=RATE, **one.model).eval()
    mixtures = 0.1 * torch.randn(2, 2, 1000)
    exact, rounded = (
        training_loss(separator, mixtures, one.params, MIXIT.model_copy(update={"precision": p}), torch.device("cpu"))
        for p in ("fp32", "bf16")
    )
    assert rounded.dtype == torch.float32
    assert rounded.item() == pytest.approx(exact.item(), abs=0.05)


def test_vectors_do_not_decay_and_what_is_frozen_is_left_out():
    separator = build_blind("performer", sample_rate=RATE, **PERFORMER)
    separator.embed.requires_grad_(False)
    matrices, vectors = build_optimizer(separator, 1e-3, 0.1).param_groups
    assert (matrices["weight_decay"], vectors["weight_decay"]) == (0.1, 0.0)
    assert all(p.ndim > 1 for p in matrices["params"])
    assert all(p.ndim == 1 for p in vectors["params"])
    trained = sum(p.numel() for p in separator.parameters() if p.requires_grad)
    assert sum(p.numel() for group in (matrices, vectors) for p in group["params"]) == trained
    assert not any(p is separator.embed.weight for p in matrices["params"])


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("Tried to allocate 20.00 GiB"), True),
        (MemoryError(), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: can't allocate memory: you"), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied (2x3 and 4x5)"), False),
        (ValueError("out of memory"), False),
        (FloatingPointError("the loss is nan at step 3"), False),
    ],
)
def test_memory_giving_out_is_told_from_other_errors(error, expected):
    assert is_out_of_memory(error) == expected


def test_torch_says_it_as_expected_when_memory_gives_out():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)


def test_the_tiny_params_of_these_tests_are_valid():
    for params in (MIXIT, PRETRAIN):
        assert type(params).model_validate(params.model_dump()) == params
