"""An event loop whose time is simulated, and processes that can be killed or stopped on it.

Time stands still while something is ready and jumps to the next timer otherwise. What a process
runs carries it in its context, so the loop can leave it out: a process that was killed never runs
another line, not even to clean up, and one that was stopped runs all it missed when it goes on.
"""

import asyncio
import contextvars
import heapq
from collections.abc import Callable, Coroutine
from typing import Any

PROCESS: contextvars.ContextVar["Process | None"] = contextvars.ContextVar("process", default=None)


class Killed(BaseException):
    """Ends the code that runs in the moment in which its process dies."""


class Hang(Exception):
    """Nothing is ready and no timer is set: whoever waits waits for ever."""


class SimFuture(asyncio.Future[Any]):
    """A future that knows whose it is."""

    __slots__ = ("process",)


class SimTask(asyncio.Task[Any]):
    """A task that knows whose it is."""

    __slots__ = ("process",)


class Process:
    """Something that can die or stop at any step.

    Attributes:
        steps: Callbacks that it ran.
        doom_at: At this step `doom` is called instead.
    """

    def __init__(self, loop: "SimLoop", name: str) -> None:
        self.name = name
        self.alive = True
        self.stopped = False
        self.steps = 0
        self.doom_at = 0
        self.doom: Callable[[], None] = self.kill
        self._loop = loop
        self._backlog: list[asyncio.Handle] = []
        self.context = contextvars.Context()
        self.context.run(PROCESS.set, self)

    def start(self, work: Coroutine[Any, Any, Any], name: str = "") -> asyncio.Task[Any]:
        """Begin a task of this process."""
        return self._loop.create_task(work, name=name or None, context=self.context.copy())

    def call(self, function: Callable[..., object], *args: object) -> None:
        """Call something in this process, as soon as it runs."""
        self._loop.call_soon(function, *args, context=self.context)

    def kill(self) -> None:
        """From now on it runs nothing any more."""
        self.alive = False
        self._loop.keep_all()

    def stop(self) -> None:
        """Run nothing until `resume`."""
        self.stopped = True

    def resume(self) -> None:
        """Run what was missed."""
        self.stopped = False
        if self.alive:
            self._loop.run_late(self._backlog)
        self._backlog = []

    def takes(self, handle: asyncio.Handle) -> bool:
        """Whether it runs this now."""
        if not self.alive:
            return False
        if self.stopped:
            self._backlog.append(handle)
            return False
        self.steps += 1
        if self.steps == self.doom_at:
            self.doom()
            return self.takes(handle)
        return True


class SimLoop(asyncio.BaseEventLoop):
    """See the module.

    Args:
        on_unhandled: Told of exceptions that nobody took care of.
    """

    def __init__(self, on_unhandled: Callable[[str], None]) -> None:
        super().__init__()
        self._now = 0.0
        self._on_unhandled = on_unhandled
        self._kept: list[object] = []
        self.over = False
        self.set_task_factory(_make_task)
        self.set_exception_handler(self._unhandled)

    def time(self) -> float:
        """Seconds since the run began."""
        return self._now

    def create_future(self) -> SimFuture:
        """A future of the process that runs now."""
        future = SimFuture(loop=self)
        future.process = PROCESS.get()
        return future

    def keep_all(self) -> None:
        """Keep what is pending: a dead task that nobody holds would clean up when it goes."""
        self._kept.append(asyncio.all_tasks(self))

    def run_late(self, handles: list[asyncio.Handle]) -> None:
        """Run callbacks of a process that was stopped, in order."""
        self._ready.extend(handles)

    def end(self) -> None:
        """Drop everything: nothing runs any more, and what is destroyed says nothing."""
        self.over = True
        for task in asyncio.all_tasks(self):
            task._log_destroy_pending = False
        self._ready.clear()
        self._scheduled.clear()
        self._kept.clear()
        self.close()

    def _run_once(self) -> None:
        ready, timers = self._ready, self._scheduled
        if not ready:
            while timers and timers[0]._cancelled:
                heapq.heappop(timers)._scheduled = False
            if not timers:
                raise Hang
            self._now = max(self._now, timers[0]._when)
        while timers and timers[0]._when <= self._now:
            timer = heapq.heappop(timers)
            timer._scheduled = False
            ready.append(timer)
        for _ in range(len(ready)):
            handle = ready.popleft()
            if handle._cancelled:
                continue
            process = handle._context.get(PROCESS)
            if process is None or process.takes(handle):
                handle._run()

    def _unhandled(self, loop: object, context: dict[str, Any]) -> None:
        error = context.get("exception")
        owner = context.get("future") or context.get("task")
        if not isinstance(owner, SimTask | SimFuture) and "handle" in context:
            owner = None
            process = context["handle"]._context.get(PROCESS)
        else:
            process = getattr(owner, "process", None)
        if self.over and error is None:
            return
        if isinstance(error, Killed) or (process is not None and not process.alive):
            return
        self._on_unhandled(f"{context.get('message')}: {error!r}")

    def _process_events(self, event_list: object) -> None:
        """There are no files and sockets."""

    def _write_to_self(self) -> None:
        """There is nobody to wake."""


def _make_task(
    loop: asyncio.AbstractEventLoop,
    work: Coroutine[Any, Any, Any],
    context: contextvars.Context | None = None,
) -> SimTask:
    task = SimTask(work, loop=loop, context=context)
    task.process = context.get(PROCESS) if context is not None else PROCESS.get()
    return task
