"""Who has how much of the KV cache, and where."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import chain

from tinsmithd.sampler.engines.transformers.kv.arenas import Arena, Holder
from tinsmithd.sampler.engines.transformers.kv.attention import BLOCK_KEYS, KeyCounts
from tinsmithd.sampler.engines.transformers.kv.parts import Prompt, SequenceKv
from tinsmithd.sampler.engines.transformers.model.shape import ModelShape

SMALL_CAPACITIES = (BLOCK_KEYS * 3 // 8, BLOCK_KEYS * 3 // 4)
"""Capacities of slots below a block of keys; above it 1024, 1536, 2048, 3072 and so on."""


class Rooms:
    """Reservations, prompts, and the arenas of sequences.

    Reserved is what requests can ever come to, so that no sequence lacks a slot. Arenas have memory
    for some slots more than are in use, as long as `bytes_max` allows. While a sequence moves to
    a larger slot it has both, and while an arena changes its size one layer of it is there twice.

    Args:
        shape: Of the model.
        counts: Good numbers of keys.
        bytes_max: Maximum bytes.
    """

    def __init__(self, shape: ModelShape, counts: KeyCounts, bytes_max: int) -> None:
        self._shape = shape
        self._counts = counts
        self.bytes_max = bytes_max
        self.token_bytes = 2 * shape.layers * shape.kv_heads * shape.head_dim * shape.dtype.itemsize
        self.reserved_bytes = 0
        self.prompts: set[Prompt] = set()
        """Those whose KV is held."""
        self._arenas: dict[tuple[bool, int], Arena] = {}

    @property
    def sequences(self) -> int:
        """Open sequences."""
        return sum(1 for _sequence in self._open())

    @property
    def tokens(self) -> int:
        """Tokens whose KV is held."""
        prompts = sum(prompt.read for prompt in self.prompts)
        return prompts + sum(sequence.own for sequence in self._open())

    @property
    def held_bytes(self) -> int:
        """Memory of prompts and arenas."""
        prompts = sum(self.prompt_bytes(len(prompt.tokens_P)) for prompt in self.prompts)
        return prompts + sum(map(self._arena_bytes, self._arenas.values()))

    def prompt_bytes(self, tokens: int) -> int:
        """Memory of a prompt."""
        return self._counts.padded(tokens) * self.token_bytes

    def sequence_bytes(self, tokens: int) -> int:
        """Memory of the slot of a sequence of so many tokens."""
        return self._capacity(tokens) * self.token_bytes

    def reserve(self, count_bytes: int) -> bool:
        """Take so much, if it is there."""
        if self.reserved_bytes + count_bytes > self.bytes_max:
            return False
        self.reserved_bytes += count_bytes
        return True

    def give_back(self, count_bytes: int) -> None:
        """Give back what `reserve` gave."""
        self.reserved_bytes -= count_bytes
        assert self.reserved_bytes >= 0

    def free(self, count_bytes: int) -> None:
        """Have so much that nobody holds: arenas lose the slots that are not in use, if need be."""
        if self.held_bytes + count_bytes > self.bytes_max:
            for arena in self._arenas.values():
                arena.compact()
                arena.resize(len(arena.sequences))

    def fork(self, prompt: Prompt) -> list[SequenceKv]:
        """Slots for all samples of a prompt, with its KV in them unless they share it."""
        shared, samples = prompt.reservation.shared, prompt.reservation.samples
        if not samples:
            return []
        tokens = 0 if shared else len(prompt.tokens_P)
        arena = self._arena(prompt, tokens + 1)
        self._make_room(arena, samples)
        sequences = [
            SequenceKv(prompt=prompt, own=tokens, arena=arena) for _sample in range(samples)
        ]
        first = len(arena.sequences)
        for sequence in sequences:
            arena.add(sequence)
        prompt.members = samples
        if tokens:
            assert prompt.kv_LHCD is not None
            for slots, source in zip(arena.kv_SHCD, prompt.kv_LHCD, strict=True):
                slots[first : first + samples, :, :tokens] = source[:, :tokens]
        return sequences

    def arrange(self, decode: Sequence[SequenceKv]) -> list[SequenceKv]:
        """Room for one more token of each sequence; these, in the order of arenas and slots."""
        full = [sequence for sequence in decode if sequence.own == sequence.arena.capacity]
        for sequence in full:
            self._move_up(sequence)
        for arena in self._arenas.values():
            arena.compact()
        if full:
            self.free(0)  # the slots that those sequences left
        return sorted(decode, key=lambda one: (one.arena.shared, one.arena.capacity, one.slot))

    def close_prompt(self, prompt: Prompt) -> None:
        """Give back a prompt's room, or leave it to the last sequence that shares it."""
        if prompt.closed:
            return
        prompt.closed = True
        if not prompt.forked:
            self.give_back(prompt.reservation.samples * prompt.reservation.sequence_bytes)
        self._release(prompt)

    def close_sequence(self, sequence: SequenceKv) -> None:
        """Give back a sequence's room."""
        if sequence.closed:
            return
        sequence.closed = True
        self.give_back(sequence.prompt.reservation.sequence_bytes)
        sequence.prompt.members -= 1
        if sequence.prompt.closed:
            self._release(sequence.prompt)
        arena = sequence.arena
        if all(one.closed for one in arena.sequences):
            arena.sequences.clear()
            arena.resize(0)

    def _release(self, prompt: Prompt) -> None:
        """Give back a closed prompt's KV unless a sequence reads it."""
        if prompt in self.prompts and not (prompt.reservation.shared and prompt.members):
            prompt.kv_LHCD = None
            self.prompts.remove(prompt)
            self.give_back(prompt.reservation.prompt_bytes)

    def _move_up(self, sequence: SequenceKv) -> None:
        """Give a sequence a larger slot."""
        new = self._arena(sequence.prompt, sequence.own + 1)
        self._make_room(new, 1)
        old, slot = sequence.arena, sequence.slot
        old.sequences[slot] = replace(sequence, closed=True)
        new.add(sequence)
        for target, source in zip(new.kv_SHCD, old.kv_SHCD, strict=True):
            target[sequence.slot, :, : sequence.own] = source[slot, :, : sequence.own]

    def _make_room(self, arena: Arena, count: int) -> None:
        """Have memory for so many more sequences in an arena, and for some to come."""
        arena.compact()
        needed = len(arena.sequences) + count
        if needed <= arena.slots:
            return
        slot_bytes = arena.capacity * self.token_bytes
        generous = max(needed, arena.slots + arena.slots // 2)
        if (generous - arena.slots) * slot_bytes > self.bytes_max - self.held_bytes:
            generous = needed
        self.free((generous - arena.slots) * slot_bytes)
        arena.resize(generous)

    def _arena(self, prompt: Prompt, tokens: int) -> Arena:
        """The arena of a prompt's sequences of so many tokens, the next one included."""
        capacity = self._capacity(tokens)
        last = prompt.reservation.sequence_bytes // self.token_bytes
        if capacity >= BLOCK_KEYS and 2 * last <= 3 * capacity:
            # To move a long sequence is dear.
            capacity = last
        key = (prompt.reservation.shared, capacity)
        if key not in self._arenas:
            self._arenas[key] = Arena(self._shape, capacity, prompt.reservation.shared)
        return self._arenas[key]

    def _capacity(self, tokens: int) -> int:
        """The least capacity that is enough. Good numbers of keys up to it never exceed it."""
        small = (self._counts.padded(capacity) for capacity in SMALL_CAPACITIES)
        for capacity in small:
            if tokens <= capacity:
                return capacity
        capacity, grown = BLOCK_KEYS, 2 * BLOCK_KEYS
        while capacity < tokens:
            capacity, grown = grown, max(2 * capacity, 3 * BLOCK_KEYS)
        longest = max(self._counts.padded(self._shape.context), self._counts.padded(tokens))
        return min(capacity, longest)

    def _arena_bytes(self, arena: Arena) -> int:
        return arena.slots * arena.capacity * self.token_bytes

    def _open(self) -> chain[Holder]:
        """Open sequences."""
        return chain.from_iterable(
            (sequence for sequence in arena.sequences if not sequence.closed)
            for arena in self._arenas.values()
        )
