"""Audio-MAE (Huang et al. 2022, arXiv:2207.06405): a masked autoencoder of log-mel patches; its encoder as upstream.

The arithmetic and the tensor names are those of the published code (facebookresearch/AudioMAE), so that its checkpoint
loads and gives its features. Where that code differs from the paper, the code is followed:

- a clip's 512 patches are ordered time first (token 8 t + f), but their positions are those of an 8 x 64 grid, so that
  token n has the position (n mod 64, n div 64). The checkpoint holds these. They are unique, but no geometry;
- the decoder that was trained (`local`) has 16 shifted-window blocks, whatever depth that code is asked for (here it is
  `decoder_depth`); `global` has ordinary ones, of which Zhao et al. (arXiv:2407.11745) say that there are 8;
- clips are padded with zeros after the logarithm: loud noise, not silence.

The published weights are CC-BY-NC 4.0: not for commercial use. EAT and SSLAM, whose encoders have the same geometry,
are MIT.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pipeline import upstreams
from pipeline.core.runtime import read_json
from pipeline.core.weights import read_safetensors, read_tensors
from pipeline.nn.fbank import HOP_SAMPLES, N_MELS, PADDING, WINDOW_SAMPLES, fbank, normalise, to_16k, whole_frames
from pipeline.nn.linear import Linear

PATCH = 16  # frames, and mels
BANDS = N_MELS // PATCH
MAX_FRAMES = 1024
MAX_STEPS = MAX_FRAMES // PATCH
NORM_EPSILON = 1e-6

Decoder = Literal["local", "global"]
MaeInput = Literal["pad1024", "crop", "hop35"]


def sincos(dim: int, position: Int[Tensor, " n"]) -> Float[Tensor, "n dim"]:
    """Sines, then cosines, of the position at dim / 2 rates from 1 down to 1e-4 (float64)."""
    rate = 10000.0 ** (-torch.arange(dim // 2, dtype=torch.float64) / (dim / 2))
    angle = position.double()[:, None] * rate
    return torch.cat([angle.sin(), angle.cos()], dim=1)


def positions(dim: int) -> Float[Tensor, "1 tokens dim"]:
    """The fixed positions of the class token (zeros) and of 512 patches: n mod 64, then n div 64 (see the module)."""
    n = torch.arange(MAX_STEPS * BANDS)
    table = torch.cat([sincos(dim // 2, n % MAX_STEPS), sincos(dim // 2, n // MAX_STEPS)], dim=1)
    return F.pad(table, (0, 0, 1, 0)).float()[None]


class Attention(nn.Module):
    """Multi-head self-attention, computed in one fused call."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = Linear(dim, 3 * dim)
        self.proj = Linear(dim, dim)

    def forward(self, x: Float[Tensor, "batch tokens dim"]) -> Float[Tensor, "batch tokens dim"]:
        """Transform the tokens, keeping their shape."""
        batch, tokens, dim = x.shape
        q, k, v = self.qkv(x).view(batch, tokens, 3, self.heads, dim // self.heads).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, tokens, dim))


class Mlp(nn.Module):
    """Two layers with GELU."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = Linear(dim, hidden)
        self.fc2 = Linear(hidden, dim)

    def forward(self, x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch dim"]:
        """Transform the tokens, keeping their shape."""
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """A Transformer block; in training a share `drop_path` of the items passes each branch by.

    The norms come before the branches, as in A-MAE, or after the sums (`post_norm`), as in EAT and SSLAM.
    """

    def __init__(self, dim: int, heads: int, mlp_ratio: float, drop_path: float = 0.0, post_norm: bool = False) -> None:
        super().__init__()
        self.post_norm = post_norm
        self.norm1 = nn.LayerNorm(dim, eps=NORM_EPSILON)
        self.attn = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=NORM_EPSILON)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.drop_path = drop_path

    def forward(self, x: Float[Tensor, "batch tokens dim"]) -> Float[Tensor, "batch tokens dim"]:
        """Transform the tokens, keeping their shape."""
        if self.post_norm:
            x = self.norm1(x + self._keep(self.attn(x)))
            return self.norm2(x + self._keep(self.mlp(x)))
        x = x + self._keep(self.attn(self.norm1(x)))
        return x + self._keep(self.mlp(self.norm2(x)))

    def _keep(self, branch: Tensor) -> Tensor:
        if not self.training or self.drop_path == 0:
            return branch
        kept = torch.rand(branch.shape[0], 1, 1, device=branch.device) >= self.drop_path
        return branch * kept / (1 - self.drop_path)


class WindowAttention(nn.Module):
    """Cosine attention inside windows, with a bias from the offset between two patches (Liu et al. 2021, Swin v2)."""

    def __init__(self, dim: int, heads: int, window: tuple[int, int]) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = Linear(dim, 3 * dim)
        self.proj = Linear(dim, dim)
        self.tau = nn.Parameter(torch.ones(heads))
        self.meta_mlp = nn.ModuleDict({"fc1": Linear(2, 384), "fc2": Linear(384, heads)})
        grid = torch.stack(torch.meshgrid(*(torch.arange(n) for n in window), indexing="ij"), dim=-1).view(-1, 2)
        offset = (grid[:, None] - grid[None]).float()
        self.register_buffer("log_offset", offset.sign() * offset.abs().log1p(), persistent=False)
        self.log_offset: Tensor

    def bias(self) -> Float[Tensor, "heads tokens tokens"]:
        """Bias that is added to the logits of each pair of places in a window."""
        hidden = F.dropout(F.relu(self.meta_mlp["fc1"](self.log_offset)), 0.1, self.training)
        return self.meta_mlp["fc2"](hidden).permute(2, 0, 1)

    def forward(
        self, x: Float[Tensor, "windows tokens dim"], mask: Float[Tensor, "per_clip tokens tokens"] | None
    ) -> Float[Tensor, "windows tokens dim"]:
        """Keep the shape; `mask` is added to the logits of the windows of each clip."""
        windows, tokens, dim = x.shape
        q, k, v = self.qkv(x).view(windows, tokens, 3, self.heads, dim // self.heads).permute(2, 0, 3, 1, 4)
        norms = q.norm(dim=-1, keepdim=True) * k.norm(dim=-1, keepdim=True).transpose(-2, -1)
        logits = (q @ k.transpose(-2, -1)) / norms.clamp(min=1e-6)
        logits = logits / self.tau.clamp(min=0.01)[:, None, None] + self.bias()
        if mask is not None:
            logits = (logits.view(-1, mask.shape[0], self.heads, tokens, tokens) + mask[:, None]).view_as(logits)
        return self.proj((logits.softmax(dim=-1) @ v).transpose(1, 2).reshape(windows, tokens, dim))


class WindowBlock(nn.Module):
    """A block of the local decoder: windows of 4 x 4 patches, every other block's shifted by two steps of time.

    The norms come after the branches (Swin v2), not before them as in the encoder.
    """

    def __init__(self, dim: int, heads: int, mlp_ratio: float, shift: int) -> None:
        super().__init__()
        self.attn = WindowAttention(dim, heads, (4, 4))
        self.norm1 = nn.LayerNorm(dim, eps=NORM_EPSILON)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.norm2 = nn.LayerNorm(dim, eps=NORM_EPSILON)
        self.shift = shift
        self.register_buffer("mask", _wrap_mask(shift) if shift else None, persistent=False)
        self.mask: Tensor | None

    def forward(self, x: Float[Tensor, "batch tokens dim"]) -> Float[Tensor, "batch tokens dim"]:
        """Keep the shape; the tokens are a whole clip's 64 x 8."""
        x = x + self.norm1(self._attend(x))
        return x + self.norm2(self.mlp(x))

    def _attend(self, x: Tensor) -> Tensor:
        plane = x.view(x.shape[0], MAX_STEPS, BANDS, -1).roll(-self.shift, dims=1)
        windows = _windows(plane)
        h = self.attn(windows, self.mask)
        h = h.view(x.shape[0], MAX_STEPS // 4, BANDS // 4, 4, 4, -1).transpose(2, 3).reshape(plane.shape)
        return h.roll(self.shift, dims=1).reshape(x.shape)


def _windows(plane: Float[Tensor, "batch steps bands dim"]) -> Float[Tensor, "windows 16 dim"]:
    batch, steps, bands, dim = plane.shape
    return plane.view(batch, steps // 4, 4, bands // 4, 4, dim).transpose(2, 3).reshape(-1, 16, dim)


def _wrap_mask(shift: int) -> Float[Tensor, "windows 16 16"]:
    """-100 between patches that are neighbours only because the shift wraps the end of the clip to its start."""
    region = torch.zeros(1, MAX_STEPS, BANDS, 1)
    region[:, -4:-shift] = 1
    region[:, -shift:] = 2
    windows = _windows(region)[..., 0]
    return (windows[:, None] != windows[:, :, None]).float() * -100.0


def _initialise(module: nn.Module) -> None:
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)


class Encoder(nn.Module):
    """ViT over 16 x 16 patches of a normalised filter bank, with a class token in front.

    With `post_norm` it is the encoder of EAT and SSLAM: a norm before the blocks and none after them, norms after the
    sums inside.
    """

    def __init__(
        self,
        *,
        dim: int,
        depth: int,
        heads: int,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.0,
        post_norm: bool = False,
    ) -> None:
        super().__init__()
        if dim % 4 or dim % heads:
            raise ValueError(f"dim {dim} must be a multiple of 4 and of heads ({heads})")
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(positions(dim), requires_grad=False)
        proj = nn.Conv2d(1, dim, PATCH, PATCH)
        nn.init.xavier_uniform_(proj.weight.view(dim, -1))
        self.patch_embed = nn.ModuleDict({"proj": proj})
        rates = [drop_path * i / max(1, depth - 1) for i in range(depth)]
        self.blocks = nn.ModuleList(Block(dim, heads, mlp_ratio, rate, post_norm) for rate in rates)
        norm = nn.LayerNorm(dim, eps=NORM_EPSILON)
        self.pre_norm: nn.Module = norm if post_norm else nn.Identity()
        self.norm: nn.Module = nn.Identity() if post_norm else norm
        nn.init.normal_(self.cls_token, std=0.02)
        _initialise(self)

    def embed(self, features: Float[Tensor, "batch frames mels"]) -> Float[Tensor, "batch tokens dim"]:
        """Patches with their positions, time first; frames must be a multiple of 16, at most 1024."""
        if features.shape[1] % PATCH or features.shape[1] > MAX_FRAMES:
            raise ValueError(f"{features.shape[1]} frames are not a multiple of {PATCH} up to {MAX_FRAMES}")
        tokens = self.patch_embed["proj"](features[:, None].to(self.cls_token.dtype)).flatten(2).transpose(1, 2)
        return tokens + self.pos_embed[:, 1 : 1 + tokens.shape[1]]

    def with_class_token(self, tokens: Float[Tensor, "batch tokens dim"]) -> Float[Tensor, "batch tokens_1 dim"]:
        """The class token, which has a position of its own, in front."""
        first = (self.cls_token + self.pos_embed[:, :1]).expand(tokens.shape[0], -1, -1)
        return torch.cat([first.to(tokens.dtype), tokens], dim=1)

    def hidden(self, features: Float[Tensor, "batch frames mels"]) -> list[Float[Tensor, "batch tokens_1 dim"]]:
        """Output of each block, class token first. Fewer than 1024 frames take the first positions, as in training."""
        h = self.pre_norm(self.with_class_token(self.embed(features)))
        outputs = []
        for block in self.blocks:
            h = block(h)
            outputs.append(h)
        return outputs


class MaskedAutoencoder(Encoder):
    """Audio-MAE: the encoder on the patches left visible, a decoder on all of them, the loss on the hidden ones."""

    def __init__(
        self,
        *,
        dim: int,
        depth: int,
        heads: int,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.0,
        decoder: Decoder = "local",
        decoder_dim: int = 512,
        decoder_depth: int = 16,
        decoder_heads: int = 16,
        recompute: bool = False,
    ) -> None:
        super().__init__(dim=dim, depth=depth, heads=heads, mlp_ratio=mlp_ratio, drop_path=drop_path)
        if decoder_dim % 4 or decoder_dim % decoder_heads:
            raise ValueError(f"decoder_dim {decoder_dim} must be a multiple of 4 and of decoder_heads {decoder_heads}")
        self.decoder = decoder
        self.recompute = recompute
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_dim))
        self.decoder_pos_embed = nn.Parameter(positions(decoder_dim), requires_grad=False)
        self.decoder_embed = Linear(dim, decoder_dim)
        self.decoder_blocks = nn.ModuleList(
            WindowBlock(decoder_dim, decoder_heads, mlp_ratio, shift=2 * (i % 2))
            if decoder == "local"
            else Block(decoder_dim, decoder_heads, mlp_ratio)
            for i in range(decoder_depth)
        )
        self.decoder_norm = nn.LayerNorm(decoder_dim, eps=NORM_EPSILON)
        self.decoder_pred = Linear(decoder_dim, PATCH * PATCH)
        nn.init.normal_(self.mask_token, std=0.02)
        _initialise(self)

    def forward(
        self,
        features: Float[Tensor, "batch frames mels"],
        noise: Float[Tensor, "batch tokens"],
        mask_ratio: float = 0.8,
    ) -> tuple[Float[Tensor, ""], Float[Tensor, "batch tokens 256"], Bool[Tensor, "batch tokens"]]:
        """(loss, prediction of every patch, which patches were hidden) of 1024 frames of normalised filter bank.

        The patches with the highest `noise` are hidden: int(512 * (1 - mask_ratio)) stay.
        """
        latent, restore, hidden = self.encode_visible(features, noise, mask_ratio)
        prediction = self.decode(latent, restore)
        return self.loss(features, prediction, hidden), prediction, hidden

    def encode_visible(
        self, features: Float[Tensor, "batch frames mels"], noise: Float[Tensor, "batch tokens"], mask_ratio: float
    ) -> tuple[Float[Tensor, "batch visible_1 dim"], Int[Tensor, "batch tokens"], Bool[Tensor, "batch tokens"]]:
        """The encoder's output on the visible patches, in the order of their noise, and the way back to theirs."""
        tokens = self.embed(features)
        n_visible = int(tokens.shape[1] * (1 - mask_ratio))
        order = noise.argsort(dim=1)
        restore = order.argsort(dim=1)
        h = tokens.gather(1, order[:, :n_visible, None].expand(-1, -1, tokens.shape[2]))
        h = self.with_class_token(h)
        for block in self.blocks:
            h = block(h)
        return self.norm(h), restore, restore >= n_visible

    def decode(
        self, latent: Float[Tensor, "batch visible_1 dim"], restore: Int[Tensor, "batch tokens"]
    ) -> Float[Tensor, "batch tokens 256"]:
        """The prediction of every patch: time inside the patch is the slow index of its 256 values."""
        h = self.decoder_embed(latent)
        hidden = self.mask_token.expand(h.shape[0], restore.shape[1] + 1 - h.shape[1], -1).to(h.dtype)
        patches = torch.cat([h[:, 1:], hidden], dim=1)
        patches = patches.gather(1, restore[..., None].expand(-1, -1, patches.shape[2]))
        h = torch.cat([h[:, :1], patches], dim=1) + self.decoder_pos_embed[:, : 1 + restore.shape[1]]
        if self.decoder == "local":
            h = h[:, 1:]  # windows have no room for the class token
        for block in self.decoder_blocks:
            h = checkpoint(block, h, use_reentrant=False) if self.recompute and self.training else block(h)
        h = self.decoder_pred(self.decoder_norm(h))
        return h if self.decoder == "local" else h[:, 1:]

    def loss(
        self,
        features: Float[Tensor, "batch frames mels"],
        prediction: Float[Tensor, "batch tokens 256"],
        hidden: Bool[Tensor, "batch tokens"],
        normalised: bool = True,
    ) -> Float[Tensor, ""]:
        """Mean square error over the hidden patches, each brought to zero mean and unit (unbiased) variance first."""
        with torch.autocast(features.device.type, enabled=False):
            target = patches(features)
            if normalised:
                target = normalised_patches(target)
            error = (prediction.float() - target).square().mean(dim=-1)
            return (error * hidden).sum() / hidden.sum()


