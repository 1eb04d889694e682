"""Muon against PyTorch's own for matrices, and against AdamW for the rest."""

import copy

import torch
from torch import nn

from ldm.training.engine.muon import Muon, is_matrix, orthogonal


def stepped(weight: torch.Tensor, gradients: list[torch.Tensor], optimizer: torch.optim.Optimizer) -> torch.Tensor:
    for gradient in gradients:
        weight.grad = gradient.clone()
        optimizer.step()
    return weight.detach()


def test_a_matrix_moves_as_by_pytorchs_own() -> None:
    torch.manual_seed(0)
    for shape in ((64, 160), (160, 64), (96, 96)):
        mine, theirs = (nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(1))) for _ in range(2))
        gradients = [torch.randn(shape) for _ in range(4)]
        stepped(mine, gradients, Muon([mine], lr=0.01, betas=(0.9, 0.99), weight_decay=0.1))
        own = torch.optim.Muon([theirs], lr=0.01, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw")
        stepped(theirs, gradients, own)
        assert (mine - theirs).abs().max() < 1e-3  # both iterate in bfloat16, in another order: a step is 0.002
        assert (mine - theirs).square().mean().sqrt() < 1e-4


def test_a_convolution_moves_as_the_matrix_of_its_patches() -> None:
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(64, 32, 3, 3))
    flat = nn.Parameter(weight.detach().reshape(64, 288).clone())
    gradients = [torch.randn_like(weight) for _ in range(3)]
    settings = {"lr": 0.01, "betas": (0.9, 0.99), "weight_decay": 0.0}
    stepped(weight, gradients, Muon([weight], **settings))
    stepped(flat, [g.reshape(64, 288) for g in gradients], Muon([flat], **settings))
    assert torch.equal(weight.reshape(64, 288), flat)


def test_what_is_no_matrix_moves_as_by_adamw() -> None:
    torch.manual_seed(0)
    for shape in ((), (50,), (4, 1152), (128, 36), (1100, 64)):  # the last as a table of words
        mine = nn.Parameter(torch.randn(shape))
        theirs = nn.Parameter(mine.detach().clone())
        assert not is_matrix(mine)
        gradients = [torch.randn(shape) for _ in range(5)]
        stepped(mine, gradients, Muon([mine], lr=0.01, betas=(0.9, 0.99), weight_decay=0.1))
        stepped(theirs, gradients, torch.optim.AdamW([theirs], lr=0.01, betas=(0.9, 0.99), weight_decay=0.1))
        torch.testing.assert_close(mine, theirs)


def test_every_singular_value_ends_near_one_in_the_same_directions() -> None:
    matrices = torch.randn(3, 200, 80, generator=torch.Generator().manual_seed(0))
    found = orthogonal(matrices).float()
    values = torch.linalg.svdvals(found)
    assert values.min() > 0.6 and values.max() < 1.25
    left, _, right = torch.linalg.svd(matrices, full_matrices=False)
    cosine = torch.cosine_similarity((left @ right).flatten(1), found.flatten(1))
    assert cosine.min() > 0.97


def test_a_weight_without_a_gradient_stays_and_a_zero_gradient_makes_no_nan() -> None:
    still, zero = nn.Parameter(torch.ones(64, 64)), nn.Parameter(torch.ones(64, 64))
    zero.grad = torch.zeros(64, 64)
    Muon([still, zero], lr=0.1, betas=(0.9, 0.99), weight_decay=0.0).step()
    assert torch.equal(still, torch.ones(64, 64)) and torch.equal(zero, torch.ones(64, 64))


def test_its_state_goes_on_where_it_was_saved() -> None:
    torch.manual_seed(0)
    gradients = [torch.randn(64, 64) for _ in range(4)]
    settings = {"lr": 0.01, "betas": (0.9, 0.99), "weight_decay": 0.0}
    straight = nn.Parameter(torch.ones(64, 64))
    stepped(straight, gradients, Muon([straight], **settings))
    halves = nn.Parameter(torch.ones(64, 64))
    first = Muon([halves], **settings)
    stepped(halves, gradients[:2], first)
    second = Muon([halves], **settings)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    stepped(halves, gradients[2:], second)
    assert torch.equal(straight, halves)
