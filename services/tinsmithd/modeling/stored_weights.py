"""The weights of a base model in its files: read in slices, without a copy of them in memory."""

import os
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

from tinsmithd.modeling.weight_files import refused
from tinsmithd.modeling.weight_layout import Piece, pieces_of

BLOCK_BYTES = 16 << 20
"""Maximum bytes that are read at once: all the host memory that reading takes."""

PROGRESS_S = 2.0
"""Seconds between two lines about progress."""


class StoredWeights:
    """The weights of a model, as its modules have them, in files; a context manager.

    Args:
        model: The model. Its parameters are on the meta device, with the dtypes that are wanted;
            their names and shapes were checked against the files.
        folder: The folder with the files.
        on_progress: Takes a line for a person now and then.

    Raises:
        NotFound: A file cannot be read, now or later, or not in slices (BASE_MODEL_NOT_FOUND).
    """

    def __init__(self, model: Any, folder: Path, on_progress: Callable[[str], None]) -> None:
        self._folder = folder
        self._parameters: dict[str, torch.Tensor] = dict(model.named_parameters())
        self._pieces = pieces_of(model, folder)
        self._files: dict[Path, int] = {}
        pinned = torch.cuda.is_available()
        self._block = torch.empty(BLOCK_BYTES, dtype=torch.uint8, pin_memory=pinned)
        count = sum(parameter.numel() for parameter in self._parameters.values())
        self._progress = _Progress(count, on_progress)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for file in self._files.values():
            os.close(file)

    def keep(self, name: str, start: int, out: torch.Tensor) -> None:
        """Read what this process keeps of a parameter; `read`, with progress.

        Args:
            name: Name of the parameter.
            start: Number of the first element, flat.
            out: Takes as many elements as it has, `(n,)`; it has any dtype, and is on any device.
        """
        self.read(name, start, out)
        self._progress.add(self._parameters[name].numel(), out.nbytes)

    def read(self, name: str, start: int, out: torch.Tensor) -> None:
        """Read elements of a parameter; see `keep`."""
        stop = start + len(out)
        for piece in self._pieces[name]:
            first, last = max(start, piece.start), min(stop, piece.stop)
            if first < last:
                self._read(piece, first, out[first - start : last - start])

    def sample(self, name: str, step: int) -> torch.Tensor:
        """Every `step`-th element of a parameter, from the first one on, in its dtype."""
        found = []
        for piece in self._pieces[name]:
            numbers = range(-(-piece.start // step) * step, piece.stop, step)
            elements = torch.empty(len(numbers), dtype=piece.dtype)
            for at, number in enumerate(numbers):
                element = elements[at : at + 1].view(torch.uint8)
                self._fill(piece.path, element, piece.offset_of(number))
            found.append(elements.to(self._parameters[name].dtype))
        return torch.cat(found)

    def equal(self, first: str, second: str) -> bool:
        """Whether two parameters of one shape and dtype have the same values."""
        count, dtype = self._parameters[first].numel(), self._parameters[first].dtype
        ours = torch.empty(BLOCK_BYTES // dtype.itemsize, dtype=dtype)
        theirs = torch.empty_like(ours)
        for start in range(0, count, len(ours)):
            parts = [block[: count - start] for block in (ours, theirs)]
            for name, part in zip((first, second), parts, strict=True):
                self.read(name, start, part)
            if not torch.equal(*parts):
                return False
        return True

    def _read(self, piece: Piece, first: int, out: torch.Tensor) -> None:
        size = piece.dtype.itemsize
        for part in out.split(BLOCK_BYTES // size):
            block = self._block[: len(part) * size]
            self._fill(piece.path, block, piece.offset_of(first))
            part.copy_(block.view(piece.dtype))
            first += len(part)

    def _fill(self, path: Path, out: torch.Tensor, offset: int) -> None:
        """Read bytes of a file; `out` is uint8, in host memory."""
        rest: memoryview = out.numpy().data
        try:
            if path not in self._files:
                self._files[path] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            while rest:
                count = os.preadv(self._files[path], [rest], offset)
                if not count:
                    raise OSError("it was cut while it was read")
                rest, offset = rest[count:], offset + count
        except OSError as error:
            raise refused(self._folder, f"{path.name}: {error}") from error


class _Progress:
    """Says how far loading is, by the parameters of which this process has what it keeps."""

    def __init__(self, elements: int, say: Callable[[str], None]) -> None:
        self._elements, self._say = elements, say
        self._elements_done = self._bytes_done = 0
        self._start_s = self._said_s = time.monotonic()

    def add(self, elements: int, bytes_kept: int) -> None:
        """Count a parameter of so many elements, of which so many bytes are kept."""
        self._elements_done += elements
        self._bytes_done += bytes_kept
        now_s = time.monotonic()
        if now_s - self._said_s < PROGRESS_S:
            return
        self._said_s = now_s
        share = self._elements_done / self._elements
        done, whole = self._bytes_done / 1e9, self._bytes_done / share / 1e9
        left_s = (now_s - self._start_s) * (1 / share - 1)
        self._say(f"loaded {done:.1f} of {whole:.1f} GB, about {left_s:.0f} s left")
