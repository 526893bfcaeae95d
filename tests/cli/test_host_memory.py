"""Memory that was freed serves again: the kernel is not asked for it, whichever thread wants it."""

import ctypes
import subprocess
import sys

import pytest

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
