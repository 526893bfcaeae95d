"""What benchmarks share: repeats taken in turns, their spread, the machine, and the report."""

import dataclasses
import datetime
import importlib.metadata
import json
import os
import platform
import re
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import dro_jax

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Result:
    """A line of the table: the median of some repeats, the least and the most of them."""

    name: str
    unit: str
    median: float
    least: float
    most: float
    repeats: int


def result(name: str, unit: str, values: Sequence[float]) -> Result:
    """Returns the line for the values of some repeats."""
    return Result(
        name, unit, statistics.median(values), min(values), max(values), repeats=len(values)
    )


def in_turns(measurements: Mapping[str, Callable[[], T]], repeats: int) -> dict[str, list[T]]:
    """Takes every measurement `repeats` times, in turns: what else the machine does falls on all of them.

    Every other turn is in reverse, as the machine may grow slower or faster within one.
    """
    taken: dict[str, list[T]] = {name: [] for name in measurements}
    order = list(measurements)
    for _ in range(repeats):
        for name in order:
            taken[name].append(measurements[name]())
        order.reverse()
    return taken


def peak_memory() -> float:
    """Returns the most memory that this process has had, in MB (10^6 bytes). Linux only."""
    # getrusage counts what the parent had before it became this program.
    (kilobytes,) = re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(kilobytes) * 1024 / 1e6


def machine(packages: Sequence[str]) -> dict[str, str]:
    """Returns what the numbers depend on: processor, what else it had to do, versions, date."""
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    versions = {name: importlib.metadata.version(name) for name in packages}
    return {
        "processor": cpu[1].strip() if cpu else platform.machine(),
        "cores": str(len(os.sched_getaffinity(0))),
        "load before": f"{os.getloadavg()[0]:.2f}",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "dro_jax": dro_jax.__version__,
        "Python": platform.python_version(),
        **versions,
    }


def report(
    title: str, conditions: Mapping[str, str], results: Iterable[Result], output: str | None
) -> None:
    """Prints results as they come, and writes all of them to a JSON file if there is one."""
    print(title, *(f"{name} {value}" for name, value in conditions.items()), sep=", ")
    print(f"{'':56} {'median':>10} {'least':>10} {'most':>10}")
    lines = []
    for line in results:
        numbers = (f"{x:>10.4g}" for x in (line.median, line.least, line.most))
        print(f"{line.name:56}", *numbers, line.unit, flush=True)
        lines.append(dataclasses.asdict(line))
    if output is not None:
        fields = {"title": title, "conditions": dict(conditions), "results": lines}
        Path(output).write_text(json.dumps(fields, indent=2) + "\n")
