"""Which data of a call begin alike, so that their first tokens are computed once.

The rollouts of a prompt, and whatever stands after the same instructions, share tokens. In a causal
model what is computed of a token depends on the tokens before it alone. So data that begin alike
are a tree: each *segment* is a run of tokens that is computed once, in the context of the segments
above it. A datum is the path of its segments from a root.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import numpy as np

SHARED_TOKENS_MIN = 4
"""Fewest tokens that are shared; a prompt of a few words with many rollouts has no more."""
SAVED_TOKENS_MIN = 16
"""Tokens that sharing has to save: it costs an attention of its own."""
DEPTH_MAX = 8
"""Segments of a path: attention reads each segment above, so whoever nests thousands gains no more
than this."""

KEYS_PER_TOKEN_MAX = 8
"""Keys that attention may read in a unit for each token that is computed, and positions of its data
that may share one: those above a segment may be copied for it, and each datum has targets of its
own. A thousand short answers to one long question are some units."""
LONG_SHARE = 1.25
"""Times its own tokens that a datum which is longer than a micro-batch may be computed with, where
what is more shares its beginning: it would be a micro-batch by itself in any case."""


@dataclass(frozen=True)
class Segment:
    """Tokens that are computed together.

    Attributes:
        datum: One of those that have them.
        start: Their place in it: as many tokens stand above.
        stop: Where they end there.
        context: Numbers of the segments above, the root first.
    """

    datum: int
    start: int
    stop: int
    context: tuple[int, ...] = ()

    @property
    def length(self) -> int:
        """Number of its tokens."""
        return self.stop - self.start


@dataclass
class Layout:
    """How the tokens of some data stand in one row, each run once.

    Attributes:
        tokens: Of each datum, int64 `(N,)`.
        segments: In the order in which they stand.
        paths: For each datum, the numbers of its segments, from the first token to the last.
    """

    tokens: Sequence[np.ndarray]
    segments: list[Segment] = field(default_factory=list)
    paths: dict[int, tuple[int, ...]] = field(default_factory=dict)

    @cached_property
    def count(self) -> int:
        """Number of tokens that are computed."""
        return sum(segment.length for segment in self.segments)

    @property
    def lengths(self) -> list[int]:
        """Tokens of each segment."""
        return [segment.length for segment in self.segments]

    @property
    def contexts(self) -> list[tuple[int, ...]]:
        """Of each segment, see `Segment.context`."""
        return [segment.context for segment in self.segments]

    @cached_property
    def shares(self) -> bool:
        """Whether any token is computed for several data."""
        return self.count < sum(map(len, self.tokens))

    def row(self) -> np.ndarray:
        """The tokens that are computed, `(count,)`."""
        return np.concatenate([self.tokens[s.datum][s.start : s.stop] for s in self.segments])

    def positions(self) -> np.ndarray:
        """The position of each of them in its data, int64 `(count,)`."""
        return np.concatenate([np.arange(s.start, s.stop) for s in self.segments])

    def places(self) -> np.ndarray:
        """Where the tokens of one datum after the other stand in the row, int64 `(T,)`."""
        starts = np.cumsum([0, *self.lengths])
        runs = [
            np.arange(starts[number], starts[number + 1])
            for datum in range(len(self.tokens))
            for number in self.paths[datum]
        ]
        return np.concatenate(runs)


def lay_out(tokens: Sequence[np.ndarray], *, share: bool = True) -> Layout:
    """Lay some data out.

    The result depends on the arguments only. Data that share nothing stand in their order.

    Args:
        tokens: Of each datum, int64 `(N,)`.
        share: Whether data that begin alike share segments.
    """
    layout = Layout(tokens)
    if share:
        for root in _begin_alike(tokens):
            _grow(layout, root, 0, ())
        if layout.shares:
            return layout
        layout = Layout(tokens)
    for datum in range(len(tokens)):
        _end(layout, datum, 0, ())
    return layout


def _begin_alike(tokens: Sequence[np.ndarray]) -> list[list[int]]:
    """Data whose first tokens are equal, each group sorted by content; groups by their first."""
    groups: dict[object, list[int]] = {}
    for datum, row in enumerate(tokens):
        alone = len(row) < SHARED_TOKENS_MIN
        key = datum if alone else row[:SHARED_TOKENS_MIN].tobytes()
        groups.setdefault(key, []).append(datum)
    for group in groups.values():
        if len(group) > 1:
            group.sort(key=lambda datum: (tokens[datum].tobytes(), datum))
    return list(groups.values())


def _grow(layout: Layout, data: Sequence[int], depth: int, context: tuple[int, ...]) -> None:
    """Add the segments of data, sorted by content, whose first `depth` tokens are the context's."""
    tokens = layout.tokens
    for some, common in _worthwhile(tokens, data, depth):
        if len(some) == 1 or len(context) + 1 == DEPTH_MAX:
            for datum in some:
                _end(layout, datum, depth, context)
            continue
        number = len(layout.segments)
        layout.segments.append(Segment(some[0], depth, common, context))
        _grow(layout, some, common, (*context, number))


def _end(layout: Layout, datum: int, depth: int, context: tuple[int, ...]) -> None:
    """Add what is left of a datum, which may be nothing."""
    length = len(layout.tokens[datum])
    layout.paths[datum] = context
    if length > depth:
        layout.paths[datum] = (*context, len(layout.segments))
        layout.segments.append(Segment(datum, depth, length, context))


