"""What no network was trained on: haematoxylin, contrast and fine detail of patches."""

import numpy as np

from cellflux_bridge.images.stain import concentrations

FIGURES = ("haematoxylin_area", "contrast", "fine_detail")
# Concentration, in natural units of optical density, from which a pixel counts as haematoxylin's.
_STAINED = 1.0


def tissue_figures(patches: np.ndarray) -> np.ndarray:
    """(N, 3), as named in `FIGURES`, of RGB uint8 patches (N, 3, H, W).

    haematoxylin_area  share of pixels with a haematoxylin concentration above 1.0 (fixed vectors of Ruifrok & Johnston)
    contrast           standard deviation over the pixels of values in [0, 1], mean over the channels
    fine_detail        absolute difference of horizontal neighbours in grey levels (0..255), mean over the channels
    """
    values = patches.astype(np.float32)
    haematoxylin = concentrations(patches.transpose(0, 2, 3, 1))[..., 0]
    area = (haematoxylin > _STAINED).mean((1, 2))
    contrast = values.std((2, 3)).mean(1) / 255
    detail = np.abs(np.diff(values, axis=3)).mean((1, 2, 3))
    return np.stack([area, contrast, detail], axis=1)
