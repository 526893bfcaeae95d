"""Speed and memory of the data pipeline, and how long training waits for it.

    python benchmarks/pipeline.py --output pipeline.json

The data are made here: letters in the lengths of a real feedback file (lengths.json) divided by four, so that they
are as many bytes as SentencePiece makes tokens of the real texts. The reference's log-probabilities in the cache are
made up as well. Neither costs less to read for that.

- Alone: examples a second over an epoch, from opening the pipeline to its last whole batch; rows as in
  runs/train.gin, packed or one example a row, from the cache or from the file.
- Training: the loop and the step of runs/dro_v_tiny.gin, packed, from the cache: with the thread that reads ahead,
  without it, and on one batch over and over, which costs nothing to read. It waits while it is in `next(batches)`.
- Ten times the rows: seconds and peak memory of an epoch, packed, from the cache, each in a process of its own.
"""

import argparse
import functools
import itertools
import json
import multiprocessing
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import seqio
from measure import Result, in_turns, machine, peak_memory, report, result
from workloads import BYTES_A_TOKEN, draw_bytes

from dro_jax.cli import configuration, host_memory
from dro_jax.cli import train as train_command
from dro_jax.data import batches, caching
from dro_jax.data.feedback import FeedbackFile, summarise
from dro_jax.data.tasks import feedback_task
from dro_jax.data.vocabulary import load_vocabulary
from dro_jax.training import loop, partitioning, step, train_state

LENGTHS = {"inputs": 512, "targets": 512}
BATCH_SIZE = 32
MAX_EXAMPLES = 16
TINY_MAX_EXAMPLES = 4
UNTIMED_STEPS = 1


