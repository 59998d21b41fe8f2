"""Every channel that a process of the cluster opens to another one, made in one place.

All have keepalive, so that a peer that hangs, or a machine that is gone, is found within a minute,
and none goes through a proxy: `http_proxy` is meant for what lies outside the cluster, and would
otherwise take even what goes to loopback. With certificates they speak TLS.
"""

from collections.abc import Callable, Sequence
from typing import Any

import grpc

from tinsmith.channels import Options, ReopenedChannel
from tinsmith.keys import Metadata, nothing, showing
from tinsmithd import tracing
from tinsmithd.rpc.credentials import ClientCredentials
from tinsmithd.tls import Certificates

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


def open_channel(target: str, *, certificates: Certificates | None = None) -> grpc.Channel:
    """A channel for threads that may block, with the certificates as they are now.

    Args:
        target: Where to.
        certificates: By what both sides know each other; None is plain text.
    """
    options = list(_OPTIONS)
    if certificates is None:
        return grpc.insecure_channel(target, options=options)
    credentials = ClientCredentials(certificates).current()
    return grpc.secure_channel(target, credentials, options=options)


def open_aio_channel(
    target: str,
    shown: Callable[[str], Metadata] = nothing,
    *,
    certificates: Certificates | None = None,
    more: Options = (),
) -> grpc.aio.Channel:
    """A channel for coroutines of the loop that runs now.

    Its calls say for which call they are made.

    Args:
        target: Where to.
        shown: Gives what each call shows besides, see `tinsmith.keys.showing`.
        certificates: By what both sides know each other; None is plain text. Calls that begin after
            the files were replaced are made with what they hold then.
        more: Channel arguments beside the usual ones.
    """
    shown = tracing.carried(shown)
    options: Any = [*_OPTIONS, *more]
    if certificates is None:
        return showing(grpc.aio.insecure_channel(target, options=options), shown)
    channel = ReopenedChannel(
        ClientCredentials(certificates).current,
        lambda credentials: grpc.aio.secure_channel(target, credentials, options=options),
    )
    return showing(channel, shown)


_TLS_HINTS = {
    "WRONG_VERSION_NUMBER": "it speaks no TLS, and this process does: cluster_tls_ca_file is set",
    "CERTIFICATE_VERIFY_FAILED": "cluster_tls_ca_file does not vouch for its certificate, or that "
    "is not good at this time",
    "Hostname Verification": "its certificate is for another name than it is called by here",
    "security handshaker": "the files of cluster_tls_... cannot be used",
}
_NO_CONNECTION = "failed to connect"
_HUNG_UP = ("Socket closed", "Connection reset", "Broken pipe", "End of TCP stream")


def tls_hint(error: grpc.RpcError) -> str:
    """What an operator should look at where a connection failed for TLS; empty for other failures.

    gRPC tells what failed last: where a name has several addresses, and another one answers
    nothing, that may be all there is to see.

    Args:
        error: What a stub raised.
    """
    text = (error.details() or "") if isinstance(error, grpc.Call | grpc.aio.AioRpcError) else ""
    if _NO_CONNECTION in text and any(part in text for part in _HUNG_UP):
        return "it hung up: it may speak TLS, or not know the certificate that was shown"
    return next((hint for part, hint in _TLS_HINTS.items() if part in text), "")
