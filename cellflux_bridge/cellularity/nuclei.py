"""Finding nuclei in H&E images by the method that is asked for: the built-in network, rules of colour, or InstanSeg."""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from cellflux_bridge.base.errors import UserError
from cellflux_bridge.cellularity.parameters import Parameters, Scale

# Mean difference of the largest and smallest channel below which an image is grey, median brightness below which it is
# dark, and how much more green than red and blue an inverted H&E image shows on average, all in grey levels.
_GREY, _DARK, _GREENER = 3.0, 50.0, 8.0
_DEFAULT = Parameters()


class NotBrightField(UserError):
    """An image in which nuclei cannot be sought; the message says why."""


def require_bright_field(rgb: np.ndarray) -> None:
    """NotBrightField for what is no RGB uint8 picture of dark nuclei on a light ground: grey, dark, inverted images.

    Nearly white images pass: they show glass, and no nuclei.
    """
    if rgb.dtype != np.uint8 or rgb.ndim != 3 or rgb.shape[2] != 3:
        raise NotBrightField(f"an image of {rgb.dtype}, shape {rgb.shape}: expected RGB uint8 (H, W, 3)")
    few = rgb[:: max(1, rgb.shape[0] // 128), :: max(1, rgb.shape[1] // 128)].astype(np.float32)
    planes = np.moveaxis(few, 2, 0).copy()  # to reduce a last axis of three would take ten times as long
    brightest, darkest = planes.max(axis=0), planes.min(axis=0)
    if np.median(brightest) < _DARK:
        raise NotBrightField("a dark image: expected bright-field H&E (dark nuclei on light ground), not fluorescence")
    if (brightest - darkest).mean() < _GREY and darkest.mean() < 230:
        raise NotBrightField("a grey image: expected H&E in colour; nuclei are told from the rest by their stain")
    red, green, blue = few.mean(axis=(0, 1))
    if green > max(red, blue) + _GREENER:
        raise NotBrightField(
            "more green than red and blue: expected H&E, which absorbs green most; is the image inverted?"
        )


class Found(NamedTuple):
    """Label maps (B, H, W) int32, 0 background, 1..n in no order, and the scale that the network saw them at."""

    labels: np.ndarray
    scale: Scale | None = None


def segment(
    rgb: np.ndarray, *, mpp: float | None = None, parameters: Parameters = _DEFAULT, scale: Scale | None = None
) -> np.ndarray:
    """The nuclei of an RGB uint8 image (H, W, 3) as a label map (H, W) int32: 0 background, 1..n in no order.

    `mpp` are microns per pixel; without them the network, or the rules, estimate how large nuclei are. `scale` is the
    network's, where it is known from other images of the same magnification. Raises
    NotBrightField for grey, dark (fluorescence) and inverted images.
    """
    require_bright_field(rgb)
    return segment_stack(rgb[None], mpp=mpp, parameters=parameters, scale=scale).labels[0]


def segment_stack(stack: np.ndarray, *, mpp: float | None, parameters: Parameters, scale: Scale | None = None) -> Found:
    """The nuclei of RGB uint8 images (B, H, W, 3) of one magnification, which are bright-field (see above).

    `scale` is that of the network, where it is known beforehand; by default it follows from `mpp` or these images.
    """
    if parameters.method == "network":
        from cellflux_bridge.cellularity import finding, network

        scale = scale or network_scale([stack], mpp=mpp, parameters=parameters)
        return Found(
            finding.find_nuclei(stack, scale, network.load_network(parameters.model, parameters.device)), scale
        )
    if parameters.method == "instanseg":
        from cellflux_bridge.cellularity import instanseg

        return Found(np.stack([instanseg.segment(rgb, file=parameters.instanseg, mpp=mpp) for rgb in stack]))
    from cellflux_bridge.cellularity import classical

    return Found(np.stack([classical.segment(rgb, mpp=mpp, parameters=parameters) for rgb in stack]))


def network_scale(stacks: Iterable[np.ndarray], *, mpp: float | None, parameters: Parameters) -> Scale | None:
    """The one scale at which the network sees images (B, H, W, 3) uint8 of one magnification; None for other methods.

    Without `mpp` it is estimated from those that are bright-field.
    """
    if parameters.method != "network":
        return None
    from cellflux_bridge.cellularity import finding, network

    if mpp is not None:
        return finding.known_scale(mpp)
    model = network.load_network(parameters.model, parameters.device)
    return finding.estimate_scale([rgb for stack in stacks for rgb in stack if is_bright_field(rgb)], model)


def is_bright_field(rgb: np.ndarray) -> bool:
    try:
        require_bright_field(rgb)
    except NotBrightField:
        return False
    return True
