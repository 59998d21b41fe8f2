"""The models of the cluster and what can be done with one: the rules of the Training service."""

import asyncio
import contextlib
import logging
import secrets
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field

from tinsmithd.domain import (
    AdamParams,
    BaseModelInfo,
    CheckpointKind,
    CheckpointPath,
    Datum,
    FullConfig,
    LossFn,
    Tuning,
)
from tinsmithd.errors import (
    AlreadyExists,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    Reason,
    ResourceExhausted,
    TinsmithError,
    Unavailable,
)
from tinsmithd.training.checkpoints import CheckpointClient, CheckpointWriter, SaveOptions
from tinsmithd.training.journal import Answer
from tinsmithd.training.parts import NOMINAL_TOKENS, add_metrics, cut, token_count
from tinsmithd.training.scheduler import (
    Call,
    Emit,
    Lane,
    LaneLimits,
    TakeTurn,
    model_lost,
    model_not_found,
)
from tinsmithd.training.trainer import Pieces, Trainer, TrainerLost
from tinsmithd.training.turns import Turns
from tinsmithd.training.validate import check_data

REQUEST_IDS_KEPT_MAX = 10_000
DRAIN_POLL_S = 0.05
_COMING_AND_GOING = ""
"""Whose turns create and delete models: all of these together count as one model."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ModelLimits:
    """Bounds on models and calls; the names are those of the settings."""

    models_max: int
    data_per_call_max: int
    targets_per_position_max: int
    ephemeral_ttl_s: int
    model_idle_ttl_s: float
    quantum_tokens: int
    lane: LaneLimits


@dataclass
class Model:
    """One model: what it is, and its lane."""

    model_id: str
    info: BaseModelInfo
    tuning: Tuning
    user_metadata: Mapping[str, str]
    lane: Lane
    number: int
    """Rises with every model created; orders pages."""
    create_time_s: float = field(default_factory=time.time)
    last_request_time_s: float = field(default_factory=time.time)
    step_count: int = 0


@dataclass(frozen=True)
class NewModel:
    """A checked request for a model; `tuning` or `path`, never both."""

    base_model: str
    tuning: Tuning | None
    path: CheckpointPath | None
    with_optimizer: bool
    user_metadata: Mapping[str, str]
    request_id: str
    digest: bytes


class Models:
    """All models of one rank group.

    Lives on one event loop. Everything that touches the trainer takes a turn.
    """

    def __init__(self, limits: ModelLimits, checkpoints: CheckpointClient) -> None:
        self._limits = limits
        self._checkpoints = checkpoints
        self._models: OrderedDict[str, Model] = OrderedDict()
        self._deletions: set[asyncio.Task[None]] = set()
        self._requests: OrderedDict[str, tuple[bytes, asyncio.Task[Model]]] = OrderedDict()
        self._trainer: Trainer | None = None
        self._turns = Turns()
        self._reading = asyncio.Lock()
        self._created_count = 0
        self.progress = "none has attached yet"
        """What a trainer that is not ready is doing, for a person."""

    # --- the trainer comes and goes -----------------------------------------------------------

    @property
    def trainer(self) -> Trainer:
        """The rank group.

        Raises:
            Unavailable: None is attached (TRAINER_UNAVAILABLE).
        """
        if self._trainer is None:
            raise Unavailable(
                f"the trainer is not ready: {self.progress}",
                Reason.TRAINER_UNAVAILABLE,
                retry_after_s=1.0,
            )
        return self._trainer

    @property
    def ready(self) -> bool:
        """True while a rank group is attached."""
        return self._trainer is not None

    def attach(self, trainer: Trainer) -> None:
        """Use a rank group from now on."""
        self._trainer = trainer

    def detach(self, trainer: Trainer) -> None:
        """A rank group is gone, and with it every model it held."""
        if self._trainer is not trainer:
            return
        self._trainer = None
        self.progress = "it went away and has to start again"
        for model in self._models.values():
            model.lane.close(model_lost(model.model_id))

    # --- models -------------------------------------------------------------------------------

    async def create(self, request: NewModel) -> Model:
        """Create a model, or return the one that this `request_id` created before."""
        if not request.request_id:
            # A caller that goes away half-way must not leave half a model behind.
            return await asyncio.shield(asyncio.create_task(self._create(request)))
        known = self._requests.get(request.request_id)
        if known is None or (known[1].done() and _failed(known[1])):
            known = (request.digest, asyncio.create_task(self._create(request)))
            self._requests[request.request_id] = known
            while len(self._requests) > REQUEST_IDS_KEPT_MAX:
                self._requests.popitem(last=False)
        if known[0] != request.digest:
            message = f"request_id {request.request_id!r} was used with other content"
            raise AlreadyExists(message, Reason.REQUEST_ID_CONFLICT)
        return await asyncio.shield(known[1])

    async def _create(self, request: NewModel) -> Model:
        tuning, step_count = request.tuning, 0
        base_model, trainer = request.base_model, self.trainer
        if request.path is not None:
            if request.with_optimizer and request.path.kind is not CheckpointKind.TRAINING:
                raise _wrong_kind(request.path)
            found = await self._checkpoints.get(request.path)
            self._check_base_model(found.base_model, request.base_model)
            base_model, tuning = found.base_model, found.tuning
            step_count = found.step_count if request.with_optimizer else 0
        if base_model and base_model != trainer.info.name:
            message = f"no base model {base_model!r}; this cluster holds {trainer.info.name!r}"
            raise NotFound(message, Reason.BASE_MODEL_NOT_FOUND)
        model_id = secrets.token_hex(16)
        lane = Lane(model_id, self._limits.lane, self._turns)
        assert tuning is not None  # one of tuning and path is set by the servicer
        self._created_count += 1
        model = Model(
            model_id, trainer.info, tuning, request.user_metadata, lane, self._created_count
        )
        model.step_count = step_count
        turn = self._turns.take(_COMING_AND_GOING, NOMINAL_TOKENS)
        async with self._read(request.path) as pieces, turn:
            self._check_room()
            self._check_alone(tuning)
            try:
                if request.path is None:
                    await trainer.create_model(model_id, tuning)
                else:
                    await trainer.import_state(
                        model_id, pieces, optimizer=request.with_optimizer, create=True
                    )
            except TrainerLost as error:
                text = "the trainer was lost"
                raise Unavailable(text, Reason.TRAINER_UNAVAILABLE, retry_after_s=1.0) from error
            self._models[model_id] = model
        if self._trainer is not trainer:
            lane.close(model_lost(model_id))
        return model

    def _check_room(self) -> None:
        if len(self._models) < self._limits.models_max:
            return
        for model in list(self._models.values()):
            if model.lane.lost:  # only a tombstone; the oldest may go
                del self._models[model.model_id]
                return
        raise ResourceExhausted(
            f"the cluster holds models_max = {self._limits.models_max} models; delete one",
            Reason.TOO_MANY_MODELS,
            metadata={"limit": "models_max", "value": str(len(self._models) + 1)},
        )

    def _check_alone(self, tuning: Tuning) -> None:
        living = [model for model in self._models.values() if not model.lane.lost]
        if any(isinstance(model.tuning, FullConfig) for model in living):
            message = f"model {living[0].model_id} trains all weights and owns the rank group"
            raise FailedPrecondition(message, Reason.RANK_GROUP_TAKEN)
        if living and isinstance(tuning, FullConfig):
            message = (
                f"{len(living)} model(s) are on the rank group, and one that trains all weights "
                "would own it; delete them first"
            )
            raise FailedPrecondition(message, Reason.RANK_GROUP_TAKEN)

    def get(self, model_id: str) -> Model:
        """One model.

        Raises:
            NotFound: There is none of this id (MODEL_NOT_FOUND).
        """
        model = self._models.get(model_id)
        if model is None:
            raise model_not_found(model_id)
        return model

    def list(self) -> Sequence[Model]:
        """All models, newest first."""
        return list(reversed(self._models.values()))

    async def delete(self, model_id: str) -> None:
        """Delete a model; calls that still wait for it fail as not found."""
        model = self.get(model_id)
        del self._models[model_id]
        was_lost = model.lane.lost
        model.lane.close(model_not_found(model_id))
        model.lane.forget()
        if was_lost or self._trainer is None:
            return
        task = asyncio.create_task(self._free(self._trainer, model_id))
        self._deletions.add(task)
        task.add_done_callback(self._deletions.discard)
        await asyncio.shield(task)

    async def _free(self, trainer: Trainer, model_id: str) -> None:
        async with self._turns.take(_COMING_AND_GOING, NOMINAL_TOKENS):
            with contextlib.suppress(TrainerLost):  # then it went with its trainer
                await trainer.delete_model(model_id)

    async def drained(self, timeout_s: float) -> None:
        """Return once no call is under way, or after `timeout_s`."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while not all(model.lane.idle for model in self._models.values()):
                    await asyncio.sleep(DRAIN_POLL_S)

    async def delete_idle(self) -> None:
        """Delete the models that no call used for `model_idle_ttl_s`."""
        oldest_s = time.time() - self._limits.model_idle_ttl_s
        for model in list(self._models.values()):
            if model.last_request_time_s < oldest_s and model.lane.idle:
                _log.info("model %s was idle too long and is deleted", model.model_id)
                await self.delete(model.model_id)

    # --- calls on one model -------------------------------------------------------------------

    def compute(
        self,
        model: Model,
        seq_id: int,
        digest: bytes,
        data: Sequence[Datum],
        loss_fn: LossFn,
        *,
        backward: bool,
    ) -> Answer:
        """Queue a forward or forward_backward; parts are outputs, the value is the metrics."""

        def check() -> None:
            most = self._limits.targets_per_position_max
            check_data(data, loss_fn, model.info, most)

        async def run(emit: Emit, turn: TakeTurn) -> Mapping[str, float]:
            metrics: dict[str, float] = {}
            for part, some in cut(data, self._limits.quantum_tokens, backward=backward):
                async with turn(token_count(some)):
                    compute = self.trainer.compute
                    found = await compute(
                        model.model_id, some, loss_fn, backward=backward, part=part, on_result=emit
                    )
                add_metrics(metrics, found)
            return metrics

        nbytes = sum(datum.nbytes for datum in data)
        return self._submit(model, seq_id, Call(digest, nbytes, run, _refusal(check)))

    def optim_step(self, model: Model, seq_id: int, digest: bytes, adam: AdamParams) -> Answer:
        """Queue an optimizer step; the value is its metrics."""

        async def run(_: Emit, turn: TakeTurn) -> Mapping[str, float]:
            async with turn(NOMINAL_TOKENS):
                metrics = await self.trainer.optim_step(model.model_id, adam)
            model.step_count += 1
            return metrics

        return self._submit(model, seq_id, Call(digest, 0, run))

    def save(self, model: Model, seq_id: int, digest: bytes, options: SaveOptions) -> Answer:
        """Queue a save; the value is `(path, size_bytes)`."""
        optimizer = options.path.kind is CheckpointKind.TRAINING

        async def run(_: Emit, turn: TakeTurn) -> tuple[CheckpointPath, int]:
            writer: CheckpointWriter | None = None
            try:
                async with turn(NOMINAL_TOKENS):
                    writer = self._checkpoints.writer(
                        options, model.info.name, model.tuning, model.step_count
                    )
                    await self.trainer.export_state(
                        model.model_id, optimizer=optimizer, on_piece=writer.write
                    )
                return options.path, await writer.commit()
            except BaseException:
                if writer is not None:
                    writer.cancel()
                raise

        return self._submit(model, seq_id, Call(digest, 0, run))

    def load(
        self, model: Model, seq_id: int, digest: bytes, path: CheckpointPath, *, optimizer: bool
    ) -> Answer:
        """Queue a load; the value is the path."""

        def check() -> None:
            if path.kind is not CheckpointKind.TRAINING:
                raise _wrong_kind(path)

        async def run(_: Emit, turn: TakeTurn) -> CheckpointPath:
            found = await self._checkpoints.get(path)
            self._check_base_model(found.base_model, model.info.name)
            if isinstance(found.tuning, FullConfig) != isinstance(model.tuning, FullConfig):
                message = "of checkpoint and model, one is an adapter and the other all weights"
                raise FailedPrecondition(message, Reason.INCOMPATIBLE_CHECKPOINT)
            async with self._read(path) as pieces, turn(NOMINAL_TOKENS):
                state = await self.trainer.import_state(
                    model.model_id, pieces, optimizer=optimizer, create=False
                )
            model.step_count = state.step_count
            return path

        return self._submit(model, seq_id, Call(digest, 0, run, _refusal(check)))

    def refuse(self, model: Model, seq_id: int, digest: bytes, error: TinsmithError) -> Answer:
        """Let a call that could not even be read consume its number."""

        async def run(_: Emit, turn: TakeTurn) -> None:
            return None

        return self._submit(model, seq_id, Call(digest, 0, run, error))

    def _submit(self, model: Model, seq_id: int, call: Call) -> Answer:
        if seq_id < 0:
            raise InvalidArgument("seq_id", f"{seq_id} is below 0")
        model.last_request_time_s = time.time()
        return model.lane.submit(seq_id, call)

    @contextlib.asynccontextmanager
    async def _read(self, path: CheckpointPath | None) -> AsyncIterator[Pieces]:
        """The files of a checkpoint, whole: one that fails half-way must not reach the ranks, and
        one that comes slowly must not hold a turn. Only one at a time is in memory."""
        if path is None:
            yield ()
            return
        async with self._reading:
            yield [piece async for piece in self._checkpoints.read(path)]

    def _check_base_model(self, found: str, wanted: str) -> None:
        if wanted and found != wanted:
            message = f"the checkpoint is of base model {found!r}, not {wanted!r}"
            raise FailedPrecondition(message, Reason.INCOMPATIBLE_CHECKPOINT)


def _refusal(check: Callable[[], None]) -> TinsmithError | None:
    try:
        check()
    except TinsmithError as error:
        return error
    return None


def _failed(task: asyncio.Task[Model]) -> bool:
    return task.cancelled() or task.exception() is not None


def _wrong_kind(path: CheckpointPath) -> FailedPrecondition:
    return FailedPrecondition(
        f"{path} has no optimizer state: a TRAINING checkpoint is needed",
        Reason.WRONG_CHECKPOINT_KIND,
    )
