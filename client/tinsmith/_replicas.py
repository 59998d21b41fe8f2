"""Which of a cluster's Samplers a call goes to, and where it goes when that one fails it.

An address may stand for many Samplers: a list of `host:port` with commas, a name with several
addresses, or both. Any of them answers any call. A call's seed is fixed before it is sent, so
whichever Sampler makes the samples, and however often they are begun, they are the same.

A call goes to the Sampler with the fewest sequences of this process under way. One whose prompt
begins like that of an earlier call follows it while that one has not much more to do than the
idlest: it has the prompt's beginning in its prefix cache.
"""

import asyncio
import contextlib
import hashlib
import logging
import socket
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence, Set
from dataclasses import dataclass

import grpc
import numpy as np

from tinsmith._retry import is_lost, is_retryable
from tinsmith.addresses import SECURE, hosts_of, is_resolved_here
from tinsmith.errors import TinsmithError

RESOLVE_INTERVAL_S = 5.0
"""How old a look at what a name stands for may be when a call is sent."""
AWAY_S = 1.0
"""How long a Sampler that failed a call is passed over where it does not say for how long."""
PREFIX_TOKENS_FIRST = 128
"""Prompts count as alike from so many equal first tokens on, then from twice as many, and so on:
shorter ones are read as fast as they are looked up."""
PREFIXES_MAX = 8192
"""Maximum number of beginnings of prompts whose Sampler is remembered."""
MORE_SEQUENCES = 4
"""A Sampler that knows a prompt may have so many sequences more than the idlest one, or a quarter
more, and still gets it."""

_log = logging.getLogger("tinsmith")


@dataclass(frozen=True)
class Work:
    """What a call is, as far as its place is concerned.

    Attributes:
        weights: Says which weights it needs.
        tokens: Its prompt, int (P,); may be empty.
        sequences: How many it makes.
    """

    weights: str = ""
    tokens: Sequence[int] | np.ndarray = ()
    sequences: int = 1

    def prefixes(self) -> Sequence[bytes]:
        """Digests of the prompt's beginnings, each with the weights; the longest first."""
        seen, found = hashlib.blake2b(self.weights.encode(), digest_size=16), []
        start, end = 0, PREFIX_TOKENS_FIRST
        while end <= len(self.tokens):
            seen.update(np.asarray(self.tokens[start:end], np.int64).tobytes())
            found.append(seen.digest())
            start, end = end, 2 * end
        return found[::-1]


class Replica:
    """One Sampler.

    Attributes:
        target: What its channel was opened with.
        channel: To it.
        sequences: Those of this process that are under way there.
        turn: Number of the last call that it was given.
        away_until_s: Until when it is passed over, by the loop's clock.
        lost: Passed over until it can be reached.
    """

    def __init__(self, target: str, channel: grpc.aio.Channel) -> None:
        self.target = target
        self.channel = channel
        self.sequences = 0
        self.turn = 0
        self.away_until_s = 0.0
        self.lost = False

    def is_here(self, now_s: float) -> bool:
        """Whether it may be given calls: one that was lost, once it can be reached again."""
        if self.away_until_s > now_s:
            return False
        if self.lost:
            state = self.channel.get_state(try_to_connect=True)
            self.lost = state is not grpc.ChannelConnectivity.READY
        return not self.lost


