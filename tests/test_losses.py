"""Losses against numbers that can be worked out by hand."""

import torch

from pipeline.losses import l1_loss


def test_l1_loss_is_the_mean_absolute_difference_of_each_item():
    estimate = torch.tensor([[1.0, -1.0, 0.0, 0.0], [0.5, 0.5, 0.5, 0.5]])
    target = torch.tensor([[0.0, 1.0, 0.0, 0.0], [0.5, 0.5, 0.5, 0.5]])
    assert l1_loss(estimate, target).tolist() == [0.75, 0.0]


def test_l1_loss_keeps_its_items_apart():
    estimate = torch.randn(2, 50, generator=torch.Generator().manual_seed(0)).requires_grad_()
    l1_loss(estimate, torch.zeros(2, 50))[0].backward()
    assert estimate.grad[0].abs().allclose(torch.tensor(1 / 50))
    assert not estimate.grad[1].any()