def _worthwhile(
    tokens: Sequence[np.ndarray], data: Sequence[int], depth: int
) -> Iterator[tuple[list[int], int]]:
    """Data that share so many tokens beyond the first `depth` that it pays, and how many they have
    in common from the first on; others are alone."""
    for some in _split(tokens, data, depth, SHARED_TOKENS_MIN):
        common = _common(tokens, some)
        if (len(some) - 1) * (common - depth) >= SAVED_TOKENS_MIN:
            yield some, common
            continue
        for part in _split(tokens, some, depth, SAVED_TOKENS_MIN):  # it may share more
            yield part, _common(tokens, part)


def _split(
    tokens: Sequence[np.ndarray], data: Sequence[int], depth: int, least: int
) -> Iterator[list[int]]:
    """Runs of data that have so many tokens in common beyond the first `depth`."""
    run = [data[0]]
    for datum in data[1:]:
        here, there = (tokens[d][depth : depth + least] for d in (run[-1], datum))
        if len(here) == least and np.array_equal(here, there):
            run.append(datum)
        else:
            yield run
            run = [datum]
    yield run


def _common(tokens: Sequence[np.ndarray], data: Sequence[int]) -> int:
    """Number of tokens that data, sorted by content, have in common from the first on."""
    # The first and the last have the least in common.
    first, second = tokens[data[0]], tokens[data[-1]]
    count = min(len(first), len(second))
    differ = np.flatnonzero(first[:count] != second[:count])
    return int(differ[0]) if len(differ) else count


@dataclass(frozen=True)
class Unit:
    """Data that stay together in a micro-batch.

    Attributes:
        data: Their numbers; several share tokens.
        tokens: Number of tokens to compute.
        size: What they take of a micro-batch's tokens.
    """

    data: tuple[int, ...]
    tokens: int
    size: int


@dataclass(frozen=True)
class Room:
    """How large a unit may be.

    Attributes:
        tokens: Most that one takes of a micro-batch's tokens.
        long_tokens: Most tokens of one with a longer datum, if `LONG_SHARE` is more; 0: that is
            alone.
        context_key_tokens: What a key of a segment above takes, in tokens.
    """

    tokens: int
    long_tokens: int = 0
    context_key_tokens: float = 0.0

    def size(self, tokens: int, context_keys: int) -> int:
        """What some tokens take that have so many keys above."""
        return tokens + math.ceil(context_keys * self.context_key_tokens)

    def holds(self, tokens: int, context_keys: int, longest: int) -> bool:
        """Whether they may be a unit, of which the longest datum has so many tokens."""
        if longest <= self.tokens or not self.long_tokens:
            return self.size(tokens, context_keys) <= self.tokens
        # Layers are computed again there, and only one layer's keys are kept at a time.
        return tokens <= max(longest, min(int(LONG_SHARE * longest), self.long_tokens))


def units(
    tokens: Sequence[np.ndarray],
    *,
    tokens_max: int,
    world_size: int,
    long_tokens_max: int = 0,
    context_key_tokens: float = 0.0,
) -> list[Unit]:
    """Cut some data into those that are computed together because they begin alike.

    The result depends on the arguments only.

    Args:
        tokens: Of each datum, int64 `(N,)`.
        tokens_max: Maximum tokens of a micro-batch; a longer datum is a unit by itself.
        world_size: Number of ranks; no unit is so large that others would have no work.
        long_tokens_max: Maximum tokens up to which others may share with such a datum, see
            `LONG_SHARE`; 0: none may.
        context_key_tokens: See `Room`.
    """
    layout = lay_out(tokens)
    share = max(-(-layout.count // world_size), 1)
    room = Room(min(tokens_max, share), min(long_tokens_max, share), context_key_tokens)
    found: list[Unit] = []
    now = _Growing(layout, room)
    for datum in layout.paths:
        if now.data and not now.has_room_for(datum):
            found.append(now.unit())
            now = _Growing(layout, room)
        now.add(datum)
    return [*found, now.unit()]


class _Size(NamedTuple):
    """Tokens to compute, keys above them, keys that attention reads, and the longest datum."""

    tokens: int = 0
    context_keys: int = 0
    keys: int = 0
    longest: int = 0


class _Growing:
    """A unit to which data are added, in the order of their paths."""

    def __init__(self, layout: Layout, room: Room) -> None:
        self._layout, self._room = layout, room
        self.data: list[int] = []
        self._seen: set[int] = set()
        self._size = _Size()

    def _with(self, datum: int) -> _Size:
        layout, path, size = self._layout, self._layout.paths[datum], self._size
        new = [layout.segments[number] for number in path if number not in self._seen]
        length = len(layout.tokens[datum])
        return _Size(
            size.tokens + sum(segment.length for segment in new),
            size.context_keys + sum(segment.start for segment in new),
            # Of one that is there already nothing is computed; it has its targets all the same.
            size.keys + (sum(segment.stop for segment in new) or length),
            max(size.longest, length),
        )

    def has_room_for(self, datum: int) -> bool:
        """Whether one more may be added, which shares with those that are there."""
        size = self._with(datum)
        shares = not self._seen.isdisjoint(self._layout.paths[datum])
        fits = self._room.holds(size.tokens, size.context_keys, size.longest)
        return shares and fits and size.keys <= KEYS_PER_TOKEN_MAX * size.tokens

    def add(self, datum: int) -> None:
        """Add one."""
        self._size = self._with(datum)
        self.data.append(datum)
        self._seen.update(self._layout.paths[datum])

    def unit(self) -> Unit:
        """What came of it."""
        tokens, context_keys = self._size[:2]
        return Unit(tuple(self.data), tokens, self._room.size(tokens, context_keys))
