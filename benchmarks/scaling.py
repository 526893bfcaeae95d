"""What a DRO-V step costs as batch, length and depth grow: time, seconds to compile, peak memory.

    python benchmarks/scaling.py --output scaling.json

Around one size, batch, lengths and depth are halved and doubled one at a time. Every size is compiled and run in a
process of its own, with the reference in the step and rows that are full. Peak memory is what the device has had in
use, on CPU what the process has had beyond what it had before the first array; beside it stands what the compiler says
that the step needs beside its arguments.
"""

import argparse
import dataclasses
import multiprocessing
import time
from collections.abc import Collection, Iterator
from concurrent.futures import ProcessPoolExecutor

import jax
import ours
import workloads
from measure import Result, machine, peak_memory, report, result

from dro_jax.data.packing import fill_rows
from dro_jax.networks import T5Config
from dro_jax.training import loop

Sizes = dict[str, tuple[T5Config, int, dict[str, int]]]


def main() -> None:
    """Measures, prints the results, and writes them where asked to."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    workloads.add_flags(parser)
    parser.add_argument("--repeats", type=int, default=5, help="steps (default: %(default)s)")
    parser.add_argument(
        "--grow",
        nargs="*",
        choices=("batch", "lengths", "depth"),
        default=("batch", "lengths", "depth"),
        help="what is halved and doubled (default: everything)",
    )
    flags = parser.parse_args()
    config, lengths = workloads.configure(flags), workloads.limits(flags)
    conditions = machine(["jax", "flax", "optax", "numpy"])
    title = f"a step of DRO-V as it grows, around T5 {flags.model}, {flags.batch} rows of {flags.lengths}"
    found = measure(sizes(config, flags.batch, lengths, flags.grow), flags)
    report(title, conditions, found, flags.output)


def sizes(config: T5Config, batch: int, lengths: dict[str, int], grow: Collection[str]) -> Sizes:
    """Returns the size itself, and those of half and twice of what is to grow."""

    def deep(factor: float) -> T5Config:
        encoder, decoder = (
            max(1, int(layers * factor))
            for layers in (config.num_encoder_layers, config.num_decoder_layers)
        )
        return dataclasses.replace(config, num_encoder_layers=encoder, num_decoder_layers=decoder)

    def long(factor: float) -> dict[str, int]:
        return {name: max(1, int(length * factor)) for name, length in lengths.items()}

    found: Sizes = {"as it is": (config, batch, lengths)}
    for name, factor in (("half", 0.5), ("twice", 2)):
        if "batch" in grow:
            found[f"{name} the batch"] = config, max(1, int(batch * factor)), lengths
        if "lengths" in grow:
            found[f"{name} the lengths"] = config, batch, long(factor)
        if "depth" in grow:
            found[f"{name} the depth"] = deep(factor), batch, lengths
    return found


def measure(sizes: Sizes, flags: argparse.Namespace) -> Iterator[Result]:
    """Measures one size after the other."""
    for name, size in sizes.items():
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
            seconds, compiling, temporaries, peak = process.submit(cost, flags, *size).result()
        yield result(f"{name}: a step", "ms", [1e3 * s for s in seconds])
        yield result(f"{name}: to compile", "s", [compiling])
        yield result(f"{name}: temporaries, says the compiler", "MB", [temporaries])
        yield result(f"{name}: peak memory", "MB", [peak])


def cost(
    flags: argparse.Namespace, config: T5Config, rows: int, lengths: dict[str, int]
) -> tuple[list[float], float, float, float]:
    """Returns the seconds of some steps, those of compiling, and temporaries and peak memory in MB."""
    workloads.configure(flags)
    device = jax.devices()[0]
    before = peak_memory()
    (example,) = workloads.make_examples(1, lengths, config.vocab_size, seed=0)
    # Full rows, all the same.
    example |= {name: example[name][:1].repeat(length) for name, length in lengths.items()}
    batch = workloads.without_reference(
        fill_rows([[example]] * rows, lengths=lengths, max_examples=1)
    )
    trainer = ours.make_trainer(config)
    begin = time.perf_counter()
    lowered = trainer.train_step.lower(
        trainer.state, trainer.reference, loop.to_devices(batch, trainer.sharding)
    )
    program = lowered.compile()
    compiling = time.perf_counter() - begin
    temporaries = program.memory_analysis().temp_size_in_bytes / 1e6
    trainer.train_step = program
    trainer.run([batch])
    seconds = [trainer.run([batch]) for _ in range(flags.repeats)]
    # None on CPU.
    used = device.memory_stats()
    peak = used["peak_bytes_in_use"] / 1e6 if used else peak_memory() - before
    return seconds, compiling, temporaries, peak


if __name__ == "__main__":
    main()
