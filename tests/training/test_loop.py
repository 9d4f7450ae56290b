"""The training loop: what is drawn, what is written, and that a resumed run is the uninterrupted one."""

import csv
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from pipeline.core.devices import autocast, choose_device, exact_float32, use_precision
from pipeline.training.loop import (
    Average,
    Fitted,
    Validation,
    build_optimizer,
    fit,
    learning_rate_factor,
    prefetch,
    write_curve,
)


class Killed(Exception):
    pass


def load(n):
    generator = torch.Generator().manual_seed(n)
    return torch.randn(4, 3, generator=generator)


def run(tmp_path, *, steps=8, kill_at=None, seed=0, load=load, name="run", ema=0.0, each_step=lambda network: None):
    """Train a network with dropout; stop as if killed before step `kill_at`. Returns (network, rows of the curve)."""
    torch.manual_seed(seed)
    network = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 1))

    def loss(batch):
        loss.calls += 1
        if loss.calls == kill_at:
            raise Killed
        each_step(network)
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
        ema=ema,
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


def test_a_killed_run_continues_to_the_same_averaged_weights(tmp_path):
    network, rows = run(tmp_path, name="whole", ema=0.7)
    with pytest.raises(Killed):
        run(tmp_path, name="killed", ema=0.7, kill_at=6)
    resumed, resumed_rows = run(tmp_path, name="killed", ema=0.7)
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name
    assert rows == resumed_rows


def test_averaging_changes_no_step_and_ends_with_the_mean_that_the_decay_says(tmp_path):
    plain, averaged = list[dict[str, torch.Tensor]](), list[dict[str, torch.Tensor]]()

    def keep(states):
        return lambda network: states.append({name: t.clone() for name, t in network.state_dict().items()})

    last, rows = run(tmp_path, name="plain", each_step=keep(plain))
    mean, averaged_rows = run(tmp_path, name="averaged", each_step=keep(averaged), ema=0.75)
    assert rows == averaged_rows
    assert all(torch.equal(one[name], two[name]) for one, two in zip(plain, averaged, strict=True) for name in one)
    states = [*plain, last.state_dict()]
    expected = states[0]["0.weight"]
    for n, state in enumerate(states[1:]):
        expected = expected + max(0.25, 9 / (10 + n)) * (state["0.weight"] - expected)
    torch.testing.assert_close(mean.state_dict()["0.weight"], expected)
    assert not torch.equal(mean.state_dict()["0.weight"], last.state_dict()["0.weight"])
    assert mean.state_dict()["1.num_batches_tracked"] == 8
    assert not torch.equal(mean.state_dict()["1.running_var"], last.state_dict()["1.running_var"])


@pytest.mark.parametrize("decay", [1.0, -0.5])
def test_a_decay_that_is_none_is_refused(decay):
    with pytest.raises(ValueError, match=f"average of weights is {decay}, not between 0 and 1"):
        Average(nn.Linear(1, 1), decay)


def test_the_averaged_weights_are_in_the_model_as_long_as_it_validates():
    network = nn.Linear(2, 2)
    average, own = Average(network, 0.5), network.weight.detach().clone()
    with torch.no_grad():
        network.weight.add_(1)
    with average.inside(network):
        assert torch.equal(network.weight, own)
    assert torch.equal(network.weight, own + 1)


def test_the_same_seed_gives_the_same_weights_and_another_seed_others(tmp_path):
    one, two, other = (run(tmp_path, name=f"run{i}", seed=seed)[0] for i, seed in enumerate([0, 0, 1]))
    assert torch.equal(one[0].weight, two[0].weight)
    assert not torch.equal(one[0].weight, other[0].weight)


