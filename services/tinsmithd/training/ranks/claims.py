"""What a rank group says of itself, checked and bounded before it is kept, logged or shown."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from tinsmith.internal.v1 import trainer_link_service_pb2 as pb
from tinsmithd.convert import types as convert
from tinsmithd.domain import BaseModelInfo
from tinsmithd.errors import InvalidArgument, over_limit
from tinsmithd.mismatch import BOUNDS_NATS, Mismatch
from tinsmithd.text import bounded

WORLD_SIZE_MAX = 65_536
IDENTITY_ENTRIES_MAX = 64
NAME_BYTES_MAX = 256
VALUE_BYTES_MAX = 1024
COUNT_MAX = 1 << 62
PROGRESS_BYTES_MAX = 200


@dataclass(frozen=True)
class GroupClaim:
    """A rank group's hello.

    Attributes:
        info: The base model that it holds.
        world_size: Number of ranks.
        engine: Name of the engine.
        identity: All that the last bit of a result depends on, besides commands and compositions.
        launch_token: The launcher gave it to the group that it started; else empty.
    """

    info: BaseModelInfo
    world_size: int
    engine: str
    identity: Mapping[str, str]
    launch_token: str

    @classmethod
    def of(cls, hello: pb.Hello) -> "GroupClaim":
        """Read and check a hello.

        Raises:
            InvalidArgument: Something in it is impossible; the field says what.
        """
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
        return cls(info, hello.world_size, hello.engine, dict(hello.identity), hello.launch_token)


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


def progress(loading: pb.Loading) -> str:
    """What a rank group says that it does while it loads: one short line."""
    return bounded(loading.message, PROGRESS_BYTES_MAX)


def _check_count(field: str, value: int, value_max: int) -> None:
    if not 1 <= value <= value_max:
        raise InvalidArgument(field, f"is {value}, not between 1 and {value_max}")


def _check_name(field: str, text: str, bytes_max: int = NAME_BYTES_MAX) -> None:
    # So nothing that is shown later is longer than this, and all of it is one line.
    if bounded(text, bytes_max) != text:
        message = f"is longer than {bytes_max} bytes, or has what cannot be printed"
        raise InvalidArgument(field, message)
