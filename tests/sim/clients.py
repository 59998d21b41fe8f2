"""Clients: each uses some models, and sends every call until it is answered."""

import asyncio
import hashlib
import random
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from sim import engine
from sim.network import Connection
from sim.server import AnswerRequest, CallRequest, CreateRequest, DeleteRequest, Request
from tinsmithd.domain import AdamParams, CheckpointKind, CheckpointPath, LoraConfig
from tinsmithd.errors import Reason, ResourceExhausted, TinsmithError, Unavailable
from tinsmithd.saves import SaveOptions
from tinsmithd.training.call import (
    ComputeWork,
    LoadWork,
    SaveWork,
    StepWork,
    StoredAnswer,
    Work,
    encode_answer,
    encode_work,
)
from tinsmithd.training.models import NewModel

if TYPE_CHECKING:
    from sim.world import World

KINDS = {
    "forward": 2.0,
    "forward_backward": 6.0,
    "step": 4.0,
    "save": 1.0,
    "load": 0.8,
    "unreadable": 0.4,
}

STEP_EVERY = 3
CREATIONS_MAX = 20
"""Tries to create one model, where what it begins as ends the ranks."""
DATA_MAX = 4
DATUM_BYTES = 100
TIGHT_BYTES = 2 * (STEP_EVERY - 1) * (DATA_MAX * DATUM_BYTES + 150)
"""Room in the journal for twice what a client sends between two steps."""


def retryable(error: TinsmithError) -> bool:
    """Whether the same call can succeed later."""
    if isinstance(error, ResourceExhausted):
        return error.retry_after_s is not None
    return isinstance(error, Unavailable) or error.reason is Reason.SEQ_ID_GAP


class Script:
    """The calls that one model gets, drawn at random."""

    def __init__(self, rng: random.Random, model_id: str, odd: float, *, tight: bool) -> None:
        self._rng = rng
        self._model_id = model_id
        self._odd = odd
        self._tight = tight
        self._saved: list[CheckpointPath] = []
        self._acknowledging = random.Random(f"acknowledge {model_id} {rng.getstate()[1][0]}")

    def call(self, seq_id: int) -> CallRequest:
        """The call of this number."""
        kind = self._rng.choices(list(KINDS), list(KINDS.values()))[0]
        if self._tight and seq_id % STEP_EVERY == 0:
            kind = "step"
        work = self._work(kind, seq_id)
        content = encode_work(work) if work is not None else b"unreadable %d" % seq_id
        digest = hashlib.sha256(content).digest()
        nbytes = work.nbytes if isinstance(work, ComputeWork) else 0
        acknowledge = self._acknowledging.random() < 0.5
        return CallRequest(self._model_id, seq_id, digest, work, nbytes, acknowledge)

    def _work(self, kind: str, seq_id: int) -> Work | None:
        if kind in ("forward", "forward_backward"):
            return self._compute(seq_id, backward=kind == "forward_backward")
        if kind == "step":
            return StepWork(AdamParams(learning_rate=float(seq_id)))
        if kind == "save":
            return self._save(seq_id)
        if kind == "load":
            path = CheckpointPath(self._model_id, CheckpointKind.TRAINING, "absent")
            if self._saved and self._rng.random() < 0.9:
                path = self._rng.choice(self._saved)
            return LoadWork(path, self._rng.random() < 0.7)
        return None

    def _compute(self, seq_id: int, *, backward: bool) -> ComputeWork:
        count = self._rng.choice([1, 1, 2, 3, DATA_MAX])
        data, odd = [], self._odd
        for index in range(count):
            kind = engine.NORMAL
            if self._rng.random() < odd:
                kind = self._rng.choice([b"x", b"x", b"r", b"m", b"p"])
                odd = 0.0
            data.append(engine.datum(kind, seq_id, index, DATUM_BYTES if self._tight else 0))
        lengths = [self._rng.randint(1, 6) for _ in data]
        return ComputeWork(b"loss", data, lengths, backward)

    def _save(self, seq_id: int) -> SaveWork:
        kind = self._rng.choice(list(CheckpointKind))
        name = f"s{seq_id}" if self._rng.random() < 0.7 else "again"
        overwrite = name == "again" and self._rng.random() < 0.5
        path = CheckpointPath(self._model_id, kind, name)
        if path not in self._saved:
            self._saved.append(path)
        return SaveWork(SaveOptions(path, None, overwrite, {}, f"{self._model_id} {seq_id}"))


