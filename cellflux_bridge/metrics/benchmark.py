"""Time and peak memory of features of many images, and of their distances to real patches.

Features take time linear in the number of images. All but the Frechet distance compares pairs: time grows with the
square, which `evaluate` bounds by the number of real patches (`--max-real`); these halves are not cut to it.
Left out: files, several levels, judges and methods, intervals over sources, stain transfer, figures of pixels.
"""

import argparse
import resource
import time
from collections.abc import Sequence

import numpy as np
import torch

from cellflux_bridge.base.statistics import NUM_RESAMPLES, Estimate, estimate_mean
from cellflux_bridge.classifier import inference
from cellflux_bridge.classifier.model import PatchClassifier
from cellflux_bridge.metrics.fidelity import frechet_distance, kid, kid_floor, manifold_floors, neighbourhoods
from cellflux_bridge.metrics.memorisation import nearest
from cellflux_bridge.metrics.networks import FORWARD
from cellflux_bridge.metrics.reference_set import NUM_SUBSAMPLES


def main(argv: Sequence[str]) -> None:
    """Half of the images stand for frames, half for real patches."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in (("images", 10_000), ("size", 64), ("threads", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    model, rng, parts = PatchClassifier(2).eval(), np.random.default_rng(0), []
    began = start = time.perf_counter()
    for _ in range(0, args.images, FORWARD):
        batch = torch.from_numpy(rng.integers(0, 256, (FORWARD, 3, args.size, args.size), dtype=np.uint8))
        parts.append(inference.features(model, batch, device=torch.device("cpu")))
    frames, real = np.array_split(np.concatenate(parts)[: args.images], 2)
    groups = np.arange(len(real))

    def mean(each: np.ndarray) -> Estimate:
        return estimate_mean(each, np.arange(len(each)), num=NUM_RESAMPLES, generator=rng)

    for name, work in (
        ("features", lambda: None),
        ("KID with its interval", lambda: kid(frames, real, num_subsamples=NUM_SUBSAMPLES, generator=rng)),
        ("KID's floor", lambda: kid_floor(real, groups, generator=rng)),
        ("Frechet distance", lambda: frechet_distance(frames, real)),
        ("precision, recall, density, coverage", lambda: [*map(mean, neighbourhoods(frames, real))]),
        ("their floors", lambda: manifold_floors(real, groups, generator=rng)),
        ("nearest training image", lambda: nearest(frames, real)),
    ):
        work()
        print(f"{time.perf_counter() - start:8.1f} s  {name}", flush=True)
        start = time.perf_counter()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    total = time.perf_counter() - began
    print(f"{total:8.1f} s  all of {args.images} images of {args.size} px, peak {peak:.2f} GiB", flush=True)
