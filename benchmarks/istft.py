"""The inverse STFT of nn.features against torch.istft, forward and backward, at the sizes the separators have.

    python -m benchmarks.istft             one thread; half a minute

From a mask's logits to the waveform, and from the waveform's gradient to the logits', as in a training step. The two
are shown to agree, and are taken in turn; one thread is timed by its CPU time. Ratios are of the minima, those of the
medians in brackets.
"""

import argparse

import torch
from torch import Tensor

from benchmarks.linear import compare
from pipeline.core.runtime import keep_freed_memory
from pipeline.nn.features import istft

TOLERANCE = 1e-5
N_FFT = 1024
SIZES = {  # batch, sources, frames, hop
    "Performer, 8 sources of 4 x 3 s at 44.1 kHz": (4, 8, 517, 256),
    "ResUNet30, 4 x 2 s at 32 kHz": (4, 1, 201, 320),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=9, help="of each way, after one that is not counted")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    keep_freed_memory()
    for name, (batch, sources, frames, hop) in SIZES.items():
        generator = torch.Generator().manual_seed(0)
        length = (frames - 1) * hop
        spectrum = torch.randn(batch, 1, frames, N_FFT // 2 + 1, dtype=torch.complex64, generator=generator)
        logits = torch.randn(batch, frames, sources, N_FFT // 2 + 1, generator=generator).requires_grad_()
        errors = torch.randn(batch * sources, length, generator=generator)
        window = torch.hann_window(N_FFT)

        def step(
            ours: bool,
            logits: Tensor = logits,
            spectrum: Tensor = spectrum,
            errors: Tensor = errors,
            hop: int = hop,
            length: int = length,
            window: Tensor = window,
        ) -> Tensor:
            masked = (logits.sigmoid().transpose(1, 2) * spectrum).flatten(0, 1)
            if ours:
                waveform = istft(masked, n_fft=N_FFT, hop_length=hop, length=length)
            else:
                waveform = torch.istft(masked.transpose(1, 2), N_FFT, hop, window=window, length=length)
            return torch.autograd.grad(waveform, logits, errors)[0]

        wanted = step(False)
        difference = float((step(True) - wanted).norm() / wanted.norm())
        assert difference < TOLERANCE, f"{name}: the gradients differ by {difference:.1e} of them"
        print(name)
        compare({"torch.istft": lambda: step(False), "mask and inverse": lambda: step(True)}, args.repeats, 1)


if __name__ == "__main__":
    main()
