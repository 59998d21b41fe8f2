"""Many models on one base: a bounded number on the device, the others in host memory.

A slot is a place in the base model with its optimizer. Models of the same shape take turns in it by
copying values and moments, so a model computes the same whether it was away or not. Every rank
takes the same decisions, since they follow from the order of the calls alone.
"""

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from tinsmithd.domain import Tuning
from tinsmithd.modeling.trained import TrainedWeights
from tinsmithd.trainer.compute.spread import Spread, shares
from tinsmithd.trainer.engines.deepspeed.gradients import PendingGradients
from tinsmithd.trainer.engines.deepspeed.zero_adapter import ZeroAdapter, ZeroConfig
from tinsmithd.trainer.engines.deepspeed.zero_partitioned import ZeroPartitioned, is_partitioned
from tinsmithd.trainer.engines.deepspeed.zero_slice import StateCopy, ZeroSlice

_HOST = torch.device("cpu")


@dataclass(frozen=True)
class RankContext:
    """Where an engine computes.

    Attributes:
        weights: The weights that are trained, with the base below them.
        device: Device of this rank.
        rank: Number of this rank.
        world_size: Number of ranks.
        partitioned: Whether each rank holds a share of the base only.
        groups: This rank's neighbours in data that are spread over ranks, by their number.
    """

    weights: TrainedWeights
    device: torch.device
    rank: int
    world_size: int
    partitioned: bool
    groups: dict[int, dist.ProcessGroup] = field(default_factory=dict)

    def spread(self, tokens: int, ranks: int) -> Spread | None:
        """How a micro-batch is spread over this rank and its neighbours; None where it is not.

        Args:
            tokens: Of the micro-batch.
            ranks: Their number, one of `groups` unless it is 1.
        """
        if ranks == 1:
            return None
        return Spread(self.groups[ranks], self.rank % ranks, tuple(shares(tokens, ranks)))

    @property
    def in_step(self) -> bool:
        """Whether every rank must compute as many micro-batches as the others."""
        return self.partitioned and self.world_size > 1


@dataclass(eq=False)
class Slot:
    """A place on the device.

    Attributes:
        key: Key of its weights in `TrainedWeights`.
        shape: Shape of the models that fit in, see `Tuning`.
        zero: Its values and optimizer.
    """

    key: str
    shape: Tuning
    zero: ZeroSlice

    @property
    def parameters(self) -> Sequence[torch.nn.Parameter]:
        """What is trained, sorted by name."""
        return self.zero.parameters


@dataclass(eq=False)
class ResidentModel:
    """One model, wherever it is.

    Attributes:
        tuning: Its tuning.
        pending: Its pending gradients.
        slot: Its slot on the device, or None.
        away: Its state in host memory while it has no slot.
    """

    tuning: Tuning
    pending: PendingGradients = field(default_factory=PendingGradients)
    slot: Slot | None = None
    away: StateCopy | None = None


class ResidentModels:
    """All models of an engine.

    Args:
        context: Where it computes.
        zero: How models are spread over the ranks.
        release: Makes DeepSpeed drop every weight that is gathered.
        resident_models_max: Maximum number of models on the device at once.
    """

    def __init__(
        self,
        context: RankContext,
        zero: ZeroConfig,
        release: Callable[[], None],
        *,
        resident_models_max: int,
    ) -> None:
        self._weights = context.weights
        self._device = context.device
        self._zero = zero
        self._release = release
        self._slots_max = resident_models_max
        self._slot_count = 0
        self._free: list[Slot] = []
        self._models: dict[str, ResidentModel] = {}
        self._recent: OrderedDict[str, ResidentModel] = OrderedDict()
        """Models with a slot; the one used longest ago comes first."""

    def add(self, model_id: str, tuning: Tuning) -> None:
        """Add a model with its first values."""
        if model_id in self._models:
            raise ValueError(f"model {model_id!r} exists")
        slot = self._take_slot(tuning)
        try:
            names = slot.zero.layout.names
            shapes = dict(zip(names, slot.zero.layout.shapes, strict=True))
            values = self._weights.first_values(shapes, tuning)
            if values is not None:
                slot.zero.load(values, None, 0)
        except BaseException:
            self._free.append(slot)
            raise
        model = ResidentModel(tuning, slot=slot)
        self._models[model_id] = self._recent[model_id] = model

    def remove(self, model_id: str) -> None:
        """Drop a model; an unknown id is no error."""
        model = self._models.pop(model_id, None)
        self._recent.pop(model_id, None)
        if model is not None and model.slot is not None:
            self._free.append(model.slot)

    def get(self, model_id: str) -> ResidentModel:
        """A model, wherever it is."""
        return self._models[model_id]

    def use(self, model_id: str) -> tuple[ResidentModel, Slot]:
        """Bring a model to the device, where another may have to leave."""
        model = self._models[model_id]
        if model.slot is None:
            assert model.away is not None
            slot = self._take_slot(model.tuning)
            slot.zero.restore(model.away)
            model.pending.move(self._device)
            model.slot, model.away = slot, None
            self._recent[model_id] = model
        self._recent.move_to_end(model_id)
        return model, model.slot

    def _take_slot(self, tuning: Tuning) -> Slot:
        """Take a free slot of the right shape; without one, the model used longest ago leaves."""
        shape = tuning.shape
        while True:
            for index, slot in enumerate(self._free):
                if slot.shape == shape:
                    return self._free.pop(index)
            if self._slot_count < self._slots_max:
                return self._new_slot(shape)
            if self._free:
                self._drop(self._free.pop(0))
            else:
                self._send_away()

    def _send_away(self) -> None:
        _, model = self._recent.popitem(last=False)
        assert model.slot is not None
        model.away = model.slot.zero.copy_state()
        model.pending.move(_HOST)
        self._free.append(model.slot)
        model.slot = None

    def _new_slot(self, shape: Tuning) -> Slot:
        used = {slot.key for slot in self._free} | {
            model.slot.key for model in self._recent.values() if model.slot is not None
        }
        key = next(k for k in (f"slot {i}" for i in range(len(used) + 1)) if k not in used)
        self._weights.add(key, shape)
        try:
            zero = sharded(self._weights.parameters(key), self._zero, self._release)
        except BaseException:
            self._weights.remove(key)
            raise
        self._slot_count += 1
        return Slot(key, shape, zero)

    def close(self) -> None:
        """Drop everything; nobody uses the engine any more."""
        self._models.clear()
        for slot in [*self._free, *(m.slot for m in self._recent.values() if m.slot is not None)]:
            self._drop(slot)
        self._free.clear()
        self._recent.clear()

    def _drop(self, slot: Slot) -> None:
        slot.zero.close()
        self._weights.remove(slot.key)
        self._slot_count -= 1


def sharded(
    parameters: Mapping[str, torch.nn.Parameter], zero: ZeroConfig, release: Callable[[], None]
) -> ZeroSlice:
    """Make what holds values and optimizer of some parameters on this rank.

    Args:
        parameters: By name, sorted.
        zero: How models are spread over the ranks.
        release: Makes DeepSpeed drop every weight that is gathered.
    """
    if all(is_partitioned(parameter) for parameter in parameters.values()):
        return ZeroPartitioned(parameters, release, in_order=zero.in_order)
    return ZeroAdapter(parameters, zero)
