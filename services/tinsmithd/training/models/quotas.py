"""What one tenant may have of the Training server at once; the rules of models ask before they act.

Limits are the settings', unless the file of keys says another one for the caller's tenant. Whoever
works on a model of somebody else, as an administrator may, is not counted.
"""

import dataclasses
from dataclasses import dataclass
from weakref import WeakValueDictionary

from tinsmithd import keys
from tinsmithd.errors import over_limit, quota_exceeded
from tinsmithd.rates import Rates
from tinsmithd.training.call import Call, ComputeWork, RefusedWork
from tinsmithd.training.lane import QueuedBytes
from tinsmithd.training.models.model import Model

TOKENS = "tenant_tokens_per_minute_max"
QUEUE_RETRY_S = 1.0
"""When a tenant whose queues are full may send a call again."""


@dataclass(frozen=True)
class QuotaLimits:
    """The names are those of the settings; 0: none."""

    tenant_models_max: int = 0
    tenant_queued_bytes_max: int = 0
    tenant_tokens_per_minute_max: int = 0


NO_QUOTAS = QuotaLimits()


class Quotas:
    """Refuses calls that would take a tenant over its limits. Lives on one event loop.

    Args:
        limits: The settings.
    """

    def __init__(self, limits: QuotaLimits) -> None:
        self._limits = limits
        # By owner; the lanes of his models hold it.
        self._queued: WeakValueDictionary[str, QueuedBytes] = WeakValueDictionary()
        self._tokens = Rates(TOKENS)

    @property
    def models_max(self) -> int:
        """Number of models that the caller's tenant may have; 0: any."""
        return keys.current().limit("tenant_models_max", self._limits.tenant_models_max)

    def queued_of(self, owner: str) -> QueuedBytes:
        """Counts what waits in the lanes of an owner's models."""
        found = self._queued.get(owner)
        if found is None:
            found = self._queued[owner] = QueuedBytes()
        return found

    def queued_bytes(self) -> int:
        """Bytes that wait in all lanes; another thread may ask."""
        known = [reference() for reference in self._queued.valuerefs()]
        return sum(each.ready + each.parked for each in known if each is not None)

    def check_queue(self, model: Model) -> None:
        """Refuse a call before its data are read, if there is no room for any.

        Raises:
            ResourceExhausted: The tenant's queues are full (QUOTA_EXCEEDED).
        """
        most = self._queued_max(model)
        if most:
            _check(most, self.queued_of(model.owner).ready + 1)

    def readable(self, model: Model, call: Call) -> Call:
        """A call, or its refusal, where it alone has more tokens than it ever may.

        A refusal uses the call's number, as that of all calls that can never succeed.
        """
        most = self._tokens_max(model)
        if not most or (tokens := _tokens(call)) <= most:
            return call
        error = over_limit("data", TOKENS, tokens, most)
        return dataclasses.replace(call, work=RefusedWork(error), nbytes=0)

    def admit(self, model: Model, call: Call, *, is_next: bool) -> None:
        """Let a new call in.

        Args:
            model: Whose call it is.
            call: The call.
            is_next: Whether others wait for it: what waits so does not keep it out.

        Raises:
            ResourceExhausted: The tenant's queues are full, or it has used its tokens up
                (QUOTA_EXCEEDED).
        """
        if call.nbytes and (most := self._queued_max(model)):
            queued = self.queued_of(model.owner)
            _check(most, queued.ready + (0 if is_next else queued.parked) + call.nbytes)
        if most := self._tokens_max(model):
            self._tokens.take(model.owner, _tokens(call), most, "data")

    def _queued_max(self, model: Model) -> int:
        return _limit(model, "tenant_queued_bytes_max", self._limits.tenant_queued_bytes_max)

    def _tokens_max(self, model: Model) -> int:
        return _limit(model, TOKENS, self._limits.tenant_tokens_per_minute_max)


def _limit(model: Model, name: str, setting: int) -> int:
    caller = keys.current()
    if not setting and not caller.limits:
        return 0
    return caller.limit(name, setting) if model.owner == caller.owner else 0


def _tokens(call: Call) -> int:
    return sum(call.work.lengths) if isinstance(call.work, ComputeWork) else 0


def _check(most: int, value: int) -> None:
    if value > most:
        raise quota_exceeded("tenant_queued_bytes_max", most, value, QUEUE_RETRY_S)
