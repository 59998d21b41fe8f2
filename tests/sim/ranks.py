"""Simulated rank groups, and the Training server's end of the link to one."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING, Any

from sim import engine
from sim.engine import State
from tinsmithd.domain import AdamParams, BaseModelInfo, LoraConfig, Tuning
from tinsmithd.errors import (
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    Reason,
    ResourceExhausted,
    TinsmithError,
)
from tinsmithd.sizes import NO_WORK
from tinsmithd.training.call import BatchPlace, ComputeWork
from tinsmithd.training.ranks import (
    Computed,
    OnOutput,
    OnPiece,
    Pieces,
    RankGroupLost,
    StateInfo,
)

if TYPE_CHECKING:
    from sim.world import World

INFO = BaseModelInfo("base", "sim", 256, 4096, "float32", 1, 1)

Command = Callable[["RankGroup", Callable[[Any], None]], Awaitable[Any]]
"""What ranks do for one command; the second argument takes its parts."""


class RankGroup:
    """The processes of one rank group.

    Attributes:
        models: States by model id.
        alive: False once it died.
        poisoned_by: Work during which it died by itself.
    """

    def __init__(self, world: "World", name: str, identity: Mapping[str, str]) -> None:
        self.world = world
        self.name = name
        self.identity = identity
        self.rng = world.stream(f"ranks {name}")
        self.models: dict[str, State] = {}
        self.alive = True
        self.link: SimRankGroup | None = None
        self._undo: dict[str, State] = {}
        self._serving: asyncio.Task[None] | None = None
        self._going = asyncio.Event()
        self._going.set()
        self.doom_in = 0
        self.doom: Callable[[], None] = lambda: None

    def attach(self, link: "SimRankGroup") -> None:
        """Serve a Training server from now on, with no models."""
        self.detach()
        self.models.clear()
        self._undo.clear()
        self.link = link
        self._serving = self.world.spawn(self._serve(link))

    def detach(self) -> None:
        """Serve nobody."""
        if self._serving is not None:
            self._serving.cancel()
            self._serving = None
        self.link = None

    def haunt(self, link: "SimRankGroup") -> None:
        """Go on with what a server asked for that has given them up."""
        self._serving = self.world.spawn(self._serve(link))

    def die(self) -> None:
        """All its processes end."""
        self.alive = False
        self.detach()

    @property
    def stopped(self) -> bool:
        """Whether they do nothing now."""
        return not self._going.is_set()

    def stop(self) -> None:
        """All its processes stop in the middle of what they do."""
        self._going.clear()

    def resume(self) -> None:
        """They go on."""
        self._going.set()

    async def step(self) -> None:
        """A moment of computing, in which they may die."""
        await asyncio.sleep(self.rng.uniform(0.001, 0.03))
        await self._going.wait()
        if not self.alive:
            await asyncio.Event().wait()
        if self.doom_in:
            self.doom_in -= 1
            if self.doom_in == 0:
                self.doom()
                await asyncio.Event().wait()

    async def _serve(self, link: "SimRankGroup") -> None:
        while True:
            command, answers = await link.inbox.get()
            try:
                await self.step()
                done = await command(self, answers.put_nowait)
            except TinsmithError as error:
                answers.put_nowait(error)
            else:
                answers.put_nowait(_Done(done))

    # --- what it computes ---------------------------------------------------------------------

    def need(self, model_id: str) -> State:
        """A model's state."""
        if model_id not in self.models:
            raise NotFound(f"the ranks have no model {model_id}", Reason.MODEL_NOT_FOUND)
        return self.models[model_id]

    async def compute(
        self,
        model_id: str,
        batch: ComputeWork,
        place: BatchPlace,
        composition: bytes,
        on_output: Callable[[bytes], None],
    ) -> Computed:
        """Forward, and backward too where asked."""
        before = self.need(model_id)
        if batch.backward and place is not BatchPlace.LATER:
            self._undo[model_id] = before
        again = bool(composition)
        if not again:
            composition = bytes(self.rng.choices(b"ABCDEFGH", k=engine.COMPOSITION_BYTES))
        outputs = []
        try:
            for datum in batch.data:
                await self.step()
                await self._suffer(datum)
                output = engine.output(self.models[model_id], batch.loss, datum, composition)
                if again and self.world.goes_wrong(model_id):
                    output = output[:-1] + b"?"
                outputs.append(output)
                on_output(output)
                if batch.backward:
                    state = engine.add_gradient(self.models[model_id], datum, output)
                    self.models[model_id] = state
        except TinsmithError:
            if batch.backward:
                self.models[model_id] = self._undo[model_id]
            raise
        after = self.models[model_id]
        self.world.log("compute", self.name, model_id, engine.digest(batch), composition, after)
        metrics = engine.compute_metrics(after, outputs)
        return Computed(metrics, composition, after.non_finite)

    async def _suffer(self, datum: bytes) -> None:
        """What some data do to ranks."""
        kind = datum[:1]
        if kind == engine.POISON:
            self.world.count("poison computed")
            self.world.ranks_die(self, blamed=True)
            await asyncio.Event().wait()
        if kind == engine.REFUSED:
            raise InvalidArgument("data", "the engine refuses it")
        if kind == engine.NO_MEMORY and self.rng.random() < 0.6:
            self.world.count("out of memory")
            text = "no memory now"
            raise ResourceExhausted(text, Reason.OUT_OF_MEMORY, retry_after_s=1.0)

    async def optim_step(self, model_id: str, adam: AdamParams) -> Mapping[str, float]:
        """Apply the pending gradients."""
        state = self.need(model_id)
        await self.step()
        if state.non_finite:
            self.models[model_id] = engine.cleared(state)
            self.world.log("cleared", self.name, model_id)
            message = "gradients are not finite"
            raise FailedPrecondition(message, Reason.NON_FINITE_GRADIENT)
        after, metrics = engine.step(state, adam)
        self.models[model_id] = after
        await self.step()
        self.world.log("step", self.name, model_id, after)
        return metrics

    async def send_files(
        self,
        state: State,
        optimizer: bool,
        put: Callable[[tuple[str, bytes]], None],
        slow_s: float = 0.0,
    ) -> StateInfo:
        """Send state files."""
        for piece in engine.files(state, optimizer):
            await asyncio.sleep(slow_s * self.rng.random())
            await self.step()
            put(piece)
        return StateInfo(LoraConfig(), state.step_count)


