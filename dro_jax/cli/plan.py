"""`dro_jax plan`: whether a run fits a machine that is not there, and how fast it can be at the most."""

import dataclasses
import importlib.metadata
import importlib.util
import json
import math
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding
from rich.table import Table

from dro_jax.cli import configuration, train
from dro_jax.cli.console import console
from dro_jax.cli.run_data import check_lengths
from dro_jax.data.packing import fill_rows
from dro_jax.errors import UsageError, check_number
from dro_jax.networks import T5Config
from dro_jax.training import chips, cost, partitioning, step, train_state
from dro_jax.training.algorithms import Algorithm
from dro_jax.training.chips import GIB, Machine
from dro_jax.training.collectives import read_collectives
from dro_jax.training.optimizers import Adafactor

PLACEHOLDERS = ("FEEDBACK_FILE = 'feedback.jsonl'", "MODEL_DIR = 'out'")
"""What `train` must be given and a plan does not look at: bindings that come before a person's own."""

# libtpu would ask what machine it runs on and wait for an answer, lock the machine's TPU, and write a log. It compiles
# for any slice, whatever accelerator it is told that this is.
_NO_TPU_HERE = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "TPU_LOG_DIR": "disabled",
}


@dataclasses.dataclass(frozen=True)
class Run:
    """What a configuration has a step do.

    Attributes:
      work: its networks and batch.
      algorithm: the method.
      optimizer: its optimiser.
      rules: mesh and sharding.
    """

    work: cost.Workload
    algorithm: Algorithm
    optimizer: Adafactor
    rules: partitioning.Partitioning

    def mesh(self, devices: Sequence[jax.Device]) -> Mesh:
        """Its mesh on these devices. Raises UsageError for a mesh or batch that does not fit them."""
        mesh, work = self.rules.mesh(devices), self.work
        partitioning.check_batch_size(
            work.rows, mesh, self.rules, work.microbatches, pairs=work.needs.pairs
        )
        return mesh

    def layout(self, devices: Sequence[jax.Device]) -> train_state.Layout:
        """Where its state lies on these devices. Raises UsageError as `mesh`."""
        return train_state.make_layout(
            self.work.config,
            self.optimizer.transforms(),
            has_value=self.work.needs.value == "network",
            mesh=self.mesh(devices),
            rules=self.rules,
        )


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is known of a step before it is run; bytes and operations are of one chip.

    Attributes:
      machine: as asked for.
      chips: number of them.
      mesh: its axes.
      run: what was planned, in words.
      compiler: the TPU compiler whose program this is, None by arithmetic alone.
      compile_seconds: it took; None without it, or where it found that the step does not fit.
      memory: bytes by what they are for; they add up to what the step needs.
      usable: bytes that a chip has.
      first_over: the first of `memory` that does not fit with those before it; None where all do.
      change: bindings with which it should fit, by arithmetic; None where it does, or none would do.
      collectives: kind, runs (None by arithmetic) and bytes sent.
      flops: operations by what they are for.
      seconds: what a step takes at the least for each limit: "arithmetic", "memory" and "interconnect".
    """

    machine: str
    chips: int
    mesh: dict[str, int]
    run: str
    compiler: str | None
    compile_seconds: float | None
    memory: dict[str, float]
    usable: float
    first_over: str | None
    change: str | None
    collectives: list[dict[str, Any]]
    flops: dict[str, float]
    seconds: dict[str, float]


def run(*, topology: str | None, gpus: str | None, as_json: bool) -> bool:
    """Plans the run that the loaded configuration describes, and prints it.

    Args:
      topology: a TPU slice, for whose chips the step is compiled; None for `gpus`.
      gpus: a number of GPUs, for which it is not.
      as_json: whether to print JSON.

    Returns:
      Whether it fits.

    Raises:
      UsageError: for anything wrong with the settings, or no TPU compiler.
    """
    # An accelerator that is here has other work; this is to be known before JAX looks for one.
    jax.config.update("jax_platforms", "cpu")
    os.environ.update(_NO_TPU_HERE)
    if topology is None:
        assert gpus is not None
        plan = make_plan(read_run(), chips.gpus(gpus), compiled=False)
    else:
        plan = make_plan(read_run(), chips.tpu_slice(topology), compiled=True)
    if as_json:
        print(json.dumps(dataclasses.asdict(plan), indent=2))
    else:
        show(plan)
    return plan.first_over is None


def read_run() -> Run:
    """The run that the loaded configuration describes. Raises UsageError for settings that mean nothing."""
    bound = configuration.arguments(train.train)
    configuration.bound(train.train)
    algorithm: Algorithm = bound["algorithm"]
    lengths, slots = bound["lengths"], bound.get("max_examples", 1)
    check_lengths(lengths)
    check_number("MAX_EXAMPLES", slots, whole=True, at_least=1)
    model: T5Config = bound["model"]
    one = jax.ShapeDtypeStruct((1, 1), np.float32)
    return Run(
        work=cost.Workload(
            config=dataclasses.replace(
                model,
                reserved_entry=algorithm.needs.value == "policy",
                dtype="bfloat16" if model.dtype == "auto" else model.dtype,
            ),
            needs=algorithm.needs,
            rows=bound["batch_size"],
            inputs=lengths["inputs"],
            targets=lengths["targets"],
            slots=slots,
            cached=algorithm.needs.reference and bound.get("cache_dir") is not None,
            microbatches=bound.get("microbatches", 1),
            forward_first=jax.eval_shape(algorithm.loss_weights, one, one) is None,
        ),
        algorithm=algorithm,
        optimizer=bound["optimizer"],
        rules=bound["rules"],
    )


def make_plan(run: Run, machine: Machine, *, compiled: bool) -> Plan:
    """Plans a run.

    Args:
      run: what to do.
      machine: where.
      compiled: whether the TPU compiler compiles the step, or arithmetic has to do.

    Returns:
      The plan.

    Raises:
      UsageError: for a mesh or batch that does not fit the machine, or no TPU compiler.
    """
    work = run.work
    layout = run.layout(_tpu_devices(machine) if compiled else _stand_ins(machine.chips))
    memory = cost.state_bytes(layout, reference=work.reference)
    guess, scale = cost.temporary_bytes(work, layout), 1.0
    sent: list[dict[str, Any]] = [
        {"kind": kind, "runs": None, "sent": volume}
        for kind, volume in cost.sent_bytes(work, layout).items()
        if volume
    ]
    seconds = None
    if not compiled:
        memory |= guess
    else:
        program = compile_step(run, layout)
        memory["temporaries"] = program.needed - sum(memory.values())
        scale = memory["temporaries"] / sum(guess.values())
        if program.hlo is not None:
            sent = [dataclasses.asdict(one) for one in read_collectives(program.hlo)]
            seconds = program.seconds
    parameters = _count(layout.shapes.policy) + _count(layout.shapes.value)
    flops = {
        name: number / machine.chips
        for name, number in dataclasses.asdict(cost.flops(work, parameters)).items()
    }
    first_over = _first_over(memory, machine.chip.memory)
    in_all = sum(one["sent"] for one in sent)
    return Plan(
        machine=machine.name,
        chips=machine.chips,
        mesh=dict(layout.mesh.shape),
        run=_in_words(run),
        compiler=f"libtpu {importlib.metadata.version('libtpu')}" if compiled else None,
        compile_seconds=seconds,
        memory=memory,
        usable=machine.chip.memory,
        first_over=first_over,
        change=None if first_over is None else find_change(run, machine, layout, scale),
        collectives=sent,
        flops=flops,
        seconds={
            "arithmetic": sum(flops.values()) / machine.chip.flops,
            "memory": cost.touched_bytes(work, layout) / machine.chip.bandwidth,
            "interconnect": in_all / machine.sends if machine.sends else 0.0,
        },
    )


@dataclasses.dataclass(frozen=True)
class Program:
    """What the TPU compiler made of a step.

    Attributes:
      hlo: its text; None where it does not fit.
      needed: bytes of a chip: state, temporaries and the program itself.
      seconds: that compiling took.
    """

    hlo: str | None
    needed: float
    seconds: float


def compile_step(run: Run, layout: train_state.Layout) -> Program:
    """Compiles the very step that `train` would run, for the devices of the layout's mesh."""
    work, state = run.work, layout.abstract()
    train_step: Any = step.make_train_step(
        work.config,
        run.algorithm,
        run.optimizer.transforms(),
        run.optimizer.schedules(),
        layout,
        work.microbatches,
    )
    batch = {
        name: jax.ShapeDtypeStruct(
            array.shape,
            array.dtype,
            sharding=partitioning.batch_sharding(layout.mesh, layout.rules),
        )
        for name, array in some_batch(work).items()
    }
    started = time.monotonic()
    try:
        program = train_step.lower(state, state.policy if work.reference else None, batch).compile()
    except jax.errors.JaxRuntimeError as error:
        over = re.search(r"(?:temporaries \(|Used )([\d.]+)([KMGT])", str(error))
        if over is None:
            raise
        unit = 1024 ** (1 + "KMGT".index(over[2]))
        return Program(None, float(over[1]) * unit, time.monotonic() - started)
    found = program.memory_analysis()
    needed = (
        found.argument_size_in_bytes
        + found.output_size_in_bytes
        - found.alias_size_in_bytes
        + found.temp_size_in_bytes
        + found.generated_code_size_in_bytes
    )
    return Program(program.as_text(), needed, time.monotonic() - started)


