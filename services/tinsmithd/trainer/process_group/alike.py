"""Whether all ranks of a group were set alike: each works out by itself what the others compute.

A rank knows from the data of a call alone which of them are its own. One that cuts or shares them
in another way would compute some twice and others never, and nobody would see it in the result. The
ranks of one machine have one configuration; machines of a group are set and upgraded one by one.
"""

import json
from collections.abc import Callable, Mapping

from tinsmithd.config import TrainerConfig
from tinsmithd.formats import release
from tinsmithd.text import bounded
from tinsmithd.trainer.process_group.heartbeat import MeetError

OF_ONE_MACHINE = frozenset(
    (
        *("log_level", "log_format", "otlp_endpoint", "live_with_pid"),
        *("cluster_tls_certificate_file", "cluster_tls_key_file", "cluster_tls_ca_file"),
        *("training_target", "link_secret_file", "launch_token", "restart", "threads"),
        *("ranks", "nodes", "node", "meet_address"),  # compared when machines meet (`nodes`)
        "base_model",  # a folder may have another place; what is in it is compared when it is read
    )
)
"""Settings that may be others on each machine. All the rest say what a rank computes, when, or how
long the others wait for it."""
RELEASE = "release"
SHOWN_BYTES_MAX = 100
DIFFERENCES_SHOWN = 5

Broadcast = Callable[[bytes | None], bytes]
"""Rank 0 passes bytes, the other ranks pass None; all get rank 0's bytes."""


def said_of(config: TrainerConfig) -> Mapping[str, str]:
    """What must be the same on all ranks of a group."""
    values = config.model_dump(exclude=set(OF_ONE_MACHINE))
    return {RELEASE: release(), **{key: str(value) for key, value in values.items()}}


def check(config: TrainerConfig, rank: int, broadcast: Broadcast) -> None:
    """Refuse to be in a group with a rank 0 that was set in another way; all ranks call it.

    Raises:
        MeetError: That is so; the message says how they differ. It may be otherwise soon: whoever
            sets a group up or upgrades it does one machine after the other.
    """
    own = said_of(config)
    first = broadcast(json.dumps(own).encode() if rank == 0 else None)
    if why := difference(own, first):
        raise MeetError(f"the machines of a rank group must be set alike: {why}")


def difference(own: Mapping[str, str], first: bytes) -> str:
    """How a rank differs from rank 0, for a person; empty where it does not.

    Args:
        own: See `said_of`.
        first: What rank 0 sent: that, as JSON, or of another release anything.
    """
    try:
        theirs = {str(key): str(value) for key, value in json.loads(first).items()}
    except (ValueError, AttributeError):
        return "rank 0 is of another release"
    names = sorted(key for key in {*own, *theirs} if own.get(key) != theirs.get(key))
    said = [
        f"{bounded(key, SHOWN_BYTES_MAX)} is {own.get(key, 'unknown')} here and "
        f"{bounded(theirs.get(key, 'unknown'), SHOWN_BYTES_MAX)} on rank 0"
        for key in names[:DIFFERENCES_SHOWN]
    ]
    return "; ".join(said)