def patches(features: Float[Tensor, "batch frames mels"]) -> Float[Tensor, "batch tokens 256"]:
    """Cut into 16 x 16, time first; inside a patch too."""
    batch, frames, mels = features.shape
    cut = features.view(batch, frames // PATCH, PATCH, mels // PATCH, PATCH).transpose(2, 3)
    return cut.reshape(batch, -1, PATCH * PATCH)


def unpatched(values: Float[Tensor, "batch tokens 256"]) -> Float[Tensor, "batch frames mels"]:
    """The inverse of `patches`."""
    cut = values.view(values.shape[0], -1, BANDS, PATCH, PATCH).transpose(2, 3)
    return cut.reshape(values.shape[0], -1, N_MELS)


def normalised_patches(target: Float[Tensor, "batch tokens 256"]) -> Float[Tensor, "batch tokens 256"]:
    """Targets that the decoder learns to predict."""
    variance, mean = torch.var_mean(target, dim=-1, keepdim=True)
    return (target - mean) / (variance + 1e-6).sqrt()


def n_frames(mae_input: MaeInput, samples: int) -> int:
    """Rows of the filter bank that the encoder sees of so many samples at 16 kHz (see Upstream)."""
    if mae_input == "pad1024":
        return -(-max(1, whole_frames(samples)) // MAX_FRAMES) * MAX_FRAMES
    rows = -(-(samples // HOP_SAMPLES + 1) // 32) * 32  # what the U-Net pads its frames to
    return rows if mae_input == "crop" else -(-rows // 7) * 32


def n_steps(mae_input: MaeInput, samples: int) -> int:
    """Steps that Upstream gives for a 32-kHz waveform."""
    return n_frames(mae_input, -(-samples // 2)) // (PATCH if mae_input == "crop" else 2 * PATCH)


class Upstream(upstreams.Upstream):
    """A-MAE's encoder on a mixture, patches pooled over frequency by the mean of average and maximum.

    mae_input   what the encoder sees of 2 s            steps           aligned in time
    pad1024     198 frames, then loud noise to 1024     32 of 320 ms    no: repeated 7 times, one stands for 70 ms
    crop        224 frames (silence behind the end)     14 of 160 ms    yes
    hop35       1024 frames of a 2.2-ms hop             32 of 70 ms     yes; what it sees is 4.6 times too slow

    pad1024 is how Zhao et al. (arXiv:2407.11745) can be read; crop cuts the positions as well, which is exact because
    they are fixed. Longer mixtures are cut into pieces of 1024 frames.
    """

    lora_targets = ("attn.qkv", "attn.proj")

    def __init__(
        self,
        *,
        mae_input: MaeInput,
        dim: int,
        depth: int,
        heads: int,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.0,
        post_norm: bool = False,
    ) -> None:
        super().__init__()
        if mae_input not in FRAMES_PER_STEP:
            raise ValueError(f"mae_input {mae_input!r} is none of {sorted(FRAMES_PER_STEP)}")
        self.encoder = Encoder(
            dim=dim, depth=depth, heads=heads, mlp_ratio=mlp_ratio, drop_path=drop_path, post_norm=post_norm
        )
        self.mae_input = mae_input
        self.dim, self.n_layers, self.frames_per_step = dim, depth, FRAMES_PER_STEP[mae_input]

    def features(self, waveform: Float[Tensor, "batch time"]) -> Float[Tensor, "batch frames mels"]:
        """The normalised filter bank of 32-kHz waveforms, as long as `mae_input` says."""
        low = to_16k(waveform, upstreams.SAMPLE_RATE)
        low = low - low.mean(dim=-1, keepdim=True)
        frames = n_frames(self.mae_input, low.shape[-1])
        if self.mae_input == "pad1024":
            found = normalise(fbank(F.pad(low, (0, max(0, WINDOW_SAMPLES - low.shape[-1])))))
            return F.pad(found, (0, 0, 0, frames - found.shape[1]), value=PADDING)
        hop = 35 if self.mae_input == "hop35" else HOP_SAMPLES
        samples = WINDOW_SAMPLES + (frames - 1) * hop
        return normalise(fbank(F.pad(low, (0, max(0, samples - low.shape[-1])))[:, :samples], hop_samples=hop))

    def hidden(self, waveform: Float[Tensor, "batch time"]) -> list[Float[Tensor, "batch positions dim"]]:
        """The patches of every block, without the class token: 8 per 16 frames, time first."""
        pieces = [self.encoder.hidden(piece) for piece in torch.split(self.features(waveform), MAX_FRAMES, dim=1)]
        return [torch.cat([h[:, 1:] for h in layer], dim=1) for layer in zip(*pieces, strict=True)]

    def final_norm(self, h: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch dim"]:
        """A-MAE's last norm; EAT and SSLAM have none."""
        return self.encoder.norm(h)

    def to_steps(self, h: Float[Tensor, "batch positions dim"]) -> Float[Tensor, "batch steps dim"]:
        """Average-max pooling (Liu et al. 2022, SimPFs) over the 8 bands, and over 2 steps but for `crop`."""
        group = BANDS if self.mae_input == "crop" else 2 * BANDS
        grouped = h.reshape(h.shape[0], -1, group, h.shape[2])
        return (grouped.mean(dim=2) + grouped.amax(dim=2)) / 2

    def layer_groups(self) -> list[list[nn.Parameter]]:
        """Embedding and class token; each block; the last with the final norm. The positions are fixed."""
        encoder = self.encoder
        first = [encoder.cls_token, *encoder.patch_embed.parameters(), *encoder.pre_norm.parameters()]
        groups = [first, *(list(block.parameters()) for block in encoder.blocks)]
        groups[-1] += list(encoder.norm.parameters())
        return groups


FRAMES_PER_STEP = {"pad1024": 7.0, "crop": 16.0, "hop35": 7.0}


def read_config(pretrained: Path) -> dict[str, Any]:
    """config.json of the folder that stage pretrain_mae wrote."""
    config: dict[str, Any] = read_json(pretrained / "config.json")
    return config


def read(options: Mapping[str, Any], pretrained: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The encoder that stage pretrain_mae trained or converted; `options` are {mae_input, drop_path}."""
    sizes = encoder_sizes(read_config(pretrained)["model"])
    state = encoder_state(read_safetensors(pretrained / "weights.safetensors"))
    return {**sizes, "mae_input": options["mae_input"], "drop_path": options["drop_path"]}, state


def encoder_sizes(sizes: Mapping[str, Any]) -> dict[str, Any]:
    """The part of an autoencoder's sizes that its encoder has."""
    return {name: value for name, value in sizes.items() if not name.startswith("decoder")}


def encoder_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of an autoencoder's encoder, under the names that Upstream gives them."""
    return {f"encoder.{k}": v for k, v in state.items() if not k.startswith("decoder") and k != "mask_token"}


PublishedFormat = Literal["audiomae", "eat", "sslam"]


def read_published(
    path: Path, *, sha256: str | None, layout: PublishedFormat
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(sizes for MaskedAutoencoder or Encoder, its tensors) of a published checkpoint, loaded strictly.

    audiomae   pretrained.pth of facebookresearch/AudioMAE, with its decoder; CC-BY-NC 4.0, not for commercial use
    eat        model.safetensors of worstchan/EAT-base_epoch30_pretrain (Hugging Face hub), no decoder; MIT
    sslam      model.safetensors of ta012/SSLAM_pretrain, no decoder; MIT

    The sizes are read from the tensors. A-MAE's positions must be those of `positions`: that catches another file, and
    one that somebody has mended. Raises ValueError naming the file and what is missing, unexpected or different.
    """
    state = read_tensors(path, sha256=sha256, entry="model")
    if layout != "audiomae":
        state = {_eat_name(name): tensor for name, tensor in state.items() if _eat_name(name)}
        table = state.get("pos_embed", torch.zeros(0))
        if table.ndim == 3 and table.shape[1] >= MAX_STEPS * BANDS and table.shape[1] % BANDS == 0:
            # Step by step of time, for up to two minutes; no row for the class token, which has no position.
            state["pos_embed"] = F.pad(table[:, : MAX_STEPS * BANDS], (0, 0, 1, 0))
    depth = n_blocks(state, "blocks")
    needed = ["pos_embed", "blocks.0.mlp.fc1.weight"]  # which the sizes are read from
    if not depth or not set(needed) <= set(state):
        raise ValueError(f"{path} has no encoder of the layout {layout!r}: it starts with {sorted(state)[:3]}")
    dim = state["pos_embed"].shape[-1]
    sizes: dict[str, Any] = {
        "dim": dim,
        "depth": depth,
        "heads": dim // 64,  # of all published sizes
        "mlp_ratio": state["blocks.0.mlp.fc1.weight"].shape[0] / dim,
    }
    if layout == "audiomae":
        if state["pos_embed"].shape != positions(dim).shape:
            raise ValueError(
                f"{path}: pos_embed is {tuple(state['pos_embed'].shape)}, not {tuple(positions(dim).shape)}"
            )
        if (off := (state["pos_embed"] - positions(dim)).abs().max().item()) > 1e-6:
            raise ValueError(f"{path}: its positions are not A-MAE's transposed grid (they differ by {off:.2g})")
        n_decoder = n_blocks(state, "decoder_blocks")
        if not n_decoder or "mask_token" not in state:
            raise ValueError(f"{path} has no decoder: it is not pretrained.pth, but a fine-tuned encoder, perhaps")
        local = "decoder_blocks.0.attn.tau" in state
        sizes |= {
            "decoder": "local" if local else "global",
            "decoder_dim": state["mask_token"].shape[-1],
            "decoder_depth": n_decoder,
            "decoder_heads": 16,
        }
        wanted = MaskedAutoencoder(**sizes).state_dict()
    else:
        sizes["post_norm"] = True
        wanted = Encoder(**sizes).state_dict()
    missing, unexpected = sorted(set(wanted) - set(state)), sorted(set(state) - set(wanted))
    different = [name for name in wanted if name in state and wanted[name].shape != state[name].shape]
    if missing or unexpected or different:
        raise ValueError(
            f"{path}: missing {missing[:5]}, unexpected {unexpected[:5]}, of another shape {different[:5]}"
        )
    return sizes, state


def n_blocks(names: Iterable[str], list_name: str) -> int:
    """How many blocks `list_name`.0 to `list_name`.n - 1 have tensors of these names."""
    numbers = {part[1] for part in (name.split(".") for name in names) if part[0] == list_name and len(part) > 1}
    return 1 + max((int(number) for number in numbers if number.isdecimal()), default=-1)


def _eat_name(name: str) -> str:
    """Our name of a tensor of EAT's published model; empty for those that the encoder has no use for."""
    name = name.removeprefix("model.")
    for theirs, ours in (
        ("local_encoder.proj.", "patch_embed.proj."),
        ("fixed_positional_encoder.positions", "pos_embed"),
        ("extra_tokens", "cls_token"),
    ):
        if name.startswith(theirs):
            return name.replace(theirs, ours, 1)
    return name if name.startswith(("blocks.", "pre_norm.")) else ""
