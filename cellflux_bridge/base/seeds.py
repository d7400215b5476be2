"""Seeds for every random draw, derived from one seed and the draw's purpose.

A draw depends on what it is for (a stream name and counters: step, rank, source id), never on what was drawn before.
So a resumed run and another number of workers repeat the same draws, translation does so in batches of any size and on
any number of processes, and no generator state needs to be saved. (A training batch is one draw: of another size, or
divided among other processes, it is another.)
"""

import hashlib

import numpy as np
import torch


def derive_seed(seed: int, *purpose: str | int) -> int:
    """A 63-bit seed for a purpose, such as `derive_seed(0, "batch", step, rank)`."""
    text = "\x1f".join([str(seed), *map(str, purpose)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def torch_generator(seed: int, *purpose: str | int) -> torch.Generator:
    """A CPU generator for a purpose."""
    return torch.Generator().manual_seed(derive_seed(seed, *purpose))


def numpy_generator(seed: int, *purpose: str | int) -> np.random.Generator:
    return np.random.default_rng(derive_seed(seed, *purpose))
