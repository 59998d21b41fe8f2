"""What one client waits for, and the one line that says so.

However many calls wait, and for whatever reason, a person sees one line every ten seconds, and one
more when it goes on. A call that is under way for long without an error may wait inside the
service, for its model to be brought back: the model is asked, and the same line says so.
"""

import asyncio
import contextlib
import logging
import random
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass

import grpc

from tinsmith.errors import TinsmithError
from tinsmith.v1 import training_service_pb2 as pb

TICK_S = 1.0
FIRST_LINE_S = 2.0
"""Shorter waits than this are not worth a line."""
LINE_INTERVAL_S = 10.0
SLOW_S = 15.0
"""A call without an answer for longer makes the client ask how its model is."""
ASK_INTERVAL_S = 5.0
TAKEN_S = 3.0
"""An attempt that lives longer than this after a failure has reached the service."""
WAKE_SPREAD_S = 0.2
REASON_CHARACTERS_MAX = 300

_log = logging.getLogger("tinsmith")


@dataclass(eq=False)
class Attempts:
    """One call and its attempts.

    Attributes:
        what: Name of the call.
        service: "training", "sampler" or "checkpoint".
        model_id: The model whose order it is part of; may be empty.
        attempt_s: When the present attempt began; times are the loop's.
        failing_s: Since when attempts fail; None before the first failure.
        pausing: True between two attempts.
    """

    what: str
    service: str
    model_id: str = ""
    attempt_s: float = 0.0
    failing_s: float | None = None
    pausing: bool = False

    @property
    def peer(self) -> str:
        """Whose answers show that this call can be answered too."""
        return self.model_id or self.service

    def waits(self, now_s: float) -> bool:
        """True while it fails, and just after."""
        return self.failing_s is not None and (self.pausing or now_s - self.attempt_s < TAKEN_S)


class Waiting:
    """The calls of one client that are under way. Lives on the background loop.

    Args:
        ask_model: Asks the service how a model is.
    """

    def __init__(self, ask_model: Callable[[str], Awaitable[pb.Model]]) -> None:
        self._ask_model = ask_model
        self._calls: set[Attempts] = set()
        self._answered_s: dict[str, float] = {}
        self._wake = asyncio.Event()
        self._timer: asyncio.TimerHandle | None = None
        self._asking: asyncio.Task[None] | None = None
        self._next_ask_s = 0.0
        self._recovering: dict[str, str] = {}
        self._reason = ""
        self._since_s: float | None = None
        self._next_line_s = 0.0
        self._said = False

    # --- what happens to calls ----------------------------------------------------------------

    @contextlib.contextmanager
    def under_way(self, call: Attempts) -> Iterator[None]:
        """Count a call among those that are under way."""
        self._calls.add(call)
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(TICK_S, self._tick)
        try:
            yield
        finally:
            self._calls.discard(call)

    def answered(self, call: Attempts) -> None:
        """Note that a call has its answer; what fails in the same way may get through now."""
        self._answered_s[call.peer] = asyncio.get_running_loop().time()
        self._recovering.pop(call.model_id, None)
        if call.failing_s is not None:
            self._wake.set()
            self._wake = asyncio.Event()

    def answered_s(self, call: Attempts) -> float:
        """When a call of the same kind last had an answer."""
        return self._answered_s.get(call.peer, float("-inf"))

    def failed(self, call: Attempts, error: TinsmithError) -> None:
        """Note that an attempt failed and will be made again."""
        # grpc says "failed to connect to all addresses; last error: ..." where there is only one.
        text = str(error).rpartition("last error: UNKNOWN: ")[2]
        lines = text.strip().splitlines() or [type(error).__name__]
        reason = f" ({error.reason})" if error.reason else ""
        self._reason = f"{call.what}: {lines[0][:REASON_CHARACTERS_MAX]}{reason}"
        if self._since_s is None:
            self._begin()

    def gave_up(self, call: Attempts) -> None:
        """Note that a call was given up: nothing goes on, so nothing is said about that."""
        self._calls.discard(call)
        self._said = False

    async def pause(self, call: Attempts, wait_s: float, *, wakes: bool) -> bool:
        """Wait between two attempts; True when another call's answer cut it short."""
        call.pausing = True
        try:
            if not wakes:
                await asyncio.sleep(wait_s)
                return False
            async with asyncio.timeout(wait_s):
                await self._wake.wait()
        except TimeoutError:
            return False
        finally:
            call.pausing = False
        await asyncio.sleep(random.uniform(0, WAKE_SPREAD_S))
        return True

    # --- what a person reads ------------------------------------------------------------------

    def _begin(self) -> None:
        self._since_s = asyncio.get_running_loop().time()
        self._next_line_s = self._since_s + FIRST_LINE_S

    def _tick(self) -> None:
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(TICK_S, self._tick) if self._calls else None
        now_s = loop.time()
        self._look_after_slow(now_s)
        count = sum(call.waits(now_s) or call.model_id in self._recovering for call in self._calls)
        if not count:
            if self._said and self._since_s is not None:
                _log.warning("tinsmith: going on after %.0f s", now_s - self._since_s)
            self._since_s, self._said = None, False
            return
        if self._since_s is None:
            self._begin()
        if now_s >= self._next_line_s and self._since_s is not None:
            calls = "1 call" if count == 1 else f"{count} calls"
            reason = next(iter(self._recovering.values()), self._reason)
            waited_s = now_s - self._since_s
            _log.warning(
                "tinsmith: waiting for the service (%s, %.0f s): %s", calls, waited_s, reason
            )
            self._next_line_s, self._said = now_s + LINE_INTERVAL_S, True

    def _look_after_slow(self, now_s: float) -> None:
        slow = {
            call.model_id
            for call in self._calls
            if call.model_id and not call.pausing and now_s - call.attempt_s > SLOW_S
        }
        for model_id in self._recovering.keys() - slow:
            del self._recovering[model_id]
        if slow and self._asking is None and now_s >= self._next_ask_s:
            self._next_ask_s = now_s + ASK_INTERVAL_S
            self._asking = asyncio.create_task(self._ask(sorted(slow)))

    async def _ask(self, model_ids: list[str]) -> None:
        try:
            for model_id in model_ids:
                model = await self._ask_model(model_id)
                if model.state == pb.MODEL_STATE_RECOVERING:
                    message = model.state_message or "its state is being brought back"
                    self._recovering[model_id] = f"model {model_id}: {message}"
                else:
                    self._recovering.pop(model_id, None)
        except (grpc.RpcError, TinsmithError):
            pass  # the calls themselves will find out
        finally:
            self._asking = None
