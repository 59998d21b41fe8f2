"""The engines of one base model by tuning; one of them is loaded at a time.

One tuning may change the weights that another stands on, so models of two tunings never live
together.
"""

import gc
from collections.abc import Callable, Mapping

from tinsmithd.domain import BaseModelInfo, Tuning
from tinsmithd.trainer.engines.interface import TrainingEngine

EngineMakers = Mapping[type[Tuning], Callable[[], TrainingEngine]]
"""By tuning, a function that loads the base model into an engine for it."""


class Engines:
    """Knows which engine has a model.

    Args:
        makers: Functions that make the engines.
        first: The tuning whose engine is loaded now.
    """

    def __init__(self, makers: EngineMakers, first: type[Tuning]) -> None:
        self._makers = makers
        self._model_ids: set[str] = set()
        self._loaded = first
        self._engine: TrainingEngine | None = makers[first]()
        self._info = self._engine.info
        self._identity = self._engine.identity

    @property
    def info(self) -> BaseModelInfo:
        """The base model."""
        return self._info

    @property
    def identity(self) -> Mapping[str, str]:
        """All that the last bit of a result depends on, besides calls and their compositions."""
        return self._identity

    def of(self, model_id: str) -> TrainingEngine:
        """The engine that has a model.

        Raises:
            KeyError: There is no such model.
        """
        if model_id not in self._model_ids or self._engine is None:
            raise KeyError(model_id)
        return self._engine

    def create_model(self, model_id: str, tuning: Tuning) -> None:
        """Add a model; the base model may have to be loaded for it first.

        Raises:
            ValueError: The id is taken, or the new model cannot live beside those that there are.
            InvalidArgument: See `TrainingEngine.create_model`.
        """
        wanted = type(tuning)
        if self._model_ids and not (tuning.is_adapter and wanted is self._loaded):
            raise ValueError("a model that is no adapter is alone, and adapters of one tuning are")
        # A model that is no adapter begins with the base model as it was loaded.
        if self._engine is None or wanted is not self._loaded or not tuning.is_adapter:
            self._load(wanted)
        assert self._engine is not None
        self._engine.create_model(model_id, tuning)
        self._model_ids.add(model_id)

    def delete_model(self, model_id: str) -> None:
        """Drop a model and free what it held. An unknown id is no error."""
        if model_id not in self._model_ids:
            return
        engine = self.of(model_id)
        self._model_ids.discard(model_id)
        if self._loaded.is_adapter:
            engine.delete_model(model_id)
        else:
            self._unload()  # the model changed its base

    def _load(self, tuning: type[Tuning]) -> None:
        # If loading fails there is no engine, and the creation of the next model tries again.
        self._unload()
        self._loaded = tuning
        self._engine = self._makers[tuning]()

    def _unload(self) -> None:
        """Free all memory of the engine, before another one takes it."""
        before, self._engine = self._engine, None
        if before is not None:
            before.close()
            del before
        gc.collect()
