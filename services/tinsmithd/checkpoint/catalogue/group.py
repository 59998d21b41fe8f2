"""Transactions that wait at the same time are committed together, by the thread of one of them."""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from tinsmithd.checkpoint.catalogue.rows import Rows

T = TypeVar("T")

GROUP_MAX = 256
"""Maximum number of transactions that are committed together."""


@dataclass
class Job:
    """One transaction that waits for its commit.

    Attributes:
        body: What it does.
        subject: What it is about, for errors.
        rows: What it would change; None where it failed.
        result: What its body returned.
        error: Why it failed.
        done: Whether it is over.
        woken: It is over, or leads.
    """

    body: Callable[[Rows], Any]
    subject: str
    rows: Rows | None = None
    result: Any = None
    error: Exception | None = None
    done: bool = False
    woken: threading.Event = field(default_factory=threading.Event)


class Group:
    """Commits transactions of many threads.

    Args:
        commit: Commits some: it sets their results and errors, or raises what all of them meet.
    """

    def __init__(self, commit: Callable[[Sequence[Job]], None]) -> None:
        self._commit = commit
        self._led = False
        self._lock = threading.Lock()
        self._queue: list[Job] = []

    def __len__(self) -> int:
        return len(self._queue)

    def write(self, body: Callable[[Rows], T], subject: str) -> tuple[Rows, T]:
        """Commit a transaction; returns what it changed and what its body did, or raises that."""
        job = Job(body, subject)
        with self._lock:
            self._queue.append(job)
            leads, self._led = not self._led, True
        if not leads:
            job.woken.wait()
        if not job.done:
            self._lead()
        if job.error is not None:
            raise job.error
        result: T = job.result
        assert job.rows is not None
        return job.rows, result

    def _lead(self) -> None:
        """Commit for all who wait, this thread's job first; then the next one leads, if any is."""
        with self._lock:
            jobs, self._queue = self._queue[:GROUP_MAX], self._queue[GROUP_MAX:]
        try:
            self._finish(jobs)
        finally:
            with self._lock:
                following = self._queue[:1]
                self._led = bool(following)
            for job in (*jobs, *following):
                job.woken.set()

    def _finish(self, jobs: Sequence[Job]) -> None:
        try:
            self._commit(jobs)
        except Exception as error:
            for job in jobs:
                job.error = error
        finally:
            for job in jobs:
                job.done = True
