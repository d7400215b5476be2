"""The box of another image that catches the eye, pasted at its own place."""

import torch
from torch.nn import functional as F

from cellflux_bridge.augmentation.cutmix import CutMix

# Reaches in pixels of the surrounds that a pixel is compared with.
_REACHES = (12, 24, 28, 48, 56, 112)


class SaliencyMix(CutMix):
    """CutMix with the box about the partner's most salient pixel (Uddin et al. 2021, arXiv 2006.01791).

    Box, labels, `alpha` 1 and `probability` 0.5 are CutMix's, as published for CIFAR. Saliency is fine-grained static
    saliency (see `saliency`), which the authors take from OpenCV. They centre all boxes of a batch by one image's
    saliency; here each has its own partner's.
    """

    def _centres(self, other, generator):
        salient = saliency(other).flatten(1).argmax(dim=1).cpu()
        return torch.stack([salient // other.shape[3], salient % other.shape[3]], dim=1)


def saliency(images: torch.Tensor) -> torch.Tensor:
    """Saliency (B, H, W) >= 0 of images (B, C, H, W): how much a pixel differs from its surrounds.

    After Montabone & Soto, "Human detection using a mobile platform and novel features derived from a visual saliency
    mechanism" (2010), with the numbers of OpenCV: grey g (here the mean of the channels) is blurred twice by the 3 x 3
    binomial, and s_r is the mean of the (2 r + 1)^2 pixels about a pixel that lie in the image, less the pixel, for
    r = 12, 24, 28, 48, 56, 112. Saliency is sum_r |g - s_r|. OpenCV divides the sums of bright and of dark differences
    by their maxima before it adds them, so that the brightest and the darkest pixel tie, and in an image with one dark
    spot noise ties with the spot. That is left out, and so is the rounding to 8 bits.
    """
    grey = images.mean(dim=1, keepdim=True)
    for _ in range(2):
        grey = F.avg_pool2d(F.avg_pool2d(F.pad(grey, (1, 1, 1, 1), mode="replicate"), 2, 1), 2, 1)
    grey = grey[:, 0]
    found = torch.zeros_like(grey)
    for reach in _REACHES:
        rows, columns = (_near(side, reach).to(grey) for side in grey.shape[1:])
        others = (rows.sum(1)[:, None] * columns.sum(1) - 1).clamp(min=1)
        found += (grey - (rows @ grey @ columns - grey) / others).abs()
    return found


def _near(side: int, reach: int) -> torch.Tensor:
    """Which pixels of a line lie within `reach` of each: (side, side) bool."""
    at = torch.arange(side)
    return (at[:, None] - at).abs() <= reach
