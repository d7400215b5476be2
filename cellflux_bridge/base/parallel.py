"""Work over many images by threads and processes, in order."""

import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from itertools import islice
from threading import Thread
from typing import Any

from cellflux_bridge.base.progress import progress

_SLAB = 8192


def threaded(work: Callable[[Any], Any], items: Sequence, *, workers: int = 0, desc: str) -> list:
    """`work` of every item, in order, by `workers` threads (0: one a core), under a bar.

    Items are handed over in slabs, because the pool holds an object for every call that it was given.
    """
    with ThreadPoolExecutor(workers or os.cpu_count() or 1) as pool:
        slabs = (items[start : start + _SLAB] for start in range(0, len(items), _SLAB))
        results = (result for slab in slabs for result in pool.map(work, slab))
        return list(progress(results, total=len(items), desc=desc, unit="image"))


def prefetch(work: Callable[[Any], Any], items: Iterable, *, num: int) -> Iterator:
    """`work` of every item, in order, by `num` threads that make as many beforehand and stop when this is closed."""
    pool, under_way = ThreadPoolExecutor(num), deque[Future]()
    try:
        for item in items:
            under_way.append(pool.submit(work, item))
            if len(under_way) > num:
                yield under_way.popleft().result()
        while under_way:
            yield under_way.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _begin_worker() -> None:
    import torch

    def end_with_parent() -> None:
        multiprocessing.parent_process().join()  # returns, too, where it was killed
        os._exit(1)

    Thread(target=end_with_parent, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)


def in_processes(
    work: Callable[[Any], Any],
    items: Iterable,
    *,
    workers: int = 0,
    slab: int = _SLAB,
    chunk: int | None = None,
    spawn: bool = False,
) -> Iterator:
    """`work` of every item, in order, by `workers` processes (0: one a core; with 1 it happens in this one).

    `items` may be a generator: at most `slab` of them are held at a time, and a process gets `chunk` at once. Workers
    leave Ctrl-C to this process, which then takes back what they have not begun, and run torch with one thread each.
    With `spawn` they are new ones instead of copies of this one, as a GPU, or a training, asks for.
    """
    workers = workers or os.cpu_count() or 1
    if workers == 1:
        yield from map(work, items)
        return
    items = iter(items)
    context = multiprocessing.get_context("spawn") if spawn else None
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_begin_worker)
    with pool:
        try:
            while part := list(islice(items, slab)):
                yield from pool.map(work, part, chunksize=chunk or max(1, min(16, len(part) // (4 * workers))))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
