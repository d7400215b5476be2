"""Octaves of the spatial frequency of patches: statistics of their bands, and the radial spectrum.

Patches are uint8 (N, C, H, W), RGB or other channels. All is of pixels and needs no network.
"""

from itertools import pairwise

import numpy as np
from scipy.ndimage import gaussian_filter
from scipy.stats import kurtosis, skew

# Standard deviations in px between which the octaves lie: below 1 px, 1 to 2 px, 2 to 4 px, 4 to 8 px.
SIGMAS = (0.0, 1.0, 2.0, 4.0, 8.0)
# Of `statistics`: those of the grey image, and those of red, green - mean and blue - mean.
KINDS = {"grey": slice(0, 12), "colour": slice(12, None)}
_LEAST = 1e-3  # grey levels squared; keeps the logarithm of an empty band finite
_CHUNK = 1024


def statistics(patches: np.ndarray) -> np.ndarray:
    """(N, 12 + 12 C) float64: log power, skewness and kurtosis of four octaves of the channels of `KINDS`."""
    return np.concatenate([band_statistics(grey(patches)), band_statistics(opponents(patches))], axis=1)


def grey(patches: np.ndarray) -> np.ndarray:
    """The mean of the channels as one, (N, 1, H, W) float32, 0 to 255."""
    return patches.astype(np.float32).mean(1, keepdims=True)


def opponents(patches: np.ndarray) -> np.ndarray:
    """Red, and green and blue without the mean of the colours, (N, C, H, W) float32; so of any channels."""
    values = patches.astype(np.float32)
    values[:, 1:] -= values.mean(1, keepdims=True)
    return values


def band_statistics(channels: np.ndarray) -> np.ndarray:
    """(N, 12 C): log power, skewness and kurtosis of four octaves of every channel of (N, C, H, W) float32.

    An octave is the difference of two Gaussian blurs, from the finest on. A flat octave has neither skewness nor
    kurtosis: 0.
    """
    found = []
    for start in range(0, len(channels), _CHUNK):
        part = channels[start : start + _CHUNK]
        blurred = [gaussian_filter(part, (0, 0, sigma, sigma), mode="reflect") for sigma in SIGMAS]
        bands = np.stack([fine - coarse for fine, coarse in pairwise(blurred)], axis=2)
        pixels = bands.reshape(*bands.shape[:3], -1).astype(np.float64)
        power = np.log(pixels.var(-1) + _LEAST)
        with np.errstate(invalid="ignore", divide="ignore"):
            shape = [np.nan_to_num(of(pixels, axis=-1)) for of in (skew, kurtosis)]
        found.append(np.stack([power, *shape], axis=-1).reshape(len(part), -1))
    return np.concatenate(found) if found else np.zeros((0, 12 * channels.shape[1]))


def radial_spectrum(patches: np.ndarray) -> np.ndarray:
    """(N, S // 2): the mean log10 power of grey patches at 1 .. S // 2 periods a side, S the shorter side.

    A Hann window keeps the borders, which do not continue each other, out of the high frequencies.
    """
    values = grey(patches)[:, 0]
    height, width = values.shape[1:]
    window = np.hanning(height + 2)[1:-1, None] * np.hanning(width + 2)[None, 1:-1]
    centred = (values - values.mean((1, 2), keepdims=True)) * window
    power = np.abs(np.fft.fft2(centred)) ** 2 / (window**2).sum()
    size = min(height, width)
    radius = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width)) * size
    rings = np.rint(radius).astype(int)
    return np.stack([np.log10(power[:, rings == ring].mean(1) + _LEAST) for ring in range(1, size // 2 + 1)], axis=1)
