"""What a rank group says of itself, checked and bounded before it is kept, logged or shown."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from tinsmith.internal.v1 import trainer_link_service_pb2 as pb
from tinsmithd.convert import types as convert
from tinsmithd.domain import BaseModelInfo
from tinsmithd.errors import InvalidArgument, over_limit
from tinsmithd.mismatch import BOUNDS_NATS, Mismatch
from tinsmithd.rpc import link_version
from tinsmithd.sizes import NO_WORK, Work
from tinsmithd.text import bounded
from tinsmithd.training.ranks.interface import RankMemory

WORLD_SIZE_MAX = 65_536
IDENTITY_ENTRIES_MAX = 64
NAME_BYTES_MAX = 256
VALUE_BYTES_MAX = 1024
COUNT_MAX = 1 << 62
PROGRESS_BYTES_MAX = 200
MEMORIES_MAX = 256
"""Ranks of which memory is kept: a series each."""


@dataclass(frozen=True)
class GroupClaim:
    """A rank group's hello.

    Attributes:
        info: The base model that it holds.
        world_size: Number of ranks.
        engine: Name of the engine.
        identity: All that the last bit of a result depends on, besides commands and compositions.
        launch_token: The launcher gave it to the group that it started; else empty.
        release: Its release, for a person; may be empty.
        work: What a token costs.
    """

    info: BaseModelInfo
    world_size: int
    engine: str
    identity: Mapping[str, str]
    launch_token: str
    release: str = ""
    work: Work = NO_WORK

    @classmethod
    def of(cls, hello: pb.Hello) -> "GroupClaim":
        """Read and check a hello.

        Raises:
            InvalidArgument: Something in it is impossible; the field says what.
        """
        _check_name("hello.release", hello.release)
        # First of all: what else it says could mean something else.
        if why := link_version.why_not(*link_version.read(hello), hello.release):
            raise InvalidArgument("hello.link_version", why)
        info = convert.base_model_from_pb(hello.base_model, "hello.base_model")
        for key in ("name", "architecture"):
            _check_name(f"hello.base_model.{key}", getattr(info, key))
        for key in ("vocab_size", "context_length", "layer_count", "parameter_count"):
            _check_count(f"hello.base_model.{key}", getattr(info, key), COUNT_MAX)
        if info.active_expert_count:
            field, count = "hello.base_model.active_expert_count", info.active_expert_count
            _check_count(field, count, COUNT_MAX)
        _check_count("hello.world_size", hello.world_size, WORLD_SIZE_MAX)
        _check_name("hello.engine", hello.engine)
        _check_name("hello.launch_token", hello.launch_token)
        if len(hello.identity) > IDENTITY_ENTRIES_MAX:
            count = len(hello.identity)
            raise over_limit("hello.identity", "identity_entries_max", count, IDENTITY_ENTRIES_MAX)
        for key, value in hello.identity.items():
            _check_name("hello.identity", key)
            _check_name(f'hello.identity["{key}"]', value, VALUE_BYTES_MAX)
        for key in ("token_weights", "attention_width"):
            _check_count(f"hello.{key}", getattr(hello, key), COUNT_MAX, least=0)
        work = Work(hello.token_weights, hello.attention_width)
        return cls(
            *(info, hello.world_size, hello.engine, dict(hello.identity)),
            *(hello.launch_token, hello.release, work),
        )


def mismatch_of(done: pb.Done, tokens_max: int) -> Mismatch | None:
    """What rank 0 says of sampled tokens among those of a batch; None where it says nothing.

    Raises:
        InvalidArgument: It is impossible.
    """
    if not done.HasField("mismatch"):
        return None
    said = done.mismatch
    found = Mismatch(list(said.tokens), said.apart_nats, said.kl_nats)
    counts = len(found.tokens) == len(BOUNDS_NATS) + 1 and min(found.tokens) >= 0
    sums = 0 <= found.apart_nats < math.inf and 0 <= found.kl_nats < math.inf
    if not (counts and sums and sum(found.tokens) <= tokens_max):
        raise InvalidArgument("mismatch", f"is not one of {tokens_max} tokens")
    return found


def memory_of(alive: pb.Alive, world_size: int) -> Mapping[int, RankMemory]:
    """What rank 0 says of its group's memory, by rank.

    Raises:
        InvalidArgument: It is impossible.
    """
    if len(alive.memory) > MEMORIES_MAX:
        count = len(alive.memory)
        raise over_limit("alive.memory", "rank_memories_max", count, MEMORIES_MAX)
    found: dict[int, RankMemory] = {}
    for said in alive.memory:
        if not 0 <= said.rank < world_size or said.rank in found:
            raise InvalidArgument("alive.memory.rank", f"{said.rank} is no rank, or comes twice")
        values = {key: getattr(said, key) for key in RankMemory.__dataclass_fields__}
        for key, value in values.items():
            _check_count(f"alive.memory.{key}", value, COUNT_MAX, least=0)
        found[said.rank] = RankMemory(**values)
    return found


def progress(loading: pb.Loading) -> str:
    """What a rank group says that it does while it loads: one short line."""
    return bounded(loading.message, PROGRESS_BYTES_MAX)


def _check_count(field: str, value: int, value_max: int, least: int = 1) -> None:
    if not least <= value <= value_max:
        raise InvalidArgument(field, f"is {value}, not between {least} and {value_max}")


def _check_name(field: str, text: str, bytes_max: int = NAME_BYTES_MAX) -> None:
    # So nothing that is shown later is longer than this, and all of it is one line.
    if bounded(text, bytes_max) != text:
        message = f"is longer than {bytes_max} bytes, or has what cannot be printed"
        raise InvalidArgument(field, message)
