"""What the nuclei network sees in patches, as maps of features, at the scale that the patches' nuclei tell."""

import torch
from torch.nn import functional as F

from cellflux_bridge.cellularity.finding import estimate_scale
from cellflux_bridge.cellularity.network import STRIDE, NucleiNet
from cellflux_bridge.data.patches import Patches

_NUM_LOOKED_AT = 128


def scale_factor(patches: Patches, network: NucleiNet, *, seed: int) -> float | None:
    """How many times training patches are enlarged for the network; None where it finds no nuclei in 128 of them."""
    chosen = patches.sample("train", num=_NUM_LOOKED_AT, seed=seed)
    scale = estimate_scale(list(patches.centre(chosen).permute(0, 2, 3, 1).numpy()), network)
    return None if scale.diameter is None else scale.factor


def maps_of(network: NucleiNet, x: torch.Tensor, *, factor: float) -> list[torch.Tensor]:
    """`NucleiNet.maps` of patches x (B, 3, H, W) in about [-1, 1], enlarged `factor` times, to the nearest multiple
    of the network's stride."""
    absorption = (1 - x) / 2
    size = [max(1, round(side * factor / STRIDE)) * STRIDE for side in absorption.shape[2:]]
    is_reduced = size[0] < absorption.shape[2]
    return network.maps(F.interpolate(absorption, size, mode="bilinear", antialias=is_reduced))
