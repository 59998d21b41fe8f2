"""Ports for what is told its port before it listens, and so must find it free some seconds later.

They are below those that the kernel gives to whoever asks, and other runs of tests on this machine
leave them alone: who takes ports holds a name for them until its process ends.
"""

import contextlib
import random
import socket

_SLOT = 8
_FIRST = range(20_000, 30_000, _SLOT)
_claims: list[socket.socket] = []


def take(count: int = 1) -> int:
    """The first of so many free ports, 8 at most, that follow each other; nobody else gets them."""
    assert count <= _SLOT
    for first in random.sample(_FIRST, len(_FIRST)):
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
            claim = stack.enter_context(socket.socket(socket.AF_UNIX))
            claim.bind(f"\0tinsmith tests have ports from {first}")  # no file: it ends with us
            with contextlib.ExitStack() as probes:
                for port in range(first, first + count):
                    probe = probes.enter_context(socket.socket())
                    probe.bind(("127.0.0.1", port))
            _claims.append(claim)
            stack.pop_all()
            return first
    raise RuntimeError("no free ports")
