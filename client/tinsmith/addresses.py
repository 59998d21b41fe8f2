"""Where the three services of a cluster are, and how channels to them are opened."""

import ipaddress
import os
from collections.abc import Sequence

from tinsmith.errors import InvalidArgumentError

CHANNEL_OPTIONS: Sequence[tuple[str, int]] = (
    ("grpc.max_receive_message_length", 64 * 1024 * 1024),
    ("grpc.max_send_message_length", 64 * 1024 * 1024),
    ("grpc.keepalive_time_ms", 60_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 2_000),
)
"""Channel arguments that suit the servers: message sizes in bytes, times in milliseconds."""


PROXY_VARIABLES = ("grpc_proxy", "https_proxy", "http_proxy")
NO_PROXY_VARIABLES = ("no_grpc_proxy", "no_proxy")


def channel_options(address: str) -> Sequence[tuple[str, int]]:
    """Channel arguments for one address: `CHANNEL_OPTIONS`, and no proxy to this machine itself."""
    if _is_local(address):
        return (*CHANNEL_OPTIONS, ("grpc.enable_http_proxy", 0))
    return CHANNEL_OPTIONS


def proxy_note(address: str) -> str:
    """Says which proxy stands between this process and an address; empty where none does.

    gRPC goes through the first of `PROXY_VARIABLES` that is set, unless the first of
    `NO_PROXY_VARIABLES` names the host, and its own errors then name the proxy's address.
    """
    variable = next((name for name in PROXY_VARIABLES if os.environ.get(name)), None)
    if variable is None or _is_local(address):
        return ""
    host = _host(address)
    excluded = next((os.environ[name] for name in NO_PROXY_VARIABLES if os.environ.get(name)), "")
    if any(_covers(entry.strip(), host) for entry in excluded.split(",")):
        return ""
    # What is before the @ may be a password.
    proxy = os.environ[variable].rpartition("@")[2].rpartition("://")[2].rstrip("/")
    return (
        f"{address} is reached through the proxy {proxy}, which {variable} names; "
        f"no_grpc_proxy={host} goes without it"
    )


def _covers(entry: str, host: str) -> bool:
    """Whether an entry of `no_proxy`, the end of a name or a network, means a host."""
    try:
        return ipaddress.ip_address(host) in ipaddress.ip_network(entry, strict=False)
    except ValueError:
        return bool(entry) and host.endswith(entry)


def _host(address: str) -> str:
    name = address.rpartition("///")[2].removeprefix("ipv4:").removeprefix("ipv6:")
    return name.rpartition(":")[0].strip("[]")


def _is_local(address: str) -> bool:
    if address.startswith(("unix:", "unix-abstract:")):
        return True
    host = _host(address)
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def has_port(address: str) -> bool:
    """Whether an address is `host:port`."""
    return address.rpartition(":")[2].isdigit()


def hosts_of(address: str) -> Sequence[str]:
    """Each `host:port` of an address that may be a list with commas."""
    return [host for part in address.split(",") if (host := part.strip())]


def is_resolved_here(address: str) -> bool:
    """Whether this process itself has to ask which machines a `host:port` stands for.

    Not for an address that is no name, for this machine, for what only gRPC understands, and where
    a proxy looks names up.
    """
    if "/" in address or not has_port(address) or _is_local(address) or proxy_note(address):
        return False
    try:
        ipaddress.ip_address(_host(address))
    except ValueError:
        return True
    return False


def service_address(service: str, base: str, given: str) -> str:
    """Where a service is: as the environment says, else as GetCapabilities does.

    `TINSMITH_ADDRESS_SAMPLER` and `TINSMITH_ADDRESS_CHECKPOINT` are for a client that reaches the
    services by other names than the cluster knows, such as through `kubectl port-forward`.

    Args:
        service: `sampler` or `checkpoint`.
        base: The address that the capabilities came from, `host:port`.
        given: `sampler_address` or `checkpoint_address`. Empty means `base` (a proxy in front of
            all services); `:port` means that port on the host of `base`. That of the Sampler may
            be a list with commas, and so is the result then.

    Raises:
        InvalidArgumentError: What the environment says is not `host:port` (also a ValueError).
    """
    variable = f"TINSMITH_ADDRESS_{service.upper()}"
    if here := os.environ.get(variable):
        hosts = hosts_of(here) if service == "sampler" else [here]
        if not hosts or not all(map(has_port, hosts)) or (service != "sampler" and "," in here):
            message = f"{variable}: {here!r} is not host:port"
            raise InvalidArgumentError(message, field=variable)
        return ",".join(hosts)
    if not given:
        return base
    own_host = base.rpartition(":")[0]
    hosts = hosts_of(given) if service == "sampler" else [given]
    return ",".join(own_host + host if host.startswith(":") else host for host in hosts)