def test_a_group_has_no_gradient_before_its_step_and_has_one_ever_after(tmp_path):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1))
    start, learns, weights = network[0].weight.clone(), [], []

    def loss(batch):
        learns.append(network[0].weight.requires_grad)
        weights.append(network[0].weight.detach().clone())
        return network(batch).square().mean()

    late = {"params": list(network[0].parameters()), "start_step": 3}
    schedule = {"steps": 5, "learning_rate": lambda n: 1.0, "gradient_clip": 0.0, "seed": 0, "log_every_steps": 5}
    files = {"scratch": tmp_path / "scratch", "curve": tmp_path / "curve.csv", "checkpoint_every_seconds": 9.0}
    optimizer = build_optimizer("adamw", [late, {"params": list(network[1].parameters())}], 0.1)
    fit(network, optimizer, load, loss, **schedule, **files, describe=str)
    assert learns == [False, False, False, True, True]
    assert [torch.equal(weight, start) for weight in weights] == [True, True, True, True, False]
    assert not torch.equal(network[0].weight, start)

    stays = [{**late, "start_step": 9}, {"params": list(network[1].parameters())}]
    before = network[0].weight.clone()
    fit(
        network,
        build_optimizer("adamw", stays, 0.1),
        load,
        loss,
        **schedule,
        describe=str,
        scratch=tmp_path / "other",
        curve=tmp_path / "curve.csv",
        checkpoint_every_seconds=9.0,
    )
    assert torch.equal(network[0].weight, before)
    assert network[0].weight.requires_grad  # as it was: what it costs is counted afterwards


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_batch(tmp_path):
    def spoilt(n):
        return load(n) if n != 2 else torch.full((4, 3), float("nan"))

    with pytest.raises(FloatingPointError, match="loss is nan at step 2, batch: the batch called 2"):
        run(tmp_path, load=spoilt)


def test_a_gradient_that_is_not_finite_stops_the_run_before_it_reaches_the_weights(tmp_path):
    parameter = nn.Parameter(torch.zeros(2))
    network = nn.ParameterList([parameter])
    with pytest.raises(FloatingPointError, match="the gradient_norm is nan at step 0, batch: number 0"):
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
    losses = [float(row["loss"]) for row in rows]  # a row is three batches of four, under dropout: noise
    assert sum(losses[-50:]) < 0.9 * sum(losses[:10]) * 5


class Scripted:
    """A network that is its own step counter, validates as it is told, and may be killed before a step.

    `weight` loses its learning rate at each step, `mark` is what before_step last wrote there.
    """

    def __init__(self, tmp_path, name="run"):
        self.scratch, self.curve = tmp_path / f"{name}-scratch", tmp_path / f"{name}.csv"
        self.network = nn.Linear(1, 1, bias=False)
        self.network.register_buffer("mark", torch.zeros(()))
        nn.init.zeros_(self.network.weight)

    def fit(self, says, *, steps=12, every=3, patience=0, kill_at=None, log_every=100) -> Fitted:
        """`says` maps a step to its validation loss."""
        optimizer = torch.optim.SGD(self.network.parameters(), lr=1.0)
        self.modes, self.validated, self.told = [], [], []

        def loss(n):
            if n == kill_at:
                raise Killed
            self.modes.append(self.network.training)
            return self.network.weight.sum()

        def validation():
            step = round(-self.network.weight.item())
            assert not self.network.training
            self.validated.append(step)
            return says(step)

        def before_step(n):
            self.told.append(n)
            if n % 4 == 0:
                self.network.mark.fill_(n)

        return fit(
            self.network,
            optimizer,
            lambda n: n,
            loss,
            steps=steps,
            learning_rate=lambda n: 1.0,
            gradient_clip=0.0,
            seed=0,
            describe=str,
            scratch=self.scratch,
            curve=self.curve,
            log_every_steps=log_every,
            checkpoint_every_seconds=0.0,
            validation=Validation(validation, every, patience) if says else None,
            before_step=before_step,
        )

    @property
    def state(self):
        """(steps that the weights have seen, mark)."""
        return round(-self.network.weight.item()), round(self.network.mark.item())

    @property
    def rows(self):
        with self.curve.open() as file:
            return [(row["step"], row["validation"]) for row in csv.DictReader(file)]


def v_shaped(lowest):
    return lambda step: float(abs(step - lowest))


def test_the_weights_of_the_lowest_validation_are_kept(tmp_path):
    run = Scripted(tmp_path)
    fitted = run.fit(v_shaped(6), steps=11)
    assert run.validated == [3, 6, 9, 11]  # also after the last step
    assert (fitted.steps, fitted.best_step, fitted.best_validation) == (11, 6, 0.0)
    assert run.state == (6, 4)  # with their buffers
    assert run.rows == [("3", "3"), ("6", "0"), ("9", "3"), ("11", "5")]
    assert all(run.modes)
    assert not run.network.training


def test_the_first_of_equal_validations_is_the_best(tmp_path):
    run = Scripted(tmp_path)
    assert run.fit(lambda step: 1.0, patience=3, steps=30).best_step == 3
    assert run.validated == [3, 6, 9, 12]
    assert run.state[0] == 3


