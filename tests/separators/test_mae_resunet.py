"""MAE-ResUNet: every fusion begins from the baseline, frozen encoders stay frozen, and training resumes to the bit."""

import csv
import itertools
import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline import separators, upstreams
from pipeline.evaluation.cost import cost
from pipeline.mixtures.mixing import PairsParams
from pipeline.separators import Batch, fusions
from pipeline.separators.fusions.attention import time_code
from pipeline.separators.fusions.interferer import InterfererHead
from pipeline.separators.mae_resunet import Settings
from pipeline.stages.train_separator import Batches, Plan, TrainParams, train_separator
from pipeline.training.loop import build_optimizer
from pipeline.upstreams.mae import MaskedAutoencoder
from tests.corpora import write_anchors, write_sed

UNET = {"n_fft": 1024, "hop_length": 320, "channels": [4, 4, 4, 8, 4, 4], "norm_momentum": 0.1, "phase_bias": 1.0}
SETTINGS = {
    "upstream": "mae",
    "freeze_mae": True,
    "mae_input": "crop",
    "layers": "auto",
    "repeat": "interleave",
    "fusion": "freq",
    "fusion_options": {},
    "lora_rank": 0,
    "encoder_learning_rate": 1e-3,
    "encoder_weight_decay": 5e-4,
    "layer_decay": 0.5,
    "unfreeze_step": 0,
    "drop_path": 0.0,
    "bf16_frozen": False,
    "context": "anchor",
}
SIZES = {"dim": 64, "depth": 2, "heads": 2}
FUSIONS = [*(name for name in fusions.names() if name != "none" and "resunet" in fusions.bodies(name)), "none"]


def build(seed=0, **changes):
    settings = {**SETTINGS, **changes}
    sizes = SIZES if settings["upstream"] == "mae" else {"dim": SIZES["dim"]}
    config = {**sizes, "mae_input": settings["mae_input"]}
    torch.manual_seed(seed)
    return separators.build("mae_resunet", query_dim=8, upstream_config=config, body=UNET, **settings)


def baseline(seed=0):
    torch.manual_seed(seed)
    return separators.build("resunet", query_dim=8, **UNET)


def batch(samples=16000, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, samples, generator=generator), torch.randn(2, 8, generator=generator)


def example(samples=16000, seed=1):
    """A training batch that separates a part of each mixture."""
    mixture, query = batch(samples, seed)
    other, part = batch(samples, seed + 1)[1], slice(3200, 3200 + 9920)
    return Batch(mixture, part, 0.5 * mixture[:, part], query, other, torch.tensor([True, False]))


@pytest.mark.parametrize("fusion", FUSIONS)
def test_the_unet_begins_with_the_weights_of_the_baseline(fusion):
    ours, theirs = build(fusion=fusion).state_dict(), baseline().state_dict()
    for name, tensor in theirs.items():
        found = ours[name][:, :1] if name == "unet.enter.weight" else ours[name]
        assert torch.equal(found, tensor), name


@pytest.mark.parametrize("fusion", ["deep", "film", "attention", "interferer", "none"])
def test_these_fusions_begin_as_the_baseline_and_then_listen(fusion):
    model, mixture_query = build(fusion=fusion).eval(), batch()
    if fusion == "interferer":
        model.fusion.head.spread.fill_(1.0)
    assert torch.equal(model(*mixture_query), baseline().eval()(*mixture_query))
    if fusion == "none":
        return
    silent = model.fusion.cross.attention.out_proj if fusion == "attention" else model.fusion.project
    torch.nn.init.normal_(silent.weight)
    before = model(*mixture_query)
    for parameter in model.upstream.parameters():
        torch.nn.init.normal_(parameter)
    assert not torch.equal(model(*mixture_query), before)


@pytest.mark.parametrize("fusion", FUSIONS[:-1])
def test_the_features_reach_the_estimate(fusion):
    model = build(fusion=fusion)
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            torch.nn.init.normal_(module.weight, std=0.2)
    if fusion == "interferer":
        model.fusion.head.spread.fill_(1.0)
    mixture, query = batch()
    with_features = model.eval()(mixture, query)
    model.upstream.hidden = lambda waveform: [torch.randn(2, 32, 64)] * 2
    assert not torch.allclose(with_features, model(mixture, query))


