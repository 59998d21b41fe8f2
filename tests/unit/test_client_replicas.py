"""Calls spread over Samplers, follow the prefix cache, and leave a Sampler that fails."""

import asyncio
import contextlib
import socket
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from typing import Any

import grpc
import numpy as np
import pytest

import tinsmith
from faults.peer import Peer
from tinsmith import _loop, _replicas
from tinsmith._replicas import Replica, Replicas, Work
from tinsmith.addresses import is_resolved_here, service_address
from tinsmith.errors import ResourceExhaustedError, UnavailableError

PROMPT = tinsmith.ModelInput.from_ints([1])
TWO = "127.0.0.1:1,127.0.0.2:1"


class Spread:
    """`Replicas` over channels that nobody calls.

    Attributes:
        channels: Those that are open, by target.
    """

    def __init__(self) -> None:
        self.channels: dict[str, grpc.aio.Channel] = {}
        self.names: dict[str, str] = {}
        self.replicas = Replicas(self._open, self.channels.pop)

    def _open(self, target: str, name: str) -> grpc.aio.Channel:
        self.names[target] = name
        return self.channels.setdefault(target, grpc.aio.insecure_channel(target))

    def choose(self, stack: contextlib.ExitStack, work: Work, *failed: str) -> str:
        """Give a call its place, until the stack ends; returns which."""
        return self._chosen(stack, work, *failed).target

    def _chosen(self, stack: contextlib.ExitStack, work: Work, *failed: str) -> Replica:
        return stack.enter_context(self.replicas.chosen(work, set(failed)))

    def fail(self, target: str, error: tinsmith.TinsmithError) -> bool:
        """Let a call fail at one Sampler; whether it moves."""
        others = self.channels.keys() - {target}
        with contextlib.ExitStack() as stack:
            replica = self._chosen(stack, Work(), *others)
            assert replica.target == target
            return self.replicas.moves(replica, error, {target})


@pytest.fixture
async def spread() -> AsyncIterator[Spread]:
    made = Spread()
    await made.replicas.find(TWO)
    yield made
    made.replicas.close()


async def test_a_call_goes_where_the_fewest_sequences_are_under_way(spread: Spread) -> None:
    """Sixteen samples in one call weigh as much as sixteen calls; equals take turns."""
    with contextlib.ExitStack() as stack:
        busy = spread.choose(stack, Work(sequences=16))
        others = Counter(spread.choose(stack, Work()) for _ in range(16))
        assert busy not in others
        both = Counter(spread.choose(stack, Work()) for _ in range(8))
        assert set(both.values()) == {4}
    in_turn = []
    for _ in range(4):
        with contextlib.ExitStack() as stack:
            in_turn.append(spread.choose(stack, Work()))
    assert in_turn[0] == in_turn[2] != in_turn[1] == in_turn[3]


async def test_a_prompt_follows_its_beginning_while_load_is_comparable(spread: Spread) -> None:
    """A conversation stays where its first turn was read; other weights know nothing of it."""
    tokens = np.arange(1000)
    with contextlib.ExitStack() as stack:
        first = spread.choose(stack, Work("w", tokens[:140]))
        spread.choose(stack, Work("w", tokens[500:700]))
        spread.choose(stack, Work("w", tokens[:3]))
    for end in (200, 300, 1000):  # each begins with what was read before
        with contextlib.ExitStack() as stack:
            spread.choose(stack, Work("other", tokens[400:]))
            assert spread.choose(stack, Work("w", tokens[:end])) == first
    with contextlib.ExitStack() as stack:
        many = Counter(spread.choose(stack, Work("w", tokens)) for _ in range(40))
    assert many[first] >= 20, "it is followed"
    assert min(many.values()) >= 15, "and not at the price of an idle Sampler"
    with contextlib.ExitStack() as stack:
        taken = spread.choose(stack, Work(sequences=1))
        elsewhere = spread.choose(stack, Work("v", tokens))
        assert elsewhere != taken, "weights that it has not read the prompt with"


async def test_a_sampler_that_is_lost_gets_no_calls_until_it_can_be_reached(
    spread: Spread, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And one that is full or loading gets none for as long as it says."""
    monkeypatch.setattr(_replicas, "AWAY_S", 0.01)
    lost, other = TWO.split(",")
    assert spread.fail(lost, UnavailableError("Socket closed"))
    await asyncio.sleep(0.05)  # it is not there, however long one waits
    with contextlib.ExitStack() as stack:
        assert {spread.choose(stack, Work()) for _ in range(9)} == {other}
    full = ResourceExhaustedError("full", reason="QUEUE_FULL", retry_after_s=0.1)
    full.code = grpc.StatusCode.RESOURCE_EXHAUSTED
    assert not spread.fail(other, full), "nobody else is there"
    with contextlib.ExitStack() as stack:
        spread.choose(stack, Work())  # one of them has to be asked all the same


async def test_the_checkpoint_servers_troubles_move_no_call(spread: Spread) -> None:
    """Nor does a refusal: it would be the same anywhere."""
    target = TWO.split(",")[0]
    trouble = UnavailableError("gone", reason="CHECKPOINT_UNAVAILABLE", retry_after_s=1.0)
    assert not spread.fail(target, trouble)
    assert not spread.fail(target, tinsmith.NotFoundError("no", reason="CHECKPOINT_NOT_FOUND"))


async def test_samplers_that_come_and_go_are_found(
    spread: Spread, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name is looked up again; the channel of one that left is closed after its last call, and a
    name that cannot be looked up stands for what it stood for."""
    monkeypatch.setattr(_replicas, "RESOLVE_INTERVAL_S", 0.0)
    records = ["10.1.0.1", "10.1.0.2"]

    def look(host: str, port: int, *_: Any, **__: Any) -> list[Any]:
        if not records:
            raise socket.gaierror("no such name")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (ip, port)) for ip in records]

    monkeypatch.setattr(socket, "getaddrinfo", look)

    async def targets() -> set[str]:
        await spread.replicas.find("samplers.test:7")
        look = spread.replicas._resolving
        assert look is not None
        await look
        return set(spread.channels)

    assert await targets() == {"10.1.0.1:7", "10.1.0.2:7"}
    assert spread.names["10.1.0.1:7"] == "samplers.test:7"
    with contextlib.ExitStack() as stack:
        held = spread.choose(stack, Work())
        records[:] = [ip for ip in ("10.1.0.1", "10.1.0.2", "10.1.0.3") if ip not in held]
        now = {f"{ip}:7" for ip in records}
        assert await targets() == now | {held}
        assert {spread.choose(stack, Work()) for _ in range(9)} == now
    assert set(spread.channels) == now
    records.clear()
    assert await targets() == now
    records.append("10.1.0.9")
    assert await targets() == {"samplers.test:7"}, "one address is gRPC's to look up"


