"""The optimiser of a training and the course of its learning rate."""

import torch
from timm.optim import Muon
from torch import nn

from cellflux_bridge.training.settings import TrainConfig


def build_optimiser(model: nn.Module, train: TrainConfig) -> torch.optim.Optimizer:
    """AdamW (Loshchilov & Hutter 2019), or Muon (Jordan et al. 2024) for matrices and kernels and AdamW for the rest.

    Muon makes the update of every matrix orthogonal, so that no direction of it is learned last; scaled to the size of
    AdamW's updates (Liu et al. 2025), both have one learning rate. Weight decay is of matrices and kernels alone.
    """
    groups = [{"params": list(model.parameters())}]
    if train.weight_decay:
        of = {is_matrix: [p for p in model.parameters() if (p.ndim > 1) == is_matrix] for is_matrix in (True, False)}
        groups = [{"params": of[True]}, {"params": of[False], "weight_decay": 0.0}]
    options = {"lr": train.lr, "betas": train.betas, "weight_decay": train.weight_decay}
    if train.optimiser == "adamw":
        return torch.optim.AdamW(groups, **options)
    return Muon(groups, nesterov=True, adjust_lr_fn="match_rms_adamw", **options)


def learning_rate(step: int, train: TrainConfig) -> float:
    """The learning rate of update `step` (from 0): a linear warm-up; with lr_decay=linear a line to 0 at the end."""
    warm = min(1.0, (step + 1) / max(1, train.warmup_steps))
    return train.lr * warm * (1 - step / train.steps if train.lr_decay == "linear" else 1.0)
