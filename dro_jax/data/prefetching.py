"""Reading ahead in a thread, so that the next batch is there when a step asks for it."""

import collections
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


def prefetched(source: Iterator[T], size: int = 2) -> Iterator[T]:
    """Returns the items of an iterator, made in a thread of their own before they are asked for.

    The thread starts when the first item is asked for, and is at most `size` items ahead of the last one
    given. It ends with `source`, or when the iterator returned is closed or garbage: that waits for the item
    that is being made, and for no other.

    Args:
        source: used by that thread alone from now on.
        size: the most items made ahead.

    Yields:
        The items, in order.

    Raises:
        Exception: what `source` raises, after the items before it.
    """
    executor = ThreadPoolExecutor(1, "prefetched")
    try:
        ahead = collections.deque(executor.submit(next, source) for _ in range(size))
        while True:
            try:
                item = ahead.popleft().result()
            except StopIteration:
                return
            ahead.append(executor.submit(next, source))
            yield item
    finally:
        executor.shutdown(cancel_futures=True)
