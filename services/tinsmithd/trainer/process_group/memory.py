"""What this rank has of the machine's memory and of its device's, for metrics.

A device is asked between two commands, by the thread that computes: one that hangs must not stop
the thread which says that this process lives.
"""

import os
from pathlib import Path

import torch

from tinsmithd.trainer.process_group.stall import Memory

_device_bytes = _device_size_bytes = 0


def look() -> None:
    """Ask the device, from the thread that computes."""
    global _device_bytes, _device_size_bytes
    if not torch.cuda.is_initialized():
        return
    _device_bytes = torch.cuda.memory_reserved()
    if not _device_size_bytes:
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        _device_size_bytes = properties.total_memory


def current() -> Memory:
    """What is known now; any thread may ask."""
    return Memory(_resident_bytes(), _device_bytes, _device_size_bytes)


def _resident_bytes() -> int:
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except (OSError, ValueError, IndexError):
        return 0  # this system has no /proc
    return pages * os.sysconf("SC_PAGE_SIZE")