class _Done:
    def __init__(self, value: Any) -> None:
        self.value = value


class SimRankGroup:
    """See `RankGroup`: the link of one Training server to one rank group."""

    world_size = 1
    work = NO_WORK
    engine = "sim"
    info = INFO

    def __init__(self, group: RankGroup) -> None:
        self.group = group
        self.identity = group.identity
        self.inbox: asyncio.Queue[tuple[Command, asyncio.Queue[Any]]] = asyncio.Queue()
        self._open: list[asyncio.Queue[Any]] = []
        self._lost: RankGroupLost | None = None
        self.under_way = ""
        """Which call it is that the group works on; it is to blame where the group dies."""

    @property
    def lost(self) -> bool:
        """Whether it was lost."""
        return self._lost is not None

    def lose(self, why: str, *, blamed: bool = False) -> None:
        """The group is gone, as far as this server can tell."""
        if self._lost is None:
            self._lost = RankGroupLost(why, blamed=blamed)
            for answers in self._open:
                answers.put_nowait(None)

    # --- `RankGroup` ----------------------------------------------------------------------------

    async def create_model(self, model_id: str, tuning: Tuning) -> None:
        """Add a model."""

        async def command(group: RankGroup, put: Callable[[Any], None]) -> None:
            await group.step()
            assert model_id not in group.models, f"{model_id} is there"
            assert isinstance(tuning, LoraConfig)
            group.models[model_id] = engine.fresh(tuning.seed)
            group.world.log("create", group.name, model_id)

        await self._execute(f"{model_id} create", command)

    async def delete_model(self, model_id: str) -> None:
        """Drop a model."""

        async def command(group: RankGroup, put: Callable[[Any], None]) -> None:
            group.models.pop(model_id, None)
            group.world.log("delete", group.name, model_id)

        await self._execute(f"{model_id} delete", command)

    async def compute(
        self,
        model_id: str,
        batch: ComputeWork,
        *,
        place: BatchPlace,
        composition: bytes,
        on_output: OnOutput,
    ) -> Computed:
        """Forward, and backward too where asked."""

        async def take(output: bytes) -> None:
            on_output(output)

        done: Computed = await self._execute(
            f"{model_id} {engine.seq_id_of(batch.data[0])}",
            lambda group, put: group.compute(model_id, batch, place, composition, put),
            take,
        )
        return done

    async def optim_step(self, model_id: str, adam: AdamParams) -> Mapping[str, float]:
        """Apply the pending gradients."""
        done: Mapping[str, float] = await self._execute(
            f"{model_id} {adam.learning_rate:.0f}",
            lambda group, put: group.optim_step(model_id, adam),
        )
        return done

    async def copy_state(
        self, model_id: str, *, optimizer: bool, on_piece: OnPiece, deposit: str = ""
    ) -> Awaitable[StateInfo]:
        """Copy the model's state; what is returned sends the copy."""
        pieces: asyncio.Queue[Any] = asyncio.Queue()
        self._open.append(pieces)

        async def command(group: RankGroup, put: Callable[[Any], None]) -> None:
            state = group.need(model_id)

            async def send() -> None:
                slow_s = group.world.snapshot_slow_s
                info = await group.send_files(state, optimizer, pieces.put_nowait, slow_s)
                pieces.put_nowait(_Done(info))

            group.world.spawn(send())

        async def take(piece: tuple[str, bytes]) -> None:
            await on_piece(*piece)

        async def finish() -> StateInfo:
            try:
                done: StateInfo = await self._finish(pieces, take)
            except RankGroupLost as error:
                raise RankGroupLost(str(error)) from error
            return done

        await self._execute(f"{model_id} copy", command)
        return finish()

    async def import_state(
        self,
        model_id: str,
        pieces: Pieces,
        *,
        optimizer: bool,
        create: bool,
        said: StateInfo | None,
    ) -> StateInfo:
        """Replace the model's state, or create the model from it."""

        async def command(group: RankGroup, put: Callable[[Any], None]) -> StateInfo:
            await group.step()
            if create:
                assert model_id not in group.models, f"{model_id} is there"
            else:
                group.need(model_id)
            state = group.models[model_id] = engine.load(pieces, optimizer)
            group.world.log("import", group.name, model_id, state)
            return StateInfo(LoraConfig(), state.step_count)

        done: StateInfo = await self._execute(f"{model_id} import", command)
        return done

    # --- one command --------------------------------------------------------------------------

    async def _execute(self, key: str, command: Command, on_part: Any = None) -> Any:
        if self._lost is not None:
            raise RankGroupLost(str(self._lost))  # only the call under way is to blame
        if self.under_way:
            self.group.world.fail(f"{key} while {self.under_way} is under way")
        self.under_way = key
        answers: asyncio.Queue[Any] = asyncio.Queue()
        self._open.append(answers)
        self.inbox.put_nowait((command, answers))
        try:
            return await self._finish(answers, on_part)
        finally:
            self.under_way = ""

    async def _finish(self, answers: asyncio.Queue[Any], on_part: Any) -> Any:
        failure: Exception | None = None
        try:
            while True:
                message = await answers.get()
                if message is None:
                    assert self._lost is not None
                    raise RankGroupLost(str(self._lost), blamed=self._lost.blamed)
                if isinstance(message, TinsmithError):
                    raise failure or message
                if isinstance(message, _Done):
                    if failure is not None:
                        raise failure
                    return message.value
                if failure is None:
                    try:
                        await on_part(message)
                    except Exception as error:
                        failure = error
        finally:
            self._open.remove(answers)