def some_batch(work: cost.Workload) -> dict[str, np.ndarray]:
    """A batch as `train` would give it to the devices, with one short example."""
    one = np.ones(1, np.int32)
    example = {"inputs": one, "targets": one, "rewards": one}
    if work.needs.mismatched:
        example["mismatched_targets"] = one
    if work.cached:
        example["reference_log_probs"] = one
    if work.cached and work.needs.mismatched:
        example["mismatched_reference_log_probs"] = one
    return fill_rows(
        [[example], *[[]] * (work.rows - 1)],
        lengths={"inputs": work.inputs, "targets": work.targets},
        max_examples=work.slots,
    )


def find_change(run: Run, machine: Machine, layout: train_state.Layout, scale: float) -> str | None:
    """Looks for what would make a run fit that does not.

    Args:
      run: the run.
      machine: the machine.
      layout: of the run on it.
      scale: its temporaries, as a multiple of those by arithmetic.

    Returns:
      The flags that cost least time, or a larger number of chips, with what they should come to; None where 64 times
      as many would not do.
    """

    def needed(changed: Run, count: int) -> float:
        try:
            moved = _on_other_mesh(layout, changed, count)
            state = cost.state_bytes(moved, reference=changed.work.reference)
        # Neither mesh and batch nor mesh and weights need to divide.
        except (UsageError, ValueError):
            return math.inf
        return sum(state.values()) + scale * sum(cost.temporary_bytes(changed.work, moved).values())

    for count in (machine.chips * 2**n for n in range(7)):
        for flags, changed in _changes(run):
            if (size := needed(changed, count)) <= machine.chip.memory:
                more = f"{count} chips" if count > machine.chips else ""
                what = " with ".join(part for part in (more, flags) if part)
                return f"{what} (about {_size(size)})"
    return None


