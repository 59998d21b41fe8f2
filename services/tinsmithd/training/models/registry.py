"""The models that there are. Nothing that a call asks of them looks at all of them."""

import contextlib
import itertools
from bisect import bisect_left, insort
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence

from tinsmithd.errors import AlreadyExists, Reason, quota_exceeded
from tinsmithd.keys import Caller
from tinsmithd.owners import public_id, said_id
from tinsmithd.training.call import model_not_found
from tinsmithd.training.journal import USED_IDS_KEPT_MAX
from tinsmithd.training.lane import Census
from tinsmithd.training.models.model import Model
from tinsmithd.training.models.seats import too_many_models

QUOTA_RETRY_S = 60.0
"""When a tenant that has too many models may look again."""


class _ByNumber:
    """Some models in the order of their numbers."""

    def __init__(self) -> None:
        self._numbers: list[int] = []
        self._models: dict[int, Model] = {}

    def __len__(self) -> int:
        return len(self._numbers)

    def add(self, model: Model) -> None:
        insort(self._numbers, model.number)  # nearly always at the end
        self._models[model.number] = model

    def remove(self, model: Model) -> None:
        del self._numbers[bisect_left(self._numbers, model.number)]
        del self._models[model.number]

    def newest_first(self, below: int | None, size: int) -> list[Model]:
        end = len(self) if below is None else bisect_left(self._numbers, below)
        return [self._models[n] for n in reversed(self._numbers[max(0, end - size) : end])]


_NONE = _ByNumber()


class Registry:
    """The models that there are, by the ids that they have inside.

    Args:
        kept_max: `models_kept_max`.
        census: Hears which of them are gone.
        forget_lost: Whether a lost model may make room for a new one: nothing of it is on disk.

    Attributes:
        on_deleted: Told the id of each model that is gone.
    """

    def __init__(self, kept_max: int, census: Census, *, forget_lost: bool) -> None:
        self._kept_max = kept_max
        self._census = census
        self._forget_lost = forget_lost
        self._models: dict[str, Model] = {}
        self._all = _ByNumber()
        self._of_owner: dict[str, _ByNumber] = {}
        self._of_public_id: dict[str, list[Model]] = {}
        # The one that was used longest ago is the first.
        self._by_use: OrderedDict[str, Model] = OrderedDict()
        self._newest_number = 0
        self._coming: set[str] = set()
        self._used: OrderedDict[str, None] = OrderedDict()
        self.on_deleted: Callable[[str], None] = lambda model_id: None

    def __contains__(self, model_id: str) -> bool:
        return model_id in self._models

    @property
    def oldest_first(self) -> Sequence[Model]:
        """All models, in the order in which they came."""
        return list(self._models.values())

    def __len__(self) -> int:
        return len(self._models)

    def page(self, caller: Caller, below: int | None, size: int) -> tuple[Sequence[Model], int]:
        """Models that are there for a caller, newest first, and how many there are in all.

        Args:
            caller: Who asks.
            below: Only those whose numbers are below this one; None for all.
            size: Number of models, at most.
        """
        seen = self._all if caller.sees_all else self._of_owner.get(caller.owner, _NONE)
        return seen.newest_first(below, size), len(seen)

    def called(self, model: Model) -> None:
        """A call came for a model."""
        model.called()
        if model.model_id in self._by_use:
            self._by_use.move_to_end(model.model_id)

    def unused_since(self, time_s: float) -> Sequence[Model]:
        """The models that no call used since then, by the clock that nobody sets."""
        oldest_first = self._by_use.values()
        return [*itertools.takewhile(lambda model: model.last_used_s < time_s, oldest_first)]

    def get(self, model_id: str) -> Model:
        """One model.

        Raises:
            NotFound: There is none of this id (MODEL_NOT_FOUND).
        """
        model = self._models.get(model_id)
        if model is None:
            raise model_not_found(public_id(model_id))
        return model

    def find(self, caller: Caller, model_id: str) -> Model:
        """The model that a caller means: one of its own, or if it sees all, the newest of others.

        Args:
            caller: Who asks.
            model_id: What that one says.

        Raises:
            NotFound: There is none for this caller (MODEL_NOT_FOUND).
        """
        model = self._models.get(said_id(caller.account, model_id))
        if model is None and caller.sees_all:
            found = self._of_public_id.get(model_id, ())
            model = max(found, key=lambda each: each.number, default=None)
        if model is None:
            raise model_not_found(model_id)
        return model

    def counts_by_owner(self) -> Mapping[str, int]:
        """Number of models of each owner; another thread may ask."""
        return {owner: len(models) for owner, models in list(self._of_owner.items())}

    def next_number(self) -> int:
        """The number of the next model."""
        self._newest_number += 1
        return self._newest_number

    def used_number(self, number: int) -> None:
        """An earlier process gave this number."""
        self._newest_number = max(self._newest_number, number)

    def used_id(self, model_id: str) -> None:
        """A model had this chosen id, and was deleted."""
        self._used[model_id] = None
        while len(self._used) > USED_IDS_KEPT_MAX:
            self._used.popitem(last=False)

    @contextlib.contextmanager
    def reserved(self, model_id: str) -> Iterator[None]:
        """Nobody else creates a model of this id meanwhile; the empty one is for everybody.

        Raises:
            AlreadyExists: It is or was a model's, or will be one's (MODEL_EXISTS).
        """
        if not model_id:
            yield
            return
        if model_id in self._models or model_id in self._coming or model_id in self._used:
            was = " and was deleted" if model_id in self._used else ""
            said = public_id(model_id)
            message = f"a model {said!r} exists{was}; an id is given once"
            raise AlreadyExists(message, Reason.MODEL_EXISTS, metadata={"model_id": said})
        self._coming.add(model_id)
        try:
            yield
        finally:
            self._coming.discard(model_id)

    def add(self, model: Model) -> None:
        """A model is there from now on."""
        self._models[model.model_id] = self._by_use[model.model_id] = model
        self._all.add(model)
        self._of_owner.setdefault(model.owner, _ByNumber()).add(model)
        self._of_public_id.setdefault(model.public_id, []).append(model)

    def remove(self, model_id: str) -> bool:
        """A model is gone; False where it was gone before."""
        model = self._models.pop(model_id, None)
        if model is None:
            return False
        del self._by_use[model_id]
        self._all.remove(model)
        self._of_owner[model.owner].remove(model)
        if not self._of_owner[model.owner]:
            del self._of_owner[model.owner]
        self._of_public_id[model.public_id].remove(model)
        if not self._of_public_id[model.public_id]:
            del self._of_public_id[model.public_id]
        self._census.gone(model_id)
        if model.chose_id:
            self.used_id(model_id)
        return True

    def check_room(self, owner: str, owner_max: int) -> None:
        """Refuse one more model.

        Args:
            owner: Whose it would be.
            owner_max: Number of models that this one may have; 0: any.

        Raises:
            ResourceExhausted: There are `models_kept_max` (TOO_MANY_MODELS), or so many of this
                owner (QUOTA_EXCEEDED).
        """
        count = len(self._of_owner.get(owner, _NONE)) + 1
        if 0 < owner_max < count:
            raise quota_exceeded("tenant_models_max", owner_max, count, QUOTA_RETRY_S)
        if len(self._models) < self._kept_max:
            return
        lost = (
            [self._models[model_id] for model_id in self._census.lost] if self._forget_lost else []
        )
        if lost:  # only tombstones; the oldest may go
            oldest = min(lost, key=lambda model: model.number)
            self.remove(oldest.model_id)
            self.on_deleted(oldest.model_id)
            return
        raise too_many_models("models_kept_max", self._kept_max)
