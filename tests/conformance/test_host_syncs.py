"""How often a call waits for the device: once, however many micro-batches it has.

The meta device stands in for one that works behind the host's back: it has no numbers, so whatever
would read one fails there.
"""

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from data import begin_alike, make_data, make_rl_data
from tinsmithd.domain import CrossEntropy, Datum, LoraConfig, LossFn
from tinsmithd.loss_fns import Dro, Gspo, Ppo
from tinsmithd.modeling import device_copies
from tinsmithd.modeling.base import load_base
from tinsmithd.modeling.device_copies import ToHost
from tinsmithd.modeling.grouped_experts import use_grouped_experts
from tinsmithd.modeling.lora import Adapters
from tinsmithd.modeling.packing import use_packed_attention
from tinsmithd.trainer.composition.compose import compose_data
from tinsmithd.trainer.engines.deepspeed.batch_run import BatchRun
from tinsmithd.trainer.engines.deepspeed.gradients import Layout
from tinsmithd.trainer.engines.deepspeed.residency import RankContext, ResidentModel, Slot
from tinsmithd.trainer.engines.interface import Batch

META = torch.device("meta")
LORA = LoraConfig(rank=4, seed=7)
COUNT = 24
LOSS_FNS = (CrossEntropy(), Ppo(), Dro(), Gspo())


@dataclass
class Waits:
    """Copies from the device that never come by themselves.

    Attributes:
        count: How often one was waited for.
    """

    count: int = 0
    here: bool = False

    def begin_copy(self, result: Tensor) -> tuple[Tensor, "Waits"]:
        assert result.device == META
        self.here = False
        return torch.zeros(result.shape), self

    def query(self) -> bool:
        return self.here

    def synchronize(self) -> None:
        self.count += 1
        self.here = True


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> Waits:
    found = Waits()
    monkeypatch.setattr(device_copies, "begin_copy", found.begin_copy)
    return found


def context_of(folder: Path) -> tuple[RankContext, Slot]:
    """A rank that is alone, with an adapter on all layers of a model without numbers."""
    base = load_base(str(folder), dtype="bfloat16", on_progress=lambda _: None)
    use_packed_attention(base)
    use_grouped_experts(base)
    weights = Adapters(base, fused=True)
    weights.add("m", LORA)
    base.model.to(META)
    parameters = weights.parameters("m")
    layout = Layout(parameters)
    zero: Any = SimpleNamespace(
        layout=layout,
        parameters=list(parameters.values()),
        padded_count=layout.count,
        adds_while_computing=False,
        collecting=lambda _: contextlib.nullcontext(),
    )
    context = RankContext(weights, META, rank=0, world_size=1, partitioned=False)
    return context, Slot("m", LORA, zero)


def data_of(loss_fn: LossFn) -> Sequence[Datum]:
    if isinstance(loss_fn, CrossEntropy):
        return [*make_data(0, COUNT // 2), *make_data(1, COUNT // 2, targets=3)]
    data = make_data(0, COUNT)
    data = [*data[:4], *begin_alike(0, data[4:], 16)]
    near = [np.zeros(len(datum.tokens), np.float32) for datum in data]
    rl = make_rl_data(0, data, near)
    mask = {"sequence_ratio_mask"} & set(loss_fn.inputs)
    return [
        Datum(
            datum.tokens,
            {
                **datum.loss_fn_inputs,
                **{name: np.ones(len(datum.tokens), np.float32) for name in mask},
            },
        )
        for datum in rl
    ]


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("loss_fn", LOSS_FNS, ids=[loss_fn.name for loss_fn in LOSS_FNS])
@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_a_call_waits_once_for_the_device(
    folders: Callable[[str], Path], waits: Waits, family: str, loss_fn: LossFn, backward: bool
) -> None:
    """With one micro-batch and with many; all logprobs come, in order, of their shapes."""
    context, slot = context_of(folders(family))
    data = data_of(loss_fn)
    for tokens_max, least, most in ((10_000, 1, 1), (16, 10, COUNT)):
        composed = compose_data(
            [datum.tokens for datum in data],
            share=True,
            tokens_max=tokens_max,
            plain_tokens_max=None,
            world_size=1,
            in_step=False,
        )
        assert least <= len(composed) <= most
        waits.count = 0
        found: list[tuple[int, tuple[int, ...]]] = []
        batch = Batch("m", data, loss_fn, backward=backward)
        run = BatchRun(context, ResidentModel(LORA, slot=slot), slot, batch)
        run.run(composed, lambda index, out, to=found: to.append((index, out["logprobs"].shape)))
        assert waits.count == 1
        shapes = [datum.loss_fn_inputs["target_tokens"].shape for datum in data]
        assert found == list(enumerate(shapes))
        assert run.executed == composed
        assert run.loss.device == META


def test_a_device_without_numbers_lets_none_be_read() -> None:
    """So the test above cannot miss whoever reads one."""
    x = torch.ones(3, device=META)
    for read in (float, torch.nonzero, lambda t: t[t > 0], Tensor.cpu, Tensor.tolist):
        with pytest.raises((NotImplementedError, RuntimeError)):
            read(x[0] if read is float else x)  # type: ignore[operator]


def test_results_come_in_order_as_soon_as_they_are_here(waits: Waits) -> None:
    """Those that are not are left on their way; the last brings all."""
    to_host: ToHost[str] = ToHost()
    for key in "abc":
        to_host.put(key, torch.zeros(2, device=META))
    assert list(to_host.arrived()) == []
    waits.here = True
    assert [key for key, _ in to_host.arrived()] == ["a", "b", "c"]
    assert waits.count == 0
    for key in "de":
        to_host.put(key, torch.zeros(2, device=META))
    assert [key for key, _ in to_host.rest()] == ["d", "e"]
    assert waits.count == 1
    assert list(to_host.rest()) == []
    assert waits.count == 1
