"""Where models are: folders, Hugging Face repositories, published checkpoints; and copies of them for elsewhere."""

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from torch import nn

from pipeline import separators
from pipeline.core.runtime import write_atomic, write_json
from pipeline.core.weights import write_safetensors
from pipeline.separate.targets import Unusable, one_line
from pipeline.training.portable import DETECTOR, ENCODER, QUERIES

ROOT = Path(__file__).parents[2]
TRAINED = (ROOT / "data/separators", ROOT / "data/mixit")
METRICS = ROOT / "reports/metrics.json"
WEIGHTS = "model.safetensors"
CARD = "README.md"
USS_HOP, USS_SEGMENT_SECONDS, USS_RATE = 320, 2, 32000  # of uss' networks: no checkpoint says
SCORES = {
    "sdri": ("SDR improvement", "average.sdri_class_mean_mean"),
    "si_sdri": ("SI-SDR improvement", "average.si_sdri_class_mean_mean"),
}


def find(where: str | Path, *, download: bool = False, revision: str | None = None, token: str | None = None) -> Path:
    """Find a folder, or a Hugging Face repository's snapshot in the local cache, which `download` may fill.

    Unusable where neither is there.
    """
    folder = Path(where)
    if not folder.is_dir() and str(where).count("/") == 1 and not str(where).startswith((".", "/")):
        folder = _repository(str(where), download, revision, token)
    if not folder.is_dir():
        raise Unusable(f"no model at {where}: `make repro` trains some into data/separators/<name>")
    return folder


def load(folder: Path) -> tuple[dict[str, Any], nn.Module]:
    """Load a model's config and its network, with queries or without; Unusable, with the reason, where it cannot be."""
    config = read_config(folder)
    try:
        loader = separators.load if "query_dim" in config["model"] else separators.load_blind
        return config, loader(folder)
    except (ValueError, RuntimeError, TypeError, KeyError, OSError) as error:
        raise Unusable(f"{folder}: {one_line(error)}") from error


def load_published(path: Path, sha256: str | None) -> tuple[dict[str, Any], nn.Module]:
    """Convert a checkpoint of uss, as tensors alone, after its hash is checked; it has no classes, and no encoder.

    Unusable where it is another file than the hash says or none of uss'.
    """
    try:
        state, sizes = separators.read_published("resunet", path, sha256=sha256)
        model = {**sizes, "hop_length": USS_HOP}
        network = separators.build("resunet", **model)
        network.load_state_dict(state)
    except (ValueError, RuntimeError, OSError) as error:
        raise Unusable(f"{path}: {one_line(error)}" if str(path) not in str(error) else one_line(error)) from error
    network.segment_samples = USS_SEGMENT_SECONDS * USS_RATE
    config = {"architecture": "resunet", "model": model, "sample_rate": USS_RATE, "classes": []}
    return config | {"segment_samples": network.segment_samples}, network.eval()


def read_config(folder: Path) -> dict[str, Any]:
    """Read a model's config.json; Unusable where it is none, or the model's training ran out of memory."""
    try:
        config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    except FileNotFoundError:
        raise Unusable(f"{folder} has no config.json: it is not a trained separator") from None
    except (OSError, ValueError) as error:
        raise Unusable(f"{folder / 'config.json'}: {one_line(error)}") from error
    if not isinstance(config, dict) or not {"architecture", "model", "sample_rate"} <= config.keys():
        raise Unusable(f"{folder / 'config.json'} is not of a trained separator")
    if config.get("status", "ok") != "ok":
        raise Unusable(f"{folder} holds no model: its training ended with {config['status']!r}")
    return config


def save(folder: Path, config: dict[str, Any], network: nn.Module, out: Path) -> Path:
    """Write a model that was loaded from `folder` to `out`, with what it needs elsewhere and a model card."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".separate-") as scratch:
        made = Path(scratch) / "model"
        made.mkdir()
        write_safetensors(network.state_dict(), made / WEIGHTS)
        write_json(made / "config.json", config)
        if (folder / QUERIES).is_file():
            shutil.copyfile(folder / QUERIES, made / QUERIES)
        for part in (ENCODER, DETECTOR):
            if (folder / part).is_dir():
                shutil.copytree(folder / part, made / part)
        if (folder / CARD).is_file():
            shutil.copyfile(folder / CARD, made / CARD)
        else:
            write_atomic(made / CARD, card(folder.stem, config, scores_of(folder)))
        move_into(made, out)
    return out


def move_into(made: Path, out: Path) -> None:
    """Move all that lies in `made` into the folder `out`, over what is there by the same names."""
    out.mkdir(exist_ok=True)
    for path in sorted(made.iterdir()):
        target = out / path.name
        if target.is_dir():
            shutil.rmtree(target)
        os.replace(path, target)


def push(made: Path, repository: str, *, private: bool | None = None, token: str | None = None) -> str:
    """Upload a saved model to a Hugging Face repository, made where it is not there; return the commit's address."""
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    repository = api.create_repo(repo_id=repository, private=private, exist_ok=True).repo_id
    found = api.upload_folder(repo_id=repository, folder_path=made, commit_message=f"Upload {made.name}")
    return str(found.commit_url)


def scores_of(folder: Path) -> dict[str, float]:
    """Take what the last report says of a model of this project, in dB, by the names of SCORES."""
    if folder.resolve().parent not in [path.resolve() for path in TRAINED] or not METRICS.is_file():
        return {}
    metrics = json.loads(METRICS.read_text())
    found = {key: metrics.get(f"{folder.name}.{entry}") for key, (_, entry) in SCORES.items()}
    return {key: round(value, 2) for key, value in found.items() if value is not None}


def card(name: str, config: dict[str, Any], scores: dict[str, float]) -> str:
    """Write a model card: metadata for the Hugging Face hub, with a model-index, and how to use the model."""
    import yaml

    results = [
        {"type": key, "name": f"{SCORES[key][0]} (dB, mean over classes)", "value": value}
        for key, value in scores.items()
    ]
    index = {
        "name": name,
        "results": [
            {
                "task": {"type": "audio-to-audio", "name": "Sound separation"},
                "dataset": {"type": "mixtures", "name": "the evaluation pairs of the run that trained it"},
                "metrics": results,
            }
        ],
    }
    metadata: dict[str, Any] = {"pipeline_tag": "audio-to-audio", "library_name": "uss-pipeline"}
    metadata |= {"tags": ["sound-separation", config["architecture"]]} | ({"model-index": [index]} if results else {})
    classes = ", ".join(one["name"] for one in config.get("classes", []))
    measured = "".join(f"- {row['name']}: {row['value']}\n" for row in results)
    return (
        f"---\n{yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True)}---\n\n# {name}\n\n"
        f"A sound separator of architecture `{config['architecture']}`, at {config['sample_rate']} Hz.\n\n"
        + (f"Classes: {classes}.\n\n" if classes else "")
        + (f"On mixtures of two sounds of the evaluation data:\n\n{measured}\n" if measured else "")
        + "```python\nfrom pipeline.separate import Separator\n\n"
        'separator = Separator.from_pretrained("<this folder or repository>")\n'
        "stems = separator.separate(waveform, sample_rate)  # (channels, time); what the detector finds\n```\n"
    )


def _repository(name: str, download: bool, revision: str | None, token: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, local_files_only=not download, revision=revision, token=token))
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        hint = "" if download else "; download=True fetches it"
        raise Unusable(f"{name} is neither a folder nor a repository in the local cache{hint}") from error
