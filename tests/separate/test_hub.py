"""Models for elsewhere: a saved folder is whole and loads, its card reads, published checkpoints are checked."""

import hashlib
import json
import shutil
from types import SimpleNamespace

import huggingface_hub
import numpy as np
import pytest
import torch
import yaml

from pipeline import separators
from pipeline.separate import Separator, Unusable, hub
from pipeline.separators.resunet import dropped_shapes, published_name
from tests.stages.test_train_separator import trained

SIZES = {"query_dim": 6, "n_fft": 1024, "channels": [4, 4, 4, 4, 4, 4]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("model"))


def noise(seconds):
    return 0.1 * np.random.default_rng(0).standard_normal((1, int(32000 * seconds))).astype(np.float32)


def test_a_saved_model_separates_as_the_one_it_was_saved_from(folder, tmp_path):
    saved = Separator.from_pretrained(folder, device="cpu").save_pretrained(tmp_path / "elsewhere" / "mine")
    names = sorted(path.name for path in saved.iterdir())
    assert names == [
        "README.md",
        "config.json",
        "detector",
        "model.safetensors",
        "queries.safetensors",
        "query_encoder",
    ]
    assert [path.name for path in saved.parent.iterdir()] == ["mine"]
    moved = shutil.move(saved, tmp_path / "moved")
    one, other = (Separator.from_pretrained(where, device="cpu") for where in (folder, moved))
    np.testing.assert_array_equal(
        one.separate(noise(1), 32000, ["Dog"])["Dog"], other.separate(noise(1), 32000, ["Dog"])["Dog"]
    )


def test_a_card_has_the_scores_of_the_last_report(folder, tmp_path, monkeypatch):
    metrics = tmp_path / "metrics.json"
    metrics.write_text(json.dumps({f"{folder.name}.average.sdri_class_mean_mean": 5.678}))
    monkeypatch.setattr(hub, "METRICS", metrics)
    monkeypatch.setattr(hub, "TRAINED", (folder.parent,))
    text = (Separator.from_pretrained(folder, device="cpu").save_pretrained(tmp_path / "out") / "README.md").read_text()
    metadata = yaml.safe_load(text.split("---\n")[1])
    result = metadata["model-index"][0]["results"][0]["metrics"][0]
    assert (result["type"], result["value"]) == ("sdri", 5.68)
    card = huggingface_hub.ModelCard(text)  # the hub's own reader takes it
    assert card.data.eval_results[0].metric_value == 5.68
    assert "Dog" in text


def test_a_model_that_no_report_knows_has_a_card_without_scores(folder, tmp_path):
    text = (Separator.from_pretrained(folder, device="cpu").save_pretrained(tmp_path / "out") / "README.md").read_text()
    assert "model-index" not in text


def test_a_model_is_pushed_as_it_is_saved(folder, monkeypatch):
    pushed = {}

    class Api:
        def __init__(self, token):
            pushed["token"] = token

        def create_repo(self, repo_id, private, exist_ok):
            assert exist_ok
            pushed["private"] = private
            return SimpleNamespace(repo_id=repo_id)

        def upload_folder(self, repo_id, folder_path, commit_message):
            pushed["files"] = sorted(path.name for path in folder_path.iterdir())
            return SimpleNamespace(commit_url=f"there/{repo_id}")

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    where = Separator.from_pretrained(folder, device="cpu").push_to_hub("me/mine", private=True, token="secret")
    assert where == "there/me/mine"
    assert pushed["private"] is True
    assert "model.safetensors" in pushed["files"]


def test_a_repository_is_fetched_only_where_that_is_asked_for(folder, monkeypatch):
    asked = []

    def snapshot(name, **options):
        asked.append(options["local_files_only"])
        if options["local_files_only"]:
            raise huggingface_hub.errors.LocalEntryNotFoundError("not there")
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    with pytest.raises(Unusable, match="neither a folder nor a repository in the local cache; download=True"):
        Separator.from_pretrained("me/mine")
    assert Separator.from_pretrained("me/mine", download=True).classes
    assert asked == [True, False]


def published(path):
    """A file of the form that uss publishes: a Lightning checkpoint under uss' names, and tensors that do nothing."""
    torch.manual_seed(0)
    network = separators.build("resunet", hop_length=320, **SIZES).eval()
    state = {published_name(name): tensor for name, tensor in network.state_dict().items()}
    state |= {name: torch.zeros(shape) for name, shape in dropped_shapes(**SIZES).items()}
    state["base.stft.conv_real.weight"][0, 0] = torch.hann_window(SIZES["n_fft"])
    torch.save({"state_dict": {f"ss_model.{name}": tensor for name, tensor in state.items()}, "epoch": 3}, path)
    return network, hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_published_checkpoint_separates_by_its_own_weights(tmp_path):
    network, sha256 = published(tmp_path / "uss.ckpt")
    separator = Separator.from_pretrained(tmp_path / "uss.ckpt", sha256=sha256, device="cpu")
    query = torch.rand(6)
    found = separator.separate(noise(1), 32000, {"it": query})["it"]
    with torch.inference_mode():
        expected = network(torch.from_numpy(noise(1)), query[None]).numpy()
    np.testing.assert_allclose(found, expected, atol=1e-6)
    again = Separator.from_pretrained(separator.save_pretrained(tmp_path / "converted"), device="cpu")
    np.testing.assert_array_equal(again.separate(noise(1), 32000, {"it": query})["it"], found)


def test_another_checkpoint_than_the_hash_says_is_not_opened(tmp_path):
    _, sha256 = published(tmp_path / "uss.ckpt")
    with pytest.raises(Unusable, match="its sha256 is not known"):
        Separator.from_pretrained(tmp_path / "uss.ckpt")
    (tmp_path / "uss.ckpt").write_bytes((tmp_path / "uss.ckpt").read_bytes() + b"x")
    with pytest.raises(Unusable, match=f"not {sha256}"):
        Separator.from_pretrained(tmp_path / "uss.ckpt", sha256=sha256)


def test_a_model_whose_training_ran_out_of_memory_is_none(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "m/config.json").write_text(json.dumps(config | {"status": "out_of_memory"}))
    with pytest.raises(Unusable, match="holds no model: its training ended with 'out_of_memory'"):
        Separator.from_pretrained(tmp_path / "m")
