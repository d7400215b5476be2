"""Another image in a region of random shape."""

from typing import Annotated

import torch
from pydantic import Field

from cellflux_bridge.augmentation.base import Alpha, Augmentation, draw_shares, paste


class FMix(Augmentation):
    """The partner inside a random mask of low frequencies; labels by area (Harris et al. 2020, arXiv 2002.12047).

    A grey image is made of complex Gaussian noise in Fourier space, divided by |frequency|^decay (never below the
    frequency of one period along the longer side). The mask is its brightest pixels, as many as the share from
    Beta(alpha, alpha) wants. `alpha` 1 and `decay` 3 are published. Masks have hard edges, as in the paper's runs.
    """

    def __init__(self, *, alpha: Alpha = 1.0, decay: Annotated[float, Field(ge=0, le=10)] = 3.0):
        self._alpha, self._decay = alpha, decay

    def __call__(self, x, y, *, generator):
        partner, shape = torch.randperm(len(x), generator=generator), x.shape[2:]
        share = draw_shares(len(x), alpha=self._alpha, generator=generator)
        grey = self._low_frequencies(len(x), shape, generator).flatten(1)
        num = (share * grey.shape[1]).round()
        ranks = grey.argsort(dim=1, descending=True).argsort(dim=1)
        mask = (ranks < num[:, None]).view(-1, 1, *shape)
        return paste(x, y, x[partner], partner, mask)

    def _low_frequencies(self, num: int, shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
        """Grey images (num, H, W) whose amplitudes fall with frequency."""
        height, width = shape
        frequency = torch.hypot(torch.fft.fftfreq(height)[:, None], torch.fft.rfftfreq(width))
        noise = torch.randn(num, *frequency.shape, dtype=torch.complex64, generator=generator)
        spectrum = noise / frequency.clamp(min=1 / max(shape)) ** self._decay
        return torch.fft.irfft2(spectrum, s=shape)
