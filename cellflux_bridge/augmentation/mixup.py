"""Two images laid over each other."""

import torch

from cellflux_bridge.augmentation.base import Alpha, Augmentation, draw_shares


class Mixup(Augmentation):
    """share * x + (1 - share) * partner, of images and labels alike (Zhang et al. 2018, arXiv 1710.09412, eq. 1).

    The share is drawn from Beta(alpha, alpha), for every image its own. `alpha` 1, a uniform share, is what the paper
    has for CIFAR-10 (0.2 for ImageNet).
    """

    def __init__(self, *, alpha: Alpha = 1.0):
        self._alpha = alpha

    def __call__(self, x, y, *, generator):
        partner = torch.randperm(len(x), generator=generator)
        share = draw_shares(len(x), alpha=self._alpha, generator=generator).to(x.device)
        return torch.lerp(x[partner], x, share.view(-1, 1, 1, 1)), torch.lerp(y[partner], y, share.view(-1, 1))
