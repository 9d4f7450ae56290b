"""How the outputs of a separator share the work: numbers per item of a batch, in float64 and without gradient."""

import torch
from jaxtyping import Float
from torch import Tensor


@torch.no_grad()
def mask_overlap(masks: Float[Tensor, "batch sources bins frames"]) -> Float[Tensor, " batch"]:
    """Mean absolute cosine between the masks of two sources, as `losses.diversity_loss`: 0 apart, 1 alike.

    NaN for a single source. A mask of zeros overlaps with none.
    """
    flat = masks.flatten(2).double()
    direction = flat / flat.norm(dim=-1, keepdim=True).clamp(min=1e-8)
    cosine = (direction @ direction.mT).abs()
    n_sources = masks.shape[1]
    of_others = cosine.sum(dim=(1, 2)) - cosine.diagonal(dim1=1, dim2=2).sum(dim=1)
    return of_others / (n_sources * (n_sources - 1))


def mask_energies(masks: Float[Tensor, "batch sources bins frames"]) -> Float[Tensor, "batch sources"]:
    """Mean square of each mask, for `effective_sources`: what a mask lets through of a flat spectrum."""
    return masks.double().square().mean(dim=(2, 3))


def signal_energies(estimates: Float[Tensor, "batch sources time"]) -> Float[Tensor, "batch sources"]:
    """Mean square of each waveform, for `effective_sources`."""
    return estimates.double().square().mean(dim=2)


def effective_sources(energies: Float[Tensor, "batch sources"]) -> Float[Tensor, " batch"]:
    """How many sources are in use: exp of the entropy of their shares of the energy, from 1 to the number of sources.

    n sources of equal energy beside silent ones give n. NaN where all are silent.
    """
    energies = energies.double()
    share = energies / energies.sum(dim=1, keepdim=True)
    return torch.special.entr(share).sum(dim=1).exp()
