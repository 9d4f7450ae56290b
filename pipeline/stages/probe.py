"""Stage probe: what training with a separator did to an encoder, by the linear probe of stage pretrain_mae.

The encoder inside a trained separator beside the one that its training started from. For one that was updated, a lower
probe after it is what it forgot of the labels; for a frozen one the two are equal. An A-MAE hears the clips as they
are, whatever `mae_input` its separator has: so all probes of one run can be compared.
"""

import argparse
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline import separators, upstreams
from pipeline.core.config import AudioParams, load_params
from pipeline.core.devices import choose_device, use_available_cores, use_precision
from pipeline.core.runtime import read_json, run_command, running, write_json
from pipeline.evaluation.probing import ProbeParams, described, difference, probe_upstreams
from pipeline.mixtures.shards import ClipReader

log = logging.getLogger(__name__)


def probe(
    separator: Path, pretrained: Path, train: Path, evaluation: Path, *, audio: AudioParams, params: ProbeParams
) -> dict[str, Any]:
    """The summary; `{"upstream": null}` alone for a separator that takes no features."""
    upstreams.check_sample_rate(audio.sample_rate)
    use_available_cores()
    use_precision("fp32")
    config = read_json(separator / "config.json")
    model = config["model"]
    trained: Any = separators.load(separator)
    if trained.upstream is None:
        return {"upstream": None}
    encoders: list[Any] = [trained.upstream.float()]
    if model["upstream"] == "mae":
        start = upstreams.build("mae", **model["upstream_config"])
        start.load_state_dict(upstreams.read("mae", model, pretrained)[1] or {})
        if model["freeze_mae"] and model["bf16_frozen"]:
            start = start.to(torch.bfloat16).float()  # as it was held
        if not _equal(encoders[0].state_dict(), start.state_dict()):
            encoders.append(start)
        for encoder in encoders:
            encoder.mae_input = "crop"  # as long as the clip, as stage pretrain_mae has it: padding says nothing of it
    found = probe_upstreams(
        encoders,
        ClipReader(train, audio.sample_rate),
        ClipReader(evaluation, audio.sample_rate),
        params,
        clip_samples=round(audio.clip_seconds * audio.sample_rate),
        device=choose_device("auto"),
    )
    # An encoder that did not learn is what it was; where one that is not ours learnt, what it was is not at hand.
    before = found[-1] if len(found) > 1 or model["freeze_mae"] or model["upstream"] == "mae" else None
    return {
        "upstream": model["upstream"],
        "freeze_mae": model["freeze_mae"],
        "after": described(found[0]),
        "before": None if before is None else described(before),
        "difference": None if before is None else difference(found[0], before),
    }


def _equal(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def main() -> None:
    """Paths come from dvc.yaml, numbers from params.yaml."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="an entry of `mae_separators:`")
    parser.add_argument("--separator", type=Path, required=True)
    parser.add_argument("--pretrained", type=Path, required=True)
    parser.add_argument("--train", type=Path, required=True, help="clips of the train split")
    parser.add_argument("--eval", type=Path, required=True, dest="evaluation", help="clips of the eval split")
    parser.add_argument("--summary", type=Path, required=True)
    args = parser.parse_args()
    audio, params = load_params("audio", AudioParams), load_params("pretrain_mae.probe", ProbeParams)
    with running(f"probe@{args.name}", args.summary):
        summary = probe(args.separator, args.pretrained, args.train, args.evaluation, audio=audio, params=params)
        write_json(args.summary, summary)
        log.info("%s: %s", args.name, json.dumps(summary))


if __name__ == "__main__":
    run_command(main)
