"""The optimiser and the course of the learning rate."""

import pytest
import torch
from test_training import DEMANDING, assert_same_checkpoint, train
from torch import nn

from cellflux_bridge.training import muon
from cellflux_bridge.training.optimiser import build_optimiser, learning_rate
from cellflux_bridge.training.settings import TrainConfig


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(8, 24, 3), nn.GroupNorm(4, 24), nn.Conv2d(24, 16, 1))


def stepped(train: TrainConfig, *, gradient) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Each parameter before and after an update along gradients of one's own."""
    model = network().to(memory_format=torch.channels_last)  # as in training
    optimiser, before = build_optimiser(model, train), [p.detach().clone() for p in model.parameters()]
    for p in model.parameters():
        p.grad = gradient(p)
    optimiser.step()
    return list(zip(before, (p.detach() for p in model.parameters()), strict=True))


def test_muon_moves_a_kernel_alike_in_all_directions_and_as_far_as_adam_does():
    def uneven(p: torch.Tensor) -> torch.Tensor:  # one direction rules
        return torch.randn_like(p) * 0.1 + (torch.outer(torch.randn(len(p)), torch.randn(p[0].numel())).view_as(p))

    train = TrainConfig(optimiser="muon", lr=1e-2)
    for before, after in stepped(train, gradient=uneven):
        moved = (after - before).flatten(1) if before.ndim > 1 else None
        if moved is None:
            torch.testing.assert_close((after - before).abs(), torch.full_like(after, 1e-2), rtol=1e-3, atol=1e-6)
            continue
        values = torch.linalg.svdvals(moved)  # of the gradient the first is thirty times the second
        assert values[0] / values[1] < 3
        assert moved.square().mean().sqrt() == pytest.approx(0.2 * 1e-2, rel=0.35)


@pytest.mark.parametrize("shape", [(2, 24, 72), (1, 72, 24), (3, 1, 9)])
def test_the_steps_by_the_gram_matrix_are_those_of_the_matrix_itself(shape):
    torch.manual_seed(0)
    of = torch.randn(shape) * torch.logspace(0, -1.5, shape[2])
    x = of / of.norm(dim=(1, 2), keepdim=True)
    for a, b, c in muon._COEFFICIENTS:
        x = a * x + b * (x @ x.mT @ x) + c * (x @ x.mT @ x @ x.mT @ x)
    found = muon.orthogonal(of)
    torch.testing.assert_close(found, x, rtol=1e-3, atol=1e-4)
    values = torch.linalg.svdvals(found)
    assert values.min() > 0.7
    assert values.max() < 1.3


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_weight_decay_is_of_matrices_alone(name):
    train = TrainConfig(optimiser=name, lr=0.1, weight_decay=0.5)
    for before, after in stepped(train, gradient=torch.zeros_like):
        assert torch.allclose(after, before * (0.95 if before.ndim > 1 else 1))


def test_the_learning_rate_falls_in_a_line_to_the_end():
    train = TrainConfig(lr=1.0, steps=10, warmup_steps=2, lr_decay="linear")
    rates = [learning_rate(step, train) for step in range(10)]
    assert rates == pytest.approx([0.5, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1])
    assert learning_rate(7, TrainConfig(lr=1.0, steps=10, warmup_steps=2)) == 1.0


def test_a_run_with_muon_resumes_bit_for_bit(patch_folder, tmp_path, write_config):
    file = write_config(tmp_path, **DEMANDING)
    overrides = ("train.optimiser=muon", "path.colour=0.4")
    whole = train(file, tmp_path / "whole", "train.steps=6", *overrides)
    train(file, tmp_path / "parts", "train.steps=3", *overrides)
    assert_same_checkpoint(train(file, tmp_path / "parts", "train.steps=6", *overrides), whole)
