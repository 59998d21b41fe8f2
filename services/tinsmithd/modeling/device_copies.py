"""Copies between host memory and a device during which neither waits for the other.

A device works off what it was given while the host prepares what comes next. An ordinary copy ends
that: it waits until the device has done everything before it. One from or to pinned memory does
not. On a CPU nothing of this matters, and a copy is a copy.
"""

import math
from collections import deque
from collections.abc import Hashable, Iterator, Sequence
from typing import Generic, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from tinsmithd.reused_memory import ReusedMemory

STAGE_BYTES = 32 * 1024 * 1024
"""Bytes of a pinned buffer through which large tensors go; there are two."""
COPIES_BYTES_MAX = 256 * 1024 * 1024
"""Host memory that is kept for the next copies: a snapshot's and a save's of an adapter's state."""
_memory = ReusedMemory(COPIES_BYTES_MAX)

K = TypeVar("K", bound=Hashable)


class Arrival(Protocol):
    """A copy on its way, as `torch.cuda.Event` tells of it."""

    def query(self) -> bool:
        """Whether it is here."""

    def synchronize(self) -> None:
        """Wait until it is."""


def to_device(host: Tensor, device: torch.device) -> Tensor:
    """A copy of a tensor in host memory, which may be changed as soon as this returns."""
    if device.type != "cuda":
        return host.to(device)
    return host.pin_memory().to(device, non_blocking=True)


class ToHost(Generic[K]):
    """Brings results to host memory in the order in which they were put, while the device goes on.

    Every result is float32 and has a key.
    """

    def __init__(self) -> None:
        self._on_their_way: deque[tuple[K, Tensor, Arrival | None]] = deque()

    def put(self, key: K, result: Tensor) -> None:
        """Begin to copy a result."""
        self._on_their_way.append((key, *begin_copy(result)))

    def arrived(self) -> Iterator[tuple[K, np.ndarray]]:
        """Those that are here by now; none is waited for."""
        while self._on_their_way:
            key, host, arrival = self._on_their_way[0]
            if arrival is not None and not arrival.query():
                return
            self._on_their_way.popleft()
            yield key, host.numpy()

    def rest(self) -> Iterator[tuple[K, np.ndarray]]:
        """All others; the last is waited for, and with it all before."""
        if self._on_their_way:
            _, _, last = self._on_their_way[-1]
            if last is not None:
                last.synchronize()
        for key, host, _ in self._on_their_way:
            yield key, host.numpy()
        self._on_their_way.clear()


def begin_copy(result: Tensor) -> tuple[Tensor, Arrival | None]:
    """Begin to copy a tensor to host memory.

    Returns:
        Where it will be, and how to know that it is; None where it is already.
    """
    if result.device.type != "cuda":
        return result.cpu(), None
    host = torch.empty(result.shape, dtype=result.dtype, pin_memory=True)
    host.copy_(result, non_blocking=True)
    arrival = torch.cuda.Event()
    arrival.record()
    return host, arrival


def host_copy(flat: Tensor, into: Tensor | None = None) -> Tensor:
    """Make a float32 copy in host memory, in one pass, from any device.

    Args:
        flat: float32 of one dimension.
        into: Where to; None is memory that no other copy has.
    """
    copy = host_memory(flat.shape) if into is None else into
    flat = flat.detach()
    if flat.device.type == "cuda":
        _through_pinned(flat, copy)
    else:
        copy.copy_(flat)
    return copy


def host_memory(shape: Sequence[int]) -> Tensor:
    """Host memory for a copy, float32 of any content."""
    nbytes = math.prod(shape) * np.dtype(np.float32).itemsize
    return torch.from_numpy(_memory.take(nbytes).view(np.float32).reshape(shape))


def prepare_host_memory(count: int, copies: int) -> None:
    """Have memory for so many copies of `count` elements made beside all else, if it may be kept.

    Whoever makes the first ones waits less then.
    """
    _memory.prepare(count * np.dtype(np.float32).itemsize, copies)


def _through_pinned(flat: Tensor, copy: Tensor) -> None:
    """Copy from a GPU on a stream of its own: while one buffer fills, the other is emptied."""
    step = STAGE_BYTES // flat.element_size()
    side = torch.cuda.Stream(flat.device)
    side.wait_stream(torch.cuda.current_stream(flat.device))
    buffers = [torch.empty(min(step, len(flat)), pin_memory=True) for _ in range(2)]
    filling: deque[tuple[Tensor, Tensor, torch.cuda.Event]] = deque()

    def empty_oldest() -> None:
        into, buffer, filled = filling.popleft()
        filled.synchronize()
        into.copy_(buffer)

    for number, (part, into) in enumerate(zip(flat.split(step), copy.split(step), strict=True)):
        if len(filling) == len(buffers):
            empty_oldest()
        buffer = buffers[number % len(buffers)][: len(part)]
        filled = torch.cuda.Event()
        with torch.cuda.stream(side):
            buffer.copy_(part, non_blocking=True)
            filled.record(side)
        filling.append((into, buffer, filled))
    while filling:
        empty_oldest()
