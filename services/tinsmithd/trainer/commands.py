"""Carries out the Training server's commands on an engine: the same on every rank.

Rank 0 answers through `reply`; the others do the same work and say nothing.
"""

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from tinsmith.internal.v1 import trainer_link_service_pb2 as pb
from tinsmith.v1 import types_pb2
from tinsmith.v1.training_service_pb2 import DatumOutput
from tinsmithd import state_files
from tinsmithd.convert import types as convert
from tinsmithd.convert.tensors import array_to_pb
from tinsmithd.errors import Internal, TinsmithError
from tinsmithd.trainer.engines.interface import ModelBroken, TrainingEngine

PIECE_BYTES_MAX = 1024 * 1024
RANK_MAX = 1 << 30
"""The Training server has checked the rank."""

_log = logging.getLogger(__name__)

Reply = Callable[[pb.AttachRequest], None]


class Commands:
    """Applies commands, one after the other, to one engine."""

    def __init__(self, engine: TrainingEngine, *, world_size: int) -> None:
        self._engine = engine
        self._world_size = world_size
        self._model_ids: set[str] = set()
        self._pieces: dict[str, bytearray] = {}

    def apply(self, command: pb.AttachResponse, reply: Reply) -> None:
        """Carry out one command and answer it.

        Raises:
            Exception: Something unexpected, with more than one rank: they may no longer be in
                step, so the group must end and start again.
        """
        case = command.WhichOneof("command")
        if case == "piece":
            self._pieces.setdefault(command.piece.file_name, bytearray()).extend(command.piece.data)
            return
        handler: Callable[[pb.AttachResponse, Reply], pb.Done] = getattr(self, f"_{case}")
        answer = pb.AttachRequest(command_id=command.command_id)
        try:
            answer.done.CopyFrom(handler(command, reply))
        except TinsmithError as error:
            answer.failed.CopyFrom(_failed(error))
        except ModelBroken as error:
            self._engine.delete_model(command.model_id)
            self._model_ids.discard(command.model_id)
            answer.failed.CopyFrom(pb.Failed(message=str(error), model_broken=True))
        except Exception:
            if self._world_size > 1:
                raise
            _log.exception("%s of model %s failed", case, command.model_id)
            answer.failed.CopyFrom(_failed(Internal()))
        reply(answer)

    def forget_models(self) -> None:
        """Drop every model: the Training server that knew them is gone."""
        for model_id in sorted(self._model_ids):
            self._engine.delete_model(model_id)
        self._model_ids.clear()
        self._pieces.clear()

    # --- one method per command ---------------------------------------------------------------

    def _create_model(self, command: pb.AttachResponse, reply: Reply) -> pb.Done:
        tuning = convert.tuning_from_pb(command.create_model, "", RANK_MAX)
        self._engine.create_model(command.model_id, tuning)
        self._model_ids.add(command.model_id)
        return pb.Done()

    def _delete_model(self, command: pb.AttachResponse, reply: Reply) -> pb.Done:
        self._engine.delete_model(command.model_id)
        self._model_ids.discard(command.model_id)
        return pb.Done()

    def _compute(self, command: pb.AttachResponse, reply: Reply) -> pb.Done:
        compute = command.compute

        def on_result(index: int, outputs: Mapping[str, np.ndarray]) -> None:
            packed = {k: array_to_pb(v, types_pb2.TENSOR_FORMAT_PACKED) for k, v in outputs.items()}
            results = pb.DatumResults(outputs=[DatumOutput(loss_fn_outputs=packed)])
            reply(pb.AttachRequest(command_id=command.command_id, results=results))

        with self._whole_call(command.model_id, compute.part):
            metrics = self._engine.forward(
                command.model_id,
                [convert.datum_from_pb(d, f"data[{i}]") for i, d in enumerate(compute.data)],
                convert.loss_fn_from_pb(compute.loss_fn, "loss_fn"),
                backward=compute.backward,
                on_result=on_result,
            )
        return pb.Done(metrics=metrics)

    @contextlib.contextmanager
    def _whole_call(self, model_id: str, part: pb.CallPart.ValueType) -> Iterator[None]:
        """Let a call that comes in several parts take effect wholly or not at all."""
        if part == pb.CALL_PART_FIRST:
            self._engine.savepoint(model_id)
        try:
            yield
        except ModelBroken:
            raise
        except Exception:
            if part != pb.CALL_PART_UNSPECIFIED:
                self._roll_back(model_id)
            raise

    def _roll_back(self, model_id: str) -> None:
        try:
            self._engine.rollback(model_id)
        except Exception as error:
            text = f"the parts of a failed call could not be undone: {error}"
            raise ModelBroken(text) from error

    def _optim_step(self, command: pb.AttachResponse, reply: Reply) -> pb.Done:
        adam = convert.adam_from_pb(command.optim_step.adam_params, "adam_params")
        return pb.Done(metrics=self._engine.optim_step(command.model_id, adam))

    def _export_state(self, command: pb.AttachResponse, reply: Reply) -> pb.Done:
        state = self._engine.export_state(
            command.model_id, optimizer=command.export_state.optimizer
        )
        for file_name, data in state_files.to_files(state).items():
            for start in range(0, len(data), PIECE_BYTES_MAX):
                piece = pb.StatePiece(
                    file_name=file_name, data=data[start : start + PIECE_BYTES_MAX]
                )
                reply(pb.AttachRequest(command_id=command.command_id, piece=piece))
        return _done(state)

    def _import_state(self, command: pb.AttachResponse, reply: Reply) -> pb.Done:
        files = {name: bytes(data) for name, data in self._pieces.items()}
        self._pieces.clear()
        state = state_files.from_files(files)
        optimizer = command.import_state.optimizer
        if command.import_state.create:
            self._engine.create_model(command.model_id, state.tuning)
            self._model_ids.add(command.model_id)
            try:
                self._engine.import_state(command.model_id, state, optimizer=optimizer)
            except BaseException:
                self._engine.delete_model(command.model_id)
                self._model_ids.discard(command.model_id)
                raise
        else:
            self._engine.import_state(command.model_id, state, optimizer=optimizer)
        if not optimizer:
            return pb.Done(**convert.tuning_to_pb(state.tuning))
        return _done(state)


def _done(state: Any) -> pb.Done:
    return pb.Done(step_count=state.step_count, **convert.tuning_to_pb(state.tuning))


def _failed(error: TinsmithError) -> pb.Failed:
    return pb.Failed(
        error=type(error).__name__,
        reason=str(error.reason),
        message=error.message,
        field=error.field,
    )
