"""What the tests of mixture-invariant training share: songs at 8 kHz with their index, and tiny networks."""

from pathlib import Path
from typing import Any

from pipeline.stages.index_music import index_music
from pipeline.training.mixit import Entry, EntryParams, MixitParams, MusicParams, PretrainPerformerParams
from tests.corpora import write_songs

RATE = 8000
SECONDS = (0.25, 0.5)

PERFORMER = {
    **{"n_sources": 4, "front_end": "stft", "norm": "zscore", "n_fft": 128, "hop_length": 32, "patch_frames": 1},
    **{"dim": 16, "depth": 1, "heads": 2, "mlp_ratio": 2.0, "dropout": 0.1, "attention": "favor", "n_features": 8},
    **{"stabiliser": "full", "eps": 1e-8, "qk_norm": True, "recompute": False},
    **{"mask_activation": "softmax", "consistency": "none"},
}
CONV_TASNET = {
    **{"n_sources": 4, "window_ms": 5.0, "n_filters": 24, "bottleneck": 12, "hidden": 16, "layers": 3, "stacks": 1},
    **{"mask_activation": "softmax", "consistency": "uniform", "recompute": False},
}
MODELS: dict[str, dict[str, Any]] = {"performer": PERFORMER, "conv_tasnet": CONV_TASNET}

MIXIT = MixitParams(
    seed=0,
    loss="snr",
    max_snr_db=30.0,
    search="exact",
    mom_snr_range=[-5.0, 5.0],
    max_stems=2,
    random_subsets=True,
    batch_size=2,
    learning_rate=3e-3,
    final_learning_rate=1e-5,
    warmup_steps=2,
    weight_decay=1e-2,
    gradient_clip=5.0,
    redraw_every_steps=3,
    validate_every_steps=4,
    n_validation_moms=4,
    patience=0,
    precision="fp32",
    device="cpu",
    log_every_steps=5,
    checkpoint_every_seconds=60.0,
)
PRETRAIN = PretrainPerformerParams(
    model="mixit_models.performer",
    segment_seconds=0.25,
    seed=0,
    epochs=1.0,
    batch_size=4,
    learning_rate=3e-3,
    final_learning_rate=1e-5,
    warmup_steps=2,
    weight_decay=1e-2,
    gradient_clip=5.0,
    mask_mode="token",
    mask_ratio=0.3,
    mask_span=4,
    target="logmag",
    loss_on="masked",
    redraw_every_steps=3,
    validate_every_steps=4,
    n_validation_mixtures=8,
    patience=0,
    precision="fp32",
    device="cpu",
    log_every_steps=5,
    checkpoint_every_seconds=60.0,
)


def music_params(root: Path, **changes: Any) -> MusicParams:
    """Half of the tracks are trained on, the others validate and test."""
    return MusicParams.model_validate(
        {
            "source": "folder",
            "root": str(root),
            "view": "all",
            "split": "track",
            "fractions": [0.5, 0.25, 0.25],
            "seed": 0,
            "segment_seconds": list(SECONDS),
            "hop_seconds": None,
            "sample_rate": RATE,
            "max_bad_fraction": 0.0,
            "synthetic_stems": {},
            **changes,
        }
    )


def write_music(directory: Path, n_tracks: int = 8) -> tuple[Path, MusicParams]:
    """Songs with their index: where it is, and the params it was made with."""
    music = music_params(write_songs(directory / "songs", n_tracks))
    index_music(directory / "index", music)
    return directory / "index", music


def entry(architecture: str = "performer", *, name: str = "tiny", data: str = "music", **changes: Any) -> Entry:
    """An entry as read_entry gives it."""
    settings = {
        **{"architecture": architecture, "model": f"mixit_models.{architecture}", "mixtures": "subsets"},
        **{"segment_seconds": [0.25], "epochs": 1.0, "pretrained": False, "diversity": 0.0, "sparsity": 0.0},
        "sparsity_form": "report",
    }
    params = EntryParams.model_validate(settings | changes)
    return Entry(name, data, params, MODELS[architecture])