def main() -> None:
    """Measures, prints the results, and writes them where asked to."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--rows", type=int, default=20_000, help="over 16,384 are streamed (default: %(default)s)"
    )
    parser.add_argument("--steps", type=int, default=30, help="timed (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--output", help="a JSON file for the results")
    flags = parser.parse_args()
    conditions = machine(["jax", "tensorflow", "seqio", "numpy"])
    host_memory.keep_freed_memory()
    with tempfile.TemporaryDirectory() as folder:
        few, many = Path(folder, "few"), Path(folder, "many")
        write(few, flags.rows)
        write(many, 10 * flags.rows)
        results = itertools.chain(
            alone(few, flags.repeats),
            training(few, flags.steps, flags.repeats),
            ten_times({flags.rows: few, 10 * flags.rows: many}, flags.repeats),
        )
        report(f"the data pipeline, {flags.rows:,} rows", conditions, results, flags.output)


def write(folder: Path, rows: int) -> None:
    """Makes a feedback file of so many rows, and its cache."""
    rng = np.random.default_rng(0)
    sizes = np.maximum(1, draw_bytes(rows, rng) // BYTES_A_TOKEN)
    letters = "".join(rng.choice(list("abcdefghijklmnopqrstuvwxyz"), 2**20))
    starts = rng.integers(0, len(letters) - sizes.max(), (rows, 2))
    folder.mkdir()
    with feedback_file(folder).open("w") as file:
        for start, stop, reward in zip(starts, starts + sizes, rng.normal(size=rows), strict=True):
            prompt, completion = (letters[i:j] for i, j in zip(start, stop, strict=True))
            row = {"prompt": prompt, "completion": completion, "reward": reward}
            file.write(json.dumps(row) + "\n")
    caching.write(
        folder,
        open_task(folder, cached=False),
        facts={},
        counts={},
        score=lambda examples: {"reference_log_probs": np.zeros(len(examples), np.float32)},
        scored=["reference_log_probs"],
    )


def feedback_file(folder: Path) -> Path:
    """Returns where `write` puts the rows; the cache is in the folder itself."""
    return folder / "feedback.jsonl"


def open_task(folder: Path, *, cached: bool) -> seqio.Task:
    """Returns the task of what `write` made, as `dro_jax train` has it."""
    file = FeedbackFile(str(feedback_file(folder)), validation_fraction=0.0)
    summary = summarise(file)
    seqio.set_global_cache_dirs([str(folder)] if cached else [])
    return feedback_task(
        file,
        vocabulary=load_vocabulary(None),
        statistics=summary.rewards,
        num_input_examples=summary.num_input_examples,
    )


def epoch(folder: Path, *, cached: bool, max_examples: int) -> tuple[float, int]:
    """Returns the seconds that an epoch takes from its opening to its last whole batch, and its examples."""
    task = open_task(folder, cached=cached)
    rows = task.num_input_examples("train")
    begin, shown = time.perf_counter(), 0
    opened = batches.train_batches(
        task, lengths=LENGTHS, batch_size=BATCH_SIZE, seed=0, max_examples=max_examples
    )
    for batch, _ in opened:
        shown += int(batch["reward_weights"].sum())
        # The batch after it might begin the next epoch.
        if shown > rows - BATCH_SIZE * max_examples:
            break
    # Closing, when `opened` is garbage, waits for the batch that is being made.
    return time.perf_counter() - begin, shown


def alone(folder: Path, repeats: int) -> Iterator[Result]:
    """Measures the pipeline with nobody behind it."""
    cases = {
        f"{rows}, from the {source}": functools.partial(
            epoch, folder, cached=source == "cache", max_examples=max_examples
        )
        for rows, max_examples in (("packed", MAX_EXAMPLES), ("one example a row", 1))
        for source in ("cache", "file")
    }
    in_turns(cases, 1)
    for name, taken in in_turns(cases, repeats).items():
        speeds = [shown / seconds for seconds, shown in taken]
        yield result(f"alone: {name}", "examples/s", speeds)


def training(folder: Path, steps: int, repeats: int) -> Iterator[Result]:
    """Measures the time of a step, and how much of it the training loop waits for data."""
    configuration.load(
        ["runs/dro_v_tiny.gin"],
        [
            f"FEEDBACK_FILE = '{feedback_file(folder)}'",
            f"MODEL_DIR = '{folder}'",
            f"MAX_EXAMPLES = {TINY_MAX_EXAMPLES}",
        ],
    )
    bound = configuration.arguments(train_command.train)
    model, algorithm, optimizer = bound["model"], bound["algorithm"], bound["optimizer"]
    mesh, transforms = bound["rules"].mesh(), optimizer.transforms()
    layout = train_state.make_layout(
        model, transforms, has_value=True, mesh=mesh, rules=bound["rules"]
    )
    reference = train_state.init_reference(model, 0, layout)
    state = train_state.init_state(model, transforms, reference, 0, layout)
    train_step = step.make_train_step(model, algorithm, transforms, optimizer.schedules(), layout)
    task = open_task(folder, cached=True)

    def read() -> Iterator[Any]:
        return batches.train_batches(
            task,
            lengths=bound["lengths"],
            batch_size=bound["batch_size"],
            seed=0,
            max_examples=TINY_MAX_EXAMPLES,
        )

    def read_in_step() -> Iterator[Any]:
        with mock.patch.object(batches, "prefetched", iter):
            return read()

    one = next(read())

    def train(open_batches: Any) -> tuple[float, float]:
        """Returns the milliseconds of a step and the percentage of them that it waited."""
        nonlocal state
        waits: list[tuple[float, float]] = []
        opened = open_batches()

        def timed() -> Iterator[Any]:
            while True:
                asked = time.perf_counter()
                batch = next(opened)
                waits.append((asked, time.perf_counter()))
                yield batch

        state = loop.train(
            state,
            None,
            train_step=train_step,
            batches=timed(),
            batch_sharding=partitioning.batch_sharding(mesh),
            num_steps=int(state.step) + UNTIMED_STEPS + steps,
            periods=loop.Periods(bound["periods"].log, 10**9, 10**9),
            log=lambda done, metrics: None,
            evaluate=lambda done, state: None,
            save=lambda state, position: None,
            stop=loop.StopRequest(),
            progress=lambda done: None,
        )
        seconds = time.perf_counter() - waits[UNTIMED_STEPS][0]
        waited = sum(got - asked for asked, got in waits[UNTIMED_STEPS:])
        return 1e3 * seconds / steps, 100 * waited / seconds

    cases = {
        "reading ahead": functools.partial(train, read),
        "reading in the loop": functools.partial(train, read_in_step),
        "one batch over and over": functools.partial(train, lambda: itertools.repeat(one)),
    }
    for name, taken in in_turns(cases, repeats).items():
        milliseconds, waited = zip(*taken, strict=True)
        yield result(f"training: {name}", "ms/step", milliseconds)
        yield result(f"training: {name}, waiting", "% of the time", waited)


def ten_times(folders: dict[int, Path], repeats: int) -> Iterator[Result]:
    """Measures an epoch of few rows and of many."""

    def measure(folder: Path) -> tuple[float, float, float]:
        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(1, mp_context=spawn) as process:
            return process.submit(cost, folder).result()

    cases = {f"{rows:,} rows": functools.partial(measure, at) for rows, at in folders.items()}
    for name, taken in in_turns(cases, repeats).items():
        seconds, before, peak = zip(*taken, strict=True)
        yield result(f"an epoch of {name}", "s", seconds)
        yield result(f"an epoch of {name}: memory before it", "MB", before)
        yield result(f"an epoch of {name}: peak memory", "MB", peak)


def cost(folder: Path) -> tuple[float, float, float]:
    """Returns the seconds of an epoch, and this process's peak memory before and after it in MB."""
    host_memory.keep_freed_memory()
    before = peak_memory()
    seconds, _ = epoch(folder, cached=True, max_examples=MAX_EXAMPLES)
    return seconds, before, peak_memory()


if __name__ == "__main__":
    main()
