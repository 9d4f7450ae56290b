"""Networks and losses keep to the device of what they are given: a tensor made on the CPU would stop a run on a GPU.

Shown without one: torch's fake tensors carry a device and no numbers, and refuse to mix devices.
"""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily

from pipeline import upstreams
from pipeline.evaluation.metrics.sdr import sdr
from pipeline.evaluation.metrics.si_sdr import si_sdr
from pipeline.mixtures import mixing
from pipeline.nn import fbank, features, losses
from pipeline.nn.panns import SmallCnn
from pipeline.separators import Batch, build, build_blind
from pipeline.separators.performer import Pretrainer
from pipeline.training.mae import MaskedAutoencoder
from tests.separators.test_conv_tasnet import TINY as CONV_TASNET
from tests.separators.test_mae_resunet import FUSIONS, SETTINGS, UNET
from tests.separators.test_performer import TINY as PERFORMER
from tests.upstreams.test_upstreams import SMALL

SAMPLES = 64000
MAE = {"dim": 64, "depth": 2, "heads": 2}
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:.*CUDA is not available")]
precisions = pytest.mark.parametrize("bf16", [False, True])


@pytest.fixture(autouse=True)
def gpu(monkeypatch):
    """All tensors of a test are fake. What looks at their numbers is replaced, and what other tests may have cached."""

    monkeypatch.setattr(fbank, "resample", lambda waveform, old, new: waveform[..., :: old // new])
    monkeypatch.setattr(fbank, "mel_banks", lambda: torch.zeros(fbank.N_FFT // 2 + 1, fbank.N_MELS))
    monkeypatch.setattr(features, "mel_filters", lambda n_fft, n_mels, **_: torch.zeros(n_fft // 2 + 1, n_mels))
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield


def there(*shape, **options):
    return torch.zeros(*shape, device="cuda", **options)


def moved(make, *arguments, **options) -> nn.Module:
    """The module that make(...) gives, with its tensors on a GPU."""
    with unset_fake_temporarily():
        module = make(*arguments, **options)
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                fake = there(parameter.shape, dtype=parameter.dtype)
                part._parameters[name] = nn.Parameter(fake, parameter.requires_grad)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = there(buffer.shape, dtype=buffer.dtype)
    return module


def test_two_devices_are_told_apart():
    with pytest.raises(RuntimeError, match="two different devices"):
        there(3) + torch.zeros(3)


def devices_of_estimates(model, bf16):
    """Of a part in training and in evaluation, and of whole mixtures with what queries share; and of their loss."""
    found = []
    for network in (model.train(), model.eval()):
        with torch.autocast("cuda", dtype=torch.bfloat16, enabled=bf16):
            part = slice(320, 320 + 9920)
            found.append(network(there(2, SAMPLES), there(2, 8), part))
            given = there(2, dtype=torch.bool)
            batch = Batch(there(2, SAMPLES), part, there(2, 9920), there(2, 8), there(2, 8), given)
            found += network.losses(batch, ["l1"]).values()
    with torch.inference_mode():
        shared = model.shared(there(2, SAMPLES))
        found.append(model(there(2, SAMPLES), there(2, 8), **shared))
    return [estimate.device.type for estimate in found]


@precisions
@pytest.mark.parametrize("mae_input", ["pad1024", "crop", "hop35"])
@pytest.mark.parametrize("fusion", FUSIONS)
def test_mae_resunet(fusion, mae_input, bf16):
    settings = {**SETTINGS, "fusion": fusion, "mae_input": mae_input, "freeze_mae": False}
    config = {**MAE, "mae_input": mae_input, "drop_path": 0.1}
    separator = moved(build, "mae_resunet", body=UNET, query_dim=8, upstream_config=config, **settings)
    assert set(devices_of_estimates(separator, bf16)) == {"cuda"}


@precisions
def test_resunet(bf16):
    assert devices_of_estimates(moved(build, "resunet", **UNET, query_dim=8), bf16) == ["cuda"] * 5


@pytest.mark.parametrize("name", ["none", "constant", "panns", "hubert", "wavlm", "data2vec"])
def test_upstreams(name):
    if name in ("none", "constant"):
        config = {"dim": 16, "mae_input": "crop"}
    elif name == "panns":
        arguments = {"class_indices": [0], "channels": [4, 8], "embedding_dim": 8}
        config = {"network": {"class": "SmallCnn", "arguments": arguments}}
    else:
        config = {"config": SMALL["config"], "normalise": True, "weights": "random"}
    upstream = moved(upstreams.build, name, **config)
    hidden = upstream.hidden(there(2, SAMPLES))
    for layers in ("last", "last3", "weighted"):
        h = upstreams.combine(upstream, hidden, layers, there(upstream.n_layers))
        frames = upstreams.align(upstream.to_steps(h), upstream.frames_per_step, 201)
        assert (frames.device.type, frames.shape[1]) == ("cuda", 201)


@precisions
@pytest.mark.parametrize("decoder", ["local", "global"])
def test_the_autoencoder(decoder, bf16):
    sizes = {**MAE, "decoder": decoder, "decoder_dim": 64, "decoder_depth": 2, "decoder_heads": 2}
    model = moved(MaskedAutoencoder, **sizes)
    with torch.autocast("cuda", dtype=torch.bfloat16, enabled=bf16):
        loss, _, _ = model(there(2, 1024, 128), there(2, 512), 0.8)
    assert loss.device.type == "cuda"


@precisions
@pytest.mark.parametrize("changes", [{}, {"front_end": "conv"}, {"attention": "sdpa"}, {"consistency": "magsq"}])
def test_performer(changes, bf16):
    separator = moved(build_blind, "performer", **{**PERFORMER, **changes})
    with torch.autocast("cuda", dtype=torch.bfloat16, enabled=bf16):
        estimates, masks = separator.separate(there(2, 8000))
    assert {estimates.device.type, masks.device.type} == {"cuda"}


def test_conv_tasnet():
    separator = moved(build_blind, "conv_tasnet", **CONV_TASNET)
    estimates, masks = separator.separate(there(2, 8000))
    assert {estimates.device.type, masks.device.type} == {"cuda"}


@pytest.mark.parametrize("mask_mode", ["token", "zero"])  # the others' shapes depend on numbers
@pytest.mark.parametrize("target", ["logmag", "wave"])
def test_the_performers_pretraining(mask_mode, target):
    pretrainer = moved(lambda: Pretrainer(build_blind("performer", **PERFORMER), mask_mode=mask_mode, target=target))
    assert pretrainer(there(2, 8000), torch.Generator()).device.type == "cuda"


def test_the_detector():
    network = moved(SmallCnn, class_indices=[0, 1], channels=[4, 8], embedding_dim=8)
    waveform = there(2, SAMPLES)
    assert network.framewise_probability(waveform).device.type == network.embed(waveform).device.type == "cuda"


@pytest.mark.parametrize("search", ["exact", "least_squares"])
@pytest.mark.parametrize("objective", ["snr", "si_snr", "mse"])
def test_mixture_invariant_losses(objective, search):
    estimates, mixtures = there(2, 4, 8000), there(2, 2, 8000)
    found = losses.mixit_loss(estimates, mixtures, objective=objective, search=search)
    assert found.loss.device.type == "cuda"
    assert losses.sparsity_loss(estimates, mixtures.sum(dim=1), "report").device.type == "cuda"
    assert losses.diversity_loss(there(2, 4, 33, 100)).device.type == "cuda"


@pytest.mark.parametrize("normalize", ["none", "joint", "declip", "separate"])
def test_mixing_and_metrics(normalize):
    mixture, target, _ = mixing.mix(there(2, 8000), there(2, 8000), there(2), normalize)
    assert sdr(mixture, target).device.type == si_sdr(mixture, target).device.type == "cuda"
