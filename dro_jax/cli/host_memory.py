"""How the process keeps its memory while it computes on the CPU."""

import ctypes
import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

# Of glibc's malloc.h; mallopt returns 0 for what it does not know.
_M_TRIM_THRESHOLD = -1
_M_MMAP_MAX = -4
_M_ARENA_MAX = -8

_DRIVERS = (
    ("jax_cuda12_plugin", "nvidia[0-9]*"),
    ("jax_cuda13_plugin", "nvidia[0-9]*"),
    ("libtpu", "accel[0-9]*"),
    ("libtpu", "vfio/[0-9]*"),
)


def keep_freed_memory() -> None:
    """Lets the allocator keep the buffers of a step for the next one.

    By default glibc hands every large buffer back to the kernel and has it zeroed again a moment later: up to a third
    of a small model's step on CPU. To be called before there are threads: those that have an arena of their own go on
    so. Does nothing where there is no glibc, nor where an accelerator computes: there the one arena would only have the
    compiler's threads, and those that read the data, wait for each other.
    """
    mallopt = _of_glibc("mallopt")
    if mallopt is not None and not _has_accelerator():
        mallopt(_M_MMAP_MAX, 0)
        # Other arenas than the first have room for small buffers only.
        mallopt(_M_ARENA_MAX, 1)
        mallopt(_M_TRIM_THRESHOLD, -1)


def give_back_freed_memory() -> None:
    """Hands what is free to the kernel after all.

    To be called before work of another kind than the steps: what lasts of it may come to lie in the middle of what a
    step has freed, and the next step's buffer would then be taken beside it and not there.
    """
    malloc_trim = _of_glibc("malloc_trim")
    if malloc_trim is not None:
        malloc_trim(0)


def _has_accelerator() -> bool:
    """Whether JAX will find a GPU or TPU, told before it may be asked: by its plug-ins and the drivers' files."""
    if os.environ.get("JAX_PLATFORMS") == "cpu":
        return False
    return any(
        importlib.util.find_spec(plugin) is not None and any(Path("/dev").glob(files))
        for plugin, files in _DRIVERS
    )


def _of_glibc(name: str) -> Any:
    """A function of the C library, None where it has no such."""
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None
