"""The demo: what it does with a file, without gradio; and the page itself where gradio is there."""

import numpy as np
import pytest
import soundfile

from pipeline.demo import command, work
from pipeline.separate import Separator, Unusable
from tests.stages.test_train_separator import trained

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
    import sys

    monkeypatch.setitem(sys.modules, "gradio", None)
    assert command.main(["-n", "nowhere"]) == 2
    assert capsys.readouterr().err.startswith("error: gradio is not installed")


@pytest.mark.filterwarnings("ignore")  # of gradio itself
def test_the_page_shows_what_a_file_becomes_and_refuses_in_a_line(separator, tmp_path):
    gradio = pytest.importorskip("gradio", reason="gradio is not installed (extra `demo`)")
    blocks = command.page(gradio, separator, tmp_path / "page")
    (work_on,) = (one.fn for one in blocks.fns.values() if one.api_name == "separate")
    found = [one for one in work_on(str(sound(tmp_path / "x.wav")), ["Dog"], None, False) if one.visible]
    assert [one.label for one in found] == ["mixture", "mixture", "Dog", "Dog", "residual", "residual"]
    (tmp_path / "text.wav").write_text("no sound")
    with pytest.raises(gradio.Error, match=r"^'text\.wav: "):
        work_on(str(tmp_path / "text.wav"), ["Dog"], None, False)
