"""How microscopes, stains and files differ: colour, blur, noise and JPEG, drawn for every crop."""

import io
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F
from torchvision.transforms.functional import gaussian_blur

from cellflux_bridge.images import stain


def recolour(
    rgb: torch.Tensor, generators: Sequence[np.random.Generator], *, strength: float, generator: torch.Generator
) -> torch.Tensor:
    """RGB (B, 3, H, W) float32 in [0, 1] with another stain, exposure, sharpness, noise and compression each."""
    rgb = (stain.augment(2 * rgb - 1, strength=strength, generator=generator) + 1) / 2
    return torch.stack([_degrade(one, rng) for one, rng in zip(rgb, generators, strict=True)])


def _degrade(rgb: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    gain = torch.from_numpy(np.exp(rng.normal(0, 0.08, (3, 1, 1))).astype(np.float32))
    rgb = rgb.clamp_min(1 / 255) ** gain * float(rng.uniform(0.88, 1.0))
    if rng.random() < 0.15:  # enlarged from a smaller file
        size = rgb.shape[-1]
        small = F.interpolate(rgb[None], scale_factor=float(rng.uniform(0.35, 0.9)), mode="bilinear", antialias=True)
        rgb = F.interpolate(small, size=(size, size), mode="bicubic")[0].clamp(0, 1)
    draw = rng.random()
    if draw < 0.45:
        sigma = float(rng.uniform(0.3, 1.6))
        blurred = gaussian_blur(rgb, 2 * round(2 * sigma) + 1, sigma)
        rgb = blurred if draw < 0.35 else (2 * rgb - blurred).clamp(0, 1)
    if rng.random() < 0.4:
        rgb = rgb + torch.from_numpy(rng.normal(0, rng.uniform(0, 0.05), rgb.shape).astype(np.float32))
    rgb = rgb.clamp(0, 1)
    return _compressed(rgb, int(rng.integers(30, 95))) if rng.random() < 0.3 else rgb


def _compressed(rgb: torch.Tensor, quality: int) -> torch.Tensor:
    file = io.BytesIO()
    pixels = (255 * rgb).round().to(torch.uint8).permute(1, 2, 0).numpy()
    Image.fromarray(pixels).save(file, format="JPEG", quality=quality)
    return torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1).float() / 255
