"""FAVOR+: softmax attention in linear time by positive random features, and the Transformer encoder built on it.

Choromanski et al., "Rethinking attention with Performers" (arXiv:2009.14794). With rows w_i of N(0, I),

    exp(q . k) = E_w [exp(w . q - |q|^2 / 2) exp(w . k - |k|^2 / 2)]                          (lemma 1)

so that m drawn features stand in for the exponential, and attention is two products that never meet a tokens x tokens
matrix. It is exact only in expectation: with 64 values per head and 256 features the error is 5 % where the entries of
queries and keys have a standard deviation of 0.25, and more than the output itself at 1. Hence `qk_norm`; and weights
learned with "favor" are no good for "sdpa".
"""

import math
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pipeline.nn.linear import Linear

Kind = Literal["query", "key"]
Stabiliser = Literal["paper", "full"]
AttentionKind = Literal["favor", "sdpa"]

QK_GAIN = 0.35  # of the normed queries and keys when training starts: where 256 features are still good


def orthogonal_features(n_features: int, dim: int, generator: torch.Generator) -> Float[Tensor, "n_features dim"]:
    """Gaussian rows, orthogonal within each block of `dim` of them (section 2.4); float32, on the CPU.

    Each row has the length of a Gaussian vector of its own, so that it is N(0, I) by itself.
    """
    blocks = []
    for _ in range(-(-n_features // dim)):
        basis, triangle = torch.linalg.qr(torch.randn(dim, dim, generator=generator, dtype=torch.float64, device="cpu"))
        # QR leaves the signs to the library. This choice makes the basis uniform over the rotations.
        blocks.append((basis * triangle.diagonal().sign()).T)
    length = torch.randn(n_features, dim, generator=generator, dtype=torch.float64, device="cpu").norm(dim=1)
    return (torch.cat(blocks)[:n_features] * length[:, None]).float()


def _exponentials(
    x: Float[Tensor, "batch heads tokens dim"],
    projection: Float[Tensor, "n_features dim"],
    kind: Kind,
    stabiliser: Stabiliser,
    key_mask: Bool[Tensor, "batch tokens"] | None,
) -> Float[Tensor, "batch heads tokens n_features"]:
    """The exponentials of `favor_features`: without eps and m^(-1/2), and 0 for what is not a key."""
    scale = x.shape[-1] ** -0.25
    exponent = x @ (projection * scale).T
    half_square = (x * scale).square().sum(dim=-1, keepdim=True) / 2
    # From here on in place: one tensor of features, the exponentials, is all that the backward pass keeps of them.
    if kind == "query":
        with torch.no_grad():
            shift = exponent.amax(dim=-1, keepdim=True)
        return exponent.sub_(shift if stabiliser == "full" else half_square + shift).exp_()
    if stabiliser == "full":
        exponent = exponent.sub_(half_square)
    if key_mask is not None:
        exponent = exponent.masked_fill_(~key_mask[:, None, :, None], -math.inf)
    with torch.no_grad():
        shift = exponent.amax(dim=(-2, -1), keepdim=True)
        shift = shift.nan_to_num(neginf=0.0)  # where no key is left
    return exponent.sub_(shift if stabiliser == "full" else half_square + shift).exp_()


def favor_features(
    x: Float[Tensor, "batch heads tokens dim"],
    projection: Float[Tensor, "n_features dim"],
    kind: Kind,
    stabiliser: Stabiliser,
    eps: float,
    key_mask: Bool[Tensor, "batch tokens"] | None = None,
) -> Float[Tensor, "batch heads tokens n_features"]:
    """Positive features whose inner products estimate the kernel, up to factors that attention divides out (eq. 5).

        x' = x / dim^(1/4),  u = W x',  h = |x'|^2 / 2
        paper   m^(-1/2) (exp(u - h - c) + eps),  c = max u of a query, or of all keys
        full    the same with c = max u - h of a query, or max(u - h) of all keys

    c keeps the largest exponential representable; it has no gradient, as it would cancel. In the paper's form it leaves
    out h, and eps outweighs the keys when these are long: at unit variance and eps 1e-4 attention is the mean of
    the values. `full` is a hundred times less sensitive, for the same cost.

    Where `key_mask` is false there is no key: its features are 0, and it has no say in c.
    """
    with torch.autocast(x.device.type, enabled=False):
        features = _exponentials(_full_precision(x), _full_precision(projection), kind, stabiliser, key_mask) + eps
    if kind == "key" and key_mask is not None:
        features = features * key_mask[:, None, :, None]
    return features * projection.shape[0] ** -0.5


def _full_precision(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _favor_core(
    q: Tensor, k: Tensor, v: Tensor, projection: Tensor, key_mask: Tensor | None, stabiliser: Stabiliser, eps: float
) -> Tensor:
    with torch.autocast(q.device.type, enabled=False):
        q, k, v, projection = (_full_precision(x) for x in (q, k, v, projection))
        # A column of ones beside the values, and the denominator comes out of the same product.
        values = F.pad(v, (0, 1), value=1.0)
        key = _exponentials(k, projection, "key", stabiliser, key_mask)
        real = values if key_mask is None else values * key_mask[:, None, :, None]
        # (exp + eps)^T V = exp^T V + eps 1^T V: the features with eps in them are never stored beside those without.
        state = key.transpose(-2, -1) @ values + eps * real.sum(dim=-2, keepdim=True)
        query = _exponentials(q, projection, "query", stabiliser, None)
        out = query @ state + eps * state.sum(dim=-2, keepdim=True)
        return out[..., :-1] / out[..., -1:].clamp(min=torch.finfo(out.dtype).tiny)


def favor_attention(
    q: Float[Tensor, "batch heads tokens dim"],
    k: Float[Tensor, "batch heads keys dim"],
    v: Float[Tensor, "batch heads keys dim"],
    projection: Float[Tensor, "n_features dim"],
    *,
    stabiliser: Stabiliser,
    eps: float,
    key_mask: Bool[Tensor, "batch keys"] | None = None,
    recompute: bool = False,
) -> Float[Tensor, "batch heads tokens dim"]:
    """phi(q) (sum_j phi(k_j) v_j^T) / (phi(q) . sum_j phi(k_j)), with the features of `favor_features` (eq. 4).

    Float32 whatever the autocast: the exponentials overflow float16, and lose what they sum to in bfloat16. Float64
    stays. Time and memory grow with the tokens, not with their square. With `recompute` the features, n_features / dim
    times as wide as queries and keys, are computed again in the backward pass instead of kept.

    Where `key_mask` is false there is no key. An item without any key gets zeros.
    """
    arguments = (q, k, v, projection, key_mask, stabiliser, eps)
    if recompute and torch.is_grad_enabled():
        # Nothing is random in there.
        return checkpoint(_favor_core, *arguments, use_reentrant=False, preserve_rng_state=False)
    return _favor_core(*arguments)


def sinusoids(position: Int[Tensor, "*batch tokens"], dim: int) -> Float[Tensor, "*batch tokens dim"]:
    """Sines, then cosines, of the position at dim / 2 rates from 1 down to 1e-4 (Vaswani et al. 2017, section 3.5)."""
    rate = 10000.0 ** (-torch.arange(dim // 2, dtype=torch.float64, device=position.device) / (dim / 2))
    angle = position[..., None].double() * rate
    return torch.cat([angle.sin(), angle.cos()], dim=-1).float()


class Attention(nn.Module):
    """Multi-head self-attention: FAVOR+, or the exact one in one fused call.

    With `qk_norm` the queries and keys of each head are brought to unit RMS, times a learned gain.
    """

    def __init__(
        self,
        *,
        dim: int,
        heads: int,
        attention: AttentionKind,
        n_features: int,
        stabiliser: Stabiliser,
        eps: float,
        qk_norm: bool,
        recompute: bool,
    ) -> None:
        super().__init__()
        self.heads = heads
        self.attention = attention
        self.stabiliser = stabiliser
        self.eps = eps
        self.recompute = recompute
        head_dim = dim // heads
        self.qkv = Linear(dim, 3 * dim)
        self.out = Linear(dim, dim)
        self.query_norm = nn.RMSNorm(head_dim, eps=1e-6) if qk_norm else None
        self.key_norm = nn.RMSNorm(head_dim, eps=1e-6) if qk_norm else None
        for norm in (self.query_norm, self.key_norm):
            if norm is not None:
                nn.init.constant_(norm.weight, QK_GAIN)
        # A checkpoint without the features it was trained with would be another network: they are part of it.
        self.register_buffer("projection", torch.zeros(n_features, head_dim) if attention == "favor" else None)
        self.projection: Tensor | None

    def forward(
        self, x: Float[Tensor, "batch tokens dim"], key_mask: Bool[Tensor, "batch tokens"] | None = None
    ) -> Float[Tensor, "batch tokens dim"]:
        """Transform the tokens, keeping their shape."""
        batch, tokens, dim = x.shape
        q, k, v = self.qkv(x).view(batch, tokens, 3, self.heads, dim // self.heads).permute(2, 0, 3, 1, 4)
        if self.query_norm is not None and self.key_norm is not None:
            with torch.autocast(x.device.type, enabled=False):
                q, k = self.query_norm(q.float()), self.key_norm(k.float())
        if self.projection is None:
            mask = None if key_mask is None else key_mask[:, None, None, :]
            h = F.scaled_dot_product_attention(q.to(v.dtype), k.to(v.dtype), v, attn_mask=mask)
        else:
            h = favor_attention(
                q,
                k,
                v,
                self.projection,
                stabiliser=self.stabiliser,
                eps=self.eps,
                key_mask=key_mask,
                recompute=self.recompute,
            )
        return self.out(h.transpose(1, 2).reshape(batch, tokens, dim))


class Block(nn.Module):
    """A pre-norm Transformer block; dropout is in the feed-forward half only. Takes the arguments of Attention."""

    def __init__(
        self,
        *,
        dim: int,
        heads: int,
        mlp_ratio: float,
        dropout: float,
        attention: AttentionKind,
        n_features: int,
        stabiliser: Stabiliser,
        eps: float,
        qk_norm: bool,
        recompute: bool,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attention = Attention(
            dim=dim,
            heads=heads,
            attention=attention,
            n_features=n_features,
            stabiliser=stabiliser,
            eps=eps,
            qk_norm=qk_norm,
            recompute=recompute,
        )
        self.norm2 = nn.LayerNorm(dim)
        hidden = int(dim * mlp_ratio)
        self.mlp = nn.Sequential(
            Linear(dim, hidden), nn.GELU(), nn.Dropout(dropout), Linear(hidden, dim), nn.Dropout(dropout)
        )

    def forward(
        self, x: Float[Tensor, "batch tokens dim"], key_mask: Bool[Tensor, "batch tokens"] | None = None
    ) -> Float[Tensor, "batch tokens dim"]:
        """Keep the shape, and the sum in float32."""
        x = x + self.attention(self.norm1(x), key_mask)
        return x + self.mlp(self.norm2(x))


class PerformerEncoder(nn.Module):
    """`depth` pre-norm blocks and a last norm, on tokens that get fixed sinusoidal positions: any number of them.

    attention    favor, or sdpa for the exact one, which has no use for n_features, stabiliser, eps and recompute
    n_features   random features per head; d ln d is the paper's rule of thumb, 266 for 64 values per head
    qk_norm      see Attention
    recompute    less memory for a tenth more time (see favor_attention)

    The first random features come from torch's global generator, as the weights do; `redraw` replaces them. They are
    saved with the weights. For one seed, the weights are the same whatever `attention` is.
    """

    def __init__(
        self,
        *,
        dim: int,
        depth: int,
        heads: int,
        mlp_ratio: float,
        dropout: float,
        attention: AttentionKind,
        n_features: int,
        stabiliser: Stabiliser,
        eps: float,
        qk_norm: bool,
        recompute: bool,
    ) -> None:
        super().__init__()
        if dim % heads or dim % 2:
            raise ValueError(f"dim {dim} must be even and a multiple of heads ({heads})")
        self.dim = dim
        self.blocks = nn.ModuleList(
            Block(
                dim=dim,
                heads=heads,
                mlp_ratio=mlp_ratio,
                dropout=dropout,
                attention=attention,
                n_features=n_features,
                stabiliser=stabiliser,
                eps=eps,
                qk_norm=qk_norm,
                recompute=recompute,
            )
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(dim)
        self.redraw(0, int(torch.randint(2**31, (), device="cpu")))

    def forward(
        self,
        tokens: Float[Tensor, "batch tokens dim"],
        key_mask: Bool[Tensor, "batch tokens"] | None = None,
        position: Int[Tensor, "batch tokens"] | None = None,
    ) -> Float[Tensor, "batch tokens dim"]:
        """Keep the shape; float32. Tokens where `key_mask` is false are padding: the others do not see them.

        `position` counts from 0; without it, the tokens are in order and none is missing.
        """
        if position is None:
            position = torch.arange(tokens.shape[1], device=tokens.device)[None]
        h = tokens.float() + sinusoids(position, self.dim)
        for block in self.blocks:
            h = block(h, key_mask)
        return self.norm(h)

    @torch.no_grad()
    def redraw(self, step: int, seed: int) -> None:
        """New random features in every layer, a function of seed, step and layer: the same on every machine.

        The network becomes another one for a moment; evaluation uses what is there, without redrawing.
        """
        attentions = [module for module in self.modules() if isinstance(module, Attention)]
        for layer, attention in enumerate(attentions):
            if attention.projection is not None:
                state = int(np.random.SeedSequence([seed, step, layer]).generate_state(1, np.uint64)[0])
                generator = torch.Generator().manual_seed(state % 2**63)
                n_features, dim = attention.projection.shape
                attention.projection.copy_(orthogonal_features(n_features, dim, generator))
