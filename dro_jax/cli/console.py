"""What the person at the terminal sees: log lines and progress bars."""

import logging
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

console = Console(highlight=False, soft_wrap=True, markup=False)
error_console = Console(highlight=False, soft_wrap=True, markup=False, stderr=True)


class _ConsoleHandler(logging.Handler):
    """Prints records through a console, so that a progress bar on it stays below them."""

    def __init__(self, to: Console) -> None:
        super().__init__()
        self._console = to

    def emit(self, record: logging.LogRecord) -> None:
        prefix = "" if record.levelno <= logging.INFO else f"{record.levelname.lower()}: "
        self._console.print(prefix + self.format(record))


def configure_logging(*, to: Console = console) -> None:
    """Sends warnings of all libraries to a console, and messages of ours."""
    logging.basicConfig(
        level=logging.WARNING, handlers=[_ConsoleHandler(to)], format="%(message)s", force=True
    )
    logging.getLogger("dro_jax").setLevel(logging.INFO)
    # What Orbax logs as an error it raises as well.
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    # Where an array of a checkpoint cannot be read, Orbax closes its event loop on the tasks that read the
    # others; the error says what is wrong, and each of those tasks would add a traceback.
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    sys.unraisablehook = _report_unraisable


def silence() -> None:
    """Leaves messages and progress to another process of the run; a mistake is still told, on stderr."""
    console.quiet = True


def _report_unraisable(unraisable: Any) -> None:
    if str(unraisable.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(unraisable)


def start_tensorflow() -> None:
    """Imports TensorFlow and leaves it the CPU, without its remarks about accelerators it is not to use."""
    sys.stderr.flush()
    stderr = os.dup(2)
    with tempfile.TemporaryFile() as remarks:
        # They are written by C++ before Python could turn them off.
        os.dup2(remarks.fileno(), 2)
        try:
            import tensorflow as tf

            tf.config.set_visible_devices([], "GPU")
        except BaseException:
            remarks.seek(0)
            os.write(stderr, remarks.read())
            raise
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)


@contextmanager
def progress_bar(description: str, total: int, done: int = 0) -> Iterator[Progress]:
    """A bar with the time left; `progress.update(progress.task_ids[0], completed=n)` moves it."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        progress.add_task(description, total=total, completed=done)
        yield progress


def format_metrics(metrics: Mapping[str, float], names: Mapping[str, str]) -> str:
    """One line of those metrics that are there, under short names."""
    return "  ".join(f"{short} {metrics[n]:.4g}" for n, short in names.items() if n in metrics)
