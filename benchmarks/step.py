"""Speed of a DRO-V step, ours beside PyTorch with transformers' T5.

    pip install -e '.[bench]'
    python benchmarks/step.py --output step.json                                   # two CPU cores
    python benchmarks/step.py --model large --batch 32 --lengths 512/512 --steps 5 --repeats 3    # a GPU

A step trains on the same examples on every side, of real lengths (see workloads.py), and the sides take turns, so that
what else the machine does falls on all. A turn is some whole steps, from NumPy batches to updated weights, and ends
when the device has done them; programs are compiled before. theirs.py says what the other side is.

- ours, like for like: one example a row, the reference in the step, rows as long as the batch's longest, rounded up
  so that there are few programs to compile, which on a GPU take minutes each: to a multiple of 32 tokens on CPU and of
  256 elsewhere.
- ours, to the maximum: the same, but all rows as long as `--lengths`, as `dro_jax train` without packing has them.
- ours, cached reference: to the maximum, but the batches carry the reference's log-probabilities.
- ours, packed and cached: as `dro_jax train` with both, in as many rows of `--lengths` as the step's examples need, on
  a GPU rounded up to a multiple of 4. Training packs more examples than a step's at once, so its rows are fuller.
- PyTorch, to the longest and to the maximum: one example a row, padded to the longest of its batch or to `--lengths`.
- PyTorch, cached reference: to the longest, without a pass of the reference.
- PyTorch, logits of targets: to the longest, choosing the positions that have a target before the vocabulary, as ours
  does where `logits_chunk` is set; and the same with a cached reference. Never compiled.

All of ours are compared with PyTorch's that pads to the longest, runs the reference and leaves transformers its logits
(the faster of eager and compiled); some of ours with the others, as `BASES` has it. The process keeps its freed memory,
as `dro_jax` does on CPU: that is worth as much to PyTorch. Where the other library comes next it is given back, and a
step is made that is not timed. Of a GPU's memory ours may take half (XLA_PYTHON_CLIENT_MEM_FRACTION) and PyTorch the
rest but for 5%; where its activations do not fit, it works through a batch in parts, and a line of the results says in
how many. With `--sides ours` and `--sides theirs` each has the GPU for itself. Turns are printed as they are taken, to
standard error; with JAX_COMPILATION_CACHE_DIR set a second call finds the programs of the first.

Ours needs neither TensorFlow nor SeqIO; `--sides ours` needs no PyTorch either. The machine should have nothing else to
do: PyTorch's threads suffer more from others than ours (NOTES.md).
"""

import argparse
import dataclasses
import functools
import os
import statistics
import sys
from collections.abc import Iterator, Sequence
from typing import Protocol

import jax
import ours
import workloads
from measure import Result, in_turns, machine, report, result

from dro_jax.cli import host_memory
from dro_jax.data.packing import Batch
from dro_jax.networks import T5Config

OURS = (
    "ours, like for like",
    "ours, to the maximum",
    "ours, cached reference",
    "ours, packed and cached",
)
BASES = {
    "to the longest": OURS,
    "to the maximum": OURS[1:2],
    "cached reference": OURS[2:],
    "logits of targets": (OURS[0], OURS[3]),
    "cached reference and logits of targets": OURS[2:],
}
"""By what PyTorch's do, which of ours are compared with the fastest of them."""


class Trainer(Protocol):
    """What takes steps: `ours.Trainer` or `theirs.Trainer`."""

    def run(self, batches: Sequence[Batch]) -> float:
        """Takes a step on each of these batches and returns the seconds that all of them took."""


Sides = dict[str, tuple[Trainer, Iterator[Batch]]]