class ModelUser:
    """The life of one model, from its creation to its end.

    Attributes:
        calls: What was submitted, by number.
        answers: First answers, by number; `encode_answer` of each.
        deleting: Its deletion was asked for.
        deleted: Its deletion was acknowledged.
    """

    def __init__(self, world: "World", name: str, call_count: int) -> None:
        self.world = world
        self.name = name
        self.rng = world.stream(f"client {name}")
        self.model_id = ""
        self.new: NewModel | None = None
        self.calls: dict[int, CallRequest] = {}
        self.answers: dict[int, bytes] = {}
        self.deleting = self.deleted = False
        self._call_count = call_count
        self._window = self.rng.choice([1, 2, 4, 7])
        chooses = world.stream(f"id {name}").random() < 0.5
        self._chosen = f"{name}:chosen" if chooses else ""
        self._delete_at = self.rng.randint(1, 2 * call_count) if self.rng.random() < 0.4 else 0
        self._odd = 0.0 if world.tight else self.rng.choice([0.0, 0.03, 0.15])

    async def run(self) -> None:
        """Do all of it."""
        await self._create()
        script = Script(self.rng, self.model_id, self._odd, tight=self.world.tight)
        tasks: list[asyncio.Task[None]] = []
        calls: list[asyncio.Task[None]] = []
        for seq_id in range(1, self._call_count + 1):
            if seq_id == self._delete_at:
                tasks.append(self.world.spawn(self._delete()))
            # So many may be under way, as the real client has it: counted from the first of them.
            await asyncio.gather(*calls[: max(0, seq_id - self._window)])
            self.calls[seq_id] = script.call(seq_id)
            calls.append(self.world.spawn(self._deliver(seq_id)))
            if self.rng.random() < 0.5:
                await asyncio.sleep(self.rng.uniform(0, self.world.pace_s))
        await asyncio.gather(*tasks, *calls)
        if not self.deleting:
            await self._ask_again()
        if self._delete_at > self._call_count:
            await self._delete()
        if self.deleted:
            await self._check_gone()

    async def _create(self) -> None:
        for attempt in range(CREATIONS_MAX):
            error = await self._try_to_create(attempt)
            if error is None:
                return
            if error.reason is not Reason.CALL_POISONED:
                self.world.fail(f"{self.name} cannot be created: {error!r}")
                raise error
            ends = (" create", " import")
            deaths = sum(n for what, n in self.world.blames.items() if what.endswith(ends))
            if deaths < self.world.limits.lane.call_attempts_max:
                self.world.fail(f"{self.name} is refused after {deaths} deaths")
            self.world.checked("poisoned creation")
        self.world.fail(f"{self.name} cannot be created")

    async def _try_to_create(self, attempt: int) -> TinsmithError | None:
        seed = self.rng.randrange(1000)
        path, tuning, optimizer = self._source(), None, False
        if path is None:
            tuning = LoraConfig(seed=seed)
        else:
            optimizer = path.kind is CheckpointKind.TRAINING and self.rng.random() < 0.5
        request_id = f"create {self.name} {attempt}"
        digest = hashlib.sha256(repr((tuning, str(path), optimizer)).encode()).digest()
        self.new = NewModel(
            *("base", tuning, path, optimizer, {}, request_id, digest), model_id=self._chosen
        )
        answer = await self._ask(CreateRequest(self.new), "create")
        if answer.error is None:
            self.model_id = answer.value["model_id"]
        return answer.error

    def _source(self) -> CheckpointPath | None:
        if self.rng.random() < 0.6:
            return None
        saved = [found.about.path for found in self.world.checkpoints.saved.values()]
        saved = [path for path in saved if path.name != "again"]
        return self.rng.choice(saved) if saved else None

    async def _deliver(self, seq_id: int) -> None:
        answer = await self._ask(self.calls[seq_id], f"call {seq_id}")
        self.world.log("answer", self.name, seq_id, encode_answer(answer))

    async def _delete(self) -> None:
        self.deleting = True
        answer = await self._ask(DeleteRequest(self.model_id), "delete")
        if answer.error is not None and answer.error.reason is not Reason.MODEL_NOT_FOUND:
            self.world.fail(f"{self.name} cannot be deleted: {answer.error!r}")
        self.deleted = True

    async def _ask_again(self) -> None:
        """Repeats, and other content under used numbers."""
        for _ in range(2):
            seq_id = self.rng.randint(1, self._call_count)
            await self._ask(self.calls[seq_id], f"repeat of {seq_id}")
            call = self.calls[seq_id]
            other = CallRequest(self.model_id, seq_id, b"other" + call.digest, call.work)
            answer = await self._ask(other, f"other content for {seq_id}")
            found = "" if answer.error is None else answer.error.reason
            if found not in (Reason.SEQ_ID_CONFLICT, Reason.ANSWER_EXPIRED, Reason.MODEL_LOST):
                self.world.fail(f"{self.name}: other content for {seq_id} gives {answer}")
            self.world.checked("conflict")

    async def ask_last(self) -> None:
        """The newest answer is there after any restart, and the next number is known."""
        before = self.world.checks["repeat"]
        answer = await self._ask(self.calls[self._call_count], "last repeat")
        if self.world.checks["repeat"] == before:
            self.world.fail(f"{self.name}: the newest answer is gone: {answer}")

    @property
    def next_seq_id(self) -> int:
        """What the server should say."""
        return self._call_count + 1

    async def _check_gone(self) -> None:
        call = CallRequest(self.model_id, self._call_count + 1, b"late", None)
        answer = await self._ask(call, "call on a deleted model")
        found = "" if answer.error is None else answer.error.reason
        if found is not Reason.MODEL_NOT_FOUND:
            self.world.fail(f"{self.name} was deleted and answers {answer}")
        again = await self._ask(CreateRequest(self.new), "create again")
        if again.error is not None or again.value["model_id"] != self.model_id:
            self.world.fail(f"{self.name} was deleted and is created again: {again}")
        self.world.checked("deleted stays deleted")
        if self._chosen and self.new is not None:
            other = replace(self.new, request_id=f"{self.new.request_id} again")
            answer = await self._ask(CreateRequest(other), "create another of that id")
            if answer.error is None or answer.error.reason is not Reason.MODEL_EXISTS:
                self.world.fail(f"{self.name}: the id of a deleted model is given again: {answer}")
            self.world.checked("an id is given once")

    # --- one call -----------------------------------------------------------------------------

    async def _ask(self, request: Request, about: str) -> StoredAnswer:
        """Send a request until it has an answer that waiting does not change."""
        delay_s, accepted = 0.2, False
        while True:
            sent: Request = request
            if accepted and isinstance(request, CallRequest):
                sent = AnswerRequest(request)
            connection = self.world.network.send(sent)
            connection.answer.add_done_callback(lambda done: self._note(request, done.result()))
            try:
                async with asyncio.timeout(self.rng.uniform(2.0, 15.0)):
                    answer = await asyncio.shield(connection.answer)
            except TimeoutError:
                self._give_up(connection)
                accepted = accepted or connection.accepted
                continue
            accepted = accepted or connection.accepted
            error = answer.error
            if accepted and error is not None and error.reason is Reason.CALL_NOT_FOUND:
                self._check_freed(request)
                accepted = False
                continue
            if error is None or not retryable(error):
                return answer
            self.world.count(f"told to wait: {error.reason}")
            wait_s = max(delay_s, error.retry_after_s or 0.0) * self.rng.uniform(0.75, 1.5)
            await asyncio.sleep(wait_s)
            delay_s = min(2 * delay_s, 3.0)

    def _check_freed(self, request: Request) -> None:
        """A call that was accepted is gone only where it took no effect and its number is free."""
        assert isinstance(request, CallRequest)
        if (request.model_id, request.seq_id) not in self.world.freed:
            self.world.fail(f"{self.name}: call {request.seq_id} was accepted and is gone")
        self.world.checked("accepted, then free")

    def _give_up(self, connection: Connection) -> None:
        self.world.count("attempts given up")
        if self.rng.random() < 0.5:
            connection.abandon()

    def _note(self, request: Request, answer: StoredAnswer) -> None:
        """Hold every answer, however late it comes, against the first one."""
        error = answer.error
        if not isinstance(request, CallRequest) or self.calls.get(request.seq_id) is not request:
            return
        if error is not None and (retryable(error) or error.reason is Reason.CALL_NOT_FOUND):
            return
        seq_id, found = request.seq_id, encode_answer(answer)
        reason: Any = None if error is None else error.reason
        if reason is Reason.MODEL_NOT_FOUND and self.deleting:
            self.answers.setdefault(seq_id, found)
            return
        if reason is Reason.MODEL_LOST and self.world.may_be_lost(self.model_id):
            self.answers.setdefault(seq_id, found)
            return
        first = self.answers.get(seq_id)
        if reason is Reason.ANSWER_EXPIRED and first is not None:
            self.world.checked("answer expired")
            return
        if first is None:
            self.answers[seq_id] = found
            return
        self.world.checked("repeat")
        gone = b'"MODEL_NOT_FOUND"' in first
        if first != found and not gone:
            self.world.fail(f"{self.name}: call {seq_id} gives {found!r}, first {first!r}")
