"""Which call is being served, in this task and in those that it starts.

A task that outlives its call, or works for several, says so: `forget`, and `at` for each of them.
"""

import contextlib
import contextvars
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from tinsmithd.tracing.ids import TRACEPARENT, SpanIds, read_traceparent

REQUEST_ID = "x-request-id"
"""Metadata, or a header, in which a caller names its request."""
_CLAIM = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,63}")

Metadata = Sequence[tuple[str, str | bytes]]


@dataclass(slots=True)
class ServedCall:
    """A call, or a request of HTTP.

    Attributes:
        method: `/package.Service/Method`, or `GET Route`.
        tenant: Whose; empty until that is known.
        claim: What the caller calls it; empty where it does not say.
        parent: The span that it is part of, which another process began.
        failure: What it was refused with; empty while it was not.
        given_id: What another process of the cluster calls it; empty: this one draws an id.
    """

    method: str
    tenant: str = ""
    claim: str = ""
    parent: SpanIds | None = None
    failure: str = ""
    given_id: str = field(default="", repr=False)

    @property
    def request_id(self) -> str:
        """Names it in logs and errors of this process."""
        if not self.given_id:  # most calls need none
            self.given_id = os.urandom(8).hex()
        return self.given_id


class Here(NamedTuple):
    """Where a task is.

    Attributes:
        call: The call that it serves.
        span: The span that it is in; None where there are none.
    """

    call: ServedCall
    span: SpanIds | None


class Mark(NamedTuple):
    """Where and when something began that another task goes on with.

    Attributes:
        here: Where; None: in no call.
        since_ns: When; 0 where there are no spans.
    """

    here: Here | None = None
    since_ns: int = 0

    def again(self) -> "Mark":
        """The same, from now on."""
        return Mark(self.here, time.time_ns() if is_timed else 0)


NOWHERE = Mark()
_here: contextvars.ContextVar[Here | None] = contextvars.ContextVar("here", default=None)
is_timed = False
"""Whether anybody wants to know when something began; `spans` says so."""


def here() -> Here | None:
    """Where this task is; None: in no call."""
    return _here.get()


def enter(place: Here | None) -> "contextvars.Token[Here | None]":
    """Be somewhere else, until `leave`."""
    return _here.set(place)


def leave(token: "contextvars.Token[Here | None]") -> None:
    """Be where this task was before."""
    _here.reset(token)


def forget() -> None:
    """This task works for nobody's call any more."""
    _here.set(None)


def mark() -> Mark:
    """Remember where this task is, and when."""
    return Mark(_here.get(), time.time_ns() if is_timed else 0)


def begin(call: ServedCall) -> None:
    """Serve a call in this task from now on, which is for that call alone."""
    _here.set(Here(call, call.parent))


@contextlib.contextmanager
def serving(call: ServedCall) -> Iterator[ServedCall]:
    """Serve a call in the body of the `with`."""
    token = _here.set(Here(call, call.parent))
    try:
        yield call
    finally:
        # A generator that is closed late is closed in another context, where this is no news.
        with contextlib.suppress(ValueError):
            _here.reset(token)


def claimed(method: str, said: Iterable[tuple[Any, Any]]) -> ServedCall:
    """A call as its metadata, or its headers, say it: all of that is a claim.

    Args:
        method: As in `ServedCall`.
        said: Names, in lower case, and values.
    """
    call = ServedCall(method)
    for name, value in said:
        if name == TRACEPARENT:
            call.parent = read_traceparent(value)
        elif name == REQUEST_ID and isinstance(value, str) and _CLAIM.fullmatch(value):
            call.claim = value
    return call


def traceparent() -> str:
    """The span that this task is in, as another process is told it; empty: none."""
    place = _here.get()
    return place.span.traceparent if place is not None and place.span is not None else ""


def carried(shown: Callable[[str], Metadata]) -> Callable[[str], Metadata]:
    """What calls show to another server of the cluster: for which call they are made, too.

    Args:
        shown: What else they show, by their method.
    """

    def show(method: str) -> Metadata:
        place = _here.get()
        if place is None:
            return shown(method)
        call = place.call
        more: Metadata = ((REQUEST_ID, call.claim or call.request_id),)
        if place.span is not None:
            more = (*more, (TRACEPARENT, place.span.traceparent))
        return (*shown(method), *more)

    return show


def logged() -> Mapping[str, str]:
    """What a line of a log says of where it was written."""
    place = _here.get()
    if place is None:
        return {}
    call = place.call
    found = {"request_id": call.request_id, "method": call.method}
    if call.claim:
        found["caller_request_id"] = call.claim
    if call.tenant:
        found["tenant"] = call.tenant
    if place.span is not None:
        found["trace_id"] = f"{place.span.trace_id:032x}"
        found["span_id"] = f"{place.span.span_id:016x}"
    return found
