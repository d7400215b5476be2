"""The optimiser of a training and the course of its learning rate."""

import torch
from torch import nn

from cellflux_bridge.training.muon import Muon
from cellflux_bridge.training.settings import TrainConfig


def build_optimiser(model: nn.Module, train: TrainConfig) -> torch.optim.Optimizer:
    """AdamW (Loshchilov & Hutter 2019), or Muon (Jordan et al. 2024) for convolution kernels and AdamW for the rest.

    Muon makes the update of every kernel orthogonal, so that no direction of it is learned last; scaled to the size of
    AdamW's updates (Liu et al. 2025), both have one learning rate. Matrices stay with AdamW: they embed times and
    conditions, and with Muon a flow of 600 updates left a fifth of its sources unchanged at level 1. Weight decay is of
    kernels and matrices alone.
    """
    options = {"lr": train.lr, "betas": train.betas}
    kind = Muon if train.optimiser == "muon" else torch.optim.AdamW
    parameters = sorted(model.parameters(), key=lambda p: -min(p.ndim, 3))  # as the states of earlier runs hold them
    if kind is not Muon and not train.weight_decay:
        return kind(model.parameters(), weight_decay=0.0, **options)
    matrices, vectors = ([p for p in parameters if (p.ndim > 1) == is_matrix] for is_matrix in (True, False))
    decays = ((matrices, train.weight_decay), (vectors, 0.0))
    return kind([{"params": of, "weight_decay": decay} for of, decay in decays], **options)


def learning_rate(step: int, train: TrainConfig) -> float:
    """The learning rate of update `step` (from 0): a linear warm-up; with lr_decay=linear a line to 0 at the end."""
    warm = min(1.0, (step + 1) / max(1, train.warmup_steps))
    return train.lr * warm * (1 - step / train.steps if train.lr_decay == "linear" else 1.0)