class Replicas:
    """The Samplers that an address stands for. Lives on the background loop.

    Args:
        open_channel: Opens a channel to a target, with the `host:port` that it was found under.
        close_channel: Closes it again.
    """

    def __init__(
        self,
        open_channel: Callable[[str, str], grpc.aio.Channel],
        close_channel: Callable[[str], None],
    ) -> None:
        self._open_channel = open_channel
        self._close_channel = close_channel
        self._address: str | None = None  # what the replicas are those of
        self._wanted = ""
        self._targets: dict[str, Sequence[str]] = {}
        self._replicas: dict[str, Replica] = {}
        self._prefixes: OrderedDict[bytes, str] = OrderedDict()
        self._turn = 0
        self._resolved_s = float("-inf")
        self._resolving: asyncio.Task[None] | None = None

    async def find(self, address: str) -> None:
        """Find out what an address stands for, unless that was found out a short while ago.

        Only the first look is waited for. While a name cannot be looked up, what it stood for is
        still used.
        """
        now_s = asyncio.get_running_loop().time()
        if address == self._address and now_s - self._resolved_s < RESOLVE_INTERVAL_S:
            return
        if self._resolving is None or self._resolving.done() or address != self._wanted:
            self._wanted = address
            self._resolving = asyncio.create_task(self._resolve(address))
        while self._address is None or (address == self._wanted and address != self._address):
            await asyncio.shield(self._resolving)

    async def _resolve(self, address: str) -> None:
        found: dict[str, str] = {}
        for name in hosts_of(address):
            targets = await _targets(name) or self._targets.get(name, [name])
            self._targets[name] = targets
            found |= {target: name for target in targets if target not in found}
        if address != self._wanted:
            return  # another look has begun
        for target in self._replicas.keys() - found.keys():
            self._let_go(self._replicas.pop(target))
        for target, name in found.items():
            if target not in self._replicas:
                self._replicas[target] = Replica(target, self._open_channel(target, name))
        self._address, self._resolved_s = address, asyncio.get_running_loop().time()

    def _let_go(self, replica: Replica) -> None:
        # One that is about to stop ends what it has.
        if not replica.sequences and replica.target not in self._replicas:
            self._close_channel(replica.target)

    @contextlib.contextmanager
    def chosen(self, work: Work, failed: Set[str]) -> Iterator[Replica]:
        """Give a call its Sampler for the body of the `with`.

        Args:
            work: The call.
            failed: Targets that failed it just now.
        """
        replica = self._choose(work, failed)
        self._turn += 1
        replica.turn = self._turn
        replica.sequences += work.sequences
        try:
            yield replica
        finally:
            replica.sequences -= work.sequences
            self._let_go(replica)

    def _choose(self, work: Work, failed: Set[str]) -> Replica:
        if len(self._replicas) == 1:
            return next(iter(self._replicas.values()))
        now_s = asyncio.get_running_loop().time()
        left = [each for each in self._replicas.values() if each.target not in failed]
        here = [each for each in left if each.is_here(now_s)]
        candidates = here or left or list(self._replicas.values())
        chosen = min(candidates, key=lambda each: (each.sequences, each.turn))
        prefixes = work.prefixes()
        known = next((self._prefixes[p] for p in prefixes if p in self._prefixes), None)
        for each in candidates:
            most = chosen.sequences + max(MORE_SEQUENCES, chosen.sequences // 4)
            if each.target == known and each.sequences <= most:
                chosen = each
        for prefix in prefixes:
            self._prefixes[prefix] = chosen.target
            self._prefixes.move_to_end(prefix)
        while len(self._prefixes) > PREFIXES_MAX:
            self._prefixes.popitem(last=False)
        return chosen

    def moves(self, replica: Replica, error: TinsmithError, failed: Set[str]) -> bool:
        """Take note of a failed attempt; True where another Sampler can make it at once.

        Args:
            replica: Where it failed.
            error: How.
            failed: Targets that failed it so far, with this one.
        """
        # The Checkpoint server's troubles are the same for all of them.
        if not is_retryable(error) or error.reason == "CHECKPOINT_UNAVAILABLE":
            return False
        now_s = asyncio.get_running_loop().time()
        replica.lost = replica.lost or is_lost(error)
        replica.away_until_s = now_s + (error.retry_after_s or AWAY_S)
        self._resolved_s = min(self._resolved_s, now_s - RESOLVE_INTERVAL_S)
        others = [each for each in self._replicas.values() if each.target not in failed]
        moves = any(each.is_here(now_s) for each in others)
        if moves:
            _log.debug("a call moves from %s to another Sampler: %s", replica.target, error)
        return moves

    def close(self) -> None:
        """Stop to look names up."""
        if self._resolving is not None:
            self._resolving.cancel()


async def _targets(name: str) -> Sequence[str]:
    """What one `host:port` stands for, which may be itself; empty where that cannot be seen."""
    plain = name.removeprefix(SECURE)
    scheme = name.removesuffix(plain)
    if not is_resolved_here(plain):
        return [name]
    host, _, port = plain.rpartition(":")
    loop = asyncio.get_running_loop()
    try:
        found = await loop.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return []
    # One machine often has an address of each family. Many of one family are many machines.
    for family, form in ((socket.AF_INET, "{}:{}"), (socket.AF_INET6, "[{}]:{}")):
        addresses = sorted({form.format(*each[4][:2]) for each in found if each[0] == family})
        if len(addresses) > 1:
            return [f"{scheme}{address}" for address in addresses]
    return [name]
