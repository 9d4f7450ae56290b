"""Products by the second library are torch's own, and are taken only where they are meant to be."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pipeline.nn import linear as module
from pipeline.nn.linear import LEAST_PRODUCTS, Linear, linear

SHAPES = [(824, 96, 288), (516, 768, 64), (3, 200, 8192)]
needs_both = pytest.mark.skipif(
    not (torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()), reason="torch has not both"
)


@pytest.fixture
def calls(monkeypatch):
    """As if on the processor in question; how often the other library was asked."""
    count = []
    conv2d = F.conv2d
    monkeypatch.setattr(module, "mkl_is_slower", lambda: True)
    monkeypatch.setattr(module.F, "conv2d", lambda *a, **k: count.append(1) or conv2d(*a, **k))
    return count


def inputs(rows, n_in, n_out, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    x, weight, bias, errors = (
        torch.randn(*shape, generator=generator, dtype=torch.float64)
        for shape in ((rows, n_in), (n_out, n_in), (n_out,), (rows, n_out))
    )
    return [t.to(dtype) for t in (x, weight * n_in**-0.5, bias, errors)]


@needs_both
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients_are_those_of_the_product(calls, shape, with_bias):
    def results(function, dtype):
        x, weight, bias, errors = inputs(*shape, dtype)
        parts = [x.requires_grad_(), weight.requires_grad_(), *([bias.requires_grad_()] if with_bias else [])]
        y = function(x, weight, bias if with_bias else None)
        return [y.detach(), *torch.autograd.grad(y, parts, errors)]

    found = results(linear, torch.float32)
    assert calls
    for ours, exact in zip(found, results(F.linear, torch.float64), strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=2e-6, atol=2e-6 * float(exact.abs().max()))


@needs_both
def test_any_layout_and_number_of_dimensions(calls):
    x, weight, bias, _ = inputs(832, 96, 288)
    for rows in (
        x.view(4, 208, 96),
        x.view(4, 208, 96).transpose(0, 1),
        x.t().contiguous().t(),
        x.view(8, 104, 96)[::2],
    ):
        y = linear(rows, weight.t().contiguous().t(), bias)
        torch.testing.assert_close(y, F.linear(rows, weight, bias), rtol=1e-5, atol=1e-5)
        assert y.shape == (*rows.shape[:-1], 288)
        assert y.is_contiguous()
    assert len(calls) == 4


@needs_both
def test_gradients_only_for_what_asks_for_them(calls):
    x, weight, bias, errors = inputs(824, 96, 288)
    for asks in (x, weight, bias):
        for part in (x, weight, bias):
            part.requires_grad_(part is asks)
        (found,) = torch.autograd.grad(linear(x, weight, bias), [asks], errors)
        (wanted,) = torch.autograd.grad(F.linear(x, weight, bias), [asks], errors)
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    assert len(calls) == 4  # the gradient of x alone is one more


@needs_both
def test_the_same_bits_again(calls):
    x, weight, bias, errors = (t.requires_grad_() for t in inputs(824, 96, 288))

    def once():
        y = linear(x, weight, bias)
        return [y.detach(), *torch.autograd.grad(y, [x, weight, bias], errors.detach())]

    first = once()
    assert all(torch.equal(a, b) for a, b in zip(first, once(), strict=True))


@pytest.mark.parametrize(
    ("rows", "dtype", "autocast"),
    [(824, torch.float64, False), (824, torch.bfloat16, False), (824, torch.float32, True), (2, torch.float32, False)],
)
def test_torch_where_the_types_or_the_size_are_not_for_it(calls, rows, dtype, autocast):
    x, weight, bias, _ = inputs(rows, 96, 288, dtype)
    assert (rows * 96 * 288 < LEAST_PRODUCTS) == (rows == 2)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        assert torch.equal(linear(x, weight, bias), F.linear(x, weight, bias))
    assert not calls


@needs_both
@pytest.mark.filterwarnings("ignore:TF32 acceleration")
def test_where_onednn_is_switched_off(calls):
    x, weight, bias, _ = inputs(832, 96, 288)
    rows = x.view(4, 208, 96)
    with torch.backends.mkldnn.flags(enabled=False):
        torch.testing.assert_close(linear(rows, weight, bias), F.linear(rows, weight, bias), rtol=1e-5, atol=1e-5)
    assert calls


@needs_both
def test_a_gradient_that_is_one_number_expanded(calls):
    x, weight, bias, _ = inputs(824, 96, 288)
    weight.requires_grad_()
    found, wanted = (torch.autograd.grad(f(x, weight, bias).sum(), weight)[0] for f in (linear, F.linear))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-3)


@needs_both
@pytest.mark.parametrize("rows", [1, 2])
def test_few_rows_of_a_large_layer(calls, rows):
    x, weight, bias, errors = inputs(rows, 2048, 4096)
    x.requires_grad_()
    found, wanted = (f(x[None], weight, bias) for f in (linear, F.linear))
    assert calls
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    gradients = [torch.autograd.grad(y, x, errors[None])[0] for y in (found, wanted)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)


def test_no_rows(calls):
    assert linear(torch.zeros(2, 0, 96), torch.zeros(288, 96), None).shape == (2, 0, 288)


def test_torch_elsewhere(calls, monkeypatch):
    monkeypatch.setattr(module, "mkl_is_slower", lambda: False)
    x, weight, bias, _ = inputs(824, 96, 288)
    assert torch.equal(linear(x, weight, bias), F.linear(x, weight, bias))
    assert not calls


@pytest.mark.parametrize(
    ("vendor", "capability", "slower"),
    [
        ("AuthenticAMD", "AVX512", True),
        ("AuthenticAMD", "AVX2", False),
        ("GenuineIntel", "AVX512", False),
        (None, "AVX512", False),
    ],
)
def test_only_amd_with_avx512_is_slower(monkeypatch, tmp_path, vendor, capability, slower):
    if vendor:
        (tmp_path / "cpuinfo").write_text(f"processor\t: 0\nvendor_id\t: {vendor}\n")
    monkeypatch.setattr(module, "CPUINFO", tmp_path / "cpuinfo")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    for library in (torch.backends.mkl, torch.backends.mkldnn):
        monkeypatch.setattr(library, "is_available", lambda: True)
    assert module.mkl_is_slower.__wrapped__() is slower


def test_a_layer_is_torchs_but_for_its_product():
    layer = Linear(8, 4)
    assert isinstance(layer, nn.Linear)
    other = nn.Linear(8, 4)
    other.load_state_dict(layer.state_dict())
    x = torch.randn(3, 8)
    torch.testing.assert_close(layer(x), other(x))


@needs_both
def test_a_step_of_training_gives_the_same_weights(calls):
    x, _, _, errors = inputs(824, 96, 288)
    layers = [Linear(96, 288), nn.Linear(96, 288)]
    layers[1].load_state_dict(before := {k: v.clone() for k, v in layers[0].state_dict().items()})
    for layer in layers:
        optimizer = torch.optim.SGD(layer.parameters(), 1.0)
        (layer(x) * errors).mean(dim=0).sum().backward()
        optimizer.step()
    assert calls
    for (name, ours), torchs in zip(layers[0].named_parameters(), layers[1].parameters(), strict=True):
        assert float((ours.detach() - before[name]).abs().max()) > 0.05
        torch.testing.assert_close(ours, torchs, rtol=1e-5, atol=1e-5)


@needs_both
@pytest.mark.parametrize("shape", [(824, 96), (4, 206, 96)])
def test_the_result_may_be_written_to(calls, shape):
    x, weight, bias, _ = inputs(824, 96, 288)
    weight.requires_grad_()

    def gradient(function):
        y = F.relu(function(x.view(shape), weight, bias).mul_(2), inplace=True)
        return torch.autograd.grad(y.square().sum(), weight)[0]

    torch.testing.assert_close(gradient(linear), gradient(F.linear), rtol=1e-4, atol=1e-3)
    assert calls


@needs_both
@pytest.mark.parametrize("frozen", ["x", "weight"])
def test_keeps_only_what_the_gradients_need(calls, frozen):
    x, weight, bias, errors = inputs(824, 96, 288)
    kept = []

    def gradient(function):
        rows, layer = x.clone(), weight.clone()
        asks = (layer if frozen == "x" else rows).requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
            y = function(rows, layer, bias)
        with torch.no_grad():
            asks.mul_(2)  # its gradient does not depend on it
        return torch.autograd.grad(y, asks, errors)[0]

    ours = gradient(linear)
    assert kept == [x.numel() if frozen == "x" else weight.numel()]
    torch.testing.assert_close(ours, gradient(F.linear), rtol=1e-4, atol=1e-4)
    assert calls
