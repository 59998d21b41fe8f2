"""Messages that both `commands` and `state_sender` send."""

from tinsmith.internal.v1 import trainer_link_service_pb2 as pb
from tinsmithd.convert import types as convert
from tinsmithd.domain import ModelState
from tinsmithd.errors import TinsmithError
from tinsmithd.mismatch import Mismatch
from tinsmithd.rpc.status import to_status
from tinsmithd.trainer.engines.interface import ForwardResult


def done_with(state: ModelState) -> pb.Done:
    """Say that a whole state was sent or taken."""
    return pb.Done(step_count=state.step_count, **convert.tuning_to_pb(state.tuning))


def computed(result: ForwardResult, engine_s: float, mismatch: Mismatch | None) -> pb.Done:
    """Say what a batch gave, besides its outputs.

    Args:
        result: Of the engine.
        engine_s: Seconds that it took.
        mismatch: None where the loss is given no sampling logprobs.
    """
    done = pb.Done(
        metrics=result.metrics,
        composition=result.composition,
        non_finite=result.non_finite,
        engine_s=engine_s,
    )
    if mismatch is not None:
        done.mismatch.CopyFrom(pb.Mismatch(**vars(mismatch)))
    return done


def failed(error: TinsmithError) -> pb.Failed:
    """Say that a command had no effect, and why."""
    return pb.Failed(status=to_status(error, "").SerializeToString(deterministic=True))
