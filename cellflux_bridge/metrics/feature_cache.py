"""Outputs of networks for images, kept in files, so that a stopped evaluation continues where it was."""

import hashlib
import os
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

_FORMAT = 1  # goes up whenever another answer would be given


class FeatureCache:
    """A folder of .npz files, one a batch of images and network; None keeps nothing.

    The name of a file is the digest of the network's weights, the question and the pixels. So nothing stale is ever
    found, and the same images have one answer, whatever their file names are. The folder may be removed at any time.
    """

    def __init__(self, folder: Path | None = None):
        self._folder = folder

    def remember(
        self, network: str, question: str, images: np.ndarray, answer: Callable[[], dict[str, np.ndarray]]
    ) -> dict[str, np.ndarray]:
        """The arrays of `answer()`, from the cache where they are in it; `network` is a digest of its weights."""
        if self._folder is None:
            return answer()
        key = hashlib.blake2b(f"{_FORMAT} {network} {question} {images.dtype} {images.shape}".encode(), digest_size=20)
        key.update(np.ascontiguousarray(images).data)
        path = self._folder / f"{key.hexdigest()}.npz"
        try:
            with np.load(path, allow_pickle=False) as file:
                return dict(file)
        except FileNotFoundError:
            self._folder.mkdir(parents=True, exist_ok=True)
        except (OSError, ValueError, EOFError, zipfile.BadZipFile):
            pass  # damaged: it is made anew
        found = answer()
        building = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        with open(building, "wb") as file:
            np.savez(file, **found)
        os.replace(building, path)
        return found
