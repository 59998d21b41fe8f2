"""The process group of the ranks, which `starter` or torchrun started; or one process alone."""

import datetime
import json
import logging
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from tinsmithd.trainer import progress
from tinsmithd.trainer.process_group import memory
from tinsmithd.trainer.process_group.heartbeat import (
    EXIT_GROUP_LOST,
    EXIT_RANK_SILENT,
    Heartbeat,
    Loss,
    Member,
    meet,
)
from tinsmithd.trainer.process_group.stall import Memory, Report, Reports, StallWatch
from tinsmithd.trainer.process_group.starter import STORE_FD, loopback_alone

COLLECTIVE_TIMEOUT_S = 30.0
"""Maximum seconds of a rank's silence; see `TrainerConfig.collective_timeout_s`."""

PROCESS_GROUP_TIMEOUT_S = {"gloo": 24 * 3600, "nccl": 1800}
"""Maximum seconds of a collective, by backend: more than any computation that other ranks wait for.
The heartbeat finds lost ranks, and `watch` ranks that hang, long before."""

PROGRESS_TIMEOUT_S = 300.0
"""Seconds without progress that are always allowed; see `TrainerConfig.progress_timeout_s`."""

FLIGHT_RECORDERS = {"gloo": "_dump_fr_trace_json", "nccl": "_dump_nccl_trace_json"}
"""Functions of torch that tell what its flight recorder has, by backend."""
COLLECTIVES_SHOWN = 8
STACK_DEPTH_MAX = 12
LAST_LOOK_S_MAX = 5.0
"""Maximum seconds for a last look at what torch knows, which may hang, too."""

MEET_TIMEOUT_S = 600.0
"""Maximum seconds between the start of the first and the last rank."""

IDLE_S_MAX = 365 * 86_400
"""Maximum seconds that ranks wait for a command; the heartbeat ends them if rank 0 is gone."""

_log = logging.getLogger(__name__)
_control: dist.ProcessGroup | None = None
_heartbeat: Heartbeat | None = None
_stalled = False


def rank_and_world_size() -> tuple[int, int]:
    """This process's rank and the number of ranks, from the environment; alone it is 0 of 1."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def init(collective_timeout_s: float = COLLECTIVE_TIMEOUT_S) -> torch.device:
    """Join the process group, once; returns this rank's device.

    From then on this process ends by itself (`EXIT_GROUP_LOST`) when another rank is lost.

    Args:
        collective_timeout_s: A rank that gives no sign of life for longer is lost.

    Raises:
        MeetError: Not all ranks came.
    """
    cuda = torch.cuda.is_available()
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if cuda:
        torch.cuda.set_device(local_rank)
    if not dist.is_initialized():
        backend = "nccl" if cuda else "gloo"
        if rank_and_world_size()[1] == 1:
            # There is nobody to meet, so no port is needed; what gloo opens stays on loopback.
            os.environ.update(loopback_alone())
            os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed asks for it
            store = dist.HashStore()  # type: ignore[attr-defined]
            dist.init_process_group(backend, store=store, rank=0, world_size=1)
        else:
            _join(backend, collective_timeout_s)
    return torch.device("cuda", local_rank) if cuda else torch.device("cpu")


def _join(backend: str, collective_timeout_s: float) -> None:
    global _control, _heartbeat
    # NCCL's own watchdog stays as torch sets it up: a communicator that fails (a peer that is
    # gone resets its connections) ends the process (TORCH_NCCL_ASYNC_ERROR_HANDLING=1), a
    # collective that merely takes long only after the process group's timeout, and a watchdog
    # thread that itself hangs in the driver after TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC (8 minutes).
    os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "1")
    os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")  # torch logs where
    rank, world_size = rank_and_world_size()
    ours = STORE_FD in os.environ
    store = _store(rank, world_size)
    me = Member(node=os.environ.get("GROUP_RANK", str(rank)), pid=os.getpid())
    group = meet(store, rank, world_size, me, timeout_s=MEET_TIMEOUT_S)

    def on_loss(loss: Loss) -> None:
        _log.log(
            logging.INFO if loss.orderly else logging.ERROR,
            "rank %d ends: %s",
            rank,
            loss.message,
        )
        for silent in loss.silent:
            _end_sibling(me, group.members[silent])
        os._exit(EXIT_RANK_SILENT if loss.silent else EXIT_GROUP_LOST)

    _heartbeat = Heartbeat(
        store.clone(),
        group,
        rank,
        timeout_s=collective_timeout_s,
        on_loss=on_loss,
        report=lambda: _report().encode(),
        store_rank=0 if ours else None,
    )
    # Before the process group connects: that waits for the others as well.
    _heartbeat.start()
    # torchrun may keep the store between restarts. Under the name of this group nobody finds the
    # addresses of ranks that are gone.
    own_store = dist.PrefixStore(group.id, store)  # type: ignore[attr-defined]
    timeout = datetime.timedelta(seconds=PROCESS_GROUP_TIMEOUT_S[backend])
    dist.init_process_group(
        backend, store=own_store, rank=rank, world_size=world_size, timeout=timeout
    )
    _control = dist.new_group(backend="gloo", timeout=datetime.timedelta(seconds=IDLE_S_MAX))


def _store(rank: int, world_size: int) -> dist.TCPStore:  # type: ignore[name-defined]
    """The store at which the ranks meet; rank 0 serves it where it was given a socket for it."""
    timeout = datetime.timedelta(seconds=MEET_TIMEOUT_S)
    given = os.environ.pop(STORE_FD, None)
    if given is None:  # torchrun, which may keep a store of its own
        found, _, _ = next(rendezvous("env://", timeout=timeout))
        return found
    return dist.TCPStore(  # type: ignore[attr-defined]
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        world_size,
        is_master=rank == 0,
        timeout=timeout,
        wait_for_workers=False,
        master_listen_fd=int(given) if given else None,
    )


def _end_sibling(me: Member, other: Member) -> None:
    """End a silent rank of this node at once.

    torchrun would ask it with SIGTERM, which a stopped process does not hear, and wait 30 s. The
    process id is what the store says: it counts only where this process's own parent started it.
    """
    if other.node != me.node:
        return
    try:
        status = Path(f"/proc/{other.pid}/stat").read_text()
        if int(status.rpartition(")")[2].split()[1]) == os.getppid():
            os.kill(other.pid, signal.SIGKILL)
    except (OSError, ValueError, IndexError):
        return  # it is gone, or this system has no /proc: then it takes torchrun's 30 s


# --- ranks that live and get nothing done ----------------------------------------------------


def watch(progress_timeout_s: float = PROGRESS_TIMEOUT_S) -> None:
    """From now on, end this process (`EXIT_RANK_SILENT`) when its group gets nothing done.

    Args:
        progress_timeout_s: For longer, and for ten times as long as it ever took so far.
    """
    rank, _ = rank_and_world_size()

    def on_stall(message: str) -> None:
        global _stalled
        _stalled = True
        _log.error("rank %d ends: %s", rank, message)
        _log.error("rank %d is at %s", rank, _stack())
        if dist.is_initialized():
            look = threading.Thread(target=_log_collectives, args=(rank,), daemon=True)
            look.start()
            look.join(LAST_LOOK_S_MAX)
        # Who started the ranks ends them with the first. The others hear of it with the next beat,
        # and are to say where they are, too.
        beat_s = 0.0 if _heartbeat is None else _heartbeat.interval_s
        time.sleep(2 * (beat_s + watching.interval_s))
        os._exit(EXIT_RANK_SILENT)

    watching = StallWatch(_reports, timeout_s=progress_timeout_s, on_stall=on_stall)
    watching.start()


def _report() -> Report:
    collectives = 0
    if dist.is_initialized():
        assert dist.group.WORLD is not None
        collectives = dist.group.WORLD._get_sequence_number_for_group()  # type: ignore[attr-defined]
    done = progress.current
    return Report(done.count, collectives, done.doing, _stalled, memory.current())


def _reports() -> Reports:
    rank, _ = rank_and_world_size()
    others = {} if _heartbeat is None else _heartbeat.reports()
    return {rank: _report(), **{other: Report.decode(text) for other, text in others.items()}}


def memories() -> Mapping[int, Memory]:
    """What each rank of the group has of memory, as far as it said so, by rank."""
    rank, _ = rank_and_world_size()
    others = {} if _heartbeat is None else _heartbeat.reports()
    found = {other: Report.decode(text).memory for other, text in others.items()}
    return {rank: memory.current(), **{r: m for r, m in found.items() if m.resident_bytes}}


def _stack() -> str:
    """Where the main thread is, innermost first, in one line."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    calls = reversed(traceback.extract_stack(frame)[-STACK_DEPTH_MAX:])
    return " < ".join(f"{Path(call.filename).name}:{call.lineno} {call.name}" for call in calls)


