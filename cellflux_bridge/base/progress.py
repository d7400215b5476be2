"""Work over many images, under bars that stay readable in a terminal and in a log file alike."""

import sys
from collections.abc import Iterable

from tqdm import tqdm


def progress(iterable: Iterable | None = None, **options) -> tqdm:
    """A tqdm bar; where the error stream is no terminal it prints a line every ten seconds at most."""
    return tqdm(iterable, mininterval=0.2 if sys.stderr.isatty() else 10.0, **options)
