"""Reading ahead: the same items in the same order, never further ahead than said, and no thread left behind."""

import itertools
import subprocess
import sys
import threading
import time

import pytest

from dro_jax.data.prefetching import prefetched
from dro_jax.errors import UsageError


class Source:
    """Counts up, and says how far it got and how it ended."""

    def __init__(self, items=None, pause=0.0, error=None):
        self.made, self.closed, self.threads = 0, False, set()
        self._items, self._pause, self._error = items, pause, error

    def __iter__(self):
        try:
            for number in itertools.count() if self._items is None else range(self._items):
                time.sleep(self._pause)
                self.threads.add(threading.current_thread())
                self.made += 1
                yield number
            if self._error is not None:
                raise self._error
        finally:
            self.closed = True


def threads():
    return [t for t in threading.enumerate() if t.name.startswith("prefetched")]


def wait_for(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.fixture(autouse=True)
def no_thread_is_left():
    yield
    assert threads() == []


@pytest.mark.parametrize("size", [1, 2, 5])
@pytest.mark.parametrize("slow", ["producer", "consumer", "neither"])
def test_items_are_the_same_in_the_same_order(size, slow):
    source = Source(20, pause=0.005 * (slow == "producer"))
    got = []
    for item in prefetched(iter(source), size):
        got.append(item)
        time.sleep(0.005 * (slow == "consumer"))
    assert got == list(range(20))
    assert source.threads.isdisjoint({threading.main_thread()})
    assert len(source.threads) == 1


def test_fewer_items_than_are_made_ahead():
    assert list(prefetched(iter([7]))) == [7]
    assert list(prefetched(iter([]))) == []


def test_nothing_is_made_before_it_is_asked_for():
    source = Source()
    items = prefetched(iter(source))
    time.sleep(0.05)
    assert source.made == 0
    items.close()


@pytest.mark.parametrize("size", [1, 2, 3])
def test_it_reads_ahead_and_no_further_than_said(size):
    source = Source()
    items = prefetched(iter(source), size)
    for taken in range(1, 4):
        next(items)
        wait_for(lambda taken=taken: source.made == taken + size)
        time.sleep(0.05)
        assert source.made == taken + size
    items.close()


def test_an_error_comes_at_its_place_and_ends_it():
    source = Source(3, error=UsageError("feedback.jsonl, line 4: no reward"))
    items = prefetched(iter(source))
    assert [next(items) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(UsageError, match=r"feedback\.jsonl, line 4: no reward"):
        next(items)
    with pytest.raises(StopIteration):
        next(items)
    assert threads() == []


def test_closing_waits_for_the_item_being_made_and_for_no_other():
    begun, go_on = threading.Event(), threading.Event()
    made = []

    def source():
        for number in itertools.count():
            if number == 1:
                begun.set()
                go_on.wait()
            made.append(number)
            yield number

    items = prefetched(source())
    assert next(items) == 0
    begun.wait()
    threading.Timer(0.1, go_on.set).start()
    items.close()
    assert made == [0, 1]
    assert threads() == []


def test_garbage_ends_the_thread_and_the_source():
    source = Source()
    items = prefetched(iter(source))
    next(items)
    assert len(threads()) == 1
    del items
    assert threads() == []
    assert source.closed


def test_an_interrupted_consumer_ends_the_thread():
    def consume():
        for item in prefetched(iter(Source())):
            if item == 3:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        consume()
    assert threads() == []


def test_the_process_ends_with_one_still_open():
    code = (
        "import itertools; from dro_jax.data.prefetching import prefetched\n"
        "items = prefetched(itertools.count()); print(next(items))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert (done.stdout, done.stderr) == ("0\n", "")
