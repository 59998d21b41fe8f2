"""Checks of the way to a cluster, and of what its servers say."""

import os
import socket
from collections.abc import Iterator, Sequence
from datetime import datetime

import tinsmith
from tinsmith._connection import TRAINING
from tinsmith.addresses import (
    ADDRESS_VARIABLES,
    DEFAULT_ADDRESS,
    NO_PROXY_VARIABLES,
    PROXY_VARIABLES,
    SECURE,
    address_of,
    proxy_note,
)
from tinsmith.cli.access import Access
from tinsmith.cli.command import Session
from tinsmith.cli.doctor import tls
from tinsmith.cli.doctor.findings import OK, SKIPPED, WARNING, WRONG, Finding
from tinsmith.cli.failures import Failed
from tinsmith.cli.metrics import scrape
from tinsmith.cli.records import moment_of
from tinsmith.cli.servers import SERVING, UNREACHABLE, Server, look_at
from tinsmith.cli.text import now, span
from tinsmith.errors import TinsmithError
from tinsmith.keys import KEY_VARIABLES, key_of
from tinsmith.v1 import training_service_pb2

CONNECT_TIMEOUT_S = 5.0
SKEW_S_MAX = 5.0
"""Clocks may differ so much without a word: lifetimes and certificates are not that exact."""
GATEWAY_PORT = 8080
NOT_LET_IN = ("UNAUTHENTICATED", "PERMISSION_DENIED")


def all_findings(session: Session, metrics: Sequence[str]) -> Iterator[Finding]:
    """What is so between here and the cluster, and with its servers."""
    try:
        address = address_of(session.address)
    except TinsmithError as error:
        yield Finding("address", WRONG, error.message, "host:port, or https://host:port")
        return
    yield Finding("address", OK, f"{address}, {_origin(session.address)}")
    yield _proxies(address)
    reached = _connection(address)
    yield reached
    servers: list[Server] = []
    if reached.state == OK:
        yield tls.finding(address)
        servers = session.access.run(_servers(session.access))
        yield from map(_server, servers)
    if not any(server.health == SERVING for server in servers):
        yield from _ports(address)
    yield _key(servers)
    yield from _versions(servers)
    yield from _clocks(session, servers, metrics)


def _origin(given: str | None) -> str:
    if given is not None:
        return "which --address names"
    variable = next((name for name in ADDRESS_VARIABLES if os.environ.get(name)), None)
    return f"which {variable} names" if variable else f"the default ({DEFAULT_ADDRESS})"


def _proxies(address: str) -> Finding:
    names = [*PROXY_VARIABLES, *NO_PROXY_VARIABLES]
    known = [name for name in names if os.environ.get(name)]
    # Programs differ in whether they read these; gRPC reads the others alone.
    ignored = [name.upper() for name in names if os.environ.get(name.upper()) and name not in known]
    if note := proxy_note(address):
        return Finding("proxies", WARNING, note, "many proxies cut long streams: go without")
    text = f"{', '.join(known)} set, and not used for {address}" if known else "none is used"
    if ignored:
        text += f"; gRPC does not read {', '.join(ignored)}"
    return Finding("proxies", OK, text)


def _connection(address: str) -> Finding:
    """Whether anybody accepts a connection; through a proxy that says nothing."""
    if proxy_note(address):
        return Finding("connection", OK, "not tried by itself: it goes through the proxy")
    host, _, port = address.removeprefix(SECURE).rpartition(":")
    try:
        found = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        hint = "is the name right, and does this machine ask the right name server?"
        return Finding("connection", WRONG, f"{host} cannot be looked up: {error}", hint)
    try:
        with socket.create_connection((host.strip("[]"), int(port)), CONNECT_TIMEOUT_S):
            pass
    except TimeoutError:
        hint = "a firewall, or a machine that is away; in Kubernetes, a NetworkPolicy"
        return Finding("connection", WRONG, f"{address} does not accept connections", hint)
    except OSError as error:
        hint = "`tinsmith up` starts a cluster here; `kubectl port-forward` reaches another one"
        return Finding("connection", WRONG, f"{address}: {error.strerror or error}", hint)
    addresses = ", ".join(dict.fromkeys(str(each[4][0]) for each in found))
    return Finding("connection", OK, f"{host} is {addresses}, and accepts connections")


async def _servers(access: Access) -> list[Server]:
    training = await look_at(access, TRAINING, access.address)
    if training.capabilities is None:
        return [training]
    places = (await access.places())[1:]
    return [training, *[await look_at(access, *place) for place in places]]