@pytest.mark.parametrize(("patience", "steps"), [(0, 24), (1, 12), (2, 15), (4, 21)])
def test_training_ends_after_so_many_validations_without_a_new_best(tmp_path, patience, steps):
    run = Scripted(tmp_path)
    fitted = run.fit(v_shaped(9), steps=24, patience=patience)
    assert (fitted.steps, fitted.best_step) == (steps, 9)
    assert run.state[0] == 9
    assert run.rows[-1][0] == str(steps)


def test_a_new_best_renews_the_patience(tmp_path):
    says = {3: 5.0, 6: 6.0, 9: 4.0, 12: 6.0, 15: 6.0}
    fitted = Scripted(tmp_path).fit(says.__getitem__, steps=60, patience=2)
    assert (fitted.steps, fitted.best_step, fitted.best_validation) == (15, 9, 4.0)


@pytest.mark.parametrize("kill_at", [1, 6, 7, 14])
@pytest.mark.parametrize("patience", [0, 2])
def test_killed_anywhere_it_keeps_the_same_weights_and_stops_at_the_same_step(tmp_path, kill_at, patience):
    whole = Scripted(tmp_path, "whole")
    expected = whole.fit(v_shaped(9), steps=20, patience=patience, log_every=2)
    with pytest.raises(Killed):
        Scripted(tmp_path, "killed").fit(v_shaped(9), steps=20, patience=patience, log_every=2, kill_at=kill_at)
    killed = Scripted(tmp_path, "killed")
    found = killed.fit(v_shaped(9), steps=20, patience=patience, log_every=2)
    assert killed.told[0] == kill_at
    assert (found.steps, found.best_step, found.best_validation) == (expected.steps, expected.best_step, 0.0)
    assert killed.state == whole.state == (9, 8)
    assert killed.curve.read_bytes() == whole.curve.read_bytes()


def test_a_run_killed_after_its_patience_ended_takes_no_further_step(tmp_path):
    run = Scripted(tmp_path, "killed")
    # As if killed between the last checkpoint and the curve.
    run.fit(v_shaped(3), steps=60, patience=2)
    again = Scripted(tmp_path, "killed")
    fitted = again.fit(v_shaped(3), steps=60, patience=2)
    assert (fitted.steps, fitted.best_step, fitted.seconds_per_step) == (9, 3, None)
    assert again.validated == again.told == []
    assert again.state[0] == 3


def test_before_every_step_the_model_may_change_as_a_function_of_its_number(tmp_path):
    run = Scripted(tmp_path)
    fitted = run.fit(None, steps=10)
    assert run.told == list(range(10))
    assert run.state == (10, 8)
    assert (fitted.steps, fitted.best_step, fitted.best_validation) == (10, 10, None)
    assert fitted.seconds_per_step > 0


def test_the_curve_has_a_validation_column_only_where_something_validates(tmp_path):
    run = Scripted(tmp_path)
    run.fit(None, steps=4)
    assert run.curve.read_text().splitlines()[0] == "step,loss,gradient_norm,learning_rate"
    validated = Scripted(tmp_path, "validated")
    validated.fit(v_shaped(3), steps=5, log_every=2)
    assert validated.rows == [("2", ""), ("3", "0"), ("4", ""), ("5", "2")]


@pytest.mark.parametrize("validates", [None, v_shaped(3)])
def test_the_curve_of_no_step_is_the_header_of_any_other(tmp_path, validates):
    run = Scripted(tmp_path)
    run.fit(validates, steps=4)
    write_curve(tmp_path / "empty.csv", [], validation=validates is not None)
    assert (tmp_path / "empty.csv").read_text() == run.curve.read_text().splitlines(keepends=True)[0]


def test_validation_does_not_count_as_time_of_the_steps(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

    def slow(step):
        now[0] += 20.0
        return 1.0

    assert Scripted(tmp_path).fit(slow, steps=3, every=1).seconds_per_step == 0.0


def test_float32_is_exact_unless_tf32_is_asked_for():
    def now():
        return torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32

    before = now()
    try:
        for precision, rounded in (("fp32", False), ("tf32", True), ("bf16", False)):
            use_precision(precision)
            assert now() == (rounded, rounded)
            with exact_float32():
                assert now() == (False, False)
            assert now() == (rounded, rounded)
            with autocast(torch.device("cpu"), precision):
                assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == (
                    torch.bfloat16 if precision == "bf16" else torch.float32
                )
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


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
