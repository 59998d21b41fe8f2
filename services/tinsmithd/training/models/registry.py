"""The models that there are."""

import contextlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence

from tinsmithd.errors import AlreadyExists, Reason
from tinsmithd.training.call import model_not_found
from tinsmithd.training.journal import USED_IDS_KEPT_MAX
from tinsmithd.training.models.model import Model
from tinsmithd.training.models.seats import too_many_models


class Registry:
    """The models that there are, by id.

    Args:
        kept_max: `models_kept_max`.
        forget_lost: Whether a lost model may make room for a new one: nothing of it is on disk.

    Attributes:
        on_deleted: Told the id of each model that is gone.
    """

    def __init__(self, kept_max: int, *, forget_lost: bool) -> None:
        self._kept_max = kept_max
        self._forget_lost = forget_lost
        self._models: OrderedDict[str, Model] = OrderedDict()
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

    def get(self, model_id: str) -> Model:
        """One model.

        Raises:
            NotFound: There is none of this id (MODEL_NOT_FOUND).
        """
        model = self._models.get(model_id)
        if model is None:
            raise model_not_found(model_id)
        return model

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
            message = f"a model {model_id!r} exists{was}; an id is given once"
            raise AlreadyExists(message, Reason.MODEL_EXISTS, metadata={"model_id": model_id})
        self._coming.add(model_id)
        try:
            yield
        finally:
            self._coming.discard(model_id)

    def add(self, model: Model) -> None:
        """A model is there from now on."""
        self._models[model.model_id] = model

    def remove(self, model_id: str) -> bool:
        """A model is gone; False where it was gone before."""
        model = self._models.pop(model_id, None)
        if model is not None and model.chose_id:
            self.used_id(model_id)
        return model is not None

    def check_room(self) -> None:
        """Refuse one more model.

        Raises:
            ResourceExhausted: There are `models_kept_max` (TOO_MANY_MODELS).
        """
        if len(self._models) < self._kept_max:
            return
        for model in self.oldest_first:
            if model.lane.lost and self._forget_lost:  # only a tombstone; the oldest may go
                self.remove(model.model_id)
                self.on_deleted(model.model_id)
                return
        raise too_many_models("models_kept_max", self._kept_max)
