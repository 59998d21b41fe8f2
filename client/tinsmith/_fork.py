"""Forked processes: what was in use when a process forked does not work in the child.

grpc's threads are not in the child, and what it holds there crashes, aborts or hangs. A child of a
process that had not used the client yet starts afresh; any other one is told how to do it.
"""

import os

from tinsmith.errors import FailedPreconditionError

# What grpc's own fork handlers do in a child crashed three children in a hundred that did not touch
# the client (8 of 266, against 0 of 205 without them; grpcio 1.85), and nothing here needs them.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")

_in_use = False
_forked_in_use = False


def use() -> None:
    """Say that this process uses grpc from here on.

    Raises:
        FailedPreconditionError: Its parent did so before it forked (FORKED).
    """
    global _in_use
    check()
    _in_use = True


def is_broken() -> bool:
    """True in a process whose parent used grpc before it forked: nothing can be sent from here."""
    return _forked_in_use


def check() -> None:
    """Refuse where the parent of this process used grpc before it forked.

    Raises:
        FailedPreconditionError: It did (FORKED).
    """
    if _forked_in_use:
        raise FailedPreconditionError(
            "this process was forked after its parent had used tinsmith, and grpc does not work in "
            "such a process; start workers with the 'spawn' or 'forkserver' method, such as "
            "ProcessPoolExecutor(mp_context=multiprocessing.get_context('spawn'))",
            reason="FORKED",
        )


def _after_in_child() -> None:
    global _forked_in_use
    _forked_in_use = _forked_in_use or _in_use


if hasattr(os, "register_at_fork"):  # Windows cannot fork
    os.register_at_fork(after_in_child=_after_in_child)
