"""The training loop: what is drawn, what is written, and that a resumed run is the uninterrupted one."""

import csv

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from pipeline.devices import choose_device
from pipeline.training import build_optimizer, fit, learning_rate_factor, prefetch


class Killed(Exception):
    pass


def load(n):
    generator = torch.Generator().manual_seed(n)
    return torch.randn(4, 3, generator=generator)


def run(tmp_path, *, steps=8, kill_at=None, seed=0, load=load, name="run"):
    """Train a network with dropout; stop as if killed before step `kill_at`. Returns (network, rows of the curve)."""
    torch.manual_seed(seed)
    network = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 1))

    def loss(batch):
        loss.calls += 1
        if loss.calls == kill_at:
            raise Killed
        return (network(batch) - batch.sum(dim=1, keepdim=True)).square().mean()

    loss.calls = 0
    fit(
        network,
        build_optimizer("adamw", network.parameters(), 0.01),
        load,
        loss,
        steps=steps,
        learning_rate=lambda n: learning_rate_factor(n, warmup=[[0.0, 0.1], [2.0, 1.0]], decay="cosine", steps=steps),
        gradient_clip=1.0,
        seed=seed,
        describe=lambda n: f"the batch called {n}",
        scratch=tmp_path / f"{name}-scratch",
        curve=tmp_path / f"{name}.csv",
        log_every_steps=3,
        checkpoint_every_seconds=0.0,
    )
    with (tmp_path / f"{name}.csv").open() as file:
        return network, list(csv.DictReader(file))


def test_a_killed_run_continues_to_the_same_weights_and_the_same_curve(tmp_path):
    network, rows = run(tmp_path, name="whole")
    with pytest.raises(Killed):
        run(tmp_path, name="killed", kill_at=6)
    resumed, resumed_rows = run(tmp_path, name="killed")
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name
    assert rows == resumed_rows
    assert [row["step"] for row in rows] == ["3", "6", "8"]


def test_the_same_seed_gives_the_same_weights_and_another_seed_others(tmp_path):
    one, two, other = (run(tmp_path, name=f"run{i}", seed=seed)[0] for i, seed in enumerate([0, 0, 1]))
    assert torch.equal(one[0].weight, two[0].weight)
    assert not torch.equal(one[0].weight, other[0].weight)


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_batch(tmp_path):
    def spoilt(n):
        return load(n) if n != 2 else torch.full((4, 3), float("nan"))

    with pytest.raises(FloatingPointError, match="loss is nan at step 2, batch: the batch called 2"):
        run(tmp_path, load=spoilt)


def test_a_gradient_that_is_not_finite_stops_the_run_before_it_reaches_the_weights(tmp_path):
    parameter = nn.Parameter(torch.zeros(2))
    network = nn.ParameterList([parameter])
    with pytest.raises(FloatingPointError, match="the gradient is nan at step 0, batch: number 0"):
        fit(
            network,
            build_optimizer("adam", network.parameters(), 0.01),
            load,
            lambda batch: (parameter.square().sum()).sqrt(),  # its value at 0 is 0, its slope 0 / 0
            steps=1,
            learning_rate=lambda n: 1.0,
            gradient_clip=0.0,
            seed=0,
            describe=lambda n: f"number {n}",
            scratch=tmp_path / "scratch",
            curve=tmp_path / "curve.csv",
            log_every_steps=1,
            checkpoint_every_seconds=60.0,
        )
    assert torch.equal(parameter, torch.zeros(2))


def test_the_network_learns(tmp_path):
    _, rows = run(tmp_path, steps=300)
    assert float(rows[-1]["loss"]) < 0.5 * float(rows[0]["loss"])


def test_warm_up_is_piecewise_constant_as_in_uss():
    warmup = [[0.0, 0.001], [10_000.0, 0.01], [20_000.0, 0.1], [30_000.0, 1.0]]
    steps = (0, 9_999, 10_000, 20_000, 29_999, 30_000, 599_999)
    factors = [learning_rate_factor(n, warmup=warmup, decay="none", steps=600_000) for n in steps]
    assert factors == [0.001, 0.001, 0.01, 0.1, 0.1, 1.0, 1.0]


def test_the_cosine_starts_at_one_and_ends_at_zero():
    factors = [
        learning_rate_factor(n, warmup=[[0.0, 0.1], [10.0, 1.0]], decay="cosine", steps=110) for n in (9, 10, 60, 110)
    ]
    assert factors == pytest.approx([0.1, 1.0, 0.5, 0.0])


@given(st.integers(0, 20), st.integers(1, 5))
def test_prefetch_keeps_the_order(n, depth):
    assert list(prefetch(lambda i: i * i, range(n), depth)) == [i * i for i in range(n)]


def test_prefetch_raises_what_loading_raised():
    def broken(n):
        if n == 3:
            raise ValueError("anchor 3 cannot be read")
        return n

    batches = prefetch(broken, range(5))
    assert [next(batches) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ValueError, match="anchor 3"):
        next(batches)


def test_a_device_that_is_not_there_is_an_error():
    assert choose_device("cpu").type == "cpu"
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="no GPU"):
            choose_device("cuda")
        assert choose_device("auto").type == "cpu"
