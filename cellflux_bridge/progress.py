"""Work over many images, under bars that stay readable in a terminal and in a log file alike."""

import os
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from tqdm import tqdm

_SLAB = 8192


def progress(iterable: Iterable | None = None, **options) -> tqdm:
    """A tqdm bar; where the error stream is no terminal it prints a line every ten seconds at most."""
    return tqdm(iterable, mininterval=0.2 if sys.stderr.isatty() else 10.0, **options)


def threaded(work: Callable[[Any], Any], items: Sequence, *, workers: int = 0, desc: str) -> list:
    """`work` of every item, in order, by `workers` threads (0: one a core), under a bar.

    Items are handed over in slabs, because the pool holds an object for every call that it was given.
    """
    with ThreadPoolExecutor(workers or os.cpu_count() or 1) as pool:
        slabs = (items[start : start + _SLAB] for start in range(0, len(items), _SLAB))
        results = (result for slab in slabs for result in pool.map(work, slab))
        return list(progress(results, total=len(items), desc=desc, unit="image"))
