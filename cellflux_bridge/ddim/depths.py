"""How far back the levels of a stair start: depths d_1 < .. < d_K, numbers of respaced levels in 1..T.

The `fourier` rule is Cellflow's adaptive one: depths at which M(z), the mean magnitude of 18 low frequencies, has
passed equal shares of its range along the encoded states z_1..z_T. As released it takes a place p in the list of M from
z_T to z_1 for the depth p, though the place means z_{T-p}: a mirror fault. `fourier_unmirrored` takes T - p. Departs:
the release uses the depths of a batch's first image for all; here every image has its own.
"""

from collections.abc import Sequence

import numpy as np
import torch

from cellflux_bridge.base.errors import UserError

# Horizontal offsets from the zero frequency, in the row of zero vertical frequency.
_OFFSETS = np.array([*range(-10, -1), *range(1, 10)])
_MIN_SIDE = 20


def uniform_depths(timesteps: int, num: int) -> list[int]:
    """`num` depths at equal distances, the last one short of pure noise: 10, 20, .., 90, 99 for 100 and 10."""
    if not 1 <= num < timesteps:
        raise UserError(f"translate.levels: {num} levels do not fit into ddim.timesteps={timesteps}; use fewer")
    return [min(int(i * timesteps / num + 0.5), timesteps - 1 - num + i) for i in range(1, num + 1)]


def require_depths(depths: Sequence[int], timesteps: int) -> None:
    """UserError unless the depths rise strictly within 1..T."""
    if list(depths) != sorted(set(depths)) or not 1 <= depths[0] <= depths[-1] <= timesteps:
        raise UserError(f"ddim.depths: must rise strictly from 1 to at most {timesteps}, found {list(depths)}")


def low_frequency_magnitudes(states: torch.Tensor) -> np.ndarray:
    """M of every state, float64 (...), of float images (..., 3, H, W) in [-1, 1] that may lie outside.

    M is the mean of |FFT2| of the grey image at horizontal offsets -10..-2 and 1..9 from the middle of its middle row.
    """
    height, width = states.shape[-2:]
    if min(height, width) < _MIN_SIDE or states.shape[-3] != 3:
        raise UserError(f"ddim.depths: the fourier rules need RGB images of {_MIN_SIDE} px or more; use uniform")
    pixels = states.detach().cpu().numpy().astype(np.float64)
    grey = 0.299 * pixels[..., 0, :, :] + 0.587 * pixels[..., 1, :, :] + 0.114 * pixels[..., 2, :, :]
    magnitude = np.abs(np.fft.fftshift(np.fft.fft2(grey), axes=(-2, -1)))
    return magnitude[..., height // 2, width // 2 + _OFFSETS].mean(-1)


def fourier_depths(magnitudes: Sequence[float], num: int, *, mirrored: bool) -> list[int]:
    """Depths (num < T) of one image by Cellflow's rule from M(z_1)..M(z_T); `mirrored` is as released.

    Places p in the list from z_T to z_1 are sought in turn for the values min + (max - min) i / num, i = 1..num: the
    nearest entry's, if it lies behind the place before; else that entry is set to 0 for good and the search goes on.
    After more than 100 failures for one value all depths are T/num, 2 T/num, .., less 1 for the last.
    """
    timesteps = len(magnitudes)
    falling = np.array(magnitudes[::-1], dtype=np.float64)
    low, high = falling.min(), falling.max()
    places = [0]
    for i in range(1, num + 1):
        value = low + (high - low) * i / num
        for _ in range(101):  # a success at the 102nd try comes too late as well
            place = int(np.abs(falling - value).argmin())
            if place > places[-1]:
                break
            falling[place] = 0.0
        else:
            step = timesteps // num
            return [*(step * n for n in range(1, num)), step * num - 1]
        places.append(place)
    return places[1:] if mirrored else [timesteps - place for place in places[:0:-1]]