def _on_other_mesh(layout: train_state.Layout, run: Run, count: int) -> train_state.Layout:
    """The layout of a run on so many chips, from one on others: to make one takes seconds."""
    mesh = run.mesh(_stand_ins(count))
    shardings = jax.tree.map(lambda old: NamedSharding(mesh, old.spec), layout.shardings)
    return dataclasses.replace(layout, mesh=mesh, shardings=shardings)


_Change = tuple[str, dict[str, Any], dict[str, Any]]
"""Flags, and what they change of the work and of the rules."""


def _changes(run: Run) -> Iterator[tuple[str, Run]]:
    """What saves memory, alone and together, that which costs least time first: flags, and the run with them."""
    work, rules = run.work, run.rules
    alone: list[_Change] = []
    if (rules.data, rules.fsdp) != (1, -1):
        flags = "--gin.Partitioning.data=1 --gin.Partitioning.fsdp=-1"
        alone.append((flags, {}, {"data": 1, "fsdp": -1}))
    if work.reference:
        alone.append(("--gin.CACHE_DIR=\"'…'\"", {"cached": True}, {}))
    if work.config.remat != "full":
        config = dataclasses.replace(work.config, remat="full")
        alone.append(("--gin.T5Config.remat=\"'full'\"", {"config": config}, {}))
    parts: list[_Change] = [
        (f"--gin.MICROBATCHES={n}", {"microbatches": n}, {})
        for n in (2**k for k in range(1, 12))
        if n > work.microbatches
    ]
    together = [[], *([one] for one in (*alone, *parts)), alone, *([*alone, one] for one in parts)]
    for several in together:
        flags = " ".join(flag for flag, _, _ in several)
        of_work = {name: value for _, changes, _ in several for name, value in changes.items()}
        of_rules = {name: value for _, _, changes in several for name, value in changes.items()}
        yield (
            flags,
            dataclasses.replace(
                run,
                work=dataclasses.replace(work, **of_work),
                rules=dataclasses.replace(rules, **of_rules),
            ),
        )


