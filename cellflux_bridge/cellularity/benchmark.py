"""How long nuclei take: one process, phantom tissue, so that the figure needs no data."""

import argparse
import time
from collections.abc import Sequence

import numpy as np

from cellflux_bridge.base.progress import progress
from cellflux_bridge.cellularity.measurement import measure
from cellflux_bridge.cellularity.nuclei import Parameters, segment
from cellflux_bridge.data.phantom import make_phantom

# Height, width and how many images of that size.
SIZES = ((32, 32, 200), (64, 64, 100), (256, 320, 20), (1024, 1024, 3), (4096, 4096, 1))


def nuclei_times(parameters: Parameters, *, largest: int = 4096) -> list[dict[str, float]]:
    """CPU milliseconds to find and measure the nuclei of an image of each size up to `largest` px, and their number.

    Larger images than 320 px are one phantom, laid side by side and mirrored.
    """
    rows = []
    segment(make_phantom(0.5, size=64, seed=0).image, parameters=parameters)  # loads the network
    for height, width, num in progress(
        [size for size in SIZES if max(size[:2]) <= largest], desc="nuclei", unit="size"
    ):
        found, seconds = 0, 0.0
        for number in range(num):
            phantom = make_phantom((number + 0.5) / num, size=min(max(height, width), 320), seed=number).image
            rows_over, columns_over = max(0, height - len(phantom)), max(0, width - len(phantom))
            rgb = np.pad(phantom, ((0, rows_over), (0, columns_over), (0, 0)), mode="symmetric")[:height, :width]
            start = time.process_time()
            labels = segment(rgb, parameters=parameters)
            measure(rgb, labels)
            seconds += time.process_time() - start
            found += int(labels.max())
        milliseconds = 1000 * seconds / num
        rows.append({"height": height, "width": width, "nuclei": found / num, "milliseconds": milliseconds})
    return rows


def main(argv: Sequence[str]) -> None:
    """Print the times as a Markdown table."""
    parser = argparse.ArgumentParser(prog="benchmark_nuclei.py", description=__doc__)
    parser.add_argument("--largest", type=int, default=4096, help="px, side of the largest image (4096)")
    parser.add_argument("--method", default="network", help="network or classical")
    args = parser.parse_args(argv)
    times = nuclei_times(Parameters(method=args.method), largest=args.largest)
    print("| image | nuclei | CPU ms an image |\n| --- | --- | --- |")
    for row in times:
        print(f"| {row['width']:.0f} x {row['height']:.0f} | {row['nuclei']:.0f} | {row['milliseconds']:.1f} |")
