"""Spans of the time that a call takes, where somebody collects them; else next to nothing.

A span says how long, never what: its attributes are numbers, and names that no caller chose.
"""

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from enum import Enum
from types import TracebackType
from typing import Protocol

from tinsmithd.tracing import calls
from tinsmithd.tracing.calls import Here, Mark
from tinsmithd.tracing.ids import SpanIds

Attributes = Mapping[str, str | int | float | bool]


class Kind(Enum):
    """Who a span is for: this process alone, or a caller of it."""

    INTERNAL = "internal"
    SERVER = "server"


class Span(Protocol):
    """A span that has begun."""

    @property
    def ids(self) -> SpanIds:
        """Which one."""

    def say(self, attributes: Attributes) -> None:
        """Add to what it says."""

    def rename(self, name: str) -> None:
        """Call it something else."""

    def end(self, failure: str = "", end_ns: int = 0) -> None:
        """It is over.

        Args:
            failure: What it failed with, such as a reason; empty where it did not.
            end_ns: When, in nanoseconds since 1970; 0 is now.
        """


class Tracer(Protocol):
    """What begins spans, and hands those that are over on."""

    def begin(
        self,
        name: str,
        parent: SpanIds | None,
        attributes: Attributes,
        *,
        kind: Kind = Kind.INTERNAL,
        since_ns: int = 0,
        links: Sequence[SpanIds] = (),
    ) -> Span:
        """Begin one, now or at `since_ns`."""

    def stop(self, within_s: float) -> None:
        """Hand on what is over, as far as that can be done in time; no more spans follow."""


_tracer: Tracer | None = None
_NOTHING: contextlib.AbstractContextManager[None] = contextlib.nullcontext()


def install(tracer: Tracer | None) -> None:
    """Make spans from now on; None makes none."""
    global _tracer
    _tracer, calls.is_timed = tracer, tracer is not None


def on() -> bool:
    """Whether there are spans."""
    return _tracer is not None


def stop(within_s: float) -> None:
    """This process ends: see `Tracer.stop`."""
    tracer = _tracer
    install(None)
    if tracer is not None:
        tracer.stop(within_s)


def now_ns() -> int:
    """When something begins of which `interval` tells; 0 where there are no spans."""
    return time.time_ns() if _tracer is not None else 0


class _Spanned:
    """A span for the body of a `with`."""

    __slots__ = ("_span", "_token")

    def __init__(self, place: Here, made: Span) -> None:
        self._span = made
        self._token = calls.enter(Here(place.call, made.ids))

    def __enter__(self) -> None:
        return None

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # A generator that is closed late is closed in another context.
        with contextlib.suppress(ValueError):
            calls.leave(self._token)
        self._span.end("" if kind is None else failure_of(error))


def span(
    name: str, *, kind: Kind = Kind.INTERNAL, **attributes: str | int | float | bool
) -> contextlib.AbstractContextManager[None]:
    """A span of the call that is being served, for the body of the `with` that this begins."""
    place = calls.here()
    if _tracer is None or place is None:
        return _NOTHING
    return _Spanned(place, _tracer.begin(name, place.span, attributes, kind=kind))


@contextlib.contextmanager
def served(name: str, attributes: Attributes) -> Iterator[Span | None]:
    """The span of a whole call; who has it says how the call ended. None where there are none."""
    place = calls.here()
    if _tracer is None or place is None:
        yield None
        return
    made = _tracer.begin(name, place.call.parent, attributes, kind=Kind.SERVER)
    token = calls.enter(Here(place.call, made.ids))
    failure = ""
    try:
        yield made
    except BaseException as error:
        failure = failure_of(error)
        raise
    finally:
        with contextlib.suppress(ValueError):
            calls.leave(token)
        made.end(place.call.failure or failure)


class at:  # it is used as a function
    """Work for the call of a mark, in the body of the `with`.

    Args:
        mark: Of where somebody else was.
        waited: Names the span of the time since then.
    """

    __slots__ = ("_mark", "_token", "_waited")

    def __init__(self, mark: Mark, waited: str) -> None:
        self._mark, self._waited = mark, waited

    def __enter__(self) -> None:
        self._token = calls.enter(self._mark.here)
        interval(self._waited, self._mark.since_ns)

    def __exit__(self, *_: object) -> None:
        calls.leave(self._token)


def interval(
    name: str,
    since_ns: int,
    place: Here | None = None,
    *,
    end_ns: int = 0,
    **attributes: str | int | float | bool,
) -> None:
    """A span that is over.

    Args:
        name: What took that time.
        since_ns: When it began, of `now_ns` or a mark.
        place: Of which call; None: of the one that is being served.
        end_ns: When it ended; 0 is now.
        attributes: What it says.
    """
    place = place or calls.here()
    if _tracer is None or place is None or not since_ns:
        return
    made = _tracer.begin(name, place.span, attributes, since_ns=since_ns)
    made.end(end_ns=end_ns)


def batch(name: str, each: str, since_ns: int, marks: Sequence[Mark]) -> None:
    """Something is over that was done for several calls at once.

    Each of them has a span of its own, from its mark on; where they are several, one more has links
    to all of these calls.

    Args:
        name: What was done.
        each: What that is for one of them.
        since_ns: When it began.
        marks: The calls.
    """
    if _tracer is None or not since_ns:
        return
    of_calls = [found for found in marks if found.here is not None and found.since_ns]
    for found in of_calls:
        interval(each, found.since_ns, found.here)
    linked = {found.here.span for found in of_calls if found.here is not None}
    links = [ids for ids in linked if ids is not None]
    if len(links) > 1:
        made = _tracer.begin(name, None, {"calls": len(links)}, since_ns=since_ns, links=links)
        made.end()


def failure_of(error: BaseException | None) -> str:
    """What a span says of an error: never its text, which may quote a caller."""
    return str(getattr(error, "reason", "")) or type(error).__name__