# --- through the client ---------------------------------------------------------------------------


@pytest.fixture
def pair() -> Iterator[list[Peer]]:
    """Two Samplers, of which the first also is the Training server that names both."""
    peers = [Peer(), Peer()]
    peers[0].servicer.capabilities.sampler_address = f":{peers[0].port}, 127.0.0.1:{peers[1].port}"
    yield peers
    for peer in peers:
        peer.stop()


def sampler_of(peer: Peer) -> tinsmith.SamplingClient:
    service = tinsmith.ServiceClient(base_url=peer.address)
    return service.create_sampling_client(base_model="base").result(10)


@pytest.mark.parametrize("stream", [False, True])
def test_a_call_that_breaks_is_made_again_elsewhere_with_its_seed(
    pair: list[Peer], stream: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the first attempt made counts only where it is given out, and then once."""
    monkeypatch.setattr(_replicas, "AWAY_S", 600.0)
    pair[1].servicer.sample_breaks = 0
    pair[0].servicer.sample_breaks = 99
    client = sampler_of(pair[0])
    for _ in range(2):  # one of the two begins where it breaks
        if stream:
            tokens = [token for part in client.sample_stream(PROMPT) for token in part.tokens]
        else:
            tokens = list(client.sample(PROMPT).result(10).sequences[0].tokens)
        assert tokens == [1, 2, 3, 4, 5]
    broken, whole = (peer.servicer.sample_seeds for peer in pair)
    assert len(broken) == 1, "the second call does not try the Sampler that is away"
    assert broken[0] in whole


def test_calls_go_on_while_one_of_two_samplers_is_away(pair: list[Peer]) -> None:
    """Without the pause that a single one would cost, and it is used again once it is back."""
    for peer in pair:
        peer.servicer.sample_breaks = 0
    client = sampler_of(pair[0])
    blocked = threading.Event()
    _loop.loop().call_soon_threadsafe(blocked.wait, 60)  # all have begun before one can end
    both = [client.sample(PROMPT) for _ in range(8)]
    blocked.set()
    assert {len(f.result(10).sequences[0].tokens) for f in both} == {5}
    assert [len(peer.servicer.sample_seeds) for peer in pair] == [4, 4]
    pair[1].go_away()
    for _ in range(8):
        client.sample(PROMPT).result(10)
    assert len(pair[1].servicer.sample_seeds) == 4
    pair[1].start()
    give_up_s = time.monotonic() + 30  # gRPC pauses before it connects again
    while len(pair[1].servicer.sample_seeds) == 4:
        assert time.monotonic() < give_up_s, "it is never used again"
        client.sample(PROMPT).result(10)


def test_addresses_may_be_lists_for_samplers_only(monkeypatch: pytest.MonkeyPatch) -> None:
    assert service_address("sampler", "host:1", ":2, other:3") == "host:2,other:3"
    monkeypatch.setenv("TINSMITH_ADDRESS_SAMPLER", "a:1, b:2")
    assert service_address("sampler", "host:1", ":2") == "a:1,b:2"
    monkeypatch.setenv("TINSMITH_ADDRESS_SAMPLER", "a:1,b")
    with pytest.raises(ValueError, match="TINSMITH_ADDRESS_SAMPLER"):
        service_address("sampler", "host:1", ":2")
    monkeypatch.setenv("TINSMITH_ADDRESS_CHECKPOINT", "a:1,b:2")
    with pytest.raises(ValueError, match="TINSMITH_ADDRESS_CHECKPOINT"):
        service_address("checkpoint", "host:1", ":2")


@pytest.mark.parametrize(
    ("address", "proxy", "here"),
    [
        ("samplers.test:1", "", True),
        ("samplers.test:1", "http://proxy.test:3128", False),
        ("10.0.0.1:1", "", False),
        ("[2001:db8::1]:1", "", False),
        ("localhost:1", "", False),
        ("unix:/tmp/socket", "", False),
        ("dns:///samplers.test:1", "", False),
    ],
)
def test_only_names_that_no_proxy_looks_up_are_looked_up_here(
    address: str, proxy: str, here: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("grpc_proxy", "https_proxy", "http_proxy", "no_grpc_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    if proxy:
        monkeypatch.setenv("http_proxy", proxy)
    assert is_resolved_here(address) is here