def test_the_published_fusion_has_its_columns_and_masks_nyquist():
    """513 bins and a width of 64: 577 columns, of which the last is dropped; 768 would give 1280."""
    model = build(fusion="freq")
    widths = []
    model.unet.enter.register_forward_pre_hook(lambda module, args: widths.append(args[0].shape))
    mixture, query = batch(64000)
    spectrum = torch.randn(2, 201, 513, dtype=torch.complex64)
    features = model.locate(model.features(mixture), mixture.shape[1], slice(None))
    logits = model.logits(spectrum, query, features)
    assert widths == [(2, 1, 224, 576)]
    assert logits.shape == (2, 3, 224, 513)


@pytest.mark.parametrize("samples", [1, 999, 16000, 64000])
@pytest.mark.parametrize("fusion", FUSIONS)
def test_an_estimate_is_as_long_as_its_mixture(fusion, samples):
    mixture, query = batch(samples)
    assert build(fusion=fusion).eval()(mixture, query).shape == mixture.shape


def test_features_stand_at_the_frames_they_belong_to():
    model = build(fusion="channel").eval()
    steps = torch.arange(14.0)[None, :, None].expand(1, -1, 64)
    mixture = torch.zeros(1, 64000)
    features = model.locate(steps, mixture.shape[1], slice(None))
    assert features.rows(224)[0, :, 0].tolist() == [j // 16 for j in range(224)]
    assert features.rows(14, stride=16)[0, :, 0].tolist() == list(range(14))
    tiled = build(fusion="channel", repeat="tile").eval()
    assert tiled.locate(steps, mixture.shape[1], slice(None)).rows(30)[0, :, 0].tolist() == [j % 14 for j in range(30)]


@pytest.mark.parametrize("fusion", FUSIONS)
def test_a_part_has_the_features_that_its_rows_have_in_the_whole(fusion):
    """What the U-Net is given for rows 64 to 95 of 201, beside the STFT, is what it is given there in evaluation."""
    mixture, query = batch(64000)
    first, rows = 64, 32
    samples = slice(first * 320, first * 320 + 31 * 320)
    model = build(fusion=fusion).eval()
    assert model(mixture, query, samples).shape == (2, 31 * 320)
    assert torch.equal(model(mixture, query), model(mixture, query, slice(0, 64000)))
    if fusion == "none":
        assert torch.equal(model(mixture, query, samples), model(mixture[:, samples], query))
        return
    if fusion in ("film", "interferer"):  # one vector for all rows
        return
    if fusion == "attention":
        places = []
        model.fusion.cross.attention.register_forward_pre_hook(lambda module, args: places.append(args[0]))
        model.fusion.cross(torch.zeros(2, 4, 7, 8), model.features(mixture), (0.0, 7))
        model.fusion.cross(torch.zeros(2, 4, 1, 8), model.features(mixture), (2.0, 7))
        torch.testing.assert_close(places[1][:, 0], places[0][:, 2])
        return
    stride = 16 if fusion == "deep" else 1
    values = model.features(mixture)
    whole = model.locate(values, mixture.shape[1], slice(None)).rows(224 // stride, stride)
    of_part = model.locate(values, mixture.shape[1], samples).rows(rows // stride, stride)
    assert torch.equal(of_part, whole[:, first // stride : (first + rows) // stride])
    assert not torch.equal(of_part, whole[:, : rows // stride])


@pytest.mark.parametrize("first", [0, 7, 9, 15, 16])
def test_a_deep_row_has_the_step_that_its_middle_lies_in(first):
    """Rows of 16 frames, steps of 16 (crop): a row is half a step early or late at most, wherever the part begins."""
    model = build(fusion="deep", mae_input="crop")
    steps = torch.arange(14.0)[None, :, None]
    features = model.locate(steps, 64000, slice(first * 320, None))
    found = features.rows(3, stride=16)[0, :, 0]
    assert found.tolist() == [(first + 16 * row + 8) // 16 for row in range(3)]


@pytest.mark.parametrize(("context", "samples"), [("anchor", 16000), ("segment", 9920)])
def test_training_gives_the_encoder_the_anchor_or_the_segment(context, samples):
    model, given = build(fusion="freq", context=context), []
    hidden = model.upstream.hidden
    model.upstream.hidden = lambda mixture: given.append(mixture.shape[1]) or hidden(mixture)
    model.losses(example(), ["l1"])
    assert given == [samples]


def test_frozen_is_frozen():
    model = build(drop_path=0.5)
    before = {name: tensor.clone() for name, tensor in model.upstream.state_dict().items()}
    model.train()
    assert not model.upstream.training
    model(*batch()).square().mean().backward()
    assert all(p.grad is None for p in model.upstream.parameters())
    build_optimizer("adamw", model.parameter_groups(1e-2), 1e-2).step()
    assert all(torch.equal(t, before[n]) for n, t in model.upstream.state_dict().items())


def test_frozen_weights_may_be_held_in_bfloat16():
    exact, rounded = build().eval(), build(bf16_frozen=True).eval()
    rounded.load_state_dict({n: t.to(rounded.state_dict()[n].dtype) for n, t in exact.state_dict().items()})
    assert {p.dtype for p in rounded.upstream.parameters()} == {torch.bfloat16}
    estimates = [model(*batch()) for model in (exact, rounded)]
    assert (estimates[0] - estimates[1]).norm() / estimates[0].norm() < 0.05


def test_updated_uses_all_layers_and_has_a_rate_for_each():
    model = build(freeze_mae=False)
    assert model.layers == "weighted"
    assert build().layers == "last"
    groups = model.parameter_groups(1e-2)
    held = [id(p) for group in groups for p in group["params"]]
    assert len(held) == len(set(held))
    assert set(held) == {id(p) for p in model.parameters() if p.requires_grad}
    rates = sorted({group["lr"] for group in groups})
    assert rates == pytest.approx([2.5e-4, 5e-4, 1e-3, 1e-2])  # embedding, first block, last block, the rest
    decays = {tuple(p.shape): g["weight_decay"] for g in groups[2:] for p in g["params"]}
    assert decays[64, 64] == 5e-4
    assert decays[(64,)] == 0.0


def test_without_weight_decay_all_of_it_learns_too():
    model = build(freeze_mae=False, encoder_weight_decay=0.0)
    held = {id(p) for group in model.parameter_groups(1e-2) for p in group["params"]}
    assert held == {id(p) for p in model.parameters() if p.requires_grad}
    assert {group.get("weight_decay", 0.0) for group in model.parameter_groups(1e-2)} == {0.0}


@pytest.mark.parametrize("fusion", FUSIONS)
def test_features_computed_once_give_the_same_estimates(fusion):
    model, (mixture, query) = build(fusion=fusion).eval(), batch()
    shared = model.shared(mixture)
    assert set(shared) == (set() if fusion == "none" else {"features"})
    model.features = None  # not asked again
    again = build(fusion=fusion).eval()
    assert torch.equal(model(mixture, query, **shared), again(mixture, query))


def test_only_the_adapters_learn_with_a_lora_rank():
    model = build(freeze_mae=False, lora_rank=2)
    learning = [n for n, p in model.upstream.named_parameters() if p.requires_grad]
    assert learning
    assert all("lora_" in n for n in learning)
    exact = build(freeze_mae=False)
    exact.load_state_dict({n.replace(".base_layer", ""): t for n, t in model.state_dict().items() if "lora_" not in n})
    assert torch.allclose(exact.eval()(*batch()), model.eval()(*batch()), atol=1e-6)  # adapters begin as nothing
    held = {id(p) for g in model.parameter_groups(1e-2) for p in g["params"]}
    assert held == {id(p) for p in model.parameters() if p.requires_grad}


def test_adapters_of_a_frozen_encoder_are_refused():
    with pytest.raises(ValueError, match="lora_rank adapts an encoder that learns"):
        Settings(**{**SETTINGS, "lora_rank": 4})
    with pytest.raises(ValueError, match=r"upstream\n.*there is no such upstream; there are constant, dasheng"):
        Settings(**{**SETTINGS, "upstream": "wavml"})


def test_pretrained_weights_must_be_exactly_the_encoders():
    model = build()
    state = {n: torch.zeros_like(t) for n, t in model.upstream.state_dict().items()}
    model.load_pretrained(state)
    assert not any(t.any() for t in model.upstream.state_dict().values())
    state.pop("encoder.norm.bias")
    with pytest.raises(RuntimeError, match=r"differs in \['encoder.norm.bias'\]"):
        model.load_pretrained(state)


def test_constant_features_are_the_same_for_every_mixture_and_none_are_zero():
    constant, none = build(upstream="constant"), build(upstream="none")
    one, two = (model.features(batch(seed=seed)[0]) for model in (constant,) for seed in (1, 2))
    assert torch.equal(one, two)
    assert one.std().item() == pytest.approx(1, abs=0.01)
    assert not none.features(batch()[0]).any()
    assert cost(constant, query_dim=8, samples=16000).macs == cost(none, query_dim=8, samples=16000).macs


def test_rows_and_steps_carry_their_time():
    x = torch.zeros(1, 5, 7)
    assert time_code(x).shape == (5, 7)
    assert len({tuple(row) for row in time_code(x).tolist()}) == 5


# ------------------------------------------------------------------------------------------- fusion: interferer


def test_the_mean_of_the_queries_and_their_spread_are_those_of_the_batches():
    tell = build(fusion="interferer").fusion.head
    queries = torch.randn(40, 3, 8, generator=torch.Generator().manual_seed(0)) + 5
    for query in queries:
        tell.update_statistics(query)
    everything = queries.flatten(0, 1)
    torch.testing.assert_close(tell.mean, everything.mean(dim=0))
    spread = (everything - everything.mean(dim=0)).square().sum(dim=1).mean()
    assert tell.spread.item() == pytest.approx(spread.item(), rel=0.1)  # each batch from the mean until then
    for _ in range(1000):
        tell.update_statistics(torch.ones(3, 8))
    assert (tell.mean - 1).abs().max() < 0.01  # what came long ago counts little


def test_a_hint_is_as_long_as_the_queries_lie_from_their_mean():
    model = build(fusion="interferer")
    mixture, query = batch()
    model.fusion.head.update_statistics(query)
    hint = model.fusion.head.predict(model.features(mixture), query)
    torch.testing.assert_close(hint.norm(dim=1), model.fusion.head.spread.sqrt().expand(2))
    assert model.fusion.head.training
    assert torch.equal(hint, model.fusion.head.predict(model.features(mixture), query))  # without dropout


def test_each_mixture_is_two_examples_of_what_else_sounds():
    model, given = build(fusion="interferer").eval(), example()
    steps = model.features(given.mixture)
    loss = model.auxiliary_losses(given, features=steps)["interferer"]
    by_hand, head = [], model.fusion.head
    for query, wanted in ((given.query, given.interferer_query), (given.interferer_query, given.query)):
        by_hand.append(1 - torch.nn.functional.cosine_similarity(head(steps, query), wanted - head.mean))
    torch.testing.assert_close(loss, torch.cat(by_hand).mean())
    assert 0 <= loss <= 2


def test_neither_objective_reaches_the_weights_of_the_other():
    model, given = build(fusion="interferer", freeze_mae=False).train(), example()
    model.fusion.head.update_statistics(given.query)
    torch.nn.init.normal_(model.fusion.project.weight)
    terms = model.losses(given, ["l1"])
    assert set(terms) == {"l1", "interferer"}
    head, unet = list(model.fusion.head.parameters()), [*model.unet.parameters(), *model.fusion.project.parameters()]
    assert set(torch.autograd.grad(terms["l1"], head, allow_unused=True, retain_graph=True)) == {None}
    assert set(torch.autograd.grad(terms["interferer"], unet, allow_unused=True, retain_graph=True)) == {None}
    terms["interferer"].backward()
    assert all(p.grad is not None and p.grad.any() for p in head if p.ndim > 1)
    assert model.upstream.encoder.blocks[0].attn.qkv.weight.grad.any()  # an updated encoder learns what else sounds


@pytest.mark.parametrize("mae_input", ["pad1024", "crop", "hop35"])
def test_padding_changes_no_prediction(mae_input):
    model = build(fusion="interferer", mae_input=mae_input).eval()
    given = example(64000)
    model.fusion.head.update_statistics(given.query)
    torch.nn.init.normal_(model.fusion.project.weight)
    steps = model.features(given.mixture)
    n = math.ceil(200 / model.upstream.frames_per_step)
    assert n < steps.shape[1]
    changed = torch.cat([steps[:, :n], torch.randn_like(steps[:, n:])], dim=1)
    one, two = (model(given.mixture, given.query, features=s) for s in (changed, steps))
    assert torch.equal(one, two)
    assert torch.equal(*(model.auxiliary_losses(given, features=s)["interferer"] for s in (changed, steps)))


def test_an_encoder_that_is_given_the_segment_predicts_by_the_segment():
    model, given = build(fusion="interferer", context="segment").eval(), example()
    terms = model.losses(given, ["l1"])
    cut = given.mixture[:, given.part]
    again = build(fusion="interferer", context="segment").eval()
    assert torch.equal(terms["l1"], (again(cut, given.query) - given.target).abs().mean(dim=1).mean())
    features = again.locate(again.features(cut), cut.shape[1], slice(None))
    assert torch.equal(terms["interferer"], again.fusion.losses(features, given)["interferer"])


# ------------------------------------------------------------------------------------------------- in the stage

PAIRS = PairsParams(exclude="ontology", normalize="joint", match_energy=True, min_gain=0.02, max_gain=50.0)
PARAMS = TrainParams(
    seed=0,
    steps=6,
    batch_size=2,
    segment_seconds=0.25,
    query="own",
    interferer_query=0.0,
    optimizer="adamw",
    learning_rate=3e-3,
    warmup=[[0.0, 1.0]],
    decay="cosine",
    loss_weights={"l1": 1.0, "interferer": 0.1},
    gradient_clip=1.0,
    ema=0.0,
    precision="fp32",
    device="cpu",
    log_every_steps=2,
    checkpoint_every_seconds=60.0,
)


@pytest.fixture(scope="module")
def anchors(tmp_path_factory):
    return write_anchors(tmp_path_factory.mktemp("anchors") / "train", 4)


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    directory = tmp_path_factory.mktemp("mae")
    torch.manual_seed(5)
    sizes = {**SIZES, "decoder": "global", "decoder_dim": 16, "decoder_depth": 1, "decoder_heads": 2}
    save_file(MaskedAutoencoder(**sizes).state_dict(), directory / "weights.safetensors")
    (directory / "config.json").write_text(json.dumps({"model": sizes}))
    return directory


def plan(pretrained, **changes):
    settings = {**SETTINGS, **changes}
    config, state = upstreams.read(settings["upstream"], settings, pretrained)
    return Plan("mae_resunet", {"body": UNET, **settings, "upstream_config": config}, upstream=state)


def run(anchors, out, plan, **changes):
    params = PARAMS.model_copy(update=changes)
    sed = write_sed(anchors.parent / "sed")
    return train_separator("tiny", anchors, sed, out, out.with_suffix(".csv"), plan=plan, params=params, pairs=PAIRS)


def test_what_is_written_is_whole(anchors, pretrained, tmp_path):
    config = run(anchors, tmp_path / "out", plan(pretrained))
    again = separators.build(config["architecture"], **config["model"])
    state = load_file(tmp_path / "out" / "weights.safetensors")
    again.load_state_dict(state)
    theirs = load_file(pretrained / "weights.safetensors")
    assert torch.equal(state["upstream.encoder.norm.weight"], theirs["norm.weight"])
    assert config["n_trainable"] < config["n_parameters"]
    assert config["macs"] > 0


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({}, marks=pytest.mark.slow),
        {"freeze_mae": False},
        pytest.param({"freeze_mae": False, "lora_rank": 2}, marks=pytest.mark.slow),
        {"fusion": "interferer", "layers": "weighted"},
    ],
)
def test_a_killed_training_ends_in_the_same_bytes(anchors, pretrained, tmp_path, monkeypatch, changes):
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    what = plan(pretrained, drop_path=0.1, **changes)
    run(anchors, tmp_path / "whole", what)
    calls = itertools.count()
    load = Batches.load

    def dies(self, n):
        if next(calls) == 4:
            raise KeyboardInterrupt
        return load(self, n)

    monkeypatch.setattr(Batches, "load", dies)
    with pytest.raises(KeyboardInterrupt):
        run(anchors, tmp_path / "halves", what, checkpoint_every_seconds=1e-9)
    monkeypatch.setattr(Batches, "load", load)
    # The fingerprint knows the params: the second half must have the first half's.
    run(anchors, tmp_path / "halves", what, checkpoint_every_seconds=1e-9)
    one, two = ((tmp_path / name / "weights.safetensors").read_bytes() for name in ("whole", "halves"))
    assert one == two


def test_what_else_sounds_is_learned_from_the_interferers_of_the_batches(anchors, pretrained, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(InterfererHead, "update_statistics", lambda self, query: seen.append(query))
    wanted, loss = [], InterfererHead.loss

    def record(self, steps, query, queries_wanted):
        wanted.append(queries_wanted)
        return loss(self, steps, query, queries_wanted)

    monkeypatch.setattr(InterfererHead, "loss", record)
    run(anchors, tmp_path / "out", plan(pretrained, fusion="interferer"))
    batches = Batches(anchors, PAIRS, seed=0, batch_size=2, segment_seconds=0.25)
    for n in range(PARAMS.steps):
        targets, interferers = (
            torch.stack([torch.from_numpy(batches.reader.query(row)) for row in rows])
            for rows in batches.stream.batch(n, 2)
        )
        assert torch.equal(seen[n], targets)
        assert torch.equal(wanted[n], torch.cat([interferers, targets]))


def test_the_curve_has_a_column_for_each_term_and_their_weighted_sum(anchors, pretrained, tmp_path):
    """Before the first step it is the baseline: whatever the head predicts has no weight in the separation."""
    curves = {}
    for fusion in ("interferer", "none"):
        out = tmp_path / fusion
        run(anchors, out, plan(pretrained, fusion=fusion), steps=1, log_every_steps=1)
        with out.with_suffix(".csv").open() as file:
            curves[fusion] = next(csv.DictReader(file))
    assert curves["interferer"]["l1"] == curves["none"]["l1"] == curves["none"]["loss"]
    assert "interferer" not in curves["none"]
    ours = {name: float(value) for name, value in curves["interferer"].items()}
    assert ours["loss"] == pytest.approx(ours["l1"] + 0.1 * ours["interferer"], rel=1e-4)


def test_a_term_without_a_weight_is_named(anchors, pretrained, tmp_path):
    with pytest.raises(ValueError, match="loss_weights has no weight for interferer; it has l1"):
        run(anchors, tmp_path / "out", plan(pretrained, fusion="interferer"), loss_weights={"l1": 1.0})


def test_an_encoder_does_not_move_before_its_step(anchors, pretrained, tmp_path):
    run(anchors, tmp_path / "still", plan(pretrained, freeze_mae=False, unfreeze_step=6))
    run(anchors, tmp_path / "moved", plan(pretrained, freeze_mae=False, unfreeze_step=5))
    theirs = load_file(pretrained / "weights.safetensors")["blocks.0.attn.qkv.weight"]
    still, moved = (
        load_file(tmp_path / name / "weights.safetensors")["upstream.encoder.blocks.0.attn.qkv.weight"]
        for name in ("still", "moved")
    )
    assert torch.equal(still, theirs)
    assert not torch.equal(moved, theirs)
