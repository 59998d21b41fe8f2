"""What becomes one commit of the journal: owners take turns, and each keeps its order."""

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest

from tinsmithd.errors import ResourceExhausted
from tinsmithd.training.call import ComputeWork
from tinsmithd.training.journal import AddCall, Journal, LoseModel, Write
from tinsmithd.training.journal.groups import GROUP_BYTES, HANDED_BYTES, Groups, Handed
from tinsmithd.training.journal.records import Contents, StoreUnwritable
from waiting import until


def call(model_id: str, position: int, nbytes: int = 0) -> AddCall:
    """A call with so many bytes of data."""
    return AddCall(model_id, position, position, b"", ComputeWork(b"", [bytes(nbytes)], [1], True))


def place(write: Write) -> tuple[str, int]:
    """What a call is known by here."""
    assert isinstance(write, AddCall)
    return write.model_id, write.position


class HeldStore:
    """A store that writes when it is told to.

    Attributes:
        commits: What was written, group by group.
        go: It waits for this.
        failure: Why it cannot write; None where it can.
    """

    def __init__(self) -> None:
        self.commits: list[Sequence[Write]] = []
        self.go = asyncio.Event()
        self.failure: Exception | None = None

    async def claim(self) -> Contents:
        return Contents("cluster", 1)

    async def commit(self, writes: Sequence[Write]) -> None:
        await self.go.wait()
        if self.failure is not None:
            raise self.failure
        self.commits.append(writes)

    async def tidy(self) -> None:
        pass

    async def close(self) -> None:
        pass


async def opened() -> tuple[Journal, HeldStore, Any]:
    """A journal that is about to write its first commit."""
    store = HeldStore()
    journal = Journal(store)  # type: ignore[arg-type]
    await journal.open()
    first = journal.commit(LoseModel("m", "first"))
    await asyncio.sleep(0)
    return journal, store, first


async def test_a_light_owner_is_in_the_next_group_however_much_another_handed_in() -> None:
    """A hundred megabytes of one tenant wait, and one call of another comes after all of them."""
    journal, store, _ = await opened()
    heavy = [journal.commit(call(f"heavy/{n % 5}", n, 1 << 20)) for n in range(100)]
    light = journal.commit(call("light/m", 1))
    store.go.set()
    await asyncio.gather(light, *heavy)
    assert ("light/m", 1) in [place(write) for write in store.commits[1]]
    assert len(store.commits[1]) <= 1 + GROUP_BYTES // (1 << 20)
    written = [place(write) for group in store.commits[1:] for write in group]
    assert [place for place in written if place[0] != "light/m"] == [
        (f"heavy/{n % 5}", n) for n in range(100)
    ]
    assert len(store.commits) > 25
    await journal.close()


async def test_small_writes_are_one_group_up_to_a_number() -> None:
    """As many as a commit writes in some tens of milliseconds."""
    groups = Groups()
    for number in range(1000):
        groups.add(Handed([call("a/m", number)], must=False))
    groups.add(Handed([call("b/m", 1)], must=False))
    first = groups.take()
    assert len(first) == GROUP_BYTES // HANDED_BYTES
    assert {handed.owner for handed in first} == {"a", "b"}
    groups.put_back(first)
    again = []
    while groups:
        again += [handed for handed in groups.take() if handed.owner == "a"]
    assert [place(handed.writes[0])[1] for handed in again] == list(range(1000))
    assert not groups.take()


async def test_a_flush_waits_for_everything_that_came_before_it() -> None:
    """Whoever handed it in may be gone by then."""
    journal, store, first = await opened()
    gone = journal.commit(call("a/m", 1))
    gone.cancel()
    flush = asyncio.create_task(journal.flush())
    journal.commit(call("a/m", 2))
    await asyncio.sleep(0)
    assert not flush.done()
    store.go.set()
    await flush
    assert first.done()
    assert ("a/m", 1) in [place(write) for group in store.commits[1:] for write in group]
    await journal.flush()
    await journal.close()


async def test_a_full_disk_refuses_all_that_waits_and_keeps_what_must_be_written() -> None:
    """What happened already is tried again, in its order; who can be refused hears it at once."""
    journal, store, first = await opened()
    may = [journal.commit(call("a/m", n, 1 << 20)) for n in range(1, 20)]
    must = [journal.commit(call(f"{owner}/m", 100), must=True) for owner in "ab"]
    store.failure = StoreUnwritable("full", full=True)
    store.go.set()
    for refused in (first, *may):
        with pytest.raises(ResourceExhausted):
            await refused
    assert not any(each.done() for each in must)
    store.failure = None
    await until(lambda: all(each.done() for each in must))
    written = [place(write) for group in store.commits for write in group]
    assert sorted(written) == [("a/m", 100), ("b/m", 100)]
    await journal.close()