def main() -> None:
    """Measures, prints the results, and writes them where asked to."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    workloads.add_flags(parser)
    parser.add_argument("--steps", type=int, default=1, help="of a turn (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="turns (default: %(default)s)")
    parser.add_argument("--sides", choices=("ours", "theirs", "both"), default="both")
    parser.add_argument(
        "--compile", action="store_true", help="measure PyTorch with torch.compile too"
    )
    parser.add_argument(
        "--pytorch_attention",
        choices=("sdpa", "eager"),
        default="sdpa",
        help="default: %(default)s",
    )
    flags = parser.parse_args()
    packages = ["jax", "jaxlib", "flax", "optax", "numpy"]
    if flags.sides != "ours":
        packages += ["torch", "transformers"]
    conditions = machine(packages)
    if flags.sides == "theirs":
        # Only batches are made by JAX.
        jax.config.update("jax_platforms", "cpu")
    share = 0.5 if flags.sides == "both" else 0.95
    config, cut = workloads.configure(flags, gpu_share=share), workloads.limits(flags)
    needed = flags.batch * flags.steps * flags.repeats
    examples = workloads.make_examples(needed, cut, config.vocab_size, seed=0)
    sides: Sides = {}
    if flags.sides != "theirs":
        conditions |= workloads.conditions(config)
        sides |= our_sides(config, examples, flags.batch, cut)
    if flags.sides != "ours":
        of_gpu = 1.0
        if flags.sides == "both":
            of_gpu = 0.95 - float(os.environ["XLA_PYTHON_CLIENT_MEM_FRACTION"])
        found, described = their_sides(config, examples, cut, flags, of_gpu=of_gpu)
        sides |= found
        conditions |= described
    title = (
        f"a step of DRO-V, T5 {flags.model}, {flags.batch} examples, cut at {flags.lengths} tokens"
    )
    report(title, conditions, measure(sides, flags.steps, flags.repeats), flags.output)


def our_sides(
    config: T5Config, examples: Sequence[workloads.Example], batch: int, cut: dict[str, int]
) -> Sides:
    """Returns what takes the steps of our variants, and their batches. They go on with one training."""
    trainer = ours.make_trainer(config)
    tokens, rows = (32, 1) if jax.default_backend() == "cpu" else (256, 4)
    longest = workloads.padded(examples, batch, cut, multiple=tokens)
    maximum = workloads.padded_to(examples, batch, cut)
    batches = (
        map(workloads.without_reference, longest),
        map(workloads.without_reference, maximum),
        workloads.padded_to(examples, batch, cut),
        workloads.packed(examples, cut, batch=batch, multiple=rows),
    )
    return {name: (trainer, some) for name, some in zip(OURS, batches, strict=True)}


def their_sides(
    config: T5Config,
    examples: Sequence[workloads.Example],
    cut: dict[str, int],
    flags: argparse.Namespace,
    *,
    of_gpu: float,
) -> tuple[Sides, dict[str, str]]:
    """Returns what takes the steps of PyTorch's variants and their batches, and the conditions.

    They go on with one training, on a GPU unless ours has none; `of_gpu` is the share of its memory that they may take.
    """
    # Ours runs where there is no PyTorch.
    import theirs
    import torch

    batch = flags.batch
    on_gpu = flags.device != "cpu" and torch.cuda.is_available()
    if flags.sides == "both":
        on_gpu = jax.default_backend() != "cpu"
    device, name = ("cuda", torch.cuda.get_device_name()) if on_gpu else ("cpu", "cpu")
    bfloat16 = on_gpu if flags.dtype == "auto" else flags.dtype == "bfloat16"
    conditions = {
        "PyTorch's": f"{name}, {'bfloat16' if bfloat16 else 'float32'}, AdamW, "
        f"attention {flags.pytorch_attention}"
    }
    if on_gpu:
        torch.cuda.set_per_process_memory_fraction(of_gpu)
    eager = theirs.make_trainer(
        config, device, bfloat16=bfloat16, attention=flags.pytorch_attention
    )
    trainers = {"PyTorch": (eager, eager)}
    if flags.compile:
        pair = (theirs.compiled(eager, dynamic=True), theirs.compiled(eager, dynamic=False))
        first = workloads.padded_to(examples[:batch], batch, cut)
        try:
            for some in map(workloads.without_reference, first):
                for trainer in pair:
                    trainer.run([some])
            trainers["PyTorch, compiled"] = pair
        # Its compiler's errors have no class of their own.
        except Exception as error:
            eager.optimizer.zero_grad()
            print("PyTorch's compiler is left out, it failed:", " ".join(str(error).split())[:300])
            conditions["PyTorch's"] += ", its compiler failed"

    def longest() -> Iterator[Batch]:
        # Tensor cores and their kernels want lengths that are multiples.
        return workloads.padded(examples, batch, cut, multiple=8 if on_gpu else 1)

    without = workloads.without_reference
    sides: Sides = {}
    for name, (any_length, one_length) in trainers.items():
        maximum = workloads.padded_to(examples, batch, cut)
        sides |= {
            f"{name}, to the longest": (any_length, map(without, longest())),
            f"{name}, to the maximum": (one_length, map(without, maximum)),
            f"{name}, cached reference": (any_length, longest()),
        }
    chosen = dataclasses.replace(eager, log_prob=theirs.log_prob_of_targets, at_once={})
    sides["PyTorch, logits of targets"] = (chosen, map(without, longest()))
    sides["PyTorch, cached reference and logits of targets"] = (chosen, longest())
    return sides, conditions


def measure(sides: Sides, steps: int, repeats: int) -> Iterator[Result]:
    """Lets the sides take turns of so many steps, and compares ours with theirs."""
    turns_of = {}
    shapes = {}
    for name, (trainer, batches) in sides.items():
        some = list(batches)
        turns_of[name] = [some[first : first + steps] for first in range(0, len(some), steps)]
        shapes |= {
            (library(name), id(trainer), batch_shape(batch)): (trainer, batch) for batch in some
        }
    # Every shape once, a library's largest first: in what it frees its others have room.
    order = sorted(shapes, key=lambda key: (key[0] != "ours", -workloads.count(shapes[key][1])[2]))
    last = ""

    def comes_anew(side: str) -> bool:
        """Returns whether the other library had the last turn, and gives back what its buffers left."""
        nonlocal last
        if library(side) == last:
            return False
        host_memory.give_back_freed_memory()
        last = library(side)
        return True

    for key in order:
        trainer, batch = shapes[key]
        # The first step ends with making the optimiser's state, beside which the second has to fit.
        trainer.run([batch, batch] if comes_anew(key[0]) else [batch])

    def take(name: str, turns: Iterator[Sequence[Batch]]) -> float:
        """Returns the seconds of a side's next turn."""
        trainer, turn = sides[name][0], next(turns)
        if comes_anew(name):
            # The room that the other library's buffers had is of no use to this one, and a step finds its own again.
            trainer.run(turn[:1])
        seconds = trainer.run(turn)
        print(f"{name}: {seconds:.4g} s", file=sys.stderr, flush=True)
        return seconds

    counts, timed = {}, {}
    for name, turns in turns_of.items():
        timed[name] = functools.partial(take, name, iter(turns))
        counts[name] = [[workloads.count(batch) for batch in turn] for turn in turns]
        positions = [sum(p for *_, p in turn) / steps for turn in counts[name]]
        real = [
            100 * sum(t for _, t, _ in turn) / sum(p for *_, p in turn) for turn in counts[name]
        ]
        yield result(f"{name}: positions", "a step", positions)
        yield result(f"{name}: real tokens among them", "%", real)
    seconds = in_turns(timed, repeats)
    for name, taken in seconds.items():
        yield result(f"{name}: a step", "ms", [1e3 * s / steps for s in taken])
        for column, what in enumerate(("examples", "real tokens")):
            speeds = [
                sum(step[column] for step in turn) / s
                for turn, s in zip(counts[name], taken, strict=True)
            ]
            yield result(f"{name}: {what}", "a second", speeds)
        if library(name) == "PyTorch":
            trainer, turns = sides[name][0], turns_of[name]
            parts = [trainer.parts(batch) for turn in turns for batch in turn]
            if max(parts) > 1:
                yield result(f"{name}: parts of a batch", "a step", parts)
    for kind, compared in BASES.items():
        theirs = [
            name for name in sides if name.startswith("PyTorch") and name.endswith(f", {kind}")
        ]
        if not theirs:
            continue
        base = min(theirs, key=lambda name: statistics.median(seconds[name]))
        for name in compared:
            if name not in seconds:
                continue
            turns = zip(seconds[name], seconds[base], strict=True)
            yield result(f"{name} / {base}", "times", [other / mine for mine, other in turns])


def library(name: str) -> str:
    """Returns whose a side is: "ours" or "PyTorch"."""
    return name.split(",")[0]


def batch_shape(batch: Batch) -> tuple[tuple[int, ...], ...]:
    """Returns what a program is compiled for."""
    return tuple(array.shape for array in batch.values())


if __name__ == "__main__":
    main()
