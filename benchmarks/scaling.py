"""What a DRO-V step costs as batch, length, depth and devices grow: time, seconds to compile, memory.

    python benchmarks/scaling.py --output scaling.json
    python benchmarks/scaling.py --model xl --batch 32 --lengths 512/512 --grow    # a GPU: one size, its memory by part

Around one size, batch, lengths and depth are halved and doubled one at a time; where there are several devices, as many
rows each are run on 2, 4, … of them, with weights and rows cut over them. Every size is compiled and run in a process
of its own, with the reference in the step and rows that are full.

Memory is that of the first device. State is what its arrays take. Temporaries are what the compiler says that the step
needs beside its arguments. Peak memory is the most that the device has had in use, on CPU the process with the
compiler's work in it. Beside them stands what `dro_jax plan` reckons with (`dro_jax.training.cost`).
"""

import argparse
import dataclasses
import multiprocessing
import time
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import TypeVar

import jax
import jax.numpy as jnp
import ours
import workloads
from measure import Result, machine, peak_memory, report, result

from dro_jax.data.packing import fill_rows
from dro_jax.networks import T5Config
from dro_jax.training import loop
from dro_jax.training.cost import Workload, state_bytes, temporary_bytes

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Size:
    """A step that is measured.

    Attributes:
      config: shape of all networks.
      rows: of a batch, over all devices.
      lengths: tokens of a row.
      devices: it runs on.
    """

    config: T5Config
    rows: int
    lengths: dict[str, int]
    devices: int = 1


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a step of some size costs; memory of the first device, bytes.

    Attributes:
      seconds: of each step.
      compiling: seconds.
      state: measured, by part.
      planned_state: as `dro_jax plan` reckons with, by part.
      temporaries: as the compiler says.
      planned_temporaries: as `dro_jax plan` reckons with, by part.
      peak: measured.
      on_device: whether the peak is a device's and not the process's.
    """

    seconds: list[float]
    compiling: float
    state: dict[str, float]
    planned_state: dict[str, float]
    temporaries: float
    planned_temporaries: dict[str, float]
    peak: float
    on_device: bool


def main() -> None:
    """Measures, prints the results, and writes them where asked to."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    workloads.add_flags(parser)
    parser.add_argument("--repeats", type=int, default=5, help="steps (default: %(default)s)")
    kinds = ("batch", "lengths", "depth", "devices")
    parser.add_argument(
        "--grow", nargs="*", choices=kinds, default=kinds, help="what grows (default: everything)"
    )
    flags = parser.parse_args()
    conditions = machine(["jax", "jaxlib", "flax", "optax", "numpy"])
    config, found = apart(described, flags)
    devices = int(found["devices"])
    conditions |= found
    title = f"a step of DRO-V as it grows, around T5 {flags.model}, {flags.batch} rows of {flags.lengths}"
    as_it_is = Size(config, flags.batch, workloads.limits(flags))
    grown = sizes(as_it_is, flags.grow, devices)
    report(title, conditions, measure(grown, flags), flags.output)