def _server(server: Server) -> Finding:
    text = f"{server.address}: {server.health}"
    if server.health == SERVING and not server.problem:
        models = ", ".join(str(model["name"]) for model in server.base_models)
        text += f", {server.answer_ms:.1f} ms" + (f", {models}" if models else "")
        return Finding(server.service, OK, text)
    if server.problem:
        text += f": {server.problem}"
    hint = "look at its log; it may be loading its base model"
    if server.health == UNREACHABLE:
        hint = "look whether it runs"
        if server.service != TRAINING:
            variable = f"TINSMITH_ADDRESS_{server.service.upper()}"
            hint += f"; {variable} names it where it has another address from here"
    return Finding(server.service, WRONG, text, hint)


def _key(servers: Sequence[Server]) -> Finding:
    """Whether a key is shown, and whether the servers take it."""
    variable = next((name for name in KEY_VARIABLES if os.environ.get(name)), None)
    shown = f"{variable} is shown with each call" if variable else "none is shown"
    try:
        key_of(None)
    except TinsmithError as error:
        return Finding("key", WRONG, error.message, "no such text can be a key")
    if refusing := [server.service for server in servers if server.reason in NOT_LET_IN]:
        hint = f"`tinsmith keys create` makes one, {KEY_VARIABLES[0]} holds it"
        return Finding("key", WRONG, f"{shown}, and refused by {', '.join(refusing)}", hint)
    return Finding("key", OK, shown if servers else f"{shown}; no server was asked")


def _ports(address: str) -> Iterator[Finding]:
    """Whether `tinsmith up` could have its ports here."""
    host, _, port = address.removeprefix(SECURE).rpartition(":")
    if host not in ("127.0.0.1", "localhost", "[::1]"):
        return
    wanted = [*range(int(port), int(port) + 3), GATEWAY_PORT]
    taken = [str(each) for each in wanted if each <= 65_535 and not _is_free(each)]
    if taken:
        hint = "`tinsmith up --port 0` takes free ones"
        text = f"of {', '.join(map(str, wanted))} another program has {', '.join(taken)}"
        yield Finding("ports", WARNING, text, hint)
    else:
        yield Finding("ports", OK, f"{', '.join(map(str, wanted))} are free for `tinsmith up`")


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def _versions(servers: Sequence[Server]) -> Iterator[Finding]:
    versions = {server.service: server.version for server in servers if server.version}
    if not versions:
        return
    own = tinsmith.__version__
    text = ", ".join(f"{service} {version}" for service, version in versions.items())
    if set(versions.values()) == {own}:
        yield Finding("versions", OK, f"all are {own}")
    elif len(set(versions.values())) > 1:
        hint = "an upgrade is under way, or one was forgotten"
        yield Finding("versions", WARNING, f"servers differ: {text}", hint)
    else:
        hint = f"pip install 'tinsmith=={versions.get(TRAINING, own)}' if a call is refused"
        yield Finding("versions", WARNING, f"{text}, here {own}", hint)


def _clocks(
    session: Session, servers: Sequence[Server], metrics: Sequence[str]
) -> Iterator[Finding]:
    """Whether this machine's clock is that of the servers."""
    for address in metrics:
        try:
            date_s = scrape(address).date_s
        except Failed as error:
            yield Finding("clock", SKIPPED, error.failure.message, error.failure.hint)
            continue
        if date_s is not None:
            yield _skew(now().timestamp() - date_s, address)
    if metrics or not any(server.service == TRAINING and server.version for server in servers):
        return
    # No call tells the time; but nothing can have happened later than now.
    asked = training_service_pb2.ListModelsRequest(page_size=1000)
    moments = [
        datetime.fromisoformat(moment)
        for model in session.access.ask(asked).models
        for stamp in (model.create_time, model.last_request_time)
        if (moment := moment_of(stamp)) is not None
    ]
    late_s = (max(moments) - now()).total_seconds() if moments else 0.0
    if late_s > SKEW_S_MAX:
        yield _skew(-late_s, "the Training server")
    else:
        yield Finding("clock", OK, "no server is ahead of it, as far as models show")


def _skew(ahead_s: float, where: str) -> Finding:
    """What a difference means: how far this machine's clock is ahead, seconds."""
    if abs(ahead_s) <= SKEW_S_MAX:
        return Finding("clock", OK, f"it is that of {where}")
    way = "ahead of" if ahead_s > 0 else "behind"
    hint = "synchronise both with NTP: certificates, keys and lifetimes go by them"
    return Finding("clock", WARNING, f"it is {span(abs(ahead_s))} {way} {where}", hint)
