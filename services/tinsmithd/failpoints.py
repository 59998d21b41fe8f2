"""Places where a test can make a process die, fail or wait: off unless the environment says so.

    TINSMITH_FAILPOINTS=wal_fsync:kill@3,mid_optim:raise

Each is `name:action`, with `@n` only at the n-th time that the place is reached in this process.
Actions: `kill` (SIGKILL to this process), `abort` (SIGABRT, as after a fault of its own), `raise`
(a RuntimeError), `full` (an OSError that says that the disk is full), `io` (one that says that the
disk failed), `sleep=SECONDS`, `spin` (compute without end). Names that no place has stop nothing;
the fault tests know all of them as `NAMES`.
"""

import errno
import os
import signal
import time
from dataclasses import dataclass

VARIABLE = "TINSMITH_FAILPOINTS"

NAMES = (
    "recv",  # Training: a call was read whole
    "wal_append",  # Training: before a batch is written to the journal
    "wal_fsync",  # Training: a batch is written and not yet durable
    "enqueue",  # Training: a call is about to be carried out
    "pre_result",  # Training: the ranks have answered, nothing is recorded
    "post_result_pre_ack",  # Training: the result is recorded, the caller has no answer
    "snapshot_mid_write",  # Training: half of a snapshot is written
    "snapshot_pre_rename",  # Training: a snapshot is written and not yet in its place
    "snapshot_post_rename",  # Training: it is in its place, the journal does not know
    "restore_mid",  # Training: a model is half replayed
    "migrate_mid",  # Training, Checkpoint: a file is half brought to the format of this release
    "mid_forward",  # rank: between two micro-batches without backward
    "mid_backward",  # rank: between two micro-batches with backward
    "mid_deposit",  # rank: a file of a state is left for the Checkpoint server
    "pre_optim",  # rank: before an optimizer step
    "mid_optim",  # rank: gradients are summed, values are half changed
    "post_optim_pre_ack",  # rank: the step is made, nobody knows
    "import_mid",  # rank: a state was read, and is about to be taken in
    "ckpt_mid_write",  # Checkpoint: a piece is written
    "ckpt_mid_take",  # Checkpoint: a file of a deposit is moved
    "ckpt_pre_fsync",  # Checkpoint: all pieces are written, none is synced
    "ckpt_pre_rename",  # Checkpoint: files are synced and in staging
    "ckpt_mid_rename",  # Checkpoint: some files are in their places
    "ckpt_post_rename",  # Checkpoint: all are, and the catalogue does not know
    "ckpt_post_commit",  # Checkpoint: the catalogue knows, the caller does not
    "sampler_mid_swap",  # Sampler: an adapter is half loaded
)


@dataclass
class _Armed:
    action: str
    at: int
    reached: int = 0


def _read(text: str) -> dict[str, _Armed]:
    armed = {}
    for entry in filter(None, text.split(",")):
        name, _, rest = entry.partition(":")
        action, _, at = rest.partition("@")
        armed[name.strip()] = _Armed(action.strip(), int(at) if at else 0)
    return armed


_armed: dict[str, _Armed] = {}


def arm() -> None:
    """Read the environment anew: for a process that was forked with another one."""
    global _armed
    _armed = _read(os.environ.get(VARIABLE, ""))


arm()


def hit(name: str) -> None:
    """Do here what the environment asks for, if anything."""
    if _armed and name in _armed:
        _act(name, _armed[name])


def _act(name: str, armed: _Armed) -> None:
    armed.reached += 1
    if armed.at and armed.reached != armed.at:
        return
    if armed.action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif armed.action == "abort":
        os.kill(os.getpid(), signal.SIGABRT)
    elif armed.action == "raise":
        raise RuntimeError(f"failpoint {name}")
    elif armed.action == "full":
        raise OSError(errno.ENOSPC, f"failpoint {name}")
    elif armed.action == "io":
        raise OSError(errno.EIO, f"failpoint {name}")
    elif armed.action == "spin":
        while True:
            pass
    elif armed.action.startswith("sleep="):
        time.sleep(float(armed.action.removeprefix("sleep=")))
    else:
        raise ValueError(f"{VARIABLE}: {name} has no action {armed.action!r}")
