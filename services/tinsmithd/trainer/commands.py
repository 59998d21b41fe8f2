"""Carries out the Training server's commands, the same ones on every rank.

Rank 0 answers through `reply`; the others do the same work and say nothing.
"""

import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from tinsmith import tensors
from tinsmith.internal.v1 import trainer_link_service_pb2 as pb
from tinsmith.v1 import training_service_pb2, types_pb2
from tinsmithd import failpoints, tracing
from tinsmithd.convert import types as convert
from tinsmithd.domain import ModelState
from tinsmithd.errors import Internal, InvalidArgument, TinsmithError
from tinsmithd.mismatch import Mismatch
from tinsmithd.modeling.device_errors import is_sticky
from tinsmithd.owners import logged_id, owner_of
from tinsmithd.state import files as state_files
from tinsmithd.trainer import progress
from tinsmithd.trainer.answers import computed, done_with, failed
from tinsmithd.trainer.engines.interface import (
    Batch,
    CompositionMismatch,
    DatumOutput,
    ModelBroken,
)
from tinsmithd.trainer.engines.registry import Engines
from tinsmithd.trainer.process_group import memory
from tinsmithd.trainer.state_sender import Later, StateSender

RANK_MAX = 1 << 30
"""No bound: the Training server has checked the rank of an adapter."""

_log = logging.getLogger(__name__)

Reply = Callable[[pb.AttachRequest], None]


@dataclass(frozen=True)
class _Replies:
    """Where answers go: `now` sends at once, `later` when nothing else is to be sent."""

    now: Reply
    later: Later


class Commands:
    """Applies commands, one after the other, to the engine of their model.

    Args:
        engines: The engines.
        world_size: Number of ranks.
        rank: Number of this rank; only rank 0 sends states.
    """

    def __init__(self, engines: Engines, *, world_size: int, rank: int = 0) -> None:
        self._engines = engines
        self._world_size = world_size
        self._model_ids: set[str] = set()
        self._pieces: dict[str, bytearray] = {}
        self._state_sender = StateSender() if rank == 0 else None
        self._handlers: Mapping[str, Callable[[pb.AttachResponse, _Replies], pb.Done | None]] = {
            "create_model": self._create_model,
            "delete_model": self._delete_model,
            "compute": self._compute,
            "optim_step": self._optim_step,
            "copy_state": self._copy_state,
            "import_state": self._import_state,
        }

    def apply(self, command: pb.AttachResponse, reply: Reply, later: Later | None = None) -> None:
        """Carry out one command and answer it.

        Args:
            command: The command.
            reply: Takes the answers.
            later: Takes the answers that have time; None sends them to `reply`, too.

        Raises:
            Exception: Something unexpected happened, or a model broke, and there are several ranks.
                They may no longer be in step, so the group must end and start again. Or the device
                is lost to this process.
        """
        case = command.WhichOneof("command")
        if case == "piece":
            # Never joined at the end: of a large state that takes seconds, in which no other thread
            # of this process gets to say that it lives.
            self._pieces.setdefault(command.piece.file_name, bytearray()).extend(command.piece.data)
            return
        with progress.under_way(str(case)), _serving(command, str(case)):
            self._apply(command, _Replies(reply, later or _at_once(reply)))
        memory.look()

    def _apply(self, command: pb.AttachResponse, replies: _Replies) -> None:
        case = command.WhichOneof("command")
        answer = pb.AttachRequest(command_id=command.command_id)
        if case is None:
            # All ranks read the same bytes, so none of them knows it, and they stay in step.
            _log.error("the Training server of a later release asks for what this one cannot do")
            answer.failed.CopyFrom(failed(Internal()))
            replies.now(answer)
            return
        try:
            done = self._handlers[str(case)](command, replies)
            if done is None:
                return
            answer.done.CopyFrom(done)
        except TinsmithError as error:
            answer.failed.CopyFrom(failed(error))
        except ModelBroken as error:
            if self._world_size > 1 or is_sticky(error):
                raise
            self._engines.delete_model(command.model_id)
            self._model_ids.discard(command.model_id)
            answer.failed.CopyFrom(pb.Failed(model_broken=str(error) or type(error).__name__))
        except Exception as error:
            if self._world_size > 1 or is_sticky(error):
                raise
            _log.exception("%s of model %s failed", case, logged_id(command.model_id))
            answer.failed.CopyFrom(failed(Internal()))
        replies.now(answer)

    def forget_models(self) -> None:
        """Drop every model: the Training server that knew them is gone."""
        for model_id in sorted(self._model_ids):
            self._engines.delete_model(model_id)
        self._model_ids.clear()
        self._pieces.clear()

    # --- one method per command ---------------------------------------------------------------

    def _create_model(self, command: pb.AttachResponse, replies: _Replies) -> pb.Done:
        tuning = convert.tuning_from_pb(command.create_model, "", RANK_MAX)
        self._engines.create_model(command.model_id, tuning)
        self._model_ids.add(command.model_id)
        return pb.Done()

    def _delete_model(self, command: pb.AttachResponse, replies: _Replies) -> pb.Done:
        self._engines.delete_model(command.model_id)
        self._model_ids.discard(command.model_id)
        return pb.Done()

    def _compute(self, command: pb.AttachResponse, replies: _Replies) -> pb.Done:
        with self._whole_call(command.model_id, command.compute.place):
            try:
                return self._forward(command, replies)
            except CompositionMismatch as error:
                raise InvalidArgument("composition", str(error)) from error

    def _forward(self, command: pb.AttachResponse, replies: _Replies) -> pb.Done:
        """Compute a batch; outputs go out as they come."""
        compute = command.compute

        def on_output(index: int, arrays: DatumOutput) -> None:
            output = training_service_pb2.DatumOutput()
            for name, array in arrays.items():
                tensors.write(output.loss_fn_outputs[name], array)
            if mismatch is not None:
                mismatch.add(arrays["logprobs"], data[index].loss_fn_inputs)
            message = pb.AttachRequest(command_id=command.command_id)
            message.outputs.outputs.append(output.SerializeToString(deterministic=True))
            replies.now(message)

        with _reading("data"):
            loss_fn = convert.loss_fn_from_pb(compute.loss_fn, "loss_fn")
            data = [
                convert.datum_from_pb(types_pb2.Datum.FromString(datum), f"data[{i}]")
                for i, datum in enumerate(compute.data)
            ]
            data = [datum.completed(loss_fn) for datum in data]
        mismatch = Mismatch() if "logprobs" in loss_fn.inputs else None
        batch = Batch(command.model_id, data, loss_fn, compute.backward, compute.composition)
        start_s = time.perf_counter()
        with tracing.span("engine compute", data=len(data), backward=compute.backward):
            result = self._engines.of(batch.model_id).forward(batch, on_output)
        return computed(result, time.perf_counter() - start_s, mismatch)

    @contextlib.contextmanager
    def _whole_call(self, model_id: str, place: pb.BatchPlace.ValueType) -> Iterator[None]:
        """Make a call of several batches take effect wholly or not at all."""
        if place == pb.BATCH_PLACE_FIRST:
            self._engines.of(model_id).savepoint(model_id)
        try:
            yield
        except ModelBroken:
            raise
        except Exception:
            if place != pb.BATCH_PLACE_UNSPECIFIED:
                self._roll_back(model_id)
            raise

    def _roll_back(self, model_id: str) -> None:
        try:
            self._engines.of(model_id).rollback(model_id)
        except Exception as error:
            text = f"the batches of a failed call could not be undone: {error}"
            raise ModelBroken(text) from error

    def _optim_step(self, command: pb.AttachResponse, replies: _Replies) -> pb.Done:
        adam = convert.adam_from_pb(command.optim_step.adam_params, "adam_params")
        engine = self._engines.of(command.model_id)
        with tracing.span("engine optimizer step"):
            return pb.Done(metrics=engine.optim_step(command.model_id, adam))

    def _copy_state(self, command: pb.AttachResponse, replies: _Replies) -> None:
        def copy() -> ModelState:
            engine, optimizer = self._engines.of(command.model_id), command.copy_state.optimizer
            with tracing.span("engine export state"):
                return engine.export_state(command.model_id, optimizer=optimizer)

        if self._state_sender is None:
            copy()  # the ranks do it together
        else:
            self._state_sender.take(
                *(command.command_id, copy, replies.now, replies.later),
                command.copy_state.deposit,
                urgent=not command.copy_state.optimizer,  # it is for a Sampler
            )

    def _import_state(self, command: pb.AttachResponse, replies: _Replies) -> pb.Done:
        files, self._pieces = self._pieces, {}
        state = _checked_state(files, command.import_state)
        optimizer = command.import_state.optimizer
        failpoints.hit("import_mid")
        if command.import_state.create:
            self._engines.create_model(command.model_id, state.tuning)
            self._model_ids.add(command.model_id)
            try:
                self._import(command.model_id, state, optimizer=optimizer)
            except BaseException:
                self._engines.delete_model(command.model_id)
                self._model_ids.discard(command.model_id)
                raise
        else:
            self._import(command.model_id, state, optimizer=optimizer)
        if not optimizer:
            return pb.Done(**convert.tuning_to_pb(state.tuning))
        return done_with(state)

    def _import(self, model_id: str, state: ModelState, *, optimizer: bool) -> None:
        with tracing.span("engine import state"):
            self._engines.of(model_id).import_state(model_id, state, optimizer=optimizer)


