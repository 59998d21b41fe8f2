"""How the machines of a rank group find each other, before any rank starts and until one ends.

The first machine listens, the others connect. When all are there, it opens the store at which the
ranks will meet, and tells everyone its port; then each machine starts its ranks. From then on the
connections say nothing: one that ends means that the ranks of a machine have ended, and with them
the group, so all the others end too, at once. A machine that vanishes without a word is found by
the ranks' own heartbeat. See docs/adr/0034-rank-groups-on-several-machines.md.
"""

import asyncio
import contextlib
import hashlib
import hmac
import json
import logging
import re
import secrets
import socket
from collections.abc import Awaitable, Mapping, Sequence
from dataclasses import dataclass, field

from tinsmithd.config import ConfigError
from tinsmithd.config.fields import is_loopback, parse_address

FIRST = "{first}"
"""Stands for the name of the group's first machine in `meet_address`."""
GREETING_S_MAX = 5.0
"""Maximum seconds that a machine which connected takes to say who it is."""
GREETINGS_MAX = 64
"""Maximum number of connections that have not said yet who they are."""
RETRY_S = 0.5
PATIENCE_S = 30.0
"""Seconds between two lines of the log about who is missing."""
LINE_BYTES_MAX = 512
NONCE_BYTES = 32

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Place:
    """Which machine of a group this one is.

    Attributes:
        node: Its number, from 0.
        nodes: How many there are.
        ranks: Ranks on each.
        address: Where the first one listens, host:port.
    """

    node: int = 0
    nodes: int = 1
    ranks: int = 1
    address: str = ""


@dataclass
class Meeting:
    """Machines that met.

    Attributes:
        host: Where the store is.
        port: Its port.
        store: Descriptor of the store's listening socket, on the first machine alone.
        links: Connections to other machines; whatever comes on one of them is its end.
    """

    host: str
    port: int
    store: int | None
    links: Sequence[socket.socket] = field(default=())


def place(nodes: int, node: str, ranks: int, address: str) -> Place:
    """Find out which machine this is.

    Args:
        nodes: Machines of a group.
        node: Number of this one, or a name that ends with it, such as that of a StatefulSet's pod.
            From `nodes` on it is a machine of another group, which stands by.
        ranks: Ranks on each machine.
        address: host:port of the first machine; `{first}` in it stands for that machine's name.

    Raises:
        ConfigError: There is no number, or no address for several machines.
    """
    if nodes == 1:
        return Place(ranks=ranks)
    found = re.fullmatch(r"(.*?)(\d{1,6})", node)
    if found is None:
        raise ConfigError("trainer.node: must be a number, or a name that ends with one")
    name, number = found[1], int(found[2])
    first = f"{name}{number - number % nodes}"
    if not address:
        raise ConfigError("trainer.meet_address: must be set where a group has several machines")
    told = address.replace(FIRST, first)
    _, port = parse_address(told)
    if not port:
        raise ConfigError("trainer.meet_address: needs a port, which the other machines know")
    return Place(number % nodes, nodes, ranks, told)


def meet(here: Place, secret: str) -> Meeting:
    """Wait until all machines of the group are there; starts no thread that stays.

    Args:
        here: Which machine this is.
        secret: All machines have it, and show that they do without sending it.
    """
    if here.node:
        return asyncio.run(_join(here, secret))
    return asyncio.run(_lead(here, secret))


# --- the first machine ------------------------------------------------------------------------


async def _lead(here: Place, secret: str) -> Meeting:
    host, port = parse_address(here.address)
    loop = asyncio.get_running_loop()
    found: dict[int, socket.socket] = {}
    everyone = asyncio.Event()
    greetings: set[asyncio.Task[None]] = set()
    with _listener(_bind_host(here.address), port) as listener:
        listener.setblocking(False)
        _log.info("machine 0 of %d waits for the others at %s", here.nodes, here.address)
        complaining = asyncio.create_task(_complain(here, found))
        # Not `loop.sock_accept`: asyncio fails where that is cancelled as somebody comes.
        news = asyncio.Event()
        loop.add_reader(listener, news.set)
        waiting = asyncio.create_task(everyone.wait())
        waiting.add_done_callback(lambda _: news.set())
        while not everyone.is_set():
            await news.wait()
            news.clear()
            try:
                connection, _ = listener.accept()
            except (BlockingIOError, ConnectionAbortedError):
                continue
            if len(greetings) >= GREETINGS_MAX:
                connection.close()
                continue
            task = asyncio.create_task(_greet(here, secret, connection, found, everyone))
            greetings.add(task)
            task.add_done_callback(greetings.discard)
        loop.remove_reader(listener)
        complaining.cancel()
        for task in greetings:
            task.cancel()
        await asyncio.gather(*greetings, return_exceptions=True)
    store = _listener(_bind_host(here.address), 0)
    store_port = store.getsockname()[1]
    go = json.dumps({"store_port": store_port}).encode() + b"\n"
    for number, link in found.items():
        with contextlib.suppress(OSError):  # one that is gone shows at once, as a link that ends
            await loop.sock_sendall(link, go)
        _log.info("machine %d is there", number)
    return Meeting(host, store_port, store.detach(), list(found.values()))


