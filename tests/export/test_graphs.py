"""Exported graphs compute what their networks do, in real arithmetic; pruning takes what weighs nothing first."""

import pytest
import torch

from pipeline import separators
from pipeline.export import graphs
from pipeline.export.prune import prune
from pipeline.export.transform import FilterBank, RunningLevel, Transform
from pipeline.nn.features import istft, running_level, stft
from pipeline.separate import Unusable
from pipeline.separators import bandsplit, resunet
from pipeline.upstreams import mae
from tests.separators.test_separators import TINY, TINY_BLIND, UNET, tiny, tiny_blind

ENCODER = {"dim": 16, "depth": 2, "heads": 2}


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def used(network):
    """A network as it is after some training, as far as its norms and gates say."""
    generator = torch.Generator().manual_seed(1)
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm1d | torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1, generator=generator)
            module.running_var.uniform_(0.5, 2, generator=generator)
    return network.eval().requires_grad_(False)


@pytest.mark.parametrize(("n_fft", "hop", "samples"), [(128, 48, 65), (128, 48, 1000), (1024, 320, 9999)])
def test_the_transform_and_its_inverse_are_those_of_the_networks(n_fft, hop, samples):
    waveform, transform = randn(2, samples), Transform(n_fft, hop)
    real, imaginary = transform(waveform)
    spectrum = stft(waveform, n_fft=n_fft, hop_length=hop)
    torch.testing.assert_close(torch.complex(real, imaginary), spectrum, rtol=0, atol=2e-4)
    length = (spectrum.shape[1] - 1) * hop
    expected = istft(spectrum, n_fft=n_fft, hop_length=hop, length=length)
    torch.testing.assert_close(transform.inverse(real, imaginary, length), expected, rtol=0, atol=1e-4)


def test_the_level_near_a_place_is_that_of_the_networks():
    mixture = randn(2, 5001) * torch.linspace(0, 1, 5001)
    expected = running_level(mixture, 1000, 48)
    torch.testing.assert_close(RunningLevel(1000, 48)(mixture), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("mae_input", ["pad1024", "crop", "hop35"])
def test_the_filter_bank_is_the_encoders(mae_input):
    waveform = 0.1 * randn(2, 64000)
    expected = mae.Upstream(mae_input=mae_input, **ENCODER).features(waveform)
    found = FilterBank(mae_input, 64000)(waveform)
    assert found.shape == expected.shape
    assert (found - expected).abs().mean() < 1e-4
    assert (found - expected).abs().max() < 1e-1  # bins that are nothing but rounding


def network_of(name, **options):
    if name in TINY_BLIND:
        return used(tiny_blind(name))
    if name == "mae_resunet":
        torch.manual_seed(0)
        settings = TINY[name] | {"body": UNET, "upstream_config": {"mae_input": "crop", "drop_path": 0.0, **ENCODER}}
        settings |= {"upstream": "mae", "mae_input": "crop", **options}
        network = separators.build(name, query_dim=6, **settings)
    else:
        network = tiny(name, **options)
    network.segment_samples = 8000 if name == "mae_resunet" else 2000
    return used(network)


def assert_same(name, network, samples):
    graph = graphs.build(name, network)
    inputs = graph.examples(2, samples, torch.Generator().manual_seed(2))
    with torch.inference_mode():
        found = graph(*inputs)
        given = network.joint_query(*inputs[1:]) if len(inputs) > 1 else None
        expected = network(inputs[0]) if given is None else network(inputs[0], given)
    assert found.shape == expected.shape
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("samples", [999, 2000, 7001])  # shorter and longer than the mixtures of the training
@pytest.mark.parametrize("name", ["resunet", "bandsplit", "performer", "conv_tasnet"])
def test_a_graph_separates_as_its_network_at_any_length(name, samples):
    assert_same(name, network_of(name), samples)


@pytest.mark.parametrize("name", ["resunet", "bandsplit"])
def test_a_graph_takes_what_else_sounds_where_its_network_does(name):
    network = network_of(name, interferer_query=True)
    assert graphs.build(name, network).inputs == ("mixture", "query", "interferer_query")
    assert_same(name, network, 3000)


@pytest.mark.parametrize("fusion", ["freq", "film", "interferer", "channel", "deep"])
@pytest.mark.parametrize("layers", ["last", "weighted"])
def test_a_graph_with_an_encoder_separates_as_its_network(fusion, layers):
    assert_same("mae_resunet", network_of("mae_resunet", fusion=fusion, layers=layers), 8000)


def test_an_architecture_without_a_graph_is_refused():
    with pytest.raises(Unusable, match="architecture 'mae_bandsplit' cannot be exported; resunet, "):
        graphs.build("mae_bandsplit", tiny("resunet"))


@pytest.mark.parametrize("name", ["resunet", "bandsplit"])
def test_pruning_takes_channels_that_nothing_reads_first(name):
    """A third of the hidden channels are silenced on the way out: without them the network does the same."""
    sizes = {"resunet": {"channels": [6] * 6}, "bandsplit": {"width": 9, "frame_hidden": 18, "mask_hidden": 18}}
    torch.manual_seed(0)
    network = used(separators.build(name, query_dim=6, **TINY[name] | sizes[name]))
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, resunet.ResBlock):
                module.conv2.weight[:, ::3] = 0
            elif isinstance(module, bandsplit.Convolutions | bandsplit.Frame):
                module.leave.weight[:, ::3] = 0
            elif isinstance(module, bandsplit.Separator):
                for weight in module.mask2:
                    weight[:, ::3] = 0
    mixture, query = 0.1 * randn(2, 3000), randn(2, 6).abs()
    with torch.inference_mode():
        expected = network(mixture, query)
        gone = prune(network, 1 / 3)
        torch.testing.assert_close(network(mixture, query), expected, rtol=0, atol=1e-5)
    assert gone > 0
    assert_same(name, network, 3000)


def test_a_network_without_hidden_channels_is_refused():
    with pytest.raises(Unusable, match="--prune: conv_tasnet has no channels that can be taken out"):
        prune(tiny_blind("conv_tasnet"), 0.3)
