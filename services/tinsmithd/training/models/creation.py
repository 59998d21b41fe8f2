"""How a model comes: onto the ranks, into the journal, and then it is there."""

import contextlib
from collections.abc import AsyncIterator, Callable

from tinsmithd.domain import CheckpointInfo, CheckpointKind, Tuning
from tinsmithd.errors import NotFound, Reason, Unavailable
from tinsmithd.owners import inner_id
from tinsmithd.training.call import NOMINAL_TOKENS, shutting_down
from tinsmithd.training.journal import AddModel, Fenced
from tinsmithd.training.models.checkpoints import check_base_model, check_claim, wrong_kind
from tinsmithd.training.models.execution import give_lane
from tinsmithd.training.models.known_requests import KnownRequests
from tinsmithd.training.models.model import Model, NewModel
from tinsmithd.training.models.model_snapshots import ModelSnapshots
from tinsmithd.training.models.registry import Registry
from tinsmithd.training.models.shared import Shared, coming_and_going
from tinsmithd.training.models.staging import Staged, whole
from tinsmithd.training.models.starts import key_of_checkpoint, key_of_request
from tinsmithd.training.ranks import ModelBroken, RankGroup, RankGroupLost, StateInfo


class Creation:
    """Creates models.

    Args:
        shared: What they share.
        registry: Where they are then.
        new_id: Makes the id of a model, which nobody can guess.
        lose_ranks: Told of a model whose ranks went away while it was written down.
    """

    def __init__(
        self,
        shared: Shared,
        registry: Registry,
        new_id: Callable[[], str],
        lose_ranks: Callable[[Model], None],
    ) -> None:
        self._shared = shared
        self._registry = registry
        self._new_id = new_id
        self._lose_ranks = lose_ranks
        self._requests = KnownRequests()

    def remember(self, model: Model) -> None:
        """An earlier process created this model."""
        self._registry.used_number(model.number)
        self._requests.remember(model)

    async def create(self, request: NewModel) -> Model:
        """Create a model, or return the one that this `request_id` created before."""
        return await self._requests.once(
            *(request.owner, request.request_id, request.digest), lambda: self._create(request)
        )

    async def _create(self, request: NewModel) -> Model:
        with self._registry.reserved(request.chosen_id):
            return await self._create_reserved(request)

    async def _create_reserved(self, request: NewModel) -> Model:
        self._shared.place.need()
        if request.path is None:
            assert request.tuning is not None  # the servicer sets one of the two
            self._check_held(request.base_model)
            experts = self._shared.place.need().info.active_expert_count
            return await self._begin(request, request.tuning.on_base(experts))
        if request.with_optimizer and request.path.kind is not CheckpointKind.TRAINING:
            raise wrong_kind(request.path)

        def check(found: CheckpointInfo) -> None:
            self._shared.starts.check(key_of_checkpoint(found.digest))
            check_base_model(found.base_model, request.base_model)
            self._check_held(found.base_model)
            rank_max = self._shared.limits.calls.rank_max
            check_claim(found, self._shared.place.need().info, rank_max)

        async with self._shared.checkpoints.fetched(request.path, check) as (found, staged):
            return await self._begin(request, found.tuning, found, staged)

    def _check_held(self, base_model: str) -> None:
        name = self._shared.place.need().info.name
        if base_model and base_model != name:
            message = f"no base model {base_model!r}; this cluster holds {name!r}"
            raise NotFound(message, Reason.BASE_MODEL_NOT_FOUND)

    async def _begin(
        self,
        request: NewModel,
        tuning: Tuning,
        found: CheckpointInfo | None = None,
        staged: Staged | None = None,
    ) -> Model:
        """Put a new model onto the ranks and write it down; from then on it is there."""
        group = self._shared.place.need()
        step_count = found.step_count if found is not None and request.with_optimizer else 0
        # As other callers' requests may have this id, too.
        request_id = request.request_id and inner_id(request.owner, request.request_id)
        key = key_of_checkpoint(found.digest) if found else key_of_request(request_id)
        number = self._registry.next_number()
        model = Model(
            request.chosen_id or inner_id(request.owner, self._new_id()),
            group.info,
            tuning,
            request.user_metadata,
            number,
            group.identity,
            from_checkpoint=request.path is not None,
            request_id=request.request_id,
            request_digest=request.digest,
            chose_id=bool(request.model_id),
            step_count=step_count,
        )
        room = (request.owner, request.models_max)
        self._registry.check_room(*room)
        seats, starts = self._shared.seats, self._shared.starts
        await seats.enter(model)
        try:
            if self._shared.place.need() is not group:  # while it waited for its seat
                raise RankGroupLost("the rank group was replaced")
            async with starts.attempt(key):
                await self._put(model, group, staged, room, optimizer=request.with_optimizer)
        except BaseException as error:
            seats.leave(model)
            if isinstance(error, RankGroupLost | ModelBroken):
                starts.check(key)
                text = "the rank group was lost"
                raise Unavailable(text, Reason.RANK_GROUP_UNAVAILABLE, retry_after_s=1.0) from error
            if isinstance(error, Fenced):
                raise shutting_down() from error
            raise
        return model

    async def _put(
        self,
        model: Model,
        group: RankGroup,
        staged: Staged | None,
        room: tuple[str, int],
        *,
        optimizer: bool,
    ) -> None:
        shared = self._shared
        snapshots = ModelSnapshots(model.model_id, shared.journal, shared.snapshot_store)
        if staged is not None:
            await self._import(model, snapshots, group, staged, room, optimizer=optimizer)
            return
        async with self._turn_of_new(*room):
            await group.create_model(model.model_id, model.tuning)
            await self._write_down(model, snapshots, group)

    @contextlib.asynccontextmanager
    async def _turn_of_new(self, owner: str, owner_max: int) -> AsyncIterator[None]:
        """A turn in which a model may be added."""
        async with self._shared.turns.take(coming_and_going(owner), NOMINAL_TOKENS):
            self._registry.check_room(owner, owner_max)
            yield

    async def _import(
        self,
        model: Model,
        snapshots: ModelSnapshots,
        group: RankGroup,
        staged: Staged,
        room: tuple[str, int],
        *,
        optimizer: bool,
    ) -> None:
        said = StateInfo(model.tuning, model.step_count)
        snapshot = await snapshots.copy(0, staged, optimizer=optimizer, step_count=said.step_count)
        snapshots.start_with(snapshot)
        try:
            async with self._shared.checkpoints.copies.coming:
                pieces = await whole(staged)
                async with self._turn_of_new(*room):
                    await group.import_state(
                        model.model_id, pieces, optimizer=optimizer, create=True, said=said
                    )
                    await self._write_down(model, snapshots, group)
        except BaseException:
            await snapshots.remove(snapshot)
            raise

    async def _write_down(self, model: Model, snapshots: ModelSnapshots, group: RankGroup) -> None:
        add = AddModel(model.model_id, model.number, model.about())
        try:
            await self._shared.journal.commit(add, *snapshots.writes)
        except BaseException:
            with contextlib.suppress(RankGroupLost):
                await group.delete_model(model.model_id)
            raise
        give_lane(model, snapshots, self._shared)
        self._registry.add(model)
        if self._shared.place.current is not group:
            self._lose_ranks(model)