def _tpu_devices(machine: Machine) -> Sequence[jax.Device]:
    """Devices of a slice that programs can be compiled for, and not run on."""
    if importlib.util.find_spec("libtpu") is None:
        raise UsageError(
            "--topology needs the TPU compiler, which runs anywhere: pip install 'dro_jax[tpu]'"
        )
    options: dict[str, Any] = {}
    if machine.chip.name == "v4":
        # As programs see them: the two cores of a chip are one device.
        options["chip_config_name"] = "megacore"
    if machine.chips == 1:
        options["chips_per_host_bounds"] = (1, 1, 1)
    described = topologies.get_topology_desc(machine.name, platform="tpu", **options)
    return described.devices


def _stand_ins(count: int) -> Sequence[jax.Device]:
    """As many devices as there would be, to lay a state over."""
    return [jax.devices("cpu")[0]] * count


def _first_over(memory: Mapping[str, float], usable: float) -> str | None:
    total = 0.0
    for name, size in memory.items():
        total += size
        if total > usable:
            return name
    return None


def _count(shapes: Any) -> int:
    return sum(math.prod(shape.shape) for shape in jax.tree.leaves(shapes))


def _in_words(run: Run) -> str:
    work, config = run.work, run.work.config
    examples = f" of up to {work.slots} examples" if work.slots > 1 else ""
    parts = f" in {work.microbatches} parts" if work.microbatches > 1 else ""
    reference = "no reference"
    if work.needs.reference:
        reference = "reference cached" if work.cached else "reference in memory"
    return (
        f"{run.algorithm.name}: {work.rows} rows{examples}{parts}, {work.inputs} + {work.targets} tokens; "
        f"{config.dtype}, layers {'scanned' if config.scan_layers else 'unrolled'}, remat {config.remat}; {reference}"
    )


def show(plan: Plan) -> None:
    """Prints a plan for the terminal."""
    mesh = " x ".join(f"{axis} {size}" for axis, size in plan.mesh.items())
    console.print(f"{plan.machine}, mesh {mesh}", style="bold")
    for line in plan.run.split("; ", 1):
        console.print(line)
    if plan.compiler is None:
        console.print("by arithmetic alone, as if all were in one machine")
        console.print("usable are the three quarters of a GPU's memory that JAX takes")
    elif plan.compile_seconds is not None:
        console.print(f"compiled by {plan.compiler} in {plan.compile_seconds:.0f} s")

    needed = sum(plan.memory.values())
    table = Table("each step, on one chip")
    table.add_column("", justify="right")
    table.add_column("", justify="right")
    for name, size in plan.memory.items():
        table.add_row(name, _size(size), "does not fit" if name == plan.first_over else "")
    table.add_row("memory in all", _size(needed), f"of {_size(plan.usable)}")
    table.add_section()
    for one in plan.collectives:
        runs = "" if one["runs"] is None else f"{one['runs']} times"
        table.add_row(one["kind"], _size(one["sent"]), runs)
    table.add_section()
    operations = sum(plan.flops.values())
    for name, number in plan.flops.items():
        if number:
            share = f"{number / operations:.1%}"
            table.add_row(_FLOPS.get(name, name), f"{number / 1e12:.3g} TFLOP", share)
    table.add_section()
    limit = max(plan.seconds, key=lambda name: plan.seconds[name])
    for name, seconds in plan.seconds.items():
        table.add_row(
            f"{name} takes at least", f"{seconds:.3g} s", "the limit" if name == limit else ""
        )
    console.print(table)
    console.print(f"at most {1 / plan.seconds[limit]:.3g} steps a second")
    if plan.first_over is None:
        console.print(f"fits, with {_size(plan.usable - needed)} to spare")
    else:
        change = f"should fit: {plan.change}" if plan.change else "nothing known makes it fit"
        console.print(f"does not fit: {plan.first_over}; {change}")


_FLOPS = {
    "encoder": "policy's encoder",
    "decoder": "policy's decoder",
    "vocabulary": "policy's logits",
    "value": "value network",
    "mismatched": "mismatched responses",
    "recomputed": "done again, for memory",
}


def _size(number: float) -> str:
    unit = next((u for u in (GIB, 2**20) if number >= u), 2**10)
    return f"{number / unit:.2f} { {GIB: 'GiB', 2**20: 'MiB'}.get(unit, 'KiB') }"
