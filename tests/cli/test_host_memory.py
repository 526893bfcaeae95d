"""Memory that was freed serves again: the kernel is not asked for it, whichever thread wants it."""

import ctypes
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from dro_jax.cli import host_memory

LIBC = """
import ctypes, re, resource, threading
from pathlib import Path
from dro_jax.cli import host_memory

host_memory.keep_freed_memory()
libc = ctypes.CDLL(None)
libc.malloc.argtypes, libc.malloc.restype = [ctypes.c_size_t], ctypes.c_void_p
libc.memset.argtypes, libc.free.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t], [ctypes.c_void_p]
"""

BUFFERS = f"""
{LIBC}
def touch():
    for _ in range(4):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        buffer = libc.malloc(2**28)
        libc.memset(buffer, 1, 2**28)
        libc.free(buffer)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)

thread = threading.Thread(target=touch)
thread.start()
thread.join()
"""


GIVEN_BACK = f"""
{LIBC}
def resident():
    return 1024 * int(re.search(r"VmRSS:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

before = resident()
buffer = libc.malloc(2**28)
libc.memset(buffer, 1, 2**28)
# What lies behind it keeps the end of the heap where it is.
behind = libc.malloc(2**20)
libc.free(buffer)
print(resident() - before)
host_memory.give_back_freed_memory()
print(resident() - before)
"""

of_glibc = pytest.mark.skipif(
    sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "mallopt"),
    reason="it is glibc's allocator that is told",
)


@of_glibc
def test_a_thread_touches_its_buffer_for_the_first_time_once():
    ran = subprocess.run(
        [sys.executable, "-c", BUFFERS], capture_output=True, text=True, check=True
    )
    first, *later = (int(count) for count in ran.stdout.split())
    assert len(later) == 3
    assert max(later) < first / 10


@of_glibc
def test_what_was_kept_can_be_given_back():
    ran = subprocess.run(
        [sys.executable, "-c", GIVEN_BACK], capture_output=True, text=True, check=True
    )
    kept, after = (int(line) for line in ran.stdout.split())
    assert kept > 0.9 * 2**28
    assert after < 2**26


@pytest.mark.parametrize(
    ("plugin", "file", "platforms", "kept"),
    [
        (None, None, None, True),
        # A driver that JAX has no plug-in for, and the other way round.
        (None, "nvidia0", None, True),
        ("jax_cuda12_plugin", None, None, True),
        ("libtpu", "vfio/vfio", None, True),
        ("jax_cuda12_plugin", "nvidia0", None, False),
        ("jax_cuda13_plugin", "nvidia0", None, False),
        ("libtpu", "accel0", None, False),
        ("libtpu", "vfio/3", None, False),
        ("libtpu", "vfio/3", "cpu", True),
    ],
)
def test_where_an_accelerator_computes_the_allocator_is_left_as_it_is(
    plugin, file, platforms, kept, tmp_path, monkeypatch
):
    if file is not None:
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).touch()
    monkeypatch.setattr(
        host_memory, "Path", lambda path: tmp_path if path == "/dev" else Path(path)
    )
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name if name == plugin else None)
    if platforms is None:
        monkeypatch.delenv("JAX_PLATFORMS")
    else:
        monkeypatch.setenv("JAX_PLATFORMS", platforms)
    told = []
    monkeypatch.setattr(
        host_memory, "_of_glibc", lambda name: lambda *settings: told.append(settings)
    )
    host_memory.keep_freed_memory()
    assert (len(told) == 3) == kept
    assert bool(told) == kept