def _log_collectives(rank: int) -> None:
    """Log the last collectives of torch's flight recorder."""
    dump = getattr(torch._C._distributed_c10d, FLIGHT_RECORDERS[dist.get_backend()])
    entries = json.loads(dump(includeCollectives=True, onlyActive=False)).get("entries", ())
    shown = [
        f"{entry['profiling_name']} {entry['collective_seq_id']} {entry['state']}"
        for entry in entries[-COLLECTIVES_SHOWN:]
    ]
    _log.error("rank %d, its last collectives: %s", rank, ", ".join(shown) or "none")


def neighbours(count: int) -> dist.ProcessGroup:
    """The ranks that compute together with this one, where as many neighbours do each.

    Every rank calls it at the same time with the same number, which divides the world size.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    if count == world_size:
        assert dist.group.WORLD is not None
        return dist.group.WORLD
    timeout = datetime.timedelta(seconds=PROCESS_GROUP_TIMEOUT_S[dist.get_backend()])
    starts = range(0, world_size, count)
    groups: list[dist.ProcessGroup] = [
        dist.new_group(list(range(s, s + count)), timeout=timeout) for s in starts
    ]
    return groups[rank // count]


def leave() -> None:
    """Tell the other ranks that this process ends on purpose."""
    if _heartbeat is not None:
        _heartbeat.leave()


def rank_that_left() -> int | None:
    """A rank that ended on purpose, which explains a failed collective; else None."""
    return _heartbeat.rank_that_left() if _heartbeat is not None else None


def close() -> None:
    """Leave the process group, all ranks together; its threads must end before the process does."""
    global _control, _heartbeat
    leave()
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
    if _heartbeat is not None:
        _heartbeat.close()
    _control = _heartbeat = None


def broadcast_bytes(data: bytes | None) -> bytes:
    """Give rank 0's bytes to every rank; the other ranks pass None and wait for them."""
    if rank_and_world_size()[1] == 1:
        assert data is not None
        return data
    length = torch.tensor([len(data) if data is not None else 0])
    dist.broadcast(length, src=0, group=_control)
    if data is None:
        buffer = torch.empty(int(length), dtype=torch.uint8)
    else:
        buffer = torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0)
        buffer = buffer.to(torch.uint8)
    if int(length):
        dist.broadcast(buffer, src=0, group=_control)
    return buffer.numpy().tobytes()
