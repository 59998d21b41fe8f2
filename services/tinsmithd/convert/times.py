"""Points in time and spans of time on the wire."""

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from tinsmithd.errors import InvalidArgument, over_limit

TTL_S_MAX = 315_360_000
"""Ten years: a checkpoint that is to live for longer is to live for ever."""
NANOS_PER_S = 1_000_000_000


def timestamp_to_pb(seconds: float) -> Timestamp:
    """Write a point in time, seconds since 1970."""
    whole, nanos = divmod(int(seconds * NANOS_PER_S), NANOS_PER_S)
    return Timestamp(seconds=whole, nanos=nanos)


def duration_to_pb(seconds: float) -> Duration:
    """Write a span of time in seconds."""
    span = Duration()
    span.FromNanoseconds(round(seconds * NANOS_PER_S))
    return span


def ttl_to_pb(seconds: int | None) -> Duration | None:
    """Write a time to live; None means for ever, which is an unset field."""
    return None if seconds is None else Duration(seconds=seconds)


def ttl_from_pb(ttl: Duration | None, field: str) -> int | None:
    """Read a time to live in seconds; None, an unset field, means for ever.

    Raises:
        InvalidArgument: It is not a whole number of seconds, or outside 1 to `ttl_max`
            (LIMIT_EXCEEDED).
    """
    if ttl is None:
        return None
    if ttl.nanos:
        raise InvalidArgument(field, "is not a whole number of seconds")
    if ttl.seconds > TTL_S_MAX:
        raise over_limit(field, "ttl_max", ttl.seconds, TTL_S_MAX)
    if ttl.seconds < 1:
        raise InvalidArgument(field, f"{ttl.seconds} s is not in 1..{TTL_S_MAX} s")
    return ttl.seconds
