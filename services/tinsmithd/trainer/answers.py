"""Messages that both `commands` and `state_sender` send."""

from tinsmith.internal.v1 import trainer_link_service_pb2 as pb
from tinsmithd.convert import types as convert
from tinsmithd.domain import ModelState
from tinsmithd.errors import TinsmithError
from tinsmithd.rpc.status import to_status


def done_with(state: ModelState) -> pb.Done:
    """Say that a whole state was sent or taken."""
    return pb.Done(step_count=state.step_count, **convert.tuning_to_pb(state.tuning))


def failed(error: TinsmithError) -> pb.Failed:
    """Say that a command had no effect, and why."""
    return pb.Failed(status=to_status(error, "").SerializeToString(deterministic=True))
