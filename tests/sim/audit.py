"""The checks at the end of a run: everybody is answered, and everything is what it must be."""

import asyncio
from typing import TYPE_CHECKING, Any

from sim.oracle import Oracle, Wrong, check_state
from sim.server import seats_for_all
from sim.tables import ModelTable

if TYPE_CHECKING:
    from sim.world import World

CALM_S_MAX = 900.0
"""So long after the last fault everything must be answered."""
SETTLE_S = 20.0
BACK_S_MAX = 300.0


async def all_done(world: "World", users: list[asyncio.Task[Any]]) -> bool:
    """Wait until every call is answered; with ranks that do not fit, others come by turns."""
    end_s = world.loop.time() + CALM_S_MAX
    waiting = set(users)
    while waiting and world.loop.time() < end_s:
        _, waiting = await asyncio.wait(waiting, timeout=30.0)
        if waiting and world.nemesis.mismatches:
            _swap_identity(world)
    for user in world.users:
        open_calls = sorted(set(user.calls) - set(user.answers))
        if open_calls:
            world.fail(f"{user.name} ({user.model_id}): calls {open_calls} are not answered")
    if waiting and not world.failures:
        world.fail(f"{len(waiting)} clients are not done")
    world.checked("liveness")
    return not waiting


def _swap_identity(world: "World") -> None:
    engine = "e2" if world.identity["engine"] == "e1" else "e1"
    world.identity = {**world.identity, "engine": engine}
    if world.group is not None:
        world.ranks_die(world.group, blamed=False)


async def settle(world: "World") -> None:
    """Let what is under way come to its end."""
    await asyncio.sleep(SETTLE_S)


async def audit(world: "World") -> None:
    """All checks."""
    oracles = _check_answers(world)
    _check_journal(world)
    _check_steps(world, oracles)
    _check_folders(world)
    server = world.server
    assert server is not None
    world.log("last restart")
    world.limits = seats_for_all(world.limits)  # so that each is held against what it must be
    world.kill_server(server)
    if not await _all_back(world):
        return
    _check_ranks(world, oracles)
    for user in world.users:
        if user.model_id in oracles and not user.deleted:
            await user.ask_last()
            world.checked("newest answer")


def _check_answers(world: "World") -> dict[str, Oracle]:
    oracles = {}
    for user in world.users:
        oracle = Oracle(world, user)
        try:
            oracle.check()
            oracle.check_saved()
        except Wrong as error:
            world.fail(str(error))
            oracle.ended = True
        if not oracle.ended:
            oracles[user.model_id] = oracle
    return oracles


def _check_journal(world: "World") -> None:
    tables = world.disk.tables
    kept_max = world.limits.lane.answers_kept_max
    for model_id, table in tables.models.items():
        end = _trimmed_to(world, table)
        since = sum(position > end for position in table.calls)
        if len(table.snapshots) > 3:
            world.fail(f"{model_id}: {len(table.snapshots)} snapshots are kept")
        if len(table.calls) > kept_max + since + 1:
            world.fail(f"{model_id}: {len(table.calls)} calls are kept, {since} after {end}")
        if len(table.answers) > kept_max + 1:
            world.fail(f"{model_id}: {len(table.answers)} answers are kept")
        early = [position for position in table.payloads if position <= end]
        if early:
            world.fail(f"{model_id}: payloads {early} are kept, {end} was the end")
        open_calls = [at for at, call in table.calls.items() if call.answer_digest is None]
        if open_calls and not table.lost:
            world.fail(f"{model_id}: calls {open_calls} have no result in the end")
        world.checked("journal is bounded")


def _check_steps(world: "World", oracles: dict[str, Oracle]) -> None:
    """Each step is in its model's history once, with what was computed for it."""
    for model_id, oracle in oracles.items():
        table = world.disk.tables.models.get(model_id)
        if table is None:
            continue
        found = [
            (step.seq_id, step.step_count, int(step.metrics.get("calls:sum", 0)))
            for step in table.steps
        ]
        if found != oracle.steps:
            world.fail(f"{model_id}: its history is {found}, expected {oracle.steps}")
        world.checked("steps")


def _trimmed_to(world: "World", table: ModelTable) -> int:
    """Up to which position nothing is needed: there is a whole snapshot of it and a later one."""
    whole = [at for at, found in table.snapshots.items() if found.folder not in world.disk.rotten]
    return sorted(whole)[-2] if len(whole) > 1 else 0


def _check_folders(world: "World") -> None:
    if world.counts["zombie server"]:
        return  # it may have left something behind, until the next one starts
    extra = sorted(set(world.disk.folders) - _registered(world))
    if extra:
        world.fail(f"folders {extra} belong to nobody; known {sorted(_registered(world))}")
    world.checked("folders")


def _registered(world: "World") -> set[str]:
    tables = world.disk.tables.models.values()
    return {found.folder for table in tables for found in table.snapshots.values()}


async def _all_back(world: "World") -> bool:
    end_s = world.loop.time() + BACK_S_MAX
    while world.loop.time() < end_s:
        await asyncio.sleep(5.0)
        server = world.server
        if server is None or not server.up or server.link is None:
            continue
        lanes = [model.lane for model in server.models.list()]
        if any(lane.suspended for lane in lanes):
            server.wake_suspended()
        elif not any(lane.recovering for lane in lanes):
            return True
        if world.nemesis.mismatches:
            return True  # no group fits all of them
    world.fail("the models do not come back after the last restart")
    return False


def _check_ranks(world: "World", oracles: dict[str, Oracle]) -> None:
    server = world.server
    assert server is not None
    assert world.group is not None
    extra = sorted(set(world.disk.folders) - _registered(world))
    if extra:
        world.fail(f"folders {extra} are still there after a restart")
    expected = {user.model_id for user in world.users if not user.deleted}
    found = {model.model_id for model in server.models.list()}
    if found != expected:
        world.fail(f"models {sorted(found)} are there, expected {sorted(expected)}")
    for model_id, oracle in oracles.items():
        if model_id not in found:
            continue
        model = server.models.get(model_id)
        if model.lane.lost:
            if not world.may_be_lost(model_id):
                world.fail(f"{model_id} is lost")
        elif not (model.lane.recovering or model.lane.suspended):
            try:
                check_state(oracle, world.group.models.get(model_id))
            except Wrong as error:
                world.fail(f"{model_id}: {error}")
            if model.lane.next_seq_id != oracle.user.next_seq_id:
                world.fail(f"{model_id}: next_seq_id is {model.lane.next_seq_id}")
            if model.step_count != oracle.state.step_count:
                world.fail(f"{model_id}: step_count is {model.step_count}")
            world.checked("final state")
