"""ScaledAdam: steps in proportion to the tensor, its size learned, exact resume."""

import copy

import pytest
import torch
from torch import nn

from pipeline.training.loop import build_optimizer
from pipeline.training.scaled_adam import LEAST_RMS, SIZE_RATE


def moved(start, gradient, rate=0.01, **group):
    parameter = nn.Parameter(start.clone())
    optimizer = build_optimizer("scaled_adam", [{"params": [parameter], **group}], rate)
    parameter.grad = gradient
    optimizer.step()
    return parameter.detach() - start


@pytest.mark.parametrize("scale", [0.1, 1.0, 2.0])
def test_a_step_is_in_proportion_to_the_tensors_size(scale):
    start = scale * torch.tensor([1.0, -1.0, 1.0, -1.0])
    gradient = torch.tensor([3.0, 3.0, -2.0, -2.0])  # at right angles to the tensor: its size stays
    torch.testing.assert_close(moved(start, gradient), -0.01 * scale * gradient.sign())


def test_a_gradient_along_the_tensor_changes_its_size_too():
    start = torch.tensor([1.0, -1.0])
    step = moved(start, torch.tensor([5.0, -5.0]))
    torch.testing.assert_close(step, -(0.01 + SIZE_RATE * 0.01) * start)


def test_a_tensor_of_zeros_begins_to_move_and_a_number_moves_by_itself():
    torch.testing.assert_close(moved(torch.zeros(3), torch.ones(3)), torch.full((3,), -0.01 * LEAST_RMS))
    torch.testing.assert_close(moved(torch.zeros(()), torch.ones(())), torch.tensor(-0.01 * SIZE_RATE))


def test_weight_decay_is_that_of_the_group():
    start, gradient = torch.tensor([1.0, -1.0]), torch.ones(2)
    torch.testing.assert_close(
        moved(start, gradient, weight_decay=0.5) - moved(start, gradient), -0.01 * 0.5 * start, rtol=0.02, atol=0
    )


def test_it_goes_on_from_its_state_to_the_bit():
    def step(network, optimizer, n):
        torch.manual_seed(n)
        optimizer.zero_grad()
        network(torch.randn(4, 3)).square().mean().backward()
        optimizer.step()

    torch.manual_seed(0)
    network = nn.Linear(3, 2)
    optimizer = build_optimizer("scaled_adam", network.parameters(), 0.05)
    step(network, optimizer, 1)
    again = copy.deepcopy(network)
    resumed = build_optimizer("scaled_adam", again.parameters(), 0.05)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for one, its in ((network, optimizer), (again, resumed)):
        step(one, its, 2)
        step(one, its, 3)
    assert torch.equal(network.weight, again.weight)
    assert torch.equal(network.bias, again.bias)


def test_it_fits_a_line():
    torch.manual_seed(0)
    network = nn.Linear(4, 1)
    x, wanted = torch.randn(64, 4), torch.tensor([[1.0, -2.0, 0.5, 3.0]])
    optimizer = build_optimizer("scaled_adam", network.parameters(), 0.05)
    losses = []
    for _ in range(300):
        optimizer.zero_grad()
        loss = (network(x) - x @ wanted.T).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]
