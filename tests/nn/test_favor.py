"""FAVOR+ equals the published features and their quadratic product, in linear memory; its encoder knows padding."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F

from pipeline.nn.favor import PerformerEncoder, favor_attention, favor_features, orthogonal_features, sinusoids
from tests.golden import fill

ENCODER = {
    **{"dim": 32, "depth": 2, "heads": 4, "mlp_ratio": 2.0, "dropout": 0.0, "attention": "favor", "n_features": 24},
    **{"stabiliser": "full", "eps": 1e-8, "qk_norm": True, "recompute": False},
}
each_stabiliser = pytest.mark.parametrize("stabiliser", ["paper", "full"])


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=generator(seed), dtype=dtype)


def inputs(tokens=37, heads=2, dim=8, n_features=24, scale=0.5, dtype=torch.float32):
    q, k, v = (scale * randn(2, heads, tokens, dim, seed=i, dtype=dtype) for i in range(3))
    return q, k, v / scale, orthogonal_features(n_features, dim, generator(3)).to(dtype)


def quadratic(q, k, v, projection, key_mask=None, **form):
    """The attention matrix written out."""
    query = favor_features(q, projection, "query", **form)
    weights = query @ favor_features(k, projection, "key", key_mask=key_mask, **form).transpose(-2, -1)
    return weights / weights.sum(dim=-1, keepdim=True) @ v


def encoder(seed=0, **changes):
    torch.manual_seed(seed)
    return PerformerEncoder(**ENCODER | changes)


def assert_close(found, expected, atol=1e-5):
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)


@pytest.mark.parametrize("eps", [1e-4, 1e-6])
def test_features_of_the_published_code(eps):
    golden = fill.arrays("favor")
    for kind in ("query", "key"):
        found = favor_features(golden[f"small_{kind[0]}"], golden["small_w"], kind, "paper", eps)
        assert_close(found, golden[f"small_eps{eps:g}_{kind[0]}f"], atol=1e-6)


@pytest.mark.parametrize("size", ["small", "full"])
@pytest.mark.parametrize("eps", [1e-4, 1e-6])
def test_output_of_the_published_code(size, eps):
    golden = fill.arrays("favor")
    name = f"{size}_eps{eps:g}"
    arguments = [golden[f"{size}_{x}"] for x in "qkvw"]
    assert_close(favor_attention(*arguments, stabiliser="paper", eps=eps), golden[f"{name}_out"], atol=3e-6)
    if size == "small":
        doubled = favor_attention(*(x.double() for x in arguments), stabiliser="paper", eps=eps)
        assert_close(doubled, golden[f"{name}_out64"], atol=1e-12)


@pytest.mark.parametrize(("n_features", "dim"), [(24, 8), (13, 8), (5, 8)])
def test_random_features_are_orthogonal_in_blocks(n_features, dim):
    rows = orthogonal_features(n_features, dim, generator())
    assert rows.shape == (n_features, dim)
    for block in rows.split(dim):
        gram = block @ block.T
        assert_close(gram, gram.diagonal().diag())


def test_every_row_of_the_random_features_is_a_gaussian_vector():
    rows = torch.stack([orthogonal_features(8, 4, generator(seed)) for seed in range(2000)])
    assert_close(rows.mean(dim=0), torch.zeros(8, 4), atol=0.1)
    assert_close(rows.std(dim=0), torch.ones(8, 4), atol=0.1)
    lengths = rows.square().sum(dim=-1)  # chi-squared with 4 degrees of freedom
    assert abs(lengths.mean() - 4) < 0.1
    assert abs(lengths.var() - 8) < 0.8


def test_more_features_come_closer_to_exact_attention():
    q, k, v, _ = inputs(dtype=torch.float64)
    exact = F.scaled_dot_product_attention(q, k, v)

    def error(n_features):
        projection = orthogonal_features(n_features, 8, generator(5)).double()
        return ((favor_attention(q, k, v, projection, stabiliser="full", eps=0.0) - exact).norm() / exact.norm()).item()

    assert error(4096) < 0.05
    assert error(4096) < error(256) / 2


@each_stabiliser
@pytest.mark.parametrize("eps", [1e-4, 1e-8])
@pytest.mark.parametrize("masked", [False, True])
def test_attention_is_the_quadratic_product_of_its_features(stabiliser, eps, masked):
    arguments = inputs()
    key_mask = torch.arange(37)[None] < torch.tensor([[37], [20]]) if masked else None
    form = {"stabiliser": stabiliser, "eps": eps, "key_mask": key_mask}
    assert_close(favor_attention(*arguments, **form), quadratic(*arguments, **form))


def test_both_stabilisers_are_the_same_attention_without_eps():
    arguments = inputs(scale=1.5, dtype=torch.float64)
    paper, full = (favor_attention(*arguments, stabiliser=s, eps=0.0) for s in ("paper", "full"))
    assert_close(full, paper, atol=1e-10)


def test_the_full_stabiliser_bears_a_larger_eps():
    q, k, v, w = inputs(dim=64, n_features=256, scale=1.0)
    exact = favor_attention(*(x.double() for x in (q, k, v, w)), stabiliser="full", eps=0.0)

    def error(stabiliser):
        out = favor_attention(q, k, v, w, stabiliser=stabiliser, eps=1e-6)
        return ((out - exact).norm() / exact.norm()).item()

    assert error("full") < error("paper") / 5


@each_stabiliser
@pytest.mark.parametrize("eps", [1e-4, 1e-8])
def test_masked_keys_are_as_if_they_were_not_there(stabiliser, eps):
    q, k, v, w = inputs()
    form = {"stabiliser": stabiliser, "eps": eps}
    short = favor_attention(q, k[..., :20, :], v[..., :20, :], w, **form)
    k, v = k.clone(), v.clone()
    k[..., 20:, :], v[..., 20:, :] = 30.0, 1e4  # the largest keys by far
    k.requires_grad_()
    out = favor_attention(q, k, v, w, key_mask=(torch.arange(37) < 20).expand(2, -1), **form)
    assert_close(out, short, atol=1e-6)
    out.square().sum().backward()
    assert k.grad.isfinite().all()
    assert k.grad[..., :20, :].any()
    assert not k.grad[..., 20:, :].any()


@each_stabiliser
def test_an_item_without_keys_gets_zeros(stabiliser):
    key_mask = torch.tensor([[True], [False]]).expand(2, 37)
    out = favor_attention(*inputs(), stabiliser=stabiliser, eps=1e-6, key_mask=key_mask)
    assert out[0].any()
    assert not out[1].any()


@each_stabiliser
def test_the_gradient_is_that_of_the_quadratic_product(stabiliser):
    q, k, v, w = inputs(dtype=torch.float64)
    form = {"stabiliser": stabiliser, "eps": 1e-6}
    target = randn(*v.shape, seed=9, dtype=torch.float64)

    def gradients(function, **more):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        (function(*leaves, w, **form, **more) * target).sum().backward()
        return [x.grad for x in leaves]

    expected = gradients(quadratic)
    for recompute in (False, True):
        for found, right in zip(gradients(favor_attention, recompute=recompute), expected, strict=True):
            assert_close(found, right, atol=1e-9)


@pytest.mark.parametrize("scale", [0.0, 1.0, 5.0, 30.0])
@each_stabiliser
def test_outputs_and_gradients_are_finite_for_long_queries_and_keys(stabiliser, scale):
    q, k, v, w = inputs(scale=1.0)
    leaves = [(scale * q).requires_grad_(), (scale * k).requires_grad_(), v.requires_grad_()]
    out = favor_attention(*leaves, w, stabiliser=stabiliser, eps=1e-8)
    out.square().sum().backward()
    assert out.isfinite().all()
    assert all(x.grad.isfinite().all() for x in leaves)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_features_are_float32_under_autocast(dtype):
    q, k, v, w = (x.to(dtype) for x in inputs(scale=2.0))
    form = {"stabiliser": "full", "eps": 1e-8}
    expected = favor_attention(*(x.float() for x in (q, k, v, w)), **form)
    with torch.autocast("cpu", torch.bfloat16):
        assert favor_features(q, w, "query", **form).dtype == torch.float32
        found = favor_attention(q, k, v, w, **form)
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)


def saved_bytes(function):
    """What the backward pass keeps, counting every storage once."""
    storages = {}

    def keep(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = function()
    assert out.requires_grad
    return sum(storage.nbytes() for storage in storages.values())


@pytest.mark.parametrize("recompute", [False, True])
def test_memory_grows_with_the_tokens_and_recomputing_keeps_no_features(recompute):
    def bytes_of(tokens):
        q, k, v, w = inputs(tokens=tokens, dim=16, n_features=128)
        leaves = [x.requires_grad_() for x in (q, k, v)]
        return saved_bytes(
            lambda: favor_attention(*leaves, w, stabiliser="full", eps=1e-8, recompute=recompute).square().sum()
        )

    short, long = bytes_of(500), bytes_of(2000)
    assert 3.9 < long / short < 4.1
    features = 2 * 2 * 2000 * 128 * 4  # of 2 items and 2 heads, float32
    assert long < features if recompute else 2 * features < long < 3 * features


def test_positions_are_all_different_and_start_at_zero():
    table = sinusoids(torch.arange(3000), 16)
    assert table.dtype == torch.float32
    assert torch.equal(table[0], torch.tensor([0.0] * 8 + [1.0] * 8))
    distance = torch.cdist(table[::7].double(), table[::7].double()) + 9 * torch.eye(len(table[::7]))
    assert distance.min() > 1e-3


@pytest.mark.parametrize("attention", ["favor", "sdpa"])
def test_padded_tokens_change_nothing_for_the_others(attention):
    model = encoder(attention=attention).eval()
    tokens = randn(2, 30, 32)
    alone = model(tokens[:, :19])
    padded = tokens.clone()
    padded[:, 19:] = 100.0
    assert_close(model(padded, (torch.arange(30) < 19).expand(2, -1))[:, :19], alone, atol=1e-5)


def test_positions_tell_equal_tokens_apart_and_can_be_given():
    model = encoder().eval()
    tokens = randn(1, 1, 32).expand(2, 6, -1)
    out = model(tokens)
    assert (out[0, 0] - out[0, 5]).norm() > 1e-2
    position = torch.arange(6).expand(2, -1)
    assert torch.equal(model(tokens, position=position), out)
    assert not torch.allclose(model(tokens, position=position + 7), out)


def test_weights_do_not_depend_on_the_kind_of_attention():
    favor, sdpa = encoder(attention="favor").state_dict(), encoder(attention="sdpa").state_dict()
    assert all(torch.equal(favor[name], tensor) for name, tensor in sdpa.items())
    assert sorted(favor.keys() - sdpa.keys()) == [f"blocks.{i}.attention.projection" for i in range(2)]


def test_queries_and_keys_are_normed_with_a_gain_that_starts_at_0_35():
    attention = encoder().blocks[0].attention
    assert (attention.query_norm.weight == 0.35).all()
    rms = attention.key_norm(50 * randn(4, 8)).square().mean(dim=-1).sqrt()
    assert_close(rms, torch.full((4,), 0.35), atol=1e-4)
    assert encoder(qk_norm=False).blocks[0].attention.query_norm is None


def test_redrawn_features_depend_on_seed_step_and_layer_only():
    def projections(model):
        return [block.attention.projection.clone() for block in model.blocks]

    first, second = encoder(seed=0), encoder(seed=1)
    assert not torch.equal(projections(first)[0], projections(second)[0])
    state = torch.get_rng_state()
    first.redraw(1000, 5)
    second.redraw(1000, 5)
    assert torch.equal(torch.get_rng_state(), state)
    drawn = projections(first)
    assert all(torch.equal(a, b) for a, b in zip(drawn, projections(second), strict=True))
    assert not torch.equal(drawn[0], drawn[1])
    for step, seed in ((2000, 5), (1000, 6)):
        first.redraw(step, seed)
        assert not torch.equal(projections(first)[0], drawn[0])


def test_redrawn_features_are_saved_and_evaluation_is_deterministic():
    model = encoder().eval()
    model.redraw(1000, 5)
    other = encoder(seed=1).eval()
    other.load_state_dict(model.state_dict())
    tokens = randn(2, 11, 32)
    assert torch.equal(model(tokens), model(tokens))
    assert torch.equal(model(tokens), other(tokens))


@pytest.mark.parametrize("attention", ["favor", "sdpa"])
@pytest.mark.parametrize("qk_norm", [True, False])
def test_every_parameter_of_the_encoder_gets_a_finite_gradient(attention, qk_norm):
    model = encoder(attention=attention, qk_norm=qk_norm)
    (model(randn(2, 11, 32)) * randn(2, 11, 32, seed=4)).sum().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_recomputing_changes_neither_output_nor_gradients():
    kept = encoder(dropout=0.5)
    again = copy.deepcopy(kept)
    for block in again.blocks:
        block.attention.recompute = True
    gradients = []
    for model in (kept, again):
        torch.manual_seed(7)
        with torch.autocast("cpu", torch.bfloat16):
            out = model(randn(2, 11, 32))
        out.square().sum().backward()
        gradients.append([out, *(p.grad for p in model.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("attention", ["favor", "sdpa"])
def test_autocast_reaches_the_linear_layers_and_the_output_stays_float32(attention):
    model = encoder(attention=attention).eval()
    tokens = randn(2, 50, 32)
    with torch.no_grad():
        plain = model(tokens)
        with torch.autocast("cpu", torch.bfloat16):
            found = model(tokens)
    assert found.dtype == torch.float32
    assert not torch.equal(found, plain)
    assert ((found - plain).norm() / plain.norm()).item() < 0.02


def test_dropout_is_in_the_feed_forward_half_only():
    model = encoder(dropout=0.5)
    tokens = randn(1, 9, 32)
    assert not torch.equal(model(tokens), model(tokens))
    attention = model.blocks[0].attention
    assert torch.equal(attention(tokens), attention(tokens))
    assert torch.equal(model.eval()(tokens), model(tokens))


def test_sizes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"dim 30 must be even and a multiple of heads \(4\)"):
        encoder(dim=30)


def test_one_token_attends_to_itself():
    q, k, v, w = inputs(tokens=1)
    assert_close(favor_attention(q, k, v, w, stabiliser="full", eps=1e-8), v, atol=1e-6)
    assert math.isfinite(encoder()(randn(1, 1, 32)).sum().item())
