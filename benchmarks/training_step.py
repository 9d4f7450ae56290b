"""One training step of the ResUNet, as this project takes it, against the same network run plainly.

    python -m benchmarks.training_step            params.yaml's widths and small detector
    python -m benchmarks.training_step --full     the paper's widths, PANNs; batch 16 on a GPU, 2 without

    ours    anchors and queries are looked up in arrays; torch.stft; channels innermost; fp32, and bf16 autocast
    plain   as bytedance/uss: `batch` 10-s clips through the detector, the best 2 s cut, their queries embedded, all at
            every step; the transform and its inverse as frozen convolutions; cosine, sine and magnitude one by one;
            fp32, channels outermost

Both take the same anchors, mix them alike, and end in the same L1, backward and AdamW (amsgrad). The plain network has
our weights, and its estimate is compared with ours before the clock starts. Steps are taken in turn, so that both meet
the same noise of a busy machine; medians are given, and of each of the plain step's parts too.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.mixtures.mixing import energy, energy_gain, mix
from pipeline.nn.features import SAMPLE_RATE
from pipeline.nn.losses import l1_loss
from pipeline.nn.panns import (
    Detector,
    PannsDetector,
    PannsQueryEncoder,
    QueryEncoder,
    SmallCnn,
    panns_models,
    to_frames,
)
from pipeline.separators import build
from pipeline.training.loop import build_optimizer

SEGMENT_FRAMES, SMOOTHING_FRAMES, FRAME = 200, 201, 320
CLIP_SAMPLES, SEGMENT_SAMPLES = 10 * SAMPLE_RATE, SEGMENT_FRAMES * FRAME
MODEL = {"n_fft": 1024, "hop_length": 320, "channels": [8, 16, 32, 64, 96, 96]}
FULL_CHANNELS = [32, 64, 128, 256, 384, 384]


class PlainSeparator(nn.Module):
    """The Separator's U-Net between torchlibrosa's convolutions."""

    def __init__(self, separator: nn.Module) -> None:
        super().__init__()
        # torchlibrosa imports librosa; only this benchmark needs both.
        from torchlibrosa.stft import ISTFT, STFT, magphase

        self.separator, self.magphase = separator, magphase
        sizes = {"n_fft": separator.n_fft, "hop_length": separator.hop_length, "freeze_parameters": True}
        self.stft, self.istft = STFT(**sizes), ISTFT(**sizes)
        enter = nn.Conv2d(1, separator.unet.enter.out_channels, 1)
        enter.load_state_dict(separator.unet.enter.state_dict())
        separator.unet.enter = enter
        for module in separator.modules():
            if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
                module.weight.data = module.weight.data.contiguous()

    def forward(self, mixture: Tensor, query: Tensor) -> Tensor:
        real, imaginary = self.stft(mixture)
        magnitude = (real**2 + imaginary**2).clamp(min=1e-10) ** 0.5
        cosine, sine = real / magnitude, imaginary / magnitude

        frames = magnitude.shape[2]
        h = self.separator.norm(magnitude[:, 0].transpose(1, 2)).transpose(1, 2)[:, None]
        h = F.pad(h, (0, 0, 0, -frames % 32))[..., :-1]
        h = F.pad(self.separator.unet(h, query), (0, 1))[:, :, :frames]

        gain, mask_real, mask_imaginary = h[:, :1].sigmoid(), h[:, 1:2].tanh(), h[:, 2:].tanh()
        # uss takes torchlibrosa's magphase here, whose root has no gradient at the Nyquist bin's zero.
        length = (mask_real**2 + mask_imaginary**2).clamp(min=1e-20) ** 0.5
        mask_cosine, mask_sine = mask_real / length, mask_imaginary / length
        out_cosine = cosine * mask_cosine - sine * mask_sine
        out_sine = sine * mask_cosine + cosine * mask_sine
        out_magnitude = F.relu(magnitude * gain)
        return self.istft(out_magnitude * out_cosine, out_magnitude * out_sine, mixture.shape[-1])


def build_panns(device: torch.device) -> tuple[Detector, QueryEncoder]:
    """PANNs' networks with random weights, which are as fast as the published ones."""

    def state(name: str) -> dict[str, Tensor]:
        return getattr(panns_models(), name)(32000, 1024, 320, 64, 50, 14000, 527).state_dict()

    detector, encoder = PannsDetector(state("Cnn14_DecisionLevelMax")), PannsQueryEncoder(state("Cnn14"))
    return detector.to(device), encoder.to(device)


