"""Either many adapters on one base, or one model that trains the base itself.

A full model changes the weights that adapters would stand on, so the two never live together, and
the base is loaded again whenever a model is created on the other side of one.
"""

import gc
from collections.abc import Callable, Mapping

from tinsmithd.domain import (
    AdamParams,
    BaseModelInfo,
    FullConfig,
    ModelState,
    Tuning,
)
from tinsmithd.trainer.engines.interface import Batch, ClosableEngine, ForwardResult, OnOutput


class SwitchingEngine:
    """See `TrainingEngine`; starts ready for adapters.

    Args:
        make_adapters: Loads the base into an engine for adapters.
        make_full: Loads it into an engine for one full model.
    """

    def __init__(
        self,
        make_adapters: Callable[[], ClosableEngine],
        make_full: Callable[[], ClosableEngine],
    ) -> None:
        self._make_adapters = make_adapters
        self._make_full = make_full
        self._model_ids: set[str] = set()
        self._is_full = False
        self._engine: ClosableEngine | None = make_adapters()
        self._info = self._engine.info
        self._identity = self._engine.identity

    @property
    def engine(self) -> ClosableEngine:
        """The engine of the present models."""
        assert self._engine is not None
        return self._engine

    @property
    def info(self) -> BaseModelInfo:
        """The base model that this engine holds."""
        return self._info

    @property
    def identity(self) -> Mapping[str, str]:
        """All that the last bit of a result may depend on, besides calls and their compositions."""
        return self._identity

    def create_model(self, model_id: str, tuning: Tuning) -> None:
        """Add a model; the base may have to be loaded for it first."""
        full = isinstance(tuning, FullConfig)
        if self._model_ids and (full or self._is_full):
            raise ValueError("a full model is alone")
        if full or self._is_full or self._engine is None:
            self._load(full=full)
        self.engine.create_model(model_id, tuning)
        self._model_ids.add(model_id)

    def _load(self, *, full: bool) -> None:
        # Where loading fails there is no engine, and the next model that is created tries again.
        self._unload()
        self._is_full = full
        self._engine = self._make_full() if full else self._make_adapters()

    def _unload(self) -> None:
        """Free all memory: the one engine's before the other's is taken."""
        before, self._engine = self._engine, None
        if before is not None:
            before.close()
            del before
        gc.collect()

    def delete_model(self, model_id: str) -> None:
        """Drop a model and free what it held. An unknown id is no error."""
        if model_id not in self._model_ids:
            return
        self._model_ids.discard(model_id)
        if self._is_full:
            self._unload()
        else:
            self.engine.delete_model(model_id)

    def forward(self, batch: Batch, on_output: OnOutput) -> ForwardResult:
        """Compute the summed loss and, with `backward`, add its gradients to the pending ones."""
        return self.engine.forward(batch, on_output)

    def savepoint(self, model_id: str) -> None:
        """Remember the pending gradients, for `rollback`."""
        self.engine.savepoint(model_id)

    def rollback(self, model_id: str) -> None:
        """Put the pending gradients back to the `savepoint`, and forget it."""
        self.engine.rollback(model_id)

    def optim_step(self, model_id: str, adam: AdamParams) -> Mapping[str, float]:
        """Apply one AdamW step with the pending gradients and clear them."""
        return self.engine.optim_step(model_id, adam)

    def export_state(self, model_id: str, *, optimizer: bool) -> ModelState:
        """Copy a model's state out, with or without its optimizer state."""
        return self.engine.export_state(model_id, optimizer=optimizer)

    def import_state(self, model_id: str, state: ModelState, *, optimizer: bool) -> None:
        """Replace a model's weights by `state`'s and drop its pending gradients."""
        self.engine.import_state(model_id, state, optimizer=optimizer)
