"""Several processes that train together: how they start, agree on what a person got wrong, and never hang."""

import contextlib
import json
import os
import sys
import threading
from collections.abc import Callable, Iterator
from typing import TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from dro_jax.errors import UsageError

T = TypeVar("T")

EXIT_STALLED = (
    70  # EX_SOFTWARE: nothing moved any more; the same command goes on from the last checkpoint.
)
_SHUTDOWN_SECONDS = 30


def start(
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
) -> None:
    """Joins the other processes of the run. Without arguments Cloud TPU, Slurm, Open MPI or Kubernetes tell how.

    Args:
      coordinator_address: host:port of process 0, the same for all.
      num_processes: how many there are.
      process_id: which of them this one is.

    Raises:
      UsageError: the cluster does not say who takes part, or the others do not come.
    """
    try:
        jax.distributed.initialize(
            coordinator_address,
            num_processes,
            process_id,
            # On a Cloud TPU, Slurm and the like nothing has to be said.
            cluster_detection_method=None if coordinator_address is None else "deactivate",
            shutdown_timeout_seconds=_SHUTDOWN_SECONDS,
        )
    except (ValueError, TypeError, RuntimeError) as error:
        raise UsageError(
            f"--multihost: cannot join the other processes ({' '.join(str(error).split())[:200]}); give "
            "--coordinator_address, --num_processes and --process_id"
        ) from error


def is_first() -> bool:
    """Whether this is the process that writes what is written once."""
    return jax.process_index() == 0


def agree(check: Callable[[], T]) -> T:
    """Runs what may raise UsageError in one process, and raises it in all of them if it does.

    Args:
      check: what every process does for itself; it must not wait for the others.

    Returns:
      What `check` returned here.

    Raises:
      UsageError: the one that the first process with a mistake raised.
    """
    result, mistake = None, ""
    try:
        result = check()
    except UsageError as error:
        mistake = str(error).splitlines()[0]
    first = next(filter(None, _gather(mistake)), None)
    if first is not None:
        raise UsageError(first)
    return result  # type: ignore[return-value]


def of_first(work: Callable[[], str]) -> str:
    """What `work`, which process 0 alone runs, returns there, in every process; or the UsageError that it raises."""
    said, mistake = "", ""
    if is_first():
        try:
            said = work()
        except UsageError as error:
            mistake = str(error).splitlines()[0]
    said, mistake = json.loads(_gather(json.dumps([said, mistake]))[0])
    if mistake:
        raise UsageError(mistake)
    return said


def refuse_differences(what: str, text: str) -> None:
    """Raises UsageError in every process unless all of them have the same text, naming the first line that differs."""
    texts = _gather(text)
    for number, other in enumerate(texts):
        if other != texts[0]:
            lines = [sorted(set(t.splitlines())) for t in (texts[0], other)]
            only = [next((x for x in a if x not in b), "less") for a, b in (lines, lines[::-1])]
            raise UsageError(
                f"process {number} was started with another {what} than process 0 ({only[1].strip()[:150]} there, "
                f"{only[0].strip()[:150]} here): give all of them the same"
            )


def wait_for_all(what: str) -> None:
    """Returns when every process has come here; `what` is a name of its own for the place."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)


@contextlib.contextmanager
def ended_when_stalled(seconds: float) -> Iterator[Callable[[], None]]:
    """Ends the process, with one line, when nothing has happened for too long while the context lasts.

    A collective operation waits for ever for a process that hangs, and nothing in this one can interrupt it.

    Args:
      seconds: the longest time between two signs of life; the first may take four times as long, as the compiler's
        time is in it.

    Yields:
      A function to call as a sign of life.
    """
    alive, over = threading.Event(), threading.Event()

    def watch() -> None:
        patience = 4 * seconds
        while not over.is_set():
            if alive.wait(patience):
                alive.clear()
                patience = seconds
                continue
            print(
                f"dro_jax: nothing has happened for {patience:g} seconds: ended; the same command goes on from "
                "the last checkpoint (a run that is only slow needs a larger train.stall_seconds)",
                file=sys.stderr,
                flush=True,
            )
            os._exit(EXIT_STALLED)

    thread = threading.Thread(target=watch, daemon=True, name="stall watch")
    thread.start()
    try:
        yield alive.set
    finally:
        over.set()
        alive.set()
        thread.join()


def _gather(text: str) -> list[str]:
    """The texts of all processes, in their order."""
    if jax.process_count() == 1:
        return [text]
    encoded = np.frombuffer(text.encode(), np.uint8)
    sizes = np.ravel(multihost_utils.process_allgather(np.array([len(encoded)], np.int32)))
    padded = np.zeros(max(1, sizes.max()), np.uint8)
    padded[: len(encoded)] = encoded
    rows = np.reshape(multihost_utils.process_allgather(padded), (len(sizes), -1))
    return [bytes(row[:size]).decode() for row, size in zip(rows, sizes, strict=True)]
