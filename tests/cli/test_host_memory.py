"""Memory that was freed serves again: the kernel is not asked for it, whichever thread wants it."""

import subprocess
import sys

import pytest

PAGES = 2**28 // 4096
BUFFERS = """
import ctypes, resource, sys, threading
from dro_jax.cli import host_memory

if sys.argv[1] == "kept":
    host_memory.keep_freed_memory()
libc = ctypes.CDLL(None)
libc.malloc.argtypes, libc.malloc.restype = [ctypes.c_size_t], ctypes.c_void_p
libc.memset.argtypes, libc.free.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t], [ctypes.c_void_p]

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


@pytest.mark.skipif(sys.platform != "linux", reason="it is glibc's allocator that is told")
@pytest.mark.parametrize("memory", ["kept", "handed back"])
def test_a_thread_s_freed_buffer_is_touched_for_the_first_time_once(memory):
    ran = subprocess.run(
        [sys.executable, "-c", BUFFERS, memory], capture_output=True, text=True, check=True
    )
    faults = [int(count) for count in ran.stdout.split()]
    assert faults[0] > 0.9 * PAGES
    if memory == "kept":
        assert max(faults[1:]) < PAGES / 100
    else:
        assert min(faults[1:]) > 0.9 * PAGES
