"""Accelerators as a plan sees them: what they hold and how fast they are, from public tables."""

import dataclasses
import math
import re

from dro_jax.errors import UsageError

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One accelerator.

    TPUs: peak and memory bandwidth from Google's pages (docs.cloud.google.com/tpu/docs/v4, v5e, v5p, v6e), bytes
    a link from "TPU specs" in How to Scale Your Model (jax-ml.github.io/scaling-book/tpus); usable memory is what
    libtpu 0.0.42 says that it has when a program asks for more. GPUs: NVIDIA's data sheets of the SXM
    versions, without sparsity.

    Attributes:
      name: as `--topology` and `--gpus` have it.
      memory: bytes that programs can use.
      flops: most bfloat16 operations a second.
      bandwidth: bytes a second to and from its memory.
      link: bytes a second that one link sends.
      links: links to neighbours; a TPU has two for each axis of its torus.
    """

    name: str
    memory: float
    flops: float
    bandwidth: float
    link: float
    links: int


TPUS = {
    "v4": Chip("v4", 30.75 * GIB, 275e12, 1.2e12, 45e9, 6),
    "v5e": Chip("v5e", 15.75 * GIB, 197e12, 0.819e12, 45e9, 4),
    "v5p": Chip("v5p", 95.74 * GIB, 459e12, 2.765e12, 90e9, 6),
    "v6e": Chip("v6e", 31.25 * GIB, 918e12, 1.64e12, 90e9, 4),
}

# JAX takes three quarters of a GPU's memory unless XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise. All of NVLink counts
# as one link.
GPUS = {
    "A100-40": Chip("A100-40", 0.75 * 40e9, 312e12, 1.555e12, 300e9, 1),
    "A100-80": Chip("A100-80", 0.75 * 80e9, 312e12, 2.039e12, 300e9, 1),
    "H100": Chip("H100", 0.75 * 80e9, 989e12, 3.35e12, 450e9, 1),
    "H200": Chip("H200", 0.75 * 141e9, 989e12, 4.8e12, 450e9, 1),
}

_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_SMALL_CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4")
_LARGEST = 4096


@dataclasses.dataclass(frozen=True)
class Machine:
    """Chips that work together.

    Attributes:
      name: as it was asked for.
      chip: what each is.
      shape: how many along each axis.
      sends: bytes a second that the chip with the fewest neighbours can send to them.
    """

    name: str
    chip: Chip
    shape: tuple[int, ...]
    sends: float

    @property
    def chips(self) -> int:
        """How many chips there are."""
        return math.prod(self.shape)


def tpu_slice(topology: str) -> Machine:
    """The slice of a TPU pod of that name, such as "v5e:4x4". Raises UsageError for one that cannot be had."""
    name, _, size = topology.partition(":")
    chip = TPUS.get(name)
    whole = re.fullmatch(r"\d+(x\d+)*", size)
    shape = tuple(int(n) for n in size.split("x")) if whole else ()
    if chip is None or not shape or not _exists(chip, size, shape):
        cubes = f"{', '.join(_SMALL_CUBES)} or multiples of 4 such as 4x4x8, smallest first"
        raise UsageError(
            f"--topology={topology}: there is no such slice; there are v5e and v6e with {', '.join(_FLAT)}, "
            f"and v4 and v5p with {cubes}"
        )
    flat = len(shape) == 2
    closed = all(n % 4 == 0 for n in shape)
    # An axis closes into a ring when it is as long as a pod's in the flat ones, and in whole cubes of 4.
    links = sum(min(n - 1, 2 if (n == 16 if flat else closed) else 1) for n in shape)
    return Machine(topology, chip, shape, links * chip.link)


def _exists(chip: Chip, size: str, shape: tuple[int, ...]) -> bool:
    if chip.links == 4:
        return size in _FLAT
    cubes = len(shape) == 3 and all(n and n % 4 == 0 for n in shape)
    return size in _SMALL_CUBES or (
        cubes and shape == tuple(sorted(shape)) and math.prod(shape) <= _LARGEST
    )


def gpus(machine: str) -> Machine:
    """So many GPUs, such as "8xH100", as if all were in one machine. Raises UsageError for unknown ones."""
    count, _, name = machine.partition("x")
    if name not in GPUS or not count.isdecimal() or int(count) < 1:
        raise UsageError(
            f"--gpus={machine}: write a number and one of {', '.join(GPUS)}, as in 8xH100"
        )
    chip = GPUS[name]
    return Machine(machine, chip, (int(count),), chip.link * chip.links)
