"""Working ahead: the next things are made by threads while the current one is used."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")

AHEAD = 2
"""How many things each thread may be ahead."""


def ahead(make: Callable[[int], T], numbers: Iterable[int], workers: int) -> Generator[T]:
    """make(n) of each number, in this order however many threads work at it; 0: none does.

    What `make` raises is raised here, in its turn. Close it if it is left before its end.
    """
    if workers == 0:
        yield from map(make, numbers)
        return
    pool, begun = ThreadPoolExecutor(workers, "batches"), deque[Future[T]]()
    try:
        for number in numbers:
            begun.append(pool.submit(make, number))
            if len(begun) > AHEAD * workers:
                yield begun.popleft().result()
        while begun:
            yield begun.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
