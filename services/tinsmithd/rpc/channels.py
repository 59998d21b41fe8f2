"""Every channel that a process of the cluster opens to another one, made in one place.

All have keepalive, so that a peer that hangs, or a machine that is gone, is found within a minute,
and none goes through a proxy: `http_proxy` is meant for what lies outside the cluster, and would
otherwise take even what goes to loopback.
"""

from collections.abc import Sequence

import grpc

KEEPALIVE_MS = 30_000
"""Time between two pings, milliseconds; the servers refuse a client that pings more often."""
KEEPALIVE_TIMEOUT_MS = 20_000

_OPTIONS: Sequence[tuple[str, int]] = (
    ("grpc.enable_http_proxy", 0),
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    ("grpc.keepalive_time_ms", KEEPALIVE_MS),
    ("grpc.keepalive_timeout_ms", KEEPALIVE_TIMEOUT_MS),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 5_000),
)


def open_channel(target: str) -> grpc.Channel:
    """A channel for threads that may block."""
    return grpc.insecure_channel(target, options=list(_OPTIONS))


def open_aio_channel(target: str) -> grpc.aio.Channel:
    """A channel for coroutines of the loop that runs now."""
    return grpc.aio.insecure_channel(target, options=list(_OPTIONS))