async def _greet(
    here: Place,
    secret: str,
    connection: socket.socket,
    found: dict[int, socket.socket],
    everyone: asyncio.Event,
) -> None:
    """Find out which machine has connected, and keep the connection."""
    connection.setblocking(False)
    kept = False
    try:
        async with asyncio.timeout(GREETING_S_MAX):
            node = await _challenge(here, secret, connection)
        before = found.pop(node, None)
        if before is not None:  # that machine started anew
            before.close()
        found[node] = connection
        kept = True
        if len(found) == here.nodes - 1:
            everyone.set()
    except (OSError, TimeoutError, ValueError) as error:
        _log.warning("a connection at %s is no machine of this group: %s", here.address, error)
    finally:
        if not kept:
            connection.close()


async def _challenge(here: Place, secret: str, connection: socket.socket) -> int:
    loop = asyncio.get_running_loop()
    nonce = secrets.token_hex(NONCE_BYTES)
    await loop.sock_sendall(connection, json.dumps({"nonce": nonce}).encode() + b"\n")
    said = await _line(connection)
    expected = _proof(secret, "join", nonce, said.get("node"), here.nodes, here.ranks)
    if not hmac.compare_digest(str(said.get("proof")).encode(), expected.encode()):
        raise ValueError("it has another secret, or other numbers of machines and ranks")
    node = said.get("node")
    if not isinstance(node, int) or not 0 < node < here.nodes:
        raise ValueError("it says that it is none of the other machines")
    answer = _proof(secret, "lead", str(said.get("nonce"))[: 2 * NONCE_BYTES])
    await loop.sock_sendall(connection, json.dumps({"proof": answer}).encode() + b"\n")
    return node


async def _complain(here: Place, found: Mapping[int, object]) -> None:
    while True:
        await asyncio.sleep(PATIENCE_S)
        missing = [str(node) for node in range(1, here.nodes) if node not in found]
        _log.info("waiting for machines %s at %s", ", ".join(missing), here.address)


# --- the others -------------------------------------------------------------------------------


async def _join(here: Place, secret: str) -> Meeting:
    host, port = parse_address(here.address)
    loop = asyncio.get_running_loop()
    said_s = loop.time() - PATIENCE_S
    while True:
        try:
            link = await _connect(host, port)
        except OSError as error:
            why: object = error.strerror or error
        else:
            try:
                async with asyncio.timeout(GREETING_S_MAX):
                    await _introduce(here, secret, link)
                go = await _line(link)  # as long as it takes until all are there
                return Meeting(host, _port(go), None, [link])
            except (OSError, TimeoutError, ValueError) as error:
                link.close()
                why = error
        if loop.time() - said_s >= PATIENCE_S:
            said_s = loop.time()
            _log.info("machine %d waits for the first at %s: %s", here.node, here.address, why)
        await asyncio.sleep(RETRY_S)


async def _connect(host: str, port: int) -> socket.socket:
    loop = asyncio.get_running_loop()
    family, kind, protocol, _, address = (
        await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    )[0]
    link = socket.socket(family, kind, protocol)
    link.setblocking(False)
    try:
        async with asyncio.timeout(GREETING_S_MAX):
            await loop.sock_connect(link, address)
    except BaseException as error:
        link.close()
        if isinstance(error, TimeoutError):
            raise OSError("no answer") from error
        raise
    _keep_alive(link)
    return link


async def _introduce(here: Place, secret: str, link: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    theirs = str((await _line(link)).get("nonce"))[: 2 * NONCE_BYTES]
    nonce = secrets.token_hex(NONCE_BYTES)
    proof = _proof(secret, "join", theirs, here.node, here.nodes, here.ranks)
    said = {"node": here.node, "nonce": nonce, "proof": proof}
    await loop.sock_sendall(link, json.dumps(said).encode() + b"\n")
    answer = str((await _line(link)).get("proof")).encode()
    if not hmac.compare_digest(answer, _proof(secret, "lead", nonce).encode()):
        raise ValueError("whoever listens there has another secret")


# --- both ---------------------------------------------------------------------------------------


def _proof(secret: str, *said: object) -> str:
    return hmac.new(secret.encode(), json.dumps(said).encode(), hashlib.sha256).hexdigest()


def _port(go: Mapping[str, object]) -> int:
    port = go.get("store_port")
    if not isinstance(port, int) or not 0 < port < 65_536:
        raise ValueError("the first machine named no port")
    return port


async def _line(link: socket.socket) -> Mapping[str, object]:
    """The next line, a JSON object; reads nothing beyond it.

    Raises:
        ValueError: It is none, or too long.
        OSError: The other side has gone.
    """
    loop = asyncio.get_running_loop()
    text = b""
    while not text.endswith(b"\n"):
        # One byte at a time: there are three lines in all, and nothing after one may be taken.
        piece: Awaitable[bytes] = loop.sock_recv(link, 1)
        byte = await piece
        if not byte:
            raise ConnectionError("it has gone")
        text += byte
        if len(text) > LINE_BYTES_MAX:
            raise ValueError("it says too much")
    found = json.loads(text)
    if not isinstance(found, dict):
        raise ValueError("it says something else than a machine does")
    return found


def _bind_host(address: str) -> str:
    """Loopback where the address is, so that nothing of one machine listens beyond it."""
    return "127.0.0.1" if is_loopback(address) else ""


def _listener(host: str, port: int) -> socket.socket:
    listener = socket.create_server((host, port), backlog=socket.SOMAXCONN)
    _keep_alive(listener)
    return listener


def _keep_alive(link: socket.socket) -> None:
    """Let the kernel find out about a peer that vanished, which an idle connection would not."""
    link.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, seconds in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 4)):
        if hasattr(socket, name):
            link.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), seconds)
