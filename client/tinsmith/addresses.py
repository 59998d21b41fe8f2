"""Where the three services of a cluster are, and how channels to them are opened."""

import ipaddress
import os
from collections.abc import Sequence

from tinsmith._check import shown, text
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
SPREAD = (
    "grpc.service_config",
    '{"loadBalancingConfig":[{"pick_first":{"shuffleAddressList":true}}]}',
)
"""Channel argument for a service of which each server answers every call, where its address stands
for several: each channel takes one of them by chance, and the next where that one is gone. A name
with several addresses is such an address, and `ipv4:10.0.0.1:50053,10.0.0.2:50053`."""

DEFAULT_ADDRESS = "127.0.0.1:50051"
ADDRESS_VARIABLES = ("TINSMITH_ADDRESS", "TINKER_BASE_URL")
GATEWAY_VARIABLE = "TINSMITH_HTTP_URL"
"""Says where the HTTP gateway is, where the cluster does not. No section of a server's settings may
begin as it does."""
SECURE = "https://"
"""Before an address that is spoken to with TLS; see `tinsmith.channels`."""
SECURE_PORT = 443
PLAIN = "http://"

PROXY_VARIABLES = ("grpc_proxy", "https_proxy", "http_proxy")
NO_PROXY_VARIABLES = ("no_grpc_proxy", "no_proxy")


def address_of(given: str | None) -> str:
    """The address from an argument, `TINSMITH_ADDRESS`, `TINKER_BASE_URL`, or the default.

    Raises:
        InvalidArgumentError: As `checked`; `field` says which of them.
    """
    if given is not None:
        return checked(given, "base_url")
    for variable in ADDRESS_VARIABLES:
        if found := os.environ.get(variable):
            return checked(found, variable)
    return DEFAULT_ADDRESS


def checked(given: object, where: str) -> str:
    """`host:port`, with `SECURE` before it where it is spoken to with TLS.

    Args:
        given: That, or a URL: `http://host:port`, `https://host`, `https://host:port`.
        where: Names the argument in an error.

    Raises:
        InvalidArgumentError: It has no port, or a path or a password in it, which nothing carries.
    """
    address = text(given, where)
    scheme, separator, rest = address.rpartition("://")
    if separator and scheme.lower() not in ("http", "https"):
        why = f"{shown(given)} begins with {shown(scheme)}, expected http or https"
        raise InvalidArgumentError(f"{where}: {why}", field=where)
    host, _, path = rest.partition("/")
    if path.strip("/") or "?" in rest or "#" in rest:
        why = f"{shown(given)} is more than scheme, host and port: gRPC carries no path"
        raise InvalidArgumentError(f"{where}: {why}", field=where)
    if "@" in host:
        why = "has a user or a password in it, which gRPC does not send"
        raise InvalidArgumentError(f"{where}: {why}", field=where)
    secure = scheme.lower() == "https"
    if secure and not has_port(host):
        host = f"{host}:{SECURE_PORT}"
    name, _, port = host.rpartition(":")
    if not name or not (port.isascii() and port.isdigit() and int(port) <= 65_535):
        raise InvalidArgumentError(f"{where}: {shown(given)} is not host:port", field=where)
    return f"{SECURE}{host}" if secure else host


def is_http1(message: str) -> bool:
    """Whether gRPC's own text says that the other side is a server of HTTP/1.1."""
    return "http1.x" in message or "Failed parsing HTTP/2" in message


def channel_options(address: str) -> Sequence[tuple[str, int]]:
    """Channel arguments for one address: `CHANNEL_OPTIONS`, and no proxy to this machine itself."""
    if is_local(address):
        return (*CHANNEL_OPTIONS, ("grpc.enable_http_proxy", 0))
    return CHANNEL_OPTIONS


def proxy_note(address: str) -> str:
    """Says which proxy stands between this process and an address; empty where none does.

    gRPC goes through the first of `PROXY_VARIABLES` that is set, unless the first of
    `NO_PROXY_VARIABLES` names the host, and its own errors then name the proxy's address.
    """
    variable = next((name for name in PROXY_VARIABLES if os.environ.get(name)), None)
    if variable is None or is_local(address):
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
    name = address.removeprefix(SECURE).rpartition("///")[2]
    name = name.removeprefix("ipv4:").removeprefix("ipv6:")
    return name.rpartition(":")[0].strip("[]")


def is_local(address: str) -> bool:
    """Whether an address is this machine's own, as far as its text says."""
    """Whether an address is one of this machine's own."""
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
    if "/" in address or not has_port(address) or is_local(address) or proxy_note(address):
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
        base: The address that the capabilities came from. Where that is spoken to with TLS the
            other services are, too, unless the environment says `http://`.
        given: `sampler_address` or `checkpoint_address`. Empty means `base` (a proxy in front of
            all services); `:port` means that port on the host of `base`. That of the Sampler may
            be a list with commas, and so is the result then.

    Raises:
        InvalidArgumentError: What the environment says is not `host:port` (also a ValueError).
    """
    variable = f"TINSMITH_ADDRESS_{service.upper()}"
    scheme = SECURE if base.startswith(SECURE) else ""
    if here := os.environ.get(variable):
        hosts = hosts_of(here) if service == "sampler" else [here]
        if not hosts or not all(map(has_port, hosts)) or (service != "sampler" and "," in here):
            message = f"{variable}: {here!r} is not host:port"
            raise InvalidArgumentError(message, field=variable)
        return ",".join(_with_scheme(host, scheme) for host in hosts)
    if not given:
        return base
    own_host = base.rpartition(":")[0]
    hosts = hosts_of(given) if service == "sampler" else [given]
    return ",".join(f"{own_host if host.startswith(':') else scheme}{host}" for host in hosts)


def _with_scheme(host: str, scheme: str) -> str:
    return host.removeprefix(PLAIN) if "://" in host else f"{scheme}{host}"
