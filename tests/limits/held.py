"""What it is to hold a limit: at its value a call passes, one above is refused by name."""

import contextlib
import re
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import psutil
from google.rpc import error_details_pb2

from tinsmith.status import status_of

Case = Callable[[int], None]
"""Makes a call of so many of what a limit counts; raises what refuses it."""


@dataclass
class Refusal(Exception):
    """A call was refused: its status, the reason, and the limit that is named."""

    status: str
    reason: str
    limit: str


@dataclass(frozen=True)
class Held:
    """What came of one limit.

    Attributes:
        limit: Its name.
        refusal: What the call above it was told.
        refused_ms: How long that took.
        refused_bytes: What it would have sent.
        grew_bytes: How much more memory the server had meanwhile than before, at most.
    """

    limit: str
    refusal: Refusal
    refused_ms: float
    refused_bytes: int
    grew_bytes: int


class Limits:
    """Holds the limits of one server.

    Args:
        pid: The server's process.
        values: What each limit is, as the server says it.
        cases: What is tried, by limit.

    Attributes:
        above: The limit that a call is to be above, if any.
        otherwise: Limits at which a call is refused all the same, for what it holds and not for how
            much.
    """

    otherwise: Collection[str] = ()

    def __init__(self, pid: int, values: Mapping[str, int], cases: Mapping[str, Case]) -> None:
        self.values, self._cases = values, cases
        self._process = psutil.Process(pid)
        self.above = ""
        self._took_ms, self._sent_bytes, self._is_refused = 0.0, 0, False
        self._before_bytes = 0

    @property
    def names(self) -> list[str]:
        """Limits that are tried here."""
        return list(self._cases)

    @contextlib.contextmanager
    def sending(self, nbytes: int = 0) -> Iterator[None]:
        """The call that is at the limit or above it is made in the body of the `with`; what a case
        does besides is not counted."""
        begun_s, is_refused = time.perf_counter(), True
        try:
            yield
            is_refused = False
        finally:
            if is_refused or not self._is_refused:  # of several calls that which is refused
                self._took_ms = (time.perf_counter() - begun_s) * 1e3
                self._sent_bytes, self._is_refused = nbytes, is_refused

    def prepare(self) -> None:
        """Make what a case needs."""

    def tidy(self) -> None:
        """Take away what a case has made."""

    def hold(self, limit: str) -> Held:
        """Make a call at a limit, which must not be refused for it, and one above, which must be.

        Raises:
            AssertionError: It was the other way.
        """
        case, most = self._cases[limit], self.values[limit]
        self.above = ""
        self.prepare()
        refusal = self._refusal(case, most)
        if limit in self.otherwise:
            assert refusal is not None, f"{limit}: {most} is not refused for what it holds"
            assert refusal.limit != limit, f"{limit}: {most}: {refusal}"
        else:
            assert refusal is None, f"{limit}: {most}: {refusal}"
        self.tidy()
        self.above = limit
        self.prepare()
        self.measure()
        refusal = self._refusal(case, most + 1)
        grew_bytes = self._peak() - self._before_bytes
        self.tidy()
        assert refusal is not None, f"{limit}: {most + 1} passes"
        return Held(limit, refusal, self._took_ms, self._sent_bytes, grew_bytes)

    def grew_by(self, call: Callable[[], object]) -> tuple[grpc.StatusCode | None, int]:
        """How a call ended, and how much more memory the server had meanwhile, at most."""
        code = None
        self.measure()
        try:
            call()
        except grpc.RpcError as error:
            code = error.code()  # type: ignore[attr-defined]
        return code, self._peak() - self._before_bytes

    def _refusal(self, case: Case, count: int) -> Refusal | None:
        begun_s = time.perf_counter()
        self._took_ms, self._sent_bytes, self._is_refused = 0.0, 0, False
        try:
            case(count)
        except Refusal as refusal:
            return refusal
        except grpc.RpcError as error:
            return refusal_of(error)
        finally:
            self._took_ms = self._took_ms or (time.perf_counter() - begun_s) * 1e3
        return None

    def measure(self) -> None:
        """Look from now on at what memory the server takes: a case that makes a call which may well
        take some says when that is over."""
        Path(f"/proc/{self._process.pid}/clear_refs").write_text("5")
        self._before_bytes = self._process.memory_info().rss

    def _peak(self) -> int:
        """The most memory that the process had since `measure`."""
        for line in Path(f"/proc/{self._process.pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
        raise AssertionError("the system does not say it")


def refusal_of(error: grpc.RpcError) -> Refusal:
    """What a call was refused with."""
    info = error_details_pb2.ErrorInfo()
    status = status_of(error)
    assert status is not None, error
    for detail in status.details:
        if detail.Is(info.DESCRIPTOR):
            detail.Unpack(info)
    code: Any = error
    said = re.search(r"(\w+_max)\b", status.message)
    limit = info.metadata.get("limit", said[1] if said else "")
    return Refusal(code.code().name, info.reason, limit)
