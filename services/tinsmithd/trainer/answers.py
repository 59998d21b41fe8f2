"""Answers that several parts of a rank give."""

from tinsmith.internal.v1 import trainer_link_service_pb2 as pb
from tinsmithd.convert import types as convert
from tinsmithd.domain import ModelState
from tinsmithd.errors import TinsmithError
from tinsmithd.rpc.status import to_status


def done_with(state: ModelState) -> pb.Done:
    """A whole state was sent or taken."""
    return pb.Done(step_count=state.step_count, **convert.tuning_to_pb(state.tuning))


def failed(error: TinsmithError) -> pb.Failed:
    """The command had no effect."""
    return pb.Failed(status=to_status(error, "").SerializeToString(deterministic=True))