@contextlib.contextmanager
def _serving(command: pb.AttachResponse, case: str) -> Iterator[None]:
    """Serve the call that a command is part of, in the body of the `with`."""
    call = tracing.ServedCall(
        case,
        owner_of(command.model_id) if command.request_id else "",
        parent=tracing.read_traceparent(command.traceparent),
        given_id=command.request_id,
    )
    with tracing.serving(call):
        if call.parent is None:
            yield
            return
        with tracing.served(f"rank {case}", {}):
            yield


def _checked_state(files: Mapping[str, bytearray], command: pb.ImportState) -> ModelState:
    """Read a state. All ranks have the same bytes, so all refuse the same states.

    Raises:
        DataLoss: The files are damaged, or not those of the checkpoint that the command describes
            (CHECKPOINT_CORRUPT).
    """
    if command.WhichOneof("tuning") is None:
        return state_files.from_files(files, None, values=False)
    state = state_files.from_files(files, convert.tuning_from_pb(command, "", RANK_MAX))
    if command.optimizer and state.step_count != command.step_count:
        steps = f"{state.step_count} steps, said to be {command.step_count}"
        raise state_files.corrupt(f"{state_files.STATE_FILE}: {steps}")
    if command.optimizer and state.step_count and not state.optimizer:
        steps = f"{state.step_count} steps, and no {state_files.OPTIMIZER_FILE}"
        raise state_files.corrupt(f"{state_files.STATE_FILE}: {steps}")
    return state


@contextlib.contextmanager
def _reading(field: str) -> Iterator[None]:
    """Refuse what cannot be read. All ranks have the same bytes, so all refuse it."""
    try:
        yield
    except (TinsmithError, MemoryError):
        raise
    except Exception as error:
        _log.exception("%s cannot be read", field)
        raise InvalidArgument(field, f"cannot be read ({type(error).__name__})") from error


def _at_once(reply: Reply) -> Later:
    def send(message: pb.AttachRequest) -> bool:
        reply(message)
        return True

    return send
