"""An engine that computes nothing, in a rank group of its own process: all but computing is real.

    python -m scale.engine ADDRESS SECRET_FILE TURN_MS

The link, the commands and their answers are those of a rank; a forward takes TURN_MS.
"""

import sys
import time
from collections.abc import Mapping

import numpy as np

from tinsmithd.domain import AdamParams, BaseModelInfo, LoraConfig, ModelState, Tuning
from tinsmithd.trainer.commands import Commands
from tinsmithd.trainer.engines.interface import Batch, ForwardResult, OnOutput
from tinsmithd.trainer.engines.registry import Engines
from tinsmithd.trainer.link import LinkTarget, hello, lead

INFO = BaseModelInfo("tiny", "llama", 256, 100_000, "float32", 1, 1)
LORA = LoraConfig(rank=4, seed=1)
SHAPES = {"a.lora_A.weight": (4, 16), "a.lora_B.weight": (6, 4)}


def state(steps: int) -> ModelState:
    """A small adapter after some steps."""
    weights = {name: np.ones(shape, np.float32) for name, shape in SHAPES.items()}
    kinds = ("exp_avg", "exp_avg_sq") if steps else ()
    moments = {f"{kind}.{name}": array for kind in kinds for name, array in weights.items()}
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 32}
    return ModelState(LORA, weights, moments, steps, config)


class Idle:
    """See `TrainingEngine`.

    Args:
        turn_s: What a forward takes.
    """

    info = INFO
    identity: Mapping[str, str] = {"engine": "idle", "base_model": "tiny"}

    def __init__(self, turn_s: float) -> None:
        self._turn_s = turn_s
        self._steps: dict[str, int] = {}

    def create_model(self, model_id: str, tuning: Tuning) -> None:
        self._steps[model_id] = 0

    def delete_model(self, model_id: str) -> None:
        self._steps.pop(model_id, None)

    def forward(self, batch: Batch, on_output: OnOutput) -> ForwardResult:
        if self._turn_s:
            time.sleep(self._turn_s)
        for index, datum in enumerate(batch.data):
            shape = np.shape(datum.loss_fn_inputs["target_tokens"])
            on_output(index, {"logprobs": np.zeros(shape, np.float32)})
        return ForwardResult({"loss:sum": 0.0}, batch.composition or b"idle")

    def savepoint(self, model_id: str) -> None:
        """Nothing changes."""

    def rollback(self, model_id: str) -> None:
        """Nothing has changed."""

    def optim_step(self, model_id: str, adam: AdamParams) -> Mapping[str, float]:
        self._steps[model_id] += 1
        return {"grad_norm:last": 0.0, "step:last": float(self._steps[model_id])}

    def export_state(self, model_id: str, *, optimizer: bool) -> ModelState:
        return state(self._steps[model_id])

    def import_state(self, model_id: str, state: ModelState, *, optimizer: bool) -> None:
        self._steps[model_id] = state.step_count if optimizer else 0

    def close(self) -> None:
        """There is nothing to free."""


def main() -> None:
    """Attach, and answer until the process is ended."""
    address, secret_file, turn_ms = sys.argv[1:]
    engine = Idle(float(turn_ms) / 1e3)
    engines = Engines({LoraConfig: lambda: engine}, LoraConfig)
    commands = Commands(engines, world_size=1)
    lead(
        commands,
        LinkTarget(address, secret_file),
        hello(engines, "idle", 1),
        lambda data: data or b"",
    )


if __name__ == "__main__":
    main()
