"""The C library's heaps: what is kept for the next message, and what the kernel gets back."""

import ctypes
import subprocess
import sys

import pytest

SCRIPT = """
from tinsmithd.processes import give_back_freed_memory, keep_freed_memory
from tinsmithd.rpc.reads import rss_bytes

keep_freed_memory()
begun = rss_bytes()
pieces = [b"x" * 60_000 for _ in range(1600)]  # as gRPC's core holds a message
pieces = pieces[::100]
print(rss_bytes() - begun)
give_back_freed_memory()
print(rss_bytes() - begun)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="glibc's heaps")
def test_free_pages_between_used_ones_are_given_back() -> None:
    """Holes stay in a heap whose end is in use, until they are asked for."""
    run = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    kept, left = map(int, run.stdout.split())
    assert kept > 80e6
    assert left < 10e6