def apart(function: Callable[..., T], *inputs: object) -> T:
    """Returns what a function returns in a process of its own."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        return process.submit(function, *inputs).result()


def described(flags: argparse.Namespace) -> tuple[T5Config, dict[str, str]]:
    """Returns the model, its compute type and attention those of the devices, and the conditions.

    Asked apart: a process that has seen a GPU keeps its memory from those that measure.
    """
    config = workloads.configure(flags)
    conditions = workloads.conditions(config) | {"devices": str(jax.device_count())}
    dtype = jnp.dtype(config.compute_dtype).name
    return dataclasses.replace(config, dtype=dtype, attention=conditions["attention"]), conditions


def sizes(as_it_is: Size, grow: Collection[str], devices: int) -> dict[str, Size]:
    """Returns the size itself, those of half and twice of what is to grow, and itself on several devices."""
    config = as_it_is.config

    def deep(factor: float) -> T5Config:
        encoder, decoder = (
            max(1, int(layers * factor))
            for layers in (config.num_encoder_layers, config.num_decoder_layers)
        )
        return dataclasses.replace(config, num_encoder_layers=encoder, num_decoder_layers=decoder)

    def long(factor: float) -> dict[str, int]:
        return {name: max(1, int(length * factor)) for name, length in as_it_is.lengths.items()}

    found = {"as it is": as_it_is}
    for name, factor in (("half", 0.5), ("twice", 2)):
        changes: dict[str, dict[str, object]] = {
            "batch": {"rows": max(1, int(as_it_is.rows * factor))},
            "lengths": {"lengths": long(factor)},
            "depth": {"config": deep(factor)},
        }
        for what, change in changes.items():
            if what in grow:
                found[f"{name} the {what}"] = dataclasses.replace(as_it_is, **change)  # type: ignore[arg-type]
    count = 2
    while "devices" in grow and count <= devices:
        found[f"{count} devices"] = dataclasses.replace(
            as_it_is, rows=count * as_it_is.rows, devices=count
        )
        count *= 2
    return found


def measure(sizes: dict[str, Size], flags: argparse.Namespace) -> Iterator[Result]:
    """Measures one size after the other."""
    for name, size in sizes.items():
        found = apart(cost, flags, size)
        yield result(f"{name}: a step", "ms", [1e3 * s for s in found.seconds])
        yield result(f"{name}: to compile", "s", [found.compiling])
        for part, held in found.state.items():
            yield result(f"{name}: state, {part}", "MB", [held / 1e6])
        held, planned = sum(found.state.values()), sum(found.planned_state.values())
        yield result(f"{name}: state", "MB", [held / 1e6])
        yield result(f"{name}: state / plan's", "times", [held / planned])
        for part, needed in found.planned_temporaries.items():
            yield result(f"{name}: temporaries by plan, {part}", "MB", [needed / 1e6])
        needed = sum(found.planned_temporaries.values())
        yield result(f"{name}: temporaries, says the compiler", "MB", [found.temporaries / 1e6])
        yield result(f"{name}: temporaries / plan's", "times", [found.temporaries / needed])
        yield result(f"{name}: peak memory", "MB", [found.peak / 1e6])
        if found.on_device:
            yield result(
                f"{name}: peak memory / plan's", "times", [found.peak / (planned + needed)]
            )


def cost(flags: argparse.Namespace, size: Size) -> Cost:
    """Compiles and runs a step."""
    workloads.configure(flags)
    (example,) = workloads.make_examples(1, size.lengths, size.config.vocab_size, seed=0)
    # Full rows, all the same.
    example |= {name: example[name][:1].repeat(length) for name, length in size.lengths.items()}
    batch = workloads.without_reference(
        fill_rows([[example]] * size.rows, lengths=size.lengths, max_examples=1)
    )
    trainer = ours.make_trainer(size.config, size.devices)
    parts = {
        "policy": trainer.state.policy,
        "value": trainer.state.value,
        "optimizer": trainer.state.opt_state,
        "reference": trainer.reference,
    }
    state = {
        name: sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(tree))
        for name, tree in parts.items()
    }
    begin = time.perf_counter()
    lowered = trainer.train_step.lower(
        trainer.state, trainer.reference, loop.to_devices(batch, trainer.sharding)
    )
    program = lowered.compile()
    compiling = time.perf_counter() - begin
    trainer.train_step = program
    trainer.run([batch])
    seconds = [trainer.run([batch]) for _ in range(flags.repeats)]
    # None on CPU.
    used = jax.devices()[0].memory_stats()
    work = Workload(size.config, ours.ALGORITHM.needs, size.rows, *size.lengths.values())
    return Cost(
        seconds=seconds,
        compiling=compiling,
        state=state,
        planned_state=state_bytes(trainer.layout, reference=True),
        temporaries=program.memory_analysis().temp_size_in_bytes,
        planned_temporaries=temporary_bytes(work, trainer.layout),
        peak=used["peak_bytes_in_use"] if used else 1e6 * peak_memory(),
        on_device=bool(used),
    )


if __name__ == "__main__":
    main()
