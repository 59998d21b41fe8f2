"""How the C library keeps the memory of messages, and when it gives it back to the kernel.

It works on glibc's heaps; with another C library nothing happens.
"""

import ctypes

MIB = 1024 * 1024
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8  # of malloc.h
MMAP_THRESHOLD_BYTES = 4 * MIB
"""A larger buffer is the kernel's: it leaves no hole in a heap, and is gone when it is freed. Our
client's messages are 256 KiB, so that its calls never pay for fresh pages."""
TRIM_THRESHOLD_BYTES = 32 * MIB
"""What is free at the end of a heap beyond this is given back."""
ARENAS = 2
"""Heaps of a process. By default each of gRPC's threads comes to have one, and keeps in it what its
messages left behind: calls of 280 MiB that were refused at 64 MiB took 290 MiB instead of 150."""

_library = ctypes.CDLL(None)
_mallopt = getattr(_library, "mallopt", None)
_malloc_trim = getattr(_library, "malloc_trim", None)


def keep_freed_memory() -> None:
    """Let the allocator keep the memory of messages for the next ones.

    By default glibc gives every buffer over 128 KiB, and what is free at the end of its heap, back
    to the kernel at once, and gets it again page by page: a call of one megabyte cost 1,200 page
    faults.
    """
    if _mallopt is not None:
        _mallopt(_M_MMAP_THRESHOLD, MMAP_THRESHOLD_BYTES)
        _mallopt(_M_TRIM_THRESHOLD, TRIM_THRESHOLD_BYTES)
        _mallopt(_M_ARENA_MAX, ARENAS)


def give_back_freed_memory() -> None:
    """Give the kernel all free pages, also those between what is in use.

    That takes some 10 ms for 100 MiB, without the interpreter's lock.
    """
    if _malloc_trim is not None:
        _malloc_trim(0)
