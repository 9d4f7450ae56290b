"""The demo: what it does with a file, without gradio; and the page itself where gradio is there."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

from pipeline.demo import command, work
from pipeline.separate import Separator, Unusable
from tests.stages.test_train_separator import trained

ROOT = Path(__file__).parents[2]
RATE = 32000


@pytest.fixture(scope="module")
def separator(tmp_path_factory):
    return Separator.from_pretrained(trained(tmp_path_factory.mktemp("model")), device="cpu")


def sound(path, seconds=1.0, seed=0):
    noise = 0.1 * np.random.default_rng(seed).standard_normal((round(seconds * RATE), 2))
    soundfile.write(path, noise, RATE)
    return path


def test_a_file_becomes_mixture_stems_and_residual_to_hear_and_see(separator, tmp_path):
    path, example = sound(tmp_path / "x.wav"), sound(tmp_path / "bark.wav", seed=1)
    found = work.separate_file(separator, path, tmp_path / "out", classes=["Dog"], example=example)
    assert [one.name for one in found] == ["mixture", "Dog", "bark", "residual"]
    assert found[0].audio == path
    read = [soundfile.read(one.audio)[0] for one in found]
    np.testing.assert_allclose(sum(read[1:]), read[0], atol=1e-3)
    for one in found:
        assert one.picture.read_bytes().startswith(b"\x89PNG")


def test_what_cannot_be_separated_is_one_line(separator, tmp_path, monkeypatch):
    path = sound(tmp_path / "x.wav")
    with pytest.raises(Unusable, match="nothing is asked for"):
        work.separate_file(separator, path, tmp_path / "out")
    with pytest.raises(Unusable, match="no class 'Dogg' in this model; did you mean 'Dog'"):
        work.separate_file(separator, path, tmp_path / "out", classes=["Dogg"])
    (tmp_path / "text.wav").write_text("no sound")
    with pytest.raises(Unusable, match=r"text\.wav: "):
        work.separate_file(separator, tmp_path / "text.wav", tmp_path / "out", classes=["Dog"])
    monkeypatch.setattr(work, "MAX_SECONDS", 0.5)
    with pytest.raises(Unusable, match=r"x\.wav is longer than "):
        work.separate_file(separator, path, tmp_path / "out", classes=["Dog"])
    assert not (tmp_path / "out").exists()


def test_without_gradio_the_command_says_what_is_missing(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert command.main(["-n", "nowhere"]) == 2
    assert capsys.readouterr().err.startswith("error: gradio is not installed")


PAGE = """
import sys
from pathlib import Path

import gradio
from pipeline.demo import command
from pipeline.separate import Separator

model, sound, text, folder = sys.argv[1:]
blocks = command.page(gradio, Separator.from_pretrained(model, device="cpu"), Path(folder))
(work,) = (one.fn for one in blocks.fns.values() if one.api_name == "separate")
print([one.label for one in work(sound, ["Dog"], None, False) if one.visible])
try:
    work(text, ["Dog"], None, False)
except gradio.Error as error:
    print(error.message)
"""


def test_the_page_shows_what_a_file_becomes_and_refuses_in_a_line(separator, tmp_path):
    """In a process of its own: gradio leaves event loops open, which the tests' filter of warnings takes for faults."""
    if importlib.util.find_spec("gradio") is None:
        pytest.skip("gradio is not installed (extra `demo`)")
    (tmp_path / "text.wav").write_text("no sound")
    arguments = [separator.folder, sound(tmp_path / "x.wav"), tmp_path / "text.wav", tmp_path / "page"]
    done = subprocess.run([sys.executable, "-c", PAGE, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True)
    labels, refusal = done.stdout.splitlines()
    assert labels == str([name for name in ("mixture", "Dog", "residual") for _ in range(2)])
    assert refusal.startswith("text.wav: ")
