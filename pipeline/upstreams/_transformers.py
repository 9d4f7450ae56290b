"""What the upstreams that the transformers library has share: a model by its config, a folder of files by its hash.

No file is ever fetched: `weights` is a folder as `hf download` leaves it (config.json, preprocessor_config.json,
model.safetensors or pytorch_model.bin), or `random` for weights drawn at random in the sizes of `config`.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from pipeline import upstreams
from pipeline.core.config import Params, Sha256, Size
from pipeline.core.runtime import outside, read_json
from pipeline.core.weights import check, read_tensors
from pipeline.nn.fbank import SAMPLE_RATE as RATE_16K
from pipeline.nn.fbank import to_16k

FILES = ("model.safetensors", "pytorch_model.bin")
# What heads and training leave in published files, and the vector that only masking uses.
UNUSED = (
    "masked_spec_embed",
    "lm_head.",
    "quantizer.",
    "project_q.",
    "project_hid.",
    "final_proj.",
    "label_embs_concat",
)


class Options(Params):
    """`upstreams.<name>:` in params.yaml of an encoder of the transformers library."""

    weights: str = Field(min_length=1)  # a folder, or "random"
    sha256: Sha256 | None  # of the file with the weights; it must be said for a folder
    config_sha256: Sha256 | None  # of its config.json, likewise
    config: dict[str, Size | list[Size]]  # the library's own, used for random weights


class TransformersUpstream(upstreams.Upstream):
    """A 16-kHz waveform encoder of the transformers library, without masking and without dropped layers.

    A subclass names it, and the Linear modules that low-rank adapters adapt. `config` is the library's own, and
    `weights` says where the tensors came from.
    """

    library: ClassVar[str]  # <library>Model and <library>Config of the transformers library
    lora_targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "out_proj")

    def __init__(self, *, config: dict[str, Any], normalise: bool, weights: str) -> None:
        super().__init__()
        self.model = self.build_model(config)
        full: Any = self.model.config
        stride, self.window = strides(full.to_dict())
        self.normalise = normalise
        self.dim, self.n_layers = full.hidden_size, full.num_hidden_layers
        self.frames_per_step = stride / (RATE_16K / upstreams.FRAME_RATE)
        # The large HuBERT and WavLM norm what goes into a layer, and once what comes out of the last.
        self.norms_at_the_end = bool(getattr(full, "do_stable_layer_norm", False))

    @classmethod
    def known(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """The keys of a config.json that the library's class has, but those that load code or choose an attention.

        Published files have others, of older versions and of how they were saved.
        """
        import transformers

        library: Any = getattr(transformers, f"{cls.library}Config")
        known = {key for key in library().to_dict() if not key.startswith("_") and key != "auto_map"}
        return {key: value for key, value in config.items() if key in known}

    @classmethod
    def build_model(cls, config: Mapping[str, Any]) -> nn.Module:
        """The library's model of a config, without what makes training random: masks and dropped layers."""
        import transformers  # seconds, and most runs do without

        of_library: Any = getattr(transformers, f"{cls.library}Config")
        quiet = {"apply_spec_augment": False, "mask_time_prob": 0.0, "mask_feature_prob": 0.0, "layerdrop": 0.0}
        model: nn.Module = getattr(transformers, f"{cls.library}Model")(of_library(**{**config, **quiet}))
        return model

    def hidden(self, waveform: Float[Tensor, "batch time"]) -> list[Float[Tensor, "batch positions dim"]]:
        """Output of each Transformer layer, about 50 times a second."""
        low = to_16k(waveform, upstreams.SAMPLE_RATE)
        low = F.pad(low, (0, max(0, self.window - low.shape[1])))
        if self.normalise:
            variance, mean = torch.var_mean(low, dim=1, keepdim=True, correction=0)
            low = (low - mean) / (variance + 1e-7).sqrt()
        dtype = next(self.model.parameters()).dtype
        found: Any = self.model(low.to(dtype), output_hidden_states=True)
        return list(found.hidden_states[1:])

    def final_norm(self, h: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch dim"]:
        """The norm behind the last layer, of those that have one."""
        model: Any = self.model
        return model.encoder.layer_norm(h) if self.norms_at_the_end else h

    def layer_groups(self) -> list[list[nn.Parameter]]:
        """All that comes before the first layer; each layer, the last with the final norm."""
        model: Any = self.model
        layers = [list(layer.parameters()) for layer in model.encoder.layers]
        if self.norms_at_the_end:
            layers[-1] += list(model.encoder.layer_norm.parameters())
        within = {id(p) for group in layers for p in group}
        return [[p for p in model.parameters() if id(p) not in within], *layers]


def strides(config: Mapping[str, Any]) -> tuple[int, int]:
    """(samples from one step to the next, samples that the first step needs) of the convolutions of a config."""
    stride, window = 1, 1
    for kernel, step in zip(config["conv_kernel"], config["conv_stride"], strict=True):
        window += (kernel - 1) * stride
        stride *= step
    return stride, window


def read(
    encoder: type[TransformersUpstream], options: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Tensor] | None]:
    """(arguments of the encoder, its tensors) of its entry in params.yaml, held to the model that its config gives.

    FileNotFoundError or ValueError names the folder or file, and what is missing or not expected in it.
    """
    if options["weights"] == "random":
        return {"config": dict(options["config"]), "normalise": False, "weights": "random"}, None
    folder = outside(options["weights"])
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"{folder}: no config.json; download the model into this folder, or say weights: random"
        )
    check(folder / "config.json", options["config_sha256"])
    config = encoder.known(read_json(folder / "config.json"))
    preprocessor = folder / "preprocessor_config.json"
    if not preprocessor.is_file():
        raise FileNotFoundError(f"{folder}: no preprocessor_config.json, which says whether waveforms are normalised")
    normalise = bool(read_json(preprocessor).get("do_normalize", False))
    file = next((folder / name for name in FILES if (folder / name).is_file()), None)
    if file is None:
        raise FileNotFoundError(f"{folder}: neither of {', '.join(FILES)}")
    model: Any = encoder.build_model(config)
    state = {}
    for name, tensor in read_tensors(file, sha256=options["sha256"], entry="").items():
        name = name.removeprefix(f"{model.base_model_prefix}.")
        if not name.startswith(UNUSED):
            # The old and the new way to write a weight norm.
            name = name.replace("weight_g", "parametrizations.weight.original0")
            state[f"model.{name.replace('weight_v', 'parametrizations.weight.original1')}"] = tensor
    expected = {f"model.{name}" for name in model.state_dict()}
    missing, unexpected = sorted(expected - set(state)), sorted(set(state) - expected)
    if missing or unexpected:
        raise ValueError(f"{file}: missing {missing[:5]}, unexpected {unexpected[:5]}")
    return {"config": config, "normalise": normalise, "weights": folder.name}, state
