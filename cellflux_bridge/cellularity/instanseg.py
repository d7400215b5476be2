"""Nuclei by a trained InstanSeg network (Goldsborough et al. 2024, arXiv 2408.15954), from a local TorchScript file.

Such a file (brightfield_nuclei, `instanseg.pt`) holds the network and its post-processing: RGB float32 (1, 3, H, W) at
0.5 microns per pixel, each channel scaled so that its 0.1 and 99.9 percentiles are 0 and 1, becomes a label map
(1, 1, H, W). Only torch is needed to run it.
"""

import warnings
from functools import lru_cache

import numpy as np
import torch
from torch.nn import functional as F

from cellflux_bridge.base.errors import UserError

_MPP = 0.5
_PERCENTILES = (0.1, 99.9)
# The network halves its maps five times.
_STRIDE = 32


@lru_cache(maxsize=1)
def _load(file: str) -> torch.jit.ScriptModule:
    try:
        with warnings.catch_warnings():  # TorchScript is deprecated, and what InstanSeg is published as
            warnings.simplefilter("ignore", FutureWarning)
            return torch.jit.load(file, map_location="cpu").eval()
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(
            f"--instanseg {file}: cannot be loaded ({str(error).splitlines()[0]}); expected InstanSeg's TorchScript "
            "file, instanseg.pt"
        ) from error


def segment(rgb: np.ndarray, *, file: str, mpp: float | None) -> np.ndarray:
    """The nuclei of an RGB uint8 image (H, W, 3) as a label map (H, W) int32, numbered from 1.

    The image is scaled to 0.5 microns per pixel where `mpp` is known and taken for such where it is not. Raises
    UserError for a file that holds no such network.
    """
    height, width = rgb.shape[:2]
    low, high = np.percentile(rgb, _PERCENTILES, axis=(0, 1))
    scaled = (rgb - low) / np.maximum(high - low, 1e-3)
    x = torch.from_numpy(scaled.transpose(2, 0, 1)[None].astype(np.float32))
    if mpp is not None and mpp != _MPP:
        size = [max(1, round(side * mpp / _MPP)) for side in (height, width)]
        x = F.interpolate(x, size=size, mode="bilinear", antialias=True)
    rows, columns = x.shape[-2:]
    x = F.pad(x, (0, -columns % _STRIDE, 0, -rows % _STRIDE), mode="replicate")
    with torch.inference_mode():
        labels = _load(file)(x)
    if not isinstance(labels, torch.Tensor) or labels.shape[-2:] != x.shape[-2:]:
        raise UserError(
            f"--instanseg {file}: gives no label map of the image's size; expected InstanSeg's instanseg.pt"
        )
    labels = labels.reshape(-1, *x.shape[-2:])[:1, :rows, :columns]  # of nuclei, which come before cells
    labels = F.interpolate(labels[None].float(), size=(height, width), mode="nearest")[0, 0]
    numbered = np.unique(np.append(labels.numpy(), 0), return_inverse=True)[1]  # from 0, whether there is background
    return numbered[:-1].reshape(height, width).astype(np.int32)