@torch.no_grad()
def mine(detector: Detector, clips: Tensor, class_columns: Tensor) -> Tensor:
    """The 2 s of each clip around the highest box mean of its class's frame-wise probability."""
    probability = detector.framewise_probability(clips)
    frames = to_frames(probability, segment_samples=detector.segment_samples, n_frames=CLIP_SAMPLES // FRAME + 1)
    of_class = frames.gather(2, class_columns[:, None, None].expand(-1, frames.shape[1], 1)).transpose(1, 2)
    padded = F.pad(of_class, (SMOOTHING_FRAMES // 2, SMOOTHING_FRAMES // 2), mode="replicate")
    centre = F.avg_pool1d(padded, SMOOTHING_FRAMES, stride=1)[:, 0].argmax(dim=1)
    start = (centre - SEGMENT_FRAMES // 2).clamp(0, CLIP_SAMPLES // FRAME - SEGMENT_FRAMES) * FRAME
    return torch.stack([clip[s : s + SEGMENT_SAMPLES] for clip, s in zip(clips, start.tolist(), strict=True)])


def mixtures(target: Tensor) -> tuple[Tensor, Tensor]:
    """Each segment is a target, and the interferer of the one before, at its energy (Kong et al.)."""
    interferer = target.roll(-1, dims=0)
    gain = energy_gain(energy(target), energy(interferer), match_energy=True, min_gain=0.02, max_gain=50.0)
    return mix(target, interferer, gain, "none")[:2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="the paper's widths and PANNs")
    parser.add_argument("--steps", type=int, default=9, help="of each kind, after one that is not counted")
    parser.add_argument("--batch", type=int)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    device = torch.device(args.device)
    batch = args.batch or ((16 if device.type == "cuda" else 2) if args.full else 4)
    torch.manual_seed(0)

    if args.full:
        detector, encoder = build_panns(device)
    else:
        small = SmallCnn(class_indices=range(24), channels=[16, 32, 64, 128], embedding_dim=128).to(device).eval()
        detector = encoder = small
    model = MODEL | ({"channels": FULL_CHANNELS} if args.full else {})

    def new() -> nn.Module:
        torch.manual_seed(1)
        return build("resunet", query_dim=encoder.query_dim, **model).to(device)

    clips = 0.1 * torch.randn(batch, CLIP_SAMPLES, device=device)
    columns = torch.arange(batch, device=device)
    anchors = mine(detector, clips, columns)
    with torch.no_grad():
        queries = encoder.embed(anchors)

    networks = {"plain fp32": PlainSeparator(new()).to(device), "ours fp32": new(), "ours bf16": new()}

    def optimizer(name: str) -> torch.optim.Optimizer:
        learned = [p for p in networks[name].parameters() if p.requires_grad]
        if name.startswith("ours"):
            return build_optimizer("adamw", learned, 1e-3)
        return torch.optim.AdamW(learned, 1e-3, weight_decay=0, amsgrad=True)

    optimizers = {name: optimizer(name) for name in networks}
    mixture, _ = mixtures(anchors)
    with torch.no_grad():
        theirs, ours = (networks[name].eval()(mixture, queries) for name in ("plain fp32", "ours fp32"))
    difference = float((theirs - ours).norm() / theirs.norm())
    assert difference < 1e-4, f"the plain network is another one: relative difference {difference:.1e}"

    def synchronised() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    parts: dict[str, list[float]] = {}

    def timed(name: str, function: Callable[[], Tensor]) -> Tensor:
        start = synchronised()
        result = function()
        parts.setdefault(name, []).append(synchronised() - start)
        return result

    @torch.no_grad()
    def embed(target: Tensor) -> Tensor:
        return encoder.embed(target)

    def step(name: str) -> float:
        start = synchronised()
        network = networks[name].train()
        if name.startswith("plain"):
            target = timed("mining", lambda: mine(detector, clips, columns))
            query = timed("query", lambda: embed(target))
        else:
            index = torch.arange(batch, device=device)
            target, query = anchors[index], queries[index]
        mixture, target = mixtures(target)
        with torch.autocast(device.type, torch.bfloat16, enabled=name.endswith("bf16")):
            estimate = network(mixture, query)
        loss = l1_loss(estimate, target).mean()
        optimizers[name].zero_grad()
        loss.backward()
        optimizers[name].step()
        return synchronised() - start

    for name in networks:
        step(name)
    parts.clear()
    seconds: dict[str, list[float]] = {name: [] for name in networks}
    for _ in range(args.steps):
        for name in networks:
            seconds[name].append(step(name))

    median = {name: statistics.median(values) for name, values in seconds.items()}
    widths = "full" if args.full else "small"
    threads = torch.get_num_threads()
    print(
        f"{widths} ResUNet, batch {batch} x 2 s, {device.type}, {threads} threads, estimates differ by {difference:.0e}"
    )
    for name, value in median.items():
        spread = f"{min(seconds[name]):.3f} to {max(seconds[name]):.3f}"
        ratio = f", {median['plain fp32'] / value:.2f} x plain" if name.startswith("ours") else ""
        print(f"  {name}: {1 / value:.2f} steps/s, {value:.3f} s ({spread}){ratio}")
    print("  of the plain step: " + ", ".join(f"{name} {statistics.median(v):.3f} s" for name, v in parts.items()))
    best = min((name for name in median if name.startswith("ours")), key=lambda name: median[name])
    print(f"ratio: {median['plain fp32'] / median[best]:.2f} (plain fp32 / {best})")


if __name__ == "__main__":
    main()
