"""Leases through the wire: a client that lets go frees weights at once, its own and no others.

Leases cannot run out here, since their clock stands still: what goes was given back.
"""

import asyncio
import gc
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration

from checkpoint_server import Served
from checkpoints import blobs, files, messages
from tinsmith import _leases, _loop
from tinsmith._leases import Leases, new_lease_id
from tinsmith.v1 import checkpoint_service_pb2 as pb
from tinsmith.v1.checkpoint_service_pb2_grpc import CheckpointServiceStub
from tinsmithd.checkpoint_client import CheckpointClient
from tinsmithd.domain import CheckpointPath
from tinsmithd.errors import NotFound
from tinsmithd.sampler.leases import Leases as SamplerLeases
from waiting import until
from wire import reason_and_field

NEWEST = 9


def path_of(seed: int) -> str:
    return f"tinsmith://run/sampler_weights/ephemeral-{seed:016x}"


class Holder:
    """Something that needs weights, such as a SamplingClient."""


class Client:
    """The leases of one process, on the client's own loop; it stops hearing from the server."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.reachable = True
        self.leases = Leases(self._checkpoint)

    async def _checkpoint(self) -> CheckpointServiceStub:
        target = self.address if self.reachable else "127.0.0.1:1"
        return CheckpointServiceStub(grpc.aio.insecure_channel(target))

    async def told(self, count: int) -> None:
        """Wait until the server has heard of all that is held, of so many."""
        leases = self.leases
        await until(lambda: len(leases._held) == count and leases._due_s and not leases._new)

    async def close(self) -> None:
        await asyncio.wrap_future(_loop.run(self.leases.close()))


class Leased(Served):
    """Its leases do not run out."""

    async def save(self, seed: int, lease_id: str) -> str:
        header = {"ttl": Duration(seconds=86_400), "ephemeral": True, "overwrite": True}
        content = files(seed, optimizer=False)
        written = messages(path_of(seed), content, **header, lease_id=lease_id)
        await self.stub.WriteCheckpoint(iter(written))
        return path_of(seed)

    async def renew(self, *leases: pb.Lease, released: tuple[pb.Lease, ...] = ()) -> None:
        await self.stub.RenewLeases(pb.RenewLeasesRequest(leases=leases, released=released))

    async def there(self) -> list[str]:
        """Those that can be found, without using them."""
        listed = await self.stub.ListCheckpoints(pb.ListCheckpointsRequest())
        return sorted(checkpoint.checkpoint_path for checkpoint in listed.checkpoints)

    async def becomes(self, *paths: str) -> None:
        """Wait until these are left, bytes included."""
        async with asyncio.timeout(60):
            while await self.there() != sorted(paths) or len(blobs(self.folder)) > 3 * len(paths):
                await asyncio.sleep(0.02)

    async def stays(self, *paths: str) -> None:
        """These are left after a while in which what nobody holds would have gone."""
        probe = await self.save(NEWEST - 1, "probe")
        await self.save(NEWEST, "newest")
        await self.renew(released=(pb.Lease(checkpoint_path=probe, lease_id="probe"),))
        await self.becomes(*paths, path_of(NEWEST))


@pytest.fixture
async def served(tmp_path: Path) -> AsyncIterator[Leased]:
    async with Leased.running(tmp_path) as served:
        yield served


async def test_a_holder_that_is_collected_or_closed_frees_its_weights_at_once(
    served: Leased,
) -> None:
    """Each of a training loop's rounds, without the garbage collector; the last one by closing."""
    client = Client(served.address)
    gc.disable()
    try:
        holder: Holder | None = None
        for seed in range(4):
            lease_id = new_lease_id()
            path = await served.save(seed, lease_id)
            holder = Holder()
            last = client.leases.hold(holder, path, lease_id)
            await served.becomes(path)
    finally:
        gc.enable()
    newest = await served.save(NEWEST, new_lease_id())
    client.leases.let_go(last)
    await served.becomes(newest)
    del holder
    await client.close()


