"""Engines for tests."""

from collections.abc import Callable
from typing import Any

from tinsmithd.config import TrainerConfig
from tinsmithd.domain import LoraConfig, ModelState
from tinsmithd.trainer.engines.factory import engine_makers
from tinsmithd.trainer.engines.interface import Batch, ForwardResult, OnOutput, TrainingEngine
from tinsmithd.trainer.engines.registry import Engines
from tinsmithd.trainer.process_group import distributed


class AllTunings(Engines):
    """Engines that a test uses as one: each call goes to the engine of its model."""

    @property
    def engine(self) -> Any:
        """The engine that is loaded."""
        return self._engine

    def forward(self, batch: Batch, on_output: OnOutput) -> ForwardResult:
        return self.of(batch.model_id).forward(batch, on_output)

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def call(model_id: str, *arguments: Any, **settings: Any) -> Any:
            return getattr(self.of(model_id), name)(model_id, *arguments, **settings)

        return call


def make_engine(
    name: str,
    base_model: str,
    *,
    on_progress: Callable[[str], None] = lambda _: None,
    **settings: Any,
) -> Any:
    """Engines of all tunings, as one; settings are those of a rank."""
    config = TrainerConfig(engine=name, base_model=base_model, **settings)
    return AllTunings(engine_makers(config, on_progress), LoraConfig)


def on_every_rank(state: ModelState) -> ModelState:
    """A state that the first rank has, on each of them, as the Training server gives it to all."""
    import torch.distributed as dist

    found = [state]
    if dist.is_initialized():
        dist.broadcast_object_list(found, src=0)
    return found[0]


def leave_together(rank: int) -> None:
    """What a rank does at its end: it hears of it, and leaves the process group."""
    assert distributed.broadcast_bytes(b"end" if rank == 0 else None) == b"end"
    assert distributed.broadcast_bytes(b"" if rank == 0 else None) == b""
    distributed.close()


def only(engine: TrainingEngine) -> Engines:
    """One engine for adapters, as a rank has it."""
    return Engines({LoraConfig: lambda: engine}, LoraConfig)
