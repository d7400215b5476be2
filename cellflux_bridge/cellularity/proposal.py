"""Which crop and image size suit nuclei: measured on some files before anything is trained."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from cellflux_bridge import images
from cellflux_bridge.cellularity.nuclei import is_bright_field, network_scale
from cellflux_bridge.cellularity.parameters import Parameters

# Nuclei of fewer px have no outline in a patch, and below the second number they are not counted, either.
AIM, LEAST = 7.0, 4.5
# Of each file at most the middle of so many px is looked at.
_SIDE = 512


def propose_crop(files: Sequence[Path], *, image_size: int, crop: int | None) -> list[str]:
    """Lines for `data check`: how wide nuclei are in the files, how wide the network would see them, and the crop that
    shows them 7 px wide. Nothing where no nuclei are found, as in fluorescence; files must be readable RGB images."""
    diameters, sides = [], []
    for file in files:
        rgb = images.read_rgb(file)
        height, width = rgb.shape[:2]
        top, left = ((side - min(side, _SIDE)) // 2 for side in (height, width))
        part = np.ascontiguousarray(rgb[top : top + _SIDE, left : left + _SIDE])
        if not is_bright_field(part):
            continue
        scale = network_scale([part[None]], mpp=None, parameters=Parameters())
        sides.append(min(height, width))
        if scale is not None and scale.diameter is not None:
            diameters.append(scale.diameter)
    if len(diameters) < max(2, len(files) // 3):
        return []
    diameter, side = float(np.median(diameters)), int(np.median(sides))
    seen, found = diameter * image_size / (crop or side), f"{len(diameters)} of {len(files)} files"
    lines = [f"nuclei: {diameter:.0f} px wide in the files (median of {found}), {seen:.1f} px at {image_size} px"]
    proposed = round(diameter * image_size / AIM)
    if seen < LEAST and image_size <= proposed < side:
        lines[0] += f"; WARNING: too few to show an outline; set data.crop={proposed} ({AIM:g} px)"
    elif seen < LEAST:
        larger = 2 ** int(np.ceil(np.log2(image_size * AIM / seen)))
        lines[0] += f"; WARNING: too few to show an outline; set data.image_size={min(larger, side)}, or a smaller crop"
    return lines