async def test_closing_a_connection_gives_everything_back(
    served: Leased, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its holders may live on, and hold nothing."""
    monkeypatch.setattr(_leases, "CLOSE_TIMEOUT_S", 60.0)  # this server may be slow
    client, holders = Client(served.address), [Holder() for _ in range(3)]
    for seed, holder in enumerate(holders):
        lease_id = new_lease_id()
        client.leases.hold(holder, await served.save(seed, lease_id), lease_id)
    await client.told(3)
    await client.close()
    await served.becomes(path_of(2))
    client.leases.hold(holders[0], path_of(2))


async def test_a_release_takes_nothing_from_other_holders(served: Leased) -> None:
    """Neither in the same process nor in another one, nor from a copy that is on its way."""
    one, other = Client(served.address), Client(served.address)
    lease_id = new_lease_id()
    path = await served.save(0, lease_id)
    first, second, third = Holder(), Holder(), Holder()
    leases = [one.leases.hold(first, path, lease_id), one.leases.hold(second, path)]
    leases.append(other.leases.hold(third, path))
    await one.told(2)
    await other.told(1)
    for client, lease in ((one, leases[0]), (one, leases[1])):
        client.leases.let_go(lease)
    await served.stays(path)
    other.leases.let_go(leases[2])
    await served.becomes(path_of(NEWEST))

    path = await served.save(1, lease_id)
    await served.save(2, "")
    lease = one.leases.hold(first, path, lease_id)
    one.leases.hand_on(lease)  # it was pickled
    one.leases.let_go(lease)
    await served.save(3, "")
    await asyncio.sleep(0.5)
    assert path in await served.there()
    await one.close()
    await other.close()


async def test_only_who_knows_a_lease_can_end_it(served: Leased) -> None:
    """A stranger knows the path; a lease without an id is nobody's to end."""
    held = await served.save(0, "secret")
    plain = await served.save(1, "")
    strangers = [
        pb.Lease(checkpoint_path=path, lease_id=key) for path in (held, plain) for key in ("a", "x")
    ]
    await served.renew(pb.Lease(checkpoint_path=held, lease_id="x"), released=tuple(strangers))
    await served.renew(released=tuple(strangers))
    await served.stays(held, plain)
    # Whoever looks at weights without an id holds them for a lease, too.
    await served.stub.GetCheckpoint(pb.GetCheckpointRequest(checkpoint_path=held))
    await served.renew(released=(pb.Lease(checkpoint_path=held, lease_id="secret"),))
    await served.stays(held, plain)


async def test_a_bad_lease_is_named_and_nothing_is_done(served: Leased) -> None:
    """Neither for those beside it."""
    path = await served.save(0, "mine")
    good = pb.Lease(checkpoint_path=path, lease_id="mine")
    for field, leases, released in (
        ("leases[1].checkpoint_path", [good, pb.Lease(checkpoint_path="x", lease_id="a")], [good]),
        ("leases[0].lease_id", [pb.Lease(checkpoint_path=path, lease_id="a" * 129)], [good]),
        ("released[1].lease_id", [], [good, pb.Lease(checkpoint_path=path)]),
        ("released[1].checkpoint_path", [], [good, pb.Lease(lease_id="a")]),
        ("leases", [good] * 1001, [good]),
        ("released", [], [good] * 1001),
    ):
        request = pb.RenewLeasesRequest(leases=leases, released=released)
        with pytest.raises(grpc.RpcError) as refusal:
            await served.stub.RenewLeases(request)
        assert reason_and_field(refusal.value)[1] == field
    await served.stays(path)


async def test_a_release_waits_for_a_server_that_is_away(served: Leased) -> None:
    """And does not keep anybody waiting."""
    client, holder = Client(served.address), Holder()
    lease_id = new_lease_id()
    path = await served.save(0, lease_id)
    client.leases.hold(holder, path, lease_id)
    newest = await served.save(NEWEST, new_lease_id())
    client.reachable = False
    del holder
    await asyncio.sleep(0.5)
    assert await served.there() == sorted([path, newest])
    client.reachable = True
    await served.becomes(newest)
    await client.close()


async def test_a_sampler_holds_weights_while_it_works_with_them(served: Leased) -> None:
    """Its requests share one lease; the last one gives it back, and a new one begins anew."""
    key = CheckpointPath.parse(await served.save(0, "client"))
    await served.save(NEWEST, "newest")
    checkpoints = CheckpointClient(served.address)
    leases = SamplerLeases(checkpoints.renew_leases)
    async with leases.held(key) as first:
        assert (await checkpoints.get(key, first.take())).path == key
        await served.renew(released=(pb.Lease(checkpoint_path=str(key), lease_id="client"),))
        async with leases.held(key) as second:
            assert second is first
            async with checkpoints.reader(key, second.take()) as reader:
                assert [name async for name, _ in reader.pieces()]
        assert str(key) in await served.there()
        await asyncio.sleep(0.2)
        assert str(key) in await served.there()
    await served.becomes(path_of(NEWEST))
    async with leases.held(key) as late:
        assert late.lease_id != first.lease_id
        with pytest.raises(NotFound, match="reclaimed when no client holds them"):
            await checkpoints.get(key, late.take())
    await leases.close()
    await checkpoints.close()
