"""MAE-bandsplit: features join the band-split body, beginning as the baseline, by the fusions that it has."""

import pytest
import torch

from pipeline import separators
from pipeline.separators import Batch, fusions
from pipeline.separators.mae_bandsplit import Settings
from tests.separators.test_mae_resunet import SETTINGS

BODY = {
    **{"n_fft": 1024, "hop_length": 512, "bands": 32, "width": 4, "layers": 1, "frame_hidden": 8},
    **{"recurrent_hidden": 4, "mask_hidden": 8, "query_hidden": 8},
}
FUSIONS = [name for name in fusions.names() if name != "none" and "bandsplit" in fusions.bodies(name)]


def build(seed=0, interferer_query=False, **changes):
    settings = {**SETTINGS, **changes}
    config = {"dim": 16, "depth": 2, "heads": 2, "mae_input": settings["mae_input"]}
    torch.manual_seed(seed)
    return separators.build(
        "mae_bandsplit", query_dim=8, interferer_query=interferer_query, body=BODY, upstream_config=config, **settings
    )


def baseline(seed=0):
    torch.manual_seed(seed)
    return separators.build("bandsplit", query_dim=8, **BODY)


def batch(samples=64000, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, samples, generator=generator), torch.randn(2, 8, generator=generator)


@pytest.mark.parametrize("fusion", [*FUSIONS, "none"])
def test_every_fusion_begins_as_the_baseline_and_then_listens(fusion):
    model, mixture_query = build(fusion=fusion).eval(), batch()
    torch.testing.assert_close(model(*mixture_query), baseline().eval()(*mixture_query), rtol=1e-4, atol=1e-5)
    if fusion == "none":
        return
    if fusion == "interferer":
        model.fusion.head.spread.fill_(1.0)
    torch.nn.init.normal_(model.fusion.project.weight)
    before = model(*mixture_query)
    for parameter in model.upstream.parameters():
        torch.nn.init.normal_(parameter)
    assert not torch.equal(model(*mixture_query), before)


@pytest.mark.parametrize("fusion", ["tokens", "frames"])
def test_a_part_has_the_features_that_its_frames_have_in_the_whole(fusion):
    model, mixture = build(fusion=fusion).eval(), batch()[0]
    torch.nn.init.normal_(model.fusion.project.weight)
    # The features' own addition, without what the STFT of a part differs by.
    zeros = torch.zeros(2, 126, 32, 4) if fusion == "tokens" else torch.zeros(2, 1, 8)
    whole = model.locate(model.features(mixture), 64000, slice(None))
    part = model.locate(model.features(mixture), 64000, slice(40 * 512, 60 * 512))
    if fusion == "tokens":
        one, other = model.fusion.tokens(zeros, whole), model.fusion.tokens(zeros[:, :21], part)
    else:
        one, other = model.fusion.steer(zeros, whole, 126), model.fusion.steer(zeros, part, 21)
    assert torch.equal(one[:, 40:61], other)
    assert not torch.equal(one[:, :21], other)


@pytest.mark.parametrize("fusion", ["tokens", "frames", "film"])
def test_a_long_recording_has_the_features_of_each_window(fusion):
    model, query = build(fusion=fusion).eval(), batch()[1]
    torch.nn.init.normal_(model.fusion.project.weight)
    model.segment_samples = 32000  # 62 frames, 31744 samples
    mixture = batch(100000)[0]
    places, masked = {}, model.masked

    def keep(part, query, enter, steer):
        places.update(query=query, tokens=enter(torch.zeros(2, 197, 32, 4)), hidden=steer(torch.zeros(2, 4, 8), 197))
        return masked(part, query, enter, steer)

    model.masked = keep
    assert model(mixture, query).shape == mixture.shape
    second = model.features(mixture[:, 31744:63488])
    located = model.locate(second, 31744, slice(None))
    torch.testing.assert_close(places["query"][:, 1], model.fusion.query(query, located))
    expected = model.fusion.tokens(torch.zeros(2, 62, 32, 4), located)
    torch.testing.assert_close(places["tokens"][:, 62:124], expected)
    expected = model.fusion.steer(torch.zeros(2, 1, 8), located, 62).expand(-1, 62, -1)
    torch.testing.assert_close(places["hidden"][:, 62:124], expected)


@pytest.mark.parametrize("fusion", FUSIONS)
def test_features_and_what_else_sounds_go_together(fusion):
    model = build(fusion=fusion, interferer_query=True)
    if fusion == "interferer":
        model.fusion.head.spread.fill_(1.0)
    mixture, query = batch()
    part = slice(3200, 35200)
    given = torch.tensor([True, False])
    terms = model.losses(Batch(mixture, part, mixture[:, part] / 2, query, query.flip(0), given), ["l1"])
    sum(terms.values()).backward()
    assert model.fusion.project.weight.grad.any()
    assert model.not_given.grad.any()


def test_a_fusion_of_another_body_is_refused_with_those_there_are():
    with pytest.raises(ValueError, match=r"not of bandsplit, which has film, frames, interferer, none, tokens"):
        Settings.model_validate({**SETTINGS, "fusion": "freq"})
